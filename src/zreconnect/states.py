"""What may be asked in each state of a connection, and where each event leads: tables, no I/O.

A state is written before the request leaves that may change it. So whatever interrupts the program,
and wherever, the state is true: `State.COMMITTING` says that a COMMIT may have been sent, and stays
until it is known what became of it.

`REQUESTS` is read when a request comes, `NEXT` when something has happened or is about to, and
`CONSEQUENCES` when something was raised.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from transaction.interfaces import TransientError

from zreconnect import interfaces
from zreconnect.interfaces import IDisconnectionError, Meaning


class _Constant(enum.Enum):
    # The identity is enough, and Enum's own method costs a Python call.
    __hash__ = object.__hash__


class State(_Constant):
    """What is known of the present transaction."""

    IDLE = (interfaces.IDLE, "there is no transaction")
    BEGINNING = (interfaces.IDLE, "BEGIN may have been sent")
    TORN = (interfaces.DOOMED, "it could not begin for a statement, which its unit of work lacks")
    ACTIVE = (interfaces.ACTIVE, "a transaction is under way")
    ENDED = (interfaces.ACTIVE, "the server has ended it by itself, because of an error")
    CONFLICT = (interfaces.ACTIVE, "the server has ended it because of a conflict with another one")
    COMMITTING = (interfaces.ACTIVE, "COMMIT may have been sent")
    UNSETTLED = (interfaces.DOOMED, "the session has ended meanwhile, and nobody has looked yet")
    UNKNOWN = (interfaces.DOOMED, "what became of the COMMIT could not be found out")
    PREPARING = (interfaces.ACTIVE, "PREPARE TRANSACTION may have been sent")
    PREPARED = (interfaces.PREPARED, "it is prepared for a two-phase commit")
    ROLLING_BACK = (interfaces.ACTIVE, "ROLLBACK may have been sent")
    DOOMED = (interfaces.DOOMED, "its session was lost, and nothing of it is committed")
    CLOSED = (interfaces.CLOSED, "close() was called")

    def __init__(self, shown: str, meaning: str) -> None:
        #: What ``connection.state`` says.
        self.shown = shown


# After these `rollback()` finds out whether it is committed.
COMMIT_SENT = frozenset({State.COMMITTING, State.UNSETTLED})


class Request(_Constant):
    """What a program asks of a connection."""

    LOOK = "a cursor, a row, an attribute"
    STATEMENT = "a statement, a savepoint, a large object, a block of transaction()"
    BEGIN = "begin()"
    SETTINGS = "the session's settings"
    COMMIT = "commit()"
    ROLLBACK = "rollback()"


class Answer(_Constant):
    """What becomes of a request. Those from `INSIDE` on refuse it."""

    GRANTED = "it is done"
    BEGINS = "a transaction begins for it"
    NOTHING = "there is nothing to do"
    ROLLS_BACK = "the server is told to roll back"
    LETS_GO = "the session, if there still is one, is ended"
    SETTLES = "what became of the COMMIT is looked up"
    INSIDE = "ProgrammingError: it belongs outside a transaction"
    OVER = "InternalError: the server has ended the transaction"
    CONFLICT = "InternalError that is a TransientError: the same work may succeed"
    OPEN = "ProgrammingError: a block of transaction() inside it has not ended"
    PREPARED = "ProgrammingError: the transaction manager has the word"
    LOST = "DisconnectionError: roll back first"
    UNKNOWN = "CommitOutcomeUnknown: roll back first"
    CLOSED = "InterfaceError"


class Event(_Constant):
    """What can happen to a transaction."""

    BEGIN_LEAVES = "BEGIN is about to be sent"
    BEGUN = "the server has begun it"
    NOT_BEGUN = "begin() has failed"
    NOT_BEGUN_FOR_STATEMENT = "beginning failed for a statement"
    NOT_REACHED_FOR_STATEMENT = "there was no connection for a statement"
    ENDED = "an answer says that there is no transaction, or no longer"
    CONFLICT = "an answer says that a conflict has ended it"
    LOST = "the session has ended"
    COMMIT_LEAVES = "COMMIT is about to be sent"
    COMMITTED = "it is committed, as the server has said or as it was found"
    REFUSED = "the server has not committed it, and it is over"
    GOES_ON = "it is not committed or prepared, and goes on"
    FOUND_ABORTED = "it was found not to be committed"
    NOT_FOUND = "whether it is committed could not be found out"
    PREPARE_LEAVES = "PREPARE TRANSACTION is about to be sent"
    PREPARED = "it is prepared, as the server has said or as it was found"
    FOUND_UNPREPARED = "it was found not to be prepared"
    BRANCH_ENDED = "what was prepared is committed, rolled back or left to recover()"
    ROLLBACK_LEAVES = "ROLLBACK is about to be sent"
    ROLLED_BACK = "it is rolled back, or settled by rollback()"
    FORKED = "this is a forked child now, and the session is the parent's"
    CLOSED = "close() was called"


class Moment(_Constant):
    """What was under way when something was raised."""

    CONNECT = "connecting, for a transaction that begins"
    BEGIN = "BEGIN in a session that there is"
    BEGIN_WITH = "BEGIN along with the first statement"
    STATEMENT = "a statement, a row, or anything else that asks the server"
    COMMITTING = "a statement that may commit"
    AUTOCOMMIT = "a statement in autocommit mode"
    OURS = "a request of ours outside a transaction"
    COMMIT = "COMMIT"
    PREPARE = "PREPARE TRANSACTION"
    END_BRANCH = "COMMIT PREPARED or ROLLBACK PREPARED"
    ROLL_BACK = "ROLLBACK"


class Verdict(_Constant):
    """What an error means. One that does not end the transaction may be a transient one, too."""

    LOST = "the session has ended"
    STANDBY = "the server takes no writes, or is not, or no longer, of the kind asked for"
    INTERRUPTED = "not the server's answer, and the session is not at rest"
    INSIDE = "not the server's answer; the session is at rest, in a transaction"
    OUTSIDE = "not the server's answer; the session is at rest, outside a transaction"
    ENDED = "the server's answer; there is no transaction, or no longer"
    CONFLICT = "the same, and a transient one"
    GOES_ON = "the server's answer; the transaction goes on"


class Keeping(_Constant):
    """What becomes of the session."""

    KEPT = "it goes on"
    ENDED = "it is thrown away"
    TOLD = "it is gone, which is announced"


class Then(_Constant):
    """How an error goes on, when it has been noted."""

    PASS = "it is raised as it is"
    DISCONNECTION = "DisconnectionError is raised in its place"
    UNKNOWN = "CommitOutcomeUnknown is raised in its place"
    SETTLED = "whoever has made the request goes on: reconnects, or looks up what became of it"


class Consequence(NamedTuple):
    """What an error leads to. event: what is noted, if anything."""

    event: Event | None
    keeping: Keeping
    then: Then


Row = TypeVar("Row", bound=_Constant)
Column = TypeVar("Column", bound=_Constant)


def _table(rows: type[Row], columns: type[Column], text: str) -> dict[Row, dict[Column, str]]:
    """A table with a line for each row; the first line names the columns."""
    heading, *lines = [line.split() for line in text.strip().splitlines()]
    return {
        rows[name]: {columns[column]: cell for column, cell in zip(heading, cells, strict=True)}
        for name, *cells in lines
    }


# A transaction that may have begun, and of which no more is known, is refused everything until
# rollback(), as a doomed one is.
_ANSWERS = """
              LOOK      STATEMENT  BEGIN     SETTINGS  COMMIT    ROLLBACK
IDLE          GRANTED   BEGINS     BEGINS    GRANTED   NOTHING   NOTHING
BEGINNING     LOST      LOST       LOST      LOST      LOST      LETS_GO
TORN          GRANTED   OVER       INSIDE    INSIDE    OVER      LETS_GO
ACTIVE        GRANTED   GRANTED    INSIDE    INSIDE    GRANTED   ROLLS_BACK
ENDED         GRANTED   OVER       INSIDE    INSIDE    OVER      ROLLS_BACK
CONFLICT      GRANTED   CONFLICT   INSIDE    INSIDE    CONFLICT  ROLLS_BACK
COMMITTING    UNKNOWN   UNKNOWN    UNKNOWN   UNKNOWN   UNKNOWN   SETTLES
UNSETTLED     UNKNOWN   UNKNOWN    UNKNOWN   UNKNOWN   UNKNOWN   SETTLES
UNKNOWN       UNKNOWN   UNKNOWN    UNKNOWN   UNKNOWN   UNKNOWN   LETS_GO
PREPARING     LOST      LOST       LOST      LOST      LOST      PREPARED
PREPARED      PREPARED  PREPARED   PREPARED  PREPARED  PREPARED  PREPARED
ROLLING_BACK  LOST      LOST       LOST      LOST      LOST      LETS_GO
DOOMED        LOST      LOST       LOST      LOST      LOST      LETS_GO
CLOSED        CLOSED    CLOSED     CLOSED    CLOSED    CLOSED    CLOSED
"""
REQUESTS: dict[State, dict[Request, Answer]] = {
    state: {request: Answer[name] for request, name in answers.items()}
    for state, answers in _table(State, Request, _ANSWERS).items()
}

# "ACTIVE>ENDED" leads from one to the other. In a state that stands alone the event changes
# nothing; in one that is missing it must not happen. An interrupt can come just before the state of
# a request is written, or just after that of its answer; and a subscriber of an event can call
# rollback() while a request is under way. A closed connection stays closed, whatever
# another thread finds out of what it had under way.
_EVENTS = """
BEGIN_LEAVES      IDLE>BEGINNING
BEGUN             BEGINNING>ACTIVE IDLE>ACTIVE
NOT_BEGUN         IDLE BEGINNING>IDLE ACTIVE>IDLE
NOT_BEGUN_FOR_STATEMENT    IDLE>TORN BEGINNING>TORN ACTIVE>TORN
NOT_REACHED_FOR_STATEMENT  IDLE>DOOMED BEGINNING>DOOMED
ENDED             ACTIVE>ENDED PREPARING>ENDED
ENDED             IDLE BEGINNING TORN ENDED CONFLICT COMMITTING UNSETTLED UNKNOWN PREPARED
ENDED             ROLLING_BACK DOOMED
CONFLICT          ACTIVE>CONFLICT PREPARING>CONFLICT
CONFLICT          IDLE BEGINNING TORN ENDED CONFLICT COMMITTING UNSETTLED UNKNOWN PREPARED
CONFLICT          ROLLING_BACK DOOMED
LOST              ACTIVE>DOOMED ENDED>DOOMED CONFLICT>DOOMED COMMITTING>UNSETTLED
LOST              IDLE BEGINNING TORN UNSETTLED UNKNOWN PREPARING PREPARED ROLLING_BACK DOOMED
COMMIT_LEAVES     ACTIVE>COMMITTING
COMMITTED         COMMITTING>IDLE UNSETTLED>IDLE IDLE
REFUSED           COMMITTING>IDLE ENDED>IDLE CONFLICT>IDLE TORN>IDLE
GOES_ON           ACTIVE COMMITTING>ACTIVE PREPARING>ACTIVE
FOUND_ABORTED     COMMITTING>DOOMED UNSETTLED>DOOMED DOOMED IDLE
NOT_FOUND         ACTIVE>UNKNOWN ENDED>UNKNOWN CONFLICT>UNKNOWN BEGINNING>UNKNOWN
NOT_FOUND         COMMITTING>UNKNOWN UNSETTLED>UNKNOWN DOOMED>UNKNOWN UNKNOWN IDLE
PREPARE_LEAVES    ACTIVE>PREPARING
PREPARED          PREPARING>PREPARED
FOUND_UNPREPARED  PREPARING>DOOMED
BRANCH_ENDED      PREPARING>IDLE PREPARED>IDLE DOOMED>IDLE
ROLLBACK_LEAVES   ACTIVE>ROLLING_BACK ENDED>ROLLING_BACK CONFLICT>ROLLING_BACK
ROLLED_BACK       BEGINNING>IDLE COMMITTING>IDLE UNSETTLED>IDLE UNKNOWN>IDLE PREPARING>IDLE
ROLLED_BACK       ROLLING_BACK>IDLE DOOMED>IDLE TORN>IDLE ACTIVE>IDLE ENDED>IDLE CONFLICT>IDLE
ROLLED_BACK       IDLE
FORKED            IDLE BEGINNING>DOOMED ACTIVE>DOOMED ENDED>DOOMED CONFLICT>DOOMED
FORKED            COMMITTING>UNKNOWN UNSETTLED>UNKNOWN UNKNOWN PREPARING>DOOMED PREPARED>DOOMED
FORKED            DOOMED ROLLING_BACK>DOOMED TORN
CLOSED            IDLE>CLOSED BEGINNING>CLOSED ACTIVE>CLOSED ENDED>CLOSED COMMITTING>CLOSED
CLOSED            UNSETTLED>CLOSED UNKNOWN>CLOSED PREPARING>CLOSED PREPARED>CLOSED
CLOSED            ROLLING_BACK>CLOSED DOOMED>CLOSED TORN>CLOSED CONFLICT>CLOSED
"""
NEXT: dict[Event, dict[State, State]] = {event: {State.CLOSED: State.CLOSED} for event in Event}
for _name, *_cells in map(str.split, _EVENTS.strip().splitlines()):
    for _before, _, _after in (cell.partition(">") for cell in _cells):
        NEXT[Event[_name]][State[_before]] = State[_after or _before]

_CONSEQUENCES = {
    "pass": Consequence(None, Keeping.KEPT, Then.PASS),
    "settled": Consequence(Event.LOST, Keeping.TOLD, Then.SETTLED),
    "undone": Consequence(Event.FOUND_ABORTED, Keeping.TOLD, Then.SETTLED),
    "answered": Consequence(None, Keeping.KEPT, Then.SETTLED),
    "disconnect": Consequence(Event.LOST, Keeping.TOLD, Then.DISCONNECTION),
    "throw_away": Consequence(Event.LOST, Keeping.ENDED, Then.PASS),
    "ended": Consequence(Event.ENDED, Keeping.KEPT, Then.PASS),
    "conflict": Consequence(Event.CONFLICT, Keeping.KEPT, Then.PASS),
    "not_begun": Consequence(Event.NOT_BEGUN, Keeping.KEPT, Then.PASS),
    "break_off": Consequence(Event.NOT_BEGUN, Keeping.ENDED, Then.PASS),
    "lost_first": Consequence(Event.NOT_BEGUN, Keeping.TOLD, Then.DISCONNECTION),
    "unknown": Consequence(Event.NOT_FOUND, Keeping.TOLD, Then.UNKNOWN),
    "unknown_too": Consequence(Event.NOT_FOUND, Keeping.ENDED, Then.PASS),
    "done_or_not": Consequence(Event.LOST, Keeping.TOLD, Then.UNKNOWN),
    "refused": Consequence(Event.REFUSED, Keeping.KEPT, Then.PASS),
    "goes_on": Consequence(Event.GOES_ON, Keeping.KEPT, Then.PASS),
    "rolled_back": Consequence(Event.ROLLED_BACK, Keeping.ENDED, Then.PASS),
}
# A BEGIN that was executed, while what rode on it failed or its answer was not read, is broken off.
# What became of a COMMIT that was interrupted, rollback() looks up. One that was refused by a
# server that takes no writes is undone. A session that is given up rolls back as well. An error of
# ending a branch is told by who ends it.
_ERRORS = """
           LOST        STANDBY     INTERRUPTED INSIDE      OUTSIDE     ENDED     CONFLICT  GOES_ON
CONNECT    break_off   break_off   break_off   break_off   break_off   break_off break_off break_off
BEGIN      settled     settled     break_off   break_off   not_begun   not_begun not_begun break_off
BEGIN_WITH lost_first  lost_first  break_off   break_off   not_begun   not_begun not_begun break_off
STATEMENT  disconnect  disconnect  throw_away  pass        ended       ended     conflict  pass
COMMITTING unknown     unknown     unknown_too pass        ended       ended     conflict  pass
AUTOCOMMIT done_or_not done_or_not throw_away  pass        pass        pass      pass      pass
OURS       settled     settled     throw_away  throw_away  throw_away  pass      pass      pass
COMMIT     settled     undone      throw_away  goes_on     throw_away  refused   refused   goes_on
PREPARE    settled     settled     throw_away  goes_on     throw_away  ended     conflict  goes_on
END_BRANCH settled     settled     throw_away  throw_away  throw_away  answered  answered  answered
ROLL_BACK  settled     settled     rolled_back rolled_back rolled_back settled   settled   settled
"""
CONSEQUENCES: dict[Moment, dict[Verdict, Consequence]] = {
    moment: {verdict: _CONSEQUENCES[name] for verdict, name in cells.items()}
    for moment, cells in _table(Moment, Verdict, _ERRORS).items()
}


def leads_to_idle(event: Event, state: State) -> bool:
    """Whether there is no transaction any more after the event."""
    return NEXT[event][state] is State.IDLE


def verdict(
    error: BaseException, server: Any, raw: Any, is_refused: Callable[[BaseException, Any], bool]
) -> Verdict:
    """What an error means that was raised while a raw connection was used.

    The driver's own transaction status decides first, asking for which takes no round trip.

    server: a `zreconnect.server.Server`. raw: the raw connection; None if its session has been
    ended already. is_refused: whether an error of that raw connection says that the server takes no
    writes, and is of no use.
    """
    driver = server.driver
    # One of ours can come from another connection, of which the driver has asked the program.
    is_answer = isinstance(error, driver.module.Error) and not IDisconnectionError.providedBy(error)
    if raw is None:
        return Verdict.LOST if is_answer else Verdict.INTERRUPTED
    if not is_answer and not driver.is_at_rest(raw):
        return Verdict.INTERRUPTED
    if is_answer and driver.meaning(error, raw) is Meaning.DISCONNECT:
        return Verdict.LOST
    if is_answer and (server.is_missed_by(raw) or is_refused(error, raw)):
        return Verdict.STANDBY
    if driver.in_transaction(raw):
        return Verdict.GOES_ON if is_answer else Verdict.INSIDE
    if not is_answer:
        return Verdict.OUTSIDE
    # A driver's error is one only if the work may run again.
    return Verdict.CONFLICT if isinstance(error, TransientError) else Verdict.ENDED
