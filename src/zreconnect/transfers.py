"""Statements of a cursor whose data the program gives, or takes, while they are executed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zreconnect.guard import Guard
from zreconnect.lent import Lent
from zreconnect.proxies import Guarded, IfThere, guarded_block, guarded_rows
from zreconnect.work import Work


class Transfers:
    """The methods of a `ReconnectingCursor` for them."""

    __slots__ = ()

    _work: Work
    _guard: Guard
    _raw: Any

    def _raw_cursor(self) -> Any:
        raise NotImplementedError

    def _statement(self, method: str, *args: Any, **keywords: Any) -> Any:
        raise NotImplementedError

    def _executes_unseen(self) -> None:
        raise NotImplementedError

    @IfThere
    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> Any:
        """As in psycopg2."""
        with Lent(self._work.link, file) as lent:
            return self._statement("copy_expert", sql, lent, size)

    @IfThere
    def copy_from(self, file: Any, table: str, *args: Any, **keywords: Any) -> Any:
        """As in psycopg2."""
        with Lent(self._work.link, file) as lent:
            return self._statement("copy_from", lent, table, *args, **keywords)

    @IfThere
    def copy_to(self, file: Any, table: str, *args: Any, **keywords: Any) -> Any:
        """As in psycopg2."""
        with Lent(self._work.link, file) as lent:
            return self._statement("copy_to", lent, table, *args, **keywords)

    @IfThere
    @contextmanager
    def copy(self, statement: Any, params: Any = None, **options: Any) -> Iterator[Any]:
        """As in psycopg 3."""
        block = self._statement("copy", statement, params, **options)
        self._executes_unseen()
        with guarded_block(self._guard, block, self._raw) as copy:
            yield Guarded(self._guard, copy, self._raw, in_block=True)

    @IfThere
    def stream(self, query: Any, params: Any = None, **options: Any) -> Iterator[Any]:
        """As in psycopg 3."""
        rows = self._statement("stream", query, params, **options)
        self._executes_unseen()
        yield from guarded_rows(self._guard, rows, self._raw)
