"""The states of a connection, and what ends its sessions."""

import contextlib
import gc
import pickle
import sys
import tempfile
import threading
import traceback
import warnings
import weakref
from collections import deque

import psycopg2
import psycopg2.errors
import psycopg2.extensions
import sqlalchemy
import zope.event
from psycopg2 import sql
from psycopg2.extras import register_composite, register_hstore, register_range
from transaction.interfaces import TransientError

import zreconnect
from zreconnect import (
    FAIL_FAST,
    CommitOutcomeUnknown,
    DisconnectedConnectionError,
    DisconnectionError,
    Ledger,
    ReconnectingConnection,
    ReconnectTimeout,
    RetryPolicy,
)
from zreconnect.events import ConnectionLost
from zreconnect.states import Event
from zreconnect.tests.base import PATIENCE, DatabaseTestCase, wait_until


class StateTests(DatabaseTestCase):
    def test_nothing_is_sent_before_the_first_transaction(self):
        before = self.forward.count()
        connection = self.connect()
        connection.cursor()
        connection.commit()
        connection.rollback()
        self.assertEqual(connection.state, "idle")
        self.assertEqual((self.forward.count() - before).connections, 0)

    def test_a_statement_begins_a_transaction(self):
        connection = self.connect()
        connection.cursor().execute("SELECT 1")
        self.assertEqual(connection.state, "active")
        connection.commit()
        self.assertEqual(connection.state, "idle")

    def test_begin_begins_a_transaction(self):
        connection = self.connect()
        connection.begin()
        self.assertEqual(connection.state, "active")
        connection.rollback()
        self.assertEqual(connection.state, "idle")

    def test_begin_inside_a_transaction(self):
        connection = self.connect()
        connection.begin()
        with self.assertRaisesRegex(self.module.ProgrammingError, "begin.. inside a transaction"):
            connection.begin()
        self.assertEqual(connection.state, "active")

    def test_commit_keeps_and_rollback_discards(self):
        self.make_table()
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("INSERT INTO item VALUES ('kept')")
        connection.commit()
        cursor.execute("INSERT INTO item VALUES ('discarded')")
        connection.rollback()
        self.assertEqual(self.names(), ["kept"])

    def test_close_rolls_back_and_is_final(self):
        self.make_table()
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("INSERT INTO item VALUES ('discarded')")
        connection.close()
        connection.close()
        self.assertEqual((connection.state, connection.closed), ("closed", 1))
        wait_until(lambda: not self.sessions())
        self.assertEqual(self.names(), [])
        for use in (
            connection.begin,
            connection.commit,
            connection.rollback,
            connection.cursor,
            connection.savepoint,
            lambda: connection.driver_connection,
            lambda: connection.server_version,
            lambda: cursor.execute("SELECT 1"),
            cursor.fetchone,
        ):
            with self.assertRaisesRegex(self.module.InterfaceError, "The connection is closed"):
                use()

    def test_close_before_the_first_session(self):
        connection = self.connect()
        connection.close()
        self.assertTrue(connection.closed)

    def test_repr_has_no_password(self):
        connection = self.connect()
        self.assertIn(self.server.password, self.dsn)
        self.assertEqual(
            repr(connection),
            f"<ReconnectingConnection postgresql://postgres@127.0.0.1:{self.forward.port}/"
            f"{self.dbname} idle>",
        )
        self.assertIn(repr(connection), repr(connection.cursor()))


class DisconnectTests(DatabaseTestCase):
    """However a session ends."""

    def end_sessions(self):
        """The ways to end a session while nothing is under way on it."""
        server, forward = self.server, self.forward
        return {
            "FIN": forward.drop,
            "RST": lambda: forward.drop(reset=True),
            "terminated": lambda: [server.terminate_backend(pid) for pid in self.sessions()],
            "killed": lambda: (server.kill_backend(self.sessions()[0]), server.wait_until_ready()),
            "restarted": server.restart,
            "immediate": lambda: (server.stop_immediately(), server.start()),
            "crashed": lambda: (server.kill_all(), server.start()),
        }

    def lose(self, end):
        """End the session, and wait until the server has no more of it and the client knows."""
        pids = set(self.sessions())
        end()
        wait_until(lambda: not pids & set(self.sessions()))
        # What the server has sent at last is forwarded before this returns.
        self.forward.count()

    def test_between_transactions_it_costs_nothing(self):
        connection = self.connect()
        cursor = connection.cursor()
        for name, end in self.end_sessions().items():
            with self.subTest(name):
                cursor.execute("SELECT 1")
                connection.rollback()
                self.lose(end)
                cursor.execute("SELECT 2")
                self.assertEqual(cursor.fetchone(), (2,))
                connection.commit()

    def test_between_transactions_settings_can_be_changed(self):
        for name, end in self.end_sessions().items():
            with self.subTest(name):
                connection = self.connect()
                connection.isolation_level = "SERIALIZABLE"
                connection.begin()
                connection.rollback()
                self.lose(end)
                # It has to tell the server.
                connection.autocommit = True
                cursor = connection.cursor()
                cursor.execute("SHOW transaction_isolation")
                self.assertEqual(cursor.fetchone(), ("serializable",))
                connection.close()
                wait_until(lambda: not self.sessions())

    def test_inside_a_transaction_it_dooms(self):
        connection = self.connect()
        cursor = connection.cursor()
        for name, end in self.end_sessions().items():
            with self.subTest(name):
                cursor.execute("SELECT 1")
                self.lose(end)
                with self.assertRaises(DisconnectionError):
                    cursor.execute("SELECT 2")
                self.assertEqual(connection.state, "doomed")
                connection.rollback()
                self.assertEqual(connection.state, "idle")
                cursor.execute("SELECT 3")
                self.assertEqual(cursor.fetchone(), (3,))
                connection.rollback()

    def test_at_commit_the_outcome_is_looked_up(self):
        self.make_table()
        for witness in ("xid", Ledger()):
            connection = self.connect(witness=witness)
            cursor = connection.cursor()
            for name, end in self.end_sessions().items():
                with self.subTest(name, witness=witness):
                    cursor.execute("INSERT INTO item VALUES ('never')")
                    self.lose(end)
                    with self.assertRaisesRegex(DisconnectionError, "nothing of it is committed"):
                        connection.commit()
                    self.assertEqual(connection.state, "doomed")
                    connection.rollback()
                    self.assertEqual(self.names(), [])

    def test_at_commit_the_outcome_is_unknown_without_a_witness(self):
        connection = self.connect(witness=None)
        cursor = connection.cursor()
        for name, end in self.end_sessions().items():
            with self.subTest(name):
                cursor.execute("SELECT 1")
                self.lose(end)
                with self.assertRaisesRegex(CommitOutcomeUnknown, "COMMIT was under way") as lost:
                    connection.commit()
                self.assertEqual(lost.exception.server, connection.server)
                self.assertIsInstance(lost.exception.__cause__, self.module.OperationalError)
                self.assertEqual(connection.state, "doomed")
                connection.rollback()

    def test_rollback_never_fails_because_of_it(self):
        connection = self.connect()
        for name, end in self.end_sessions().items():
            with self.subTest(name):
                connection.begin()
                self.lose(end)
                connection.rollback()
                self.assertEqual(connection.state, "idle")


class StatementsInAutocommitModeTests(DatabaseTestCase):
    def test_a_transaction_that_statements_have_begun_is_not_continued_in_another_session(self):
        self.make_table()
        for driver in ("psycopg2", "psycopg"):
            with self.subTest(driver):
                connection = zreconnect.connect(self.dsn, driver)
                self.addCleanup(connection.close)
                connection.autocommit = True
                connection.execute("BEGIN")
                connection.execute("INSERT INTO item VALUES ('one')")
                self.forward.drop()
                wait_until(lambda: not connection.work.link.session.watch.is_quiet())  # noqa: B023
                with self.assertRaises(DisconnectionError):
                    connection.execute("INSERT INTO item VALUES ('two')")
                connection.execute("INSERT INTO item VALUES (%s)", (driver,))
        self.assertEqual(self.names(), ["psycopg", "psycopg2"])

    def test_what_statements_have_begun_neither_commit_nor_rollback_is_silent_about(self):
        self.make_table()
        for number, driver in enumerate(("psycopg2", "psycopg")):
            with self.subTest(driver):
                connection = zreconnect.connect(self.dsn, driver)
                self.addCleanup(connection.close)
                connection.autocommit = True
                connection.commit()
                connection.rollback()
                connection.execute("BEGIN")
                connection.execute("INSERT INTO item VALUES (%s)", (str(number),))
                with self.assertRaisesRegex(connection.ProgrammingError, "end it by a statement"):
                    connection.commit()
                connection.execute("COMMIT")
                connection.commit()
                connection.execute("BEGIN")
                connection.execute("INSERT INTO item VALUES ('rolled back')")
                connection.rollback()
                connection.execute("SELECT 1")
        self.assertEqual(self.names(), ["0", "1"])

    def test_what_statements_have_begun_is_not_mixed_with_a_transaction_of_ours(self):
        """Else the half of it that was lost with its session would be missed by nobody."""
        for driver in ("psycopg2", "psycopg", "sqlite"):
            dsn = "sqlite://" if driver == "sqlite" else self.dsn
            connection = zreconnect.connect(dsn, driver)
            self.addCleanup(connection.close)
            connection.autocommit = True
            connection.execute("CREATE TABLE IF NOT EXISTS item (name text)")

            def in_block():
                with connection:  # noqa: B023
                    connection.execute("INSERT INTO item VALUES ('never')")  # noqa: B023

            for request in (
                connection.begin,
                lambda: connection.run(connection.execute, "SELECT 1"),  # noqa: B023
                in_block,
                lambda: setattr(connection, "autocommit", False),  # noqa: B023
                lambda: setattr(connection, "readonly", True),  # noqa: B023
            ):
                with self.subTest(driver):
                    connection.execute("BEGIN")
                    connection.execute("INSERT INTO item VALUES ('one')")
                    with self.assertRaisesRegex(
                        connection.ProgrammingError, "a statement has begun"
                    ):
                        request()
                    rows = connection.execute("SELECT name FROM item").fetchall()
                    self.assertEqual([tuple(row) for row in rows], [("one",)])
                    connection.execute("ROLLBACK")
            connection.run(connection.execute, "SELECT 1")

    def test_ping(self):
        connection = self.connect()
        connection.ping()
        self.forward.drop()
        connection.ping()
        connection.begin()
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            connection.ping()


class DoomedTests(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.connection = self.connect()
        self.cursor = self.connection.cursor()
        self.cursor.execute("SELECT 1")
        self.forward.drop()
        with self.assertRaises(DisconnectionError) as lost:
            self.cursor.execute("SELECT 2")
        self.error = lost.exception

    def test_the_error_carries_the_drivers(self):
        error_type, error, trace = self.error.getOriginalException()
        self.assertIs(error_type, self.module.OperationalError)
        self.assertIs(self.error.__cause__, error)
        self.assertIn("cursor.py", "".join(traceback.format_tb(trace)))

    def test_the_error_says_what_where_and_what_to_do(self):
        for part in ("lost inside a transaction", self.connection.server, "Roll back"):
            self.assertIn(part, str(self.error))
        self.assertNotIn(self.server.password, str(self.error))

    def test_it_is_broken_until_rollback(self):
        connection = self.connection
        self.assertEqual((connection.closed, connection.broken), (2, True))
        connection.rollback()
        self.assertEqual((connection.closed, connection.broken), (0, False))

    def test_closing_it(self):
        self.connection.close()
        self.assertEqual((self.connection.closed, self.connection.broken), (1, False))

    def test_what_could_not_begin_is_not_broken(self):
        def refuse(raw):
            raise self.module.ProgrammingError("refused")

        connection = self.connect(on_connect=refuse)
        with self.assertRaises(self.module.ProgrammingError):
            connection.cursor().execute("SELECT 1")
        self.assertEqual((connection.state, connection.closed), ("doomed", 0))

    def test_everything_raises_until_rollback(self):
        connection, cursor = self.connection, self.cursor
        for use in (
            lambda: cursor.execute("SELECT 1"),
            lambda: cursor.executemany("SELECT %s", [(1,)]),
            cursor.fetchone,
            cursor.fetchmany,
            cursor.fetchall,
            lambda: next(iter(cursor)),
            lambda: next(cursor),
            lambda: cursor.mogrify("SELECT %s", (1,)),
            connection.cursor,
            connection.begin,
            connection.commit,
            connection.savepoint,
            connection.__enter__,
            lambda: connection.driver_connection,
            lambda: connection.set_session(readonly=True),
            lambda: connection.set_client_encoding("LATIN1"),
            lambda: connection.lobject(),
            lambda: connection.poll(),
        ):
            with self.assertRaises(DisconnectionError) as again:
                use()
            error_type, error, trace = again.exception.getOriginalException()
            self.assertIs(error_type, DisconnectedConnectionError)
            self.assertEqual(str(error), "Already disconnected")
            self.assertIn("Already disconnected", str(again.exception))
            self.assertIsNone(trace)
        self.assertEqual(connection.state, "doomed")
        connection.rollback()
        cursor.execute("SELECT 5")
        self.assertEqual(cursor.fetchall(), [(5,)])

    def test_close_is_allowed(self):
        self.cursor.close()
        self.connection.close()
        self.assertEqual(self.connection.state, "closed")


class InterruptedTests(DatabaseTestCase):
    """An interrupt may come while a lost session is let go of."""

    def assert_rolls_back(self, connection, lose_it, refusal=DisconnectionError):
        def interrupt(event):
            if isinstance(event, ConnectionLost):
                raise KeyboardInterrupt

        zope.event.subscribers.append(interrupt)
        try:
            self.forward.drop()
            with self.assertRaises(KeyboardInterrupt):
                lose_it()
        finally:
            zope.event.subscribers.remove(interrupt)
        self.assertEqual(connection.state, "doomed")
        with self.assertRaises(refusal):
            connection.cursor().execute("SELECT 1")
        connection.rollback()
        self.assertEqual(connection.run(lambda: connection.state), "active")

    def test_in_a_statement(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        self.assert_rolls_back(connection, lambda: cursor.execute("SELECT 1"))

    def test_at_commit(self):
        connection = self.connect()
        connection.cursor().execute("SELECT 1")
        # Nobody has looked yet what became of the COMMIT.
        self.assert_rolls_back(connection, connection.commit, CommitOutcomeUnknown)


class ReadingTests(DatabaseTestCase):
    """The session ends while a result is being read."""

    # Whether next() takes a row of a server-side cursor.
    has_next = True

    def test_server_side_cursor(self):
        for read in (
            lambda cursor: cursor.fetchone(),
            lambda cursor: cursor.fetchmany(10),
            lambda cursor: cursor.fetchall(),
            lambda cursor: list(cursor),
            *([next] if self.has_next else []),
            lambda cursor: cursor.scroll(1),
            lambda cursor: cursor.close(),
        ):
            connection = self.connect()
            cursor = connection.cursor("numbers")
            cursor.execute("SELECT generate_series(1, 100000)")
            self.assertEqual(cursor.fetchone(), (1,))
            self.forward.drop()
            with self.assertRaises(DisconnectionError):
                read(cursor)
            self.assertEqual(connection.state, "doomed")

    def test_server_side_cursor_that_is_closed_after_it(self):
        """psycopg complains of one that nobody closes."""
        connection = self.connect()
        cursor = connection.cursor("numbers")
        cursor.execute("SELECT generate_series(1, 100000)")
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            cursor.fetchone()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResourceWarning)
            cursor.close()
            connection.rollback()
            del cursor
            gc.collect()
        self.assertEqual([each for each in caught if "Cursor" in str(each.message)], [])

    def test_iteration_in_progress(self):
        connection = self.connect()
        cursor = connection.cursor("numbers")
        cursor.itersize = 10
        cursor.execute("SELECT generate_series(1, 100)")
        seen = []
        with self.assertRaises(DisconnectionError):
            for (number,) in cursor:
                seen.append(number)
                if number == 15:
                    self.forward.drop()
        self.assertEqual(seen, list(range(1, 21)))

    def test_rows_of_a_rolled_back_transaction_are_not_fetched_on(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("SELECT generate_series(1, 3)")
        rows = iter(cursor)
        next(rows)
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            connection.cursor().execute("SELECT 1")
        with self.assertRaises(DisconnectionError):
            next(rows)

    def test_copy_to(self):
        connection = self.connect()
        cursor = connection.cursor()
        cut = self.forward.drop

        class File:
            size = 0

            def write(self, data):
                self.size += len(data)
                cut()

        file = File()
        with self.assertRaises(DisconnectionError):
            cursor.copy_expert("COPY (SELECT generate_series(1, 1000000)) TO STDOUT", file)
        self.assertTrue(file.size)
        self.assertEqual(connection.state, "doomed")

    def test_copy_from(self):
        self.query("CREATE TABLE number (n int)")
        connection = self.connect()
        cut = self.forward.drop

        class File:
            def read(self, size):
                cut()
                return "1\n" * (size // 2)

        with self.assertRaises(DisconnectionError):
            connection.cursor().copy_from(File(), "number")

    def test_rows_that_have_arrived_can_be_read_in_the_next_session(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("SELECT generate_series(1, 3)")
        connection.commit()
        self.forward.drop()
        self.assertEqual(cursor.fetchone(), (1,))
        connection.begin()
        self.assertEqual(cursor.fetchall(), [(2,), (3,)])


class CommitTests(DatabaseTestCase):
    def test_after_a_failed_statement_it_says_that_nothing_was_committed(self):
        self.make_table()
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("INSERT INTO item VALUES ('lost')")
        with self.assertRaises(self.module.errors.UndefinedTable):
            cursor.execute("SELECT * FROM missing")
        with self.assertRaisesRegex(self.module.InternalError, "Nothing was committed"):
            connection.commit()
        self.assertEqual(connection.state, "idle")
        self.assertEqual(self.names(), [])
        cursor.execute("INSERT INTO item VALUES ('kept')")
        connection.commit()
        self.assertEqual(self.names(), ["kept"])

    def test_after_a_failed_statement_with_a_server_side_cursor(self):
        connection = self.connect()
        connection.cursor("one").execute("SELECT 1")
        with self.assertRaises(self.module.errors.UndefinedTable):
            connection.cursor().execute("SELECT * FROM missing")
        with self.assertRaisesRegex(self.module.InternalError, "Nothing was committed"):
            connection.commit()
        self.assertEqual(connection.state, "idle")

    def test_a_deferred_constraint_ends_the_transaction(self):
        self.query("CREATE TABLE once (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        for cursor_name in (None, "server_side"):
            connection = self.connect()
            if cursor_name:
                connection.cursor(cursor_name).execute("SELECT 1")
            cursor = connection.cursor()
            cursor.execute("INSERT INTO once VALUES (1), (1)")
            with self.assertRaises(self.module.IntegrityError):
                connection.commit()
            self.assertEqual(connection.state, "idle")
            connection.rollback()
            cursor.execute("INSERT INTO once VALUES (2)")
            connection.commit()
            self.assertEqual(self.query("SELECT n FROM once"), [(2,)])
            self.query("DELETE FROM once")

    def test_a_commit_that_arrived_returns(self):
        self.make_table()
        for witness in ("xid", Ledger()):
            connection = self.connect(witness=witness)
            cursor = connection.cursor()
            for end in (
                self.forward.drop,
                lambda: self.forward.drop(reset=True),
                self.server.restart,
            ):
                cursor.execute("INSERT INTO item VALUES ('here')")
                self.forward.silence("to_client")
                thread = threading.Thread(target=self.end_after_commit, args=[end])
                thread.start()
                with self.events() as seen:
                    connection.commit()
                thread.join()
                self.assertEqual(connection.state, "idle")
                self.assertEqual(seen[-1].outcome, "committed")
                self.assertEqual(self.names(), ["here"])
                self.query("DELETE FROM item")

    def end_after_commit(self, end):
        wait_until(self.names)
        end()
        self.forward.drop()
        self.forward.resume()

    def test_a_commit_that_the_program_sends_itself_is_one_too(self):
        connection = self.connect()
        cursor = connection.cursor()
        for statement in ("COMMIT", "select 1;\n commit", "END", "PREPARE TRANSACTION 'x'"):
            cursor.execute("SELECT 1")
            self.forward.drop()
            with self.assertRaises(CommitOutcomeUnknown):
                cursor.execute(statement)
            self.assertEqual(connection.state, "doomed")
            connection.rollback()
        cursor.execute("SELECT 1")
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            cursor.execute("SELECT CASE WHEN true THEN 'COMMIT' END")

    def test_an_error_that_leaves_the_transaction_open_keeps_it_active(self):
        connection = self.connect()
        connection.begin()
        connection.driver_connection.autocommit = False
        with self.assertRaises(self.module.ProgrammingError):
            connection.commit()
        self.assertEqual(connection.state, "active")
        connection.driver_connection.autocommit = True
        connection.commit()


class BlockTests(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()

    def test_transaction_commits(self):
        with self.connect().transaction() as cursor:
            cursor.execute("INSERT INTO item VALUES ('one')")
        self.assertEqual(self.names(), ["one"])

    def test_transaction_rolls_back_on_an_error(self):
        connection = self.connect()
        with self.assertRaises(LookupError), connection.transaction() as cursor:
            cursor.execute("INSERT INTO item VALUES ('one')")
            raise LookupError
        self.assertEqual(connection.state, "idle")
        self.assertEqual(self.names(), [])

    def test_transaction_is_usable_after_a_disconnect(self):
        connection = self.connect()
        with self.assertRaises(DisconnectionError), connection.transaction() as cursor:
            self.forward.drop()
            cursor.execute("INSERT INTO item VALUES ('one')")
        with connection.transaction() as cursor:
            cursor.execute("INSERT INTO item VALUES ('two')")
        self.assertEqual(self.names(), ["two"])

    def test_transaction_that_swallows_the_disconnect_does_not_commit(self):
        connection = self.connect()
        with self.assertRaises(DisconnectionError), connection.transaction() as cursor:
            self.forward.drop()
            with contextlib.suppress(DisconnectionError):
                cursor.execute("INSERT INTO item VALUES ('one')")
        self.assertEqual(connection.state, "idle")

    def test_with_connection_commits_or_rolls_back_as_in_psycopg2(self):
        connection = self.connect()
        with connection as same:
            self.assertIs(same, connection)
            connection.cursor().execute("INSERT INTO item VALUES ('one')")
        with self.assertRaises(LookupError), connection:
            connection.cursor().execute("INSERT INTO item VALUES ('two')")
            raise LookupError
        self.assertEqual((connection.state, self.names()), ("idle", ["one"]))

    def test_with_connection_is_a_transaction_in_autocommit_mode_too(self):
        connection = self.connect()
        connection.autocommit = True
        with self.assertRaises(LookupError), connection:
            connection.cursor().execute("INSERT INTO item VALUES ('two')")
            raise LookupError
        self.assertEqual(self.names(), [])

    def test_with_connection_is_not_entered_twice(self):
        connection = self.connect()
        with (
            connection,
            self.assertRaisesRegex(self.module.ProgrammingError, "already inside a with block"),
            connection,
        ):
            pass
        with connection:
            pass

    def test_savepoints(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("INSERT INTO item VALUES ('one')")
        savepoint = connection.savepoint()
        with self.assertRaises(self.module.IntegrityError):
            cursor.execute("INSERT INTO item VALUES ('one')")
        savepoint.rollback()
        inner = connection.savepoint()
        cursor.execute("INSERT INTO item VALUES ('two')")
        inner.release()
        connection.commit()
        self.assertEqual(self.names(), ["one", "two"])

    def test_a_transaction_begins_with_a_savepoint(self):
        connection = self.connect()
        savepoint = connection.savepoint()
        connection.cursor().execute("INSERT INTO item VALUES ('one')")
        savepoint.rollback()
        connection.cursor().execute("INSERT INTO item VALUES ('two')")
        connection.commit()
        self.assertEqual(self.names(), ["two"])

    def test_a_savepoint_in_autocommit_mode(self):
        connection = self.connect()
        connection.autocommit = True
        with self.assertRaisesRegex(self.module.ProgrammingError, "outside a transaction"):
            connection.savepoint()
        connection.begin()
        connection.savepoint().release()
        connection.commit()


class TransientErrorTests(DatabaseTestCase):
    """The driver's errors after which the same work may succeed."""

    def error(self, statement):
        connection = self.connect()
        with self.assertRaises(self.module.Error) as raised:
            connection.cursor().execute(statement)
        return raised.exception

    def test_that_of_a_statement_on_the_drivers_own_connection(self):
        connection = self.connect()
        runs = []

        def work():
            runs.append(connection.driver_connection)
            if len(runs) == 1:
                runs[0].cursor().execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")

        connection.run(work)
        self.assertEqual(len(runs), 2)

    def test_they_are_the_drivers_and_transient(self):
        error = self.error("DO $$ BEGIN RAISE SQLSTATE '40001' USING DETAIL = 'why'; END $$")
        self.assertIsInstance(error, self.module.errors.SerializationFailure)
        self.assertIsInstance(error, TransientError)
        self.assertEqual((error.diag.sqlstate, error.diag.message_detail), ("40001", "why"))
        printed = traceback.format_exception_only(type(error), error)[0]
        self.assertRegex(printed, f"^{self.module.__name__}.errors.SerializationFailure: 40001")

    def test_they_travel_between_processes(self):
        error = self.error("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$")
        copy = pickle.loads(pickle.dumps(error))
        self.assertIs(type(copy), self.module.errors.DeadlockDetected)
        self.assertEqual(str(copy), str(error))

    def test_others_are_not(self):
        self.assertNotIsInstance(self.error("SELECT 1/0"), TransientError)


class RunTests(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()
        self.connection = self.connect()
        self.calls = 0

    def insert(self, name, fail=None, times=1):
        self.calls += 1
        self.connection.cursor().execute("INSERT INTO item VALUES (%s)", (name,))
        if fail is not None and self.calls <= times:
            fail()
        return name.upper()

    def test_returns_what_the_function_returns(self):
        self.assertEqual(self.connection.run(self.insert, "one"), "ONE")
        self.assertEqual(self.connection.run(self.insert, name="two"), "TWO")
        self.assertEqual(self.names(), ["one", "two"])

    def lose(self):
        self.forward.drop()
        self.connection.cursor().execute("SELECT 1")

    def test_runs_again_after_a_disconnect(self):
        self.assertEqual(self.connection.run(self.insert, "one", self.lose, times=2), "ONE")
        self.assertEqual((self.calls, self.names()), (3, ["one"]))

    def test_at_most_attempts_times(self):
        with self.assertRaises(DisconnectionError):
            self.connection.run(self.insert, "one", self.lose, times=9, attempts=2)
        self.assertEqual((self.calls, self.connection.state), (2, "idle"))

    def test_for_some_seconds_however_often(self):
        self.connection.run(self.insert, "one", self.lose, times=5, attempts=2, timeout=PATIENCE)
        self.assertEqual((self.calls, self.names()), (6, ["one"]))

    def test_attempts_that_take_longer(self):
        self.connection.run(self.insert, "one", self.lose, times=2, timeout=0)
        self.assertEqual((self.calls, self.names()), (3, ["one"]))

    def test_a_function_of_ones_own_patience(self):
        work = self.connection.transactional(attempts=2, timeout=PATIENCE)(self.insert)
        work("one", self.lose, times=3)
        self.assertEqual((self.calls, self.names()), (4, ["one"]))
        for keywords, error in [({"timeout": -1}, ValueError), ({"timeout": "1"}, TypeError)]:
            for refuse in (
                lambda keywords=keywords: self.connection.transactional(**keywords),
                lambda keywords=keywords: self.connection.run(self.insert, **keywords),
            ):
                with self.assertRaisesRegex(error, "timeout"):
                    refuse()
        self.assertEqual(self.calls, 4)

    def test_not_what_has_committed_through_something_else(self):
        other, engine = (
            self.connect(),
            sqlalchemy.create_engine(self.dsn.replace(":", "+psycopg2:", 1)),
        )
        self.addCleanup(engine.dispose)

        def commit(text):
            with other.transaction() as cursor:
                cursor.execute(text)

        def run(text):
            other.run(lambda: other.cursor().execute(text))

        def execute(text):
            other.autocommit = True
            other.cursor().execute(text)
            other.autocommit = False

        def engine_begin(text):
            with engine.begin() as connection:
                connection.execute(sqlalchemy.text(text))

        for number, use in enumerate((commit, run, execute, engine_begin)):

            def work(use=use, number=number):
                self.connection.cursor().execute("INSERT INTO item VALUES ('lost')")
                use(f"INSERT INTO item VALUES ('{number}')")
                self.lose()

            with self.subTest(use), self.assertRaises(DisconnectionError):
                self.connection.run(work)
        self.assertEqual(self.names(), ["0", "1", "2", "3"])

    def test_what_another_connection_has_rolled_back_is_run_again(self):
        other = self.connect()

        def read():
            with other.cursor() as cursor:
                cursor.execute("SELECT 1")
            other.rollback()
            self.lose()

        self.connection.run(self.insert, "one", read)
        self.assertEqual((self.calls, self.names()), (2, ["one"]))

    def test_not_after_a_commit_that_is_a_statement(self):
        def commit():
            self.connection.cursor().execute("COMMIT")
            raise self.connection.work.link.driver.disconnection_error("of another database")

        with self.assertRaisesRegex(DisconnectionError, "of another database"):
            self.connection.run(self.insert, "one", commit)
        self.assertEqual((self.calls, self.names()), (1, ["one"]))

    def test_runs_again_after_a_serialization_failure(self):
        def fail():
            self.connection.cursor().execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")

        self.connection.run(self.insert, "one", fail)
        self.assertEqual((self.calls, self.names()), (2, ["one"]))

    def test_not_after_other_errors(self):
        def fail():
            raise LookupError

        for failure, error in [
            (fail, LookupError),
            (lambda: self.connection.cursor().execute("SELECT x"), self.module.ProgrammingError),
        ]:
            self.calls = 0
            with self.assertRaises(error):
                self.connection.run(self.insert, "one", failure)
            self.assertEqual((self.calls, self.connection.state), (1, "idle"))

    def test_not_after_an_unknown_outcome(self):
        self.connection = self.connect(witness=None)
        with self.assertRaises(CommitOutcomeUnknown):
            self.connection.run(self.insert, "one", self.forward.drop)
        self.assertEqual((self.calls, self.connection.state), (1, "idle"))

    def test_again_after_a_commit_that_did_not_arrive(self):
        self.assertEqual(self.connection.run(self.insert, "one", self.forward.drop), "ONE")
        self.assertEqual((self.calls, self.names()), (2, ["one"]))

    def test_not_after_a_timeout(self):
        connection = self.connect(policy=RetryPolicy(timeout=0))
        self.forward.refuse()
        with self.assertRaises(ReconnectTimeout):
            connection.run(self.insert, "one", attempts=5)
        self.assertEqual(self.calls, 0)

    def test_inside_a_transaction_it_is_refused_and_changes_nothing(self):
        self.connection.begin()
        with self.assertRaisesRegex(self.module.ProgrammingError, "inside a transaction"):
            self.connection.run(self.insert, "one")
        self.assertEqual(self.connection.state, "active")

    def test_bad_attempts(self):
        with self.assertRaisesRegex(ValueError, "attempts"):
            self.connection.run(self.insert, "one", attempts=0)


class ThreadTests(DatabaseTestCase):
    def in_thread(self, function):
        """What ``function()`` raised in a thread of its own."""
        raised = []

        def target():
            try:
                function()
            except Exception as error:
                raised.append(error)

        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
        return raised

    def test_close_and_cancel_from_another_thread(self):
        # Past the forwarder: psycopg2 keeps the GIL in cancel(), so that the forwarder's thread
        # could not forward the request.
        connection = self.connect(self.server.dsn(dbname=self.dbname))
        cursor = connection.cursor()
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone()

        def cancel():
            wait_until(
                lambda: self.server.query(
                    "SELECT true FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'",
                    pid,
                )
            )
            connection.cancel()

        thread = threading.Thread(target=cancel)
        thread.start()
        with self.assertRaises(self.module.errors.QueryCanceled):
            cursor.execute("SELECT pg_sleep(60)")
        thread.join()
        self.assertEqual(connection.state, "active")
        self.assertEqual(self.in_thread(connection.close), [])
        self.assertEqual(connection.state, "closed")

    def test_close_while_a_statement_is_under_way(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        raw = connection.driver_connection
        raw.close()
        connection.work.note(Event.CLOSED)
        with self.assertRaises(self.module.InterfaceError) as closed, connection.guard.asking():
            raise self.module.InterfaceError("closed")
        self.assertNotIsInstance(closed.exception, DisconnectionError)


class FactoryTests(DatabaseTestCase):
    def test_any_connection_factory(self):
        connection = ReconnectingConnection(
            lambda: self.module.connect(self.dsn), driver=self.driver
        )
        self.addCleanup(connection.close)
        self.assertEqual(connection.server, "the server of a connection_factory")
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        self.assertIn(f"127.0.0.1:{self.forward.port}/{self.dbname}", connection.server)
        self.assertNotIn(self.server.password, connection.server)
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            cursor.execute("SELECT 1")
        connection.rollback()
        cursor.execute("SELECT 1")

    def set_modes(self, raw):
        raw.set_session(isolation_level="SERIALIZABLE", readonly=True, deferrable=True)

    def test_what_the_factory_set_holds(self):
        def connection_factory():
            raw = self.module.connect(self.dsn)
            self.set_modes(raw)
            return raw

        connection = ReconnectingConnection(connection_factory, driver=self.driver)
        self.addCleanup(connection.close)
        cursor = connection.cursor()
        cursor.execute(
            "SELECT current_setting('transaction_isolation'),"
            " current_setting('transaction_read_only'),"
            " current_setting('transaction_deferrable')"
        )
        self.assertEqual(cursor.fetchone(), ("serializable", "on", "on"))

    def test_an_exception_of_the_factory_is_not_tried_again(self):
        calls = []

        def connection_factory():
            calls.append(1)
            raise LookupError("no such vault")

        with self.assertRaisesRegex(LookupError, "no such vault"):
            ReconnectingConnection(connection_factory, driver=self.driver).begin()
        self.assertEqual(len(calls), 1)

    def test_an_oserror_of_the_factory_is(self):
        calls = []

        def connection_factory():
            calls.append(1)
            if len(calls) < 3:
                raise ConnectionRefusedError("a tunnel is down")
            return self.module.connect(self.dsn)

        connection = ReconnectingConnection(connection_factory, driver=self.driver)
        self.addCleanup(connection.close)
        connection.begin()
        self.assertEqual(len(calls), 3)

    def test_unusable_connections(self):
        def in_autocommit_mode():
            raw = self.module.connect(self.dsn)
            raw.autocommit = True
            return raw

        def in_a_transaction():
            raw = self.module.connect(self.dsn)
            raw.cursor().execute("SELECT 1")
            return raw

        for factory, error, message in [
            (in_autocommit_mode, self.module.ProgrammingError, "autocommit"),
            (in_a_transaction, self.module.ProgrammingError, "in a transaction: have it commit"),
            (
                lambda: self.module.connect(self.dsn, async_=True),
                self.module.ProgrammingError,
                "asynchronous",
            ),
            (lambda: None, TypeError, "must return a psycopg2 connection, not None.*driver="),
        ]:
            with self.subTest(message), self.assertRaisesRegex(error, message):
                ReconnectingConnection(factory, driver=self.driver).begin()

    def test_bad_arguments(self):
        for message, arguments, keywords in [
            ("connection_factory must be callable", ["dsn"], {}),
            ("policy must be a RetryPolicy", [print], {"policy": 5}),
            ("on_connect must be callable", [print], {"on_connect": "SET x"}),
        ]:
            with self.assertRaisesRegex(TypeError, message):
                ReconnectingConnection(*arguments, **keywords)
        with self.assertRaisesRegex(ValueError, "driver 'oracle' is unknown"):
            ReconnectingConnection(print, driver="oracle")
        with self.assertRaisesRegex(ValueError, "driver 'oracle' is unknown"):
            zreconnect.connect(self.dsn, driver="oracle")

    def test_refused_for_good(self):
        for dsn, message in [
            (self.dsn.replace(self.server.password, "wrong"), "password authentication failed"),
            (self.layer.dsn(dbname="missing"), 'database "missing" does not exist'),
            (self.layer.dsn(user="nobody"), "authentication failed"),
        ]:
            before = self.forward.count()
            connection = self.connect(dsn)
            with self.assertRaisesRegex(self.module.OperationalError, message) as refused:
                connection.begin()
            self.assertNotIsInstance(refused.exception, DisconnectionError)
            self.assertNotIn(self.server.password, str(refused.exception))
            self.assertEqual(connection.state, "idle")
            # psycopg2 makes one connection for each attempt (libpq's SSL request is part of it).
            self.assertEqual((self.forward.count() - before).connections, 1)

    def test_connect_timeout_of_the_dsn(self):
        self.forward.silence()
        connection = self.connect(
            self.dsn + "?connect_timeout=1", policy=RetryPolicy(attempts=2, timeout=None)
        )
        with self.assertRaisesRegex(ReconnectTimeout, "timeout expired"):
            connection.begin()


class ForkTests(DatabaseTestCase):
    """``connection.fork()``; for ``os.fork()`` see test_processes."""

    def test_independent_with_the_same_settings(self):
        seen = []
        connection = self.connect(on_connect=seen.append)
        connection.isolation_level = "SERIALIZABLE"
        forked = connection.fork()
        self.addCleanup(forked.close)
        connection.begin()
        forked.begin()
        self.assertNotEqual(connection.info.backend_pid, forked.info.backend_pid)
        self.assertEqual(len(seen), 2)
        forked.rollback()
        self.assertEqual(connection.state, "active")
        self.assertEqual(forked.isolation_level, connection.isolation_level)
        forked.isolation_level = None
        self.assertIsNotNone(connection.isolation_level)


class DriverAttributeTests(DatabaseTestCase):
    """What else works on a psycopg2 connection."""

    def test_exceptions(self):
        connection = self.connect()
        for name in ("Error", "OperationalError", "IntegrityError", "Warning"):
            self.assertIs(getattr(connection, name), getattr(self.module, name))

    def test_attributes_and_methods(self):
        connection = self.connect()
        self.assertGreater(connection.server_version, 90000)
        self.assertEqual(connection.encoding, "UTF8")
        self.assertEqual(connection.info.dbname, self.dbname)
        self.assertEqual(connection.get_parameter_status("client_encoding"), "UTF8")
        self.assertIsInstance(connection.driver_connection, psycopg2.extensions.connection)

    def test_unknown_attributes(self):
        connection = self.connect()
        with self.assertRaises(AttributeError):
            _ = connection.missing
        with self.assertRaises(AttributeError):
            _ = connection._missing
        with self.assertRaises(AttributeError):
            connection.missing = []

    def test_notices(self):
        connection = self.connect()
        connection.cursor().execute("DO $$ BEGIN RAISE NOTICE 'hear me'; END $$")
        self.assertIn("hear me", connection.notices[-1])

    def test_containers_of_the_programs_last(self):
        connection = self.connect()
        connection.notices, connection.notifies = notices, notifies = deque(), deque()
        connection.cursor().execute("DO $$ BEGIN RAISE NOTICE 'hear me'; END $$; LISTEN two")
        connection.commit()
        self.forward.drop()
        connection.cursor().execute("DO $$ BEGIN RAISE NOTICE 'me, too'; END $$")
        connection.lobject()
        self.assertEqual(len(notices), 2)
        self.assertIs(connection.notices, notices)
        self.assertIs(connection.notifies, notifies)

    def test_types_that_were_registered_last(self):
        connection = self.connect()
        number = psycopg2.extensions.new_type((23,), "NUMBER", lambda value, _: f"n{value}")
        connection.call_driver(psycopg2.extensions.register_type, number, connection)
        connection.commit()
        self.forward.drop()
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        self.assertEqual(cursor.fetchone(), ("n1",))

    def test_notify(self):
        connection = self.connect()
        connection.autocommit = True
        connection.cursor().execute("LISTEN news")
        self.query("NOTIFY news, 'hello'")

        def notified():
            connection.poll()
            return connection.notifies

        wait_until(notified)
        self.assertEqual(connection.notifies[0].payload, "hello")
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            wait_until(lambda: connection.poll() == 9)
        self.assertEqual(connection.state, "idle")

    def test_helpers_that_ask_whether_there_is_a_transaction(self):
        self.make_table()
        self.query("CREATE TYPE pair AS (a int, b int)")
        self.query("CREATE EXTENSION IF NOT EXISTS hstore")
        self.query("CREATE TYPE span AS RANGE (subtype = int)")
        registers = [
            lambda cursor: register_hstore(cursor, globally=True),
            lambda cursor: register_composite("pair", cursor, globally=True),
            lambda cursor: register_range("span", "Span", cursor, globally=True),
        ]
        for number, register in enumerate(registers):
            connection = self.connect()
            self.assertEqual(connection.status, psycopg2.extensions.STATUS_READY)
            cursor = connection.cursor()
            register(cursor)
            self.assertEqual(connection.state, "idle")
            cursor.execute("INSERT INTO item VALUES (%s)", (str(number),))
            self.assertEqual(connection.status, psycopg2.extensions.STATUS_IN_TRANSACTION)
            register(cursor)
            connection.commit()
        self.assertEqual(self.names(), ["0", "1", "2"])

    def test_a_large_object_after_its_transaction(self):
        connection = self.connect()
        large_object = connection.lobject(mode="wb")
        self.assertIsInstance(large_object, psycopg2.extensions.lobject)
        large_object.write(b"content")
        connection.commit()
        with self.assertRaises(psycopg2.ProgrammingError):
            large_object.read()
        for lose in (lambda: None, self.forward.drop):
            lose()
            large_object.unlink()
            self.assertEqual(connection.state, "active")
            connection.rollback()
        with tempfile.NamedTemporaryFile() as file:
            large_object.export(file.name)
            self.assertEqual(file.read(), b"content")
        large_object.unlink()
        connection.commit()
        with self.assertRaisesRegex(psycopg2.OperationalError, "does not exist"):
            connection.lobject(large_object.oid)

    def test_large_objects(self):
        connection = self.connect()
        with connection.lobject(mode="wb") as large_object:
            large_object.write(b"content")
            oid = large_object.oid
        connection.commit()
        large_object = connection.lobject(oid)
        self.assertEqual(large_object.read(), "content")
        self.forward.drop()
        with self.assertRaises(DisconnectionError), large_object:
            large_object.read()
        with self.assertRaises(DisconnectionError):
            large_object.seek(0)
        connection.rollback()
        self.assertEqual(connection.lobject(oid).read(), "content")
        self.assertEqual(connection.notices, [])

    def test_composed_sql(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute(sql.SQL("SELECT {} AS {}").format(sql.Literal(1), sql.Identifier("a b")))
        self.assertEqual(cursor.description[0].name, "a b")
        identifier = sql.Identifier('a"b')
        self.assertEqual(identifier.as_string(connection.driver_connection), '"a""b"')

    def test_what_an_error_in_the_wait_callback_leaves(self):
        connection = self.connect()
        connection.begin()
        self.addCleanup(psycopg2.extensions.set_wait_callback, None)
        psycopg2.extensions.set_wait_callback(lambda raw: 1 // 0)
        with self.assertRaises(ZeroDivisionError):
            connection.cursor().execute("SELECT 1")
        psycopg2.extensions.set_wait_callback(None)
        self.assertEqual(connection.closed, 2)
        connection.rollback()
        connection.cursor().execute("SELECT 1")

    def test_an_encoding_that_a_statement_has_set(self):
        connection = self.connect()
        connection.cursor().execute("SET client_encoding TO LATIN1")
        # psycopg2 goes on with what it was told last.
        for name in ("LATIN1", "UTF8"):
            with self.assertRaisesRegex(psycopg2.ProgrammingError, "inside a transaction"):
                connection.set_client_encoding(name)

    def test_reset(self):
        connection = self.connect()
        connection.autocommit = True
        connection.cursor().execute("SET application_name TO 'changed'")
        connection.reset()
        self.assertFalse(connection.autocommit)
        cursor = connection.cursor()
        cursor.execute("SHOW application_name")
        self.assertNotEqual(cursor.fetchone(), ("changed",))


class GarbageTests(DatabaseTestCase):
    def test_a_forgotten_connection_closes_its_session_at_once(self):
        gc.disable()
        self.addCleanup(gc.enable)
        connection = zreconnect.connect(self.dsn, driver=self.driver)
        connection.cursor().execute("SELECT 1")
        forgotten = weakref.ref(connection)
        del connection
        self.assertIsNone(forgotten())
        wait_until(lambda: not self.sessions())

    def test_one_that_met_a_disconnect_is_collected(self):
        connection = zreconnect.connect(self.dsn, driver=self.driver, policy=FAIL_FAST)
        connection.begin()
        self.forward.drop()
        try:
            connection.cursor().execute("SELECT 1")
        except DisconnectionError:
            self.assertIsNotNone(sys.exc_info()[1])
        forgotten = weakref.ref(connection)
        del connection
        gc.collect()
        self.assertIsNone(forgotten())
