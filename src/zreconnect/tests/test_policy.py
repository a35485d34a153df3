"""How long and how often connecting is tried."""

import unittest
from dataclasses import replace
from unittest import mock

from zope.interface.verify import verifyObject

from zreconnect import FAIL_FAST, PERSIST, RetryPolicy
from zreconnect.interfaces import IRetryPolicy
from zreconnect.policy import LONGEST_ATTEMPT, SINGLE_ATTEMPT, Patience


class RetryPolicyTests(unittest.TestCase):
    def test_provides_its_interface(self):
        verifyObject(IRetryPolicy, PERSIST)
        verifyObject(IRetryPolicy, FAIL_FAST)

    def test_only_a_single_attempt_fails_fast(self):
        self.assertTrue(FAIL_FAST.fails_fast)
        self.assertFalse(PERSIST.fails_fast)
        self.assertFalse(RetryPolicy(attempts=2).fails_fast)

    def test_bad_values_are_named(self):
        for name, value, error in [
            ("timeout", -1, ValueError),
            ("timeout", float("nan"), ValueError),
            ("timeout", float("inf"), ValueError),
            ("timeout", "5", TypeError),
            ("timeout", True, TypeError),
            ("initial", -0.1, ValueError),
            ("maximum", -1, ValueError),
            ("multiplier", 0.5, ValueError),
            ("attempts", 0, ValueError),
            ("attempts", 1.5, TypeError),
            ("attempts", True, TypeError),
        ]:
            with self.subTest(name=name, value=value), self.assertRaisesRegex(error, name):
                RetryPolicy(**{name: value})

    def test_an_attempt_ends_with_the_timeout(self):
        policy = RetryPolicy(timeout=5)
        self.assertEqual(policy.longest_attempt(0), 5)
        self.assertEqual(policy.longest_attempt(3), 2)

    def test_an_attempt_has_a_limit_of_its_own(self):
        self.assertEqual(PERSIST.longest_attempt(1000), 10)
        self.assertEqual(RetryPolicy(timeout=60).longest_attempt(0), 10)

    def test_the_attempt_at_the_deadline_can_succeed(self):
        self.assertEqual(RetryPolicy(timeout=5).longest_attempt(5), 0.5)

    def test_attempts_that_began_together_end_apart(self):
        limits = [PERSIST.attempt_limit(1000) for _ in range(200)]
        self.assertLessEqual(max(limits), LONGEST_ATTEMPT)
        self.assertGreater(max(limits), LONGEST_ATTEMPT * 0.9)
        self.assertGreaterEqual(min(limits), LONGEST_ATTEMPT / 2)
        self.assertLess(min(limits), LONGEST_ATTEMPT * 0.6)
        self.assertEqual(RetryPolicy(timeout=3).attempt_limit(1), 2)

    def test_pauses_grow_at_random_up_to_the_maximum(self):
        policy = RetryPolicy(initial=1, multiplier=2, maximum=5)
        for attempt, limit in enumerate([1, 2, 4, 5, 5, 5], 1):
            pauses = [policy.pause(attempt, 0) for _ in range(200)]
            self.assertLessEqual(max(pauses), limit * 0.9)
            self.assertGreater(max(pauses), limit * 0.8)
            self.assertGreaterEqual(min(pauses), limit * 0.5)
            self.assertLess(min(pauses), limit * 0.6)

    def test_pauses_do_not_grow_beyond_what_a_number_holds(self):
        self.assertLessEqual(RetryPolicy(maximum=5).pause(10**6, 10**6), 5)

    def test_a_pause_ends_at_the_deadline(self):
        policy = RetryPolicy(timeout=60, initial=1000, maximum=1000)
        self.assertEqual(policy.pause(1, 20), 40)
        self.assertEqual(policy.pause(1, 70), 0)

    def test_attempts_are_counted(self):
        policy = RetryPolicy(attempts=4)
        self.assertFalse(policy.is_over(3, 1000))
        self.assertTrue(policy.is_over(4, 0))
        self.assertTrue(FAIL_FAST.is_over(1, 0))

    def test_time_ends(self):
        policy = RetryPolicy(timeout=5)
        self.assertFalse(policy.is_over(1000, 4.9))
        self.assertTrue(policy.is_over(1, 5))
        self.assertTrue(RetryPolicy(timeout=0).is_over(1, 0))
        self.assertFalse(PERSIST.is_over(10**6, 10**6))


class PatienceTests(unittest.TestCase):
    def left(self, policy, away, elapsed=0.0):
        server = mock.Mock()
        server.outage.away_for.return_value = away
        return Patience(policy, server).left(elapsed)

    def test_each_transaction_may_wait_for_all_of_the_time(self):
        self.assertEqual(self.left(RetryPolicy(timeout=60), away=50).timeout, 60)
        self.assertEqual(self.left(RetryPolicy(timeout=60), away=50, elapsed=5).timeout, 55)

    def test_the_time_counts_from_the_beginning_of_the_outage(self):
        policy = RetryPolicy(timeout=60, since_outage=True)
        for away, elapsed, left in ((0, 0, 60), (50, 0, 10), (50, 20, 10), (20, 50, 10)):
            self.assertEqual(self.left(policy, away, elapsed).timeout, left)
        # One attempt.
        self.assertEqual(self.left(policy, away=70).timeout, 0)
        self.assertEqual(self.left(FAIL_FAST, away=70), replace(FAIL_FAST, timeout=0))

    def test_connecting_goes_on_for_as_long_as_before_the_outage(self):
        """Else who takes longer to connect to than anybody waits would never be reached again."""
        for timeout, seconds in (60, LONGEST_ATTEMPT), (5, 5), (0.1, SINGLE_ATTEMPT):
            policy = RetryPolicy(timeout=timeout, since_outage=True)
            self.assertEqual(policy.lasting_attempt(), seconds)
            left = self.left(policy.after(timeout / 2), away=1000, elapsed=timeout)
            self.assertEqual((left.timeout, left.lasting_attempt()), (0, seconds))
        self.assertEqual(RetryPolicy(since_outage=True).lasting_attempt(), SINGLE_ATTEMPT)
        self.assertEqual(RetryPolicy(timeout=60).lasting_attempt(), 0)

    def test_who_waits_for_ever_does_in_an_outage(self):
        policy = RetryPolicy(since_outage=True)
        self.assertEqual(self.left(policy, away=50), policy)
