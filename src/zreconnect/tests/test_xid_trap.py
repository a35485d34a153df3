"""A transaction id that a crash gave to somebody else: what `pg_xact_status` says of it is a trap.

The victim's WAL is not flushed when its server process is killed, so the server, once it has
recovered, hands out the victim's id again. The thief that gets it commits.
"""

import time

from zope.interface import implementer

from zreconnect import CommitOutcomeUnknown, Ledger, RetryPolicy
from zreconnect.interfaces import IWitness
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests.base import PATIENCE, DatabaseTestCase
from zreconnect.witness import Outcome, XidObserver

# The writer process would flush the victim's WAL; ten seconds is the longest that it can wait.
SLOW_WRITER = PostgresLayer("SlowWriterLayer", settings={"wal_writer_delay": "10s"})


@implementer(IWitness)
class NaiveWitness:
    """Asks `pg_xact_status`, and believes the answer."""

    def observer(self, driver):
        return NaiveObserver(driver)


class NaiveObserver(XidObserver):
    def outcome(self, raw):
        ((status,),) = self._driver.query(raw, "SELECT pg_xact_status(%s::text::xid8)", (self.xid,))
        return Outcome(status)


class XidTrapTests(DatabaseTestCase):
    layer = PortForwardLayer(SLOW_WRITER, "SlowWriterForwardLayer")

    def setUp(self):
        super().setUp()
        self.make_table()

    def rob(self, connection):
        """As a unit of work: its COMMIT never arrives, and its id goes to a committed thief."""
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO item VALUES ('victim')")
            cursor.execute("SELECT pg_current_xact_id()::text::bigint")
            ((self.xid,),) = cursor.fetchall()
        victim = connection.driver_connection.info.backend_pid
        self.cut = self.forward.cut("to_server", 0, then=lambda: self.crash_and_steal(victim))

    def crash_and_steal(self, victim):
        self.server.kill_backend(victim)
        self.server.wait_until_ready()
        self.stolen = self.burn_id()
        while self.stolen < self.xid:
            self.stolen = self.burn_id()

    def burn_id(self):
        """The id of a transaction that is committed."""
        ((xid,),) = self.query("SELECT pg_current_xact_id()::text::bigint")
        return xid

    def insert(self, connection):
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO item VALUES ('victim')")

    def fall_into_trap(self, witness):
        """Run a unit of work, which is robbed once, with two attempts. What it raised, or None."""
        connection = self.connect(witness=witness, policy=RetryPolicy(timeout=PATIENCE))
        deadline = time.monotonic() + PATIENCE
        while True:
            self.query("TRUNCATE item")
            raised = self.run_robbed(connection)
            self.assertTrue(self.cut.wait(PATIENCE))
            # Otherwise something else had the victim's WAL flushed, or took the id.
            if self.stolen == self.xid:
                return raised
            self.assertLess(time.monotonic(), deadline, "the ids never coincided")

    def run_robbed(self, connection):
        attempts = iter([self.rob, self.insert])
        try:
            connection.run(lambda: next(attempts)(connection), attempts=2)
        except CommitOutcomeUnknown as error:
            return error
        return None

    def test_a_naive_witness_falls_into_it_and_loses_the_transaction(self):
        self.assertIsNone(self.fall_into_trap(NaiveWitness()))
        self.assertEqual(self.names(), [])

    def test_the_xid_witness_does_not_say_committed(self):
        raised = self.fall_into_trap("xid")
        self.assertIsInstance(raised, CommitOutcomeUnknown)
        self.assertIn(str(self.xid), str(raised))
        self.assertEqual(self.names(), [])

    def test_the_ledger_knows(self):
        self.assertIsNone(self.fall_into_trap(Ledger()))
        self.assertEqual(self.names(), ["victim"])
