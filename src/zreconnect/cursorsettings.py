"""What a program sets on a cursor, and the next raw cursor gets again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zreconnect.documented import documented_by
from zreconnect.interfaces import IReconnectingCursor


class _Setting:
    """An attribute of the raw cursor that the next raw cursor gets again.

    default: its value before there is a raw cursor; without one, reading it makes a raw cursor.
    """

    def __init__(self, default: Any = None, doc: str | None = None) -> None:
        self._default = default
        if doc is not None:
            self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, cursor: SettingsOfCursor | None, owner: type | None = None) -> Any:
        if cursor is None:
            return self
        if self._name in cursor._settings:
            return cursor._settings[self._name]
        if self._default is None:
            return getattr(cursor._raw_cursor(), self._name)
        return getattr(cursor._raw, self._name, self._default)

    def __set__(self, cursor: SettingsOfCursor, value: Any) -> None:
        if cursor._raw is not None:
            cursor.have_raw_cursor_in_place()
            setattr(cursor._raw, self._name, value)
        cursor._settings[self._name] = value


@documented_by(IReconnectingCursor)
class SettingsOfCursor:
    """The attributes of a `ReconnectingCursor` that can be set."""

    __slots__ = ()

    _raw: Any
    _settings: dict[str, Any]
    have_raw_cursor_in_place: Callable[[], None]

    arraysize = _Setting(1)
    itersize = _Setting(2000)
    binary_types = _Setting(doc="As in psycopg2.")
    format = _Setting(doc="As in psycopg 3.")
    executemany_fallback = _Setting(doc="As in mysqlclient.")
    max_stmt_length = _Setting(doc="As in PyMySQL and mysqlclient.")
    row_factory = _Setting(doc="As in psycopg 3 and sqlite3.")
    scrollable = _Setting(doc="As in psycopg2 and psycopg 3.")
    string_types = _Setting(doc="As in psycopg2.")
    tzinfo_factory = _Setting(doc="As in psycopg2.")
    withhold = _Setting(doc="As in psycopg2 and psycopg 3.")

    def _raw_cursor(self) -> Any:
        raise NotImplementedError
