"""Objects of the driver's that talk to the server, such as large objects and psycopg's COPY."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from zreconnect.interfaces import ACTIVE

if TYPE_CHECKING:
    from zreconnect.connection import ReconnectingConnection


class Guarded:
    """One of them. What it raises when the session is lost is what a cursor raises.

    raw_cursor: that of the statement that it belongs to, if there is one.
    """

    def __init__(
        self, connection: ReconnectingConnection, wrapped: Any, raw_cursor: Any = None
    ) -> None:
        self._connection = connection
        self._wrapped = wrapped
        self._raw_cursor = raw_cursor

    def __getattr__(self, name: str) -> Any:
        connection = self._connection
        connection._check_not_doomed()
        value = connection._guarded_attribute(self._wrapped, name, self, self._raw_cursor)
        if callable(value):
            # COPY calls one for each row.
            setattr(self, name, value)
        return value

    def __iter__(self) -> Iterator[Any]:
        return self._connection._guarded_rows(iter(self._wrapped), self._raw_cursor)

    def __enter__(self) -> Guarded:
        return self

    def __exit__(self, *error: object) -> None:
        if self._connection.state == ACTIVE:
            self.close()
