"""One unit of work at a time: what is known of a connection's present transaction.

Theory of operation
-------------------

`Work.state` is the truth, and everybody else asks for it. It has one writer, `Work.note`, which
knows nothing but the table `zreconnect.states.NEXT`. A request that may change what is true is
noted *before* it leaves:

- ``begin()`` notes BEGIN_LEAVES, sends BEGIN, and notes BEGUN;
- ``commit()``, ``prepare()`` and ``roll_back()`` do the same with what they send.

Between the two notes the state says what may be true. So wherever KeyboardInterrupt or a signal
handler's exception strikes, also in the handler of another error, what stays behind is no lie: it
makes every request but ``rollback()`` fail, and tells ``rollback()`` what there is to find out.

Nothing here handles an error. What the methods raise, `zreconnect.guard` catches, decides what it
means, and notes that. A session that may not be at rest is ended there, and never repaired.

A transaction can be part of a larger one, of a transaction manager's: then ``member`` is the data
manager that has joined it. `Work.losses` counts the transactions that were lost, so that a data
manager knows whether one was lost since it joined, even if the program has rolled back meanwhile
and gone on. If the larger transaction ends and the data manager is not told, because an interrupt
came before the first line of its ``abort()``, that is noticed all the same, and what was under way
is rolled back.

Threads share a connection by taking turns: from a thread's first request to the end of its
transaction. Who gets the turn of a thread that has ended inside one finds it here, and ends it.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from zreconnect import commits, events
from zreconnect.commits import OwnCommits
from zreconnect.exceptions import CommitOutcomeUnknown
from zreconnect.interfaces import DOOMED
from zreconnect.link import Check, Link, Use
from zreconnect.policy import Patience, RetryPolicy
from zreconnect.refusals import REFUSED, refusal
from zreconnect.session import NO_SESSION
from zreconnect.states import COMMIT_SENT, NEXT, REQUESTS, Answer, Event, Request, State
from zreconnect.turn import Turn
from zreconnect.witness import Outcome

# For how many seconds a thread waits for another one's transaction, without a policy's timeout.
PATIENCE_WITH_THREADS = 60.0
# For how many seconds rollback() looks for the outcome of a COMMIT that was interrupted.
PATIENCE_OF_ROLLBACK = 10.0

# A part of what was done is not there, or perhaps not.
_LOST = frozenset({State.DOOMED, State.UNKNOWN, State.TORN})
_GOES_ON = COMMIT_SENT | {State.ACTIVE}
# After these the COMMIT that was sent is known to have committed nothing.
_NOT_COMMITTED = frozenset({Event.REFUSED, Event.GOES_ON, Event.FOUND_ABORTED})
# The end of the session rolls back what these answer.
_ROLLING_BACK = frozenset({Answer.ROLLS_BACK, Answer.LETS_GO})


class Work:
    """The present transaction of a connection. See the module's theory of operation.

    link: leads to the server. turn: whose turn it is. patience: how long transactions wait. state:
    what is known. losses: how many transactions have been lost with their sessions. last_doubt: the
    number of the last of them that may be committed. finding: what is known of the COMMIT that was
    sent last, see `zreconnect.finding`. member: the data manager of the larger transaction that
    this one is part of, or None. join: called before one begins, to make it part of a larger one,
    or None. implicit_begin: whether a statement begins a transaction. is_explicit: whether the
    transaction was begun by ``begin()`` and not by a statement. block: has an entry while the
    connection is in a ``with`` block. waited: the seconds that the thread has waited for its turn.
    number: that of the present transaction, or of the last. block_began_after: that of the last one
    before the ``with`` block. told_by_call: the one of whose commit the program learns when the
    call returns that commits. own: what each thread knows of its own COMMITs here. savepoints: of
    open blocks, see `zreconnect.blocks`. has_only_read: whether the transaction was found to have
    written nothing, as far as is known, and nothing was asked of the server since.
    """

    __slots__ = (
        "__weakref__",
        "_anchors",
        "block",
        "block_began_after",
        "finding",
        "has_only_read",
        "implicit_begin",
        "is_explicit",
        "join",
        "last_doubt",
        "link",
        "losses",
        "member",
        "number",
        "own",
        "patience",
        "savepoints",
        "state",
        "told_by_call",
        "turn",
        "waited",
    )

    def __init__(self, link: Link, turn: Turn, patience: Patience) -> None:
        self.link = link
        self.turn = turn
        self.patience = patience
        self.state = State.IDLE
        self.number = 0
        self.losses = self.last_doubt = 0
        self.member: Any = None
        self._anchors: tuple[weakref.ref[Any], ...] = ()
        self.join: Callable[[], None] | None = None
        self.implicit_begin = True
        self.is_explicit = self.has_only_read = False
        self.told_by_call = 0
        self.block: dict[str, Any] = {}
        self.block_began_after = 0
        self.savepoints: list[Any] = []
        self.own = OwnCommits()
        self.finding: Any = None
        _works[id(self)] = self
        self.waited = 0.0

    # What is known

    def note(self, event: Event) -> None:
        """Write down what has happened, or is about to."""
        before = self.state
        state = NEXT[event][before]
        if state in _LOST and state is not before:
            # First: an interrupt before the next line has one loss too many, which is harmless.
            self.losses += 1
            if state is State.UNKNOWN:
                self.last_doubt = self.losses
            commits.note_loss()
        self.state = state
        # What a statement may have committed stays counted, whatever becomes of the rest.
        if before in COMMIT_SENT and event in _NOT_COMMITTED and not self.link.has_committed():
            self.own.withdraw()
        if before is State.ACTIVE and state not in _GOES_ON and self.link.has_committed():
            self.own.sending()
        if self.link.readers and state is not State.CLOSED:
            self.link.keep_rows()

    def is_autocommit(self) -> bool:
        """Whether a statement would be a transaction of its own."""
        return self.state is State.IDLE and self.link.settings.autocommit and not self.block

    # The larger transaction

    def become_part(self, member: Any, anchor: Any = None) -> None:
        """Be part of the larger transaction that the data manager ``member`` has joined.

        anchor: what that transaction, and nobody else, refers to as long as it lasts; None if it is
        certain to be told its end.
        """
        self._anchors = ()
        if anchor is not None:
            # Two: what interrupts the call of one ends it, and nobody learns of it.
            forgotten = self._forgotten
            self._anchors = weakref.ref(anchor, forgotten), weakref.ref(anchor, forgotten)
        # Last: a part without anchors is told its end.
        self.member = member

    def leave(self, member: Any) -> None:
        """The larger transaction has ended, if it still is the one of this data manager."""
        if self.member is member:
            self.member, self._anchors = None, ()
            self.give_turn()

    def is_forgotten(self) -> bool:
        """Whether the larger transaction has ended without ending this one."""
        return self.member is not None and self._anchors != () and self._anchors[0]() is None

    def forget_member(self) -> None:
        """Whoever was to end the transaction will not."""
        self.member = None
        self.block.clear()

    @contextlib.contextmanager
    def unknown_logged(self) -> Iterator[None]:
        """For a block whose `CommitOutcomeUnknown` nobody is there to catch."""
        try:
            yield
        except CommitOutcomeUnknown as unknown:
            events.logger.error("%s", unknown, extra=vars(unknown))
            self.own.forget()

    def _forgotten(self, anchor: Any) -> None:
        if self.member is None or anchor not in self._anchors:
            return
        # What may be committed or prepared takes longer; `Guard.end_forgotten` is for that.
        if REQUESTS[self.state][Request.ROLLBACK] in _ROLLING_BACK:
            self.note(Event.LOST)
            self.link.end()
            self.note(Event.ROLLED_BACK)
        if self.state is State.IDLE:
            self.member = None
            self.give_turn()

    # Requests

    def ask(self, request: Request, what: str = "") -> Answer:
        """What becomes of a request; raises what refuses it. what: the request's name."""
        answer = REQUESTS[self.state][request]
        if answer in REFUSED:
            self._refuse(answer, what)
        return answer

    def refuse_lost(self, since: int) -> NoReturn:
        """Raise the error of who goes on after a transaction was lost.

        since: how many had been lost before. Raises `CommitOutcomeUnknown` if one of them may be
        committed, else `DisconnectionError`.
        """
        self._refuse(Answer.UNKNOWN if self.last_doubt > since else Answer.LOST)

    def _refuse(self, answer: Answer, what: str = "") -> NoReturn:
        error = refusal(answer, self.link.driver, self.link.server.address, what)
        raise self.own.raising(error) if answer is Answer.UNKNOWN else error

    # Sessions

    def need_session(self) -> None:
        """Have a session, as what needs no transaction does.

        Raises what opening one raises, and the driver's InterfaceError on a closed connection.
        """
        if self.link.session is NO_SESSION:
            self.ask(Request.LOOK)
            self.open(self.link.record_session, self.patience.left(), self.check_open)

    def open(self, first_use: Use, policy: RetryPolicy, check: Check = lambda: None) -> None:
        """Open the next session, unless the connection is closed meanwhile.

        check: called before each attempt; raises what makes it unnecessary.
        """
        self.link.open(first_use, policy, check)
        if self.state is State.CLOSED:
            self.link.end()

    def check_open(self) -> None:
        """Raise the driver's InterfaceError on a closed connection."""
        if self.state is State.CLOSED:
            self.ask(Request.LOOK)

    # Ending

    def commit(self) -> None:
        """Commit the transaction."""
        self.finding = None
        if self.savepoints:
            self._refuse(Answer.OPEN)
        session = self.link.session
        self.own.sending()
        self.note(Event.COMMIT_LEAVES)
        observer, limit = self.link.observer, self.link.options.response_timeout
        commit = observer.commit
        if limit is None:
            commit(session.raw)
        else:
            session.watch.call(limit, commit, session.raw)
        self.link.heard = time.monotonic()
        self.committed()

    def prepare(self, gid: str) -> None:
        """Prepare the transaction for a two-phase commit, under that name."""
        if self.savepoints:
            self._refuse(Answer.OPEN)
        session = self.link.session
        self.note(Event.PREPARE_LEAVES)
        with session.watch.awaiting(self.link.options.response_timeout):
            self.link.driver.prepare_transaction(session.raw, gid)
        self.note(Event.PREPARED)

    def roll_back(self) -> None:
        """Roll back in the session, in which the transaction is under way."""
        session = self.link.session
        self.note(Event.ROLLBACK_LEAVES)
        session.watch.reset()
        # A session that does not answer is given up, which rolls back as well.
        with session.watch.awaiting(self.link.answer_limit()):
            self.link.observer.rollback(session.raw)
        self.link.heard = time.monotonic()

    def rolled_back(self) -> None:
        """It is rolled back: the server has said so, or its session has ended."""
        self._end(Event.ROLLED_BACK)

    def committed(self) -> None:
        """It is committed: the server has said so, or it was found."""
        self.own.leave_untold(Outcome.COMMITTED)
        if self.patience.is_shared:
            self.patience.has_ended(lost=False)
        self.note(Event.COMMITTED)

    def branch_ended(self) -> None:
        """What was prepared is no more of this connection's business."""
        self._end(Event.BRANCH_ENDED)

    def _end(self, event: Event) -> None:
        if self.patience.is_shared:
            self.patience.has_ended(lost=self.state.shown == DOOMED)
        self.note(event)

    # Threads

    def take_turn(self) -> None:
        """Have the connection, which another thread has now, from its end until `give_turn`.

        Raises the driver's OperationalError if another thread's transaction takes too long, and its
        ProgrammingError if the connection is another thread's for good.
        """
        if self.turn.is_for_good:
            raise self.link.driver.module.ProgrammingError(
                "The connection belongs to another thread: use a connection for each thread; "
                "fork() makes one"
            )
        self.waited = self._wait_for_turn()

    def give_turn(self) -> None:
        """Let other threads have the connection, unless something of this one is under way."""
        if (
            (self.state is State.IDLE or self.state is State.CLOSED)
            and self.member is None
            and not self.block
            and not self.turn.is_for_good
        ):
            self.turn.give()

    def has_orphan(self) -> bool:
        """Whether a thread has ended, without having ended what it had under way."""
        return self.state is not State.CLOSED and (
            self.state is not State.IDLE or self.member is not None or bool(self.block)
        )

    def _wait_for_turn(self) -> float:
        """Take it, and return the seconds that this took."""
        started = time.monotonic()
        server = self.link.server.address
        events.logger.debug(
            "A thread waits for another one's transaction on %s", server, extra={"server": server}
        )
        timeout = self.patience.policy.timeout
        patience = PATIENCE_WITH_THREADS if timeout is None else timeout
        if not self.turn.take(patience):
            raise self.link.driver.module.OperationalError(
                f"This thread has waited {patience:.1f} seconds for its turn: another one has a "
                f"transaction on {server}. End transactions sooner, or use a connection for "
                "each thread; fork() makes one"
            )
        return time.monotonic() - started

    # Processes

    def in_child(self) -> None:
        """This is a forked child: the session, and a transaction in it, are the parent's."""
        self.turn = self.turn.in_child()
        self.own = OwnCommits()
        if self.finding is not None:
            self.finding.is_parents = True
        self.note(Event.FORKED)
        self.link.renew_observer()

    def close(self) -> None:
        """Close the connection for good, from any thread."""
        was_idle = self.state is State.IDLE
        # A COMMIT is waited for, where the module does.
        is_used = self.turn.is_lent() and self.state is not State.COMMITTING
        self.note(Event.CLOSED)
        if is_used:
            # It may wait for an answer, and a module's close() would wait with it.
            self.link.session.watch.hang_up()
        if was_idle and not is_used:
            self.link.close()
        else:
            self.link.end()
        self.turn.end()


_works: weakref.WeakValueDictionary[int, Work] = weakref.WeakValueDictionary()


def works() -> list[Work]:
    """Those of all connections of this process that anybody has, from any thread."""
    # In one step: another thread may make a connection meanwhile.
    return [work for reference in _works.valuerefs() if (work := reference()) is not None]


def _leave_sessions_to_parent() -> None:
    for work in works():
        # Whatever is wrong with one of them, none may keep its parent's session.
        with contextlib.suppress(Exception):
            work.in_child()


os.register_at_fork(after_in_child=_leave_sessions_to_parent)
