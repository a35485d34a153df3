"""A DB-API cursor that outlives its server sessions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from zope.interface import implementer

from zreconnect.guarded import Guarded
from zreconnect.interfaces import ACTIVE, IReconnectingCursor

if TYPE_CHECKING:
    from zreconnect.connection import ReconnectingConnection


class _Setting:
    """An attribute of the raw cursor that the next raw cursor gets again.

    default: its value before there is a raw cursor; without one, reading it makes a raw cursor.
    """

    def __init__(self, default: Any = None) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, cursor: ReconnectingCursor | None, owner: type | None = None) -> Any:
        if cursor is None:
            return self
        if self._name in cursor._settings:
            return cursor._settings[self._name]
        if self._default is None:
            return getattr(cursor._raw_cursor(), self._name)
        return getattr(cursor._raw, self._name, self._default)

    def __set__(self, cursor: ReconnectingCursor, value: Any) -> None:
        if cursor._raw is not None:
            setattr(cursor._raw, self._name, value)
        cursor._settings[self._name] = value


@implementer(IReconnectingCursor)
class ReconnectingCursor:
    """See `IReconnectingCursor`; made by `ReconnectingConnection.cursor`."""

    # With slots, setting an attribute that is not kept here is an error and not ignored.
    __slots__ = (
        "__weakref__",
        "_closed",
        "_error",
        "_options",
        "_raw",
        "_raw_connection",
        "_settings",
        "connection",
        "name",
    )

    arraysize = _Setting(1)
    itersize = _Setting(2000)
    binary_types = _Setting()
    format = _Setting()
    row_factory = _Setting()
    scrollable = _Setting()
    string_types = _Setting()
    tzinfo_factory = _Setting()
    withhold = _Setting()

    def __init__(
        self,
        connection: ReconnectingConnection,
        name: str | None,
        cursor_factory: Any,
        options: dict[str, Any],
    ) -> None:
        self._raw: Any = None
        self._raw_connection: Any = None
        self.connection = connection
        self.name = name
        self._error = connection._driver.module.Error
        self._options = options
        if cursor_factory is not None:
            options["cursor_factory"] = cursor_factory
        self._settings: dict[str, Any] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.connection!r}>"

    # Statements

    def execute(self, query: Any, vars: Any = None, **options: Any) -> Any:
        arguments = (query,) if vars is None else (query, vars)
        with self.connection._in_turn():
            if self.connection._may_begin_with_statement() and self.name is None:
                self._open_in_session()
                execute = partial(self._raw.execute, *arguments, **options)
                if self.connection._begin_with_statement(self._raw, arguments, execute):
                    return self
            return self._statement("execute", *arguments, **options)

    def executemany(self, query: Any, vars_list: Any, **options: Any) -> Any:
        return self._statement("executemany", query, vars_list, **options)

    def callproc(self, procname: str, parameters: Any = None) -> Any:
        arguments = (procname,) if parameters is None else (procname, parameters)
        return self._statement("callproc", *arguments)

    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> Any:
        """As in psycopg2."""
        return self._statement("copy_expert", sql, file, size)

    def copy_from(self, file: Any, table: str, *args: Any, **keywords: Any) -> Any:
        """As in psycopg2."""
        return self._statement("copy_from", file, table, *args, **keywords)

    def copy_to(self, file: Any, table: str, *args: Any, **keywords: Any) -> Any:
        """As in psycopg2."""
        return self._statement("copy_to", file, table, *args, **keywords)

    @contextmanager
    def copy(self, statement: Any, params: Any = None, **options: Any) -> Iterator[Any]:
        """As in psycopg 3."""
        block = self._statement("copy", statement, params, **options)
        with self.connection._guarded_block(block, self._raw) as copy:
            yield Guarded(self.connection, copy, self._raw)

    def stream(self, query: Any, params: Any = None, **options: Any) -> Iterator[Any]:
        """As in psycopg 3."""
        rows = self._statement("stream", query, params, **options)
        yield from self.connection._guarded_rows(rows, self._raw)

    def _statement(self, method: str, *args: Any, **keywords: Any) -> Any:
        connection = self.connection
        with connection._in_turn():
            connection._need_transaction()
            self._open_in_session()
            # Not connection._guarded(): that takes a fifth of the Python of a short statement, and
            # as much of that of each row below.
            try:
                with connection._watch.awaiting(connection._response_timeout):
                    if self.name is not None and connection._state == ACTIVE:
                        connection._driver.own_transaction(connection._raw)
                    result = getattr(self._raw, method)(*args, **keywords)
            except self._error as error:
                connection._check_statement_lost(error, self._raw)
                raise
            if connection._observer.watches_statements:
                connection._observer.executed(self._raw)
            return self if result is self._raw else result

    # Results

    def fetchone(self) -> Any:
        return self._answer("fetchone")

    def fetchmany(self, size: int | None = None) -> Any:
        return self._answer("fetchmany", self.arraysize if size is None else size)

    def fetchall(self) -> Any:
        return self._answer("fetchall")

    def _answer(self, method: str, *args: Any) -> Any:
        connection = self.connection
        with connection._in_turn():
            connection._check_usable()
            raw = self._raw_cursor()
            try:
                with connection._watch.awaiting(connection._response_timeout):
                    return getattr(raw, method)(*args)
            except self._error as error:
                connection._check_lost(error)
                raise

    def __iter__(self) -> Iterator[Any]:
        connection = self.connection
        with connection._in_turn():
            connection._check_usable()
            rows = iter(self._raw_cursor())
        while True:
            with connection._in_turn():
                connection._check_usable()
                try:
                    with connection._watch.awaiting(connection._response_timeout):
                        row = next(rows)
                except StopIteration:
                    return
                except self._error as error:
                    connection._check_lost(error)
                    raise
            yield row

    def __next__(self) -> Any:
        return self._answer("__next__")

    # Attributes

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def description(self) -> Any:
        return None if self._raw is None else self._raw.description

    @property
    def rowcount(self) -> int:
        return -1 if self._raw is None else self._raw.rowcount

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return self.connection._guarded_attribute(self._raw_cursor(), name, self)

    # The raw cursor

    def close(self) -> None:
        """Close the cursor, also after a disconnect. Raises `DisconnectionError` if a server-side
        cursor meets one here."""
        self._closed = True
        raw, self._raw = self._raw, None
        raw_connection, self._raw_connection = self._raw_connection, None
        if raw is None:
            return
        if raw_connection is not self.connection._raw:
            _close_lost(raw, self._error)
            return
        with self.connection._in_turn(), self.connection._guarded():
            raw.close()

    def __enter__(self) -> ReconnectingCursor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _raw_cursor(self) -> Any:
        """The raw cursor; results that were fetched into it can be read after its session."""
        if self._raw is None:
            self.connection._need_session()
            self._open()
        return self._raw

    def _open_in_session(self) -> None:
        """Have a raw cursor of the connection's present session."""
        if self._raw_connection is not self.connection._raw:
            self._open()

    def _open(self) -> None:
        if self._closed:
            raise self.connection._driver.module.InterfaceError("The cursor is closed")
        raw_connection = self.connection._raw
        if self._raw is not None:
            _close_lost(self._raw, self._error)
        with self.connection._guarded():
            self._raw = self.connection._driver.cursor(raw_connection, self.name, self._options)
        self._raw_connection = raw_connection
        for name, value in self._settings.items():
            setattr(self._raw, name, value)


def _close_lost(raw: Any, error: type[Exception]) -> None:
    """Close a raw cursor of a session that has ended; psycopg complains if nobody does."""
    with suppress(error):
        raw.close()
