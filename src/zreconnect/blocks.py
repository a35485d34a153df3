"""Blocks of ``transaction()``: the outermost is a transaction, and one inside it a savepoint.

`Work.savepoints` has the savepoints whose blocks have not come to their ends, each from before it
is set until it is released or undone. As long as there is one, nothing is committed: so what an
interrupt leaves behind, or a block that is left in the wrong order, is not committed by mistake.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from zreconnect import events
from zreconnect.cursor import ReconnectingCursor
from zreconnect.exceptions import CommitOutcomeUnknown, one_line
from zreconnect.refusals import refusal
from zreconnect.savepoint import Savepoint
from zreconnect.states import Answer, Request, State

if TYPE_CHECKING:
    from zreconnect.connection import ReconnectingConnection
    from zreconnect.work import Work

Block = Generator[ReconnectingCursor, None, None]


def transaction_block(
    connection: ReconnectingConnection, name: str | None, force_rollback: bool
) -> Block:
    """What is done before and after a block, as `IReconnectingConnection.transaction` has it.

    name: that of the savepoint, which is then set also if the block is the whole transaction.
    """
    savepoint = Savepoint(connection, name)
    if not _is_whole(connection):
        # An interrupt after it would leave a block that has ended well.
        return (yield from _part(connection, savepoint, force_rollback))
    work, number, cursor = connection.work, None, None
    try:
        connection.begin()
        number = work.number
        if name:
            savepoint.set()
        if force_rollback:
            work.savepoints.append(savepoint)
        with connection.cursor() as cursor:
            yield cursor
        if number != work.number:
            work.ask(Request.BEGIN, "The end of a block that another transaction follows,")
        if force_rollback:
            connection.rollback()
        else:
            connection.commit()
    except BaseException as error:
        # A block that was left suspended may be closed inside another transaction.
        is_present = number is None or number == work.number
        if _is_meant(error, cursor):
            if not is_present or work.state is State.IDLE:
                raise _has_ended(work) from error
            connection.rollback()
            return
        if is_present:
            connection.rollback_after(error)
        raise


def _is_whole(connection: ReconnectingConnection) -> bool:
    """Whether a block is to be a transaction, and ends it; else there is one, from now on."""
    work, guard = connection.work, connection.guard
    try:
        if not work.turn.is_mine():
            guard.take_turn()
        if work.member is not None:
            guard.end_forgotten()
        is_automatic = work.state is State.IDLE and work.link.settings.autocommit
        if work.state is State.IDLE and not (is_automatic and connection.is_begun_by_statement()):
            if work.join is None:
                return True
            if is_automatic:
                connection.begin()
        guard.need_transaction()
        return False
    except BaseException:
        work.give_turn()
        raise


def _part(connection: ReconnectingConnection, savepoint: Savepoint, force_rollback: bool) -> Block:
    work, cursor = connection.work, None
    module_error = work.link.driver.module.Error
    try:
        work.savepoints.append(savepoint)
        savepoint.set()
        with connection.cursor() as cursor:
            yield cursor
        if force_rollback:
            _undo(connection, savepoint)
        else:
            _release(connection, savepoint)
    except BaseException as error:
        if cursor is None and isinstance(error, module_error):
            # The server has not set it.
            work.savepoints[:] = [each for each in work.savepoints if each is not savepoint]
            raise
        is_meant = _is_meant(error, cursor)
        try:
            if is_meant or _is_open(connection, savepoint):
                _undo(connection, savepoint)
        except (module_error, CommitOutcomeUnknown) as problem:
            # The error of the block goes first: what is not undone is not committed either.
            if is_meant:
                raise
            events.logger.warning(
                "A block of transaction() on %s could not be undone, so that the transaction "
                "cannot be committed: %s",
                connection.server,
                one_line(problem),
                extra={"server": connection.server},
            )
        if is_meant:
            return
        raise


def _is_meant(error: BaseException, cursor: ReconnectingCursor | None) -> bool:
    """Whether ``error`` only ends the block of this cursor, as psycopg's ``Rollback`` does."""
    if cursor is None or not isinstance(error, cursor.connection.work.link.driver.rollback_request):
        return False
    meant: Any = error
    return meant.transaction is None or meant.transaction is cursor


def _is_open(connection: ReconnectingConnection, savepoint: Savepoint) -> bool:
    """Whether the savepoint's transaction is under way, in this thread, and the savepoint in it."""
    work = connection.work
    return (
        savepoint in work.savepoints
        and not work.turn.is_anothers()
        and (work.state is State.ACTIVE or connection.is_begun_by_statement())
    )


def _release(connection: ReconnectingConnection, savepoint: Savepoint) -> None:
    work = connection.work
    _check_open(connection, savepoint)
    if work.savepoints[-1] is not savepoint:
        raise refusal(Answer.OPEN, work.link.driver, work.link.server.address)
    try:
        savepoint.release()
    except work.link.driver.module.Error as error:
        if work.link.has_committed():
            raise _has_ended(work) from error
        raise
    work.savepoints.pop()


def _undo(connection: ReconnectingConnection, savepoint: Savepoint) -> None:
    savepoints = connection.work.savepoints
    _check_open(connection, savepoint)
    savepoint.rollback()
    savepoint.release()
    # Along with those inside it.
    del savepoints[savepoints.index(savepoint) :]


def _check_open(connection: ReconnectingConnection, savepoint: Savepoint) -> None:
    work = connection.work
    if savepoint in work.savepoints and not work.turn.is_anothers():
        work.ask(Request.STATEMENT)
    if not _is_open(connection, savepoint):
        raise _has_ended(work)


def _has_ended(work: Work) -> Exception:
    error: Exception = work.link.driver.module.ProgrammingError(
        "The transaction or the savepoint of this block of transaction() has ended before the "
        "block: by rollback(), by a statement that commits, as DDL does on MySQL, or with a block "
        "around it; or it is another thread's. This error rolls nothing back"
    )
    return error
