"""What an error means at the moment at which it is met, and what follows from it.

`Guard.meet` is the only handler. It is told what was raised and what was under way, a `Moment`;
`zreconnect.states.verdict` says what the error means, and the table `CONSEQUENCES` what follows:
what is noted, what becomes of the session, and how the error goes on.

The other methods are a connection's requests, each with its moment.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from transaction.interfaces import TransientError

from zreconnect import beginning, commits, events
from zreconnect.exceptions import (
    CommitOutcomeUnknown,
    DisconnectionError,
    ReconnectTimeout,
    make_transient,
    one_line,
)
from zreconnect.finding import Finding, find_out, finding_of, note_found
from zreconnect.interfaces import ACTIVE
from zreconnect.session import NO_SESSION
from zreconnect.states import (
    CONSEQUENCES,
    Answer,
    Event,
    Keeping,
    Moment,
    Request,
    State,
    Then,
    leads_to_idle,
    verdict,
)
from zreconnect.witness import Outcome
from zreconnect.work import PATIENCE_OF_ROLLBACK, Work

# For a thread that has the connection already.
_MINE = contextlib.nullcontext()


class Guard:
    """A connection's requests, and what becomes of their errors.

    work: what is known of the present transaction.
    """

    __slots__ = ("_driver", "_link", "work")

    def __init__(self, work: Work) -> None:
        self.work = work
        self._link = work.link
        self._driver = work.link.driver

    # Errors

    def meet(self, error: BaseException, moment: Moment, raw_cursor: Any = None) -> bool:
        """Whether ``error`` is settled; if not, it is to be raised as it is.

        raw_cursor: that of the statement that was under way, if there is one. Raises what takes the
        error's place.
        """
        link, state = self._link, self.work.state
        if state is State.CLOSED:
            return self._meet_closed(moment, error)
        if moment is Moment.STATEMENT:
            moment = self._kind_of_statement(raw_cursor)
        if self._driver.is_transient(error) and (state is State.IDLE or not link.has_committed()):
            make_transient(error)
        found = verdict(error, link.server, link.session.raw, link.is_refused)
        # If the session goes on, an interrupt may have left a wait behind.
        link.session.watch.reset()
        event, keeping, then = CONSEQUENCES[moment][found]
        if event is Event.NOT_FOUND:
            link.note_committed()
            evidence, xid = link.observer.leave_evidence(), link.observer.xid
            self.work.own.leave_untold(Outcome.UNKNOWN, evidence)
        self._follow(event, keeping, error)
        if then is Then.DISCONNECTION:
            self.raise_lost(error, inside=state is not State.IDLE)
        if then is Then.UNKNOWN:
            if state is State.IDLE:
                said = f"The driver said: {one_line(error)}"
                raise self._unknown("a statement in autocommit mode", said) from error
            raise self.work.own.raising(self._unknown("COMMIT", evidence, xid)) from error
        return then is Then.SETTLED

    def _follow(self, event: Event | None, keeping: Keeping, error: BaseException) -> None:
        """Note the event, and do what is to be done about the session."""
        work, shown = self.work, self.work.state.shown
        if event is Event.NOT_BEGUN:
            if work.patience.is_shared:
                work.patience.has_failed(error)
            if not work.is_explicit:
                if keeping is Keeping.TOLD:
                    # The statement was under way.
                    event, shown = Event.NOT_REACHED_FOR_STATEMENT, ACTIVE
                elif isinstance(error, (DisconnectionError, ReconnectTimeout)):
                    event = Event.NOT_REACHED_FOR_STATEMENT
                else:
                    event = Event.NOT_BEGUN_FOR_STATEMENT
        # No session outlives the note that there is no transaction, and none is missing where the
        # note is that there is one, whatever interrupts this.
        is_last = event is not None and leads_to_idle(event, work.state)
        if event is not None and not is_last:
            work.note(event)
        if keeping is Keeping.TOLD:
            self._link.lost(error, shown)
        elif keeping is Keeping.ENDED:
            was_open = self._link.session is not NO_SESSION
            self._link.end()
            if was_open:
                events.logger.info(
                    "A request to %s was interrupted, and its session is ended: %s",
                    self._link.server.address,
                    type(error).__name__,
                    extra={"server": self._link.server.address},
                )
        if event is not None and is_last:
            work.note(event)

    def _kind_of_statement(self, raw_cursor: Any) -> Moment:
        if self.work.state is State.IDLE:
            return Moment.STATEMENT if raw_cursor is None else Moment.AUTOCOMMIT
        if self._link.has_committed() or (
            raw_cursor is not None and self._driver.is_commit(raw_cursor)
        ):
            return Moment.COMMITTING
        return Moment.STATEMENT

    def _meet_closed(self, moment: Moment, error: BaseException) -> bool:
        """Another thread has closed the connection meanwhile."""
        link = self._link
        link.end()
        if moment is Moment.COMMIT and isinstance(error, self._driver.module.Error):
            evidence = f"Another thread has closed the connection. {link.observer.leave_evidence()}"
            raise self._unknown("COMMIT", evidence) from error
        return False

    def _unknown(self, request: str, evidence: str, xid: int | None = None) -> CommitOutcomeUnknown:
        """The error, which is announced."""
        return events.told(CommitOutcomeUnknown(self._link.server.address, request, evidence), xid)

    def raise_lost(self, error: BaseException, inside: bool) -> NoReturn:
        raise self._driver.disconnection_error(
            f"The connection to {self._link.server.address} was lost"
            + (" inside a transaction, and nothing of it is committed" if inside else "")
            + f". Roll back (or abort) and run the work again. The driver said: {one_line(error)}",
            (type(error), error, error.__traceback__),
        ) from error

    @contextlib.contextmanager
    def asking(
        self,
        moment: Moment = Moment.STATEMENT,
        raw_cursor: Any = None,
        in_block: bool = False,
        waits: bool = True,
    ) -> Iterator[None]:
        """For a block that asks the server, and for its errors.

        in_block: whether this is within a ``with`` block of the driver's, at whose end it shows
        whether the session is at rest. waits: whether an answer is waited for.
        """
        limit = self._link.options.response_timeout if waits else None
        self.work.has_only_read = False
        if self._link.readers:
            self._link.keep_rows_before_request(self.work.state is State.ACTIVE)
        try:
            with self._link.session.watch.awaiting(limit):
                yield
        except BaseException as error:
            if in_block and not isinstance(error, self._driver.module.Error):
                raise
            if not self.meet(error, moment, raw_cursor):
                raise

    # Beginning

    def need_transaction(self, statement: Any = None) -> None:
        """Begin a transaction if a statement needs one; else see that there is a session.

        statement: if it is known. Raises what `begin` raises, and what refuses the statement.
        """
        work = self.work
        if work.member is not None:
            self.end_forgotten()
        if work.state is not State.IDLE and work.ask(Request.STATEMENT) is Answer.GRANTED:
            return
        if work.is_autocommit():
            self.need_live_session()
            commits.note()
        elif not work.implicit_begin:
            raise self._driver.module.ProgrammingError(
                "There is no transaction: call begin() first (implicitBegin is False)"
            )
        else:
            self.begin(explicit=False, statement=statement)

    def begin(self, explicit: bool, statement: Any = None) -> None:
        """Begin a transaction; reconnect if need be. explicit: not for a statement.

        Raises `DisconnectionError`, `ReconnectTimeout`, and the driver's errors.
        """
        work, started = self.work, time.monotonic()
        self._link.leave_to_parent()
        if work.join is not None:
            work.join()
        policy = work.patience.begins(work.waited)
        try:
            if beginning.begin(work, explicit, policy, statement):
                return
        except BaseException as error:
            if not self.meet(error, Moment.BEGIN):
                raise
        try:
            left = work.patience.left(time.monotonic() - started, policy)
            beginning.begin_in_new_session(work, left)
        except BaseException as error:
            self.meet(error, Moment.CONNECT)
            raise

    def begin_along(
        self, raw_cursor: Any, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> bool:
        """Begin a transaction along with its first statement, in one round trip.

        arguments, options: those of the cursor's ``execute()``. Whether that was done; else the
        statement has not been executed, and there is no transaction.
        """
        work = self.work
        if work.join is not None:
            work.join()
        try:
            has_begun, error = beginning.begin_along(work, raw_cursor, arguments, options)
        except BaseException as problem:
            self.meet(problem, Moment.BEGIN_WITH)
            raise
        if error is not None:
            try:
                self.meet(error, Moment.STATEMENT, raw_cursor)
                raise error
            finally:
                # Its traceback refers to this frame.
                del error
        return has_begun

    def need_live_session(self, asks: bool = False) -> None:
        """Have a session outside a transaction, where no BEGIN finds out whether it is lost.

        asks: whether the server is asked also if nothing has arrived, such as the session's end.
        """
        self._link.leave_to_parent()
        session = self._link.session
        is_there = session is not NO_SESSION and self._driver.has_sessions
        if is_there and (asks or not session.watch.is_quiet()):
            self._link.keep_rows()
            is_inside = self._driver.in_transaction(session.raw)
            policy = self.work.patience.begins(self.work.waited)
            try:
                with session.watch.awaiting(beginning.limit_of_begin(self.work, policy)):
                    self._driver.query(session.raw, "SELECT 1")
            except BaseException as error:
                # Statements of the program's may have begun a transaction.
                if not self.meet(error, Moment.STATEMENT if is_inside else Moment.OURS):
                    raise
        self.work.need_session()

    # Ending

    def commit(self) -> None:
        """Commit, also for a transaction manager; does nothing outside a transaction.

        Raises what `IReconnectingConnection.commit` promises.
        """
        work = self.work
        if work.state is not State.ACTIVE:
            try:
                work.ask(Request.COMMIT)
                return
            finally:
                if work.state in (State.ENDED, State.CONFLICT, State.TORN):
                    work.note(Event.REFUSED)
        try:
            work.commit()
        except BaseException as error:
            finding = finding_of(work)
            if not self.meet(error, Moment.COMMIT):
                raise
            self._settle_lost_commit(error, finding)

    def roll_back(self) -> None:
        """Roll back, and be idle.

        Raises `CommitOutcomeUnknown` if a COMMIT was interrupted before, and is not known to have
        failed; the connection is idle nevertheless.
        """
        work = self.work
        answer = work.ask(Request.ROLLBACK)
        if answer is Answer.NOTHING:
            self.tell()
            return
        if answer is Answer.SETTLES:
            self._settle_interrupted_commit()
            return
        if answer is Answer.LETS_GO:
            self._link.end()
        else:
            try:
                work.roll_back()
            except BaseException as error:
                if not self.meet(error, Moment.ROLL_BACK):
                    raise
        work.rolled_back()
        if answer is Answer.LETS_GO:
            self.tell()

    def roll_back_after(
        self, error: BaseException, roll_back: Callable[[], object] | None = None
    ) -> None:
        """Roll back because of ``error``, which is to be raised afterwards.

        That a transaction may be committed must not hide an interrupt, but must be raised where the
        error would have the work run again.
        """
        was_unknown = self.work.state is State.UNKNOWN
        try:
            (roll_back or self.roll_back)()
        except CommitOutcomeUnknown as unknown:
            if self.may_run_again(error):
                raise
            events.logger.error("%s", unknown, extra=vars(unknown))
            # For the program's own rollback().
            self.work.own.leave_untold(Outcome(unknown.outcome), unknown.evidence)
        else:
            if was_unknown and self.may_run_again(error):
                raise CommitOutcomeUnknown(self._link.server.address) from error

    def tell(self) -> None:
        """Raise `CommitOutcomeUnknown` if an interrupt has kept the thread from learning that its
        transaction is committed, or may be."""
        untold = self.work.own.untold()
        if untold is not None:
            raise untold if isinstance(untold, BaseException) else self._telling(*untold)

    def _telling(self, outcome: Outcome, evidence: str) -> CommitOutcomeUnknown:
        server = self._link.server.address
        unknown = CommitOutcomeUnknown(server, evidence=evidence, outcome=outcome.value)
        return self.work.own.raising(unknown)

    def _settle_lost_commit(self, error: BaseException, finding: Finding) -> None:
        """Return if the transaction was committed; else raise what became of it."""
        find_out(self.work, finding, self.work.patience.policy)
        note_found(self.work, finding)
        finding.tell(self._link.server.address)
        if finding.known is Outcome.ABORTED:
            self.raise_lost(error, inside=True)
        if finding.known is Outcome.UNKNOWN:
            raise self._telling(finding.known, finding.evidence) from (finding.problem or error)

    def _settle_interrupted_commit(self) -> None:
        """Be idle; raise `CommitOutcomeUnknown` unless the transaction was not committed."""
        work = self.work
        self._link.end()
        finding = finding_of(work)
        # Without sessions COMMIT was executed, and its answer not read.
        if self._driver.has_sessions:
            find_out(work, finding, work.patience.policy.within(PATIENCE_OF_ROLLBACK))
        if finding.known is Outcome.ABORTED:
            work.note(Event.FOUND_ABORTED)
        else:
            work.own.leave_untold(finding.known, finding.evidence)
        work.rolled_back()
        finding.tell(self._link.server.address)
        if finding.known is not Outcome.ABORTED:
            raise self._telling(finding.known, finding.evidence) from finding.problem

    def may_run_again(self, error: BaseException) -> bool:
        """Whether a unit of work that raised ``error`` was not committed and may succeed later."""
        return isinstance(error, TransientError) or self._driver.is_transient(error)

    # Threads

    def in_turn(self) -> contextlib.AbstractContextManager[None]:
        """Have the connection until the transaction ends, or else for this block."""
        return _MINE if self.work.turn.is_mine() else self._turn_taken()

    def take_turn(self) -> bool:
        """As `Work.take_turn`; ends what a thread has under way that has ended. Always true."""
        work = self.work
        if work.turn.is_for_good or not work.turn.take(0):
            work.take_turn()
        else:
            work.waited = 0.0
        if work.state is not State.IDLE or work.member is not None or work.block:
            self._end_what_a_thread_has_left()
        return True

    def try_turn(self) -> bool:
        """Have the connection, unless it is another thread's now; whether the thread has it."""
        turn = self.work.turn
        if turn.is_mine():
            return True
        if turn.is_for_good:
            return self.take_turn()
        if not turn.take(0):
            return False
        self._end_what_a_thread_has_left()
        return True

    def _end_what_a_thread_has_left(self) -> None:
        if self.work.has_orphan():
            self._end_orphan()

    def end_forgotten(self) -> None:
        """End what its transaction manager has forgotten, after an interrupt."""
        if self.work.is_forgotten():
            with self.work.unknown_logged():
                self.work.member.abort(None)

    @contextlib.contextmanager
    def _turn_taken(self) -> Iterator[None]:
        self.take_turn()
        try:
            yield
        finally:
            self.work.give_turn()

    def _end_orphan(self) -> None:
        work = self.work
        if work.state is State.PREPARED or work.state is State.PREPARING:
            return
        if work.ask(Request.ROLLBACK) is Answer.ROLLS_BACK:
            events.logger.warning(
                "A thread has ended inside its transaction on %s, which is rolled back",
                self._link.server.address,
                extra={"server": self._link.server.address},
            )
        with work.unknown_logged():
            self.roll_back()
        work.forget_member()
