"""The driver's ``connect()`` gives connections that reconnect."""

import os
from functools import partial
from typing import Any

from suites.compliance import DRIVER, module
from zreconnect import FAIL_FAST, ReconnectingConnection

driver = module()
connect = driver.connect


def connect_again_and_again(**keywords: Any) -> Any:
    connection = ReconnectingConnection(
        partial(connect, **keywords), os.environ[DRIVER], policy=FAIL_FAST, witness=None
    )
    # As the driver, which connects at once.
    connection.ping()
    return connection


driver.connect = connect_again_and_again
