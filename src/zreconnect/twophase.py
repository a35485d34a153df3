"""Two-phase commit: one transaction in several databases, committed in all of them or in none.

Each connection's part in the transaction is a branch. It is prepared when the transaction manager
asks for its vote, and committed when all have agreed. No log of decisions is kept: the branch that
votes first, and so is finished first, is the deciding one, and its COMMIT PREPARED is the decision.
`zreconnect.recovery` finds out what becomes of the branches of a process that has died.
"""

from __future__ import annotations

import itertools
import os
import re
import time
import uuid
from dataclasses import replace
from typing import Any, NoReturn

from transaction.interfaces import ITransaction

from zreconnect import events
from zreconnect.branch import CLUSTER, Branch, decided, end_branch, is_prepared
from zreconnect.datamanager import ConnectionDataManager
from zreconnect.drivers.base import Condition
from zreconnect.exceptions import CommitOutcomeUnknown, one_line
from zreconnect.finding import lookup_errors
from zreconnect.policy import RetryPolicy
from zreconnect.session import NO_SESSION
from zreconnect.siblings import siblings_of
from zreconnect.states import Event, Moment, Request, State
from zreconnect.witness import PATIENCE_WITH_ORPHANS, POLL_INTERVAL, Outcome
from zreconnect.work import PATIENCE_OF_ROLLBACK

COMMIT = "COMMIT PREPARED"
# PostgreSQL takes less than 200 characters as a gid.
LONGEST_DATABASE_NAME = 63
# A connection that was closed meanwhile has its branch ended all the same. Of one that could not be
# asked it is not certain that it is not prepared.
_IN_DOUBT = frozenset({State.PREPARING, State.PREPARED, State.DOOMED, State.CLOSED})


class Decision:
    """What the branches of one transaction share.

    outcome: None until COMMIT PREPARED of the deciding branch is about to be sent; UNKNOWN from
    then on, until there is an answer to it. is_told: whether the program was told the outcome.
    """

    def __init__(self, deciding: Branch) -> None:
        self.outcome: Outcome | None = None
        self.is_told = False
        self._deciding = deciding
        self._numbers = itertools.count()

    def next_branch(self) -> Branch:
        return replace(self._deciding, number=next(self._numbers))


class TwoPhaseDataManager(ConnectionDataManager):
    """One connection's branch of a transaction.

    It is prepared in ``tpc_vote``, committed in ``tpc_finish`` and rolled back in ``tpc_abort``,
    each in one statement that is sent again on new sessions, as the policy says, until there is an
    answer. What cannot be ended within the policy's time stays prepared and is left to `recover`.
    """

    commits_in_vote = False
    #: Whether aborting a part of what is decided to be committed says so.
    tells_in_abort = True

    def __init__(self, connection: Any, transaction_manager: Any) -> None:
        super().__init__(connection, transaction_manager)
        self._link = self.work.link
        self._driver = self.work.link.driver
        # What the transaction's branches share, and which of them this is, from the vote on.
        self.decision: Decision
        self.branch: Branch | None = None
        self._is_finishing = False
        self._process = os.getpid()

    def in_doubt(self) -> Branch | None:
        """The branch, if it is prepared, or may be, and is to be ended here."""
        # In a forked child it is the parent's to end.
        is_here = self.is_present() and self._process == os.getpid()
        return self.branch if is_here and self.work.state in _IN_DOUBT else None

    def commit(self, transaction: ITransaction) -> None:
        """Nothing is to be done between the first phase's begin and its vote."""

    def tpc_vote(self, transaction: ITransaction) -> None:
        """Prepare the transaction.

        Raises `DisconnectionError` if the session is lost and the transaction is not known to be
        prepared, and what the driver raises for a transaction that cannot be.
        """
        work, session = self.work, self._link.session
        work.ask(Request.COMMIT)
        if work.state is State.IDLE:
            return
        if self._driver.in_failed_transaction(session.raw):
            self.guard.commit()  # Raises, and says why.
        if not session.in_transaction():
            # By a statement. The server takes PREPARE TRANSACTION all the same, with a warning.
            work.note(Event.ENDED)
            work.ask(Request.COMMIT)
        with self.guard.asking():
            self.decision = self._join_decision(transaction)
        self.branch = branch = self.decision.next_branch()
        try:
            work.prepare(branch.gid)
        except BaseException as error:
            if not self.guard.meet(error, Moment.PREPARE):
                if work.state is not State.PREPARING and work.state is not State.PREPARED:
                    self.branch = None
                raise
            self._settle_lost_prepare(branch, error)

    def tpc_finish(self, transaction: ITransaction) -> None:
        """Commit what is prepared.

        Raises `CommitOutcomeUnknown` if it is the deciding branch and the server gives no answer
        within the policy's time, and the driver's OperationalError if somebody has rolled it back.
        """
        self._is_finishing = True
        branch = self.in_doubt()
        if branch is not None:
            self.work.own.sending()
            try:
                self._finish(branch)
            except Exception as error:
                # What interrupts it goes on as it is, and `abort` tells what became of it.
                is_settled = isinstance(error, CommitOutcomeUnknown) or (
                    self.decision.outcome is Outcome.ABORTED
                )
                if is_settled:
                    siblings_of(transaction).tell_part(self, error)
                raise
            self.has_committed = True
        elif self.branch is not None:
            # It is the parent process's.
            self.work.refuse_lost(self.work.losses)
        super().tpc_finish(transaction)

    def abort(self, transaction: ITransaction | None) -> None:
        branch = self.in_doubt()
        if branch is not None:
            self._abort_prepared(branch)
        super().abort(transaction)

    def sortKey(self) -> str:
        # Before the data managers that commit in one phase: these commit when they vote.
        return f"zreconnect:{id(self._connection)}"

    def _join_decision(self, transaction: ITransaction) -> Decision:
        """The transaction's decision; the first branch to ask for it is the one that decides."""
        try:
            decision: Decision = transaction.data(Decision)
        except KeyError:
            decision = Decision(self._as_deciding_branch())
            transaction.set_data(Decision, decision)
        return decision

    def _as_deciding_branch(self) -> Branch:
        ((system_identifier, timeline, xid, database),) = self._driver.query(
            self._link.session.raw,
            f"SELECT *, pg_current_xact_id()::text, current_database() FROM ({CLUSTER}) AS cluster",
        )
        hint = re.sub(r"[^A-Za-z0-9_]", "_", database)[:LONGEST_DATABASE_NAME]
        return Branch(uuid.uuid4().hex, 0, system_identifier, timeline, int(xid), hint)

    def _settle_lost_prepare(self, branch: Branch, error: BaseException) -> None:
        """Return if the transaction is prepared nevertheless."""
        found: bool | None = None

        def first_use(raw: Any) -> None:
            nonlocal found
            self._link.check_takes_writes(raw)
            found = self._is_there(raw, branch)

        try:
            self.work.open(first_use, self.work.patience.policy)
        except lookup_errors(self.work) as problem:
            # Nothing but a COMMIT PREPARED of ours would commit it, so it counts as not prepared.
            events.logger.warning(
                "Whether it is prepared is unknown: %s",
                one_line(problem),
                extra={"server": self._connection.server, "gid": branch.gid},
            )
        # The session is not kept: the observer cannot record it while the prepared transaction has
        # the ledger's row locked.
        self._link.end()
        self.work.note(Event.PREPARED if found else Event.FOUND_UNPREPARED)
        if found is False:
            self.branch = None
        if not found:
            self._raise_unprepared(branch, found, error)

    def _is_there(self, raw: Any, branch: Branch) -> bool:
        """Whether it is prepared, as another session shows it."""
        return is_prepared(self._driver, raw, branch.gid)

    def _raise_unprepared(
        self, branch: Branch, found: bool | None, error: BaseException
    ) -> NoReturn:
        self.guard.raise_lost(error, inside=True)

    def _finish(self, branch: Branch) -> None:
        if branch.number > 0:
            outcome, problem = self._end_prepared(branch, Outcome.COMMITTED)
            if outcome is Outcome.UNKNOWN:
                self._leave(branch, "although the transaction is committed", problem)
            return
        # Before it is sent, because an interrupt may come at any moment.
        self.decision.outcome = Outcome.UNKNOWN
        outcome, problem = self._end_prepared(branch, Outcome.COMMITTED)
        self.decision.outcome = outcome
        self.decision.is_told = True
        if outcome is Outcome.UNKNOWN:
            self._raise_unknown(branch, problem)
        if problem is not None or outcome is not Outcome.COMMITTED:
            events.announce(
                events.CommitLookedUp(
                    self._connection.server,
                    outcome.value,
                    COMMIT,
                    f"The deciding branch of its two-phase commit is {branch.gid}.",
                    branch.xid,
                )
            )
        if outcome is Outcome.ABORTED:
            self._raise_rolled_back(branch)

    def _evidence(self, branch: Branch) -> str:
        """What leads a person to the outcome."""
        return (
            f"The deciding branch of its two-phase commit is {branch.gid}. Run zreconnect recover "
            "with the DSNs of all databases that took part: it finds the outcome out, and shows "
            "what is still prepared."
        )

    def _raise_unknown(self, branch: Branch, problem: BaseException | None) -> NoReturn:
        evidence, own = self._evidence(branch), self.work.own
        own.leave_untold(Outcome.UNKNOWN, evidence)
        unknown = CommitOutcomeUnknown(self._connection.server, COMMIT, evidence)
        raise own.raising(events.told(unknown, branch.xid)) from problem

    def _raise_rolled_back(self, branch: Branch) -> NoReturn:
        # Not a DisconnectionError: data managers that finished before may have committed.
        raise self._driver.module.OperationalError(
            f"The transaction is not committed: {self._connection.server} has not got what was "
            f"prepared as {branch.gid} any more. Somebody has rolled it back, for example by "
            "zreconnect recover, or a failover has lost it."
        )

    def _abort_prepared(self, branch: Branch) -> None:
        if self.work.state is State.PREPARING:
            # The vote was interrupted, and PREPARE TRANSACTION may have arrived or not.
            self._link.end()
        decided = self.decision.outcome
        if decided is Outcome.COMMITTED:
            self._finish(branch)
            if not self.tells_in_abort and not self._is_finishing:
                self.work.own.forget()
            return
        wanted, why = Outcome.ABORTED, "although the transaction is aborted"
        if decided is Outcome.UNKNOWN:
            why = "because it is not known whether the transaction is committed"
            if self.decision.is_told or not self._is_finishing:
                self._leave(branch, why)
                return
            # COMMIT PREPARED was interrupted, and may have arrived.
            wanted = Outcome.COMMITTED
        policy = self.work.patience.policy
        if wanted is Outcome.COMMITTED:
            policy = policy.within(PATIENCE_OF_ROLLBACK)
        outcome, problem = self._end_prepared(branch, wanted, policy)
        self.decision.outcome = outcome if wanted is Outcome.COMMITTED else decided
        if outcome is Outcome.UNKNOWN:
            if wanted is Outcome.COMMITTED:
                self.work.own.leave_untold(outcome, self._evidence(branch))
            self._leave(branch, why, problem)

    def _end_prepared(
        self, branch: Branch, wanted: Outcome, policy: RetryPolicy | None = None
    ) -> tuple[Outcome, BaseException | None]:
        """Commit or roll back what is prepared, reconnecting if need be.

        policy: how long; that of the connection without it. Returns what became of it, and the last
        error that was met.
        """
        link, options = self._link, self._link.options
        outcome = Outcome.UNKNOWN
        problem: BaseException | None = None

        def first_use(raw: Any) -> None:
            nonlocal outcome
            link.check_takes_writes(raw)
            outcome = self._end_observed(raw, branch, wanted)
            link.record_session(raw)

        session = link.session
        if session is not NO_SESSION:
            try:
                with session.watch.awaiting(options.response_timeout):
                    outcome = self._end_observed(session.raw, branch, wanted)
            except BaseException as error:
                if not self.guard.meet(error, Moment.END_BRANCH):
                    raise
                problem = error
        if link.session is NO_SESSION:
            try:
                self.work.open(first_use, policy or self.work.patience.policy)
            except lookup_errors(self.work) as error:
                problem = error
        if outcome is Outcome.COMMITTED:
            # First: what interrupts the rest must not hide it from the other branches.
            self.decision.outcome = outcome
            self.work.own.leave_untold(outcome)
        elif outcome is Outcome.ABORTED:
            self.work.own.forget()
        if outcome is not Outcome.UNKNOWN:
            self._release()
        return outcome, problem

    def _end_observed(self, raw: Any, branch: Branch, wanted: Outcome) -> Outcome:
        outcome = self._end_in_session(raw, branch, wanted)
        if outcome is Outcome.COMMITTED:
            # If a failover has lost this branch, the next record of a session tells.
            self._link.observer.acknowledged()
        return outcome

    def _end_in_session(self, raw: Any, branch: Branch, wanted: Outcome) -> Outcome:
        deadline = time.monotonic() + PATIENCE_WITH_ORPHANS
        while True:
            try:
                end_branch(self._driver, raw, branch.gid, wanted)
                return wanted
            except self._driver.module.Error as error:
                condition = self._driver.condition(error)
                if condition is Condition.UNDEFINED_OBJECT:
                    return self._outcome_without(raw, branch, wanted)
                # It is busy: another server process is about to end it.
                is_busy = condition is Condition.OBJECT_NOT_IN_PREREQUISITE_STATE
                if not is_busy or time.monotonic() > deadline:
                    raise
            time.sleep(POLL_INTERVAL)

    def _outcome_without(self, raw: Any, branch: Branch, wanted: Outcome) -> Outcome:
        """What became of a branch that is not prepared any more."""
        if branch.number > 0 or wanted is Outcome.ABORTED:
            # Whoever has ended it, a lost request of ours or recover(), had but this to do.
            return wanted
        outcome = decided(self._driver, raw, branch)
        if outcome is Outcome.UNKNOWN:
            # After a failover a ledger knows more.
            outcome = self._link.observer.outcome(raw)
        return outcome

    def _leave(self, branch: Branch, why: str, problem: BaseException | None = None) -> None:
        """Let go of what may stay prepared."""
        error = "" if problem is None else f" The last error was: {one_line(problem)}"
        events.logger.error(
            "%s may still be prepared in %s, %s. To end it, run zreconnect recover with the DSNs "
            "of all databases that took part.%s",
            branch.gid,
            self._connection.server,
            why,
            error,
            extra={"server": self._connection.server, "gid": branch.gid},
        )
        # Prepared, it has its ledger's row locked: the connection needs another one.
        self._link.replace_observer()
        self._release()

    def _release(self) -> None:
        if self.work.state is State.CLOSED:
            self._link.end()
        self.work.branch_ended()
        self.branch = None
