"""What became of a transaction whose COMMIT may have been sent: asked in the next session."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transaction.interfaces import TransientError

from zreconnect import events
from zreconnect.exceptions import ReconnectTimeout
from zreconnect.policy import RetryPolicy
from zreconnect.states import State
from zreconnect.witness import Outcome
from zreconnect.work import Work


@dataclass(frozen=True)
class Finding:
    """What became of it.

    problem: what has kept us from knowing better. was_looked_up: whether the server was asked.
    evidence, xid: see `ICommitLookedUp`.
    """

    outcome: Outcome
    problem: BaseException | None = None
    was_looked_up: bool = False
    evidence: str = ""
    xid: int | None = None

    def tell(self, server: str) -> None:
        """Announce it. server: its address."""
        if self.was_looked_up or self.outcome is Outcome.UNKNOWN:
            found = self.outcome.value, "COMMIT", self.evidence, self.xid
            events.announce(events.CommitLookedUp(server, *found))


def find_out(work: Work, policy: RetryPolicy) -> Finding:
    """What became of the transaction whose COMMIT may have been sent in a session that has ended.

    policy: for how long the next session is tried. Raises what is neither the driver's nor the
    policy's error, such as an interrupt.
    """
    observer = work.link.observer
    # Before the next session takes the place of the transaction's.
    evidence, xid = observer.describe(), observer.xid
    finding = _look_up(work, policy)
    if finding.outcome is Outcome.UNKNOWN:
        observer.leave_evidence()
    return replace(finding, evidence=evidence, xid=xid)


def _look_up(work: Work, policy: RetryPolicy) -> Finding:
    link = work.link
    if link.has_committed():
        return Finding(Outcome.UNKNOWN)
    # It is doomed if COMMIT was refused.
    if work.state is State.DOOMED or not link.observer.may_have_written:
        return Finding(Outcome.ABORTED)
    if link.options.witness is None:
        return Finding(Outcome.UNKNOWN)
    outcome: Outcome | None = None

    def first_use(raw: Any) -> None:
        nonlocal outcome
        if outcome is None:
            link.check_takes_writes(raw)
            outcome = link.observer.outcome(raw)
        link.record_session(raw)

    problem: BaseException | None = None
    try:
        work.open(first_use, policy)
    except lookup_errors(work) as error:
        problem = error
    return Finding(outcome or Outcome.UNKNOWN, problem, was_looked_up=True)


def lookup_errors(work: Work) -> tuple[type[BaseException], ...]:
    """What keeps a look-up from its answer. All else is the program's.

    ``on_connect`` can use another connection and meet a disconnect of that one: as it is, it would
    have the work run again.
    """
    return work.link.driver.module.Error, ReconnectTimeout, TransientError
