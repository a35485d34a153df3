"""How long and how often connecting is tried."""

import unittest
from dataclasses import replace
from unittest import mock

import tenacity
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

    def pauses(self, policy, count):
        """The pauses after the first ``count`` attempts of one series."""
        pauses = []

        def attempt():
            raise LookupError

        retrying = policy.retrying(LookupError, lambda state: None).copy(
            sleep=pauses.append,
            stop=tenacity.stop_any(policy._stop(), tenacity.stop_after_attempt(count + 1)),
        )
        self.assertRaises(LookupError, retrying, attempt)
        return pauses

    def test_pauses_grow_at_random_up_to_the_maximum(self):
        policy = RetryPolicy(initial=1, multiplier=2, maximum=5)
        series = [self.pauses(policy, 6) for _ in range(200)]
        for number, limit in enumerate([1, 2, 4, 5, 5, 5]):
            pauses = [pauses[number] for pauses in series]
            self.assertLessEqual(max(pauses), limit)
            self.assertGreater(max(pauses), limit * 0.8)
            self.assertLess(min(pauses), limit * 0.2)

    def test_the_last_pause_ends_at_the_deadline(self):
        pauses = self.pauses(RetryPolicy(timeout=0.01, initial=1000, maximum=1000), 3)
        self.assertTrue(pauses)
        self.assertLessEqual(max(pauses), 0.01)

    def test_attempts_are_counted(self):
        self.assertEqual(len(self.pauses(RetryPolicy(attempts=4), 100)), 3)
        self.assertEqual(self.pauses(FAIL_FAST, 100), [])
        self.assertEqual(self.pauses(RetryPolicy(timeout=0), 100), [])

    def test_other_errors_are_not_tried_again(self):
        calls = []

        def attempt():
            calls.append(1)
            raise KeyError

        self.assertRaises(KeyError, PERSIST.retrying(ValueError, lambda state: None), attempt)
        self.assertEqual(len(calls), 1)


class PatienceTests(unittest.TestCase):
    def left(self, policy, away, elapsed=0.0):
        server = mock.Mock()
        server.away_for.return_value = away
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
