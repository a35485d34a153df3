"""What the program raises itself comes out as it is: it is no disconnect, and nothing hides it."""

import contextlib
import os
import signal
import tempfile
import threading
import time
import unittest
from pathlib import Path

import psycopg
import transaction

import zreconnect
from zreconnect import DisconnectionError, ReconnectingDatabaseAdapter
from zreconnect.tests.base import (
    DatabaseTestCase,
    LineTestCase,
    needs_mysqlclient,
    on_mariadb,
    wait_until,
)
from zreconnect.tests.interrupts import is_in_measurement
from zreconnect.tests.test_mysql import MysqlTestCase

CAUSES = (TimeoutError, KeyboardInterrupt, SystemExit)


class BlockTests:
    """Raised inside a block, with a session that is there, lost, or given up already."""

    #: The name of a server-side cursor, if there are any.
    cursor_name = "numbers"
    read = "SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3"

    def conditions(self, connection):
        def doom():
            self.forward.drop()
            with self.assertRaises(connection.Error):
                connection.cursor().execute(self.read)

        def fail():
            with self.assertRaises(connection.Error):
                connection.cursor().execute("SELEC 1")

        return {
            "there": lambda: None,
            "after an error": fail,
            "lost": self.forward.drop,
            "doomed": doom,
            "rolled back": connection.rollback,
            "closed": connection.close,
        }

    def blocks(self, connection):
        def in_connection(function):
            with connection:
                connection.cursor().execute(self.read)
                function()

        def in_cursor(function):
            with connection, connection.cursor(self.cursor_name) as cursor:
                cursor.execute(self.read)
                cursor.fetchone()
                function()

        def in_transaction(function):
            with connection.transaction() as cursor:
                cursor.execute(self.read)
                function()

        def in_run(function):
            connection.run(lambda: (connection.cursor().execute(self.read), function()))

        def in_transactional(function):
            connection.transactional()(
                lambda: (connection.cursor().execute(self.read), function())
            )()

        def in_retry(function):
            zreconnect.retry_on_disconnect()(lambda: in_transaction(function))()

        return (in_connection, in_cursor, in_transaction, in_run, in_transactional, in_retry)

    def test_in_a_block(self):
        names = list(self.conditions(self.connect()))
        for number in range(len(self.blocks(self.connect()))):
            for other, condition in enumerate(names):
                cause = CAUSES[(number + other) % len(CAUSES)]
                connection = self.connect()
                block = self.blocks(connection)[number]
                with self.subTest(block=block.__name__, condition=condition, cause=cause):
                    self.assertRaised(cause, block, self.conditions(connection)[condition])
                connection.close()

    def assertRaised(self, cause, block, condition):
        """The block raises what is raised in it, once, in this condition."""
        errors = []

        def fail():
            errors.append(cause("the program's own"))
            condition()
            raise errors[-1]

        with self.assertRaises(cause) as raised:
            block(fail)
        self.assertEqual(errors, [raised.exception])

    def test_in_a_larger_transaction(self):
        adapter = ReconnectingDatabaseAdapter(
            self.dsn, driver=self.driver_of_connect, witness=self.witness
        )
        self.addCleanup(adapter.disconnect)

        def in_manager(function):
            with transaction.manager:
                adapter().cursor().execute(self.read)
                function()

        def in_run(function):
            transaction.manager.run(lambda: (adapter().cursor().execute(self.read), function()))

        for block in (in_manager, in_run):
            for condition in (lambda: None, self.forward.drop):
                for cause in CAUSES:
                    with self.subTest(block=block.__name__, cause=cause):
                        self.assertRaised(cause, block, condition)

    def test_in_on_connect(self):
        for cause in CAUSES:
            error = cause("the program's own")

            def fail(raw, error=error):
                raise error

            connection = self.connect(on_connect=fail)
            for request in (connection.begin, lambda c=connection: c.run(lambda: None)):
                with self.assertRaises(cause) as raised:
                    request()
                self.assertIs(raised.exception, error)
                connection.rollback()


class TimeLimitTests:
    """A signal's handler raises TimeoutError, the usual recipe for a time limit."""

    #: Whether a handler runs while the driver waits; else it does when the answer has come.
    interrupts_waits = True

    def requests(self):
        """Requests, each with a new connection."""
        connection = self.connect()
        connection.begin()
        yield connection, lambda: connection.cursor().execute(self.read)
        for request in (connection.rollback, connection.commit):
            connection.begin()
            connection.cursor().execute("INSERT INTO item (name) VALUES ('one')")
            yield connection, request
        connection.run(lambda: None)
        yield connection, connection.begin
        connection.run(lambda: None)
        yield connection, lambda: connection.run(connection.cursor().execute, self.read)
        connection.autocommit = True
        connection.cursor().execute(self.read)
        yield connection, lambda: connection.cursor().execute(self.read)

    def test_while_an_answer_is_waited_for(self):
        for number, (connection, request) in enumerate(self.requests()):
            with self.subTest(number):
                self.forward.silence("to_client")
                self.assertLimited(request)
                with contextlib.suppress(zreconnect.CommitOutcomeUnknown):
                    connection.rollback()

    def test_while_on_connect_waits(self):
        def ask(raw):
            self.forward.silence("to_client")
            asks.set()
            raw.cursor().execute(self.read)

        asks = threading.Event()
        self.assertLimited(self.connect(on_connect=ask).begin, asks.is_set)

    def assertLimited(self, request, is_under_way=None):
        """The request raises what a handler raises while it is under way.

        is_under_way: whether it is; without it, when something was sent.
        """
        error = TimeoutError("the program's own")
        handled = threading.Event()

        def handler(number, frame):
            if not handled.is_set() and not is_in_measurement(frame):
                handled.set()
                raise error

        before = signal.signal(signal.SIGUSR1, handler)
        self.addCleanup(signal.signal, signal.SIGUSR1, before)
        passed = self.forward.count().bytes_to_server
        if is_under_way is None:

            def is_under_way():
                return self.forward.count().bytes_to_server > passed

        def interrupt():
            wait_until(is_under_way)
            os.kill(os.getpid(), signal.SIGUSR1)
            # CPython 3.11 never comes back from a Python function that is traced, if it is called
            # while a signal waits for the main thread and this one has not let go of the GIL.
            time.sleep(0.01)
            try:
                if self.interrupts_waits:
                    wait_until(is_handled)
            finally:
                self.forward.resume()
                self.forward.throttle(None)
            wait_until(is_handled)

        def is_handled():
            # Again, because one that comes just before the wait begins is seen late. But psycopg
            # looks at signals when there was none for 0.1 seconds.
            return handled.wait(1.0) or os.kill(os.getpid(), signal.SIGUSR1)

        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with self.assertRaises(TimeoutError) as raised:
                request()
        finally:
            thread.join()
        self.assertIs(raised.exception, error)

    def test_a_loss_while_an_error_is_handled(self):
        connection = self.connect()
        connection.begin()
        try:
            raise TimeoutError("the program's own")
        except TimeoutError:
            self.forward.drop()
            with self.assertRaises(DisconnectionError):
                connection.cursor().execute(self.read)
        connection.rollback()


class OnPostgresql(BlockTests, TimeLimitTests):
    witness = "xid"

    def setUp(self):
        super().setUp()
        self.make_table()
        self.driver_of_connect = self.driver


class Psycopg2Tests(OnPostgresql, DatabaseTestCase):
    interrupts_waits = False


class PsycopgTests(OnPostgresql, DatabaseTestCase):
    driver = "psycopg"
    module = psycopg


class OnMysql(BlockTests, TimeLimitTests, MysqlTestCase):
    witness = zreconnect.Ledger()

    def setUp(self):
        super().setUp()
        self.driver_of_connect = self.driver_name

    def test_while_a_request_is_sent(self):
        connection = self.connect()
        connection.begin()
        self.forward.throttle(100_000)
        text = "x" * 8_000_000
        self.assertLimited(lambda: connection.cursor().execute("SELECT %s", (text,)))
        connection.rollback()

    def test_while_a_row_of_many_is_waited_for(self):
        connection = self.connect()
        connection.begin()
        cursor = connection.cursor("rows")
        cursor.execute("SELECT seq, repeat('x', 10000) FROM seq_1_to_2000")
        self.forward.silence("to_client")

        def read():
            reads.set()
            for _ in cursor:
                pass

        reads = threading.Event()
        self.assertLimited(read, reads.is_set)
        connection.rollback()


@on_mariadb()
class PymysqlTests(OnMysql, LineTestCase):
    driver_name = "pymysql"

    def test_a_time_limit_of_the_modules_own_is_a_loss(self):
        connection = self.connect(f"{self.dsn}?read_timeout=1")
        connection.begin()
        self.forward.silence("to_client")
        with self.assertRaises(DisconnectionError):
            connection.cursor().execute(self.read)
        self.forward.resume()
        connection.rollback()


@on_mariadb()
@needs_mysqlclient
class MysqlclientTests(OnMysql, LineTestCase):
    driver_name = "mysqlclient"
    interrupts_waits = False


class Nowhere:
    """Stands for the line to SQLite."""

    def drop(self):
        pass


class SqliteTests(BlockTests, unittest.TestCase):
    cursor_name = None
    driver_of_connect = "sqlite"
    witness = None
    forward = Nowhere()

    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.dsn = f"sqlite:///{Path(holder.name) / 'a.db'}"
        self.addCleanup(transaction.abort)

    def connect(self, **keywords):
        connection = zreconnect.connect(self.dsn, **keywords)
        self.addCleanup(connection.close)
        return connection

    def conditions(self, connection):
        conditions = super().conditions(connection)
        del conditions["doomed"]
        return conditions
