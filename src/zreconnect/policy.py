"""How long and how often connecting is tried."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

from zreconnect.documented import implements
from zreconnect.interfaces import IRetryPolicy

# A host that swallows packets would otherwise hold one attempt for the kernel's TCP timeout of
# about two minutes, long after the server is back at another address.
LONGEST_ATTEMPT = 10.0
# What the attempt at the deadline itself still gets, so that it can succeed at all.
SHORTEST_ATTEMPT = 0.5
# Time enough to connect for who makes one attempt only.
SINGLE_ATTEMPT = 2.0
# Of its upper limit, a pause is at least and at most this part. A fleet's pauses differ enough that
# it spreads over time, and they are long enough that nobody knocks twice as often as who polls once
# a second (benchmarks/measurements/fleet.py). What is left of the limit is for the attempt itself.
LEAST_PART, LARGEST_PART = 0.5, 0.9


@implements(IRetryPolicy)
@dataclass(frozen=True)
class RetryPolicy:
    """How long and how often connecting is tried, and what lies between two attempts.

    The pauses grow exponentially, with jitter: each is a random part, from a half to nine tenths,
    of the next value of ``initial * multiplier ** n``, and that value never exceeds ``maximum``. So
    a server that is back is noticed within ``maximum`` seconds, however long it was away.

    timeout: seconds until `ReconnectTimeout`; None waits for ever, 0 tries once.
    initial: upper limit of the first pause, in seconds.
    maximum: upper limit of every pause, in seconds.
    multiplier: growth of the upper limit from pause to pause, at least 1.
    attempts: number of attempts until `ReconnectTimeout`; None does not count them. With 1, a
    failed attempt raises `DisconnectionError` at once, for a publisher to run the request again.
    since_outage: whether the timeout counts from when the process has first met the server away,
    whichever connection did. Else each transaction waits for all of it. For web applications: when
    it is over, a transaction makes one attempt, and waits for that no longer than half a second,
    until some connection has reached the server, or none has tried for as long as the timeout.

    Raises ValueError or TypeError, naming the argument, for a value that makes no sense.
    """

    timeout: float | None = None
    initial: float = 0.25
    maximum: float = 1.0
    multiplier: float = 4.0
    attempts: int | None = None
    since_outage: bool = False
    # Of what is left of a policy: that one's timeout.
    _whole: float | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.timeout is not None:
            check_number("timeout", self.timeout, at_least=0)
        check_number("initial", self.initial, at_least=0)
        check_number("maximum", self.maximum, at_least=0)
        check_number("multiplier", self.multiplier, at_least=1)
        if self.attempts is not None:
            check_attempts(self.attempts)

    @property
    def fails_fast(self) -> bool:
        return self.attempts == 1

    def left(self, elapsed: float) -> float:
        """The seconds that are left after so many."""
        return math.inf if self.timeout is None else self.timeout - elapsed

    def longest_attempt(self, elapsed: float) -> float:
        return min(LONGEST_ATTEMPT, max(SHORTEST_ATTEMPT, self.left(elapsed)))

    def attempt_limit(self, elapsed: float) -> float:
        """As `longest_attempt`, or less, at random: else those whom a silent server keeps waiting
        would all begin their next attempts at the same time, too, and find it busy or not at all.
        """
        limit = LONGEST_ATTEMPT * random.uniform(LEAST_PART, 1.0)
        return min(limit, self.longest_attempt(elapsed))

    @functools.cached_property
    def longest_begin(self) -> float:
        """The seconds that the answer to BEGIN may take in a session that there is."""
        # Half of the time is left for connecting again.
        return self.longest_attempt((self.timeout or 0) / 2)

    def least_attempt(self) -> float:
        """The seconds that a new session may take at least until it can be used."""
        return SINGLE_ATTEMPT if self.since_outage else 0.0

    def lasting_attempt(self) -> float:
        """The seconds that connecting goes on at least, also when nobody waits for it so long.

        As many as before the outage, or a server that takes longer to connect to would stay away.
        """
        if not self.since_outage:
            return 0.0
        whole = self.timeout if self._whole is None else self._whole
        return min(LONGEST_ATTEMPT, max(SINGLE_ATTEMPT, whole or 0.0))

    def after(self, elapsed: float) -> RetryPolicy:
        if self.timeout is None:
            return self
        return self.within(max(0.0, self.timeout - elapsed))

    def within(self, seconds: float) -> RetryPolicy:
        """The policy, with a timeout of at most so many seconds."""
        if self.timeout is None:
            return replace(self, timeout=seconds)
        whole = self.timeout if self._whole is None else self._whole
        return replace(self, timeout=min(self.timeout, seconds), _whole=whole)

    def is_over(self, attempt: int, elapsed: float) -> bool:
        """Whether no attempt follows upon one that has failed. For the arguments see `pause`."""
        return (self.timeout is not None and elapsed >= self.timeout) or (
            self.attempts is not None and attempt >= self.attempts
        )

    def pause(self, attempt: int, elapsed: float) -> float:
        """The seconds from an attempt that has failed until the next one.

        attempt: which one has failed, from 1. elapsed: seconds since the first one began.
        """
        try:
            limit = min(self.maximum, self.initial * self.multiplier ** (attempt - 1))
        except OverflowError:
            limit = self.maximum
        pause = limit * random.uniform(LEAST_PART, LARGEST_PART)
        # The last attempt is made at the deadline and not somewhere before it.
        return min(pause, max(0.0, self.left(elapsed)))


class Patience:
    """How long the transactions of one connection may wait until they begin.

    policy: that of the connection. server: the `zreconnect.server.Server`.
    """

    #: Whether several transactions share the time, so that it is to be told what becomes of them.
    is_shared = False

    def __init__(self, policy: RetryPolicy, server: Any) -> None:
        self.policy = policy
        self.server = server

    def begins(self, waited: float) -> RetryPolicy:
        """The policy for a transaction that begins now, and has waited for its turn so long."""
        return self.policy.after(waited) if waited else self.policy

    def left(self, elapsed: float = 0.0, policy: RetryPolicy | None = None) -> RetryPolicy:
        """The policy for connecting. elapsed: seconds since `begins` has returned ``policy``."""
        policy, timeout = (policy or self.policy).after(elapsed), self.policy.timeout
        if timeout is None or not policy.since_outage:
            return policy
        return policy.within(max(0.0, timeout - self.server.outage.away_for(timeout)))

    def has_begun(self) -> None:
        """The transaction has begun."""

    def has_failed(self, error: BaseException) -> None:
        """It has not."""

    def has_ended(self, lost: bool) -> None:
        """It has ended. lost: whether its session was lost before."""


def check_number(name: str, value: float, at_least: float) -> None:
    """Raise TypeError or ValueError, with the argument's name, unless it is such a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds or times, not {value!r}")
    if not math.isfinite(value) or value < at_least:
        raise ValueError(f"{name} must be a finite number of at least {at_least}, not {value!r}")


def check_attempts(attempts: int) -> None:
    """Raise TypeError or ValueError unless ``attempts`` is a whole number of at least 1."""
    if isinstance(attempts, bool) or not isinstance(attempts, int):
        raise TypeError(f"attempts must be a whole number, not {attempts!r}")
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, not {attempts!r}")


#: For scripts: keep trying until the server is back.
PERSIST = RetryPolicy()
#: For web requests: try once, then let the publisher decide.
FAIL_FAST = RetryPolicy(timeout=SINGLE_ATTEMPT, attempts=1, since_outage=True)
