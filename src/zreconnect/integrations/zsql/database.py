"""What a Z SQL Method calls: executes its statements, as part of the request's transaction."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Any

from zreconnect.adapter import ReconnectingDatabaseAdapter
from zreconnect.dsn import driver_name
from zreconnect.integrations.zsql.columns import LEVELS, database_of

# What Shared.DC.ZRDB puts between statements.
DELIMITER = "\0"


@dataclass(frozen=True)
class Settings:
    """What a connection object in Zope is told; see `ReconnectingSQLConnection`.

    Raises ValueError, naming the setting and not quoting the DSN, for one that makes no sense.
    """

    connection_string: str = field(repr=False)
    zdatetime: bool
    tilevel: int
    encoding: str
    timeout: float | None

    def __post_init__(self) -> None:
        if self.tilevel not in LEVELS:
            known = ", ".join(f"{number}: {name}" for number, name in LEVELS.items())
            raise ValueError(f"tilevel {self.tilevel!r} is unknown; known are {known}")


class SQLDatabase:
    """All threads' connections of one connection object in Zope.

    A thread's is the same in all of a transaction, however often Zope loads the object meanwhile.

    Raises ValueError, as `Settings`.
    """

    def __init__(self, settings: Settings) -> None:
        dsn = dsn_of(settings.connection_string)
        self._zdatetime = settings.zdatetime
        self._database = database = database_of(driver_name(dsn))
        self._adapter = ReconnectingDatabaseAdapter(
            dsn,
            timeout=settings.timeout,
            on_connect=lambda raw: database.set_up(raw, settings.tilevel, settings.zdatetime),
        )
        if settings.encoding:
            self._adapter.setEncoding(settings.encoding)

    def query(
        self, query_string: str, max_rows: int | None = None, query_data: Any = None
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        """Execute statements with `DELIMITER` between them, and return the columns and rows of the
        last that has some: what ``Shared.DC.ZRDB.Results`` takes.

        max_rows: how many at most; all if it is None or 0. query_data: parameters for each of them.

        Raises `DisconnectionError`, upon which the publisher runs the request again, and the other
        errors of `IZopeDatabaseAdapter`; the driver's ProgrammingError for rows of two kinds.
        """
        cursor = self._adapter().cursor()
        description: Any = None
        rows: list[Any] = []
        for statement in filter(str.strip, query_string.split(DELIMITER)):
            cursor.execute(statement, query_data or None)
            if cursor.description is None:
                continue
            if description is not None and _names(cursor.description) != _names(description):
                raise cursor.connection.ProgrammingError(
                    "a Z SQL Method has two statements whose rows have different columns"
                )
            description = cursor.description
            rows = cursor.fetchmany(max_rows) if max_rows else cursor.fetchall()
        cursor.close()
        items = [self._item(*column) for column in description or ()]
        letters = [item["type"] for item in items]
        convert = self._database.converter(letters) if self._zdatetime else None
        return items, list(map(convert or tuple, rows))

    def tables(self, rdb: int = 0) -> list[dict[str, Any]]:
        """The tables and views: ``table_name``, ``table_type`` (TABLE or VIEW) and ``owner``."""
        rows = self._rows(self._database.tables)
        return [{"table_name": name, "table_type": kind, "owner": who} for name, kind, who in rows]

    def columns(self, table_name: str) -> list[dict[str, Any]]:
        """A table's columns: ``name``, ``type``, ``short_type`` and ``null``; none if there is no
        such table."""
        rows = self._rows(self._database.columns, table_name)
        return [
            {"name": name, "type": kind, "short_type": short, "null": null == "YES"}
            for name, kind, short, null in rows
        ]

    def open(self) -> None:
        """Open the calling thread's session, unless there is one. Raises what
        `IManageableZopeDatabaseAdapter.connect` raises."""
        self._adapter.connect()

    def close(self) -> None:
        """End the calling thread's session; the others' end before their next transactions. Who
        asks something reconnects."""
        self._adapter.disconnect()

    def _rows(self, statement: str, *parameters: str) -> list[Any]:
        cursor = self._adapter().cursor()
        cursor.execute(statement, parameters or None)
        rows: list[Any] = cursor.fetchall()
        cursor.close()
        return rows

    def _item(
        self, name: Any, code: Any, width: Any, _size: Any, precision: Any, scale: Any, null: Any
    ) -> dict[str, Any]:
        letter = self._database.letters.get(code, self._database.other)
        return {
            "name": name,
            "type": letter,
            "width": width,
            "precision": precision,
            "scale": scale,
            "null": null,
        }


def dsn_of(connection_string: str) -> str:
    """The DSN that it is, or that is in the environment variable which it names as ENV:NAME.

    Raises ValueError if there is no such variable.
    """
    prefix, _, name = connection_string.partition(":")
    if prefix != "ENV":
        return connection_string
    if name not in os.environ:
        raise ValueError(f"the environment variable {name}, which was to be the DSN, is not set")
    return os.environ[name]


def _names(description: Any) -> list[Any]:
    return [(column[0], column[1]) for column in description]


_databases: dict[Settings, SQLDatabase] = {}
_lock = threading.Lock()


def shared_database(settings: Settings) -> SQLDatabase:
    """The one for these settings in this process. Talks to nobody.

    Zope has a copy of the connection object for each of its threads, and forgets what is not stored
    of one when it likes. Raises ValueError, as `Settings`.
    """
    with _lock:
        if settings not in _databases:
            _databases[settings] = SQLDatabase(settings)
        return _databases[settings]


def forget_database(settings: Settings) -> None:
    """End what the connection object has used that is now told something else."""
    with _lock:
        database = _databases.pop(settings, None)
    if database is not None:
        database.close()
