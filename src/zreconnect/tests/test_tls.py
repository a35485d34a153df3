"""TLS: certificates, sessions that end in the middle of it, and never less of it than before."""

import importlib.util
import itertools
import os
import ssl
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import psycopg
import psycopg2
import pymysql

import zreconnect
from zreconnect import (
    FAIL_FAST,
    DisconnectionError,
    Ledger,
    ReconnectingConnection,
    ReconnectTimeout,
    RetryPolicy,
)
from zreconnect.drivers.base import load_driver
from zreconnect.events import ConnectionAttemptFailed
from zreconnect.testing import EmbeddedMariaDB, PortForward
from zreconnect.testing._forwarder import DIRECTIONS
from zreconnect.tests.base import (
    REQUIRED,
    DatabaseTestCase,
    LineTestCase,
    on_mariadb,
    with_time_to_connect,
)
from zreconnect.tests.tls import Terminator, make_certificate, needs_openssl

MODULES = {"psycopg2": psycopg2, "psycopg": psycopg}
# Of a value, which takes several records, in bytes.
SIZE = 100_000


@needs_openssl
class PostgresqlTests(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()
        self.certificate, self.key = make_certificate(self)
        self.terminator = Terminator(self, self.server, self.certificate, self.key)

    def tls_dsn(self, **options):
        chosen = "&".join(f"{name}={value}" for name, value in options.items())
        dsn = self.server.dsn(dbname=self.dbname, port=self.terminator.port)
        return f"{dsn}?{chosen}"

    def open(self, driver, dsn=None, **keywords):
        connection = zreconnect.connect(dsn or self.tls_dsn(), driver, **keywords)
        self.addCleanup(connection.close)
        return connection

    def used(self, driver, *args, **keywords):
        """A connection that has a session with TLS."""
        connection = self.open(driver, *args, **keywords)
        with connection.transaction() as cursor:
            cursor.execute("SELECT 1")
        self.assert_encrypted(connection)
        return connection

    def assert_encrypted(self, connection):
        raw = connection.driver_connection
        self.assertTrue(connection.work.link.driver.uses_tls(raw))

    def end_sessions(self):
        for pid in self.sessions():
            self.server.terminate_backend(pid)

    def assert_refused(self, connection, pattern):
        """Nobody waits, and no publisher or loop runs it again."""
        module = connection.work.link.driver.module
        with self.events() as seen, self.assertRaisesRegex(module.OperationalError, pattern) as met:
            connection.begin()
        self.assertNotIsInstance(met.exception, DisconnectionError)
        self.assertFalse(any(isinstance(each, ConnectionAttemptFailed) for each in seen))
        self.assertEqual(connection.state, "idle")
        return met.exception

    def test_no_session_has_less_than_the_one_before(self):
        for driver in MODULES:
            for options in ({}, {"sslmode": "prefer"}, {"sslmode": "require"}):
                with self.subTest(driver, **options):
                    self.terminator.way = "tls"
                    connection = self.used(driver, self.tls_dsn(**options))
                    self.terminator.way = "none"
                    self.end_sessions()
                    error = self.assert_refused(connection, "does not support SSL")
                    self.assertIn(f"port {self.terminator.port}", str(error))
                    self.assertIn("sslmode=require", str(error))
                    self.assert_refused(connection.fork(), "sslmode=require")
                    self.terminator.way = "tls"
                    connection.begin()
                    self.assert_encrypted(connection)
        self.assertEqual(self.terminator.unencrypted, 0)

    def test_nor_if_somebody_ends_each_handshake(self):
        """libpq's sslmode=prefer then tries without."""
        for driver in MODULES:
            with self.subTest(driver):
                self.terminator.way = "tls"
                connection = self.used(driver, policy=RetryPolicy(timeout=1))
                self.terminator.way = "hang up"
                self.end_sessions()
                with self.assertRaisesRegex(ReconnectTimeout, r"\d attempts? in .*SSL"):
                    connection.begin()
                self.terminator.way = "tls"
                connection.begin()
                self.assert_encrypted(connection)
        self.assertEqual(self.terminator.unencrypted, 0)

    def test_a_connection_factory(self):
        for driver, module in MODULES.items():
            with self.subTest(driver):
                self.terminator.way = "tls"
                factory = partial(module.connect, self.tls_dsn())
                connection = ReconnectingConnection(factory, driver)
                self.addCleanup(connection.close)
                connection.run(connection.execute, "SELECT 1")
                self.terminator.way = "none"
                self.end_sessions()
                self.assert_refused(connection, "TLS connection required.*sslmode=require")
                self.terminator.way = "tls"
                connection.begin()

    def test_who_begins_without(self):
        for driver in MODULES:
            with self.subTest(driver):
                for options in ({}, {"sslmode": "disable"}):
                    self.terminator.way = "none"
                    connection = self.open(driver, self.tls_dsn(**options))
                    for _ in range(2):
                        connection.run(connection.execute, "SELECT 1")
                        self.end_sessions()
                    self.terminator.way = "tls"
                    connection.run(connection.execute, "SELECT 1")
                self.assertFalse(load_driver(driver).uses_tls(connection.driver_connection))

    def test_what_was_asked_for_is_not_weakened(self):
        asked = {"PGSSLMODE": "verify-full", "PGSSLROOTCERT": str(self.certificate)}
        for driver in MODULES:
            with self.subTest(driver), mock.patch.dict(os.environ, asked):
                connection = self.used(driver)
                self.terminator.use(*make_certificate(self, "DNS:elsewhere.example"))
                connection.driver_connection.close()
                try:
                    self.assert_refused(connection, "certificate verify failed")
                finally:
                    self.terminator.use(self.certificate, self.key)
                connection.begin()
                self.assert_encrypted(connection)

    def test_certificates(self):
        expired = make_certificate(self, has_expired=True)
        elsewhere = make_certificate(self, "DNS:elsewhere.example")
        for certificate, authority, pattern in (
            (expired, expired, "certificate verify failed"),
            (elsewhere, elsewhere, "does not match host name"),
            (elsewhere, expired, "certificate verify failed"),
        ):
            self.terminator.use(*certificate)
            dsn = self.tls_dsn(sslmode="verify-full", sslrootcert=authority[0])
            for driver in MODULES:
                with self.subTest(driver, pattern=pattern):
                    self.assert_refused(self.open(driver, dsn), pattern)

    def test_a_close_in_the_handshake(self):
        dsn = self.tls_dsn(sslmode="require")
        for driver in MODULES:
            with self.subTest(driver):
                self.terminator.way = "hang up"
                connection = self.open(driver, dsn, policy=RetryPolicy(timeout=1))
                with self.assertRaisesRegex(ReconnectTimeout, r"\d attempts? in .*SSL"):
                    connection.begin()
                with self.assertRaisesRegex(DisconnectionError, "SSL"):
                    self.open(driver, dsn, policy=FAIL_FAST).begin()
                self.terminator.way = "tls"
                connection.begin()

    def test_a_session_that_is_cut_inside_a_record(self):
        line = PortForward(self.terminator.host, self.terminator.port)
        line.start()
        self.addCleanup(line.stop)
        dsn = self.server.dsn(dbname=self.dbname, port=line.port)
        for driver in MODULES:
            cut_inside_records(self, line, self.used(driver, dsn), self.names)


def cut_inside_records(test_case, line, connection, names):
    """A unit of work runs again when a record of its statement, or of the answer, is not whole.

    names: returns those in the table.
    """
    ways = itertools.product(DIRECTIONS, (False, True))
    for number, (direction, reset) in enumerate(ways):
        with test_case.subTest(connection.server, direction=direction, reset=reset):
            name, runs = f"{type(connection.work.link.driver).__name__} {number}", []

            def work(direction=direction, reset=reset, name=name, runs=runs):
                runs.append(None)
                connection.execute("INSERT INTO item VALUES (%s)", (name,)).close()
                if len(runs) == 1:
                    line.cut(direction, SIZE // 2, reset=reset)
                cursor = connection.cursor()
                cursor.execute("SELECT %s", ("x" * SIZE,))
                test_case.assertEqual(len(cursor.fetchone()[0]), SIZE)

            connection.run(work)
            test_case.assertEqual(len(runs), 2)
            test_case.assertIn(name, names())


@with_time_to_connect
@on_mariadb()
@needs_openssl
class MysqlTests(LineTestCase):
    def setUp(self):
        self.certificate, key = make_certificate(self)
        self.tls = {"ssl_cert": self.certificate, "ssl_key": key}
        self.server = EmbeddedMariaDB(settings=self.tls)
        self.addCleanup(self.server.stop)
        self.server.start()
        self.server.query("CREATE TABLE item (name varchar(50)) ENGINE=InnoDB", dbname="test")
        self.line = PortForward(self.server.host, self.server.port)
        self.line.start()
        self.addCleanup(self.line.stop)
        self.drivers = {"pymysql": ""}
        if importlib.util.find_spec("MySQLdb") or REQUIRED:
            # MariaDB's client library has TLS only if something is said of it.
            self.drivers["mysqlclient"] = f"ssl_ca={self.certificate}"

    def open(self, driver, options="", host=None, **keywords):
        given = "&".join(filter(None, (self.drivers[driver], options)))
        dsn = f"{self.server.dsn(host=host, port=self.line.port)}?{given}"
        connection = zreconnect.connect(dsn, driver, witness=Ledger(), **keywords)
        self.addCleanup(connection.close)
        return connection

    def used(self, driver, *args, **keywords):
        connection = self.open(driver, *args, **keywords)
        connection.run(connection.execute, "SELECT 1")
        self.assertTrue(self.cipher(connection))
        return connection

    def cipher(self, connection):
        with connection.transaction() as cursor:
            cursor.execute("SHOW STATUS LIKE 'Ssl_cipher'")
            return cursor.fetchone()[1]

    def names(self):
        return [name for (name,) in self.server.query("SELECT name FROM item", dbname="test")]

    def restart(self, settings):
        self.server.settings = settings
        self.server.restart()

    def test_no_session_has_less_than_the_one_before(self):
        connections = [
            self.used(driver, options)
            for driver in self.drivers
            for options in ("", "ssl_mode=PREFERRED", "ssl_mode=REQUIRED")
        ]
        self.restart({})
        for connection in connections:
            module = connection.work.link.driver.module
            with (
                self.subTest(connection.work.link.driver.name),
                self.assertRaisesRegex(module.OperationalError, "ssl_mode=REQUIRED") as refused,
            ):
                connection.begin()
            self.assertNotIsInstance(refused.exception, DisconnectionError)
        self.restart(self.tls)
        for connection in connections:
            connection.begin()
            connection.rollback()
            self.assertTrue(self.cipher(connection))

    def test_who_begins_without(self):
        for settings in ({}, self.tls):
            self.restart(settings)
            for driver in self.drivers:
                self.drivers[driver] = "ssl_mode=DISABLED"
                with self.subTest(driver, **settings):
                    self.assertEqual(self.cipher(self.open(driver)), "")

    def test_a_connection_factory(self):
        def factory():
            return pymysql.connect(
                host=self.server.host,
                port=self.server.port,
                user=self.server.user,
                password=self.server.password,
            )

        connection = ReconnectingConnection(factory, "pymysql", witness=None)
        self.addCleanup(connection.close)
        self.assertTrue(self.cipher(connection))
        self.restart({})
        with self.assertRaisesRegex(pymysql.OperationalError, "TLS connection required"):
            connection.begin()

    def test_certificates(self):
        expired = make_certificate(self, has_expired=True)
        elsewhere = make_certificate(self, "DNS:elsewhere.example")
        # MariaDB's client library 3.4 does not ask 127.0.0.1 who it is, and has words of its own.
        wrong_name = "certificate|Hostname verification failed"
        for (certificate, key), host, message in (
            (expired, "127.0.0.1", "certificate"),
            (elsewhere, "127.1", wrong_name),
        ):
            self.restart({"ssl_cert": certificate, "ssl_key": key})
            for driver in self.drivers:
                self.drivers[driver] = f"ssl_ca={certificate}"
                connection = self.open(driver, "ssl_mode=VERIFY_IDENTITY", host=host)
                error = connection.work.link.driver.module.OperationalError
                with self.subTest(driver, host=host):
                    with self.assertRaisesRegex(error, message) as refused:
                        connection.begin()
                    self.assertNotIsInstance(refused.exception, DisconnectionError)

    def test_the_certificates_of_the_system_are_read_where_one_is_verified(self):
        read = ssl.SSLContext.load_default_certs
        with mock.patch.object(ssl.SSLContext, "load_default_certs", autospec=True) as reading:
            reading.side_effect = read
            for options in ("", "ssl_mode=PREFERRED", "ssl_mode=REQUIRED"):
                self.used("pymysql", options)
            reading.assert_not_called()
            connection = self.open("pymysql", "ssl_mode=VERIFY_CA")
            with self.assertRaisesRegex(pymysql.OperationalError, "certificate"):
                connection.begin()
            reading.assert_called()

    def test_a_context_is_of_the_class_that_ssl_has_by_then(self):
        """gunicorn has gevent replace it after it has loaded an application beforehand."""
        program = """
import sys, gevent.monkey, zreconnect
connection = zreconnect.connect(sys.argv[1], "pymysql", witness=None)
gevent.monkey.patch_all()
for _ in range(2):
    with connection.transaction() as cursor:
        cursor.execute("SHOW STATUS LIKE 'Ssl_cipher'")
        print(cursor.fetchone()[1] != "", type(connection.driver_connection._sock).__module__)
        connection.driver_connection._sock.close()
"""
        for options in ("", "?ssl_mode=REQUIRED"):
            with self.subTest(options):
                run = subprocess.run(
                    (sys.executable, "-W", "ignore", "-c", program, self.server.dsn() + options),
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=60,
                )
                self.assertEqual(run.stdout.split(), ["True", "gevent.ssl"] * 2, run.stderr)

    def test_what_an_option_file_has_is_for_its_connections(self):
        certificate, key = make_certificate(self)
        self.restart({**self.tls, "ssl_ca": certificate})
        self.server.query(f"GRANT ALL ON *.* TO x509@'%' IDENTIFIED BY '{self.server.password}'")
        self.server.query("ALTER USER x509@'%' REQUIRE X509")
        directory = certificate.parent
        Path(directory, "with").write_text(f"[client]\nssl-cert={certificate}\nssl-key={key}\n")
        Path(directory, "without").write_text("[client]\n")

        def user(name):
            dsn = self.server.dsn(user="x509")
            dsn += f"?ssl_mode=REQUIRED&read_default_file={directory / name}"
            connection = zreconnect.connect(dsn, "pymysql", policy=FAIL_FAST, witness=None)
            self.addCleanup(connection.close)
            with connection.transaction() as cursor:
                cursor.execute("SELECT CURRENT_USER()")
                return cursor.fetchone()

        self.assertEqual(user("with"), ("x509@%",))
        with self.assertRaisesRegex(pymysql.OperationalError, "Access denied"):
            user("without")

    def test_no_tls_where_pymysql_is_without(self):
        with mock.patch("pymysql.connections.SSL_ENABLED", False):
            self.assertEqual(self.cipher(self.open("pymysql")), "")

    def test_keys_that_cannot_be_logged(self):
        with mock.patch.dict(os.environ, SSLKEYLOGFILE="/missing/file"):
            for options in ("", "ssl_mode=REQUIRED", "ssl_mode=VERIFY_CA"):
                with self.assertRaisesRegex(ValueError, "refuses an option.*No such file"):
                    self.open("pymysql", options)

    def test_a_close_in_the_handshake(self):
        for driver in self.drivers:
            connection = self.open(driver, "ssl_mode=REQUIRED", policy=RetryPolicy(timeout=30))
            # Of the client's packets, the second one has begun the handshake.
            with self.subTest(driver), self.events() as seen:
                self.line.cut("to_server", 60)
                connection.run(connection.execute, "SELECT 1")
            self.assertEqual(sum(isinstance(each, ConnectionAttemptFailed) for each in seen), 1)

    def test_a_session_that_is_cut_inside_a_record(self):
        for driver in self.drivers:
            cut_inside_records(self, self.line, self.used(driver), self.names)
