"""Which thread knocks, and how long the others wait for it; by a clock that is set."""

import contextlib
import math
import threading
import time
import unittest
from unittest import mock

from zreconnect.answers import Answers
from zreconnect.knocking import WATCHERS, Knocking
from zreconnect.policy import LONGEST_ATTEMPT

ERROR = OSError("refused")
# Threads' idents that none has.
ANOTHER, A_THIRD = -1, -2
LONGEST = 0.9


class KnockingTestCase(unittest.TestCase):
    def setUp(self):
        self.knocking = Knocking()
        clock = mock.patch.object(time, "monotonic", side_effect=lambda: self.now)
        clock.start()
        self.addCleanup(clock.stop)
        self.now = 100.0

    @contextlib.contextmanager
    def thread(self, ident):
        with mock.patch.object(threading, "get_ident", return_value=ident):
            yield

    def knock(self, pause, thread=ANOTHER):
        """That thread's attempt fails, and it pauses for so long."""
        with self.thread(thread):
            self.knocking.failed(ERROR)
            self.knocking.knocks_again(pause)


class WaitingTests(KnockingTestCase):
    def setUp(self):
        super().setUp()
        # Waiting takes as long as it may.
        watch = mock.patch.object(self.knocking, "_watch", side_effect=self.go_on)
        self.watch = watch.start()
        self.addCleanup(watch.stop)

    def go_on(self, until, longest):
        self.now = until

    def waits(self, pause, patience=math.inf, longest=LONGEST, is_counted=False):
        """For how many seconds, and what comes of it."""
        began = self.now
        error = self.knocking.leave_to_another(pause, patience, longest, is_counted)
        return self.now - began, error

    def test_not_before_the_first_failure(self):
        self.assertEqual(self.waits(0.5), (0, None))

    def test_not_without_a_pause(self):
        self.knock(0.75)
        self.assertEqual(self.waits(0), (0, None))

    def test_who_has_knocked_and_paused_does_so_again(self):
        self.knock(0.75, threading.get_ident())
        self.assertEqual(self.waits(0.5), (0, None))

    def test_not_for_one_who_has_failed_and_does_not_come_back(self):
        self.knocking.failed(ERROR)
        self.assertEqual(self.waits(0.5), (0, None))

    def test_until_the_other_one_is_due(self):
        self.knock(0.75)
        self.assertEqual(self.waits(0.5), (0.5, ERROR))
        self.assertEqual(self.waits(0.5), (0.5, None))
        self.assertEqual(self.waits(0.5), (0, None))

    def test_as_long_as_it_knocks(self):
        self.knock(0.75)

        def fails_meanwhile(until, longest):
            self.now = until
            self.knock(0.75)

        self.watch.side_effect = fails_meanwhile
        for _ in range(5):
            self.assertEqual(self.waits(0.5), (0.5, ERROR))

    def test_not_for_one_that_pauses_longer(self):
        self.knock(2)
        self.assertEqual(self.waits(0.5), (0, None))
        self.assertEqual(self.waits(0.5, longest=2), (0.5, ERROR))

    def test_its_own_attempt_when_its_patience_ends(self):
        self.knock(0.75)
        self.assertEqual(self.waits(0.5, 0.25), (0.25, None))
        self.assertEqual(self.waits(0.5, 0), (0, None))

    def test_many_look_more_seldom(self):
        self.knock(0.75)
        self.knocking._watching = [(math.inf, None)] * 3 * WATCHERS
        self.assertEqual(self.waits(0.5), (1.5, None))

    def test_but_nobody_waits_long_for_what_else_may_end_it(self):
        for pause, longest in ((0.5, LONGEST_ATTEMPT), (20, 20)):
            self.knock(0.75)
            self.knocking._watching = [(math.inf, None)] * 50 * WATCHERS
            self.assertEqual(self.waits(pause), (longest, None))

    def test_not_who_counts_its_pauses(self):
        self.knock(0.75)
        self.knocking._watching = [(math.inf, None)] * 50 * WATCHERS
        self.assertEqual(self.waits(0.5, is_counted=True), (0.5, ERROR))


class WhoKnocksTests(KnockingTestCase):
    """Until which of the others this thread waits, and who wakes whom."""

    def due(self):
        return self.knocking._next and (self.knocking._next[0] - self.now, self.knocking._next[1])

    def watch(self, longest):
        """Somebody who watches: whether that was ended."""
        answers = Answers()
        self.knocking._watching.append((longest, answers))
        put = mock.patch.object(answers, "put")
        self.addCleanup(put.stop)
        return put.start()

    def test_the_first_of_several(self):
        self.knock(0.75)
        self.knock(0.875, A_THIRD)
        self.assertEqual(self.due(), (0.75, ANOTHER))
        self.knock(0.5, A_THIRD)
        self.assertEqual(self.due(), (0.5, A_THIRD))

    def test_one_whose_time_has_passed_is_no_more(self):
        self.knock(0.75)
        self.now += 1
        self.knock(0.875, A_THIRD)
        self.assertEqual(self.due(), (0.875, A_THIRD))

    def test_its_own_next_one_replaces_the_one_before(self):
        self.knock(0.25)
        self.knock(0.75)
        self.assertEqual(self.due(), (0.75, ANOTHER))

    def test_nobody_when_the_server_has_let_somebody_in(self):
        self.knocking.knocks_again(0.75)
        self.assertIsNone(self.due())

    def test_the_success_of_another_ends_it(self):
        self.knock(0.75)
        put = self.watch(LONGEST)
        self.knocking.ended()
        self.assertTrue(put.called)
        self.assertIsNone(self.due())
        self.assertEqual(self.knocking.waiting, 0)

    def test_who_gives_up_tells_the_others(self):
        self.knock(0.75)
        put = self.watch(LONGEST)
        with self.thread(A_THIRD):
            self.knocking.leaves()
        self.assertFalse(put.called)
        with self.thread(ANOTHER):
            self.knocking.leaves()
        self.assertTrue(put.called)
        self.assertIsNone(self.due())

    def test_who_never_knocked_has_nothing_to_tell(self):
        self.knocking.leaves()
        self.assertIsNone(self.due())

    def test_who_pauses_for_less_sees_for_himself(self):
        puts = [self.watch(longest) for longest in (0.09, LONGEST)]
        self.knock(0.75)
        self.assertEqual([put.called for put in puts], [True, False])


class WatchingTests(unittest.TestCase):
    def setUp(self):
        self.knocking = Knocking()

    def test_an_end_just_before_anybody_watches(self):
        self.knocking._watch(math.inf, LONGEST)

    def test_and_a_failure_after_that(self):
        self.knocking.failed(ERROR)

        class Answers(list):
            def append(watching, mine):
                self.knocking.ended()
                self.knocking.failed(ERROR)
                super().append(mine)

        self.knocking._watching = Answers()
        self.knocking._watch(math.inf, LONGEST)

    def test_nobody_waits_any_more_after_an_interrupt(self):
        self.knocking.failed(ERROR)
        interrupt = mock.patch.object(Answers, "get", side_effect=KeyboardInterrupt)
        with interrupt, self.assertRaises(KeyboardInterrupt):
            self.knocking._watch(math.inf, LONGEST)
        self.assertEqual(self.knocking.waiting, 0)
