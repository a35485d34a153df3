"""What became of a transaction whose COMMIT may have been sent: asked in the next session.

It is found once. Who is told of a loss may use the connection meanwhile, also for other work, and
an interrupt may come when the next session has taken the place of the transaction's. So what there
is to be found, and has been, is kept in a `Finding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transaction.interfaces import TransientError

from zreconnect import events
from zreconnect.exceptions import ReconnectTimeout
from zreconnect.policy import RetryPolicy
from zreconnect.states import Event, State
from zreconnect.witness import Outcome
from zreconnect.work import Work


@dataclass
class Finding:
    """What is known of a transaction whose COMMIT may have been sent.

    number: the transaction's, see `Work`. evidence, xid: see `ICommitLookedUp`. outcome: None as
    long as nobody has found it out. problem: what has kept us from that. was_looked_up: whether the
    server was asked. is_parents: whether this is a forked child, and the transaction its parent's.
    """

    number: int
    evidence: str
    xid: int | None
    outcome: Outcome | None = None
    problem: BaseException | None = None
    was_looked_up: bool = False
    is_parents: bool = False

    def is_present(self, work: Work) -> bool:
        """Whether the connection has not gone on, to another transaction or process."""
        return self.number == work.number and not self.is_parents

    @property
    def known(self) -> Outcome:
        """The outcome, as far as it is known."""
        return self.outcome or Outcome.UNKNOWN

    def tell(self, server: str) -> None:
        """Announce it. server: its address."""
        if self.was_looked_up or self.known is Outcome.UNKNOWN:
            found = self.known.value, "COMMIT", self.evidence, self.xid
            events.announce(events.CommitLookedUp(server, *found))


def finding_of(work: Work) -> Finding:
    """That of the present transaction, of which a COMMIT may have been sent."""
    finding: Finding | None = work.finding
    if finding is None:
        work.link.note_committed()
        observer = work.link.observer
        finding = work.finding = Finding(work.number, observer.describe(), observer.xid)
    return finding


def find_out(work: Work, finding: Finding, policy: RetryPolicy) -> None:
    """What became of the transaction, whose session has ended, unless it is known.

    policy: for how long the next session is tried. Raises what is neither the driver's nor the
    policy's error, such as an interrupt.
    """
    if not finding.is_present(work):
        # A rollback has found out what could be.
        return
    if finding.outcome is None:
        _look_up(work, finding, policy)
    if finding.known is Outcome.UNKNOWN:
        work.link.observer.leave_evidence()


def _look_up(work: Work, finding: Finding, policy: RetryPolicy) -> None:
    link = work.link
    if link.has_committed():
        finding.outcome = Outcome.UNKNOWN
    elif work.state is State.DOOMED or not link.observer.may_have_committed:
        # It is doomed if COMMIT was refused.
        finding.outcome = Outcome.ABORTED
    elif link.options.witness is not None:

        def first_use(raw: Any) -> None:
            if finding.outcome is None:
                link.check_takes_writes(raw)
                finding.outcome = link.observer.outcome(raw)
            link.record_session(raw)

        def check() -> None:
            work.check_open()
            if not finding.is_present(work):
                raise link.driver.module.OperationalError(
                    "The connection was used meanwhile, by a subscriber of an event"
                )

        finding.was_looked_up = True
        try:
            work.open(first_use, policy, check)
        except lookup_errors(work) as error:
            finding.problem = error


def note_found(work: Work, finding: Finding) -> None:
    """Note what became of the transaction, unless the connection has gone on to another one."""
    if not finding.is_present(work):
        return
    if finding.known is Outcome.COMMITTED:
        work.committed()
    elif finding.known is Outcome.ABORTED:
        work.note(Event.FOUND_ABORTED)
    else:
        work.own.leave_untold(Outcome.UNKNOWN, finding.evidence)
        work.note(Event.NOT_FOUND)


def lookup_errors(work: Work) -> tuple[type[BaseException], ...]:
    """What keeps a look-up from its answer. All else is the program's.

    ``on_connect`` can use another connection and meet a disconnect of that one: as it is, it would
    have the work run again.
    """
    return work.link.driver.module.Error, ReconnectTimeout, TransientError
