"""A DB-API cursor that outlives its server sessions."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from zreconnect import commits
from zreconnect.cursorsettings import SettingsOfCursor
from zreconnect.documented import implements
from zreconnect.interfaces import IPipeliningDriver, IReconnectingCursor
from zreconnect.kept import KEPT, KeepsRows
from zreconnect.lent import lend_items
from zreconnect.proxies import guarded_attribute, no_attribute
from zreconnect.session import NO_SESSION
from zreconnect.states import Moment, Request, State
from zreconnect.transfers import IfThere, Transfers

if TYPE_CHECKING:
    from zreconnect.connection import ReconnectingConnection

# Where the modules for MySQL, and psycopg 3, have what was sent: its manual tells of it.
SENT = ("_executed", "_query")


@implements(IReconnectingCursor)
class ReconnectingCursor(SettingsOfCursor, Transfers, KeepsRows):
    """See `IReconnectingCursor`; made by `ReconnectingConnection.cursor`."""

    # With slots, setting an attribute that is not kept here is an error and not ignored.
    __slots__ = (
        "__weakref__",
        "_closed",
        "_error",
        "_guard",
        "_options",
        "_settings",
        "_weak",
        "_work",
        "connection",
        "name",
    )

    def __init__(
        self,
        connection: ReconnectingConnection,
        name: str | None,
        cursor_factory: Any,
        options: dict[str, Any],
    ) -> None:
        self._raw = None
        self._session = NO_SESSION
        self._kept = None
        self.connection = connection
        self.name = name
        self._work = connection.work
        self._guard = connection.guard
        self._error = connection.work.link.driver.module.Error
        self._options = options
        if cursor_factory is not None:
            options["cursor_factory"] = cursor_factory
        if options:
            connection.work.link.driver.check_cursor(name, options)
        self._settings: dict[str, Any] = {}
        # In a set, because its hash cannot be found out any more when it is discarded.
        (self._weak,) = {weakref.ref(self, connection.work.link.readers.discard)}
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.connection!r}>"

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # So that a program finds the class that it has asked for, whose methods are here, too.
        factory = self._options.get("cursor_factory") or self._work.link.settings.cursor_factory
        if isinstance(factory, type):
            return factory
        # A connection's class may choose that of its cursors.
        raw = self._raw_if_free()
        return type(self) if raw is None else type(raw.raw if self._session is KEPT else raw)

    # Statements

    def execute(self, query: Any, vars: Any = None, **options: Any) -> Any:
        arguments = (query,) if vars is None else (query, vars)
        if self._work.state is State.IDLE and self.name is None:
            driver = self._work.link.driver
            if IPipeliningDriver.providedBy(driver):
                if self._begins_along(arguments, options):
                    return self
            elif driver.calls_autocommit and self._switches_mode(driver.autocommit_mode(query)):
                return 0
        return self._statement("execute", *arguments, **options)

    def executemany(self, query: Any, *parameters: Any, **options: Any) -> Any:
        link = self._work.link
        sequences = [lend_items(link, each) for each in parameters]
        options = {name: lend_items(link, value) for name, value in options.items()}
        return self._statement("executemany", query, *sequences, **options)

    @IfThere
    def callproc(self, procname: str, *parameters: Any, **options: Any) -> Any:
        """As in PEP 249; psycopg 3 and sqlite3 have none."""
        return self._statement("callproc", procname, *parameters, **options)

    def _executes_unseen(self) -> None:
        """What the driver has returned will execute the statement."""
        if self._work.link.observer.watches_statements:
            self._work.link.observer.executed(None)

    def _switches_mode(self, mode: bool | None) -> bool:
        """Switch autocommit mode, if the statement does that and is no part of a transaction."""
        work = self._work
        if mode is None or not work.implicit_begin or work.join is not None or work.block:
            return False
        self.connection.autocommit = mode
        return True

    def _begins_along(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """Have BEGIN travel along with the statement, if that can be; whether it was executed."""
        work, guard = self._work, self._guard
        try:
            if not work.turn.is_mine():
                guard.take_turn()
            if self._closed:
                self._refuse_closed()
            if not guard.may_begin_with_statement():
                return False
            if self._session is not work.link.session:
                self._open()
            if not work.link.driver.may_begin_with(self._raw, *arguments):
                return False
            execute = partial(self._raw.execute, *arguments, **options)
            executed = None
            try:
                if not guard.begin_with_statement(self._raw, execute):
                    return False
                executed = self._raw
                return True
            finally:
                # It may have been executed, too, if something else was raised.
                if work.link.observer.watches_statements:
                    work.link.observer.executed(executed)
        finally:
            if work.state is not State.ACTIVE:
                work.give_turn()

    # These do what Guard.in_turn() and Guard.asking() do, without their Python calls.

    def _statement(self, method: str, *args: Any, **keywords: Any) -> Any:
        work, guard, link = self._work, self._guard, self._work.link
        try:
            if not work.turn.is_mine():
                guard.take_turn()
            if self._closed:
                self._refuse_closed()
            if link.readers or self._kept is not None:
                self.keep_rows_of_others()
            if work.state is not State.ACTIVE:
                guard.need_transaction(args[0] if method == "execute" else None)
            query = args[0]
            if work.state is State.ACTIVE and (
                # Spares most statements the call.
                (";" in query or link.driver.may_chain(query) if isinstance(query, str) else True)
                and link.driver.chains(query)
            ):
                link.was_ended = True
                commits.note()
            session = link.session
            if self._session is not session:
                self._open()
            raw = self._raw
            try:
                with session.watch.awaiting(link.options.response_timeout):
                    if self.name is not None and work.state is State.ACTIVE:
                        link.driver.own_transaction(session.raw)
                    result = getattr(raw, method)(*args, **keywords)
            except BaseException as error:
                guard.meet(error, Moment.STATEMENT, raw)
                # It may have been executed all the same.
                self._executes_unseen()
                raise
            if work.state is State.ACTIVE and not session.in_transaction():
                link.was_ended = True
                commits.note()
            if link.observer.watches_statements:
                link.observer.executed(raw)
            if link.driver.loses_rows and self.name is None and raw.description is not None:
                link.readers.add(self._weak)
            return self if result is raw else result
        finally:
            if work.state is not State.ACTIVE:
                work.give_turn()

    def _answer(self, method: str, *args: Any) -> Any:
        work, guard, link = self._work, self._guard, self._work.link
        try:
            if not work.turn.is_mine():
                guard.take_turn()
            if work.state is not State.ACTIVE:
                work.ask(Request.LOOK)
            if self._closed:
                self._refuse_closed()
            raw = self._raw_cursor() if self._raw is None else self._raw
            try:
                with link.session.watch.awaiting(link.options.response_timeout):
                    return getattr(raw, method)(*args)
            except StopIteration:
                raise
            except BaseException as error:
                self._meet(error)
                raise
        finally:
            if work.state is not State.ACTIVE:
                work.give_turn()

    def _meet(self, error: BaseException) -> None:
        """What an error of reading rows leads to."""
        link, module = self._work.link, self._work.link.driver.module
        if self._session is link.session:
            self._guard.meet(error, Moment.STATEMENT)
        elif isinstance(error, (module.InterfaceError, module.OperationalError)):
            # Of an older session, it says nothing about the present one.
            raise module.InterfaceError(
                "The rows of this cursor that were not fetched are gone with the session in which "
                "its statement was executed, which has ended: execute it again"
            ) from error

    # Results

    def fetchone(self) -> Any:
        return self._answer("fetchone")

    def fetchmany(self, size: int | None = None) -> Any:
        return self._answer("fetchmany", self.arraysize if size is None else size)

    def fetchall(self) -> Any:
        return self._answer("fetchall")

    @IfThere
    def scroll(self, value: int, mode: str = "relative") -> Any:
        """As in psycopg2, psycopg 3 and MySQL's modules; sqlite3 has none."""
        return self._answer("scroll", value, mode)

    def __iter__(self) -> Iterator[Any]:
        work, guard, link = self._work, self._guard, self._work.link
        with guard.in_turn():
            work.ask(Request.LOOK)
            raw, rows = self._raw_cursor(), None
        while True:
            try:
                if not work.turn.is_mine():
                    guard.take_turn()
                if work.state is not State.ACTIVE:
                    work.ask(Request.LOOK)
                if self._closed:
                    self._refuse_closed()
                if self._raw is not raw:
                    raw, rows = self._raw_cursor(), None
                try:
                    rows = iter(raw) if rows is None else rows
                    with link.session.watch.awaiting(link.options.response_timeout):
                        row = next(rows)
                except StopIteration:
                    return
                except BaseException as error:
                    self._meet(error)
                    raise
            finally:
                if work.state is not State.ACTIVE:
                    work.give_turn()
            yield row

    def __next__(self) -> Any:
        return self._answer("__next__")

    # Attributes

    @property
    def closed(self) -> bool:
        """Whether the cursor was closed, or its connection."""
        return self._closed or self._work.state is State.CLOSED

    @property
    def description(self) -> Any:
        """The columns of the last result, as in PEP 249; None if there was none."""
        return None if self._raw is None else self._raw.description

    @property
    def rowcount(self) -> int:
        """How many rows the last statement has returned or changed, as in PEP 249; -1 if there was
        none, or the driver does not know."""
        return -1 if self._raw is None else self._raw.rowcount

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name not in SENT:
            raise no_attribute(self, name)
        raw, link = self._raw_cursor(), self._work.link
        if name == "mogrify" and self._session is not link.session:
            # It needs an open session, and leaves the results of another one alone.
            with self._guard.in_turn():
                self._work.need_session()
            raw = link.driver.cursor(link.session.raw, None, self._options)
        return guarded_attribute(self._guard, raw, name, self)

    # The raw cursor

    def close(self) -> None:
        """Close the cursor, also after a disconnect. Raises `DisconnectionError` if a server-side
        cursor meets one here."""
        if self._raw is None and (self.name is None or self._work.state is State.ACTIVE):
            # Its class may do more than that. And a statement may have declared a server-side one.
            self._raw_if_free()
        self._closed = True
        self._work.link.readers.discard(self._weak)
        # It is not let go: what can be asked of a closed cursor is the driver's affair.
        raw = self._raw
        if raw is None:
            return
        if self._session is not self._work.link.session:
            _close_lost(raw, self._error)
            return
        try:
            with self._guard.in_turn(), self._guard.asking():
                raw.close()
        except self._error:
            _close_lost(raw, self._error)
            raise

    def __enter__(self) -> ReconnectingCursor:
        return self

    def __exit__(self, error_type: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.close()
        except self._error:
            # That of the block goes first, and what is lost is noted.
            if error is None:
                raise

    def _refuse_closed(self) -> NoReturn:
        raise self._work.link.driver.module.InterfaceError("The cursor is closed")

    def raw_in_session(self) -> Any:
        """The raw cursor, for a statement that is executed with it in the present session."""
        if self._closed:
            self._refuse_closed()
        self.keep_rows_of_others()
        if self._session is not self._work.link.session:
            self._open()
        if self.name is not None and self._work.state is State.ACTIVE:
            with self._guard.asking():
                self._work.link.driver.own_transaction(self._session.raw)
        return self._raw

    def _raw_cursor(self) -> Any:
        """The raw cursor; results that were fetched into it can be read after its session."""
        if self._raw is None:
            with self._guard.in_turn():
                self._work.need_session()
            self._open()
            if self._closed:
                _close_lost(self._raw, self._error)
        return self._raw

    def _raw_if_free(self) -> Any:
        """The raw cursor; None if there is none yet, and one cannot be had without asking the
        server, or another thread, for something. Raises nothing but interrupts."""
        work = self._work
        if (
            self._raw is None
            and work.link.session is not NO_SESSION
            and (work.state is State.ACTIVE or work.state is State.IDLE)
            and not work.turn.is_anothers()
        ):
            # What refuses one, or finds the session lost, is told when it is used. All else can be
            # that of a signal's handler.
            with suppress(self._error, TypeError):
                self._open()
        return self._raw

    def _open(self) -> None:
        link = self._work.link
        session = link.session
        if self._raw is not None:
            _close_lost(self._raw, self._error)
        try:
            raw = link.driver.cursor(session.raw, self.name, self._options)
            for name, value in self._settings.items():
                setattr(raw, name, value)
        except BaseException as error:
            self._guard.meet(error, Moment.STATEMENT)
            raise
        self._raw, self._session = raw, session


def _close_lost(raw: Any, error: type[Exception]) -> None:
    """Close a raw cursor of a session that has ended; psycopg complains if nobody does."""
    with suppress(error):
        raw.close()
