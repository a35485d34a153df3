"""What a process knows of a server that is away, and when it says so.

All threads that wait for one server say together what one would: that the waiting has begun, that
it goes on, and that it is over.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# After so many seconds of an outage it is told that it goes on, and then each so many seconds.
TOLD_AFTER = (0.0, 10.0, 60.0)
TOLD_EACH = 300.0
# An outage that nobody has met for so many seconds, nor waited for its end, is over.
FORGOTTEN_AFTER = 60.0


class Outage:
    """One server's outages, one after the other, as the threads of this process meet them."""

    def __init__(self) -> None:
        # When the present one was first, and last, met; None if there is none.
        self._met: tuple[float, float] | None = None
        # Whether somebody has lost a session, and nobody has one since.
        self._is_lost = False
        self._times_told = 0
        self.renew()

    def renew(self) -> None:
        """In a forked child: no thread but this one waits."""
        # Not for ever: a signal's handler may wait for a server, too, while its thread has it.
        self._lock = threading.RLock()
        self._waiting: set[int] = set()

    @property
    def waiting(self) -> int:
        """How many threads wait for the server."""
        return len(self._waiting)

    def lost(self) -> bool:
        """A session was lost. Whether that is news, and not part of what is known."""
        with self._lock:
            was_lost, self._is_lost = self._is_lost, True
            return not was_lost and self._met is None

    def missed(self, since: float) -> None:
        """An attempt to open a session that began then has failed."""
        with self._lock:
            met = self._met
            self._met = (since if met is None else met[0]), time.monotonic()

    def reached(self) -> float | None:
        """Somebody has a session. The seconds for which the server was away, 0.0 if but a session
        was lost; None if that is known already."""
        with self._lock:
            met, was_lost = self._met, self._is_lost
            self._met, self._is_lost, self._times_told = None, False, 0
        if met is None:
            return 0.0 if was_lost else None
        return time.monotonic() - met[0]

    def seen(self) -> None:
        """The server is there, although nobody has a session yet."""
        with self._lock:
            self._met, self._is_lost, self._times_told = None, True, 0

    def away_for(self, memory: float) -> float:
        """The seconds since it was first met away; 0 if it is not known to be.

        memory: the seconds after which that is forgotten if nobody has met it away again.
        """
        with self._lock:
            now, met = time.monotonic(), self._met
            if met is None:
                return 0.0
            if now - met[1] <= memory:
                return now - met[0]
            self._forget()
            return 0.0

    def _forget(self) -> None:
        if not self._waiting:
            self._met, self._times_told = None, 0

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """For a thread that connects, however long it waits for that."""
        with self._lock:
            if self._met is not None and time.monotonic() - self._met[1] > FORGOTTEN_AFTER:
                self._forget()
        thread = threading.get_ident()
        self._waiting.add(thread)
        try:
            yield
        finally:
            self._waiting.discard(thread)

    def until_told(self) -> float:
        """The seconds until it is to be told that the outage goes on; not above 0: now."""
        met, told = self._met, self._times_told
        if met is None:
            return math.inf
        if told < len(TOLD_AFTER):
            due = TOLD_AFTER[told]
        else:
            due = TOLD_AFTER[-1] + TOLD_EACH * (told - len(TOLD_AFTER) + 1)
        return met[0] + due - time.monotonic()

    def is_to_be_told(self) -> bool:
        """Whether it is, by whoever asks; true once each time."""
        with self._lock:
            if self.until_told() > 0:
                return False
            while self.until_told() <= 0:
                self._times_told += 1
            return True
