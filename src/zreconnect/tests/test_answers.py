"""What threads hand to each other, and deadlines."""

import math
import signal
import threading
import time
import unittest

from zreconnect.answers import Answers
from zreconnect.tests.base import PATIENCE, wait_until


class AnswersTests(unittest.TestCase):
    def setUp(self):
        super().setUp()
        self.answers = Answers()

    def test_they_come_in_their_order(self):
        for answer in (1, 2, 3):
            self.answers.put(answer)
        self.assertEqual([self.answers.get(math.inf) for _ in range(3)], [1, 2, 3])
        self.assertIsNone(self.answers.get(-math.inf))

    def test_who_waits_gets_what_comes(self):
        got = []

        def get_both():
            got.extend(self.answers.get(math.inf) for _ in range(2))

        thread = threading.Thread(target=get_both, daemon=True)
        thread.start()
        for number in (1, 2):
            self.answers.put(number)
            wait_until(lambda number=number: len(got) == number)
        thread.join(PATIENCE)
        self.assertEqual(got, [1, 2])

    def test_a_deadline_that_is_near(self):
        """With a get() of queue.SimpleQueue, some of these would not return."""
        for _ in range(2_000):
            for seconds in (0, 1e-9, 1e-7, 1e-6):
                self.assertIsNone(self.answers.get(time.monotonic() + seconds))

    def test_a_deadline_that_passes_while_a_signal_is_handled(self):
        deadline = time.monotonic() + 0.1

        def handler(*_):
            wait_until(lambda: time.monotonic() > deadline)

        self.addCleanup(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, handler))
        self.addCleanup(signal.setitimer, signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        self.assertIsNone(self.answers.get(deadline))

    def test_an_answer_after_one_that_nobody_waited_for(self):
        self.answers.put(1)
        self.assertEqual(self.answers.get(-math.inf), 1)
        self.assertIsNone(self.answers.get(time.monotonic() + 0.01))
        self.answers.put(2)
        self.assertEqual(self.answers.get(math.inf), 2)
