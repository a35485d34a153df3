"""Which thread knocks, and how long the others wait for it; by a clock that is set."""

import math
import threading
import time
import unittest
from unittest import mock

from zreconnect.knocking import LONGEST_PAUSE, WATCHERS, Knocking

ERROR = OSError("refused")
# A thread's ident that none has.
ANOTHER = -1


class KnockingTests(unittest.TestCase):
    def setUp(self):
        self.knocking = Knocking()
        clock = mock.patch.object(time, "monotonic", side_effect=lambda: self.now)
        clock.start()
        self.addCleanup(clock.stop)
        self.now = 100.0
        # Waiting takes as long as it may.
        watch = mock.patch.object(self.knocking, "_watch", side_effect=self.go_on)
        self.watch = watch.start()
        self.addCleanup(watch.stop)

    def go_on(self, until):
        self.now = until

    def waits(self, pause, patience=math.inf):
        """For how many seconds, and what comes of it."""
        began = self.now
        error = self.knocking.leave_to_another(pause, patience)
        return self.now - began, error

    def test_not_before_the_first_failure(self):
        self.assertEqual(self.waits(1), (0, None))

    def test_not_without_a_pause(self):
        self.knocking.failed(ERROR, ANOTHER)
        self.assertEqual(self.waits(0), (0, None))

    def test_who_has_knocked_and_paused_does_so_again(self):
        self.knocking.failed(ERROR, threading.get_ident())
        self.assertEqual(self.waits(1), (0, None))

    def test_the_others_leave_the_longest_pause_to_it(self):
        self.knocking.failed(ERROR, ANOTHER)
        self.now += 1
        self.assertEqual(self.waits(1), (1, None))
        self.knocking.failed(ERROR, ANOTHER)
        self.assertEqual(self.waits(1), (1, ERROR))
        self.now += LONGEST_PAUSE - 0.99
        self.assertEqual(self.waits(1), (0, None))

    def test_as_long_as_it_knocks(self):
        self.knocking.failed(ERROR, ANOTHER)

        def fails_meanwhile(until):
            self.now = until
            self.knocking.failed(ERROR, ANOTHER)

        self.watch.side_effect = fails_meanwhile
        for _ in range(5):
            self.assertEqual(self.waits(1), (1, ERROR))
            self.now += 1

    def test_no_longer_than_their_patience(self):
        self.knocking.failed(ERROR, ANOTHER)
        self.assertEqual(self.waits(1, 0.25), (0.25, ERROR))

    def test_many_look_more_seldom(self):
        self.knocking.failed(ERROR, ANOTHER)
        self.knocking._watching = [None] * 50 * WATCHERS
        self.assertEqual(self.waits(1), (50, None))

    def test_an_end_just_before_anybody_watches(self):
        Knocking()._watch(math.inf)
