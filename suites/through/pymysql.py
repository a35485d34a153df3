"""PyMySQL's ``connect()`` gives connections that reconnect."""

from functools import partial
from typing import Any

import pymysql

from zreconnect import FAIL_FAST, ReconnectingConnection

connect = pymysql.connect


def connect_again_and_again(**keywords: Any) -> Any:
    if keywords.get("defer_connect"):
        return connect(**keywords)
    autocommit = keywords.pop("autocommit", False)
    connection = ReconnectingConnection(
        partial(connect, **keywords), "pymysql", policy=FAIL_FAST, witness=None
    )
    connection.autocommit = bool(autocommit)
    # As the driver, which connects at once.
    connection.ping()
    return connection


pymysql.connect = pymysql.Connect = connect_again_and_again
