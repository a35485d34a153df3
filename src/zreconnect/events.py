"""What is announced through zope.event, and logged as ``zreconnect``, when a connection is lost."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transaction.interfaces import TransientError
from zope.event import notify

from zreconnect import interfaces
from zreconnect.advice import advice
from zreconnect.commits import announcements
from zreconnect.documented import implements
from zreconnect.exceptions import (
    CommitOutcomeUnknown,
    DisconnectionError,
    attempts_made,
    one_line,
)

logger = logging.getLogger("zreconnect")


@dataclass(frozen=True)
class Event:
    """Common to all. is_news: whether the process has not told the same in the same outage."""

    #: The level of the line in the log, if it is news.
    usual_level: ClassVar[int] = logging.WARNING
    is_news: bool = field(default=True, kw_only=True)

    @property
    def level(self) -> int:
        """That of the line in the log."""
        return self.usual_level if self.is_news else logging.DEBUG

    def fields(self) -> dict[str, Any]:
        """What the line in the log has in ``extra``."""
        found: dict[str, Any] = {"event_name": type(self).__name__}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            found[each.name] = one_line(value) if isinstance(value, BaseException) else value
        return found


@dataclass(frozen=True)
class ConnectionEvent(Event):
    """Something happened to a connection. server: the server's address without password."""

    server: str


@dataclass(frozen=True)
@implements(interfaces.IConnectionLost)
class ConnectionLost(ConnectionEvent):
    error: BaseException
    state: str

    def __str__(self) -> str:
        return f"Lost the connection to {self.server} while {self.state}: {one_line(self.error)}"


@dataclass(frozen=True)
@implements(interfaces.IConnectionAttemptFailed)
class ConnectionAttemptFailed(ConnectionEvent):
    usual_level: ClassVar[int] = logging.DEBUG
    attempt: int
    seconds: float
    pause: float
    error: BaseException

    def __str__(self) -> str:
        return (
            f"Attempt {self.attempt} to connect to {self.server} failed after "
            f"{self.seconds:.1f} seconds, next one in {self.pause:.2f}: {one_line(self.error)}"
        )


@dataclass(frozen=True)
@implements(interfaces.IWaiting)
class Waiting(ConnectionEvent):
    seconds: float
    waiting: int
    error: BaseException

    def __str__(self) -> str:
        since = f" for {self.seconds:.0f} seconds" if self.seconds >= 1 else ""
        who = "1 thread waits" if self.waiting == 1 else f"{self.waiting} threads wait"
        return (
            f"No connection to {self.server}{since}, {who} for it. {advice(self.error)}. The last "
            f"error was: {one_line(self.error)}"
        )


@dataclass(frozen=True)
@implements(interfaces.IReconnected)
class Reconnected(ConnectionEvent):
    attempts: int
    seconds: float
    away: float = 0.0

    def __str__(self) -> str:
        return (
            f"Connected again to {self.server} after {attempts_made(self.attempts)} "
            f"and {self.seconds:.1f} seconds{_away(self)}"
        )


@dataclass(frozen=True)
@implements(interfaces.ICommitLookedUp)
class CommitLookedUp(ConnectionEvent):
    outcome: str
    request: str = "COMMIT"
    evidence: str = ""
    xid: int | None = None

    @property
    def level(self) -> int:
        """That of the line in the log."""
        return logging.ERROR if self.outcome == "unknown" else logging.WARNING

    def __str__(self) -> str:
        # What is known needs no evidence.
        evidence = f". {self.evidence}".rstrip(". ") if self.outcome == "unknown" else ""
        return (
            f"The outcome of {self.request} whose answer from {self.server} was lost: "
            f"{self.outcome}{evidence}"
        )


@dataclass(frozen=True)
@implements(interfaces.ICommittedInPart)
class CommittedInPart(ConnectionEvent):
    usual_level: ClassVar[int] = logging.ERROR
    committed: tuple[str, ...]
    not_committed: tuple[str, ...]
    unknown: tuple[str, ...]
    error: BaseException

    def __str__(self) -> str:
        return one_line(self.error)


@dataclass(frozen=True)
@implements(interfaces.IHistoryChanged)
class HistoryChanged(ConnectionEvent):
    evidence: str
    is_missing: bool | None

    @property
    def level(self) -> int:
        """That of the line in the log."""
        return {True: logging.ERROR, False: logging.INFO, None: logging.WARNING}[self.is_missing]

    def __str__(self) -> str:
        if self.is_missing:
            return (
                f"Acknowledged work is missing in {self.server}: {self.evidence}. Find out what "
                "was committed shortly before the last failover, restore or crash, by any "
                "connection, and do it again; a former primary has it until it is overwritten"
            )
        return f"The history of {self.server} has changed: {self.evidence}" + (
            ". What was committed shortly before may be missing" if self.is_missing is None else ""
        )


@dataclass(frozen=True)
@implements(interfaces.IGaveUp)
class GaveUp(ConnectionEvent):
    usual_level: ClassVar[int] = logging.ERROR
    attempts: int
    seconds: float
    error: BaseException
    away: float = 0.0

    def __str__(self) -> str:
        return (
            f"Gave up connecting to {self.server} after {attempts_made(self.attempts)} and "
            f"{self.seconds:.1f} seconds{_away(self)}. {advice(self.error)}. The last error was: "
            f"{one_line(self.error)}"
        )


@dataclass(frozen=True)
@implements(interfaces.IRunAgain)
class RunAgain(Event):
    function: str
    runs: int
    seconds: float
    pause: float
    error: BaseException

    @property
    def level(self) -> int:
        """That of the line in the log."""
        # Two units of work that are in each other's way are no fault of anything.
        is_conflict = isinstance(self.error, TransientError) and not isinstance(
            self.error, DisconnectionError
        )
        return min(super().level, logging.INFO) if is_conflict else super().level

    def __str__(self) -> str:
        return (
            f"Run {self.runs} of {self.function} failed after {self.seconds:.1f} seconds, "
            f"next one in {self.pause:.2f}: {one_line(self.error)}"
        )


@dataclass(frozen=True)
@implements(interfaces.IGaveUpRunning)
class GaveUpRunning(Event):
    usual_level: ClassVar[int] = logging.ERROR
    function: str
    runs: int
    seconds: float
    error: BaseException
    reason: str

    def __str__(self) -> str:
        times = "once" if self.runs == 1 else f"{self.runs} times"
        return (
            f"{self.function} was run {times} in {self.seconds:.1f} seconds, and is not run again: "
            f"{self.reason}"
        )


def _away(event: Reconnected | GaveUp) -> str:
    # Who began to wait later has waited for less.
    return f"; it was away for {event.away:.0f} seconds" if event.away > event.seconds + 1 else ""


def announce(event: Event) -> None:
    """Log the event and notify its subscribers.

    A subscriber that raises is logged and not let through: it must not keep a connection from
    coming back.
    """
    logger.log(event.level, "%s", event, extra=event.fields())
    try:
        token = announcements.set(announcements.get() + 1)
        try:
            notify(event)
        finally:
            announcements.reset(token)
    except Exception as error:
        # What is raised right here is the program's, by a signal's handler.
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            raise
        logger.exception("A subscriber failed on: %s", event, extra=event.fields())


def told(unknown: CommitOutcomeUnknown, xid: int | None = None) -> CommitOutcomeUnknown:
    """The error, which is announced. xid: the transaction's id, if it is known."""
    found = unknown.outcome, unknown.request, unknown.evidence
    announce(CommitLookedUp(unknown.server, *found, xid))
    return unknown
