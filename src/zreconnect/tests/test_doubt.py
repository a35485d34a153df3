"""A transaction that may be committed: it is found out once, and whoever it concerns is told."""

import contextlib
import gc
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor

import transaction
from transaction.interfaces import TransientError

from zreconnect import (
    CommitOutcomeUnknown,
    ConnectionDescriptor,
    DisconnectionError,
    Ledger,
    RetryPolicy,
)
from zreconnect.datamanager import join_transactions
from zreconnect.events import (
    CommitLookedUp,
    ConnectionAttemptFailed,
    ConnectionLost,
    Reconnected,
)
from zreconnect.states import State
from zreconnect.tests.base import (
    DatabaseTestCase,
    interrupted_at,
    is_evident,
    leave_in_doubt,
    subscriber,
    wait_until,
)
from zreconnect.tests.test_siblings import LAYER
from zreconnect.witness import Outcome

BRIEF = RetryPolicy(timeout=0.2)
CHAINS = "COMMIT AND CHAIN"


class DoubtTestCase(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()

    def insert(self, connection, name):
        connection.cursor().execute("INSERT INTO item VALUES (%s)", (name,))

    def lose_after_chain(self, connection):
        """A statement of the transaction's second part is lost."""
        self.insert(connection, "first part")
        connection.cursor().execute(CHAINS)
        self.forward.drop()
        with self.assertRaises(CommitOutcomeUnknown) as raised:
            self.insert(connection, "second part")
        return raised.exception


class PartTests(DoubtTestCase):
    """A part of it is committed, and the program has swallowed that the rest is lost."""

    def test_the_whole_is_not_run_again(self):
        for self.driver in ("psycopg2", "psycopg"):
            for rolls_back in (False, True):
                with self.subTest(self.driver, rolls_back=rolls_back):
                    self.assertEqual(self.runs(rolls_back), 1)
                    self.assertEqual(self.names(), ["first part"])
                    self.query("DELETE FROM item")

    def runs(self, rolls_back):
        """How often the whole is run that swallows the loss, and then perhaps rolls back."""
        runs = []

        def work():
            runs.append(1)
            self.lose_after_chain(connection)
            if rolls_back:
                connection.rollback()

        with contextlib.closing(ConnectionDescriptor(self.dsn, driver=self.driver)) as descriptor:
            connection = descriptor.connection()
            with self.assertRaises(CommitOutcomeUnknown):
                transaction.manager.run(work)
            transaction.abort()
        return len(runs)

    def test_what_is_lost_without_a_doubt_is_called_lost(self):
        descriptor = ConnectionDescriptor(self.dsn)
        self.addCleanup(descriptor.close)
        connection = descriptor.connection()
        self.lose_after_chain(connection)
        transaction.abort()
        self.insert(connection, "lost")
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            self.insert(connection, "never")
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        transaction.abort()

    def test_the_id_is_that_of_the_first_part(self):
        connection = self.connect(witness="xid", policy=BRIEF)
        connection.begin()
        self.insert(connection, "first part")
        connection.cursor().execute(CHAINS)
        self.insert(connection, "second part")
        evidence = leave_in_doubt(self, connection, is_committed=False).evidence
        self.assertRegex(evidence, r"the id of what came before that was \d+\. Ask with SELECT")

    def test_what_comes_after_is_not_entered(self):
        connection = self.connect(witness=Ledger(), policy=BRIEF)
        connection.cursor().execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        self.insert(connection, "first part")
        connection.cursor().execute(CHAINS)
        self.insert(connection, "second part")
        evidence = leave_in_doubt(self, connection, is_committed=False).evidence
        self.assertIn("a statement has ended it before commit() could write it", evidence)

    def test_who_is_refused_is_told(self):
        connection = self.connect(policy=BRIEF)
        for is_told in (True, False):
            with self.subTest(is_told):
                self.insert(connection, "in doubt")
                self.forward.cut_at_commit(then=self.forward.refuse)
                with self.assertRaises(CommitOutcomeUnknown):
                    connection.commit()
                self.assertIs(connection.work.state, State.UNKNOWN)
                # As after an interrupt in the place of that error.
                connection.work.own.leave_untold(Outcome.UNKNOWN, "Look there.")
                if is_told:
                    with self.assertRaises(CommitOutcomeUnknown):
                        connection.cursor()
                    connection.rollback()
                else:
                    with self.assertRaisesRegex(CommitOutcomeUnknown, "Look there"):
                        connection.rollback()
                connection.rollback()
                self.forward.accept()
                self.query("DELETE FROM item")


class SubscriberTests(DoubtTestCase):
    """Who is told of the loss uses the connection."""

    def test_other_work_is_not_taken_for_it(self):
        for witness in (Ledger(), "xid"):
            for event_class in (ConnectionLost, CommitLookedUp):
                with self.subTest(witness, event=event_class):
                    connection = self.connect(witness=witness)
                    connection.begin()
                    self.insert(connection, "work")
                    self.forward.cut("to_server", 0)

                    def audit(connection=connection):
                        connection.rollback()
                        connection.run(self.insert, connection, "audit")

                    with (
                        subscriber(event_class, audit),
                        self.assertRaises(DisconnectionError),
                    ):
                        connection.commit()
                    self.assertEqual(self.names(), ["audit"])
                    connection.rollback()
                    self.query("DELETE FROM item")

    def test_the_evidence_is_not_that_of_other_work(self):
        connection = self.connect(witness=Ledger())
        self.insert(connection, "first part")
        connection.cursor().execute(CHAINS)
        self.forward.drop()

        def audit():
            with contextlib.suppress(CommitOutcomeUnknown):
                connection.rollback()
            connection.run(self.insert, connection, "audit")

        with (
            subscriber(ConnectionLost, audit),
            self.assertRaises(CommitOutcomeUnknown) as raised,
        ):
            self.insert(connection, "second part")
        connection.rollback()
        self.assertTrue(is_evident(raised.exception, self.query))
        self.query("DELETE FROM item WHERE name = 'first part'")
        self.assertEqual(self.names(), ["audit"])

    def test_one_that_rolls_back_when_it_is_found(self):
        told = []

        def roll_back():
            try:
                connection.rollback()
            except CommitOutcomeUnknown as unknown:
                told.append(unknown.outcome)

        connection = self.connect(witness=Ledger())
        connection.begin()
        self.insert(connection, "work")
        self.forward.cut_at_commit()
        with subscriber(Reconnected, roll_back):
            connection.commit()
        self.assertEqual((told, self.names()), (["committed"], ["work"]))
        connection.rollback()

    def test_a_transaction_that_they_leave_open_keeps_its_session(self):
        connection = self.connect(witness=Ledger())
        connection.begin()
        self.insert(connection, "work")
        self.forward.cut_at_commit(then=self.forward.refuse)

        def go_on():
            self.forward.accept()
            with contextlib.suppress(CommitOutcomeUnknown):
                connection.rollback()
            connection.begin()
            self.insert(connection, "other")

        with subscriber(ConnectionAttemptFailed, go_on):
            connection.commit()
        connection.commit()
        self.assertEqual(self.names(), ["other", "work"])

    def test_a_child_knows_nothing_of_it(self):
        connection = self.connect(witness=Ledger())
        connection.begin()
        self.insert(connection, "work")
        self.forward.cut_at_commit()

        def in_child():
            connection.work.in_child()

        with (
            subscriber(ConnectionLost, in_child),
            self.assertRaises(CommitOutcomeUnknown),
        ):
            connection.commit()
        connection.rollback()

    def test_what_was_found_before_is_not_believed(self):
        for self.driver in ("psycopg2", "psycopg"):
            with self.subTest(self.driver):
                connection = self.connect(witness=Ledger())
                connection.begin()
                self.insert(connection, "one")
                self.forward.cut_at_commit()
                connection.commit()
                self.insert(connection, "two")
                with contextlib.suppress(DisconnectionError), connection.transaction():
                    connection.work.link.session.raw.close()
                    with self.assertRaises(DisconnectionError):
                        connection.commit()
                connection.rollback()
                self.assertEqual(self.names(), ["one"])
                self.query("DELETE FROM item")

    def test_what_was_told_is_not_kept(self):
        class Local:
            pass

        def commit():
            local = Local()
            with contextlib.suppress(CommitOutcomeUnknown):
                connection.commit()
            return weakref.ref(local)

        connection = self.connect(witness=None)
        self.insert(connection, "work")
        self.forward.cut_at_commit()
        reference = commit()
        connection.rollback()
        gc.collect()
        self.assertIsNone(reference())


class InterruptTests(DoubtTestCase):
    def test_what_was_found_is_not_asked_again(self):
        """The next session has taken the place of the transaction's."""
        for self.driver in ("psycopg2", "psycopg"):
            with self.subTest(self.driver):
                connection = self.connect(witness=Ledger())
                connection.begin()
                self.insert(connection, "work")
                process = connection.work.link.session.raw.info.backend_pid
                self.forward.cut_at_commit()
                with (
                    interrupted_at(Reconnected),
                    self.assertRaises(KeyboardInterrupt),
                ):
                    connection.commit()
                self.query("DELETE FROM zreconnect_ledger")
                with self.events() as seen, self.assertRaises(CommitOutcomeUnknown) as raised:
                    connection.rollback()
                self.assertEqual(raised.exception.outcome, "committed")
                (looked_up,) = [each for each in seen if isinstance(each, CommitLookedUp)]
                self.assertIn(f"in the server process {process} ", looked_up.evidence)
                connection.rollback()
                self.query("DELETE FROM item")

    def test_what_a_subscriber_was_told_the_program_was_not(self):
        """One that rolls back is told; the next one is interrupted."""
        for self.driver in ("psycopg2", "psycopg"):
            for event_class in (ConnectionLost, Reconnected):
                with self.subTest(self.driver, event=event_class):
                    connection = self.connect(witness=Ledger())
                    connection.run(lambda: None)
                    connection.begin()
                    self.insert(connection, "work")

                    def roll_back(connection=connection):
                        with self.assertRaises(CommitOutcomeUnknown):
                            connection.rollback()

                    self.forward.cut_at_commit()
                    with (
                        subscriber(event_class, roll_back),
                        interrupted_at(event_class),
                        self.assertRaises(KeyboardInterrupt),
                    ):
                        connection.commit()
                    with self.assertRaises(CommitOutcomeUnknown) as raised:
                        connection.rollback()
                    self.assertEqual(raised.exception.outcome, "committed")
                    connection.rollback()
                    self.assertEqual(self.names(), ["work"])
                    self.query("DELETE FROM item")

    def test_what_a_subscriber_has_committed_itself(self):
        """It is told of that once, as a program is."""
        connection, other = self.connect(witness=Ledger()), self.connect(witness=None)
        told = []

        def use_another():
            other.begin()
            self.insert(other, "of the subscriber")
            self.forward.cut_at_commit()
            for end in (other.commit, other.rollback, other.rollback):
                try:
                    end()
                except CommitOutcomeUnknown:
                    told.append(end)

        connection.begin()
        self.forward.drop()
        with subscriber(ConnectionLost, use_another), self.assertRaises(DisconnectionError):
            self.insert(connection, "work")
        self.assertEqual(told, [other.commit])
        other.rollback()
        connection.rollback()
        self.assertEqual(self.names(), ["of the subscriber"])

    def test_what_a_transaction_manager_was_told_the_program_was_not(self):
        """`transaction` aborts after an interrupt, and logs what that raises."""
        for self.driver in ("psycopg2", "psycopg"):
            with self.subTest(self.driver):
                connection = self.connect(witness=Ledger())
                join_transactions(connection, transaction.manager)
                self.insert(connection, "work")
                self.forward.cut_at_commit()
                with (
                    interrupted_at(CommitLookedUp),
                    self.assertRaises(KeyboardInterrupt),
                ):
                    transaction.commit()
                with self.assertRaises(CommitOutcomeUnknown) as raised:
                    connection.rollback()
                self.assertEqual(raised.exception.outcome, "committed")
                connection.rollback()
                with self.assertRaises(CommitOutcomeUnknown):
                    transaction.abort()
                self.assertEqual(self.names(), ["work"])
                self.query("DELETE FROM item")


class LateDataManager:
    """One that sorts last, and breaks its promise that it can finish."""

    transaction_manager = transaction.manager

    def sortKey(self):
        return "~~"

    def nothing(self, transaction):
        pass

    abort = tpc_begin = commit = tpc_vote = tpc_abort = nothing

    def tpc_finish(self, transaction):
        raise TransientError


class FinishTests(DoubtTestCase):
    layer = LAYER

    def test_a_hook_of_a_transaction_has_one_of_its_own(self):
        """`transaction` aborts what is committed after its hooks, and when they begin another."""
        for keywords in ({"witness": Ledger()}, {"witness": None}, {"two_phase": True}):
            with self.subTest(**keywords):
                connection = self.connect(**keywords)
                join_transactions(connection, transaction.manager)

                def hook(success, connection=connection):
                    transaction.begin()
                    self.insert(connection, "by the hook")
                    transaction.commit()

                self.insert(connection, "work")
                transaction.get().addAfterCommitHook(hook)
                with self.assertNoLogs("txn", logging.WARNING):
                    transaction.commit()
                self.assertEqual(self.names(), ["by the hook", "work"])
                self.query("DELETE FROM item")

    def test_what_is_committed_is_not_run_again(self):
        for keywords in ({"witness": Ledger()}, {"witness": None}, {"two_phase": True}):
            with self.subTest(**keywords):
                connection = self.connect(**keywords)
                join_transactions(connection, transaction.manager)
                runs = []

                def work(connection=connection, runs=runs):
                    runs.append(1)
                    self.insert(connection, "work")
                    transaction.get().join(LateDataManager())

                with self.assertRaises(CommitOutcomeUnknown) as raised:
                    transaction.manager.run(work)
                self.assertEqual(raised.exception.outcome, "committed")
                self.assertEqual((len(runs), self.names()), (1, ["work"]))
                self.query("DELETE FROM item")


class ThreadTests(DoubtTestCase):
    def test_close_ends_the_search(self):
        connection = self.connect(witness=Ledger())
        connection.run(lambda: None)

        def work():
            connection.begin()
            self.insert(connection, "work")
            self.forward.cut_at_commit(then=self.forward.refuse)
            connection.commit()

        with ThreadPoolExecutor(1) as threads, self.events() as seen:
            working = threads.submit(work)
            wait_until(lambda: any(isinstance(each, ConnectionLost) for each in seen))
            connection.close()
            with self.assertRaises(CommitOutcomeUnknown):
                working.result(30)
        self.forward.accept()

    def test_what_an_ended_thread_was_told_is_not_called_rolled_back(self):
        connection = self.connect(witness=Ledger(), policy=BRIEF)

        def work():
            connection.begin()
            self.insert(connection, "work")
            self.forward.cut_at_commit(then=self.forward.refuse)
            with self.assertRaises(CommitOutcomeUnknown):
                connection.commit()

        with ThreadPoolExecutor(1) as threads:
            threads.submit(work).result()
        self.forward.accept()
        with self.assertNoLogs("zreconnect", logging.WARNING):
            connection.rollback()
        connection.run(lambda: None)
        self.assertEqual(self.names(), ["work"])
