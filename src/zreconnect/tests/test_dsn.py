"""Data source names, and what is shown of them."""

import os
import socket
import unittest
from unittest import mock

import psycopg2.extensions
from psycopg import pq

from zreconnect import ConnectionDescriptor, ReconnectingDatabaseAdapter, connect
from zreconnect.cli.errors import CommandError
from zreconnect.cli.target import target_for
from zreconnect.drivers import conninfo, psycopg
from zreconnect.drivers.base import load_driver
from zreconnect.drivers.psycopg2 import driver
from zreconnect.dsn import driver_name, parse_dbi, redacted

# The versions of libpq that came with the modules, and from which on it knows what is named here.
LIBPQ = {"psycopg2": psycopg2.extensions.libpq_version(), "psycopg": pq.version()}
SINCE = {
    "prefer-standby": 140000,
    "require_auth": 160000,
    "load_balance_hosts": 160000,
    "sslcertmode": 160000,
    "sslrootcert=system": 160000,
    "sslnegotiation": 170000,
}


def is_known(parameters, name="psycopg2"):
    """Whether the module's libpq knows what is in the parameters."""
    return all(LIBPQ[name] >= since for word, since in SINCE.items() if word in parameters)


class DriverNameTests(unittest.TestCase):
    def test_schemes(self):
        for dsn in [
            "postgresql://me@here/db",
            "POSTGRES://me@here/db",
            "dbi://me:secret@here/db",
            "host=here dbname=db",
            "dbname=db options='-c search_path=a'",
        ]:
            with self.subTest(dsn):
                self.assertEqual(driver_name(dsn), "psycopg2")

    def test_urls_of_sqlalchemy(self):
        for dsn, name in {
            "postgresql+psycopg2://me@here/db": "psycopg2",
            "postgresql+psycopg://me@here/db": "psycopg",
            "PostgreSQL+Psycopg://me@here/db": "psycopg",
            "mysql+pymysql://me@here/db": "pymysql",
            "mysql+mysqldb://me@here/db": "mysqlclient",
            "mariadb+pymysql://me@here/db": "pymysql",
            "sqlite+pysqlite:///job.db": "sqlite",
        }.items():
            with self.subTest(dsn):
                self.assertEqual(driver_name(dsn), name)
                self.assertEqual(driver_name(dsn, name), name)
                driver = load_driver(name) if name != "mysqlclient" else None
                if driver is not None:
                    without = dsn.replace(dsn.partition(":")[0], dsn.partition("+")[0].lower())
                    self.assertEqual(driver.parse(dsn), driver.parse(without))

    def test_several_hosts_as_sqlalchemy_has_them(self):
        url = "postgresql+psycopg2://me:s%40cret@/db?sslmode=disable&host=one:5433&host=two"
        self.assertEqual(
            driver.parse(url),
            {
                "user": "me",
                "password": "s@cret",
                "host": "one,two",
                "port": "5433,",
                "dbname": "db",
                "sslmode": "disable",
            },
        )
        for query, host, port in [
            ("host=/run/pg", "/run/pg", None),
            ("host=one:5433", "one", "5433"),
            ("host=one&host=two&port=5433,5434", "one,two", "5433,5434"),
            ("host=one,two&port=5433", "one,two", "5433"),
        ]:
            with self.subTest(query):
                parameters = driver.parse(f"postgresql+psycopg2:///db?{query}")
                self.assertEqual((parameters["host"], parameters.get("port")), (host, port))

    def test_a_plus_in_options_of_sqlalchemy_is_a_space(self):
        for scheme, expected in [
            ("postgresql+psycopg2", "-c work_mem=4MB"),
            ("postgresql", "-c+work_mem=4MB"),
        ]:
            with self.subTest(scheme):
                parameters = driver.parse(f"{scheme}://me:a+b@here/db?options=-c+work_mem%3D4MB")
                self.assertEqual(parameters["options"], expected)
                self.assertEqual(parameters["password"], "a+b")

    def test_a_driver_that_is_not_the_dsns(self):
        for dsn, asked, message in [
            ("postgresql+psycopg://me:s3cret@here/db", "psycopg2", "asks for psycopg: leave one"),
            ("postgresql+psycopg://me:s3cret@here/db", "mine", "asks for psycopg: leave one"),
            ("mysql://me:s3cret@here/db", "psycopg", "asks for mysqlclient or pymysql: leave"),
            ("sqlite:///s3cret", "psycopg2", "'sqlite' asks for sqlite: leave one"),
            ("postgresql+asyncpg://me:s3cret@here/db", "psycopg", "unknown scheme"),
            ("postgresql+psycopg_async://me:s3cret@here/db", "psycopg", "unknown scheme"),
        ]:
            with self.subTest(dsn), self.assertRaisesRegex(ValueError, message) as caught:
                connect(dsn, asked)
            self.assertNotIn("s3cret", str(caught.exception))

    def test_a_driver_that_is_asked_for(self):
        for dsn, asked in [
            ("postgresql://here/db", "psycopg"),
            ("dbi://db", "psycopg"),
            ("mysql://here/db", "pymysql"),
            ("host=here", "psycopg"),
            ("postgresql://here/db", "mine"),
            ("mine://here/db", "mine"),
        ]:
            self.assertEqual(driver_name(dsn, asked), asked)

    def test_wherever_a_dsn_is_taken(self):
        dsn = "postgresql+psycopg://me:s3cret@here/db"
        address = "postgresql://me@here/db"
        self.assertEqual(repr(connect(dsn)), f"<ReconnectingConnection {address} idle>")
        descriptor = ConnectionDescriptor(dsn)
        self.addCleanup(descriptor.close)
        self.assertEqual(descriptor.connection().server, address)
        adapter = ReconnectingDatabaseAdapter("dbname=db")
        adapter.setDSN(dsn)
        self.assertEqual(adapter.server, address)
        self.assertEqual(adapter.paramstyle, "pyformat")
        with self.assertRaisesRegex(ValueError, "contradicts"):
            ReconnectingDatabaseAdapter(dsn, driver="psycopg2")
        self.assertEqual(target_for(dsn, keep=True).driver.name, "psycopg")
        with self.assertRaisesRegex(CommandError, "argument --dsn: driver 'pymysql' contradicts"):
            target_for(dsn, keep=True, driver_named="pymysql")

    def test_unknown_scheme(self):
        with self.assertRaisesRegex(ValueError, "dsn has the unknown scheme 'oracle'"):
            driver_name("oracle://me@here/db")

    def test_empty(self):
        with self.assertRaisesRegex(ValueError, "dsn is empty"):
            driver_name(" ")

    def test_no_string(self):
        with self.assertRaisesRegex(TypeError, "dsn must be a string, not NoneType"):
            driver_name(None)


class ParseTests(unittest.TestCase):
    def test_url(self):
        self.assertEqual(
            driver.parse("postgresql://me:s%40cret@here:5433/db?sslmode=disable"),
            {
                "user": "me",
                "password": "s@cret",
                "host": "here",
                "port": "5433",
                "dbname": "db",
                "sslmode": "disable",
            },
        )

    def test_key_value(self):
        self.assertEqual(driver.parse("host=here dbname=db"), {"host": "here", "dbname": "db"})

    def test_dbi(self):
        for dsn, parts in {
            "dbi://db": {"dbname": "db"},
            "dbi:///db": {"dbname": "db"},
            "dbi://me:secret/db": {"dbname": "db", "user": "me", "password": "secret"},
            "dbi://me:@here:5433/db": {
                "dbname": "db",
                "user": "me",
                "host": "here",
                "port": "5433",
            },
            "DBI://me:s%2Fcret@here/db;sslmode=disable;connect_timeout=3": {
                "dbname": "db",
                "user": "me",
                "password": "s/cret",
                "host": "here",
                "sslmode": "disable",
                "connect_timeout": "3",
            },
        }.items():
            with self.subTest(dsn):
                self.assertEqual(driver.parse(dsn), parts)

    def test_dbi_without_its_parts(self):
        for dsn in ["dbi://", "dbi://me:secret@here/", "dbi://me@here/db;sslmode"]:
            with self.subTest(dsn), self.assertRaisesRegex(ValueError, "dsn is no dbi:// name"):
                parse_dbi(dsn)

    def test_what_libpq_does_not_understand_is_not_quoted(self):
        for dsn in ["host=here s3cret", "postgresql://me:s3cret%zz@here/db"]:
            with self.subTest(dsn), self.assertRaisesRegex(ValueError, "^dsn is no") as caught:
                connect(dsn)
            self.assertNotIn("s3cret", str(caught.exception))
            self.assertIsNone(caught.exception.__cause__)
            self.assertTrue(caught.exception.__suppress_context__)


class MistakeTests(unittest.TestCase):
    """What libpq refuses whoever the server is, is a mistake in the DSN."""

    def test_values(self):
        for parameters, message in {
            "sslmode=verify-ful": 'refused by libpq: invalid sslmode value: "..."',
            "target_session_attrs=primry": "invalid target_session_attrs value",
            "gssencmode=maybe": "invalid gssencmode value",
            "channel_binding=maybe": "invalid channel_binding value",
            "require_auth=secret": "invalid require_auth value",
            "load_balance_hosts=maybe": "invalid load_balance_hosts value",
            "sslnegotiation=maybe": "invalid sslnegotiation value",
            "sslcertmode=maybe": "invalid sslcertmode value",
            "ssl_min_protocol_version=SSL": "invalid .*ssl_min_protocol_version",
            "ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2": "range",
            "sslrootcert=system sslmode=require": "may not be used with sslrootcert=system",
            "sslmode=disable sslnegotiation=direct": "may not be used with sslnegotiation",
            "service=missing": 'service "..." not found',
            "port=99999": "port must be a number from 1 to 65535",
            "port=0": "port must be",
            "port=one": "port must be",
            "host=a,b port=1,99999": "port must be",
            "host=a,b port=1,2,3": "could not match 3 port numbers to 2 hosts",
            "host=a,b,c hostaddr=10.0.0.1": "host and hostaddr must have the same number",
            "hostaddr=a": "hostaddr must be an IP address",
            "hostaddr=10.0.0.1,10.0.0.2 port=1,2,3": "could not match 3 port numbers to 2 hosts",
            "connect_timeout=soon": "connect_timeout must be a whole number",
            "keepalives_idle=1m": "keepalives_idle must be a whole number",
            "tcp_user_timeout=": "tcp_user_timeout must be a whole number",
        }.items():
            for name in ("psycopg2", "psycopg"):
                if not is_known(parameters, name):
                    continue
                with self.subTest(parameters, name=name):
                    dsn = f"dbname=db {parameters}"
                    with self.assertRaisesRegex(ValueError, f"^dsn.*{message}"):
                        connect(dsn, driver=name)

    def test_no_value_is_quoted(self):
        for dsn in (
            # A password with a slash, not written as %2F.
            "postgresql://me:s3/cret@here/db",
            "dbi://me:pw@here:s3/db",
            "dbname=db require_auth=s3",
        ):
            with self.assertRaisesRegex(ValueError, "^dsn") as raised:
                connect(dsn)
            error = raised.exception
            context = None if error.__suppress_context__ else error.__context__
            self.assertNotIn("s3", f"{error} {context}")

    def test_of_the_environment(self):
        with (
            mock.patch.dict(os.environ, PGSSLMODE="maybe"),
            self.assertRaisesRegex(ValueError, "invalid sslmode value"),
        ):
            connect("dbname=db")

    def test_none(self):
        # Nobody is contacted, and the environment or a service may name several hosts.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(0)
            port = listener.getsockname()[1]
            environment = {
                "PGHOST": "a,b",
                "PGPORT": "1,2",
                "PGHOSTADDR": "::1,::2",
                "PGGSSENCMODE": "require",
            }
            with mock.patch.dict(os.environ, environment):
                for dsn in (
                    f"host=127.0.0.1 port={port} gssencmode=require sslmode=require",
                    f"hostaddr=127.0.0.1,::1 port={port}",
                    f"host=127.0.0.1,,/run hostaddr=,::1, port=,{port},2 keepalives=0",
                    "host=missing.invalid port='' target_session_attrs=prefer-standby",
                    "dbname=db",
                    "port=1",
                    "port=1,2",
                ):
                    for name in ("psycopg2", "psycopg"):
                        if is_known(dsn, name):
                            with self.subTest(dsn, name=name):
                                connect(dsn, driver=name)
            self.assertRaises(BlockingIOError, listener.accept)


class PlacesTests(unittest.TestCase):
    def places(self, dsn, *names):
        found = psycopg.driver.places(driver.parse(dsn))
        return [tuple(place.get(name) for name in names) for place in found]

    def test_hosts(self):
        self.assertEqual(
            self.places("host=a,,/run port=1 dbname=db", "host", "port", "dbname"),
            [("a", "1", "db"), ("", "1", "db"), ("/run", "1", "db")],
        )
        self.assertEqual(
            self.places("host=a,b hostaddr=,::1 port=1,2", "host", "hostaddr", "port"),
            [("a", "", "1"), ("b", "::1", "2")],
        )
        self.assertEqual(
            self.places("hostaddr=::1,::2", "host", "hostaddr"), [(None, "::1"), (None, "::2")]
        )

    def test_what_does_not_fit_is_left_to_libpq(self):
        parameters = {"host": "a,b", "port": "1,2,3"}
        self.assertEqual(conninfo.places(parameters), [parameters])

    def test_addresses(self):
        found = [(0, 0, 0, "", (address, 0)) for address in ("::1", "10.0.0.1", "::1")]
        with mock.patch.object(socket, "getaddrinfo", return_value=found):
            self.assertEqual(
                self.places("host=a", "host", "hostaddr"), [("a", "::1"), ("a", "10.0.0.1")]
            )
            for dsn in ("host=a hostaddr=::3", "host=/run", "host=@abstract", "dbname=db"):
                self.assertEqual(self.places(dsn, "dbname"), [(driver.parse(dsn).get("dbname"),)])

    def test_a_name_that_is_not_known_is_left_to_libpq(self):
        for error in (socket.gaierror(), UnicodeError()):
            with mock.patch.object(socket, "getaddrinfo", side_effect=error):
                self.assertEqual(self.places("host=a", "host", "hostaddr"), [("a", None)])

    @unittest.skipUnless(is_known("prefer-standby"), "libpq knows no prefer-standby")
    def test_standbys_first(self):
        dsn = "host=a,b target_session_attrs=prefer-standby"
        passes = psycopg.driver.places(driver.parse(dsn))
        self.assertEqual([each["target_session_attrs"] for each in passes], ["standby", "any"])
        for each in passes:
            self.assertEqual([place["host"] for place in psycopg.driver.places(each)], ["a", "b"])
        one = "host=127.0.0.1 target_session_attrs=prefer-standby"
        self.assertEqual(self.places(one, "target_session_attrs"), [("prefer-standby",)])

    @unittest.skipUnless(is_known("load_balance_hosts"), "libpq knows no load_balance_hosts")
    def test_load_balancing(self):
        with mock.patch("random.shuffle", side_effect=list.reverse):
            dsn = "host=a,b load_balance_hosts=random"
            self.assertEqual(self.places(dsn, "host"), [("b",), ("a",)])


class RedactedTests(unittest.TestCase):
    def test_all_parts(self):
        address = redacted(driver.parse("postgresql://me:s3cret@here:5433/db"))
        self.assertEqual(address, "postgresql://me@here:5433/db")

    def test_few_parts(self):
        self.assertEqual(redacted({"dbname": "db"}), "postgresql:///db")
        self.assertEqual(redacted({"hostaddr": "10.0.0.1"}), "postgresql://10.0.0.1/")

    def test_several_hosts_and_sockets(self):
        self.assertEqual(
            redacted({"host": "one,two", "port": "1,2", "dbname": "db"}),
            "postgresql://one,two:1,2/db",
        )
        self.assertEqual(redacted({"host": "/run/postgresql"}), "postgresql:///run/postgresql/")
