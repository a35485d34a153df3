"""Which of a process's threads knocks at a server's door, and how the others wait for that one.

Between two attempts of one thread the others make none, so that all together knock no more often
than one would. They wait for its next success, and now and then see whether it still knocks.
"""

from __future__ import annotations

import contextlib
import threading
import time

from zreconnect.answers import Answers
from zreconnect.policy import LARGEST_PART, LEAST_PART

# So many threads look each for itself, after a pause, whether another one still knocks at the door.
# The more there are, the more seldom each of them does.
WATCHERS = 4
# Who knocks does so again within so many pauses of another thread, if both have the same policy.
LONGEST_PAUSE = LARGEST_PART / LEAST_PART


class Knocking:
    """The latest attempt to connect, and who waits for the next.

    It has no lock, which an interrupt could leave locked: see `zreconnect.server`.
    """

    def __init__(self) -> None:
        # When the latest attempt has failed, how, and whose it was; None unless it has, and a later
        # one may not.
        self._failure: tuple[float, BaseException, int] | None = None
        self._watching: list[Answers[None]] = []

    @property
    def waiting(self) -> int:
        """How many threads wait."""
        return len(self._watching)

    def failed(self, error: BaseException, thread: int) -> None:
        """Note that the thread's attempt has failed, and that a later one may not."""
        self._failure = time.monotonic(), error, thread

    def ended(self) -> None:
        """Note that an attempt has not, or that none is of use: everybody sees for himself."""
        self._failure = None
        watching, self._watching = self._watching, []
        for answers in watching.copy():
            answers.put(None)

    def leave_to_another(self, pause: float, patience: float) -> BaseException | None:
        """Wait for another thread that knocks.

        pause: the seconds for which this thread has paused. patience: those to wait at most.
        Returns what the other one has met, if it still knocks; None if it is this thread's turn.
        """
        if self._another_has_met(pause) is not None:
            pauses = max(1.0, self.waiting / WATCHERS)
            self._watch(time.monotonic() + min(patience, pauses * pause))
        return self._another_has_met(pause)

    def _another_has_met(self, pause: float) -> BaseException | None:
        failure = self._failure
        if failure is None:
            return None
        at, error, thread = failure
        knocks = thread != threading.get_ident() and time.monotonic() - at < LONGEST_PAUSE * pause
        return error if knocks else None

    def _watch(self, until: float) -> None:
        """Wait until then, or until another thread's attempt does not fail."""
        answers: Answers[None] = Answers()
        watching = self._watching
        watching.append(answers)
        # In this order; `ended` has the other one.
        if self._failure is not None:
            answers.get(until)
        with contextlib.suppress(ValueError):
            watching.remove(answers)
