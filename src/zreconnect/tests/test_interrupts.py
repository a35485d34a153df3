"""An interrupt at every line: after the program's own rollback() everything is as it should be.

A KeyboardInterrupt, or the exception of a signal's handler, is raised at the first line of
zreconnect that a call comes to, at the second, and so on until the call ends before; or at a random
moment. Then the program rolls back, or aborts, and

- what it has caught was the interrupt itself, and a call that returned has done what it does;
- nothing of the unit of work is in the database, unless `CommitOutcomeUnknown` was raised, or the
  call to commit had returned; what was committed before is all there;
- another thread gets its turn, the next transaction works, and so does a new connection;
- the server has no session in a transaction, and no transaction prepared.

A few lines of each call are taken, and a few moments. With ZRECONNECT_SWEEP=full in the environment
it is every line, with either error; two interrupts, the second a few lines after the first; and a
minute of moments for each driver.
"""

import contextlib
import gc
import logging
import os
import random
import tempfile
import time
import unittest
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from zreconnect import CommitOutcomeUnknown, Ledger
from zreconnect.testing.layers import MariaDBLayer, PostgresLayer
from zreconnect.tests.base import on_mariadb, wait_until
from zreconnect.tests.interrupted import (
    BEGIN,
    BLOCKS,
    CALLS,
    CLOSE,
    CLOSE_IDLE,
    COMMIT,
    COMMIT_IN_DOUBT,
    CONNECT,
    FETCH,
    FIRST_STATEMENT,
    PREPARE_AND_ABORT,
    PREPARE_AND_FINISH,
    ROLLBACK,
    RUN,
    STATEMENT,
    TRANSACTION_ABORT,
    TRANSACTION_COMMIT,
    ZOPELESS_ABORT,
    ZOPELESS_BEGIN,
    ZOPELESS_COMMIT,
    ZOPELESS_RUN,
    DoubtingProgram,
    ManagedProgram,
    MariaDB,
    Postgres,
    Program,
    Sqlite,
    TwoPhaseProgram,
    ZopelessProgram,
)
from zreconnect.tests.interrupts import LIMIT, Alarm, AtLines, AtMoment, Hung, time_limit

FULL = os.environ.get("ZRECONNECT_SWEEP") == "full"
# Without fsync a commit takes less time.
SETTINGS = {"fsync": "off", "scram_iterations": 1, "max_prepared_transactions": 20}
LAYER = PostgresLayer("InterruptsPostgresLayer", SETTINGS)
MARIADB_LAYER = MariaDBLayer("InterruptsMariaDBLayer")
# Lines of each call, if not all.
POINTS = 20
# So many lines after the first interrupt comes the second.
SECOND = (1, 2, 5, 12)
# Seconds of random moments for each driver.
MOMENTS = 60.0 if FULL else 1.0
# A server's list of sessions and their transactions is a little late.
AT_REST = 5.0
# A call that fails at more points is not swept to its end.
MOST_FAILURES = 20
SHOWN_FAILURES = 10


# The sweeps


class Trial:
    """One call that is interrupted, what the program does then, and what was wrong."""

    def __init__(self, program, call, interrupt, expected=None):
        self.program = program
        self.call = call
        self.interrupt = interrupt
        self.expected = expected
        self.value = self.error = None
        self.has_returned = False
        self.wrong = []
        self.is_told = False
        self.units = None

    def run(self, threads):
        self.program.trial += 1
        with time_limit():
            self.call.before(self.program)
            started = time.monotonic()
            try:
                with self.interrupt():
                    self.value = self.call.call(self.program)
                self.has_returned = True
            except BaseException as error:
                self.error = error
            self.seconds = time.monotonic() - started
            self.outcome = self._outcome()
            if self.call.closes:
                self._attempt("close() again:", self.program.close)
                self.program.open()
            self._roll_back()
            # As at the end of the program's except clause.
            self.error = None
            self.interrupt.forget()
            self._look_around(threads)
        return self

    def _outcome(self):
        """What came of the call, in two words."""
        if not self.interrupt.places:
            if self.error is not None:
                raise self.error
            return "not interrupted"
        if self.error is None:
            if self.interrupt.is_unraisable:
                return "in a finalizer"
            if self.value != self.expected:
                self.wrong.append(f"the interrupt was swallowed: {self.value!r} was returned")
            return "done all the same"
        if any(self.error is error for error in self.interrupt.errors):
            return "raised"
        if (
            self.call.commits
            and isinstance(self.error, CommitOutcomeUnknown)
            and self.interrupt.caused(self.error)
        ):
            self.is_told = True
            return "unknown"
        self.wrong.append(f"another error was raised: {self.error!r}")
        return "another error"

    def _roll_back(self):
        error = self._attempt("rollback:", self.program.undo, CommitOutcomeUnknown)
        if isinstance(error, CommitOutcomeUnknown):
            self.outcome += ", rollback unknown"
            self.is_told = True
            if not self.call.commits:
                self.wrong.append(f"rollback raised {error!r}, and no commit was asked for")
        if self.program.state() != "idle":
            self.wrong.append(f"the state after rollback is {self.program.state()}")

    def _look_around(self, threads):
        names = {
            "new": self.program.work_on_another,
            "other": lambda: threads.submit(self.program.work, "other").result(LIMIT),
            "next": lambda: self.program.work("next"),
        }
        self._see_that_nothing_is_under_way("after rollback")
        done = [name for name, work in names.items() if self._attempt(f"{name}:", work) is None]
        self._see_that_nothing_is_under_way("at the end")
        database = self.program.database
        self.units = database.units(self.program.trial)
        rest = [name for name in self.units if name not in names]
        for name in names:
            rows = self.program.rows if name != "new" else 1
            found = self.units.count(name)
            if found not in ((rows,) if name in done else (0, rows)):
                self.wrong.append(f"{found} rows of {name!r} are there")
        whole = ["unit"] * self.program.rows
        if rest:
            self.outcome += ", committed"
        if self.call.commits and self.has_returned:
            if rest != whole:
                self.wrong.append(f"it returned, and in the database is {rest}")
        elif self.is_told:
            if rest not in ([], whole):
                self.wrong.append(f"half of it is in the database: {rest}")
        elif rest:
            self.wrong.append(f"rolled back, and in the database is {rest}")

    def _see_that_nothing_is_under_way(self, when):
        database = self.program.database
        try:
            wait_until(lambda: not database.under_way(), AT_REST)
        except AssertionError:
            self.wrong.append(f"under way {when}: {database.under_way()}")

    def _attempt(self, what, function, *allowed):
        """What is raised, if it is allowed; else it is wrong."""
        try:
            function()
        except allowed as error:
            return error
        except BaseException as error:
            self.wrong.append(f"{what} {error!r}")
            return error
        return None


class SweepTestCase:
    """``self.program`` is interrupted in its calls."""

    driver = "psycopg2"
    program_class = Program
    witness = Ledger()

    def setUp(self):
        logging.disable(logging.CRITICAL)
        self.addCleanup(logging.disable, logging.NOTSET)
        ignored = warnings.catch_warnings()
        ignored.__enter__()
        self.addCleanup(ignored.__exit__, None, None, None)
        # Of what is left to the garbage collector after an interrupt.
        warnings.simplefilter("ignore", ResourceWarning)
        self.database = self.make_database()
        self.addCleanup(self.database.close)
        self.program = self.program_class(self.database, self.driver, self.witness)
        self.addCleanup(lambda: self.program.close())
        self.threads = ThreadPoolExecutor(1)
        self.addCleanup(self.threads.shutdown)
        self.units = {}
        self.failures = []
        self.outcomes = Counter()
        self.random = random.Random(1)

    def sweep(self, call):
        """Interrupt a call at its lines."""
        self.program.work("first")
        for _ in range(2):
            # At first modules may be imported.
            counted = AtLines()
            expected = self.trial(call, counted).value
        step = 1 if FULL else max(1, counted.lines // POINTS)
        number = 1 if FULL else 1 + zlib.crc32(f"{self.driver} {call.name}".encode()) % step
        errors = [KeyboardInterrupt, Alarm]
        while len(self.failures) < MOST_FAILURES:
            fired = False
            for error in errors if FULL else errors[:1]:
                trial = self.trial(call, AtLines([number], [error()]), expected)
                fired = fired or bool(trial.interrupt.places)
            if FULL and fired:
                later = number + SECOND[number % len(SECOND)]
                twice = AtLines([number, later], [Alarm(), KeyboardInterrupt()])
                self.trial(call, twice, expected)
            if not fired:
                break
            number += step
            errors.reverse()
        self.report(call.name)

    def sweep_moments(self, *calls):
        """Interrupt calls at any moment."""
        usual = {}
        self.program.work("first")
        for call in calls:
            trials = [self.trial(call, AtLines()) for _ in range(4)]
            usual[call] = trials[-1].value, min(trial.seconds for trial in trials)
        deadline = time.monotonic() + MOMENTS
        while time.monotonic() < deadline and len(self.failures) < MOST_FAILURES:
            call = self.random.choice(calls)
            expected, seconds = usual[call]
            interrupt = AtMoment(self.random.uniform(0, 1.2 * seconds), Alarm())
            self.trial(call, interrupt, expected)
        self.report("random moments")

    def trial(self, call, interrupt, expected=None):
        trial = Trial(self.program, call, interrupt, expected).run(self.threads)
        if interrupt.places:
            self.outcomes[trial.outcome] += 1
        self.units[self.program.trial] = trial.units
        if trial.wrong:
            self.failures.append(
                f"{self.driver}, {call.name}, {interrupt.place or 'not interrupted'} "
                f"({trial.outcome}): " + "; ".join(trial.wrong)
            )
            self.begin_anew()
        return trial

    def begin_anew(self):
        with contextlib.suppress(Exception, Hung), time_limit():
            self.program.close()
        gc.collect()
        self.database.tidy_up()
        trial = self.program.trial
        self.program = self.program_class(self.database, self.driver, self.witness)
        self.program.trial = trial
        with time_limit():
            self.program.work("first")
        self.units[trial] = self.database.units(trial)

    def report(self, name):
        outcomes = ", ".join(f"{count} {what}" for what, count in self.outcomes.most_common())
        print(f"\n  {self.driver} {name}, {self.outcomes.total()} points: {outcomes}", end="")
        for trial, units in self.database.all_units().items():
            if units != self.units.get(trial, units):
                self.failures.append(f"trial {trial} was {self.units[trial]}, and later is {units}")
        shown = "\n".join(self.failures[:SHOWN_FAILURES])
        if self.failures:
            self.fail(f"\n{len(self.failures)} points failed:\n{shown}")


class CallTests(SweepTestCase):
    def test_connect(self):
        self.sweep(CONNECT)

    def test_begin(self):
        self.sweep(BEGIN)

    def test_first_statement(self):
        self.sweep(FIRST_STATEMENT)

    def test_statement(self):
        self.sweep(STATEMENT)

    def test_fetch(self):
        self.sweep(FETCH)

    def test_commit(self):
        self.sweep(COMMIT)

    def test_rollback(self):
        self.sweep(ROLLBACK)

    def test_run(self):
        self.sweep(RUN)

    def test_blocks(self):
        self.sweep(BLOCKS)

    def test_close(self):
        self.sweep(CLOSE)

    def test_close_idle(self):
        self.sweep(CLOSE_IDLE)

    def test_moments(self):
        self.sweep_moments(*CALLS)


class DoubtTests(SweepTestCase):
    """What became of a COMMIT is not found out; nor does the rollback hide it."""

    program_class = DoubtingProgram

    def test_commit(self):
        self.sweep(COMMIT_IN_DOUBT)


class ManagedTests(SweepTestCase):
    program_class = ManagedProgram
    witness = "xid"

    def test_commit(self):
        self.sweep(TRANSACTION_COMMIT)

    def test_abort(self):
        self.sweep(TRANSACTION_ABORT)


class OnPostgres:
    layer = LAYER

    def make_database(self):
        return Postgres(self.layer.server)


class Psycopg2Tests(OnPostgres, CallTests, unittest.TestCase):
    """With psycopg2."""


class Psycopg2DoubtTests(OnPostgres, DoubtTests, unittest.TestCase):
    """With psycopg2."""


class Psycopg2ManagedTests(OnPostgres, ManagedTests, unittest.TestCase):
    """With psycopg2."""


class PsycopgTests(OnPostgres, CallTests, unittest.TestCase):
    driver = "psycopg"


class PsycopgDoubtTests(OnPostgres, DoubtTests, unittest.TestCase):
    driver = "psycopg"


class PsycopgManagedTests(OnPostgres, ManagedTests, unittest.TestCase):
    driver = "psycopg"


class OnMariaDB:
    driver = "pymysql"

    def make_database(self):
        return MariaDB(self.layer.server)


@on_mariadb(MARIADB_LAYER)
class PymysqlTests(OnMariaDB, CallTests, unittest.TestCase):
    """With PyMySQL."""


@on_mariadb(MARIADB_LAYER)
class PymysqlDoubtTests(OnMariaDB, DoubtTests, unittest.TestCase):
    """With PyMySQL."""


@on_mariadb(MARIADB_LAYER)
class PymysqlManagedTests(OnMariaDB, ManagedTests, unittest.TestCase):
    witness = Ledger()


class InFile:
    driver = "sqlite"

    def make_database(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        return Sqlite(directory.name)


class SqliteTests(InFile, CallTests, unittest.TestCase):
    """With SQLite."""


class SqliteManagedTests(InFile, ManagedTests, unittest.TestCase):
    """With SQLite."""


class ZopelessTests(OnPostgres, SweepTestCase, unittest.TestCase):
    program_class = ZopelessProgram

    def test_begin(self):
        self.sweep(ZOPELESS_BEGIN)

    def test_commit(self):
        self.sweep(ZOPELESS_COMMIT)

    def test_abort(self):
        self.sweep(ZOPELESS_ABORT)

    def test_run(self):
        self.sweep(ZOPELESS_RUN)


class TwoPhaseTests(SweepTestCase):
    program_class = TwoPhaseProgram

    def test_commit(self):
        self.sweep(PREPARE_AND_FINISH)

    def test_abort(self):
        self.sweep(PREPARE_AND_ABORT)


class Psycopg2TwoPhaseTests(OnPostgres, TwoPhaseTests, unittest.TestCase):
    """With psycopg2."""


class PsycopgTwoPhaseTests(OnPostgres, TwoPhaseTests, unittest.TestCase):
    driver = "psycopg"
