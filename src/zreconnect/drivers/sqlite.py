"""SQLite through the standard library, for developing a job that runs on a server later.

There is no server and no session that could be lost, so COMMIT always has its answer and nothing is
watched, fenced or looked up; what a server's driver does for that is left out here. The raw
connection is in autocommit mode, and BEGIN, COMMIT and ROLLBACK are statements of this driver.

A transaction begins with BEGIN IMMEDIATE: it takes the database's only lock for writing before the
first statement of the user's. A deferred transaction would take it with its first write, where
SQLite cannot let it wait if somebody else has written since it first read (SQLITE_BUSY_SNAPSHOT).
A read-only transaction is a deferred one, and reads something at once. So waiting for a lock is
part of beginning. What the lock does not come to within `BUSY_TIMEOUT` counts as an attempt to
connect that failed, and the policy decides how long that goes on.

In the middle of a transaction and at COMMIT, which waits for those who read, "database is locked"
is a transient error. After it COMMIT can be called again.

Errors are told apart by SQLite's messages, which are never translated: it has one code for all
mistakes in a statement, and Python 3.10 does not tell the codes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter
from typing import Any
from urllib.parse import quote, unquote

from zreconnect.documented import implements
from zreconnect.drivers.base import (
    OF_ANOTHER_MODULE,
    BaseDriver,
    Condition,
    Evidence,
    ServerSession,
    SessionSettings,
)
from zreconnect.exceptions import DisconnectionError
from zreconnect.interfaces import IDriver, Meaning

#: The seconds that a statement waits for a lock, if connecting was not given less.
BUSY_TIMEOUT = 5.0
MEMORY = ":memory:"
FORMS = "sqlite:///relative/path, sqlite:////absolute/path, or sqlite:// for a database in memory"
# All that there is, whatever a transaction asks for.
SERIALIZABLE = 1
LEVELS = {"READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"}
# What users set on a connection of sqlite3's.
ATTRIBUTES = ("row_factory", "text_factory")
ENCODINGS = {"UTF8", "UNICODE"}
BEGIN_TO_READ = ("BEGIN DEFERRED", "SELECT 1 FROM sqlite_master LIMIT 1")
BEGIN_TO_WRITE = ("BEGIN IMMEDIATE",)
LOCKED_MESSAGES = (
    "database is locked",
    "database table is locked",
    "database schema is locked",
)
CONDITIONS = {
    "no such table": Condition.UNDEFINED_TABLE,
    "already exists": Condition.ALREADY_EXISTS,
    "attempt to write a readonly database": Condition.READ_ONLY_TRANSACTION,
    **dict.fromkeys(LOCKED_MESSAGES, Condition.LOCK_NOT_AVAILABLE),
}
CLOSED_MESSAGE = "Cannot operate on a closed database"

_forked_in_transaction = False


class SqliteDisconnectionError(DisconnectionError, sqlite3.OperationalError):
    """A `DisconnectionError` for code that was written against sqlite3."""


class NotBegun(sqlite3.OperationalError):
    """The database was locked when a transaction was to begin."""


class Connection(sqlite3.Connection):
    """What `SqliteDriver.connect` returns: sqlite3's own, and a class for its cursors."""

    cursor_factory: type[sqlite3.Cursor] = sqlite3.Cursor

    def cursor(self, factory: Any = None) -> Any:
        return super().cursor(factory or self.cursor_factory)


@implements(IDriver)
class SqliteDriver(BaseDriver):
    """The `IDriver` for Python's sqlite3."""

    name = "sqlite"
    module = sqlite3
    disconnection_error = SqliteDisconnectionError
    has_sessions = False
    committing_methods = frozenset({"executescript"})
    ledger_table = "CREATE TABLE IF NOT EXISTS {table} (id text PRIMARY KEY, number integer)"

    # Where to connect to

    def parse(self, dsn: str) -> dict[str, str]:
        _, separator, location = dsn.partition("://")
        host, slash, path = location.partition("/")
        if not separator or host or (slash and not path) or set(path) & {"?", "#", "\0"}:
            raise ValueError(
                f"dsn is no name of an SQLite database; it has the form {FORMS}, without options "
                "and with special characters written as %XX"
            )
        path = unquote(path)
        if path in ("", MEMORY):
            return {"database": MEMORY}
        # Now, lest the program change its directory before it connects again.
        return {"database": os.path.abspath(path)}

    def address(self, parameters: Mapping[str, str]) -> str:
        path = parameters["database"]
        return "sqlite://" if path == MEMORY else f"sqlite:///{quote(os.fsencode(path))}"

    def connect(self, parameters: Mapping[str, str], timeout: float) -> Any:
        if _forked_in_transaction:
            raise sqlite3.OperationalError(
                "this process was forked inside a transaction of its parent's with SQLite, which "
                "cannot tell the locks of the two apart: fork outside transactions"
            )
        return sqlite3.connect(
            parameters["database"],
            timeout=min(timeout, BUSY_TIMEOUT),
            check_same_thread=False,
            factory=Connection,
        )

    def connect_meaning(self, error: BaseException, parameters: Mapping[str, str]) -> Meaning:
        passes = isinstance(error, TimeoutError) or _is_locked(error)
        return Meaning.DISCONNECT if passes else Meaning.PERMANENT

    def parameters(self, raw: Any) -> dict[str, str]:
        # As bytes, because a file's name need be no text, and text may be what the factory chose.
        ((path,),) = self.query(
            raw, "SELECT CAST(file AS BLOB) FROM pragma_database_list WHERE name = 'main'"
        )
        return {"database": os.fsdecode(path or MEMORY)}

    # Session

    def transaction_flag(self, raw: Any) -> Callable[[], object]:
        return partial(attrgetter("in_transaction"), raw)

    def prepare(self, raw: Any) -> None:
        if not isinstance(raw, sqlite3.Connection):
            raise TypeError(
                "connection_factory must return an sqlite3 connection, "
                f"not {raw!r}{OF_ANOTHER_MODULE}"
            )
        mode = _legacy_mode(raw)
        if raw.in_transaction:
            raise sqlite3.ProgrammingError("connection_factory made a connection in a transaction")
        if raw.isolation_level is None or mode is True:
            raise sqlite3.ProgrammingError(
                "connection_factory made a connection in autocommit mode; set autocommit on the "
                "reconnecting connection instead"
            )
        # The factory was called in this thread, which is none of the program's.
        _check_other_threads(raw)
        raw.isolation_level = None

    def keep(self, raw: Any) -> Any:
        return {name: getattr(raw, name) for name in ATTRIBUTES}

    def inherit(self, raw: Any, kept: Any) -> None:
        for name in ATTRIBUTES:
            setattr(raw, name, kept[name])

    def restore(self, raw: Any, settings: SessionSettings, replaced: dict[str, Any]) -> None:
        raw.isolation_level = None  # Again, because on_connect may have changed it.
        if settings.cursor_factory is not None:
            self.set_cursor_factory(raw, settings.cursor_factory)
        self._set_read_only(raw, settings)

    def isolation_level(self, level: int | str | None) -> int | None:
        if level is None:
            raise ValueError(
                "isolation level None, which sqlite3 takes for autocommit mode, is not that here: "
                'set autocommit = True; "DEFAULT" is the level that SQLite has by itself'
            )
        if level == SERIALIZABLE:
            return SERIALIZABLE
        if isinstance(level, str):
            if level.upper() in LEVELS:
                return SERIALIZABLE
            if level.upper() == "DEFAULT":
                return None
        names = ", ".join([*sorted(LEVELS), "DEFAULT"])
        raise ValueError(f"isolation level {level!r} is unknown; known are {names}")

    def set_client_encoding(self, raw: Any, encoding: str) -> None:
        if encoding.upper().replace("-", "").replace("_", "") not in ENCODINGS:
            raise sqlite3.NotSupportedError(f"SQLite speaks UTF-8, and not {encoding}")

    def set_cursor_factory(self, raw: Any, factory: Any) -> None:
        if not isinstance(raw, Connection):
            raise sqlite3.NotSupportedError(
                "cursor_factory needs a connection_factory that hands "
                "factory=zreconnect.drivers.sqlite.Connection to sqlite3.connect()"
            )
        raw.cursor_factory = factory or sqlite3.Cursor

    def cursor(self, raw: Any, name: str | None, options: Mapping[str, Any]) -> Any:
        names = {"cursor_factory": "factory"}
        keywords = {names.get(key, key): value for key, value in options.items()}
        if callable(name):
            # sqlite3's own argument is a class, and the first one.
            keywords["factory"] = name
        elif name is not None:
            raise sqlite3.NotSupportedError("SQLite has no server-side cursors")
        return raw.cursor(**keywords)

    def fileno(self, raw: Any) -> None:
        return None

    def close(self, raw: Any) -> None:
        # A cursor that somebody still has keeps SQLite's connection alive, with its locks.
        with contextlib.suppress(sqlite3.Error):
            raw.rollback()
        super().close(raw)

    def abandon(self, raw: Any) -> None:
        global _forked_in_transaction
        # Closing it would roll back in the parent's file. So nobody may, not even the garbage
        # collector or the end of the interpreter.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(raw))
        with contextlib.suppress(sqlite3.Error):
            # SQLite's memory of what the process has locked is copied by a fork, but not the locks
            # themselves: as long as there is one in it, the child would read files without any,
            # and never be allowed to write.
            _forked_in_transaction |= raw.in_transaction

    # Transactions

    def begin(self, raw: Any, settings: SessionSettings, rider: str = "") -> Any:
        self._set_read_only(raw, settings)
        try:
            for statement in BEGIN_TO_READ if settings.readonly else BEGIN_TO_WRITE:
                self.query(raw, statement)
        except sqlite3.Error as error:
            self.rollback(raw)
            if _is_locked(error):
                raise NotBegun(str(error)) from error
            raise
        return self._first_row(raw, rider) if rider else None

    def commit(self, raw: Any, rider: str = "") -> None:
        if not raw.in_transaction:
            raise sqlite3.InternalError(
                "There is no transaction any more. An error, such as a full disk, has made SQLite "
                "roll it back, or a statement of yours, or executescript(), has ended it."
            )
        if rider:
            self.query(raw, rider)
        self.query(raw, "COMMIT")

    def rollback(self, raw: Any) -> None:
        if raw.in_transaction:
            self.query(raw, "ROLLBACK")

    def is_at_rest(self, raw: Any) -> bool:
        # No statement of SQLite's is ever half done.
        return True

    def in_transaction(self, raw: Any) -> bool:
        return bool(raw.in_transaction)

    def query(self, raw: Any, statement: str, parameters: Any = None) -> list[Any]:
        # Neither raw.execute() nor raw.cursor(): the user's classes may change what they are given.
        cursor = sqlite3.Cursor(raw)
        cursor.execute(statement.replace("%s", "?"), parameters or ())
        return cursor.fetchall()

    def _first_row(self, raw: Any, rider: str) -> Any:
        cursor = sqlite3.Cursor(raw)
        cursor.execute(rider)
        return cursor.fetchone()

    def _set_read_only(self, raw: Any, settings: SessionSettings) -> None:
        self.query(raw, f"PRAGMA query_only = {int(bool(settings.readonly))}")

    # Errors

    def meaning(self, error: BaseException, raw: Any) -> Meaning:
        if isinstance(error, NotBegun) or CLOSED_MESSAGE in str(error):
            return Meaning.DISCONNECT
        return Meaning.TRANSIENT if _is_locked(error) else Meaning.USER

    def is_transient(self, error: BaseException) -> bool:
        return _is_locked(error)

    def condition(self, error: BaseException) -> Condition | None:
        if not isinstance(error, sqlite3.OperationalError):
            return None
        found = (CONDITIONS[part] for part in CONDITIONS if part in str(error))
        return next(found, None)

    # What is asked about sessions that were lost

    def is_commit(self, raw_cursor: Any) -> bool:
        return False

    def identify(self, raw: Any) -> ServerSession:
        return ServerSession(os.getpid(), None)

    def end_session(self, raw: Any, session: ServerSession, evidence: Evidence) -> bool:
        return False

    def full_name(self, raw: Any, table: str) -> str | None:
        return table

    def limit_lock_waits(self, raw: Any, limit: float) -> float:
        ((before,),) = self.query(raw, "PRAGMA busy_timeout")
        self.query(raw, f"PRAGMA busy_timeout = {int(limit * 1000)}")
        return float(before) / 1000


def _legacy_mode(raw: Any) -> bool | None:
    """The attribute autocommit, which exists since Python 3.12; if it is False, it is set back.

    There always is a transaction then; what the factory has done in it is committed.
    """
    mode = getattr(raw, "autocommit", None)
    if mode is False:
        raw.autocommit = True
        # sqlite3.LEGACY_TRANSACTION_CONTROL
        raw.autocommit = -1
    return mode


def _check_other_threads(raw: Any) -> None:
    with ThreadPoolExecutor(1) as other_thread:
        try:
            other_thread.submit(raw.execute, "SELECT 1").result()
        except sqlite3.ProgrammingError as error:
            raise sqlite3.ProgrammingError(
                "connection_factory made a connection for a single thread: have it call "
                "sqlite3.connect(..., check_same_thread=False); zreconnect sees to it that threads "
                "take turns"
            ) from error


def _is_locked(error: BaseException) -> bool:
    return isinstance(error, sqlite3.OperationalError) and any(
        message in str(error) for message in LOCKED_MESSAGES
    )


driver = SqliteDriver()
