"""A cut at every byte: whatever is lost, a unit of work is applied once, or its outcome is unknown.

The unit of work is a query and an insert. The line to the server is cut after byte 0, 1, 2, 3 ...
of a direction, until there is no such byte, for each witness:

- of the transaction, from BEGIN to the answer to COMMIT: at every byte, by FIN and by RST;
- of COMMIT and its answer, with the server process killed at that moment, so that the server
  crashes: at every byte, by FIN and by RST;
- of the whole transaction with such a crash: at every third byte, by FIN and by RST in turn;
- of connecting again and looking the outcome up, when the answer to COMMIT was lost, and when
  COMMIT itself was: at every sixth byte, by FIN and by RST in turn.

With psycopg 3 the transaction begins along with its first statement. A witness that asks at COMMIT
differs from one that asks at BEGIN only there, and takes a SELECT that writes for one that reads
until then. These are spared the last two; every byte of a transaction is cut by FIN or by RST in
turn, and the server crashes at some bytes of COMMIT.

With ZRECONNECT_SWEEP=full in the environment it is every byte by FIN and by RST everywhere.
"""

import itertools
import os
import threading
import time
import unittest
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import psycopg2
import zope.event

from zreconnect import (
    CommitOutcomeUnknown,
    DisconnectionError,
    Ledger,
    RetryPolicy,
    XidWitness,
)
from zreconnect.connection import ReconnectingConnection
from zreconnect.events import CommitLookedUp, ConnectionLost
from zreconnect.retry import run_unit_of_work
from zreconnect.server import server_from_dsn
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests.base import wait_until
from zreconnect.witness import XidObserver

FULL = os.environ.get("ZRECONNECT_SWEEP") == "full"
# The parts of the conversation that are cut.
TRANSACTION = "transaction"
COMMIT = "COMMIT"
AFTER_LOST_ANSWER = "look-up, answer to COMMIT lost"
AFTER_LOST_COMMIT = "look-up, COMMIT lost"
# Bytes from one cut to the next of the same kind, by the part and whether the server crashes; 1 if
# not there. The cuts by RST lie in the middle between those by FIN.
STEPS = {
    # Every byte, by FIN and by RST in turn.
    (TRANSACTION, False): 2,
    (TRANSACTION, True): 12,
    (COMMIT, True): 3,
    (AFTER_LOST_ANSWER, False): 24,
    (AFTER_LOST_COMMIT, False): 24,
}
VARIANT_STEPS = {(TRANSACTION, False): 6, (COMMIT, True): 18}
# By so many bytes a conversation may be longer than the same one before, because a number in it has
# got another digit.
DIGITS = 8
# No session has this number.
NOBODY = 0
# Seconds that a call may take: generously more than the policy allows.
DEADLINE = 60.0
POLICY = RetryPolicy(timeout=30.0, initial=0.01, maximum=0.05)
# What may be raised where, when there is one cut and the server comes back.
ERRORS = {
    "begin": (),
    "statement": (DisconnectionError,),
    "commit": (DisconnectionError, CommitOutcomeUnknown),
    "rollback": (),
}


class SweepLayer:
    """Two servers, each with a line to it, and the counts of what happened there."""

    # The first layers, by name, begin first, and this takes long.
    __name__ = "BasicSweepLayer"

    def __init__(self, *lines):
        self.__bases__ = self.lines = lines
        self.tally = {}

    def setUp(self):
        """The bases have done it."""

    def tearDown(self):
        """Tell what was cut and what came of it."""
        print(f"\n  {'sweep':<44}" + "".join(f"{each:>17}" for each in ("cuts", *ANSWERS)))
        for name, answers in self.tally.items():
            counts = [answers.total(), *(answers[each] for each in ANSWERS)]
            print(f"  {name:<44}" + "".join(f"{count:>17}" for count in counts))


ANSWERS = ("not noticed", "begun again", "run again", "found committed", "in part", "unknown")
# Without fsync a server recovers sooner. What a process has written outlives the process all the
# same.
SETTINGS = {"fsync": "off", "scram_iterations": 1}
# It takes long: its names have it start among the first, as layers do in the order of theirs.
SWEEP_LAYER = SweepLayer(
    *(
        PortForwardLayer(
            PostgresLayer(f"BasicSweep{n}Layer", SETTINGS), f"BasicSweep{n}ForwardLayer"
        )
        for n in (1, 2)
    )
)


@dataclass(frozen=True)
class Sweep:
    """Which bytes: of what, in which direction; and how the connection ends there."""

    part: str
    direction: str
    reset: bool
    crash: bool
    first: int
    step: int


class WatchedConnection(ReconnectingConnection):
    """Takes down what its methods raise, those that `run` catches too, and how long they took."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.raised = []
        self.longest = 0.0

    def begin(self):
        self.watch("begin", super().begin)

    def commit(self):
        self.watch("commit", super().commit)

    def rollback(self):
        self.watch("rollback", super().rollback)

    def watch(self, what, function, *args):
        started = time.monotonic()
        try:
            return function(*args)
        except Exception as error:
            self.raised.append((what, error))
            raise
        finally:
            self.longest = max(self.longest, time.monotonic() - started)


class Lane:
    """A unit of work that is run again and again on a line that is cut."""

    numbers = itertools.count(1)
    module = psycopg2

    def __init__(self, line, witness, statement, driver, begins_with_statement):
        self.server, self.forward = line.server, line.forward
        self.statement = statement
        self.connection = WatchedConnection(
            server_from_dsn(line.dsn(), driver), policy=POLICY, witness=witness
        )
        self.begins_with_statement = begins_with_statement
        self.witness = witness
        self.events = []
        self.at_commit = None

    def __enter__(self):
        self.make_tables()
        self.open_onlooker()
        zope.event.subscribers.append(self.see)
        return self

    def make_tables(self):
        self.server.query("CREATE TABLE IF NOT EXISTS item (number int)")
        self.server.query(
            "CREATE OR REPLACE FUNCTION add_item(int) RETURNS void LANGUAGE sql"
            " AS 'INSERT INTO item VALUES ($1)'"
        )
        self.server.query("DROP OPERATOR IF EXISTS @@@ (NONE, int)")
        self.server.query("CREATE OPERATOR @@@ (RIGHTARG = int, FUNCTION = add_item)")
        # Checking a password takes half the time of connecting; hashed anew, it takes none.
        self.server.query("ALTER ROLE postgres PASSWORD %s", self.server.password)

    def __exit__(self, *error):
        zope.event.subscribers.remove(self.see)
        self.connection.close()
        self.onlooker.close()

    def see(self, event):
        if event.server == self.connection.server:
            self.events.append(event)

    def open_onlooker(self):
        self.onlooker = self.server._connect(self.server._dbname, DEADLINE)

    # The unit of work, and what is counted of it

    def work(self, number):
        self.runs += 1
        with self.connection.cursor() as cursor:
            watch = self.connection.watch
            watch("statement", cursor.execute, "SELECT count(*) FROM item WHERE number = 0")
            watch("statement", cursor.fetchall)
            watch("statement", cursor.execute, self.statement, (number,))
        if self.at_commit is not None and self.runs == 1:
            self.at_commit()

    def run(self, number):
        connection = self.connection
        run_unit_of_work(
            lambda: self.work(number),
            check_idle=lambda: None,
            begin=(lambda: None) if self.begins_with_statement else connection.begin,
            commit=connection.commit,
            abort_after=connection.rollback_after,
            guard=connection.guard,
            attempts=5,
        )

    def bytes_of(self, sweep):
        """At least so many bytes there are to cut at."""
        counts = []

        def count():
            counts.append(self.forward.count())

        if sweep.part == TRANSACTION:
            self.prepare(None)
            count()
            self.run(0)
        elif sweep.part == COMMIT:
            self.prepare(at_commit=count)
            self.run(0)
        else:
            self.connection.reset()
            # A session that has not ended yet would be looked at more than once.
            wait_until(lambda: self.sessions_besides(NOBODY) == [])
            count()
            assert self.connection.driver_connection
        count()
        before, after = counts
        return getattr(after - before, f"bytes_{sweep.direction}") - DIGITS

    # Cutting

    def sweep(self, sweep, stopped, tally):
        """Cut until there is no byte left to cut at; what came of it is added to the tally."""
        for after in itertools.count(sweep.first, sweep.step):
            if stopped.is_set():
                return
            try:
                answer = self.cut(sweep, after)
                if answer is None:
                    break
            except Exception as error:
                raise AssertionError(f"{sweep}, after {after} bytes: {error}") from error
            tally[answer] += 1
        if after < (expected := self.bytes_of(sweep)):
            raise AssertionError(f"{sweep}: ended at byte {after} of {expected}")

    def cut(self, sweep, after):
        """Run the unit of work with one cut. What came of it, or None if it ended before."""
        number = next(self.numbers)
        self.arm(sweep, after)
        # Whoever waits in vain is to fail, not to wait for ever.
        rescue = threading.Timer(DEADLINE, self.forward.drop)
        rescue.start()
        is_unknown = False
        try:
            self.run(number)
        except CommitOutcomeUnknown:
            is_unknown = True
        finally:
            rescue.cancel()
            was_cut = not self.forward.cancel_cut()
        self.check(number, is_unknown, sweep.crash)
        if not was_cut:
            return None
        return "unknown" if is_unknown else self.answer()

    def prepare(self, at_commit):
        """Have a session and nothing noted."""
        self.connection.begin()
        self.connection.rollback()
        self.runs = 0
        self.at_commit = at_commit
        if isinstance(self.connection.work.link.observer, XidObserver):
            # As before the first transaction.
            self.connection.work.link.observer._reads_write = False
        self.connection.raised.clear()
        self.connection.longest = 0.0
        self.events.clear()

    def arm(self, sweep, after):
        self.prepare(None)
        crash = self.crash(self.connection.driver_connection) if sweep.crash else None

        def cut():
            self.forward.cut(sweep.direction, after, sweep.reset, crash)

        if sweep.part == TRANSACTION:
            cut()
        elif sweep.part == COMMIT:
            self.at_commit = cut
        else:
            lost = "to_client" if sweep.part == AFTER_LOST_ANSWER else "to_server"
            self.at_commit = lambda: self.forward.cut(lost, 0, then=cut)

    def crash(self, raw):
        """What crashes the server, which comes back by itself."""
        return partial(self.server.kill_backend, raw.info.backend_pid)

    # What must hold afterwards

    def check(self, number, is_unknown, crashed):
        for what, error in self.connection.raised:
            assert isinstance(error, ERRORS[what]), f"{what} raised {error!r}"
        assert self.connection.longest < DEADLINE, f"a call took {self.connection.longest} s"
        assert self.connection.state == "idle", self.connection.state
        # What orphans do, they have done when they have ended.
        wait_until(lambda: self.orphans() == [])
        ((times,),) = self.look("SELECT count(*) FROM item WHERE number = %s", number)
        if is_unknown:
            assert crashed and not isinstance(self.witness, Ledger), "the outcome is unknown"
            assert times in (0, 1), f"applied {times} times"
        else:
            assert times == 1, f"applied {times} times"

    def answer(self):
        outcomes = [event.outcome for event in self.events if isinstance(event, CommitLookedUp)]
        if "committed" in outcomes:
            return "found committed"
        if self.runs > 1:
            return "run again"
        lost = any(isinstance(event, ConnectionLost) for event in self.events)
        return "begun again" if lost else "not noticed"

    def orphans(self):
        return self.sessions_besides(self.connection.driver_connection.info.backend_pid)

    def sessions_besides(self, mine):
        rows = self.look(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND pid NOT IN (%s, pg_backend_pid())",
            mine,
        )
        return [pid for (pid,) in rows]

    def look(self, statement, *parameters):
        """What a connection sees that takes the direct way."""
        try:
            with self.onlooker.cursor() as cursor:
                cursor.execute(statement, parameters)
                return cursor.fetchall()
        except (self.module.OperationalError, self.module.InterfaceError):
            self.server.wait_until_ready()
            self.open_onlooker()
            return self.look(statement, *parameters)


class SweepTestCase:
    layer = SWEEP_LAYER
    lane = Lane
    statement = "INSERT INTO item VALUES (%s)"
    driver = "psycopg2"
    begins_with_statement = False
    steps = STEPS

    def sweep(self, part, crash=False):
        """Sweep over both directions, by FIN on one server and meanwhile by RST on the other."""
        step = 1 if FULL else self.steps.get((part, crash), 1)
        title = f"{self.name}: {part}" + (", server crashes" if crash else "")
        tally = self.layer.tally.setdefault(title, Counter())
        stopped = threading.Event()

        def sweep_line(line, reset):
            first = step // 2 if reset else 0
            with self.lane(
                line, self.witness, self.statement, self.driver, self.begins_with_statement
            ) as lane:
                for direction in ("to_server", "to_client"):
                    lane.sweep(Sweep(part, direction, reset, crash, first, step), stopped, tally)

        with ThreadPoolExecutor() as executor:
            try:
                futures = [
                    executor.submit(sweep_line, line, reset)
                    for line, reset in zip(self.layer.lines, (False, True), strict=True)
                ]
                for future in futures:
                    future.result()
            finally:
                stopped.set()

    def test_bytes_of_a_transaction(self):
        self.sweep(TRANSACTION)


class CrashSweepTestCase(SweepTestCase):
    def test_bytes_of_a_commit_and_a_crash(self):
        self.sweep(COMMIT, crash=True)


class FullSweepTestCase(CrashSweepTestCase):
    def test_bytes_of_a_transaction_and_a_crash(self):
        self.sweep(TRANSACTION, crash=True)

    def test_bytes_of_the_look_up_after_the_answer_to_commit_was_lost(self):
        self.sweep(AFTER_LOST_ANSWER)

    def test_bytes_of_the_look_up_after_commit_was_lost(self):
        self.sweep(AFTER_LOST_COMMIT)


class XidSweepTests(FullSweepTestCase, unittest.TestCase):
    name = witness = "xid"


class LedgerSweepTests(FullSweepTestCase, unittest.TestCase):
    name = "ledger"
    witness = Ledger()


class XidAtCommitSweepTests(CrashSweepTestCase, unittest.TestCase):
    name = "xid at COMMIT"
    steps = VARIANT_STEPS
    witness = XidWitness(at_commit=True)


class WritingSelectSweepTests(SweepTestCase, unittest.TestCase):
    """What looks like a transaction that only reads, until COMMIT."""

    name = "xid at COMMIT of a SELECT that writes"
    steps = VARIANT_STEPS
    witness = XidWitness(at_commit=True)
    statement = "SELECT @@@ %s"


class BeginAlongSweepTestCase(CrashSweepTestCase):
    begins_with_statement = True
    steps = VARIANT_STEPS


class BeginAlongXidSweepTests(BeginAlongSweepTestCase, unittest.TestCase):
    name = "BEGIN along, xid"
    witness = "xid"


class BeginAlongLedgerSweepTests(BeginAlongSweepTestCase, unittest.TestCase):
    name = "BEGIN along, ledger"
    witness = Ledger()


class PsycopgSweepTestCase(BeginAlongSweepTestCase):
    driver = "psycopg"


class PsycopgXidSweepTests(PsycopgSweepTestCase, unittest.TestCase):
    name = "psycopg, xid"
    witness = "xid"


class PsycopgLedgerSweepTests(PsycopgSweepTestCase, unittest.TestCase):
    name = "psycopg, ledger"
    witness = Ledger()
