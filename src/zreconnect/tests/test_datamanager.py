"""A connection's commit as part of the commit of a `transaction`."""

import contextlib

import psycopg2
import transaction
from transaction.interfaces import TransactionFailedError

from zreconnect import CommitOutcomeUnknown, ConnectionDescriptor, DisconnectionError
from zreconnect.tests.base import DatabaseTestCase


class OtherDataManager:
    """Keeps a log of what `transaction` asks it."""

    transaction_manager = transaction.manager

    def __init__(self, key="other", fail_in=None):
        self.key = key
        self.fail_in = fail_in
        self.calls = []

    def sortKey(self):
        return self.key

    def __getattr__(self, name):
        if name not in ("abort", "tpc_begin", "commit", "tpc_vote", "tpc_finish", "tpc_abort"):
            raise AttributeError(name)

        def call(transaction):
            self.calls.append(name)
            if name == self.fail_in:
                raise LookupError(name)

        return call


class DataManagerTests(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()
        self.descriptor = ConnectionDescriptor(self.dsn)
        self.addCleanup(self.descriptor.close)
        self.addCleanup(transaction.abort)
        self.connection = self.descriptor.connection()
        self.cursor = self.connection.cursor()

    def insert(self, name):
        self.cursor.execute("INSERT INTO item VALUES (%s)", (name,))

    def lose(self):
        self.forward.drop()
        with contextlib.suppress(DisconnectionError):
            self.cursor.execute("SELECT 1")
        self.assertEqual(self.connection.state, "doomed")

    def test_it_joins_when_a_transaction_begins(self):
        self.assertEqual(transaction.get()._resources, [])
        self.insert("one")
        self.insert("two")
        self.assertEqual(len(transaction.get()._resources), 1)
        transaction.commit()
        self.assertEqual(self.names(), ["one", "two"])
        self.assertEqual(transaction.get()._resources, [])
        self.connection.begin()
        self.assertEqual(len(transaction.get()._resources), 1)

    def test_abort(self):
        self.insert("one")
        transaction.abort()
        self.assertEqual((self.connection.state, self.names()), ("idle", []))

    def test_a_closed_connection_can_be_aborted_but_not_committed(self):
        self.insert("one")
        self.connection.close()
        with self.assertRaises(psycopg2.InterfaceError):
            transaction.commit()
        transaction.abort()
        self.assertEqual(self.names(), [])

    def test_it_commits_when_all_others_have_agreed(self):
        others = [OtherDataManager("a"), OtherDataManager("z", fail_in="tpc_vote")]
        for other in others:
            transaction.get().join(other)
        self.insert("one")
        with self.assertRaisesRegex(LookupError, "tpc_vote"):
            transaction.commit()
        self.assertEqual(self.connection.state, "idle")
        self.assertEqual(self.names(), [])
        transaction.abort()
        self.insert("two")
        transaction.commit()
        self.assertEqual(self.names(), ["two"])

    def test_others_are_told_when_it_fails(self):
        other = OtherDataManager()
        transaction.get().join(other)
        self.insert("one")
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        self.assertNotIn("tpc_finish", other.calls)
        self.assertIn("tpc_abort", other.calls)
        self.assertEqual(self.connection.state, "idle")

    def test_a_round_trip_is_not_added(self):
        self.insert("zero")
        transaction.commit()

        def one_statement():
            self.insert("one")
            transaction.commit()

        self.assertEqual(self.round_trips(one_statement), 3)

    def test_a_doomed_connection_cannot_be_committed(self):
        other = OtherDataManager()
        transaction.get().join(other)
        self.insert("one")
        self.lose()
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        self.assertNotIn("tpc_vote", other.calls)
        transaction.abort()
        self.insert("two")
        transaction.commit()
        self.assertEqual(self.names(), ["two"])

    def test_nor_when_a_statement_of_it_could_not_begin(self):
        """Although the program has rolled back, and gone on with the next statement."""
        errors = [LookupError("no session")]

        def on_connect(raw):
            if errors:
                raise errors.pop()

        descriptor = ConnectionDescriptor(self.dsn, on_connect=on_connect)
        self.addCleanup(descriptor.close)
        connection = descriptor.connection()
        with self.assertRaises(LookupError):
            connection.cursor().execute("INSERT INTO item VALUES ('one')")
        connection.rollback()
        connection.cursor().execute("INSERT INTO item VALUES ('two')")
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        transaction.abort()
        self.assertEqual(self.names(), [])

    def test_nor_after_its_own_rollback(self):
        self.insert("one")
        self.lose()
        self.connection.rollback()
        self.insert("two")
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        transaction.abort()
        self.assertEqual((self.connection.state, self.names()), ("idle", []))

    def test_after_its_own_rollback_it_begins_in_the_same_transaction(self):
        self.insert("one")
        self.connection.rollback()
        self.insert("two")
        self.assertEqual(len(transaction.get()._resources), 1)
        transaction.commit()
        self.assertEqual(self.names(), ["two"])

    def test_it_cannot_be_committed_past_the_transaction(self):
        self.insert("one")
        with self.assertRaisesRegex(psycopg2.ProgrammingError, "transaction.commit()"):
            self.connection.commit()
        self.assertEqual(self.connection.state, "active")

    def test_commit_after_a_failed_statement(self):
        self.insert("one")
        with contextlib.suppress(psycopg2.IntegrityError):
            self.insert("one")
        with self.assertRaisesRegex(psycopg2.InternalError, "Nothing was committed"):
            transaction.commit()
        transaction.abort()
        self.assertEqual(self.names(), [])

    def test_a_failed_transaction_takes_no_more_statements(self):
        self.insert("one")
        self.lose()
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        with self.assertRaises(TransactionFailedError):
            self.insert("two")
        transaction.abort()

    def test_savepoints(self):
        self.insert("one")
        savepoint = transaction.savepoint()
        self.insert("two")
        savepoint.rollback()
        self.insert("three")
        transaction.savepoint()
        transaction.commit()
        self.assertEqual(self.names(), ["one", "three"])

    def test_a_savepoint_that_meets_a_disconnect(self):
        self.insert("one")
        savepoint = transaction.savepoint()
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            savepoint.rollback()
        transaction.abort()
        self.assertEqual(self.connection.state, "idle")

    def test_run_and_attempts_run_again_after_a_disconnect(self):
        calls = []

        def work():
            calls.append(1)
            self.insert("one")
            if len(calls) == 1:
                self.forward.drop()
                self.cursor.execute("SELECT 1")

        transaction.manager.run(work)
        self.assertEqual((len(calls), self.names()), (2, ["one"]))
        calls.clear()
        self.query("DELETE FROM item")
        for attempt in transaction.manager.attempts():
            with attempt:
                work()
        self.assertEqual((len(calls), self.names()), (2, ["one"]))

    def test_run_runs_again_after_a_serialization_failure(self):
        calls = []

        def work():
            calls.append(1)
            self.insert("one")
            if len(calls) == 1:
                self.cursor.execute("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$")

        transaction.manager.run(work)
        self.assertEqual((len(calls), self.names()), (2, ["one"]))

    def test_run_does_not_run_again_after_other_errors(self):
        calls = []

        def work():
            calls.append(1)
            self.insert("one")
            self.insert("one")

        with self.assertRaises(psycopg2.IntegrityError):
            transaction.manager.run(work)
        self.assertEqual(len(calls), 1)

    def test_run_runs_again_after_a_commit_that_did_not_arrive(self):
        calls = []

        def work():
            calls.append(1)
            self.insert("one")
            if len(calls) == 1:
                self.forward.drop()

        transaction.manager.run(work)
        self.assertEqual((len(calls), self.names()), (2, ["one"]))

    def test_run_does_not_run_again_after_an_unknown_outcome(self):
        descriptor = ConnectionDescriptor(self.dsn, witness=None)
        self.addCleanup(descriptor.close)
        calls = []

        def work():
            calls.append(1)
            descriptor.connection().cursor().execute("INSERT INTO item VALUES ('one')")
            self.forward.drop()

        with self.assertRaises(CommitOutcomeUnknown):
            transaction.manager.run(work)
        self.assertEqual(len(calls), 1)
