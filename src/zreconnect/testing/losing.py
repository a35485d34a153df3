"""Losses for unit tests, which have no server: on SQLite, whose connections are never lost.

Nothing of zreconnect is replaced. A connection of SQLite's is really closed in the middle of its
transaction, so that what the program then meets is what it would meet on a server.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any
from unittest import mock

from zreconnect.drivers import sqlite
from zreconnect.knocking import Knocking

# Who waits for a server to come back, or before work is run again. All else that waits does so for
# something that happens in another thread or on a server, and takes its time.
_WAITING = ("adapter", "answers", "guard", "outage", "retry", "server", "session")


class _SleeplessTime:
    """Stands for the module time: who sleeps does not wait, and time goes on for him all the same.

    For each thread by itself: what one has slept through is no part of another one's deadline.
    """

    def __init__(self) -> None:
        self._slept = threading.local()

    def monotonic(self) -> float:
        return time.monotonic() + getattr(self._slept, "seconds", 0.0)

    def sleep(self, seconds: float) -> None:
        self._slept.seconds = getattr(self._slept, "seconds", 0.0) + seconds


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Waiting takes no time in the block, for all threads, however long a policy has it last.

    That is waiting between two attempts to connect, and before work is run again. It counts all the
    same: a policy's timeout of ten minutes is over at once if the server is away. So wait until a
    server that is started again is ready before the program under test is to reach it. Answers take
    their time, and so does a server that says nothing.
    """
    sleepless = _SleeplessTime()
    with contextlib.ExitStack() as stack:
        for name in _WAITING:
            module = import_module(f"zreconnect.{name}")
            stack.enter_context(mock.patch.object(module, "time", sleepless))
        # Who sleeps no time need not leave it to another thread to knock, for whom it is earlier.
        stack.enter_context(mock.patch.object(Knocking, "leave_to_another", return_value=None))
        yield


@contextlib.contextmanager
def losing(
    statement: int | None = None, commit: int | None = None, unknown: bool = False
) -> Iterator[None]:
    """In the block, connections to SQLite are lost, and `no_waiting` holds.

    For unit tests of a program that gets its DSN from the test: ``sqlite:///path`` of a file, since
    a database in memory ends with its session. The SQL of the program must be SQLite's, too, and
    its parameters are marked as ``sqlite3`` has it.

    statement: which one loses its connection, counted from 1: of all that are executed in the
    block by cursors that are new in it; `executemany` is one. commit: which COMMIT loses its
    connection, counted in the same way; its transaction is rolled back, and that is found out.
    unknown: it is committed, and not found out: `CommitOutcomeUnknown`.

    Raises ValueError for what is no whole number of at least 1, and for ``unknown`` without
    ``commit``; AssertionError at the end of the block if what was to be lost did not come, so that
    no test passes that has tested nothing.
    """
    for name, number in (("statement", statement), ("commit", commit)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, not {number!r}")
    if unknown and commit is None:
        raise ValueError("unknown is the outcome of a COMMIT: say which one, as in commit=1")
    losses = _Losses(statement, commit, unknown)
    driver = sqlite.driver
    with (
        no_waiting(),
        mock.patch.object(driver, "cursor", losses.cursor),
        mock.patch.object(driver, "commit", losses.commit),
        mock.patch.object(driver, "has_committed", losses.has_committed),
    ):
        yield
    losses.check()


class _Losses:
    """What takes the place of three methods of SQLite's driver. For the arguments see `losing`."""

    def __init__(self, statement: int | None, commit: int | None, unknown: bool) -> None:
        self._unknown = unknown
        self._outstanding = {"statement": statement, "commit": commit}
        self._counts = {"statement": itertools.count(1), "commit": itertools.count(1)}
        # Those of a block around this one, if there is one.
        self._cursor, self._commit = sqlite.driver.cursor, sqlite.driver.commit
        self._has_committed = sqlite.driver.has_committed
        self._is_committed: list[Any] = []

    def cursor(self, raw: Any, name: str | None, options: Any) -> Any:
        made = self._cursor(raw, name, options)
        return raw.cursor(factory=_losing(type(made), self.is_due))

    def commit(self, raw: Any, rider: str = "") -> None:
        if self.is_due("commit"):
            if self._unknown:
                self._commit(raw, rider)
                self._is_committed.append(raw)
            sqlite.driver.close(raw)
        self._commit(raw, rider)

    def has_committed(self, raw: Any) -> bool:
        return any(raw is each for each in self._is_committed) or self._has_committed(raw)

    def is_due(self, kind: str) -> bool:
        """Whether this one, which counts, is the one that is lost."""
        is_due = next(self._counts[kind]) == self._outstanding[kind]
        if is_due:
            self._outstanding[kind] = None
        return is_due

    def check(self) -> None:
        for kind, number in self._outstanding.items():
            if number is not None:
                raise AssertionError(
                    f"{kind} {number} was to lose its connection, but there were only "
                    f"{next(self._counts[kind]) - 1} in the block, on connections to SQLite"
                )


def _losing(kind: Any, is_due: Callable[[str], bool]) -> Any:
    """A class of cursors like ``kind``, that loses its connection with a statement that is due."""

    def lose_if_due(cursor: Any) -> None:
        if is_due("statement"):
            sqlite.driver.close(cursor.connection)

    class Losing(kind):
        def execute(self, *arguments: Any) -> Any:
            lose_if_due(self)
            return super().execute(*arguments)

        def executemany(self, *arguments: Any) -> Any:
            lose_if_due(self)
            return super().executemany(*arguments)

    return Losing
