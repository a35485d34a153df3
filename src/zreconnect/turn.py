"""Whose turn it is: threads that share a connection have it one after the other."""

from __future__ import annotations

import contextlib
import threading


class Turn:
    """Which thread has a connection.

    thread: the identifier of the thread that has it; None while none does.
    is_for_good: whether that thread never gives it to another one.
    """

    def __init__(self) -> None:
        self.thread: int | None = None
        self.is_for_good = False
        # Held by the thread that has the connection. Another one may release it, too.
        self._lock = threading.Lock()

    def is_mine(self) -> bool:
        return self.thread == threading.get_ident()

    def is_anothers(self) -> bool:
        thread = self.thread
        return thread is not None and thread != threading.get_ident()

    def keep(self) -> None:
        """The calling thread has it for good."""
        self.is_for_good = True
        self.take(0)

    def take(self, patience: float) -> bool:
        """Whether the calling thread has it now, after ``patience`` seconds at most."""
        if self.is_mine():
            return True
        if self._lock.acquire(timeout=min(patience, threading.TIMEOUT_MAX)):
            self.thread = threading.get_ident()
            return True
        return False

    def give(self) -> None:
        """Let the next one have it, if the calling thread does."""
        if self.is_mine():
            self.end()

    def end(self) -> None:
        """Let the next one have it, whichever thread has it now."""
        if not self.is_for_good:
            self.thread = None
            # Its thread may end it at the same time.
            with contextlib.suppress(RuntimeError):
                self._lock.release()

    def in_child(self) -> Turn:
        """The same in a forked child, which has none of the process's other threads."""
        turn = Turn()
        turn.is_for_good = self.is_for_good
        if self.is_for_good or self.is_mine():
            turn.take(0)
            turn.thread = self.thread
        return turn
