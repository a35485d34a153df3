"""SQLAlchemy engines that zreconnect does not serve: their lost connections and their commits.

An error of such an engine does not tell whether something was committed. That of a lost COMMIT has
no statement, but neither has one that is met while rows are fetched; and that of a statement is the
same in a transaction and in autocommit mode. So what is sent is watched, by SQLAlchemy's events.

SQLAlchemy is not imported here: a program that has not imported it has no such engine.
"""

from __future__ import annotations

import sys
from typing import Any

from zreconnect import commits
from zreconnect.drivers.base import load_driver
from zreconnect.exceptions import DisconnectionError
from zreconnect.interfaces import IReconnectingConnection, Meaning

#: The drivers that know what a failure to connect means, by the names of their modules.
DRIVER_NAMES = {
    "MySQLdb": "mysqlclient",
    "psycopg": "psycopg",
    "psycopg2": "psycopg2",
    "pymysql": "pymysql",
}


def watch_commits() -> bool:
    """Note what every engine of the process commits from now on; whether SQLAlchemy is there."""
    if "sqlalchemy" not in sys.modules:
        return False
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    if not event.contains(Engine, *LISTENERS[-1]):
        for each in LISTENERS:
            event.listen(Engine, *each)
    return True


def unwrapped(error: BaseException) -> BaseException:
    """The `DisconnectionError` that SQLAlchemy has wrapped in an error of its own, or ``error``."""
    original = error.orig if _is_dbapi_error(error) else None  # type: ignore[attr-defined]
    return original if isinstance(original, DisconnectionError) else error


def is_lost(error: BaseException) -> bool:
    """Whether ``error`` is SQLAlchemy's for a lost connection, or for one that may be had later."""
    if not _is_dbapi_error(error):
        return False
    return error.connection_invalidated or _is_failure_to_connect(error)  # type: ignore[attr-defined]


def _is_dbapi_error(error: Any) -> bool:
    module = sys.modules.get("sqlalchemy.exc")
    return module is not None and isinstance(error, module.DBAPIError)


def _is_failure_to_connect(error: Any) -> bool:
    # It does not count as a lost connection for SQLAlchemy, and has neither statement nor SQLSTATE.
    original = error.orig
    state = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    if error.statement is not None or state is not None:
        return False
    for base in type(original).__mro__:
        name = DRIVER_NAMES.get(base.__module__.partition(".")[0])
        if name is not None:
            return bool(load_driver(name).connect_meaning(original, {}) is Meaning.DISCONNECT)
    return False


def _before_commit(connection: Any, *arguments: object) -> None:
    if commits.are_watched() and not _is_reconnecting(connection):
        commits.note()


def _before_statement(connection: Any, *arguments: object) -> None:
    if commits.are_watched() and not _is_reconnecting(connection) and _is_autocommit(connection):
        commits.note()


def _is_reconnecting(connection: Any) -> bool:
    """Whether the engine's connection is one of zreconnect's, which tells of its commits itself."""
    raw = connection.connection.dbapi_connection
    return bool(IReconnectingConnection.providedBy(raw))


def _is_autocommit(connection: Any) -> bool:
    """Whether a statement is a transaction of its own, or may be."""
    raw = connection.connection.dbapi_connection
    # In the modules for MySQL, ``autocommit`` is a method.
    get_autocommit = getattr(raw, "get_autocommit", None)
    return bool(get_autocommit() if get_autocommit else getattr(raw, "autocommit", True))


#: The names of the events, and who listens to them.
LISTENERS = (
    ("commit", _before_commit),
    ("commit_twophase", _before_commit),
    ("before_cursor_execute", _before_statement),
)
