"""A savepoint inside a connection's transaction."""

from __future__ import annotations

import itertools
from typing import Any

from zreconnect.documented import implements
from zreconnect.interfaces import ISavepoint

_numbers = itertools.count(1)


@implements(ISavepoint)
class Savepoint:
    """A savepoint inside a transaction of a `ReconnectingConnection`.

    name: the one that the program has given it, if it has. Raises TypeError if that is no string.
    """

    def __init__(self, connection: Any, name: str | None = None) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"savepoint_name must be a string, not {type(name).__name__}")
        self._connection = connection
        quote = connection.work.link.driver.quote
        self._name = (
            quote + name.replace(quote, 2 * quote) + quote
            if name
            else f"zreconnect_{next(_numbers)}"
        )

    def set(self) -> None:
        """Set it. Raises what a statement raises."""
        self._execute(f"SAVEPOINT {self._name}")

    def rollback(self) -> None:
        self._execute(f"ROLLBACK TO SAVEPOINT {self._name}")

    def release(self) -> None:
        self._execute(f"RELEASE SAVEPOINT {self._name}")

    def _execute(self, statement: str) -> None:
        guard, link = self._connection.guard, self._connection.work.link
        with guard.in_turn():
            guard.need_transaction()
            with guard.asking():
                # In a pipeline, too, this waits for the answer.
                link.driver.query(link.session.raw, statement)
