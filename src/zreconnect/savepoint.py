"""A savepoint inside a connection's transaction."""

from __future__ import annotations

from typing import Any

from zreconnect.documented import implements
from zreconnect.interfaces import ISavepoint


@implements(ISavepoint)
class Savepoint:
    """A savepoint inside a transaction of a `ReconnectingConnection`.

    name: as it stands in statements. is_named: whether the program has given it.
    """

    def __init__(self, connection: Any, name: str, is_named: bool = False) -> None:
        self.is_named = is_named
        self._connection = connection
        self._name = name

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
