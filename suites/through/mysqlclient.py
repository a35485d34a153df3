"""mysqlclient's ``connect()`` gives connections that reconnect."""

from functools import partial
from typing import Any

import MySQLdb

from zreconnect import FAIL_FAST, ReconnectingConnection

connect = MySQLdb.connect


def connect_again_and_again(*args: Any, **keywords: Any) -> Any:
    autocommit = keywords.pop("autocommit", False)
    connection = ReconnectingConnection(
        partial(connect, *args, **keywords), "mysqlclient", policy=FAIL_FAST, witness=None
    )
    connection.autocommit = bool(autocommit)
    # As the driver, which connects at once.
    connection.ping()
    return connection


MySQLdb.connect = MySQLdb.Connect = MySQLdb.Connection = connect_again_and_again
