"""The database of a demonstration without a server: a file of SQLite's, and others who lock it."""

from __future__ import annotations

import itertools
import secrets
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from zreconnect.cli.errors import CommandError
from zreconnect.cli.interruptions import Way
from zreconnect.drivers.sqlite import MEMORY
from zreconnect.exceptions import one_line

# How long an interruption itself waits for a lock, in seconds.
TIMEOUT = 60.0


class FileTarget:
    """Where the job works: a new file beside the one that the parameters name.

    Use it as a context manager, which makes the file, and removes it unless ``keep`` is true.

    driver: the `IDriver` of the job.
    parameters: of a file.

    Raises `CommandError` if the file cannot be used, also when the block is entered.
    """

    #: What can be raised on the way past zreconnect.
    errors: type[Exception] = sqlite3.Error

    def __init__(self, driver: Any, parameters: dict[str, str], keep: bool) -> None:
        self.driver = driver
        if parameters["database"] == MEMORY:
            raise CommandError("argument --dsn: it must name a file, which others can lock")
        self._path = Path(f"{parameters['database']}.zreconnect_demo_{secrets.token_hex(4)}")
        #: The file for people.
        self.address: str = driver.address({"database": str(self._path)})
        #: What is kept.
        self.place = f"the database {self.address}"
        #: The DSN of the file, for the job and past it.
        self.forwarded_dsn = self.direct_dsn = self.address
        self._keep = keep
        # Nothing can be counted on the way to a file. Whoever looks has waited a little.
        self.count_requests: Callable[[], int] = itertools.count().__next__

    def __enter__(self) -> FileTarget:
        try:
            with closing(self._connect()) as connection:
                connection.execute("PRAGMA user_version = 1")
        except sqlite3.Error as error:
            raise CommandError(f"cannot use {self.address}: {one_line(error)}") from error
        return self

    def __exit__(self, *error: object) -> None:
        if not self._keep:
            for suffix in ("", "-journal"):
                Path(f"{self._path}{suffix}").unlink(missing_ok=True)

    def ways(self, stopping: threading.Event) -> dict[str, Way]:
        """Return all ways to interrupt the job, by the name of their kind.

        stopping: ends what lasts.
        """

        def hold(*statements: str) -> Way:
            def interrupt(seconds: float) -> None:
                with closing(self._connect()) as connection:
                    for statement in statements:
                        connection.execute(statement).fetchall()
                    stopping.wait(seconds)
                    connection.execute("ROLLBACK")

            return interrupt

        return {
            "locked by a writer": hold("BEGIN IMMEDIATE"),
            "locked by a reader": hold("BEGIN DEFERRED", "SELECT name FROM sqlite_master"),
            "locked for all": hold("BEGIN EXCLUSIVE"),
        }

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=TIMEOUT, isolation_level=None)
