"""What ``psycopg.connect`` returns reconnects."""

from typing import Any

import psycopg

from zreconnect import FAIL_FAST, ReconnectingConnection

connect = psycopg.Connection.connect.__func__  # type: ignore[attr-defined]


def connect_reconnecting(
    cls: Any, conninfo: str = "", *, autocommit: bool = False, **options: Any
) -> Any:
    if cls is not psycopg.Connection:
        return connect(cls, conninfo, autocommit=autocommit, **options)
    connection = ReconnectingConnection(
        lambda: connect(cls, conninfo, **options), driver="psycopg", policy=FAIL_FAST
    )
    # What is wrong shows at once, as with the driver's own.
    assert connection.driver_connection is not None
    connection.autocommit = autocommit
    return connection


psycopg.Connection.connect = classmethod(connect_reconnecting)  # type: ignore[assignment]
psycopg.connect = psycopg.Connection.connect
