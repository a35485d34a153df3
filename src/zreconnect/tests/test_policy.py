"""How long and how often connecting is tried."""

import unittest

import tenacity
from zope.interface.verify import verifyObject

from zreconnect import FAIL_FAST, PERSIST, RetryPolicy
from zreconnect.interfaces import IRetryPolicy


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
