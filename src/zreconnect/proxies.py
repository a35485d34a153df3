"""Objects of the driver's that talk to the server, such as large objects and psycopg's COPY.

What they raise when the session is lost is what a cursor raises.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

from zreconnect.exceptions import CommitOutcomeUnknown
from zreconnect.guard import Guard
from zreconnect.interfaces import DOOMED
from zreconnect.session import NO_SESSION
from zreconnect.states import Moment, Request, State

# What next() returns at the end.
_END = object()


class Guarded:
    """One of them.

    guard: that of the connection. raw_cursor: that of the statement that it belongs to, if there is
    one. in_block: whether it belongs to a ``with`` block of the driver's.
    """

    def __init__(
        self, guard: Guard, wrapped: Any, raw_cursor: Any = None, in_block: bool = False
    ) -> None:
        self._guard = guard
        self._wrapped = wrapped
        self._raw_cursor = raw_cursor
        self._in_block = in_block

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self._wrapped.__class__

    def __getattr__(self, name: str) -> Any:
        if self._guard.work.state.shown == DOOMED:
            self._guard.work.ask(Request.LOOK)
        value = guarded_attribute(
            self._guard, self._wrapped, name, self, self._raw_cursor, self._in_block
        )
        if callable(value):
            # COPY calls one for each row.
            setattr(self, name, value)
        return value

    def __iter__(self) -> Iterator[Any]:
        return guarded_rows(self._guard, iter(self._wrapped), self._raw_cursor)

    def __enter__(self) -> Guarded:
        self._block = guarded_block(self._guard, self._wrapped, self._raw_cursor)
        self._block.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._block.__exit__(*error)


class LargeObject(Guarded):
    """One of psycopg2's.

    What it can do outside of the transaction in which it was opened, it does in the present one.
    """

    def __enter__(self) -> LargeObject:
        return self

    def __exit__(self, error_type: object, error: BaseException | None, traceback: object) -> None:
        if self._guard.work.state is State.ACTIVE:
            try:
                self.close()
            except self._guard.work.link.driver.module.Error:
                # That of the block goes first, and what is lost is noted.
                if error is None:
                    raise

    def unlink(self) -> None:
        self._use_anew("unlink")

    def export(self, filename: str) -> None:
        self._use_anew("export", filename)

    def _use_anew(self, method: str, *args: Any) -> None:
        guard, link = self._guard, self._guard.work.link
        with guard.in_turn():
            guard.need_transaction()
            with guard.asking():
                raw = link.session.raw
                link.driver.own_transaction(raw)
                if method == "unlink":
                    self._wrapped.close()
                # With this mode it is not opened.
                getattr(raw.lobject(self._wrapped.oid, "n"), method)(*args)


class IfThere:
    """A method that only some of the drivers' cursors have."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, cursor: Any, owner: type | None = None) -> Any:
        if cursor is not None:
            # Its AttributeError.
            getattr(cursor._raw_cursor(), self._method.__name__)
        return self._method.__get__(cursor, owner)


def no_attribute(owner: Any, name: str) -> AttributeError:
    """The error for a private name, for which what is made for the driver's own object looks."""
    return AttributeError(
        f"{type(owner).__name__} has no attribute {name!r}. What works with the driver's own "
        "connection only is given that one in on_connect, for each session, or by "
        "connection.call_driver(function, connection); cursors are made by "
        "connection.cursor(cursor_factory=...)"
    )


def guarded_attribute(
    guard: Guard,
    wrapped: Any,
    name: str,
    owner: Any,
    raw_cursor: Any = None,
    in_block: bool = False,
) -> Any:
    """``wrapped.name``; if it is a method, one whose errors are guarded.

    owner: what it returns in the place of ``wrapped``. raw_cursor, in_block: as for `Guarded`.
    """
    is_connection = wrapped is guard.work.link.session.raw
    driver = guard.work.link.driver
    value = driver.attribute(wrapped, name)
    if not callable(value) or isinstance(value, type):
        return value
    # cancel() is called while another thread's turn lasts.
    turn = contextlib.nullcontext if is_connection else guard.in_turn

    def call(*args: Any, **keywords: Any) -> Any:
        if is_connection and name in driver.refused_methods:
            raise driver.module.NotSupportedError(
                f"{name}() of a connection works around its transaction, and is refused: execute "
                "statements with a cursor; a session that is lost is replaced by itself"
            )
        state = guard.work.state
        if state.shown == DOOMED or (is_connection and state is State.PREPARED):
            guard.work.ask(Request.LOOK)
        if is_connection and guard.work.turn.is_anothers():
            # What it raises says nothing about the transaction of the other thread.
            return value(*args, **keywords)
        with turn(), guard.asking(Moment.STATEMENT, raw_cursor, in_block):
            if name in driver.committing_methods:
                guard.work.link.statement_ends()
            result = value(*args, **keywords)
        if isinstance(result, Generator):
            rows = guarded_rows(guard, result, raw_cursor, waits=not is_connection)
            return (owner if row is wrapped else row for row in rows)
        return owner if result is wrapped else result

    if is_connection and name in driver.choosing_methods:
        return partial(owner.choose, name, call)
    return call


def guarded_rows(
    guard: Guard, rows: Any, raw_cursor: Any = None, waits: bool = True
) -> Iterator[Any]:
    """What an iterator of the driver's gives.

    waits: whether each is an answer of the server's, which can be overdue. Notifications are not.
    """
    work, link = guard.work, guard.work.link
    limit = link.options.response_timeout if waits else None
    with guarded_block(guard, contextlib.closing(rows), raw_cursor):
        while True:
            with guard.in_turn():
                if work.state is not State.ACTIVE:
                    work.ask(Request.LOOK)
                # As `Guard.asking`, which takes six calls more: COPY gives each row by itself.
                try:
                    with link.session.watch.awaiting(limit):
                        row = next(rows, _END)
                except link.driver.module.Error as error:
                    guard.meet(error, Moment.STATEMENT, raw_cursor)
                    raise
            if row is _END:
                return
            yield row


@contextlib.contextmanager
def guarded_block(guard: Guard, block: Any, raw_cursor: Any = None) -> Iterator[Any]:
    """Enter one of the driver's context managers, and leave it."""
    session = guard.work.link.session
    with guard.asking(Moment.STATEMENT, raw_cursor):
        value = block.__enter__()
    try:
        yield value
    except BaseException as error:
        _leave_after(guard, error, block, session, raw_cursor)
        raise
    _leave(guard, block, session, raw_cursor, None, None, None)


def _leave(guard: Guard, block: Any, session: Any, raw_cursor: Any, *error: Any) -> None:
    if session is not NO_SESSION and session is guard.work.link.session:
        with guard.asking(Moment.STATEMENT, raw_cursor):
            block.__exit__(*error)
    else:
        # It has ended with its session.
        with contextlib.suppress(guard.work.link.driver.module.Error):
            block.__exit__(*error)


def _leave_after(
    guard: Guard, error: BaseException, block: Any, session: Any, raw_cursor: Any
) -> None:
    """Leave it because of an error, which is raised afterwards."""
    driver_error = guard.work.link.driver.module.Error
    # The error of the block goes first, and what is lost is noted.
    with contextlib.suppress(driver_error, CommitOutcomeUnknown):
        _leave(guard, block, session, raw_cursor, *sys.exc_info())
    if not isinstance(error, driver_error) and session is guard.work.link.session:
        # What was left to be judged here: whether the session is at rest.
        guard.meet(error, Moment.STATEMENT, raw_cursor)
