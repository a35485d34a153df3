"""What a process knows of a server that is away, and when it says so.

All threads that wait for one server say together what one would: that the waiting has begun, that
it goes on, and that it is over.

There is no lock, which an interrupt could leave locked. Who says something, and which absence
follows upon another one, is decided by one call of a dict's setdefault() or pop().
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# After so many seconds of an outage it is told that it goes on, and then each so many seconds.
TOLD_AFTER = (10.0, 60.0)
TOLD_EACH = 300.0
# An outage that nobody has met for so many seconds, nor waited for its end, is over. What shows of
# it within so many seconds after its end, such as that an idle session was lost, is no news.
FORGOTTEN_AFTER = 60.0
# A server that lets nobody in so many seconds after it has let somebody in is still away: it has
# too few connections for all.
RESUMED_WITHIN = 10.0


class _Absence:
    """From the loss of a session, or an attempt that has failed, until somebody has a session.

    began: when. last: when it was met last. ended: when it ended; None until then.
    """

    def __init__(self, began: float, ended: float | None = None) -> None:
        self.began = self.last = began
        self.ended = ended
        # Whether it is known for how long, because attempts have failed.
        self._is_met = False
        self._told: dict[tuple[object, float], object] = {}
        self._untold_end = {None: True} if ended is None else {}
        self._next: dict[None, _Absence] = {}

    def followed_by(self, candidate: _Absence) -> _Absence:
        """The absence after this one: the first candidate."""
        return self._next.setdefault(None, candidate)

    def goes_on(self, within: float) -> bool:
        """Whether it has not ended, or did so within so many seconds."""
        ended = self.ended
        return ended is None or time.monotonic() - ended <= within

    def missed(self, since: float) -> None:
        if not self._is_met:
            self.began, self._is_met = since, True
        self.last, self.ended = time.monotonic(), None

    def forget(self) -> None:
        """Nobody knows when it ended."""
        self.ended, self._is_met = self.last, False

    def seconds(self) -> float:
        """For how long; 0.0 if that is not known."""
        return (self.ended or time.monotonic()) - self.began if self._is_met else 0.0

    def next_due(self) -> float:
        """After how many of its seconds all is to be told again."""
        seconds = self.seconds()
        for due in TOLD_AFTER:
            if seconds < due:
                return due
        after = TOLD_AFTER[-1]
        return after + TOLD_EACH * ((seconds - after) // TOLD_EACH + 1)

    def is_news(self, what: object) -> bool:
        """Whether that was not told since it was due last; once true, for one who asks."""
        mine = object()
        is_news = self._told.setdefault((what, self.next_due()), mine) is mine
        if is_news and self.ended is None:
            self._untold_end[None] = True
        return is_news

    def is_end_news(self) -> bool:
        """Whether something was told, and its end was not; once true, for one who asks."""
        return self._untold_end.pop(None, False)


class _Waiter:
    """Somebody who waits, for as long as the frame that does it."""


class Outage:
    """One server's outages, one after the other, as the threads of this process meet them."""

    def __init__(self) -> None:
        # As those know it whose patience counts from when it was first met.
        self._met: _Absence | None = None
        self.renew()

    def renew(self) -> None:
        """In a forked child: no thread but this one waits, and nothing is told."""
        self._waiting: weakref.WeakSet[_Waiter] = weakref.WeakSet()
        self._latest = _Absence(-math.inf, -math.inf)

    @property
    def waiting(self) -> int:
        """How many wait for the server."""
        return len(self._waiting)

    @property
    def seconds(self) -> float | None:
        """For how long it is away; 0.0 if but a session was lost; None if it is not away."""
        absence = self._latest
        return absence.seconds() if absence.ended is None else None

    def is_news(self, what: object) -> bool:
        """Whether that is to be told, by whoever asks: it was not told in the present outage, or
        the last one if that is not long ago; or it is time to tell all again."""
        absence = self._known()
        return not absence.goes_on(FORGOTTEN_AFTER) or absence.is_news(what)

    def until_told(self) -> float:
        """The seconds until it is to be told again that it is away."""
        absence = self._latest
        if absence.ended is not None:
            return math.inf
        return max(0.0, absence.next_due() - absence.seconds())

    def lost(self, opened: float) -> bool:
        """A session was lost that was opened then. Whether that is news."""

        def is_part_of(absence: _Absence) -> bool:
            return opened < absence.last and absence.goes_on(FORGOTTEN_AFTER)

        mine = _Absence(time.monotonic())
        return self._present(mine, is_part_of) is mine

    def missed(self, since: float) -> None:
        """An attempt to open a session that began then has failed."""
        met = self._met
        if met is None:
            met = self._met = _Absence(since)
        met.missed(since)
        self._present(_Absence(since), lambda each: each.goes_on(RESUMED_WITHIN)).missed(since)

    def reached(self) -> float | None:
        """Somebody has a session. For how many seconds the server was away, 0.0 if that is not
        known; None if that it is back is no news."""
        self._met = None
        absence = self._latest
        if absence.ended is None:
            absence.ended = time.monotonic()
        return absence.seconds() if absence.is_end_news() else None

    def seen(self) -> None:
        """The server is there, although nobody has a session yet."""
        self._met = None

    def away_for(self, memory: float) -> float:
        """The seconds since it was first met away; 0 if it is not known to be.

        memory: the seconds after which that is forgotten if nobody has met it away again.
        """
        met = self._met
        if met is None:
            return 0.0
        if time.monotonic() - met.last > memory:
            self._met = None
            return 0.0
        return met.seconds()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """For a block that connects, however long it waits for that."""
        self._known()
        waiter = _Waiter()
        try:
            self._waiting.add(waiter)
            yield
        finally:
            self._waiting.discard(waiter)

    def _known(self) -> _Absence:
        """The latest one, which is over if nobody has met it for long."""
        absence = self._latest
        is_old = time.monotonic() - absence.last > FORGOTTEN_AFTER
        if is_old and absence.ended is None and not self._waiting:
            absence.forget()
        return absence

    def _present(self, candidate: _Absence, goes_on: Callable[[_Absence], bool]) -> _Absence:
        """The latest one, if it goes on; else the candidate, or that of another thread."""
        absence = self._known()
        while absence is not candidate and not goes_on(absence):
            absence = absence.followed_by(candidate)
        # Only a short cut: from an older one, too, the way leads here.
        self._latest = absence
        return absence
