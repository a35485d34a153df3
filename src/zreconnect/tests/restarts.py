"""Work that goes on while its server is restarted, crashes and is cut off, and what came of it."""

import itertools
import random
import threading
from collections import Counter

from zreconnect import CommitOutcomeUnknown
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests import faults
from zreconnect.tests.base import wait_until

# Without fsync a server restarts sooner. What a process has written outlives the process all the
# same.
RESTARTS_LAYER = PortForwardLayer(
    PostgresLayer("RestartsServerLayer", {"fsync": "off"}), "RestartsLayer"
)
KINDS = [
    faults.fast_restart,
    faults.immediate_stop,
    faults.kill_of_a_backend,
    faults.cut_at_a_byte,
    faults.cut_and_kill,
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
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]
        self.done = []
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

    def goes_on(self):
        """Wait until each thread could do a unit of work from now on."""
        enough = len(self.done) + 2 * len(self._threads)
        wait_until(lambda: len(self.done) >= enough or self.errors)
        if self.errors:
            raise self.errors[0]

    def _run(self):
        try:
            while not self._stopped.is_set():
                number = next(self._numbers)
                try:
                    self._unit(number)
                except CommitOutcomeUnknown:
                    self.unknown.append(number)
                else:
                    self.done.append(number)
        except Exception as error:
            self.errors.append(error)
        finally:
            self._leave()


class SurvivesRestarts:
    """A mixin of `DatabaseTestCase` with `RESTARTS_LAYER`."""

    layer = RESTARTS_LAYER

    def survive(self, unit, threads, applied, leave=lambda: None):
        """Every unit of work is done once through all faults, and no outcome is unknown.

        applied: returns the numbers of the units of work that are found in the database.
        leave: called at the end of each thread.
        """
        choice = random.Random(SEED)
        with Work(unit, threads, leave) as work:
            for kind in itertools.islice(itertools.cycle(KINDS), NUMBER_OF_FAULTS):
                work.goes_on()
                kind(self.server, self.forward, choice)
            work.goes_on()
        self.assertEqual(work.errors, [])
        self.assertEqual(work.unknown, [])
        self.assertEqual(Counter(applied()), Counter(work.done))
        return len(work.done)
