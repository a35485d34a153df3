"""Whose turn it is: threads that share a connection have it one after the other."""

from __future__ import annotations

import threading


class Turn:
    """Which thread has a connection, and until when the others wait.

    thread: the identifier of the thread that has it; None while none does.
    is_for_good: whether that thread never gives it to another one.
    """

    def __init__(self) -> None:
        self.thread: int | None = None
        self.is_for_good = False
        self._given = threading.Condition()

    def is_mine(self) -> bool:
        return self.thread == threading.get_ident()

    def is_anothers(self) -> bool:
        thread = self.thread
        return thread is not None and thread != threading.get_ident()

    def keep(self) -> None:
        """The calling thread has it for good."""
        self.thread = threading.get_ident()
        self.is_for_good = True

    def take(self, patience: float) -> bool:
        """Whether the calling thread has it now, after ``patience`` seconds at most."""
        with self._given:
            if self._given.wait_for(lambda: not self.is_anothers(), patience):
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
            with self._given:
                self.thread = None
                self._given.notify_all()

    def in_child(self) -> Turn:
        """The same in a forked child, which has none of the process's other threads."""
        turn = Turn()
        if self.is_for_good or self.is_mine():
            turn.thread, turn.is_for_good = self.thread, self.is_for_good
        return turn
