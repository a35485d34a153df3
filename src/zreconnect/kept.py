"""Rows that a server has sent and the program has not fetched, for when their session has ended.

psycopg2 gives them out no longer than its connection is open, and takes a lost one for closed as
soon as anything has found it lost. So they are fetched before something is asked of the server
outside the transaction that they belong to, and within it if they are few; then they are in the
client twice.
"""

from __future__ import annotations

from typing import Any

from zreconnect.session import Session
from zreconnect.watchdog import NO_WATCH

#: What costs nothing to have twice: as many as psycopg2 fetches at once from a server-side cursor.
FEW_ROWS = 2000
#: Stands for the session of kept rows, which need none.
KEPT = Session(None, None, NO_WATCH, 0)


class KeptRows:
    """Takes a raw cursor's place, until its next statement.

    raw: the raw cursor, which has the rest. session: that of the raw cursor, whose next statement
    it executes, unless the session has ended. rows: all rows. rownumber: the next one's index.
    """

    def __init__(self, raw: Any, session: Session, rows: list[Any], rownumber: int) -> None:
        self.raw = raw
        self.session = session
        self._rows = rows
        self.rownumber = rownumber

    @classmethod
    def of(cls, raw: Any, session: Session) -> KeptRows | None:
        """Those of ``raw``, which stays as it is; None if they cannot be read, which the program
        is to meet where it reads them."""
        rownumber = raw.rownumber
        try:
            raw.scroll(0, "absolute")
            return cls(raw, session, raw.fetchall(), rownumber)
        except Exception:
            return None
        finally:
            raw.scroll(rownumber, "absolute")

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
