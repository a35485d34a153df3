"""Work that goes on while its server is restarted, crashes and is cut off, and what came of it."""

import itertools
import random
import threading
from collections import Counter
from functools import partial

from zreconnect import CommitOutcomeUnknown
from zreconnect.events import ConnectionLost
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests import faults
from zreconnect.tests.base import wait_until

# Without fsync a server restarts sooner. What a process has written outlives the process all the
# same.
RESTARTS_LAYER = PortForwardLayer(
    PostgresLayer("RestartsServerLayer", {"fsync": "off"}), "RestartsLayer"
)
# Seconds, besides those that a start takes.
OUTAGE = (0.0, 0.2)
# Those that end every session come first, so that they are the more frequent ones.
KINDS = [
    faults.fast_restart,
    partial(faults.immediate_stop, outage=OUTAGE),
    partial(faults.kill_of_all, outage=OUTAGE),
    faults.kill_of_a_backend,
    faults.cut_and_kill,
    faults.terminated_backend,
    faults.drop_by_fin,
    faults.drop_by_rst,
    faults.cut_at_a_byte,
]
NUMBER_OF_FAULTS = 50
# A unit of work meets one fault, seldom two.
ATTEMPTS = 20
SEED = 6


class Work:
    """Units of work in threads, until they are told to stop.

    unit: called with a number, does the unit of work of that number.
    leave: called at the end of each thread.
    """

    def __init__(self, unit, threads, leave):
        self._unit = unit
        self._leave = leave
        self._numbers = itertools.count(1)
        self._stopped = threading.Event()
        # By thread.
        self._done = [[] for _ in range(threads)]
        self._threads = [threading.Thread(target=self._run, args=[done]) for done in self._done]
        self.unknown = []
        self.errors = []

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    @property
    def done(self):
        """The numbers of the units of work that were done."""
        return list(itertools.chain(*self._done))

    def goes_on(self):
        """Wait until each thread has done a unit of work that was begun from now on."""
        # The first one to end may have been begun before.
        enough = [len(done) + 2 for done in self._done]
        wait_until(
            lambda: (
                self.errors
                or all(len(done) >= n for done, n in zip(self._done, enough, strict=True))
            )
        )
        if self.errors:
            raise self.errors[0]

    def _run(self, done):
        try:
            while not self._stopped.is_set():
                number = next(self._numbers)
                try:
                    self._unit(number)
                except CommitOutcomeUnknown:
                    self.unknown.append(number)
                else:
                    done.append(number)
        except Exception as error:
            self.errors.append(error)
        finally:
            self._leave()


class SurvivesRestarts:
    """A mixin of `DatabaseTestCase` with `RESTARTS_LAYER`."""

    layer = RESTARTS_LAYER

    def survive(self, unit, threads, applied, leave=lambda: None):
        """Every unit of work is done once through all faults, and no outcome is unknown.

        As many connections as there are faults, or more, are lost inside of transactions.

        unit: called with a number, in one thread or another, does the unit of work of that number.
        applied: returns the numbers of the units of work that are found in the database.
        leave: called at the end of each thread.
        """
        choice = random.Random(SEED)
        with self.events() as seen, Work(unit, threads, leave) as work:
            for kind in itertools.islice(itertools.cycle(KINDS), NUMBER_OF_FAULTS):
                work.goes_on()
                kind(self.server, self.forward, choice)
            work.goes_on()
        self.assertEqual(work.errors, [])
        self.assertEqual(work.unknown, [])
        self.assertEqual(Counter(applied()), Counter(work.done))
        lost = [event.state for event in seen if isinstance(event, ConnectionLost)]
        in_transactions = [state for state in lost if state != "idle"]
        self.assertGreaterEqual(len(in_transactions), NUMBER_OF_FAULTS)
