"""Whether a call has committed something, so that running it again would do that twice.

Connections tell it before a COMMIT leaves, and if it is known to have committed nothing; what runs
a call again watches it with `watched`, or looks at the number of a connection's `OwnCommits`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass
class Commits:
    """What is known of one run of a call.

    sent: how many transactions it has committed, or may have.
    """

    sent: int = 0


# None outside such a call. A thread that the call starts is outside of it.
_watched: ContextVar[Commits | None] = ContextVar("zreconnect_commits", default=None)


@contextmanager
def watched() -> Iterator[Commits]:
    """Watch the commits of the code in the block."""
    commits = Commits()
    token = _watched.set(commits)
    try:
        yield commits
    finally:
        _watched.reset(token)


def are_watched() -> bool:
    """Whether the code that asks is part of a call that is watched."""
    return _watched.get() is not None


def note() -> Commits | None:
    """A transaction is about to be committed. Returns where this is counted."""
    commits = _watched.get()
    if commits is not None:
        commits.sent += 1
    return commits


class OwnCommits:
    """What the threads that use a connection know, each of its own COMMITs there."""

    __slots__ = ("_local", "_sent")

    def __init__(self) -> None:
        self._local = threading.local()
        self._sent: tuple[Commits | None, dict[str, Any]] = None, {"number": 0}

    def sending(self) -> None:
        """The calling thread is about to send a COMMIT."""
        own = vars(self._local)
        own["number"] = own.get("number", 0) + 1
        self._sent = note(), own

    def withdraw(self) -> None:
        """The COMMIT that was sent last has committed nothing, whoever has sent it, and when."""
        watched_by, own = self._sent
        own["number"] -= 1
        if watched_by is not None:
            watched_by.sent -= 1

    def number(self) -> int:
        """How many transactions the calling thread has committed, or may have."""
        number: int = vars(self._local).get("number", 0)
        return number

    def leave_untold(self, outcome: Any) -> None:
        """The calling thread does not know yet what became of its COMMIT, or may not; so that a
        ``rollback()`` after an interrupt has to say so."""
        self._local.untold = [outcome]

    def forget(self) -> None:
        """The calling thread goes on to another transaction."""
        self._local.untold = []

    def untold(self) -> Any:
        """What became of the calling thread's COMMIT, if it may not know it; else None."""
        untold = vars(self._local).get("untold")
        return untold[0] if untold else None

    def told(self, result: Result) -> Result:
        """``result``, with which the program learns of the commit: the last that is done for it."""
        untold = vars(self._local).setdefault("untold", [])
        # In one step: what interrupts it comes before, and leaves it untold, or finds it told. No
        # signal's handler runs between what the unpacking of map() does, and the return.
        return [result, *map(list.clear, (untold,))][0]  # type: ignore[return-value]
