"""psycopg2's ``connect()`` gives connections that reconnect; asynchronous ones are its own."""

from functools import partial
from typing import Any

import psycopg2

from zreconnect import FAIL_FAST, ReconnectingConnection

connect = psycopg2.connect


def connect_again_and_again(*args: Any, **keywords: Any) -> Any:
    if keywords.get("async") or keywords.get("async_"):
        return connect(*args, **keywords)
    connection = ReconnectingConnection(
        partial(connect, *args, **keywords), "psycopg2", policy=FAIL_FAST
    )
    # As the driver, which connects at once.
    connection.ping()
    return connection


psycopg2.connect = connect_again_and_again
