"""What one thread hands to another one that waits for it, but no longer than until its deadline."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from typing import Generic, TypeVar

T = TypeVar("T")


class Answers(Generic[T]):
    """A SimpleQueue with a get() that keeps its deadline.

    That of CPython before 3.13 waits for ever if its time is over just as it begins to wait, or
    while a signal's handler runs. A lock's acquire() does not.

    An interrupt leaves no lock locked that another thread would wait for: who gets an answer is
    decided by the queue's get() alone, and whoever misses the lock finds it at the deadline.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()
        # Locked by whoever has waited until there was nothing, and released by the next answer.
        self._news = threading.Lock()

    def put(self, answer: T) -> None:
        self._queue.put(answer)
        with contextlib.suppress(RuntimeError):
            self._news.release()

    def get(self, until: float) -> T | None:
        """The next answer; None if there is none by then, a time.monotonic()."""
        while True:
            # Nothing comes between the queue and the return: an interrupt there would lose it.
            try:
                return self._queue.get(block=False)
            except queue.Empty:
                left = until - time.monotonic()
            if left <= 0:
                return None
            self._news.acquire(timeout=min(left, threading.TIMEOUT_MAX))
