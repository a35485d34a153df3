"""Rows that a server has sent and the program has not fetched, for when their session has ended.

psycopg2 gives them out no longer than its connection is open, and takes a lost one for closed as
soon as anything has found it lost. So they are fetched before something is asked of the server
outside the transaction that they belong to, and within it if they are few; then they are in the
client twice.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

from zreconnect.session import Session
from zreconnect.states import State
from zreconnect.watchdog import NO_WATCH

if TYPE_CHECKING:
    from zreconnect.work import Work

#: Stands for the session of kept rows, which need none.
KEPT = Session(None, None, NO_WATCH, 0)
# The ways to read rows, besides fetchall().
_WAYS = ("fetchone", "fetchmany", "__iter__", "__next__")


def rows_of(raw: Any) -> list[Any]:
    """All rows of a raw cursor, which stays as it is.

    None of them if they cannot be read, which the program is to meet where it reads them; or if a
    class of the program's may give others in other ways.
    """
    if not _are_alike(raw.__class__):
        return []
    rownumber = raw.rownumber
    try:
        rows = _read(raw)
    except Exception:
        # It is the rows' own if it comes again, and else that of a signal's handler.
        try:
            _read(raw)
        except Exception:
            return []
        raise
    finally:
        raw.scroll(rownumber, "absolute")
    return rows if isinstance(rows, list) and len(rows) == raw.rowcount else []


def _read(raw: Any) -> Any:
    raw.scroll(0, "absolute")
    return raw.fetchall()


@functools.cache
def _are_alike(cursor_class: type[Any]) -> bool:
    """Whether fetchall() is defined by the class that defines how rows are read, or a later one."""
    places = {
        name: place
        for place, each in reversed([*enumerate(cursor_class.__mro__)])
        for name in vars(each)
    }
    return all(places["fetchall"] <= places[name] for name in _WAYS)


class KeptRows:
    """Takes the place of a raw cursor whose session has ended.

    raw: the raw cursor, which has the rest. rows: all rows.
    """

    def __init__(self, raw: Any, rows: list[Any]) -> None:
        self.raw = raw
        self._rows = rows
        self.rownumber = raw.rownumber

    def fetchone(self) -> Any:
        return next(self, None)

    def fetchmany(self, size: int) -> list[Any]:
        # psycopg2 takes a negative number for all that are left.
        size = size if size >= 0 else len(self._rows)
        start, self.rownumber = self.rownumber, min(self.rownumber + size, len(self._rows))
        return self._rows[start : self.rownumber]

    def fetchall(self) -> list[Any]:
        return self.fetchmany(len(self._rows))

    def __iter__(self) -> KeptRows:
        return self

    def __next__(self) -> Any:
        if self.rownumber == len(self._rows):
            raise StopIteration
        self.rownumber += 1
        return self._rows[self.rownumber - 1]

    def scroll(self, value: int, mode: str) -> None:
        """Raises what psycopg2 raises."""
        if mode not in ("relative", "absolute"):
            raise self.raw.connection.ProgrammingError(
                "scroll mode must be 'relative' or 'absolute'"
            )
        rownumber = value + (self.rownumber if mode == "relative" else 0)
        if not 0 <= rownumber < len(self._rows):
            raise self.raw.connection.ProgrammingError("scroll destination out of bounds")
        self.rownumber = rownumber

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


class KeepsRows:
    """The part of a `ReconnectingCursor` that keeps its rows."""

    __slots__ = ("_kept", "_raw", "_session")

    name: str | None
    # The raw cursor's rows, if they had to be kept; none if that was in vain.
    _kept: list[Any] | None
    _raw: Any
    # The session that the raw cursor belongs to.
    _session: Session
    _weak: weakref.ref[Any]
    _work: Work

    def keep_rows_of_others(self) -> None:
        """Before a statement that may find the session lost; its own rows are not read any more."""
        link = self._work.link
        link.readers.discard(self._weak)
        self._kept = None
        link.keep_rows_before_request(self._work.state is State.ACTIVE)

    def has_executed(self) -> None:
        """It has executed a statement, whose rows may have to be kept."""
        link = self._work.link
        if link.driver.loses_rows and self.name is None and self._raw.description is not None:
            link.readers.add(self._weak)

    def keep_rows(self, at_most: float) -> bool:
        """Keep the rows that are in the client and were not fetched, for after the session's end.

        Whether nothing is left to be kept; there may be more than ``at_most``. Raises nothing but
        interrupts.
        """
        raw = self._raw
        if raw is None or raw.closed or raw.rownumber >= raw.rowcount:
            return True
        if raw.rowcount > at_most:
            return False
        self._kept = rows_of(raw)
        self._work.link.keepers.add(self)
        return True

    def leave_session(self) -> None:
        """The session ends: from now on its rows are those that were kept, if there are any."""
        if self._kept:
            kept = KeptRows(self._raw, self._kept)
            self._raw, self._session, self._kept = kept, KEPT, None
