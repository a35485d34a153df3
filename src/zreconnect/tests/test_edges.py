"""What a program does at the edges: in blocks, in other threads, with cursors of before."""

import contextlib
import gc
import math
import os
import socket
import sqlite3
import tempfile
import threading
import unittest
from unittest import mock

import psycopg
import psycopg2
import transaction
import zope.event
from transaction.interfaces import TransientError

import zreconnect
from zreconnect import CommitOutcomeUnknown, DisconnectionError, RetryPolicy, events
from zreconnect.datamanager import join_transactions
from zreconnect.drivers.base import BaseDriver
from zreconnect.events import ConnectionLost, Reconnected
from zreconnect.server import _Attempt, server_from_dsn
from zreconnect.session import Session
from zreconnect.tests.base import PATIENCE, DatabaseTestCase, wait_until
from zreconnect.turn import Turn, _Waiting
from zreconnect.watchdog import NO_WATCH
from zreconnect.witness import Outcome


@contextlib.contextmanager
def interrupted_by(kind, error=KeyboardInterrupt):
    """Whoever announces an event of this kind is interrupted, once."""

    def interrupt(event):
        if isinstance(event, kind):
            zope.event.subscribers.remove(interrupt)
            raise error

    zope.event.subscribers.append(interrupt)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            zope.event.subscribers.remove(interrupt)


class Blocks:
    def setUp(self):
        super().setUp()
        self.make_table()
        self.connection = self.connect()

    def insert(self, name="one"):
        self.connection.cursor().execute("INSERT INTO item VALUES (%s)", (name,))

    def blocks(self):
        """Calls the function inside each kind of block."""

        def with_connection(function):
            with self.connection:
                function()

        def with_transaction(function):
            with self.connection.transaction():
                function()

        return with_connection, with_transaction, self.connection.run

    def test_an_interrupt_while_a_block_begins(self):
        for block in self.blocks()[1:]:
            self.connection.run(lambda: None)
            self.forward.drop()
            with interrupted_by(ConnectionLost), self.assertRaises(KeyboardInterrupt):
                block(lambda: None)
            self.assertEqual(self.connection.state, "idle")
            block(lambda: None)
            thread = threading.Thread(target=self.connection.run, args=[lambda: None])
            thread.start()
            thread.join(PATIENCE)
            self.assertFalse(thread.is_alive())

    def test_the_programs_own_end(self):
        """A signal's handler closes the connection, and ends the program."""

        def end():
            self.insert()
            self.connection.close()
            raise SystemExit

        for number in range(3):
            with self.assertRaises(SystemExit):
                self.blocks()[number](end)
            self.assertEqual(self.names(), [])
            self.connection = self.connect()

    def test_a_block_keeps_the_connection_when_its_transaction_has_ended(self):
        for end in (self.connection.rollback, self.connection.commit):
            with self.connection:
                self.insert()
                end()
                self.assertTrue(self.connection.work.turn.is_mine())
        self.assertFalse(self.connection.work.turn.is_mine())
        self.assertEqual(self.names(), ["one"])

    def test_a_block_inside_another_one_leaves_it_alone(self):
        with self.connection:
            self.insert()
            with self.assertRaises(self.module.ProgrammingError), self.connection:
                pass
            with self.assertRaises(self.module.ProgrammingError):
                self.connection.run(lambda: None)
        self.assertEqual(self.names(), ["one"])

    def test_an_unknown_outcome_is_not_hidden_by_what_the_program_raises_next(self):
        connection = self.connect(witness=None)

        def work():
            runs.append(1)
            connection.cursor().execute(f"INSERT INTO item VALUES ('{len(runs)}')")
            self.forward.cut("to_client", 0)
            with contextlib.suppress(CommitOutcomeUnknown):
                connection.commit()
            raise TransientError("once more")

        runs = []
        with self.assertRaises(CommitOutcomeUnknown):
            connection.run(work)
        self.assertEqual(len(runs), 1)
        with self.assertRaises(CommitOutcomeUnknown), connection.transaction():
            work()

    def test_what_was_found_after_an_interrupt_is_logged_and_told_once_more(self):
        def work():
            self.insert()
            self.forward.cut("to_client", 0)

        with (
            interrupted_by(ConnectionLost),
            self.assertLogs("zreconnect", "ERROR") as logs,
            self.assertRaises(KeyboardInterrupt),
        ):
            self.connection.run(work)
        self.assertIn("had committed its work", logs.output[-1])
        with self.assertRaises(CommitOutcomeUnknown) as found:
            self.connection.rollback()
        self.assertEqual(found.exception.outcome, "committed")
        self.connection.rollback()
        self.assertEqual(self.names(), ["one"])

    def test_it_is_told_beside_another_threads_transaction(self):
        self.connection.work.own.leave_untold(Outcome.COMMITTED)
        began, end = threading.Event(), threading.Event()

        def use():
            with self.connection.transaction():
                began.set()
                end.wait(PATIENCE)

        thread = threading.Thread(target=use)
        thread.start()
        began.wait(PATIENCE)
        with self.assertRaises(CommitOutcomeUnknown):
            self.connection.rollback()
        self.connection.rollback()
        end.set()
        thread.join(PATIENCE)

    def test_it_is_told_where_nobody_has_the_turn(self):
        self.connection.work.own.leave_untold(Outcome.COMMITTED)
        with self.assertRaises(CommitOutcomeUnknown):
            self.connection.rollback()

    def test_who_begins_anew_is_not_told_of_the_transaction_before(self):
        self.connection.run(lambda: None)
        for begin in (self.connection.begin, self.insert):
            self.connection.work.own.leave_untold(Outcome.COMMITTED)
            begin()
            self.connection.rollback()
            self.connection.rollback()

    def test_on_connect_that_meets_a_disconnect_of_another_connection(self):
        armed = []

        def on_connect(raw):
            if armed:
                raise self.connection.work.link.driver.disconnection_error("elsewhere", None)

        connection = self.connect(on_connect=on_connect, policy=RetryPolicy(timeout=0.1))
        connection.cursor().execute("INSERT INTO item VALUES ('one')")
        armed.append(True)
        self.forward.cut("to_client", 0)
        with self.assertRaises(CommitOutcomeUnknown):
            connection.commit()
        armed.clear()
        connection.rollback()

    def test_errors_of_another_threads_look_do_not_touch_a_transaction(self):
        self.insert()
        raised = []

        def look():
            try:
                self.look()
            except TypeError as error:
                raised.append(error)

        thread = threading.Thread(target=look)
        thread.start()
        thread.join(PATIENCE)
        self.assertEqual(len(raised), 1)
        self.connection.commit()
        self.assertEqual(self.names(), ["one"])

    def test_a_cursor_of_a_lost_session_does_not_touch_the_present_transaction(self):
        cursor = self.connection.cursor("numbers")
        cursor.execute("SELECT generate_series(1, 1000)")
        cursor.fetchone()
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            self.insert()
        self.connection.rollback()
        self.insert()
        for read in (lambda: cursor.fetchmany(500), lambda: list(cursor)):
            with self.assertRaises(self.module.Error):
                read()
        self.connection.commit()
        self.assertEqual(self.names(), ["one"])

    def test_a_commit_under_way_in_a_manager_that_forgets_it(self):
        descriptor = zreconnect.ConnectionDescriptor(self.dsn, driver=self.driver)
        self.addCleanup(descriptor.close)
        connection = descriptor.connection()
        connection.cursor().execute("INSERT INTO item VALUES ('one')")
        # As an interrupt before the first line of abort() has it.
        with (
            mock.patch.object(type(connection.work.member), "abort", side_effect=KeyboardInterrupt),
            self.assertRaises(KeyboardInterrupt),
        ):
            transaction.abort()
        self.assertEqual(connection.state, "idle")
        self.assertEqual(self.names(), [])

    def test_rows_that_are_there_are_read_outside_a_transaction(self):
        cursor = self.connection.cursor()
        cursor.execute("SELECT generate_series(1, 3)")
        self.connection.commit()
        self.assertEqual([tuple(row) for row in cursor], [(1,), (2,), (3,)])

    def test_a_cursor_beside_another_threads_doomed_transaction(self):
        lost, end = threading.Event(), threading.Event()

        def lose():
            self.insert()
            self.forward.drop()
            with contextlib.suppress(DisconnectionError):
                self.insert()
            lost.set()
            end.wait(PATIENCE)
            self.connection.rollback()

        thread = threading.Thread(target=lose)
        thread.start()
        lost.wait(PATIENCE)
        cursor = self.connection.cursor()
        end.set()
        cursor.execute("SELECT 1")
        thread.join(PATIENCE)

    def test_a_closed_cursor(self):
        cursor = self.connection.cursor()
        cursor.execute("SELECT 1")
        self.connection.commit()
        cursor.close()
        for execute in (cursor.execute, lambda statement: cursor.executemany(statement, [()])):
            with self.assertRaises(self.module.InterfaceError):
                execute("SELECT 2")
            self.assertEqual(self.connection.state, "idle")

    def test_a_loss_that_a_cursors_block_meets_at_its_end(self):
        for error, raised in ((None, DisconnectionError), (KeyError, KeyError)):
            with self.assertRaises(raised), self.connection.cursor("numbers") as cursor:
                cursor.execute("SELECT generate_series(1, 1000)")
                self.forward.drop()
                if error is not None:
                    raise error
            self.assertEqual(self.connection.state, "doomed")
            self.connection.rollback()

    def test_a_transient_error_where_a_commit_is_executed(self):
        def run(function):
            manager.run(function)

        manager = zreconnect.initZopeless(self.dsn, driver=self.driver, implicitBegin=False)
        self.addCleanup(manager.uninstall)
        for connection, run_it in (
            (self.connection, self.connection.run),
            (manager.connection(), run),
        ):
            connection.begin()
            connection.rollback()
            observer = connection.work.link.observer
            commit = observer.commit

            def interrupted(raw, commit=commit):
                commit(raw)
                raise TransientError("the program's own")

            runs = []
            with (
                mock.patch.object(observer, "commit", interrupted),
                self.assertRaises(CommitOutcomeUnknown),
            ):
                run_it(
                    lambda runs=runs, c=connection: (runs.append(1), c.cursor().execute("SELECT 1"))
                )
            self.assertEqual(len(runs), 1)

    def test_an_interrupted_commit_of_a_manager(self):
        manager = zreconnect.initZopeless(self.dsn, driver=self.driver, implicitBegin=False)
        self.addCleanup(manager.uninstall)

        def work():
            manager.cursor().execute("INSERT INTO item VALUES ('one')")
            self.forward.cut("to_client", 0)

        with (
            interrupted_by(ConnectionLost),
            self.assertLogs("zreconnect", "ERROR"),
            self.assertRaises(KeyboardInterrupt),
        ):
            manager.run(work)
        with self.assertRaises(CommitOutcomeUnknown):
            manager.abort()
        manager.abort()
        self.assertEqual(self.names(), ["one"])

    def test_rollback_of_another_threads_own_connection(self):
        descriptor = zreconnect.ConnectionDescriptor(self.dsn, driver=self.driver)
        self.addCleanup(descriptor.close)
        connection = descriptor.connection()
        raised = []

        def roll_back():
            for request in (connection.rollback, connection.cursor):
                try:
                    request()
                except self.module.ProgrammingError as error:
                    raised.append(error)

        thread = threading.Thread(target=roll_back)
        thread.start()
        thread.join(PATIENCE)
        self.assertEqual(len(raised), 2)

    def leave(self, *, lost):
        """A thread ends inside its transaction, perhaps with a COMMIT that was interrupted."""

        def work():
            self.insert()
            if lost:
                self.forward.cut("to_client", 0)
                with interrupted_by(ConnectionLost), contextlib.suppress(KeyboardInterrupt):
                    self.connection.commit()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(PATIENCE)

    def test_an_interrupt_while_another_threads_transaction_is_ended(self):
        self.leave(lost=False)
        self.forward.drop()
        with interrupted_by(ConnectionLost), self.assertRaises(KeyboardInterrupt):
            self.insert("two")
        self.connection.rollback()
        self.connection.run(self.insert, "two")
        self.assertEqual(self.names(), ["two"])

    def test_a_thread_that_has_ended_with_an_interrupted_commit(self):
        self.leave(lost=True)
        with self.assertLogs("zreconnect", "ERROR") as logs:
            self.connection.run(self.insert, "two")
        self.assertIn("had committed its work", logs.output[-1])
        self.assertEqual(self.names(), ["one", "two"])

    def test_rollback_ends_the_block_that_a_thread_has_left(self):
        def begin():
            self.connection.__enter__()
            self.insert()

        thread = threading.Thread(target=begin)
        thread.start()
        thread.join(PATIENCE)
        self.connection.rollback()
        other = threading.Thread(target=self.connection.run, args=[self.insert, "two"])
        other.start()
        other.join(PATIENCE)
        self.assertEqual(self.names(), ["two"])

    def test_a_part_that_a_thread_has_left_rolled_back(self):
        join_transactions(self.connection, transaction.manager)
        kept = []

        def leave():
            self.insert()
            self.connection.rollback()
            kept.append(transaction.get())

        thread = threading.Thread(target=leave)
        thread.start()
        thread.join(PATIENCE)
        self.insert("two")
        transaction.commit()
        self.assertEqual(self.names(), ["two"])

    def test_an_interrupted_commit_in_a_manager_that_forgets_it(self):
        for look in ("cursor", "execute"):
            descriptor = zreconnect.ConnectionDescriptor(self.dsn, driver=self.driver)
            self.addCleanup(descriptor.close)
            connection = descriptor.connection()
            cursor = connection.cursor()
            cursor.execute("INSERT INTO item VALUES ('one')")
            self.forward.cut("to_client", 0)
            member = type(connection.work.member)
            with (
                mock.patch.object(member, "abort", side_effect=KeyboardInterrupt),
                interrupted_by(ConnectionLost),
            ):
                for end in (transaction.commit, transaction.abort):
                    with self.assertRaises(KeyboardInterrupt):
                        end()
            with self.assertLogs("zreconnect", "ERROR") as logs:
                connection.cursor() if look == "cursor" else cursor.execute("SELECT 1")
            self.assertIn("had committed its work", logs.output[-1])
            transaction.abort()
            self.assertEqual((connection.state, self.names()), ("idle", ["one"]))
            self.query("DELETE FROM item")

    def test_an_interrupt_when_there_is_a_session_again(self):
        self.connection.run(lambda: None)
        self.forward.drop()
        with interrupted_by(Reconnected), self.assertRaises(KeyboardInterrupt):
            self.connection.begin()
        self.assertEqual(self.connection.state, "idle")
        wait_until(lambda: not self.sessions())

    def test_closed_while_it_begins(self):
        connection = self.connect(on_connect=lambda raw: connection.close())
        with self.assertRaises(self.module.InterfaceError):
            connection.begin()
        self.assertEqual(connection.state, "closed")
        wait_until(lambda: not self.sessions())

    def test_a_session_that_somebody_still_refers_to_is_closed_all_the_same(self):
        for end in (self.connection.reset, self.connection.close):
            self.insert()
            session = self.connection.work.link.session
            end()
            self.assertTrue(session.raw.closed)
            self.assertFalse(session.watch.is_quiet())

    def test_nobody_has_left_a_closed_connection(self):
        self.insert()
        self.connection.close()
        for request in (self.insert, self.connection.begin, self.connection.rollback):
            with (
                self.assertNoLogs("zreconnect", "WARNING"),
                self.assertRaises(self.module.InterfaceError),
            ):
                request()

    def test_reset_inside_a_transaction(self):
        self.insert()
        self.connection.reset()
        self.assertEqual((self.connection.state, self.names()), ("idle", []))

    def test_an_adapters_requests(self):
        adapter = zreconnect.ReconnectingDatabaseAdapter(self.dsn, driver=self.driver, timeout=60)
        self.addCleanup(adapter.disconnect)
        for _ in range(2):
            adapter().cursor().execute("SELECT 1")
            transaction.commit()


class Psycopg2Tests(Blocks, DatabaseTestCase):
    def look(self):
        self.connection.get_parameter_status(None)

    def test_a_file_that_raises_the_modules_error(self):
        class File:
            def write(self, text):
                raise psycopg2.OperationalError("of another connection")

        self.insert()
        with contextlib.suppress(psycopg2.Error):
            self.connection.cursor().copy_expert("COPY (SELECT 1) TO STDOUT", File())
        self.connection.commit()
        self.assertEqual(self.names(), ["one"])

    def test_a_loss_that_a_large_objects_block_meets_at_its_end(self):
        for error, raised in ((None, DisconnectionError), (KeyError, KeyError)):
            with self.assertRaises(raised), self.connection.lobject():
                self.forward.drop()
                if error is not None:
                    raise error
            self.connection.rollback()

    def test_a_commit_that_is_lost_after_a_server_side_cursor(self):
        cursor = self.connection.cursor("numbers")
        cursor.execute("SELECT 1")
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            self.connection.commit()
        self.connection.rollback()
        self.connection.run(self.insert)


class PsycopgTests(Blocks, DatabaseTestCase):
    driver = "psycopg"
    module = psycopg

    def look(self):
        self.connection.cancel_safe(timeout="x")

    def copy(self):
        return self.connection.cursor().copy("COPY item FROM STDIN")

    def test_what_is_raised_in_a_block_of_the_drivers(self):
        with self.assertRaises(KeyError), self.copy():
            self.forward.drop()
            raise KeyError
        self.connection.rollback()
        self.connection.run(self.insert)

    def test_a_row_factory_that_raises(self):
        def mistaken(cursor):
            def make(values):
                raise KeyError(values)

            return make

        self.insert()
        cursor = self.connection.cursor(row_factory=mistaken)
        with self.assertRaises(KeyError):
            list(cursor.stream("SELECT 1"))
        self.connection.commit()
        self.assertEqual(self.names(), ["one"])


class SqliteTests(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = os.path.join(directory.name, "base")

    def test_a_cursor_factory_that_is_refused_is_not_kept(self):
        connection = zreconnect.ReconnectingConnection(
            lambda: sqlite3.connect(self.path, check_same_thread=False), driver="sqlite"
        )
        self.addCleanup(connection.close)
        connection.begin()
        connection.rollback()
        with self.assertRaises(sqlite3.NotSupportedError):
            connection.cursor_factory = sqlite3.Cursor
        self.assertIsNone(connection.cursor_factory)

    def test_a_session_that_nobody_knows_any_more_is_closed(self):
        raw = sqlite3.connect(self.path)
        driver = zreconnect.connect("sqlite://").work.link.driver
        Session(driver, raw, NO_WATCH, os.getpid())
        gc.collect()
        with self.assertRaises(sqlite3.ProgrammingError):
            raw.execute("SELECT 1")

    def test_an_interrupt_where_a_commit_is_executed(self):
        connection = zreconnect.connect(f"sqlite:///{self.path}")
        self.addCleanup(connection.close)
        connection.cursor().execute("CREATE TABLE item (name text)")
        commit = connection.work.link.driver.commit

        def interrupted(raw, rider=""):
            commit(raw, rider)
            raise KeyboardInterrupt

        with (
            mock.patch.object(
                type(connection.work.link.driver), "commit", staticmethod(interrupted)
            ),
            self.assertRaises(KeyboardInterrupt),
        ):
            connection.commit()
        with self.assertRaises(CommitOutcomeUnknown) as raised:
            connection.rollback()
        self.assertEqual((raised.exception.outcome, connection.state), ("unknown", "idle"))


class TurnTests(unittest.TestCase):
    def test_who_is_interrupted_while_it_waits_does_not_keep_it(self):
        turn = Turn()
        turn.take(0)
        errors = []

        def wait():
            with mock.patch("zreconnect.turn._Waiting.listen", side_effect=[turn_is_handed_over()]):
                try:
                    turn.take(PATIENCE)
                except KeyboardInterrupt as error:
                    errors.append(error)

        def turn_is_handed_over():
            return KeyboardInterrupt()

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(PATIENCE)
        self.assertEqual(len(errors), 1)
        turn.give()
        taken = []
        other = threading.Thread(target=lambda: taken.append(turn.take(PATIENCE)))
        other.start()
        other.join(PATIENCE)
        self.assertEqual(taken, [True])

    def test_who_is_handed_it_when_its_time_is_up_has_it(self):
        class LateTurn(Turn):
            def _leave_queue(self, waiting):
                self.end()
                return super()._leave_queue(waiting)

        turn = LateTurn()
        turn.take(0)
        taken = []
        thread = threading.Thread(target=lambda: taken.append(turn.take(0.05)))
        thread.start()
        thread.join(PATIENCE)
        self.assertEqual(taken, [True])

    def test_it_is_not_handed_to_a_thread_that_has_ended(self):
        turn = Turn()
        turn.take(0)
        thread = threading.Thread(
            target=lambda: turn._queue.append(_Waiting(turn_of_this_thread()))
        )

        def turn_of_this_thread():
            other = Turn()
            other.take(0)
            return other._slot["holder"]

        thread.start()
        thread.join(PATIENCE)
        turn.give()
        self.assertFalse(turn.is_anothers())
        self.assertTrue(turn.take(0))

    def test_who_has_no_more_time_may_get_it_in_the_last_moment(self):
        turn = Turn()
        turn.take(0)
        taken = []

        def wait():
            # It gives while the other one looks at the clock for the last time.
            with mock.patch("zreconnect.turn._Waiting.listen", lambda waiting, seconds: None):
                taken.append(turn.take(0.2))

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(PATIENCE)
        self.assertEqual(taken, [False])
        turn.give()
        self.assertFalse(turn.is_anothers())


class OtherTests(unittest.TestCase):
    def test_a_driver_that_does_not_tell_whether_it_is_at_rest(self):
        self.assertFalse(BaseDriver().is_at_rest(None))

    def test_one_attempt_raises_what_it_has_met(self):
        with (
            contextlib.closing(socket.create_server(("127.0.0.1", 0))) as closed,
            self.assertRaises(psycopg2.OperationalError),
        ):
            port = closed.getsockname()[1]
            closed.close()
            server_from_dsn(f"host=127.0.0.1 port={port}").connect_once(PATIENCE)

    def test_who_comes_when_an_attempt_has_just_ended(self):
        attempt = _Attempt(math.inf)
        attempt.end(None)
        self.assertIsNone(attempt.shared_outcome(math.inf))

    def test_an_interrupt_is_not_taken_for_a_subscribers_failure(self):
        with mock.patch.object(events, "notify", [].pop), self.assertRaises(TypeError):
            events.announce(events.Reconnected("server", 1, 0.0))
