"""The sweeps of `test_exactly_once` with two connections in one transaction, each with one phase.

The unit of work is an insert in each of two databases, of which each commits by itself. Wherever
the line to one of them is cut, and whichever commits first: what may run again has committed
nothing, so that nothing is done twice; and what is committed in part is told as what it is.

Of a transaction some bytes are cut, of PostgreSQL's COMMITs all, by FIN and by RST in turn; and a
few of these with a crash of that server. With ZRECONNECT_SWEEP=full in the environment it is every
byte by FIN and by RST everywhere.
"""

import threading
import unittest
from collections import Counter
from contextlib import ExitStack

import transaction
from transaction.interfaces import TransientError
from zope.publisher.interfaces import Retry

from zreconnect import DisconnectionError, Ledger, PartlyCommitted
from zreconnect.datamanager import join_transactions
from zreconnect.tests.base import needs_mysqlclient, on_mariadb, wait_until
from zreconnect.tests.test_exactly_once import (
    COMMIT,
    DEADLINE,
    DIGITS,
    FULL,
    SWEEP_LAYER,
    TRANSACTION,
    Lane,
    Sweep,
)
from zreconnect.tests.test_mysql_exactly_once import (
    MARIADB_SWEEP_LAYER,
    MysqlclientLane,
    PymysqlLane,
)
from zreconnect.tests.test_siblings import Between

STEPS = {(TRANSACTION, False): 160, (COMMIT, False): 2, (COMMIT, True): 16}
# A crash takes longer, and the conversation has more bytes.
MARIADB_STEPS = {(TRANSACTION, False): 160, (COMMIT, False): 16, (COMMIT, True): 90}
INSERT = "INSERT INTO item VALUES (%s)"
RUNS = 5


class BeforeVotes(Between):
    """When both connections were asked whether they are there, and before the first COMMIT."""

    def sortKey(self):
        return "~"


class Pair:
    """Two connections in a transaction of one manager; each has a lane of its own."""

    def __init__(self, lanes):
        self.lanes = lanes
        self.manager = transaction.TransactionManager()
        for lane in lanes:
            join_transactions(lane.connection, self.manager)

    def run(self, before_votes=None):
        """Do the work, until it is done or must not be run again.

        before_votes: called in the first run. Returns, for each run, its number and its error.
        """
        runs = []
        while True:
            number, error, again = next(Lane.numbers), None, False
            self.manager.begin()
            try:
                self.work(number, before_votes if not runs else None)
                self.manager.commit()
            except Exception as caught:
                error = caught
                again = isinstance(error, (Retry, TransientError)) or (
                    self.manager.get().isRetryableError(error)
                )
                self.manager.abort()
            runs.append((number, error))
            if not again:
                return runs
            assert len(runs) < RUNS, f"raised {error!r} {RUNS} times"

    def work(self, number, before_votes=None):
        for lane in self.lanes:
            with lane.connection.cursor() as cursor:
                cursor.execute(INSERT, (number,))
        if before_votes is not None:
            self.manager.get().join(BeforeVotes(None, before_votes))

    # Cutting

    def sweep(self, lane, sweep):
        """Cut the line of one of them, after each byte of the sweep; yields what came of it."""
        least = self.bytes_of(lane, sweep)
        after, was_cut = sweep.first, True
        while was_cut:
            try:
                was_cut, answer = self.cut(lane, sweep, after)
            except Exception as error:
                raise AssertionError(f"{sweep}, after {after} bytes: {error!r}") from error
            assert was_cut or after >= least, f"{sweep}: ended at byte {after} of {least}"
            if was_cut:
                yield answer
            after += sweep.step

    def bytes_of(self, lane, sweep):
        """At least so many bytes there are to cut at."""
        counts = []

        def count():
            counts.append(lane.forward.count())

        self.prepare()
        count()
        self.run(count)
        count()
        before, after = counts[0 if sweep.part == TRANSACTION else 1], counts[2]
        return getattr(after - before, f"bytes_{sweep.direction}") - DIGITS

    def prepare(self):
        """Have two sessions."""
        self.manager.begin()
        for lane in self.lanes:
            with lane.connection.cursor() as cursor:
                cursor.execute("SELECT 1")
        self.manager.abort()

    def cut(self, lane, sweep, after):
        """Whether a byte was left to cut at, and what came of it."""
        self.prepare()
        crash = lane.crash(lane.connection.driver_connection) if sweep.crash else None

        def cut():
            lane.forward.cut(sweep.direction, after, sweep.reset, crash)

        if sweep.part == TRANSACTION:
            cut()
        # Whoever waits in vain is to fail, not to wait for ever.
        rescue = threading.Timer(DEADLINE, lane.forward.drop)
        rescue.start()
        try:
            runs = self.run(cut if sweep.part == COMMIT else None)
        finally:
            rescue.cancel()
            was_cut = not lane.forward.cancel_cut()
        return was_cut, self.answer(runs)

    # What must hold afterwards

    def answer(self, runs):
        for lane in self.lanes:
            assert lane.connection.state == "idle", lane.connection.state
            # What orphans do, they have done when they have ended.
            wait_until(lambda lane=lane: lane.orphans() == [])
        *repeated, (number, error) = runs
        for each, reason in repeated:
            assert isinstance(reason, DisconnectionError), f"raised {reason!r}"
            assert self.times(each) == [0, 0], f"run again, although {self.times(each)} is there"
        times = self.times(number)
        if error is None:
            assert times == [1, 1], f"applied {times} times"
            return "run again" if repeated else "not noticed"
        assert isinstance(error, PartlyCommitted), f"raised {error!r}"
        for lane, count in zip(self.lanes, times, strict=True):
            possible = [
                how_often
                for how_often, servers in [
                    ({1}, error.committed),
                    ({0}, error.not_committed),
                    ({0, 1}, error.unknown),
                ]
                if lane.connection.server in servers
            ]
            assert len(possible) == 1, f"{lane.connection.server} is there {len(possible)} times"
            assert count in possible[0], f"applied {times} times: {error}"
        return "unknown" if error.unknown else "in part"

    def times(self, number):
        """How often the work of a run is in each of the databases."""
        return [
            lane.look("SELECT count(*) FROM item WHERE number = %s", number)[0][0]
            for lane in self.lanes
        ]


class SiblingSweepTests:
    layer = SWEEP_LAYER
    lane = Lane
    driver = "psycopg2"
    witness = Ledger()
    steps = STEPS

    def sweep(self, part, crash=False):
        title = f"{self.name}, two in one: {part}" + (", server crashes" if crash else "")
        tally = self.layer.tally.setdefault(title, Counter())
        step = 1 if FULL else self.steps[part, crash]
        with ExitStack() as stack:
            lanes = [
                stack.enter_context(self.lane(line, self.witness, INSERT, self.driver, False))
                for line in self.layer.lines
            ]
            pair = Pair(lanes)
            for lane in lanes:
                for direction in ("to_server", "to_client"):
                    for reset in (False, True):
                        first = step // 2 if reset else 0
                        sweep = Sweep(part, direction, reset, crash, first, step)
                        tally.update(pair.sweep(lane, sweep))

    def test_bytes_of_a_transaction(self):
        self.sweep(TRANSACTION)

    def test_bytes_of_the_commits(self):
        self.sweep(COMMIT)

    def test_bytes_of_the_commits_and_a_crash(self):
        self.sweep(COMMIT, crash=True)


class Psycopg2XidTests(SiblingSweepTests, unittest.TestCase):
    name = witness = "xid"


class Psycopg2LedgerTests(SiblingSweepTests, unittest.TestCase):
    name = "ledger"


class PsycopgXidTests(SiblingSweepTests, unittest.TestCase):
    name = "psycopg, xid"
    driver = "psycopg"
    witness = "xid"


class PsycopgLedgerTests(SiblingSweepTests, unittest.TestCase):
    name = "psycopg, ledger"
    driver = "psycopg"


@on_mariadb(MARIADB_SWEEP_LAYER)
class PymysqlTests(SiblingSweepTests, unittest.TestCase):
    lane = PymysqlLane
    steps = MARIADB_STEPS
    name = driver = "pymysql"


@on_mariadb(MARIADB_SWEEP_LAYER)
@needs_mysqlclient
class MysqlclientTests(SiblingSweepTests, unittest.TestCase):
    lane = MysqlclientLane
    steps = MARIADB_STEPS
    name = driver = "mysqlclient"
