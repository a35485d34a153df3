"""The two-phase calls of DB-API, for programs that coordinate a transaction themselves.

``tpc_begin`` makes the connection's transaction part of a larger one, as joining a transaction
manager's does: what ends it is not ``commit()`` but ``tpc_commit()``. The part is prepared and
ended as those of `zreconnect.twophase` are, under the program's own name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from zreconnect import events
from zreconnect.branch import Branch, end_branch, is_prepared
from zreconnect.documented import documented_by
from zreconnect.exceptions import CommitOutcomeUnknown, one_line
from zreconnect.finding import lookup_errors
from zreconnect.interfaces import ACTIVE, IReconnectingConnection
from zreconnect.overrides import end_by_class
from zreconnect.settings import SettingsOfSessions
from zreconnect.states import Moment, Request, State
from zreconnect.twophase import COMMIT, Decision, TwoPhaseDataManager
from zreconnect.witness import Outcome

PREPARE = "PREPARE TRANSACTION"
# By whether what was to be committed under a name is still prepared. That it is proves nothing: a
# COMMIT PREPARED that waits for a standby shows as that, and one may be on its way.
_EVIDENCE = {
    True: "It was still prepared afterwards: tpc_commit() with its name can be called again.",
    False: "Nothing is prepared under its name any more.",
    None: "tpc_commit() with its name can be called again, and finds what is still prepared.",
}


@dataclass(frozen=True)
class NamedBranch(Branch):
    """A branch with a name of the program's."""

    name: str = ""

    @property
    def gid(self) -> str:
        return self.name


class OwnBranch(TwoPhaseDataManager):
    """The part that a connection has in a transaction which the program coordinates.

    xid: its name, of the module's class or as a string.
    """

    commit_refused = "commit() inside a two-phase transaction: end it with tpc_commit()"

    def __init__(self, connection: Any, xid: Any) -> None:
        super().__init__(connection, connection)
        self._name = str(xid)

    def is_prepared(self) -> bool:
        return self.work.state is State.PREPARED

    def _join_decision(self, transaction: Any) -> Decision:
        return Decision(NamedBranch(**vars(self._as_deciding_branch()), name=self._name))

    def _raise_unprepared(
        self, branch: Branch, found: bool | None, error: BaseException
    ) -> NoReturn:
        if found is None:
            unknown = CommitOutcomeUnknown(
                self._connection.server,
                PREPARE,
                f"tpc_rollback() rolls it back if it is prepared, as {branch.gid}.",
            )
            raise events.told(unknown, branch.xid) from error
        super()._raise_unprepared(branch, found, error)

    def _evidence(self, branch: Branch) -> str:
        return (
            f"tpc_commit() can be called again. What is still prepared as {branch.gid} is not "
            "committed."
        )

    def _abort_prepared(self, branch: Branch) -> None:
        if self.work.state is State.PREPARING:
            self._link.end()
        outcome, problem = self._end_prepared(branch, Outcome.ABORTED)
        if outcome is Outcome.COMMITTED:
            # tpc_commit() was interrupted, or had no answer.
            unknown = CommitOutcomeUnknown(self._connection.server, COMMIT, outcome=outcome.value)
            raise self.work.own.raising(unknown)
        if outcome is Outcome.UNKNOWN:
            self.let_go()
            if self._is_finishing or problem is None:
                self._raise_unknown(branch, problem)
            raise self._driver.module.OperationalError(
                f"{branch.gid} may still be prepared in {self._connection.server}: roll it back "
                f"later, with tpc_rollback({branch.gid!r}). The driver said: {one_line(problem)}"
            ) from problem

    def _is_there(self, raw: Any, branch: Branch) -> bool:
        return is_prepared(self._driver, raw, branch.gid, branch.xid)

    def _end_in_session(self, raw: Any, branch: Branch, wanted: Outcome) -> Outcome:
        # In another session than it was prepared in, the name can be that of somebody else's.
        if raw is not self._link.session.raw and not self._is_there(raw, branch):
            return self._outcome_without(raw, branch, wanted)
        return super()._end_in_session(raw, branch, wanted)

    def _outcome_without(self, raw: Any, branch: Branch, wanted: Outcome) -> Outcome:
        if wanted is Outcome.ABORTED and not self._is_finishing:
            return wanted
        return super()._outcome_without(raw, branch, Outcome.COMMITTED)

    def let_go(self) -> None:
        """Leave what is prepared to whoever knows its name."""
        self._link.replace_observer()
        self._release()


@documented_by(IReconnectingConnection)
class TwoPhaseCalls(SettingsOfSessions):
    """The part of a `ReconnectingConnection` that has the two-phase calls."""

    __slots__ = ()

    def tpc_begin(self, xid: Any) -> None:
        work, module = self.work, self.work.link.driver.module
        if not work.link.driver.supports_two_phase:
            raise module.NotSupportedError("tpc_begin(): transactions cannot be prepared")
        if work.join is not None:
            raise module.ProgrammingError(
                "tpc_begin() of a connection that takes part in a transaction manager's "
                "transactions, which commits them; use a connection of its own"
            )
        if work.link.settings.autocommit:
            raise module.ProgrammingError("tpc_begin() in autocommit mode")
        connection: Any = self
        connection.begin()
        work.become_part(OwnBranch(self, xid))

    def tpc_prepare(self) -> None:
        with self.guard.in_turn():
            branch = self._own_branch("tpc_prepare()")
            try:
                branch.tpc_vote(None)
            finally:
                self._leave_ended(branch)

    def tpc_commit(self, xid: Any = None) -> None:
        work = self.work
        with self.guard.in_turn():
            if xid is not None:
                self._end_by_name("tpc_commit()", str(xid), Outcome.COMMITTED)
            else:
                branch = self._own_branch("tpc_commit()")
                try:
                    if not branch.is_prepared():
                        self.guard.commit()
                    # It is told here, at the end.
                    work.told_by_call = work.number
                    branch.tpc_finish(None)
                finally:
                    self._leave_ended(branch)
        _ = [*work.own.telling()]

    def tpc_rollback(self, xid: Any = None) -> None:
        with self.guard.in_turn():
            if xid is not None:
                self._end_by_name("tpc_rollback()", str(xid), Outcome.ABORTED)
                return
            branch = self._own_branch("tpc_rollback()")
            try:
                branch.abort(None)
            finally:
                self._leave_ended(branch)

    def tpc_recover(self) -> Any:
        work = self.work
        with self.guard.in_turn():
            work.ask(Request.LOOK)
            if work.state is State.IDLE:
                self.guard.need_live_session(asks=True)
            with self.guard.asking():
                return work.link.session.raw.tpc_recover()

    @property
    def status(self) -> Any:
        """As in psycopg2."""
        module = self.work.link.driver.module
        if self.work.state is State.PREPARED and hasattr(module, "extensions"):
            return module.extensions.STATUS_PREPARED
        connection: Any = self
        return connection.__getattr__("status")

    def reset(self) -> None:
        if isinstance(self.work.member, OwnBranch):
            with self.guard.in_turn():
                branch = self.work.member
                if branch.is_prepared():
                    branch.let_go()
                else:
                    branch.abort(None)
                self._leave_ended(branch)
        super().reset()

    def roll_back(self) -> None:
        """Roll back, for a thread that has the turn; what is prepared has calls of its own."""
        member = self.work.member
        if isinstance(member, OwnBranch) and not member.is_prepared():
            member.abort(None)
        else:
            end_by_class(self.guard, "rollback", self.guard.roll_back)

    def refuse_rollback(self) -> None:
        """Raise the driver's ProgrammingError if ``rollback()`` does not end the transaction."""
        if isinstance(self.work.member, OwnBranch) and self.work.state.shown == ACTIVE:
            raise self.work.link.driver.module.ProgrammingError(
                "rollback() inside a two-phase transaction: end it with tpc_rollback()"
            )

    def _own_branch(self, what: str) -> OwnBranch:
        member = self.work.member
        if self.work.state is State.CLOSED:
            self.work.ask(Request.LOOK)
        if not isinstance(member, OwnBranch):
            # An interrupt can have kept the thread from giving it.
            self.work.give_turn()
            self.guard.tell()
            raise self.work.link.driver.module.ProgrammingError(
                f"{what} outside a two-phase transaction: call tpc_begin() first"
            )
        return member

    def _leave_ended(self, branch: OwnBranch) -> None:
        if self.work.state is State.IDLE:
            self.work.leave(branch)

    def _end_by_name(self, what: str, gid: str, wanted: Outcome) -> None:
        """End what anybody has prepared under that name."""
        work = self.work
        work.ask(Request.BEGIN, f"{what} of another transaction")
        self.guard.need_live_session(asks=True)
        if wanted is Outcome.COMMITTED:
            work.own.sending()
            work.own.leave_untold(Outcome.UNKNOWN)
        try:
            with self.guard.asking(Moment.AUTOCOMMIT):
                end_branch(work.link.driver, work.link.session.raw, gid, wanted)
        except CommitOutcomeUnknown as unknown:
            is_there, problem = self._is_still_prepared(gid)
            if wanted is Outcome.COMMITTED:
                raise work.own.raising(
                    CommitOutcomeUnknown(work.link.server.address, COMMIT, _EVIDENCE[is_there])
                ) from (problem or unknown)
            if is_there:
                self.guard.raise_lost(unknown.__cause__ or unknown, inside=True)
            if problem is not None:
                raise problem from unknown
        except work.link.driver.module.Error:
            if wanted is Outcome.COMMITTED:
                work.own.withdraw()
                work.own.forget()
            raise

    def _is_still_prepared(self, gid: str) -> tuple[bool | None, BaseException | None]:
        """Whether that name is still there, or None and what has kept us from knowing."""
        link = self.work.link
        found: bool | None = None

        def first_use(raw: Any) -> None:
            nonlocal found
            link.check_takes_writes(raw)
            found = is_prepared(link.driver, raw, gid)
            link.record_session(raw)

        try:
            self.work.open(first_use, self.work.patience.policy, self.work.check_open)
            return found, None
        except lookup_errors(self.work) as problem:
            return found, problem
