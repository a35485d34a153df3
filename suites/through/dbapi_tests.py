"""The compliance suite for the driver that ``SUITE_DRIVER`` names, in ``SUITE_DSN``'s database."""

import importlib
import os
from typing import Any
from urllib.parse import urlsplit

import dbapi20

DRIVER, DSN = os.environ["SUITE_DRIVER"], os.environ["SUITE_DSN"]
MODULES = {"mysqlclient": "MySQLdb", "sqlite": "sqlite3"}
MODULE: Any = importlib.import_module(MODULES.get(DRIVER, DRIVER))


def connect() -> Any:
    """A connection of the driver's own."""
    url = urlsplit(DSN)
    if url.scheme == "sqlite":
        return MODULE.connect(url.path.removeprefix("/"))
    if url.scheme == "mysql":
        return MODULE.connect(
            host=url.hostname,
            port=url.port,
            user=url.username,
            password=url.password,
            database=url.path[1:],
        )
    return MODULE.connect(DSN)


class ComplianceTests(dbapi20.DatabaseAPI20Test):
    driver = MODULE
    connect = staticmethod(connect)

    def _connect(self) -> Any:
        return self.connect()

    # What the suite leaves to each driver.

    def test_non_idempotent_close(self) -> None:
        self.skipTest("reasonable persons differ about it, the suite says")

    def test_nextset(self) -> None:
        self.skipTest("optional")

    def test_setoutputsize(self) -> None:
        self.skipTest("optional")
