"""A DB-API cursor that outlives its server sessions."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from zreconnect.beginning import may_begin_along
from zreconnect.cursorsettings import SettingsOfCursor
from zreconnect.documented import implements
from zreconnect.interfaces import IPipeliningDriver, IReconnectingCursor
from zreconnect.kept import KEPT
from zreconnect.lent import lend_items
from zreconnect.proxies import IfThere, guarded_attribute, no_attribute
from zreconnect.results import Results
from zreconnect.session import NO_SESSION
from zreconnect.states import Moment, State
from zreconnect.transfers import Transfers

if TYPE_CHECKING:
    from zreconnect.connection import ReconnectingConnection
    from zreconnect.link import Link

# Where the modules for MySQL, and psycopg 3, have what was sent: its manual tells of it.
SENT = ("_executed", "_query")


@implements(IReconnectingCursor)
class ReconnectingCursor(SettingsOfCursor, Transfers, Results):
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
        self._run: list[Any] = []
        self._ahead: Iterator[Any] | None = None
        self._has_last_run = False
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
                    return self if driver.returns_cursor else None
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
        work, guard, link = self._work, self._guard, self._work.link
        try:
            if not work.turn.is_mine():
                guard.take_turn()
            if self._closed:
                self._refuse_closed()
            if link.readers or self._kept is not None:
                self.keep_rows_of_others()
            if not may_begin_along(work):
                return False
            if self._session is not link.session:
                self._open()
            if not link.driver.may_begin_with(link.session.raw, self._raw, *arguments):
                return False
            if self._ahead is not None:
                # What is refused before it is sent leaves the rows of the statement before.
                self.have_raw_cursor_in_place()
                self._forget_rows_ahead()
            executed = None
            try:
                if not guard.begin_along(self._raw, arguments, options):
                    return False
                executed = self._raw
                if link.driver.loses_rows and executed.description is not None:
                    link.readers.add(self._weak)
                return True
            finally:
                # It may have been executed, too, if something else was raised.
                if link.observer.watches_statements:
                    link.observer.executed(executed)
        finally:
            if work.state is not State.ACTIVE:
                work.give_turn()

    # This does what Guard.in_turn() and Guard.asking() do, with fewer Python calls.

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
            if link.settings.pooled:
                link.check_statement(query, self._options | self._settings)
            if work.state is State.ACTIVE and (
                # Spares most statements the call.
                (";" in query or link.driver.may_chain(query) if isinstance(query, str) else True)
                and link.driver.chains(query)
            ):
                link.statement_ends()
            session = link.session
            if self._session is not session:
                self._open()
            if self._ahead is not None:
                # What is refused before it is sent leaves the rows of the statement before.
                self.have_raw_cursor_in_place()
                self._forget_rows_ahead()
            raw = self._raw
            work.has_only_read = False
            try:
                call = getattr(raw, method)
                if self.name is not None and work.state is State.ACTIVE:
                    call = partial(_call_in_own_transaction, link, call)
                if link.options.response_timeout is not None:
                    call = partial(session.watch.call, link.options.response_timeout, call)
                result = call(*args, **keywords)
            except BaseException as error:
                guard.meet(error, Moment.STATEMENT, raw)
                # It may have been executed all the same.
                self._executes_unseen()
                raise
            if work.state is State.ACTIVE and not session.in_transaction():
                link.statement_ends()
            if link.observer.watches_statements:
                link.observer.executed(raw)
            if link.driver.loses_rows and self.name is None and raw.description is not None:
                link.readers.add(self._weak)
            return self if result is raw else result
        finally:
            if work.state is not State.ACTIVE:
                work.give_turn()

    # Attributes

    @property
    def closed(self) -> bool:
        """Whether the cursor was closed, or its connection."""
        return self._closed or self._work.state is State.CLOSED

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name not in SENT:
            raise no_attribute(self, name)
        raw, link = self._raw_cursor(), self._work.link
        if name == "mogrify" and self._session is not link.session:
            # It needs an open session, and leaves the results of another one alone.
            with self._guard.in_turn():
                self._work.need_session()
            raw = link.driver.cursor(link.session.raw, None, self._options)
        value = guarded_attribute(self._guard, raw, name, self)
        if not callable(value) or isinstance(value, type):
            return value
        return partial(self._call_in_place, value)

    def _call_in_place(self, method: Any, *args: Any, **keywords: Any) -> Any:
        self.have_raw_cursor_in_place()
        return method(*args, **keywords)

    # The raw cursor

    def close(self) -> None:
        """Close the cursor, also after a disconnect. Raises `DisconnectionError` if a server-side
        cursor meets one here."""
        if self._raw is None and (self.name is None or self._work.state is State.ACTIVE):
            # Its class may do more than that. And a statement may have declared a server-side one.
            self._raw_if_free()
        self._closed = True
        if self._ahead is not None:
            self._forget_rows_ahead()
        self._work.link.readers.discard(self._weak)
        # It is not let go: what can be asked of a closed cursor is the driver's affair.
        raw = self._raw
        if raw is None:
            return
        if self._session is not self._work.link.session:
            _close_lost(raw, self._error)
            return
        link, close = self._work.link, raw.close
        if link.options.response_timeout is not None:
            close = partial(link.session.watch.call, link.options.response_timeout, close)
        try:
            with self._guard.in_turn():
                try:
                    close()
                except BaseException as error:
                    self._guard.meet(error, Moment.STATEMENT)
                    raise
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
        self.have_raw_cursor_in_place()
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
        self._forget_rows_ahead()
        self._raw, self._session = raw, session


def _close_lost(raw: Any, error: type[Exception]) -> None:
    """Close a raw cursor of a session that has ended; psycopg complains if nobody does."""
    with suppress(error):
        raw.close()


def _call_in_own_transaction(link: Link, call: Any, *args: Any, **keywords: Any) -> Any:
    """What a server-side cursor returns, for which the module has to know of the transaction."""
    link.driver.own_transaction(link.session.raw)
    return call(*args, **keywords)
