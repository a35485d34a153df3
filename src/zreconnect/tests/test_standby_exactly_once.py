"""The sweeps of `test_exactly_once` with a synchronous standby, for which COMMIT waits.

Whatever `commit()` acknowledges has to be on the standby at that moment, also if the answer to
COMMIT was lost, for the primary may be gone in the next. So the standby gets nothing from COMMIT
on, until it is seen that somebody waits for it. At the end it gets nothing any more, the line is
lost while COMMIT waits, the primary dies, and the standby is promoted.

Of a transaction some bytes are cut, of COMMIT all; with ZRECONNECT_SWEEP=full in the environment it
is every byte by FIN and by RST everywhere.
"""

import contextlib
import threading
import time
import unittest
from collections import Counter

from zreconnect import CommitOutcomeUnknown, Ledger
from zreconnect.testing import EmbeddedStandby, PortForward
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests.base import policy_of, wait_until
from zreconnect.tests.test_exactly_once import (
    COMMIT,
    FULL,
    SETTINGS,
    TRANSACTION,
    Lane,
    Sweep,
    SweepLayer,
)

# Bytes from one cut to the next, by FIN and by RST in turn.
STEPS = {TRANSACTION: 150, COMMIT: 2}
# Seconds after which the standby goes on although nobody is seen to wait for it.
LONGEST_HOLD = 0.5
# Seconds for which the connection looks the last outcome up, in vain.
PATIENCE_WITHOUT_STANDBY = 1.0
LINE = PortForwardLayer(
    PostgresLayer("StandbySweepPrimaryLayer", SETTINGS), "StandbySweepForwardLayer"
)
LAYER = SweepLayer(LINE)
LAYER.__name__ = "StandbySweepLayer"


class StandbyLane(Lane):
    """Its transactions wait for ``standby``, to which ``replication`` is the line.

    acknowledged, unknown: the numbers of the units of work of which that was said.
    """

    def __init__(self, standby, replication, *args):
        super().__init__(*args)
        self.standby, self.replication = standby, replication
        self.acknowledged, self.unknown = set(), set()
        self.helper = None
        self.is_over = threading.Event()

    def run(self, number):
        self.is_over.clear()
        try:
            self.note_answer(number)
            assert self.has_arrived(number), "acknowledged, and not on the standby"
        finally:
            self.is_over.set()
            if self.helper is not None:
                self.helper.join()

    def note_answer(self, number):
        try:
            super().run(number)
        except CommitOutcomeUnknown:
            self.unknown.add(number)
            raise
        self.acknowledged.add(number)

    def has_arrived(self, number):
        """Whether the unit of work is in what the standby has received by now."""

        def is_there():
            return self.standby.query("SELECT number FROM item WHERE number = %s", number) != []

        applied = "SELECT 1 WHERE pg_last_wal_replay_lsn() >= pg_last_wal_receive_lsn()"
        wait_until(lambda: is_there() or self.standby.query(applied))
        return is_there()

    def arm(self, sweep, after):
        super().arm(sweep, after)
        # No byte of an answer comes before the standby has what it is about.
        if sweep.part == COMMIT and sweep.direction == "to_server":
            cut = self.at_commit
            self.at_commit = lambda: (self.hold(), cut())

    def hold(self):
        """The standby gets nothing, until somebody waits for it in another session."""
        self.replication.silence("to_client")
        mine = self.connection.driver_connection.info.backend_pid
        self.helper = threading.Thread(target=self.resume_for_others, args=(mine,))
        self.helper.start()

    def resume_for_others(self, mine):
        deadline = time.monotonic() + LONGEST_HOLD
        while not self.is_over.wait(0.01) and time.monotonic() < deadline:
            if self.waiting() - {mine}:
                break
        self.replication.resume()

    def waiting(self):
        """The process ids of the sessions that wait for the standby."""
        rows = self.look("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        return {pid for (pid,) in rows}

    # At the end

    def lose_the_primary(self):
        """It is lost while a COMMIT waits, and the look-up after it; the standby takes its place.

        Returns how often it has what was acknowledged, what is unknown, and what is neither, by its
        number.
        """
        self.prepare(at_commit=lambda: self.replication.silence("to_client"))

        def drop():
            wait_until(self.waiting)
            self.forward.drop()

        dropper = threading.Thread(target=drop)
        dropper.start()
        with (
            policy_of(self.connection, timeout=PATIENCE_WITHOUT_STANDBY),
            contextlib.suppress(CommitOutcomeUnknown),
        ):
            self.note_answer(next(self.numbers))
        dropper.join()
        self.server.kill_all()
        self.standby.promote()
        there = dict(self.standby.query("SELECT number, count(*) FROM item GROUP BY number"))
        there.pop(0)
        acknowledged = {there.pop(number, 0) for number in self.acknowledged - {0}}
        unknown = {there.pop(number, 0) for number in self.unknown}
        return acknowledged, unknown, there


class StandbySweepTests:
    layer = LAYER
    statement = "INSERT INTO item VALUES (%s)"
    begins_with_statement = False

    def setUp(self):
        (self.line,) = self.layer.lines
        self.primary = self.line.server
        self.primary.query("DROP TABLE IF EXISTS item")
        self.replication = PortForward(self.primary.host, self.primary.port)
        self.replication.start()
        self.addCleanup(self.replication.stop)
        self.standby = EmbeddedStandby(self.primary)
        self.standby.settings.update(
            SETTINGS, primary_conninfo=self.primary.dsn(port=self.replication.port)
        )
        self.addCleanup(self.standby.stop)
        self.standby.start()
        self.addCleanup(self.set_standby_names, "")
        self.set_standby_names("*")
        wait_until(
            lambda: self.primary.query(
                "SELECT pid FROM pg_stat_replication WHERE sync_state = 'sync'"
            )
        )

    def set_standby_names(self, names):
        self.primary.ensure_running()
        self.primary.query(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
        self.primary.query("SELECT pg_reload_conf()")

    def test_what_is_acknowledged_is_on_the_standby(self):
        with StandbyLane(
            *(self.standby, self.replication, self.line, self.witness, self.statement),
            *(self.driver, self.begins_with_statement),
        ) as lane:
            for part, step in STEPS.items():
                tally = self.layer.tally.setdefault(f"{self.name}: {part}", Counter())
                for direction in ("to_server", "to_client"):
                    for reset in (False, True):
                        first, spacing = (0, 1) if FULL else (step // 2 if reset else 0, step)
                        sweep = Sweep(part, direction, reset, False, first, spacing)
                        lane.sweep(sweep, threading.Event(), tally)
            acknowledged, unknown, others = lane.lose_the_primary()
            self.assertEqual(acknowledged, {1})
            self.assertLessEqual(unknown, {0, 1})
            self.assertEqual(others, {})


class Psycopg2XidTests(StandbySweepTests, unittest.TestCase):
    name = witness = "xid"
    driver = "psycopg2"


class Psycopg2LedgerTests(StandbySweepTests, unittest.TestCase):
    name = "ledger"
    witness = Ledger()
    driver = "psycopg2"


class PsycopgXidTests(StandbySweepTests, unittest.TestCase):
    name = "psycopg, xid"
    witness = "xid"
    driver = "psycopg"
    begins_with_statement = True


class PsycopgLedgerTests(StandbySweepTests, unittest.TestCase):
    name = "psycopg, ledger"
    witness = Ledger()
    driver = "psycopg"
    begins_with_statement = True
