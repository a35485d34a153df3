"""Servers that are frozen, full or long in starting, and ports where something else answers."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import tempfile
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psycopg
import psycopg2

import zreconnect
from zreconnect import FAIL_FAST, DisconnectionError, ReconnectTimeout, RetryPolicy
from zreconnect.events import ConnectionLost
from zreconnect.testing import EmbeddedPostgres
from zreconnect.testing._ports import LOCALHOST, bind
from zreconnect.testing.layers import MARIADB_LAYER, POSTGRES_LAYER
from zreconnect.tests import namespaces
from zreconnect.tests.base import (
    PATIENCE,
    DatabaseTestCase,
    LineTestCase,
    needs_mysqlclient,
    on_mariadb,
    wait_until,
    with_time_to_connect,
)

MODULES = {"psycopg2": psycopg2, "psycopg": psycopg}
SHORT = RetryPolicy(timeout=2)
# What a shell's command waits for.
GATE = "go_on"


class FaultTestCase(LineTestCase):
    def setUp(self):
        super().setUp()
        self.threads = ThreadPoolExecutor(20)
        self.addCleanup(self.threads.shutdown)

    def open(self, dsn, driver, **keywords):
        connection = zreconnect.connect(dsn, driver, **keywords)
        self.addCleanup(connection.close)
        return connection

    def used(self, *args, **keywords):
        """A connection that has a session."""
        connection = self.open(*args, **keywords)
        connection.run(connection.execute, "SELECT 1")
        return connection

    def call_all(self, functions):
        return [self.threads.submit(function) for function in functions]

    def assert_give_up(self, calls, pattern):
        for call in calls:
            error = call.exception(PATIENCE)
            self.assertIsInstance(error, ReconnectTimeout)
            told = r"^No connection to \S+ after \d+ attempts? in \S+ seconds; .*"
            self.assertRegex(str(error), told + pattern)

    def number_of(self, kind, seen):
        return sum(isinstance(event, kind) for event in seen)


class FrozenTests(FaultTestCase, DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()

    def freeze(self, pid):
        self.server.suspend_backend(pid)
        self.addCleanup(self.server.ensure_running)

    def test_a_postmaster(self):
        """Who has a session keeps it. Nobody gets another one until it goes on."""
        used = [self.used(self.dsn, driver) for driver in MODULES]
        lost = [self.used(self.dsn, driver) for driver in MODULES]
        for connection in lost:
            self.server.terminate_backend(connection.info.backend_pid)
        postmaster = self.server._running_process().pid
        self.freeze(postmaster)
        for connection in used:
            with connection.transaction() as cursor:
                cursor.execute("INSERT INTO item VALUES (%s)", (connection.work.link.driver.name,))
        waiting = self.call_all(connection.begin for connection in lost)
        short, fast = (
            self.call_all(self.open(self.dsn, driver, policy=policy).begin for driver in MODULES)
            for policy in (SHORT, FAIL_FAST)
        )
        self.assert_give_up(short, "no answer within")
        for call in fast:
            self.assertIsInstance(call.exception(PATIENCE), DisconnectionError)
        self.assertFalse(any(call.done() for call in waiting))
        self.server.resume_backend(postmaster)
        for call in waiting:
            call.result(PATIENCE)
        self.assertEqual(self.names(), sorted(MODULES))

    def test_a_server_process(self):
        """Its kernel acknowledges what is sent all the same: TCP finds nothing wrong."""
        idle = [self.used(self.dsn, driver, policy=SHORT) for driver in MODULES]
        for connection in idle:
            self.freeze(connection.info.backend_pid)
        begun = self.call_all(connection.begin for connection in idle)
        with self.events() as seen:
            units = self.call_all(partial(self.unit, driver) for driver in MODULES)
            wait_until(lambda: self.number_of(ConnectionLost, seen) >= len(units) + len(idle))
        for call in begun:
            call.result(PATIENCE)
        # Only now they can be ended.
        self.server.ensure_running()
        self.assertEqual([call.result(PATIENCE) for call in units], [2, 2])
        self.assertEqual(self.names(), sorted(MODULES))

    def unit(self, driver):
        """Run a unit of work whose session freezes in its first run; the number of runs."""
        connection = self.used(self.dsn, driver, response_timeout=1)
        runs = []

        def work():
            runs.append(None)
            connection.execute("INSERT INTO item VALUES (%s)", (driver,))
            if len(runs) == 1:
                self.freeze(connection.info.backend_pid)
                connection.execute("SELECT 1")

        connection.run(work)
        return len(runs)


class OwnServerTestCase(FaultTestCase):
    def start(self, directory=None, **settings):
        server = EmbeddedPostgres(directory, settings)
        self.addCleanup(server.stop)
        server.start()
        return server


class FullTests(OwnServerTestCase):
    @with_time_to_connect
    def test_no_connection_is_left(self):
        server = self.start(max_connections=4)
        with contextlib.ExitStack() as others:
            wait_until(lambda: not self.takes_another(server.dsn(), others))
            waiting = [self.open(server.dsn(), driver) for driver in MODULES]
            calls = self.call_all(connection.begin for connection in waiting)
            short = [self.open(server.dsn(), driver, policy=SHORT) for driver in MODULES]
            self.assert_give_up(
                self.call_all(connection.begin for connection in short), "too many clients already"
            )
            self.assertFalse(any(call.done() for call in calls))
        for call in calls:
            call.result(PATIENCE)

    def takes_another(self, dsn, others):
        try:
            others.enter_context(contextlib.closing(psycopg2.connect(dsn)))
        except psycopg2.OperationalError:
            return False
        return True

    @unittest.skipUnless(os.getuid() == 0, "only root can make a small file system")
    def test_a_disk(self):
        # In a thread that sees a file system which nobody else sees, and which ends with it.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self.run_on_small_disk).result()

    def run_on_small_disk(self):
        namespaces.leave_others(namespaces.MOUNTS)
        with tempfile.TemporaryDirectory() as directory:
            Path(directory).chmod(0o755)
            for command in (
                ("mount", "--make-rprivate", "/"),
                ("mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", directory),
            ):
                subprocess.run(command, check=True)
            server = EmbeddedPostgres(
                Path(directory, "server"), {"min_wal_size": "32MB", "max_wal_size": "32MB"}
            )
            try:
                server.start()
                self.fill(server, Path(directory, "filler"))
            finally:
                server.stop()
                subprocess.run(("umount", "--lazy", directory), check=True)

    def fill(self, server, filler):
        # A page of the table has room for what is written into it below.
        server.query("CREATE TABLE item (name text)")
        server.query("INSERT INTO item VALUES ('first')")
        connections = {driver: self.used(server.dsn(), driver) for driver in MODULES}
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        for driver, connection in connections.items():
            with self.subTest(driver):
                self.assert_no_room_for_data(connection, MODULES[driver])
        runs = dict.fromkeys(connections, 0)

        def work(connection, driver):
            runs[driver] += 1
            connection.execute("INSERT INTO item VALUES (%s)", (driver,))
            while runs[driver] == 1:
                # Its log cannot be written any more, which ends the server.
                connection.execute("UPDATE item SET name = 'first' WHERE name = 'first'")
                connection.execute("SELECT pg_switch_wal()")

        calls = self.call_all(
            partial(connection.run, work, connection, driver)
            for driver, connection in connections.items()
        )
        wait_until(lambda: "PANIC" in server.log())
        filler.unlink()
        # It recovers if the crash has made room. If not, it ends, or (18.6) its startup process
        # does alone, and it refuses connections for ever.
        with contextlib.suppress(RuntimeError):
            server.kill_all()
        server.ensure_running()
        for call in calls:
            call.result(PATIENCE)
        self.assertEqual(set(runs.values()), {2})
        rows = server.query("SELECT name FROM item WHERE name <> 'first' ORDER BY name")
        self.assertEqual([name for (name,) in rows], sorted(MODULES))

    def assert_no_room_for_data(self, connection, module):
        runs = []

        def work():
            runs.append(None)
            connection.execute(
                "INSERT INTO item SELECT repeat('x', 1000) FROM generate_series(1, 20000)"
            )

        with self.assertRaisesRegex(module.errors.DiskFull, "No space left on device"):
            connection.run(work)
        self.assertEqual((len(runs), connection.state), (1, "idle"))


class RecoveringTests(OwnServerTestCase):
    @with_time_to_connect
    def test_a_server_that_takes_long_to_recover(self):
        directory = self.enterContext(tempfile.TemporaryDirectory())
        server = self.start(directory, hot_standby="off")
        server.query("CREATE TABLE item (name text)")
        inside, idle = ([self.used(server.dsn(), driver) for driver in MODULES] for _ in range(2))
        for connection in inside:
            connection.begin()
            connection.execute("INSERT INTO item VALUES ('lost')")
        server.kill_all()
        data = Path(directory, "data")
        Path(data, "recovery.signal").touch()
        # It looks for the next part of its log, and recovers as long as this takes.
        server.settings["restore_command"] = f"until test -e {GATE}; do sleep 0.05; done; false"
        (start,) = self.call_all([server.start])
        try:
            for connection in inside:
                with self.assertRaises(DisconnectionError):
                    connection.execute("SELECT 1")
                connection.rollback()
            with self.events() as seen:
                waiting = self.call_all(connection.begin for connection in (*inside, *idle))
                wait_until(lambda: any("starting up" in str(each) for each in seen))
            short = self.call_all(
                self.open(server.dsn(), driver, policy=SHORT).begin for driver in MODULES
            )
            self.assert_give_up(short, "starting up")
            self.assertFalse(any(call.done() for call in waiting))
        finally:
            Path(data, GATE).touch()
            start.result(PATIENCE)
        for call in waiting:
            call.result(PATIENCE)
        self.assertEqual(server.query("SELECT * FROM item"), [])


class Speaker:
    """Listens on a port, and says the same to everybody: when they come, or when they have spoken.

    It listens until the test ends.
    """

    def __init__(self, test_case, says, speaks_first):
        self._says = says
        self._speaks_first = speaks_first
        self._listener = bind()
        self._listener.listen()
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()
        test_case.addCleanup(self._stop)

    def _listen(self):
        clients = contextlib.ExitStack()
        with clients, contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                clients.enter_context(client)
                with contextlib.suppress(OSError):
                    if not self._speaks_first:
                        client.recv(1)
                    client.sendall(self._says)
                    if not self._speaks_first:
                        client.shutdown(socket.SHUT_WR)

    def _stop(self):
        # Closing does not wake who accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


class OtherProtocolTestCase(FaultTestCase):
    def dsn(self, port, scheme="postgresql", **options):
        chosen = "&".join(f"{name}={value}" for name, value in options.items())
        return f"{scheme}://me:secret@{LOCALHOST}:{port}/db?{chosen}".rstrip("?")

    def assert_refused(self, port, driver, dsn):
        """Nobody waits, and the error says what is wrong."""
        connection = self.open(dsn, driver)
        with self.subTest(driver, dsn=dsn):
            module = connection.work.link.driver.module
            with self.assertRaisesRegex(module.OperationalError, "Who answers .* is no") as refused:
                connection.begin()
            self.assertNotIsInstance(refused.exception, DisconnectionError)
            for part in (LOCALHOST, str(port), "see whether the DSN has the right host and port"):
                self.assertIn(part, str(refused.exception))

    def assert_silent(self, *drivers_and_dsns):
        """Which is all that can be seen from outside."""
        connections = [self.open(dsn, driver, policy=SHORT) for driver, dsn in drivers_and_dsns]
        self.assert_give_up(self.call_all(each.begin for each in connections), "The last error")

    def others(self):
        """Who speaks first, by name, and who answers."""
        return {
            "mail": Speaker(self, b"220 mail.example.org ESMTP\r\n", True).port,
            "ssh": Speaker(self, b"SSH-2.0-OpenSSH_9.2p1\r\n", True).port,
            "http": Speaker(self, b"HTTP/1.1 400 Bad Request\r\n\r\n", False).port,
        }


class OtherProtocolTests(OtherProtocolTestCase):
    def test_for_postgresql(self):
        others = self.others()
        for driver in MODULES:
            for port in (others["mail"], others["http"]):
                for sslmode in ("prefer", "disable", "require"):
                    self.assert_refused(port, driver, self.dsn(port, sslmode=sslmode))
            port = others["ssh"]
            self.assert_refused(port, driver, self.dsn(port, sslmode="disable"))
        # Its first letter is how PostgreSQL says that it has TLS.
        self.assert_silent(*((driver, self.dsn(others["ssh"])) for driver in MODULES))

    def test_for_pymysql(self):
        others = self.others()
        for port in (others["mail"], others["ssh"]):
            self.assert_refused(port, "pymysql", self.dsn(port, "mysql"))
        self.assert_silent(("pymysql", self.dsn(others["http"], "mysql")))

    @needs_mysqlclient
    def test_for_mysqlclient(self):
        self.assert_silent(
            *(("mysqlclient", self.dsn(port, "mysql")) for port in self.others().values())
        )


class PostgresqlOnMysqlsTests(OtherProtocolTestCase):
    layer = POSTGRES_LAYER

    def test_who_waits_to_be_spoken_to(self):
        dsn = self.dsn(self.layer.server.port, "mysql")
        drivers = ["pymysql"] + ["mysqlclient"] * (importlib.util.find_spec("MySQLdb") is not None)
        self.assert_silent(*((driver, dsn) for driver in drivers))


@on_mariadb(MARIADB_LAYER)
class MysqlOnPostgresqlsTests(OtherProtocolTestCase):
    def test_who_speaks_first(self):
        port = self.layer.server.port
        for driver in MODULES:
            for sslmode in ("prefer", "disable"):
                self.assert_refused(port, driver, self.dsn(port, sslmode=sslmode))
