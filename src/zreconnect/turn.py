"""Whose turn it is: threads that share a connection have it one after the other."""

from __future__ import annotations

import contextlib
import threading
import weakref


class _Thread:
    """Stands for one thread and lives as long as it. Its number may be another thread's later."""

    __slots__ = ("__weakref__",)


class _Present(threading.local):
    def __init__(self) -> None:
        self.thread = _Thread()


_present = _Present()


class Turn:
    """Which thread has a connection. When that thread ends, its turn does.

    is_for_good: whether that thread never gives it to another one.
    """

    def __init__(self) -> None:
        self.is_for_good = False
        self._thread: weakref.ref[_Thread] | None = None
        # Held by the thread that has the connection. Another one may release it, too.
        self._lock = threading.Lock()

    def is_mine(self) -> bool:
        thread = self._thread
        return thread is not None and thread() is _present.thread

    def is_anothers(self) -> bool:
        thread = self._thread
        return thread is not None and thread() is not _present.thread

    def keep(self) -> None:
        """The calling thread has it for good."""
        self.take(0)
        self.is_for_good = True

    def take(self, patience: float) -> bool:
        """Whether the calling thread has it now, after ``patience`` seconds at most."""
        if self.is_mine():
            return True
        if self._lock.acquire(timeout=min(patience, threading.TIMEOUT_MAX)):
            self._thread = weakref.ref(_present.thread, self._ended)
            return True
        return False

    def give(self) -> None:
        """Let the next one have it, if the calling thread does."""
        if self.is_mine():
            self.end()

    def end(self) -> None:
        """Let the next one have it, whichever thread has it now."""
        if not self.is_for_good:
            self._thread = None
            # Its thread may end it at the same time.
            with contextlib.suppress(RuntimeError):
                self._lock.release()

    def in_child(self) -> Turn:
        """The same in a forked child, which has none of the process's other threads."""
        turn = Turn()
        turn.is_for_good = self.is_for_good
        if self.is_mine():
            turn.take(0)
        elif self.is_for_good:
            turn._thread = self._thread
        return turn

    def _ended(self, thread: weakref.ref[_Thread]) -> None:
        # As long as it is another one's turn, there is no reference to this one.
        self.end()
