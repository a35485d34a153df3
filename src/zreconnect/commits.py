"""Whether a call has committed something, so that running it again would do that twice, and whether
it has lost something.

Connections tell it before a COMMIT leaves, and if it is known to have committed nothing, and when a
transaction is lost; what runs a call again watches it with `watched`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

Error = TypeVar("Error", bound=BaseException)

# Through whose frames an error has to go before it is the program's.
_PACKAGES = frozenset(
    {"transaction", "zreconnect", "zreconnect.integrations", "zreconnect.integrations.django"}
)


@dataclass
class Commits:
    """What is known of one run of a call.

    sent: how many transactions it has committed, or may have. lost: how many were lost in it.
    """

    sent: int = 0
    lost: int = 0


# Of the calls that are watched, one inside the other. A thread that such a call starts is outside.
_watched: ContextVar[tuple[Commits, ...]] = ContextVar("zreconnect_commits", default=())
# In how many announcements of events, one inside the other, the code is a subscriber, or called by
# one.
announcements: ContextVar[int] = ContextVar("zreconnect_announcements", default=0)


@contextmanager
def watched() -> Iterator[Commits]:
    """Watch the commits of the code in the block."""
    commits = Commits()
    token = _watched.set((*_watched.get(), commits))
    try:
        yield commits
    finally:
        _watched.reset(token)


def are_watched() -> bool:
    """Whether the code that asks is part of a call that is watched."""
    return bool(_watched.get())


def note() -> tuple[Commits, ...]:
    """A transaction is about to be committed. Returns where this is counted."""
    watched_by = _watched.get()
    for commits in watched_by:
        commits.sent += 1
    return watched_by


def note_loss() -> None:
    """A transaction is lost with its session."""
    for commits in _watched.get():
        commits.lost += 1


class _OfThread(threading.local):
    """untold: what the thread is yet to be told, at the end; empty if there is nothing. depth: in
    how many announcements the thread was when it sent its COMMIT."""

    def __init__(self) -> None:
        self.untold: list[Any] = []
        self.depth = 0


class OwnCommits:
    """What the threads that use a connection know, each of its own COMMITs there."""

    __slots__ = ("_local", "_sent")

    def __init__(self) -> None:
        self._local = _OfThread()
        self._sent: tuple[Commits, ...] = ()

    def sending(self) -> None:
        """A COMMIT is about to be sent."""
        self._local.depth = announcements.get()
        watched_by = _watched.get()
        for commits in watched_by:
            commits.sent += 1
        # Last: what an interrupt has left uncounted is not to be withdrawn.
        self._sent = watched_by

    def withdraw(self) -> None:
        """The COMMIT that was sent last has committed nothing, whoever has sent it, and when."""
        for commits in self._sent:
            commits.sent -= 1

    def leave_untold(self, outcome: Any, evidence: str = "") -> None:
        """The calling thread does not know yet what became of its COMMIT, or may not; so that a
        ``rollback()`` after an interrupt has to say so. evidence: as in `CommitOutcomeUnknown`."""
        self._local.untold = [(outcome, evidence)]

    def forget(self) -> None:
        """The calling thread goes on to another transaction."""
        self._local.untold = []

    def raising(self, unknown: Error) -> Error:
        """``unknown``, with which the calling thread learns what became of its COMMIT, unless
        something else is raised in its place before it has come out of here."""
        if announcements.get() > self._local.depth:
            # A subscriber is told, and not yet who has sent the COMMIT.
            return unknown
        # In one step, as `telling`.
        return [unknown, *map(self._local.untold.append, (unknown,))][0]  # type: ignore[return-value]

    def untold(self) -> Any:
        """What became of the calling thread's COMMIT, with the evidence, or the error that was to
        say so, if the thread may not know it; else None."""
        untold = self._local.untold
        if untold and isinstance(untold[-1], BaseException) and _has_come_out(untold[-1]):
            # Its traceback keeps the program's frames.
            untold.clear()
        # One that is being handled goes on.
        return untold[-1] if untold and untold[-1] is not sys.exc_info()[1] else None

    def telling(self) -> Iterator[None]:
        """What tells the thread of its commit when it is unpacked.

        That is the last that is done before the return to the program, in one step with it: what
        interrupts it comes before, and leaves it untold, or finds it told. No signal's handler runs
        between the unpacking and the return, but one would after a call, in Python 3.10.
        """
        return map(list.clear, (self._local.untold,))


def _has_come_out(error: BaseException) -> bool:
    """Whether the program has got an error."""
    trace = error.__traceback__
    return trace is None or trace.tb_frame.f_globals.get("__package__") not in _PACKAGES
