"""Whose turn it is: threads that share a connection have it one after the other.

Who has the turn is what one slot of a dictionary says. The slot is taken with ``setdefault()`` and
given with one assignment or ``pop()``, each of which the interpreter does as a whole: an interrupt,
such as KeyboardInterrupt or an exception of a signal handler, comes before or after it. A lock has
no such moment, for whoever is interrupted when he has acquired it does not know that he has it.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
import weakref
from typing import Any

_HOLDER = "holder"
# A waiting thread is woken up. If an interrupt has kept somebody from that, it looks by itself
# after that many seconds.
_LOOK_INTERVAL = 0.1


class _Thread:
    """Stands for one thread and lives as long as it. Its number may be another thread's later."""

    __slots__ = ("__weakref__",)


class _Present(threading.local):
    def __init__(self) -> None:
        self.thread = _Thread()


_present = _Present()


class _Waiting:
    """A thread that waits for its turn."""

    def __init__(self, claim: weakref.ref[_Thread]) -> None:
        self.claim = claim
        self._bell = threading.Lock()
        self._bell.acquire()

    def listen(self, seconds: float) -> None:
        self._bell.acquire(timeout=seconds)

    def ring(self) -> None:
        # Somebody else may have rung.
        with contextlib.suppress(RuntimeError):
            self._bell.release()


class Turn:
    """Which thread has a connection. When that thread ends, its turn does.

    is_for_good: whether that thread never gives it to another one.
    """

    def __init__(self) -> None:
        self.is_for_good = False
        self._slot: dict[str, weakref.ref[_Thread]] = {}
        self._queue: collections.deque[_Waiting] = collections.deque()

    def is_mine(self) -> bool:
        claim = self._slot.get(_HOLDER)
        return claim is not None and claim() is _present.thread

    def is_anothers(self) -> bool:
        claim = self._slot.get(_HOLDER)
        return claim is not None and claim() is not _present.thread

    def is_lent(self) -> bool:
        """Whether another thread has it, and not for good."""
        return self.is_anothers() and not self.is_for_good

    def keep(self) -> None:
        """The calling thread has it for good."""
        self.take(0)
        self.is_for_good = True

    def take(self, patience: float) -> bool:
        """Whether the calling thread has it now, after ``patience`` seconds at most."""
        claim = weakref.ref(_present.thread, self._give_from)
        if self._slot.setdefault(_HOLDER, claim)() is _present.thread:
            return True
        return patience > 0 and self._wait(claim, time.monotonic() + patience)

    def give(self) -> None:
        """Let the next one have it, if the calling thread does."""
        claim = self._slot.get(_HOLDER)
        if claim is None or claim() is not _present.thread or self.is_for_good:
            return
        if self._queue:
            self._give_from(claim)
        else:
            self._slot.pop(_HOLDER, None)

    def end(self) -> None:
        """Let the next one have it, whichever thread has it now."""
        claim = self._slot.get(_HOLDER)
        if claim is not None:
            self._give_from(claim)

    def in_child(self) -> Turn:
        """The same in a forked child, which has none of the process's other threads."""
        turn = type(self)()
        turn.is_for_good = self.is_for_good
        if self.is_mine() or self.is_for_good:
            turn._slot.update(self._slot)
        return turn

    def _wait(self, claim: weakref.ref[_Thread], deadline: float) -> bool:
        waiting = _Waiting(claim)
        self._queue.append(waiting)
        try:
            while (seconds := deadline - time.monotonic()) > 0:
                if self._slot.setdefault(_HOLDER, claim) is claim:
                    self._leave_queue(waiting)
                    return True
                waiting.listen(min(seconds, _LOOK_INTERVAL))
            if not self._leave_queue(waiting):
                # Somebody hands it over in this moment.
                waiting.listen(_LOOK_INTERVAL)
        except BaseException:
            self._leave_queue(waiting)
            self._give_from(claim)
            raise
        return self._slot.get(_HOLDER) is claim

    def _leave_queue(self, waiting: _Waiting) -> bool:
        """Whether it was still there."""
        try:
            self._queue.remove(waiting)
        except ValueError:
            return False
        return True

    def _give_from(self, claim: Any) -> None:
        """Hand it over from the thread of this claim; also called when that thread has ended."""
        if self._slot.get(_HOLDER) is not claim or self.is_for_good:
            return
        # Handed over to who has waited longest: the thread that gives it may want it back at once,
        # and would be faster than any that has to wake up.
        while self._queue:
            with contextlib.suppress(IndexError):
                waiting = self._queue.popleft()
                if waiting.claim() is not None:
                    self._slot[_HOLDER] = waiting.claim
                    waiting.ring()
                    return
        self._slot.pop(_HOLDER, None)


class AnyThreadsTurn(Turn):
    """Of a connection that a pool gives to one user at a time, who may hand it to other threads.

    The garbage collector, too, returns one that nobody closed in any thread.
    """

    def is_mine(self) -> bool:
        return True

    def end(self) -> None:
        """It goes on."""

    def in_child(self) -> Turn:
        return self
