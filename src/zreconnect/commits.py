"""Whether a call has committed something, so that running it again would do that twice.

Connections tell it with `note`, before a COMMIT leaves, and with `withdraw`, if it is known to have
committed nothing; what runs a call again watches it with `watched`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


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
    """A transaction is about to be committed. Returns what `withdraw` is to be called with."""
    commits = _watched.get()
    if commits is not None:
        commits.sent += 1
    return commits


def withdraw(noted: Commits | None) -> None:
    """A transaction is not committed that was noted before, perhaps by an earlier call."""
    if noted is not None:
        noted.sent -= 1
