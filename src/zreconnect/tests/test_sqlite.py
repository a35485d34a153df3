"""SQLite: the same API, no disconnects, and locks that are waited for when a transaction begins."""

import contextlib
import io
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import transaction
import zope.event

import zreconnect
from zreconnect import cli, events
from zreconnect.drivers import sqlite as sqlite_driver
from zreconnect.drivers.base import Evidence, Meaning, ServerSession, SessionSettings
from zreconnect.drivers.sqlite import driver
from zreconnect.interfaces import ACTIVE, DOOMED, IDLE
from zreconnect.policy import FAIL_FAST, RetryPolicy
from zreconnect.tests.base import PATIENCE, with_time_to_connect
from zreconnect.tests.test_manual import quiet_log

NOBODY = 65534
LONG = RetryPolicy(timeout=PATIENCE, initial=0.01, maximum=0.01)
SHORT = RetryPolicy(timeout=0.05)


class SqliteTestCase(unittest.TestCase):
    """``self.dsn`` names a new database file with the table ``item``."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        self.path = self.directory / "job.db"
        self.dsn = f"sqlite:///{self.path}"
        self.other = self.plain()
        self.other.execute("CREATE TABLE item (name text PRIMARY KEY)")
        self.addCleanup(transaction.abort)
        # Waiting for a lock that nobody lets go of takes no time.
        patch = mock.patch.object(sqlite_driver, "BUSY_TIMEOUT", 0.01)
        patch.start()
        self.addCleanup(patch.stop)
        log = quiet_log()
        log.__enter__()
        self.addCleanup(log.__exit__, None, None, None)

    def plain(self):
        """A plain connection past zreconnect."""
        plain = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        self.addCleanup(plain.close)
        return plain

    def connect(self, dsn=None, **keywords):
        connection = zreconnect.connect(dsn or self.dsn, **keywords)
        self.addCleanup(connection.close)
        return connection

    def names(self):
        return [name for (name,) in self.other.execute("SELECT name FROM item ORDER BY name")]

    @contextlib.contextmanager
    def events(self, *subscribers):
        """The events that are announced inside the block."""
        seen = []
        with mock.patch.object(zope.event, "subscribers", [seen.append, *subscribers]):
            yield seen


class NameTests(SqliteTestCase):
    def test_forms(self):
        here = os.path.abspath("")
        for dsn, path in {
            "sqlite:///job.db": f"{here}/job.db",
            "sqlite:///data/../a%20job%3F.db": f"{here}/a job?.db",
            "SQLITE:////var/lib/job.db": "/var/lib/job.db",
            "sqlite://": ":memory:",
            "sqlite:///:memory:": ":memory:",
        }.items():
            with self.subTest(dsn):
                self.assertEqual(driver.parse(dsn), {"database": path})

    def test_malformed(self):
        for dsn in (
            "sqlite:job.db",
            "job.db",
            "sqlite://server/job.db",
            "sqlite:///",
            "sqlite:///job.db?mode=ro",
            "sqlite:///job.db#1",
            "sqlite:///job\0.db",
        ):
            with self.subTest(dsn), self.assertRaisesRegex(ValueError, "sqlite:///relative/path"):
                zreconnect.connect(dsn, "sqlite")

    def test_address(self):
        for dsn, address in {
            "sqlite:////var/lib/a%20job%3F.db": "sqlite:////var/lib/a%20job%3F.db",
            "sqlite://": "sqlite://",
        }.items():
            self.assertEqual(self.connect(dsn).server, address)

    def test_a_relative_path_is_that_of_the_moment(self):
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.directory)
        first = self.connect("sqlite:///job.db")
        (self.directory / "elsewhere").mkdir()
        os.chdir("elsewhere")
        second = self.connect("sqlite:///job.db")
        for connection in (first, second):
            connection.begin()
        first.cursor().execute("INSERT INTO item VALUES ('a')")
        first.commit()
        self.assertEqual(self.names(), ["a"])
        with self.assertRaises(sqlite3.OperationalError):
            second.cursor().execute("SELECT * FROM item")


class MemoryTests(SqliteTestCase):
    def setUp(self):
        super().setUp()
        self.connection = self.connect("sqlite://")
        with self.connection.transaction() as cursor:
            cursor.execute("CREATE TABLE item (name text)")
            cursor.execute("INSERT INTO item VALUES ('a')")

    def count_tables(self, connection):
        with connection.transaction() as cursor:
            cursor.execute("SELECT count(*) FROM sqlite_master")
            return cursor.fetchone()[0]

    def test_it_lasts_as_long_as_the_session(self):
        self.assertEqual(self.count_tables(self.connection), 1)
        self.connection.reset()
        self.assertEqual(self.count_tables(self.connection), 0)

    def test_each_connection_has_its_own(self):
        self.assertEqual(self.count_tables(self.connect("sqlite://")), 0)
        forked = self.connection.fork()
        self.addCleanup(forked.close)
        self.assertEqual(self.count_tables(forked), 0)

    def test_each_thread_has_its_own(self):
        descriptor = zreconnect.ConnectionDescriptor("sqlite://")
        self.addCleanup(descriptor.close)
        descriptor.connection().cursor().execute("CREATE TABLE item (name text)")
        transaction.commit()

        def look():
            cursor = descriptor.connection().cursor()
            cursor.execute("SELECT count(*) FROM sqlite_master")
            return cursor.fetchone()[0]

        with ThreadPoolExecutor(1) as threads:
            self.assertEqual(threads.submit(look).result(PATIENCE), 0)
        self.assertEqual(look(), 1)

    def test_the_parameters_of_a_plain_connection(self):
        connection = zreconnect.ReconnectingConnection(
            lambda: sqlite3.connect(":memory:", check_same_thread=False), "sqlite"
        )
        self.addCleanup(connection.close)
        connection.begin()
        self.assertEqual(connection.server, "sqlite://")

    def test_a_factory_for_each_of_the_modules_modes(self):
        """Of the attribute autocommit, and of isolation_level."""

        class InTransactions(sqlite3.Connection):
            """As Python 3.12 has it."""

            autocommit = False

        modes = [{"isolation_level": level} for level in ("", "DEFERRED", "IMMEDIATE", "EXCLUSIVE")]
        modes.append({"factory": InTransactions})
        refused = [{"isolation_level": None}]
        if hasattr(sqlite3, "LEGACY_TRANSACTION_CONTROL"):
            modes += [{"autocommit": sqlite3.LEGACY_TRANSACTION_CONTROL}, {"autocommit": False}]
            refused.append({"autocommit": True})
        for number, mode in enumerate([*modes, *refused]):
            with self.subTest(mode):
                connection = zreconnect.ReconnectingConnection(
                    lambda: sqlite3.connect(self.path, check_same_thread=False, **mode),  # noqa: B023
                    "sqlite",
                )
                self.addCleanup(connection.close)
                if mode in refused:
                    with self.assertRaisesRegex(sqlite3.ProgrammingError, "set autocommit on the"):
                        connection.begin()
                    continue
                connection.execute("INSERT INTO item VALUES (?)", (f"{number}, committed",))
                connection.commit()
                connection.execute("INSERT INTO item VALUES (?)", (f"{number}, rolled back",))
                connection.rollback()
        self.assertEqual(self.names(), [f"{number}, committed" for number in range(len(modes))])

    def test_a_factory_for_a_uri(self):
        connection = zreconnect.ReconnectingConnection(
            lambda: sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, check_same_thread=False),
            "sqlite",
        )
        self.addCleanup(connection.close)
        connection.readonly = True
        self.assertEqual(connection.execute("SELECT * FROM item").fetchall(), [])
        self.assertIn("job.db", connection.server)

    def test_a_factory_for_a_file_whose_name_is_no_text(self):
        path = os.fsencode(self.directory) + b"/\xff.db"

        def factory():
            raw = sqlite3.connect(path, check_same_thread=False)
            raw.text_factory = bytes
            return raw

        connection = zreconnect.ReconnectingConnection(factory, "sqlite")
        self.addCleanup(connection.close)
        self.assertEqual(connection.execute("SELECT 'one'").fetchone(), (b"one",))
        self.assertTrue(connection.server.endswith("/%FF.db"))

    def test_a_factory_for_a_single_thread(self):
        connection = zreconnect.ReconnectingConnection(lambda: sqlite3.connect(self.path), "sqlite")
        self.addCleanup(connection.close)
        for _ in range(2):
            with self.assertRaisesRegex(sqlite3.ProgrammingError, "check_same_thread=False"):
                connection.begin()
            self.assertEqual(connection.state, "idle")


@with_time_to_connect
class LockTests(SqliteTestCase):
    def lock(self, how="IMMEDIATE"):
        self.other.execute(f"BEGIN {how}")

    def unlock_after_an_attempt(self, event):
        if isinstance(event, events.ConnectionAttemptFailed) and self.other.in_transaction:
            self.other.execute("ROLLBACK")

    def test_beginning_waits_as_the_policy_says(self):
        for connection in (self.connect(policy=LONG), self.connect(policy=LONG)):
            for _in_a_session_that_is_there in (False, True):
                self.lock()
                with self.events(self.unlock_after_an_attempt) as seen:
                    connection.begin()
                self.assertIsInstance(seen[-1], events.Reconnected)
                self.assertFalse(self.other.in_transaction)
                connection.rollback()

    def test_beginning_to_read_waits_for_who_writes_his_commit(self):
        connection = self.connect(policy=LONG)
        connection.readonly = True
        self.lock("EXCLUSIVE")
        with self.events(self.unlock_after_an_attempt):
            connection.begin()
        self.assertFalse(self.other.in_transaction)

    def test_readers_do_not_wait_for_a_transaction_that_may_write(self):
        connection = self.connect(policy=SHORT)
        connection.readonly = True
        self.lock()
        with self.events() as seen, connection.transaction() as cursor:
            cursor.execute("SELECT * FROM item")
            self.assertEqual(cursor.fetchall(), [])
        self.assertEqual(seen, [])

    def test_patience_ends(self):
        connection = self.connect(policy=SHORT)
        self.lock()
        with self.assertRaisesRegex(zreconnect.ReconnectTimeout, "database is locked"):
            connection.begin()
        self.assertEqual(connection.state, IDLE)
        self.other.execute("ROLLBACK")
        connection.begin()

    def test_a_policy_that_fails_fast(self):
        connection = self.connect(policy=FAIL_FAST)
        self.lock()
        with self.assertRaises(zreconnect.DisconnectionError) as raised:
            connection.begin()
        self.assertIsInstance(raised.exception, sqlite3.OperationalError)
        self.other.execute("ROLLBACK")
        connection.begin()

    def test_a_statement_that_finds_a_lock_belongs_to_a_unit_of_work(self):
        connection = self.connect(policy=FAIL_FAST)
        cursor = connection.cursor()
        self.lock()
        with self.assertRaises(zreconnect.DisconnectionError):
            cursor.execute("INSERT INTO item VALUES ('a')")
        self.other.execute("ROLLBACK")
        self.assertEqual(connection.state, DOOMED)
        connection.rollback()
        cursor.execute("INSERT INTO item VALUES ('b')")
        connection.commit()
        self.assertEqual(self.names(), ["b"])

    def test_autocommit(self):
        connection = self.connect()
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("INSERT INTO item VALUES ('a')")
        self.lock()
        # It has not been executed, and nothing is unknown.
        with self.assertRaisesRegex(sqlite3.OperationalError, "locked"):
            cursor.execute("INSERT INTO item VALUES ('b')")
        self.other.execute("ROLLBACK")
        cursor.execute("INSERT INTO item VALUES ('c')")
        self.assertEqual(self.names(), ["a", "c"])

    def test_commit_can_be_called_again_when_somebody_was_reading(self):
        connection = self.connect()
        connection.begin()
        connection.cursor().execute("INSERT INTO item VALUES ('a')")
        self.lock("DEFERRED")
        self.assertEqual(self.names(), [])
        with self.assertRaisesRegex(sqlite3.OperationalError, "locked") as raised:
            connection.commit()
        self.assertNotIsInstance(raised.exception, zreconnect.DisconnectionError)
        self.assertEqual(connection.state, ACTIVE)
        self.other.execute("ROLLBACK")
        connection.commit()
        self.assertEqual(connection.state, IDLE)
        self.assertEqual(self.names(), ["a"])

    def test_rollback_after_a_commit_that_met_readers(self):
        connection = self.connect()
        connection.begin()
        connection.cursor().execute("INSERT INTO item VALUES ('a')")
        self.lock("DEFERRED")
        self.names()
        with self.assertRaises(sqlite3.OperationalError):
            connection.commit()
        connection.rollback()
        self.other.execute("ROLLBACK")
        self.assertEqual(self.names(), [])

    def test_work_whose_commit_met_readers_is_run_again(self):
        connection = self.connect()
        runs = []

        def work():
            connection.cursor().execute("INSERT INTO item VALUES ('a')")
            if self.other.in_transaction:
                self.other.execute("ROLLBACK")
            elif not runs:
                self.lock("DEFERRED")
                self.names()
            runs.append(1)

        connection.run(work)
        self.assertEqual(len(runs), 2)
        self.assertEqual(self.names(), ["a"])

    def test_the_transaction_manager_may_run_it_again(self):
        manager = transaction.TransactionManager()
        descriptor = zreconnect.ConnectionDescriptor(self.dsn, transaction_manager=manager)
        self.addCleanup(descriptor.close)
        for attempt in manager.attempts(2):
            with attempt:
                descriptor.connection().cursor().execute("INSERT INTO item VALUES ('a')")
                if self.other.in_transaction:
                    self.other.execute("ROLLBACK")
                else:
                    self.lock("DEFERRED")
                    self.names()
        self.assertEqual(self.names(), ["a"])

    def test_a_snapshot_that_is_too_old_to_write(self):
        self.other.execute("PRAGMA journal_mode = WAL")
        connection = self.connect()
        raw = connection.driver_connection
        raw.execute("BEGIN DEFERRED")
        raw.execute("SELECT * FROM item").fetchall()
        self.other.execute("INSERT INTO item VALUES ('a')")
        with self.assertRaises(sqlite3.OperationalError) as raised:
            raw.execute("INSERT INTO item VALUES ('b')")
        self.assertIs(driver.meaning(raised.exception, raw), Meaning.TRANSIENT)
        raw.execute("ROLLBACK")

    def test_a_read_only_transaction_sees_one_state(self):
        self.other.execute("PRAGMA journal_mode = WAL")
        connection = self.connect()
        connection.readonly = True
        connection.begin()
        self.other.execute("INSERT INTO item VALUES ('a')")
        cursor = connection.cursor()
        cursor.execute("SELECT * FROM item")
        self.assertEqual(cursor.fetchall(), [])
        connection.commit()
        cursor.execute("SELECT * FROM item")
        self.assertEqual(cursor.fetchall(), [("a",)])

    def test_threads_take_turns(self):
        self.other.execute("CREATE TABLE counter AS SELECT 0 AS number")
        connection = self.connect(policy=LONG)

        def count():
            forked = connection.fork()
            for _ in range(10):
                with forked.transaction() as cursor:
                    cursor.execute("SELECT number FROM counter")
                    ((number,),) = cursor.fetchall()
                    cursor.execute("UPDATE counter SET number = ?", (number + 1,))
            forked.close()

        with ThreadPoolExecutor(3) as threads:
            for done in [threads.submit(count) for _ in range(3)]:
                done.result(PATIENCE)
        self.assertEqual(self.other.execute("SELECT number FROM counter").fetchall(), [(30,)])


class ErrorTests(SqliteTestCase):
    def check_plain_error(self, connection, error_type, message):
        """It is raised at once, by the call that met it, and is none of ours."""
        with self.events() as seen, self.assertRaisesRegex(error_type, message) as raised:
            connection.begin()
        self.assertEqual(seen, [])
        self.assertEqual(type(raised.exception).__module__, "sqlite3")
        self.assertEqual(connection.state, IDLE)

    def test_a_missing_directory(self):
        connection = self.connect(f"sqlite:///{self.directory}/nothing/job.db")
        self.check_plain_error(connection, sqlite3.OperationalError, "unable to open")

    def test_no_database(self):
        path = self.directory / "text.db"
        path.write_text("not a database, but a long enough text for the header of one\n" * 20)
        connection = self.connect(f"sqlite:///{path}")
        for readonly in (False, True):
            connection.readonly = readonly
            self.check_plain_error(connection, sqlite3.DatabaseError, "not a database")

    def test_a_file_that_is_damaged_while_the_connection_is_idle(self):
        connection = self.connect()
        connection.readonly = True
        connection.begin()
        connection.rollback()
        whole = self.path.read_bytes()
        self.path.write_bytes(b"damaged" * 1000)
        self.check_plain_error(connection, sqlite3.DatabaseError, "not a database")
        self.path.write_bytes(whole)
        connection.begin()

    @contextlib.contextmanager
    def as_nobody(self):
        """Root may write everything."""
        user = os.geteuid()
        if user == 0:
            os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(user)

    def test_a_read_only_file(self):
        self.other.close()
        self.path.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
        self.directory.chmod(0o555)
        self.addCleanup(self.directory.chmod, 0o755)
        connection = self.connect()
        with self.as_nobody(), self.events() as seen, connection.transaction() as cursor:
            cursor.execute("SELECT * FROM item")
            self.assertEqual(cursor.fetchall(), [])
            # It can be read, so that not beginning is what fails, but writing.
            with self.assertRaisesRegex(sqlite3.OperationalError, "readonly database"):
                cursor.execute("INSERT INTO item VALUES ('a')")
        self.assertEqual(seen, [])

    def full(self):
        def leave_no_room(raw):
            raw.execute("PRAGMA max_page_count = 4")

        return self.connect(on_connect=leave_no_room)

    def test_a_full_disk(self):
        connection = self.full()
        cursor = connection.cursor()
        cursor.execute("INSERT INTO item VALUES ('a')")
        with self.assertRaisesRegex(sqlite3.OperationalError, "full"):
            cursor.execute("INSERT INTO item VALUES (zeroblob(100000))")
        # SQLite has rolled back. What follows must not be a transaction of its own.
        for _ in range(2):
            with self.assertRaisesRegex(sqlite3.InternalError, "Roll back"):
                cursor.execute("INSERT INTO item VALUES ('b')")
        with self.assertRaises(sqlite3.InternalError):
            connection.savepoint()
        with self.assertRaises(sqlite3.InternalError):
            connection.commit()
        self.assertEqual(connection.state, IDLE)
        self.assertEqual(self.names(), [])
        cursor.execute("INSERT INTO item VALUES ('c')")
        connection.commit()
        self.assertEqual(self.names(), ["c"])

    def test_a_full_disk_and_rollback(self):
        connection = self.full()
        cursor = connection.cursor()
        with self.assertRaises(sqlite3.OperationalError):
            cursor.execute("INSERT INTO item VALUES (zeroblob(100000))")
        connection.rollback()
        cursor.execute("INSERT INTO item VALUES ('c')")
        connection.commit()
        self.assertEqual(self.names(), ["c"])

    def test_a_transaction_manager_does_not_commit_what_was_rolled_back(self):
        descriptor = zreconnect.ConnectionDescriptor(self.dsn)
        self.addCleanup(descriptor.close)
        cursor = descriptor.connection().cursor()
        cursor.execute("INSERT INTO item VALUES ('a')")
        with self.assertRaises(sqlite3.IntegrityError):
            cursor.execute("INSERT OR ROLLBACK INTO item VALUES ('a')")
        with self.assertRaises(sqlite3.InternalError):
            transaction.commit()
        transaction.abort()
        self.assertEqual(self.names(), [])
        cursor.execute("INSERT INTO item VALUES ('b')")
        transaction.commit()
        self.assertEqual(self.names(), ["b"])

    def test_a_constraint(self):
        with self.connect().transaction() as cursor:
            cursor.execute("INSERT INTO item VALUES ('a')")
            with self.assertRaises(sqlite3.IntegrityError):
                cursor.execute("INSERT INTO item VALUES ('a')")
            cursor.execute("INSERT INTO item VALUES ('b')")
        self.assertEqual(self.names(), ["a", "b"])

    def test_a_transaction_that_a_statement_has_ended(self):
        connection = self.connect()
        connection.begin()
        connection.cursor().execute("ROLLBACK")
        with self.assertRaisesRegex(sqlite3.InternalError, "no transaction any more"):
            connection.commit()
        self.assertEqual(connection.state, IDLE)

    def test_a_transaction_that_a_statement_has_begun(self):
        connection = self.connect()
        connection.autocommit = True
        connection.cursor().execute("BEGIN")
        connection.cursor().execute("INSERT INTO item VALUES ('a')")
        with self.assertRaises(sqlite3.ProgrammingError):
            connection.begin()
        connection.rollback()
        self.assertEqual(self.names(), [])
        connection.begin()
        connection.cursor().execute("INSERT INTO item VALUES ('b')")
        connection.commit()
        self.assertEqual(self.names(), ["b"])

    def test_a_session_that_was_closed_by_hand(self):
        connection = self.connect()
        connection.driver_connection.close()
        connection.begin()
        connection.cursor().execute("INSERT INTO item VALUES ('a')")
        connection.driver_connection.close()
        # Closing has rolled back: nothing is unknown.
        with self.assertRaises(zreconnect.DisconnectionError):
            connection.commit()
        connection.rollback()
        connection.begin()
        self.assertEqual(self.names(), [])

    def test_conditions_are_of_errors_of_the_database(self):
        self.assertIsNone(driver.condition(sqlite3.ProgrammingError("table item already exists")))


@with_time_to_connect
class SessionTests(SqliteTestCase):
    def raw(self):
        raw = driver.connect(driver.parse(self.dsn), PATIENCE)
        self.addCleanup(raw.close)
        driver.prepare(raw)
        return raw

    def test_every_isolation_level_is_the_strictest(self):
        for level in ("READ UNCOMMITTED", "read committed", "Repeatable Read", "SERIALIZABLE"):
            self.assertEqual(driver.isolation_level(level), sqlite_driver.SERIALIZABLE)
        self.assertIsNone(driver.isolation_level("default"))

    def test_what_sqlite3_takes_for_autocommit_mode_is_refused(self):
        connection = self.connect()
        with self.assertRaisesRegex(ValueError, "set autocommit = True"):
            connection.isolation_level = None
        self.assertFalse(hasattr(connection.cursor(), "callproc"))

    def test_encoding(self):
        connection = self.connect()
        for encoding in ("UTF8", "utf-8", "unicode"):
            connection.set_client_encoding(encoding)
        with self.assertRaises(sqlite3.NotSupportedError):
            connection.set_client_encoding("LATIN1")

    def test_there_are_no_server_side_cursors(self):
        with self.assertRaises(sqlite3.NotSupportedError):
            self.connect().cursor("name").execute("SELECT 1")

    def test_a_class_for_one_cursor(self):
        class Cursor(sqlite3.Cursor):
            answer = 42

        connection = self.connect()
        for cursor in (
            connection.cursor(cursor_factory=Cursor),
            connection.cursor(factory=Cursor),
            connection.cursor(Cursor),
        ):
            cursor.execute("SELECT 1")
            self.assertEqual(cursor.answer, 42)

    def test_a_cursor_class_of_a_plain_connection(self):
        def plain(factory):
            return sqlite3.connect(self.path, check_same_thread=False, factory=factory)

        connection = zreconnect.ReconnectingConnection(
            lambda: plain(sqlite3.Connection), driver="sqlite"
        )
        connection.cursor_factory = sqlite3.Cursor
        with self.assertRaisesRegex(sqlite3.NotSupportedError, "sqlite.Connection"):
            connection.begin()
        connection = zreconnect.ReconnectingConnection(
            lambda: plain(sqlite_driver.Connection), driver="sqlite"
        )
        self.addCleanup(connection.close)
        connection.cursor_factory = sqlite3.Cursor
        connection.begin()

    def test_rows_of_the_users_choice(self):
        def set_up(raw):
            raw.row_factory = sqlite3.Row

        with self.connect(on_connect=set_up).transaction() as cursor:
            cursor.execute("INSERT INTO item VALUES ('a')")
            cursor.execute("SELECT name FROM item")
            self.assertEqual(cursor.fetchone()["name"], "a")

    def test_rows_of_the_users_choice_outlast_the_session(self):
        connection = self.connect(policy=FAIL_FAST)
        connection.row_factory, connection.text_factory = sqlite3.Row, bytes
        self.other.execute("BEGIN EXCLUSIVE")
        with self.assertRaises(zreconnect.DisconnectionError):
            connection.begin()
        self.other.execute("ROLLBACK")
        self.assertEqual(connection.execute("SELECT 1 AS one").fetchone()["one"], 1)
        connection.commit()
        forked = connection.fork()
        self.addCleanup(forked.close)
        self.assertEqual(forked.execute("SELECT 'one' AS one").fetchone()["one"], b"one")

    def test_a_statement_of_the_connection_begins_a_transaction(self):
        connection = self.connect()
        connection.execute("INSERT INTO item VALUES (?)", ("a",))
        self.assertEqual(connection.state, ACTIVE)
        connection.rollback()
        self.assertEqual(self.names(), [])

    def test_on_connect_cannot_end_autocommit(self):
        def set_up(raw):
            raw.isolation_level = "DEFERRED"

        connection = self.connect(on_connect=set_up)
        self.assertIsNone(connection.driver_connection.isolation_level)

    def test_there_is_one_session_and_nobody_else_ends_it(self):
        raw = self.raw()
        self.assertEqual(driver.identify(raw), ServerSession(os.getpid(), None))
        self.assertFalse(driver.end_session(raw, driver.identify(raw), Evidence(0.0)))

    def test_lock_waits(self):
        raw = self.raw()
        before = driver.limit_lock_waits(raw, 2.5)
        self.assertEqual(driver.query(raw, "PRAGMA busy_timeout"), [(2500,)])
        self.assertEqual(driver.limit_lock_waits(raw, before), 2.5)
        self.assertEqual(driver.query(raw, "PRAGMA busy_timeout"), [(10,)])

    def test_transactions_cannot_be_prepared(self):
        with self.assertRaises(sqlite3.NotSupportedError):
            driver.prepare_transaction(self.raw(), "a")

    def test_a_disconnect_is_not_looked_for(self):
        cursor = self.raw().cursor()
        cursor.execute("SELECT 1")
        self.assertFalse(driver.is_commit(cursor))

    def test_beginning_again_is_what_the_settings_say(self):
        raw = self.raw()
        for readonly in (True, None, True, False):
            driver.begin(raw, SessionSettings(readonly=readonly))
            self.assertEqual(driver.query(raw, "PRAGMA query_only"), [(int(bool(readonly)),)])
            driver.rollback(raw)


class ProgramTests(SqliteTestCase):
    def test_a_batch_job(self):
        manager = zreconnect.initZopeless(self.dsn, implicitBegin=False)
        self.addCleanup(manager.uninstall)
        for name in ("a", "b"):
            manager.begin()
            manager.cursor().execute("INSERT INTO item VALUES (?)", (name,))
            manager.commit()
        manager.begin()
        manager.cursor().execute("INSERT INTO item VALUES ('c')")
        manager.abort()
        manager.set_isolation_level("SERIALIZABLE")
        manager.run(lambda: manager.cursor().execute("INSERT INTO item VALUES ('d')"))
        self.assertEqual(self.names(), ["a", "b", "d"])

    def test_each_thread_has_a_connection(self):
        descriptor = zreconnect.ConnectionDescriptor(self.dsn, policy=LONG)
        self.addCleanup(descriptor.close)
        both_are_here = threading.Barrier(2, timeout=PATIENCE)

        def work(name):
            both_are_here.wait()
            descriptor.connection().cursor().execute("INSERT INTO item VALUES (?)", (name,))
            transaction.commit()
            return id(descriptor.connection())

        with ThreadPoolExecutor(2) as threads:
            ids = {each.result(PATIENCE) for each in [threads.submit(work, n) for n in "ab"]}
        self.assertEqual(len(ids), 2)
        self.assertEqual(self.names(), ["a", "b"])


class CommandTests(SqliteTestCase):
    def run_command(self, *arguments):
        """The exit status, and what was written."""
        written = io.StringIO()
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
            status = cli.main([str(each) for each in arguments])
        return status, written.getvalue()

    def demo(self, dsn, *arguments):
        tree = self.directory / "tree"
        tree.mkdir(exist_ok=True)
        for number in range(4):
            (tree / f"module{number}.py").write_text("def first(): pass\nclass Second: pass\n")
        (tree / "empty.py").write_text("")
        return self.run_command("demo", tree, "--dsn", dsn, "--interruptions", 3, *arguments)

    def files(self):
        return sorted(each.name for each in self.directory.glob("job.db*"))

    def test_the_demo(self):
        status, written = self.demo(self.dsn)
        self.assertEqual(status, 0, written)
        for line in ("locked by a writer", "locked by a reader", "locked for all"):
            self.assertIn(line, written)
        self.assertRegex(written, r"  recorded +5\b")
        self.assertEqual(self.files(), ["job.db"])

    def test_the_demo_keeps_its_file_if_it_is_asked_to(self):
        status, written = self.demo(self.dsn, "--keep")
        self.assertEqual(status, 0, written)
        _, kept = self.files()
        self.assertIn(f"Kept: the database sqlite:///{self.directory / kept}", written)
        with contextlib.closing(sqlite3.connect(self.directory / kept)) as plain:
            self.assertEqual(plain.execute("SELECT count(*) FROM definition").fetchall(), [(8,)])

    def test_what_the_demo_cannot_use(self):
        for dsn, problem in {
            "sqlite://": "argument --dsn: it must name a file",
            "sqlite://server/job.db": "argument --dsn: dsn is no name of an SQLite database",
            f"sqlite:///{self.directory}/nothing/job.db": "unable to open database file",
        }.items():
            status, written = self.demo(dsn)
            self.assertEqual(status, 2)
            self.assertIn(problem, written)

    def test_there_is_no_ledger(self):
        status, written = self.run_command("ledger", self.dsn)
        self.assertEqual(status, 2)
        self.assertIn("needs no ledger", written)


FORK = """
import os, sqlite3, sys
import zreconnect

connection = zreconnect.connect(sys.argv[1])
connection.begin()
connection.cursor().execute("INSERT INTO item VALUES ('parent')")
if (pid := os.fork()) == 0:
    # The child ends as programs do, with all that Python cleans up then.
    connection.rollback()
    try:
        connection.begin()
    except sqlite3.OperationalError as error:
        sys.exit(7 if "forked inside a transaction" in str(error) else str(error))
    sys.exit("connected in the child")
_, status = os.waitpid(pid, 0)
connection.cursor().execute("INSERT INTO item VALUES ('parent again')")
connection.commit()
sys.exit(os.waitstatus_to_exitcode(status))
"""


class ForkTests(SqliteTestCase):
    def test_a_fork_inside_a_transaction(self):
        for mode in ("DELETE", "WAL"):
            with self.subTest(mode):
                self.other.execute(f"PRAGMA journal_mode = {mode}")
                self.other.execute("DELETE FROM item")
                # Python 3.12 warns of each fork beside a thread, such as connects.
                silent = ("-W", "ignore:This process:DeprecationWarning")
                program = subprocess.run(
                    [sys.executable, *silent, "-c", textwrap.dedent(FORK), self.dsn],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    capture_output=True,
                    text=True,
                    timeout=PATIENCE,
                )
                self.assertEqual((program.returncode, program.stderr), (7, ""))
                self.assertEqual(self.names(), ["parent", "parent again"])
