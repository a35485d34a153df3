"""The database adapter: connections of threads, retries that share their time, its interface."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

import psycopg2
import psycopg2.extras
import transaction
import zope.event

from zreconnect import (
    CommitOutcomeUnknown,
    DisconnectionError,
    Ledger,
    ReconnectingDatabaseAdapter,
    ReconnectTimeout,
    XidWitness,
    beginning,
)
from zreconnect.events import ConnectionAttemptFailed
from zreconnect.interfaces import IDatabaseUnavailable
from zreconnect.policy import SINGLE_ATTEMPT
from zreconnect.tests.base import PATIENCE, DatabaseTestCase, wait_until, with_time_to_connect


class AdapterTestCase(DatabaseTestCase):
    def adapter(self, dsn=None, **keywords):
        adapter = ReconnectingDatabaseAdapter(dsn or self.dsn, **keywords)
        # Not away any more, as it was in the test before.
        adapter._model.work.link.server.outage.reached()
        self.addCleanup(adapter.disconnect)
        self.addCleanup(transaction.abort)
        return adapter

    def in_thread(self, function):
        results = []
        thread = threading.Thread(target=lambda: results.append(function()))
        thread.start()
        thread.join()
        return results[0]


@with_time_to_connect
class TransactionTests(AdapterTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()

    def insert(self, connection, name="one"):
        connection.cursor().execute("INSERT INTO item VALUES (%s)", (name,))

    def test_work_is_part_of_the_transaction(self):
        adapter = self.adapter()
        self.insert(adapter())
        self.assertEqual(self.names(), [])
        transaction.commit()
        self.assertEqual(self.names(), ["one"])
        self.insert(adapter(), "two")
        transaction.abort()
        self.assertEqual(self.names(), ["one"])

    def test_cursor_joins_and_sends_nothing(self):
        adapter = self.adapter()
        before = self.forward.count()
        adapter().cursor()
        self.assertEqual(len(transaction.get()._resources), 1)
        self.assertEqual(adapter().state, "idle")
        self.assertFalse(adapter.isConnected())
        transaction.commit()
        self.assertEqual(self.forward.count(), before)

    def test_a_cursor_outlives_its_transaction(self):
        cursor = self.adapter()().cursor()
        for name in ("one", "two"):
            cursor.execute("INSERT INTO item VALUES (%s)", (name,))
            transaction.commit()
        self.assertEqual(self.names(), ["one", "two"])

    def test_commit_is_the_transaction_managers(self):
        connection = self.adapter()()
        self.insert(connection)
        with self.assertRaisesRegex(psycopg2.ProgrammingError, "transaction manager"):
            connection.commit()

    def test_another_transaction_manager(self):
        adapter = self.adapter()
        manager = transaction.TransactionManager(explicit=True)
        manager.begin()
        self.insert(adapter(manager))
        with self.assertRaisesRegex(psycopg2.ProgrammingError, "another transaction manager"):
            adapter()
        self.assertIs(adapter(manager), adapter(manager))
        transaction.commit()
        self.assertEqual(self.names(), [])
        manager.commit()
        self.assertEqual(self.names(), ["one"])
        self.insert(adapter(), "two")
        transaction.commit()
        self.assertEqual(self.names(), ["one", "two"])

    def test_transaction_manager_that_nobody_has_any_more(self):
        adapter = self.adapter()
        manager = transaction.TransactionManager(explicit=True)
        manager.begin()
        self.insert(adapter(manager))
        del manager
        self.insert(adapter(), "two")
        transaction.commit()
        self.assertEqual(self.names(), ["two"])

    def test_each_thread_has_a_connection_until_it_ends(self):
        adapter = self.adapter()
        mine = adapter()
        mine.cursor().execute("SELECT 1")

        def use():
            other = adapter()
            other.cursor().execute("SELECT 1")
            result = adapter() is other, other is mine
            # That of a query before may still be ending.
            wait_until(lambda: len(self.sessions()) == 2)
            transaction.abort()
            return result

        self.assertEqual(self.in_thread(use), (True, False))
        wait_until(lambda: len(self.sessions()) == 1)

    def test_reading_costs_one_round_trip_less_and_writing_none_more(self):
        adapter = self.adapter()

        def request(statement):
            adapter().cursor().execute(statement)
            transaction.commit()

        request("SELECT 1")
        with self.plain() as plain:
            plain.cursor().execute("SELECT 1")
            plain.rollback()
            for statement, more in (("SELECT 1", 0), ("INSERT INTO item VALUES ('a')", 1)):
                ours = self.round_trips(lambda statement=statement: request(statement))
                self.query("DELETE FROM item")
                theirs = self.round_trips(
                    lambda statement=statement: (plain.cursor().execute(statement), plain.commit())
                )
                self.query("DELETE FROM item")
                self.assertEqual((ours, theirs), (2 + more, 3))

    def test_rows_are_lists(self):
        cursor = self.adapter()().cursor()
        cursor.execute("SELECT n, n FROM generate_series(1, 6) n")
        self.assertEqual(cursor.fetchone(), [1, 1])
        self.assertEqual(cursor.fetchmany(2), [[2, 2], [3, 3]])
        self.assertEqual(next(cursor), [4, 4])
        self.assertEqual(list(cursor), [[5, 5], [6, 6]])
        self.assertIsNone(cursor.fetchone())
        self.assertEqual(cursor.fetchall(), [])

    def test_rows_of_a_cursor_factory_are_its_own(self):
        cursor = self.adapter()().cursor(cursor_factory=psycopg2.extras.RealDictCursor)
        cursor.execute("SELECT 1 AS one")
        self.assertEqual(cursor.fetchall(), [{"one": 1}])

    def test_a_swallowed_disconnect_cannot_be_committed(self):
        adapter = self.adapter(timeout=5)
        self.insert(adapter())
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            self.insert(adapter(), "two")
        with self.assertRaises(DisconnectionError):
            adapter().cursor()
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        transaction.abort()
        self.insert(adapter(), "three")
        transaction.commit()
        self.assertEqual(self.names(), ["three"])

    def test_a_savepoint_before_the_first_statement(self):
        adapter = self.adapter(timeout=5)
        for number in range(2):
            cursor = adapter().cursor()
            savepoint = transaction.savepoint()
            cursor.execute("INSERT INTO item VALUES ('no')")
            savepoint.rollback()
            cursor.execute("INSERT INTO item VALUES (%s)", (str(number),))
            transaction.commit()
        self.assertEqual(self.names(), ["0", "1"])

    def test_a_savepoint_before_the_first_statement_reconnects(self):
        adapter = self.adapter(timeout=5)
        adapter().cursor()
        transaction.abort()
        self.forward.drop()
        adapter().cursor()
        transaction.savepoint()
        self.insert(adapter())
        transaction.commit()
        self.assertEqual(self.names(), ["one"])

    def test_a_disconnect_in_a_savepoint_cannot_be_committed(self):
        adapter = self.adapter(timeout=5)
        self.insert(adapter())
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            transaction.savepoint()
        with self.assertRaises(transaction.interfaces.TransactionFailedError):
            transaction.commit()
        transaction.abort()
        self.insert(adapter(), "two")
        transaction.commit()
        self.assertEqual(self.names(), ["two"])

    def test_a_disconnect_in_del_cannot_be_committed(self):
        adapter = self.adapter(timeout=5)

        class Leaves:
            def __del__(self):
                try:
                    adapter().cursor().execute("SELECT 1")
                except DisconnectionError:
                    seen.append(True)

        seen = []
        self.insert(adapter())
        leaves = Leaves()
        self.forward.drop()
        del leaves
        self.assertEqual(seen, [True])
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        transaction.abort()
        self.assertEqual(self.names(), [])

    def test_a_lost_commit_of_a_request_that_only_read_may_run_again(self):
        adapter = self.adapter()
        adapter().cursor().execute("SELECT 1")
        self.forward.drop()
        self.forward.refuse()
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        transaction.abort()

    def test_a_lost_commit_that_cannot_be_looked_up_is_not_retried(self):
        adapter = self.adapter(witness=None)
        self.insert(adapter())
        self.forward.drop()
        with self.assertRaises(CommitOutcomeUnknown) as unknown:
            transaction.commit()
        self.assertFalse(transaction.get().isRetryableError(unknown.exception))
        transaction.abort()


class TimeoutTests(AdapterTestCase):
    def read(self, adapter):
        adapter().cursor().execute("SELECT 1")

    def test_without_timeout_it_fails_fast(self):
        adapter = self.adapter()
        self.forward.refuse()
        with self.events() as seen, self.assertRaises(DisconnectionError) as failed:
            self.read(adapter)
        self.assertEqual([type(event).__name__ for event in seen], ["GaveUp"])
        self.assertTrue(IDatabaseUnavailable.providedBy(failed.exception))
        _, original, _ = failed.exception.getOriginalException()
        self.assertTrue(IDatabaseUnavailable.providedBy(original))

    def test_with_timeout_it_waits(self):
        adapter = self.adapter(timeout=30)
        with self.refusing_for(0.3):
            self.read(adapter)

    def test_then_it_gives_up(self):
        adapter = self.adapter(timeout=0.2)
        self.forward.refuse()
        with self.assertRaises(ReconnectTimeout) as timeout:
            self.read(adapter)
        self.assertTrue(IDatabaseUnavailable.providedBy(timeout.exception))
        # The request did not do all of its work.
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        transaction.abort()

    @contextmanager
    def refusing_for(self, seconds):
        """Inside the block an attempt is refused, and others are for so long after it."""

        def accept_later(event):
            if isinstance(event, ConnectionAttemptFailed):
                time.sleep(seconds)
                self.forward.accept()

        self.forward.refuse()
        zope.event.subscribers.append(accept_later)
        try:
            yield
        finally:
            zope.event.subscribers.remove(accept_later)

    def waits(self, adapter):
        """What is left of the thread's time, in the next transaction."""
        return adapter().work.patience.begins(0).timeout

    def lose_transaction(self, adapter, seconds):
        """Wait for the server for so long, then lose it."""
        with self.refusing_for(seconds):
            self.read(adapter)
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            self.read(adapter)
        transaction.abort()

    def test_retries_share_the_time(self):
        adapter = self.adapter(timeout=60)
        self.lose_transaction(adapter, 0.3)
        first = self.waits(adapter)
        self.assertLessEqual(first, 59.7)
        self.lose_transaction(adapter, 0.3)
        self.assertLessEqual(self.waits(adapter), first - 0.3)
        self.read(adapter)
        transaction.commit()
        self.assertEqual(self.waits(adapter), 60)

    def test_so_does_a_begin_that_travels_with_a_statement(self):
        adapter = self.adapter(timeout=60, driver="psycopg")
        self.read(adapter)
        transaction.commit()
        self.forward.delay(0.2)
        self.read(adapter)
        self.forward.delay(0)
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            self.read(adapter)
        transaction.abort()
        self.assertLessEqual(self.waits(adapter), 59.8)

    def test_an_aborted_transaction_that_was_not_lost_ends_the_count(self):
        adapter = self.adapter(timeout=60)
        self.lose_transaction(adapter, 0.1)
        self.read(adapter)
        transaction.abort()
        self.assertEqual(self.waits(adapter), 60)

    def let_be_away(self, adapter, seconds):
        """Let the server have been away for so long, as all threads know."""
        adapter().work.link.server.outage.missed(time.monotonic() - seconds)

    def give_up(self, adapter):
        """How many attempts it took."""
        with self.assertRaises(ReconnectTimeout) as timeout:
            self.read(adapter)
        transaction.abort()
        return timeout.exception.attempts

    def test_an_outage_is_known_to_all_threads(self):
        """The one that met it first waits for it; those that come when it has given up do not."""
        adapter = self.adapter(timeout=60)
        self.forward.refuse()
        self.let_be_away(adapter, 58)
        self.assertGreater(self.give_up(adapter), 1)
        for _ in range(3):
            self.assertEqual(self.in_thread(lambda: self.give_up(adapter)), 1)
        self.assertEqual(self.give_up(adapter), 1)

    def test_twelve_requests_on_four_threads(self):
        adapter = self.adapter(timeout=60)
        self.forward.silence()
        self.let_be_away(adapter, 60)
        with ThreadPoolExecutor(4) as executor:
            attempts = list(executor.map(lambda _: self.give_up(adapter), range(12)))
        self.assertEqual(attempts, [1] * 12)

    def test_an_outage_that_nobody_has_met_again_is_forgotten(self):
        adapter = self.adapter(timeout=60)
        self.forward.refuse()
        self.let_be_away(adapter, 60)
        self.assertEqual(self.give_up(adapter), 1)
        self.assertEqual(adapter().work.link.server.outage.away_for(0), 0)
        self.let_be_away(adapter, 58)
        self.assertGreater(self.give_up(adapter), 1)

    def test_requests_wait_again_when_another_thread_has_reached_the_server(self):
        adapter = self.adapter(timeout=60)
        self.forward.refuse()
        self.let_be_away(adapter, 60)
        self.give_up(adapter)
        self.forward.accept()

        def reach():
            with with_time_to_connect:
                self.read(adapter)
            transaction.commit()

        self.in_thread(reach)
        self.assertEqual(adapter().work.link.server.outage.away_for(60), 0)
        self.assertEqual(adapter().work.patience.left().timeout, 60)

    def test_a_session_that_cannot_be_prepared_does_not_end_the_outage(self):
        def end_session(raw):
            raw.cursor().execute("SELECT pg_terminate_backend(pg_backend_pid())")

        adapter = self.adapter(timeout=60, on_connect=end_session)
        self.let_be_away(adapter, 60)
        with with_time_to_connect:
            self.give_up(adapter)
        self.assertGreater(adapter().work.link.server.outage.away_for(60), 60)

    def test_who_connects_slowly_is_let_in_the_next_time(self):
        """Nobody waits for the attempt, but it goes on, and ends the outage."""
        adapter = self.adapter(timeout=60)
        server = adapter().work.link.server
        self.let_be_away(adapter, 60)
        hold_back = threading.Event()
        open_session = server._open_session
        limits = []

        def open_slowly(timeout, pauses):
            limits.append(timeout)
            hold_back.wait(PATIENCE)
            return open_session(timeout, pauses)

        with (
            mock.patch.object(server, "_open_session", open_slowly),
            mock.patch("zreconnect.policy.LONGEST_ATTEMPT", PATIENCE),
        ):
            self.give_up(adapter)
            self.give_up(adapter)
            hold_back.set()
            wait_until(lambda: server.outage.away_for(60) == 0)
        # It has the time that one had before the outage.
        self.assertGreater(limits[0], SINGLE_ATTEMPT)
        self.read(adapter)
        transaction.commit()

    # As if it had been idle for longer.
    @mock.patch.object(beginning, "SURE_OF_SESSION", 0.0)
    def test_a_session_gone_silent_leaves_time_to_connect(self):
        adapter = self.adapter(timeout=10)
        self.read(adapter)
        transaction.commit()
        self.forward.silence()
        before = self.forward.count().connections

        def go_on_when_somebody_connects():
            wait_until(lambda: self.forward.count().connections > before)
            self.forward.drop()
            self.forward.resume()

        opener = threading.Thread(target=go_on_when_somebody_connects)
        opener.start()
        started = time.monotonic()
        self.read(adapter)
        self.assertLess(time.monotonic() - started, 30)
        transaction.commit()
        opener.join()


@with_time_to_connect
class ManagementTests(AdapterTestCase):
    def read(self, adapter, what="current_user"):
        cursor = adapter().cursor()
        cursor.execute(f"SELECT {what}")
        return cursor.fetchone()[0]

    def test_connect_and_disconnect(self):
        adapter = self.adapter()
        self.assertFalse(adapter.isConnected())
        adapter.connect()
        adapter.connect()
        self.assertTrue(adapter.isConnected())
        wait_until(lambda: len(self.sessions()) == 1)
        adapter.disconnect()
        self.assertFalse(adapter.isConnected())
        wait_until(lambda: not self.sessions())
        self.assertEqual(self.read(adapter, "1"), 1)

    def test_disconnect_in_mid_transaction_commits_nothing(self):
        self.make_table()
        adapter = self.adapter()
        adapter().cursor().execute("INSERT INTO item VALUES ('one')")
        adapter.disconnect()
        with self.assertRaises(psycopg2.InterfaceError):
            transaction.commit()
        transaction.abort()
        self.assertEqual(self.names(), [])

    def test_other_threads_disconnect_before_their_next_transaction(self):
        adapter = self.adapter()
        ready, go_on = threading.Event(), threading.Event()

        def use():
            before = self.read(adapter, "pg_backend_pid()")
            ready.set()
            go_on.wait(30)
            same = self.read(adapter, "pg_backend_pid()")
            transaction.commit()
            after = self.read(adapter, "pg_backend_pid()")
            transaction.commit()
            return before == same, same == after

        threading.Thread(target=lambda: (ready.wait(30), adapter.disconnect(), go_on.set())).start()
        self.assertEqual(self.in_thread(use), (True, False))

    def test_a_closed_connection_is_replaced(self):
        adapter = self.adapter()
        adapter().close()
        self.assertEqual(self.read(adapter, "1"), 1)

    def test_set_dsn(self):
        adapter = self.adapter()
        self.read(adapter)
        transaction.commit()
        other = self.layer.dsn(dbname="template1")
        adapter.setDSN(other)
        self.assertEqual((adapter.getDSN(), adapter.dsn), (other, other))
        self.assertEqual(self.read(adapter, "current_database()"), "template1")
        with self.assertRaisesRegex(ValueError, "dsn") as refused:
            adapter.setDSN("dbi://somebody:secret@host/db;option")
        self.assertNotIn("secret", str(refused.exception))
        self.assertEqual(adapter.getDSN(), other)

    def test_set_dsn_between_cursor_and_statement(self):
        adapter = self.adapter()
        cursor = adapter().cursor()
        adapter.setDSN(self.layer.dsn(dbname="template1"))
        cursor.execute("SELECT current_database()")
        self.assertEqual(cursor.fetchone(), [self.dbname])
        transaction.commit()

    def test_dbi(self):
        forward = self.forward
        dsn = f"dbi://postgres:{self.server.password}@{forward.host}:{forward.port}/{self.dbname}"
        adapter = self.adapter(dsn)
        self.assertEqual(self.read(adapter), "postgres")
        for shown in (repr(adapter), str(adapter), adapter.server, repr(adapter())):
            self.assertNotIn(self.server.password, shown)
            self.assertIn(f":{forward.port}/{self.dbname}", shown)

    def test_pickle(self):
        adapter = self.adapter(timeout=7, witness=Ledger("ours"), response_timeout=8)
        adapter.setEncoding("latin1")
        self.assertEqual(self.read(adapter, "1"), 1)
        copy = pickle.loads(pickle.dumps(adapter))
        self.addCleanup(copy.disconnect)
        self.assertFalse(copy.isConnected())
        self.assertTrue(adapter.isConnected())
        for name in ("_policy", "_response_timeout", "dsn"):
            self.assertEqual(getattr(copy, name), getattr(adapter, name))
        self.assertEqual((copy._witness.table, copy.getEncoding()), ("ours", "latin1"))
        self.assertEqual(self.read(copy, "1"), 1)

    def test_encoding(self):
        adapter = self.adapter()
        self.assertIsNone(adapter.getEncoding())
        self.assertEqual(self.read(adapter, "current_setting('client_encoding')"), "UTF8")
        transaction.commit()
        adapter.setEncoding("latin1")
        self.assertEqual(self.read(adapter, "current_setting('client_encoding')"), "LATIN1")

    def test_type_information(self):
        adapter = self.adapter()
        self.assertIs(adapter().getTypeInfo(), adapter)
        self.assertEqual((adapter.paramstyle, adapter.threadsafety), ("pyformat", 1))
        self.assertEqual(adapter.getConverter("varchar")(5), 5)

    def test_the_witness_asks_at_commit(self):
        self.assertEqual(self.adapter()._witness, XidWitness(at_commit=True))
        self.assertEqual(self.adapter(witness=XidWitness())._witness, XidWitness())
        self.assertEqual(self.adapter()().work.link.options.response_timeout, 30)

    def test_bad_arguments(self):
        for name, value in [
            ("timeout", -1),
            ("timeout", "5"),
            ("driver", "oracle"),
            ("witness", "yes"),
            ("on_connect", 5),
            ("response_timeout", "5"),
        ]:
            with self.assertRaisesRegex((TypeError, ValueError), name):
                ReconnectingDatabaseAdapter(self.dsn, **{name: value})
