"""A connection that is shared by threads, and functions that are transactions."""

import contextlib
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from unittest import mock

import psycopg

from zreconnect import (
    ConnectionDescriptor,
    DisconnectionError,
    Ledger,
    ReconnectTimeout,
    RetryPolicy,
)
from zreconnect.tests.base import (
    DatabaseTestCase,
    LineTestCase,
    needs_mysqlclient,
    on_mariadb,
    policy_of,
    wait_until,
)
from zreconnect.tests.test_mysql import MysqlTestCase
from zreconnect.turn import Turn

THREADS = 6
TIMES = 15


class SharedTests:
    def setUp(self):
        super().setUp()
        self.make_items()
        self.messages = self.logged()
        self.executor = self.enterContext(ThreadPoolExecutor(THREADS))

    def logged(self):
        """The messages that are logged during the test."""
        messages = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())
        logger = logging.getLogger("zreconnect")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        self.addCleanup(logger.setLevel, level)
        self.addCleanup(logger.removeHandler, handler)
        return messages

    def in_thread(self, function, *args):
        return self.executor.submit(function, *args)

    def in_all_threads(self, function):
        """Call it with a number in each of many threads, until all have returned."""
        list(self.executor.map(function, range(THREADS)))

    def insert(self, cursor, name):
        cursor.execute("INSERT INTO item (name) VALUES (%s)", (name,))

    def is_awaited(self):
        """Whether a thread has begun to wait for its turn."""
        return any("waits for another one" in message for message in self.messages)

    def held_by_thread(self, connection):
        """Have another thread begin a transaction; a function that lets it commit."""
        held, let_go = threading.Event(), threading.Event()

        def hold():
            with connection.transaction() as cursor:
                self.insert(cursor, "held")
                held.set()
                let_go.wait(60)

        self.addCleanup(let_go.set)
        future = self.in_thread(hold)
        held.wait(60)

        def finish():
            let_go.set()
            future.result()

        return finish

    # Taking turns

    def test_statements_of_transactions_do_not_interleave(self):
        connection = self.connect()
        executed = []

        def work(number):
            for time in range(TIMES):
                with connection.transaction() as cursor:
                    for part in "ab":
                        self.insert(cursor, f"{number} {time} {part}")
                        executed.append((number, time))

        self.in_all_threads(work)
        self.assertEqual(executed[::2], executed[1::2])
        self.assertEqual(len(self.names()), 2 * THREADS * TIMES)

    def test_nothing_is_lost_or_doubled_when_the_line_is_cut(self):
        connection = self.connect()

        def work(number):
            for time in range(TIMES):
                connection.run(self.work, connection, number, time, attempts=50)

        self.in_all_threads(work)
        self.assertEqual(len(self.names()), THREADS * TIMES)

    def work(self, connection, number, time):
        cursor = connection.cursor()
        self.insert(cursor, f"{number} {time}")
        if time % 5 == number and threading.get_ident() not in self.has_cut:
            self.has_cut.add(threading.get_ident())
            self.forward.drop()

    @property
    def has_cut(self):
        return self.__dict__.setdefault("_has_cut", set())

    def test_a_statement_waits_and_begins_a_transaction_of_its_own(self):
        connection = self.connect()
        finish = self.held_by_thread(connection)

        def work():
            cursor = connection.cursor()
            self.insert(cursor, "one")
            connection.rollback()

        future = self.in_thread(work)
        wait_until(self.is_awaited)
        finish()
        future.result()
        self.assertEqual(self.names(), ["held"])

    def test_results_wait(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        connection.commit()
        finish = self.held_by_thread(connection)
        future = self.in_thread(cursor.fetchone)
        wait_until(self.is_awaited)
        finish()
        self.assertEqual(tuple(future.result()), (1,))

    def test_with_blocks_take_turns(self):
        connection = self.connect()
        executed = []

        def work(number):
            for time in range(TIMES):
                with connection, connection.cursor() as cursor:
                    executed.append((number, time))
                    self.insert(cursor, f"{number} {time}")
                    executed.append((number, time))

        self.in_all_threads(work)
        self.assertEqual(executed[::2], executed[1::2])
        self.assertEqual(len(self.names()), THREADS * TIMES)

    def test_autocommit_mode(self):
        connection = self.connect(witness=None)
        connection.autocommit = True

        def work(number):
            for time in range(TIMES):
                with contextlib.closing(connection.cursor()) as cursor:
                    self.insert(cursor, f"{number} {time}")

        self.in_all_threads(work)
        self.assertEqual(len(self.names()), THREADS * TIMES)
        self.assertEqual(len(self.sessions()), 1)

    def test_a_session_is_opened_once(self):
        connecting, let_go = threading.Event(), threading.Event()
        self.addCleanup(let_go.set)

        def on_connect(raw):
            connecting.set()
            let_go.wait(60)

        connection = self.connect(on_connect=on_connect)
        first = self.in_thread(lambda: connection.driver_connection)
        connecting.wait(60)
        second = self.in_thread(lambda: connection.driver_connection)
        wait_until(self.is_awaited)
        let_go.set()
        self.assertIs(first.result(), second.result())
        self.assertEqual(len(self.sessions()), 1)

    def test_the_wait_has_the_deadline_of_the_policy(self):
        connection = self.connect()
        finish = self.held_by_thread(connection)
        for use in (connection.begin, connection.cursor().fetchone, connection.savepoint):
            with (
                policy_of(connection, timeout=0.2),
                self.assertRaises(self.error("OperationalError")) as raised,
            ):
                use()
            self.assertIn("waited 0.2 seconds for its turn", str(raised.exception))
            self.assertNotIsInstance(raised.exception, DisconnectionError)
        self.assertEqual(connection.state, "active")
        finish()
        self.assertEqual(self.names(), ["held"])
        with connection.transaction() as cursor:
            self.insert(cursor, "one")

    def test_who_has_waited_for_another_thread_waits_less_for_the_server(self):
        connection = self.connect(policy=RetryPolicy(timeout=60))
        timeouts = []

        def work():
            with connection.transaction():
                timeouts.append(connection.work.patience.begins(connection.work.waited).timeout)

        work()
        finish = self.held_by_thread(connection)
        started = monotonic()
        future = self.in_thread(work)
        wait_until(self.is_awaited)
        finish()
        future.result()
        longest = monotonic() - started
        work()
        first, waited, last = timeouts
        self.assertEqual((first, last), (60, 60))
        self.assertLess(waited, 60)
        self.assertGreaterEqual(waited, 60 - longest)

    def error(self, name):
        return getattr(self.module, name)

    def test_commit_of_another_threads_transaction_is_refused(self):
        connection = self.connect()
        finish = self.held_by_thread(connection)
        with self.assertRaisesRegex(self.error("ProgrammingError"), "another thread's transaction"):
            connection.commit()
        finish()
        self.assertEqual(self.names(), ["held"])

    def test_rollback_leaves_another_threads_transaction_alone(self):
        connection = self.connect()
        finish = self.held_by_thread(connection)
        connection.rollback()
        self.assertEqual(connection.state, "active")
        finish()
        self.assertEqual(self.names(), ["held"])

    def test_a_doomed_transaction_is_its_threads(self):
        connection = self.connect()
        doomed, let_go = threading.Event(), threading.Event()
        self.addCleanup(let_go.set)

        def lose():
            connection.begin()
            self.forward.drop()
            with contextlib.suppress(DisconnectionError):
                connection.cursor().execute("SELECT 1")
            doomed.set()
            let_go.wait(60)
            connection.rollback()

        losing = self.in_thread(lose)
        doomed.wait(60)
        self.assertEqual(connection.state, "doomed")
        beginning = self.in_thread(connection.run, lambda: self.insert(connection.cursor(), "one"))
        wait_until(self.is_awaited)
        let_go.set()
        losing.result()
        beginning.result()
        self.assertEqual(self.names(), ["one"])

    def test_a_thread_that_ends_inside_its_transaction_loses_it(self):
        connection = self.connect()

        @connection.transactional()
        def add(name):
            self.insert(connection.cursor(), name)

        # The number of a thread that has ended is often the next one's.
        for number in range(10):
            abandoning = threading.Thread(target=self.abandon, args=(connection, number))
            abandoning.start()
            abandoning.join()
            adding = threading.Thread(target=add, args=(f"added {number}",))
            adding.start()
            adding.join()
        self.assertEqual(self.names(), [f"added {number}" for number in range(10)])
        self.assertEqual(connection.state, "idle")
        self.assertTrue(any("has ended inside" in message for message in self.messages))

    def abandon(self, connection, number):
        if number % 2:
            connection.begin()
        self.insert(connection.cursor(), f"abandoned {number}")
        if number % 3 == 2:
            self.forward.drop()
            with contextlib.suppress(DisconnectionError):
                connection.cursor().execute("SELECT 1")

    def test_a_thread_that_waits_has_its_turn_when_the_other_one_ends(self):
        connection = self.connect()
        abandoned, let_go = threading.Event(), threading.Event()
        self.addCleanup(let_go.set)

        def abandon():
            self.insert(connection.cursor(), "abandoned")
            abandoned.set()
            let_go.wait(60)

        thread = threading.Thread(target=abandon)
        thread.start()
        abandoned.wait(60)
        adding = self.in_thread(connection.run, lambda: self.insert(connection.cursor(), "added"))
        wait_until(self.is_awaited)
        let_go.set()
        thread.join()
        adding.result()
        self.assertEqual(self.names(), ["added"])

    def test_a_failed_begin_leaves_the_turn_to_others(self):
        connection = self.connect()
        self.forward.refuse()
        with policy_of(connection, timeout=0), self.assertRaises(ReconnectTimeout):
            connection.begin()
        self.forward.accept()
        self.in_thread(connection.run, lambda: self.insert(connection.cursor(), "one")).result()
        self.assertEqual(self.names(), ["one"])

    def test_closing_wakes_those_who_wait(self):
        connection = self.connect()
        finish = self.held_by_thread(connection)
        future = self.in_thread(connection.begin)
        wait_until(self.is_awaited)
        connection.close()
        with self.assertRaisesRegex(self.error("InterfaceError"), "closed"):
            future.result()
        with self.assertRaises(self.error("InterfaceError")):
            finish()
        self.assertEqual(self.names(), [])

    # Functions that are transactions

    def test_a_function_is_a_transaction(self):
        connection = self.connect()

        @connection.transactional()
        def add(name, attempts):
            """Add an item."""
            self.insert(connection.cursor(), f"{name} {attempts}")
            return name.upper()

        self.assertEqual(add("one", attempts=7), "ONE")
        self.assertEqual((add.__name__, add.__doc__), ("add", "Add an item."))
        self.assertEqual((connection.state, self.names()), ("idle", ["one 7"]))

    def test_a_function_runs_again(self):
        connection = self.connect()
        calls = []

        @connection.transactional(attempts=2)
        def add(name):
            calls.append(name)
            self.insert(connection.cursor(), name)
            if len(calls) == 1:
                self.forward.drop()

        add("one")
        self.assertEqual((calls, self.names()), (["one", "one"], ["one"]))

    def test_a_function_inside_another_one_is_a_part_of_it(self):
        connection = self.connect()
        calls = []

        @connection.transactional()
        def add(name):
            calls.append(name)
            self.insert(connection.cursor(), name)

        @connection.transactional()
        def add_two():
            add("one")
            if len(calls) == 1:
                self.forward.drop()
            add("two")
            if len(calls) < 6:
                raise self.disconnection()

        add_two()
        self.assertEqual(calls, ["one", "two"] * 3)
        self.assertEqual(self.names(), ["one", "two"])
        with self.assertRaises(LookupError), connection.transaction():
            add("three")
            raise LookupError
        self.assertEqual(self.names(), ["one", "two"])

    def disconnection(self):
        return DisconnectionError("the work is to run again")

    def test_a_function_does_not_join_what_nobody_has_begun(self):
        connection = self.connect()
        add = connection.transactional()(lambda: self.insert(connection.cursor(), "one"))
        connection.cursor().execute("SELECT 1")
        with self.assertRaisesRegex(self.error("ProgrammingError"), "inside a transaction"):
            add()
        connection.rollback()
        add()
        self.assertEqual(self.names(), ["one"])

    def test_bad_attempts(self):
        with self.assertRaisesRegex(ValueError, "attempts"):
            self.connect().transactional(attempts=0)


class Psycopg2Tests(SharedTests, DatabaseTestCase):
    def make_items(self):
        self.make_table()

    def test_two_phase_commit_keeps_the_turn_to_its_end(self):
        connection = self.connect(two_phase=True)
        self.assertFalse(connection.work.turn.is_mine())
        connection.begin()
        connection.rollback()
        # The transaction manager's transaction goes on.
        self.assertTrue(connection.work.turn.is_mine())
        connection.work.member.abort(None)
        self.assertFalse(connection.work.turn.is_mine())

    def test_who_has_it_for_good_has_not_waited(self):
        descriptor = ConnectionDescriptor(self.dsn, policy=RetryPolicy(timeout=60))
        self.addCleanup(descriptor.close)
        connection = descriptor.connection()
        connection.begin()
        patience = connection.work.patience
        self.assertEqual(patience.begins(connection.work.waited).timeout, 60)

    def test_rollback_of_another_threads_transaction_does_not_wait(self):
        connection = self.connect()
        finish = self.held_by_thread(connection)
        with mock.patch.object(Turn, "_wait", side_effect=AssertionError("it waits")):
            connection.rollback()
        finish()

    def test_a_forked_child_does_not_wait_for_the_parents_threads(self):
        connection = self.connect()
        finish = self.held_by_thread(connection)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                connection.rollback()
                with connection.transaction() as cursor:
                    self.insert(cursor, "child")
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        self.assertEqual(status, 0)
        finish()
        self.assertEqual(self.names(), ["child", "held"])


class PsycopgTests(SharedTests, DatabaseTestCase):
    driver = "psycopg"
    module = psycopg

    def make_items(self):
        self.make_table()


class MariadbTests(SharedTests, MysqlTestCase):
    def make_items(self):
        """The tests of MySQL have made the table."""

    def insert(self, cursor, name):
        cursor.execute("INSERT INTO item VALUES (%s, 0)", (name,))

    def connect(self, **keywords):
        keywords.setdefault("witness", Ledger())
        return super().connect(**keywords)


@on_mariadb()
class PymysqlTests(MariadbTests, LineTestCase):
    driver_name = "pymysql"


@needs_mysqlclient
@on_mariadb()
class MysqlclientTests(MariadbTests, LineTestCase):
    driver_name = "mysqlclient"
