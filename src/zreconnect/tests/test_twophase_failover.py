"""Two-phase commit while the server of some branches fails over, to a standby that has what was
prepared there, or has not."""

import contextlib
import logging
from unittest import mock

import psycopg
import psycopg2
import transaction
import zope.event

import zreconnect
from zreconnect import CommitOutcomeUnknown, Ledger, recover
from zreconnect.branch import CLUSTER, Branch
from zreconnect.events import ConnectionAttemptFailed, HistoryChanged
from zreconnect.testing import EmbeddedStandby, PortForward
from zreconnect.tests.base import wait_until
from zreconnect.tests.test_twophase import PREPARED, SETTINGS, Hook, TwoPhaseTestCase
from zreconnect.twophase import TwoPhaseDataManager

# So many transaction ids are used up where others are to get none of ours, or all.
MANY = 40


class TwoPhaseFailoverTests(TwoPhaseTestCase):
    """The database "first" is on the server that fails over, and "second" stays where it is."""

    def setUp(self):
        super().setUp()
        self.forward, self.replication = self.start_forward(), self.start_forward()
        self.standby = EmbeddedStandby(self.server)
        self.standby.settings.update(
            SETTINGS, primary_conninfo=self.server.dsn(port=self.replication.port)
        )
        self.addCleanup(self.standby.stop)
        self.standby.start()
        self.keys = {}
        patch = mock.patch.object(
            TwoPhaseDataManager, "sortKey", lambda member: self.keys[member._connection]
        )
        patch.start()
        self.addCleanup(patch.stop)

    def start_forward(self):
        forward = PortForward(self.server.host, self.server.port)
        forward.start()
        self.addCleanup(forward.stop)
        return forward

    def connect_first(self, driver="psycopg2", witness="xid", key="1", **keywords):
        """A connection to "first" that has a session. key: its place in the order of votes."""
        connection = zreconnect.connect(
            f"host=127.0.0.1,127.0.0.1 port={self.forward.port},{self.standby.port}"
            f" user=postgres password={self.server.password} dbname=first",
            driver,
            witness=witness,
            **keywords,
        )
        self.addCleanup(connection.close)
        self.keys[connection] = key
        connection.begin()
        connection.rollback()
        return connection

    def connect_second(self, key):
        connection = zreconnect.connect(self.server.dsn(dbname="second"), two_phase=True)
        self.addCleanup(connection.close)
        self.keys[connection] = key
        return connection

    def branches(self):
        """One in "second", which decides, and those in "first", by their names."""
        firsts = {
            f"{driver}, {witness}": self.connect_first(driver, witness, two_phase=True)
            for driver in ("psycopg2", "psycopg")
            for witness in ("xid", Ledger())
        }
        return self.connect_second("0"), firsts

    def write(self, *connections):
        for connection in connections:
            connection.begin()
            name = str(id(connection))
            connection.execute("INSERT INTO item VALUES (%s)", (name,)).close()

    def catch_up(self):
        """Wait until the standby has all that is written by now."""
        ((end,),) = self.server.query("SELECT pg_current_wal_insert_lsn()::text")
        self.server.query("SELECT pg_logical_emit_message(true, '', '')")
        has_all = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
        wait_until(lambda: self.standby.query(has_all, end) == [(True,)])

    def cut_off(self):
        """The standby has all that is written by now, and gets nothing any more."""
        self.catch_up()
        self.replication.refuse()
        self.replication.drop()

    def fail_over(self):
        self.forward.refuse()
        self.forward.drop()
        self.standby.promote()

    def lose_answer(self, then=lambda: None):
        """What is sent next arrives, and its answer does not; the server is gone."""

        def lose():
            then()
            self.forward.refuse()

        self.forward.cut("to_client", 0, then=lose)

    @contextlib.contextmanager
    def promoted_when_met(self):
        """The standby is promoted when a connection has met it, which has to be so in the block."""
        met = []

        def promote(event):
            is_refusal = isinstance(event, ConnectionAttemptFailed) and "takes no writes" in str(
                event
            )
            if is_refusal and not met:
                met.append(event)
                self.standby.promote()

        zope.event.subscribers.append(promote)
        try:
            yield
        finally:
            zope.event.subscribers.remove(promote)
        self.assertEqual(len(met), 1)

    def use_up_ids(self, server):
        for _ in range(MANY):
            server.query("SELECT pg_current_xact_id()")

    def rows(self, server, dbname):
        return len(server.query("SELECT name FROM item", dbname=dbname))

    def check(self, first, second):
        """The databases have so many rows, and nothing is prepared."""
        self.assertEqual(self.rows(self.standby, "first"), first)
        self.assertEqual(self.rows(self.server, "second"), second)
        of_first = f"{PREPARED} WHERE database = 'first'"
        self.assertEqual(self.standby.query(of_first), [])
        self.assertEqual(self.server.query(f"{PREPARED} WHERE database = 'second'"), [])

    # Branches that do not decide

    def test_what_is_kept_is_committed_on_the_survivor(self):
        second, firsts = self.branches()
        self.write(second, *firsts.values())
        Hook("", tpc_finish=lambda: (self.catch_up(), self.fail_over()))
        with self.assertNoLogs("zreconnect", logging.ERROR):
            transaction.commit()
        self.check(first=4, second=1)

    def test_what_is_lost_is_told(self):
        second, firsts = self.branches()
        self.cut_off()
        self.use_up_ids(self.server)
        self.write(second, *firsts.values())
        Hook("", tpc_finish=self.fail_over)
        seen = []
        zope.event.subscribers.append(seen.append)
        self.addCleanup(zope.event.subscribers.remove, seen.append)
        transaction.commit()
        told = [event.is_missing for event in seen if isinstance(event, HistoryChanged)]
        self.assertEqual(told, [True] * len(firsts))
        self.check(first=0, second=1)

    def test_what_is_left_prepared_does_not_hide_it(self):
        second, firsts = self.branches()
        self.write(second, *firsts.values())
        self.catch_up()
        with self.assertLogs("zreconnect", logging.ERROR) as logs:
            for first in firsts.values():
                first.work.patience.policy = zreconnect.RetryPolicy(timeout=0)
            self.standby.shut_down()
            Hook("", tpc_finish=lambda: (self.forward.refuse(), self.forward.drop()))
            transaction.commit()
        self.assertEqual(sum("may still be prepared" in line for line in logs.output), len(firsts))
        for first in firsts.values():
            first.work.patience.policy = zreconnect.PERSIST
        self.standby.start()
        self.standby.promote()
        for name, first in firsts.items():
            seen = []
            zope.event.subscribers.append(seen.append)
            first.begin()
            first.rollback()
            zope.event.subscribers.remove(seen.append)
            with self.subTest(name):
                told = [event.is_missing for event in seen if isinstance(event, HistoryChanged)]
                self.assertEqual(told, [None])

    # A branch that decides

    def decide(self, driver, witness):
        """Write to both, where the branch in "first" decides."""
        first = self.connect_first(driver, witness, key="0", two_phase=True)
        self.write(first, self.connect_second("1"))

    def test_a_decision_that_did_not_arrive_is_made_on_the_survivor(self):
        self.decide("psycopg2", "xid")
        Hook("", tpc_finish=lambda: (self.catch_up(), self.fail_over()))
        transaction.commit()
        self.check(first=1, second=1)

    def test_a_decision_that_has_come_over_is_known_to_the_ledger(self):
        self.decide("psycopg", Ledger())
        Hook("", tpc_finish=lambda: self.lose_answer(self.catch_up))
        with self.promoted_when_met():
            transaction.commit()
        self.check(first=1, second=1)

    def test_with_the_id_it_is_unknown(self):
        self.decide("psycopg", "xid")
        Hook("", tpc_finish=lambda: self.lose_answer(self.catch_up))
        with self.promoted_when_met(), self.assertRaises(CommitOutcomeUnknown):
            transaction.commit()
        transaction.abort()
        self.assertEqual(self.rows(self.standby, "first"), 1)

    def test_what_the_survivor_has_never_had_is_not_committed(self):
        self.decide("psycopg2", "xid")
        self.assert_lost(self.cut_off)

    def test_the_ledger_knows_it_whoever_has_got_its_id(self):
        self.decide("psycopg", Ledger())
        self.assert_lost(self.cut_off, lambda: self.use_up_ids(self.standby))

    def assert_lost(self, before_votes, after_failover=lambda: None):
        Hook("", tpc_begin=before_votes, tpc_finish=lambda: (self.fail_over(), after_failover()))
        errors = psycopg2.OperationalError, psycopg.OperationalError
        with self.assertRaisesRegex(errors, "a failover has lost it"):
            transaction.commit()
        transaction.abort()
        self.check(first=0, second=0)

    # Votes, and names of the program's own

    def test_a_lost_vote_is_looked_up_where_it_can_be_found(self):
        self.write(self.connect_second("0"), self.connect_first(two_phase=True))
        Hook("0!", tpc_vote=lambda: self.lose_answer(self.catch_up))
        with self.promoted_when_met():
            transaction.commit()
        self.check(first=1, second=1)

    def test_a_name_is_looked_up_where_it_can_be_found(self):
        first = self.connect_first()
        with contextlib.closing(psycopg2.connect(self.server.dsn(dbname="first"))) as plain:
            plain.tpc_begin("name")
            plain.cursor().execute("INSERT INTO item VALUES ('one')")
            plain.tpc_prepare()
            plain.reset()
        self.lose_answer(self.catch_up)
        with self.promoted_when_met(), self.assertRaises(CommitOutcomeUnknown) as unknown:
            first.tpc_commit("name")
        self.assertIn("It was still prepared afterwards", unknown.exception.evidence)
        first.tpc_commit("name")
        self.check(first=1, second=0)

    # What a process has left

    def prepare(self, gid, name, dbname):
        with contextlib.closing(psycopg2.connect(self.server.dsn(dbname=dbname))) as plain:
            plain.autocommit = True
            plain.cursor().execute(f"BEGIN; INSERT INTO item VALUES ('{name}')")
            plain.cursor().execute("PREPARE TRANSACTION %s", (gid,))

    def test_recover_tells_what_was_kept_and_what_was_lost(self):
        ((system_identifier, timeline),) = self.server.query(CLUSTER)
        kept = Branch("0" * 32, 0, system_identifier, timeline, 2**40 + 1000, "first")
        lost = Branch("1" * 32, 1, system_identifier, timeline, 2**40 + 1001, "first")
        for branch, name in ((kept, "kept"), (lost, "lost")):
            self.prepare(branch.gid, name, "first")
        other = Branch("0" * 32, 1, system_identifier, timeline, 2**40 + 1000, "first")
        self.prepare(other.gid, "other", "second")
        self.catch_up()
        with self.assertRaisesRegex(psycopg2.OperationalError, "/first is a standby"):
            recover(self.standby.dsn(dbname="first"))
        self.fail_over()
        ((_, now),) = self.standby.query(CLUSTER)
        dsns = [self.standby.dsn(dbname=dbname) for dbname in ("first", "second")]
        for settle in (False, True):
            found = {each.gid: each for each in recover(*dsns, older_than=0, settle=settle)}
            self.assertEqual(found[kept.gid].decision, "undecidable")
            self.assertIn(f"in timeline {now} since", found[kept.gid].reason)
            self.assertEqual(found[other.gid].decision, "undecidable")
            self.assertIn("end that first", found[other.gid].reason)
            self.assertEqual(found[lost.gid].decision, "rollback")
            self.assertIn("or a failover has lost it", found[lost.gid].reason)
            self.assertIs(found[lost.gid].settled, settle)
