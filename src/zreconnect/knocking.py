"""Which of a process's threads knocks at a server's door, and how the others wait for that one.

Between two attempts of one thread the others make none, so that all together knock no more often
than one would. They wait for its next success, and now and then see whether it still knocks.
"""

from __future__ import annotations

import contextlib
import threading
import time

from zreconnect.answers import Answers
from zreconnect.policy import LONGEST_ATTEMPT

# So many threads look each for itself, after a pause, whether another one still knocks at the door.
# The more there are, the more seldom each of them does.
WATCHERS = 4


class Knocking:
    """The latest attempt to connect, who makes the next one, and who waits for that.

    It has no lock, which an interrupt could leave locked: see `zreconnect.server`.
    """

    def __init__(self) -> None:
        # How the latest attempt has failed; None unless it has, and a later one may not.
        self._failure: BaseException | None = None
        # When the next one is due, and whose it is; None if nobody has said so.
        self._next: tuple[float, int] | None = None
        # Who watches, with the longest pause of another thread that suits it.
        self._watching: list[tuple[float, Answers[None]]] = []

    @property
    def waiting(self) -> int:
        """How many threads wait."""
        return len(self._watching)

    def failed(self, error: BaseException) -> None:
        """Note that an attempt has failed, and that a later one may not."""
        self._failure = error

    def ended(self) -> None:
        """Note that an attempt has not, or that none is of use: everybody sees for himself."""
        self._failure = None
        self._give_way()

    def knocks_again(self, pause: float) -> None:
        """Note that this thread, whose attempt has failed, makes one after so many seconds."""
        # Others would leave it to this one although the server lets in whoever asks.
        if self._failure is None:
            return
        now, mine, following = time.monotonic(), threading.get_ident(), self._next
        due = now + pause
        # Of several, the first one knocks; but one whose time has passed may not.
        if following is None or following[1] == mine or not now <= following[0] <= due:
            self._next = due, mine
            # Who does not pause so long itself does not wait so long for this one.
            for longest, answers in self._watching.copy():
                if longest < pause:
                    answers.put(None)

    def leaves(self) -> None:
        """Note that this thread makes no further attempt. Can be called by any."""
        following = self._next
        if following is not None and following[1] == threading.get_ident():
            self._give_way()

    def leave_to_another(
        self, pause: float, patience: float, longest: float, is_counted: bool = False
    ) -> BaseException | None:
        """Wait for another thread that knocks.

        pause: the seconds for which this thread pauses. patience: those to wait at most. longest:
        the longest pause of another one that suits this thread. is_counted: whether it counts its
        pauses, and is not to wait for several of them at once.
        Returns what the other one has met, if it still knocks; None if it is this thread's turn,
        also because its time is over: the server may be back since the other one has knocked.
        """
        deadline = time.monotonic() + patience
        if pause and self._another_has_met(longest) is not None:
            pauses = 1.0 if is_counted else max(1.0, self.waiting / WATCHERS)
            # What ends a wait otherwise, such as close(), is noticed as soon as in an attempt.
            seconds = max(pause, min(pauses * pause, LONGEST_ATTEMPT))
            self._watch(min(deadline, time.monotonic() + seconds), longest)
        is_over = time.monotonic() >= deadline
        return None if is_over or not pause else self._another_has_met(longest)

    def _another_has_met(self, longest: float) -> BaseException | None:
        error, following = self._failure, self._next
        if following is None:
            return None
        due, thread = following
        knocks = thread != threading.get_ident() and 0 <= due - time.monotonic() <= longest
        return error if knocks else None

    def _watch(self, until: float, longest: float) -> None:
        """Wait until then, or until everybody sees for himself."""
        watching, mine = self._watching, (longest, Answers[None]())
        watching.append(mine)
        try:
            # In this order; `ended` has the other one. An attempt may have failed again since: then
            # the list shows that those in it have been called.
            if self._failure is not None and watching is self._watching:
                mine[1].get(until)
        finally:
            with contextlib.suppress(ValueError):
                watching.remove(mine)

    def _give_way(self) -> None:
        """Nobody is known to knock: everybody sees for himself."""
        self._next = None
        watching, self._watching = self._watching, []
        for _, answers in watching.copy():
            answers.put(None)
