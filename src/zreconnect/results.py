"""The rows of a cursor's results, and what becomes of them when their session is lost."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from typing import Any, NoReturn

from zreconnect.documented import documented_by
from zreconnect.guard import Guard
from zreconnect.interfaces import IReconnectingCursor
from zreconnect.kept import KeepsRows
from zreconnect.proxies import IfThere
from zreconnect.states import Moment, Request, State


@documented_by(IReconnectingCursor)
class Results(KeepsRows):
    """The methods and attributes of a `ReconnectingCursor` for them.

    An iteration fetches as many rows at a time as are at hand. Those that it has not given yet are
    ahead of what the program has: `fetchone()` takes them first, and everything else finds the raw
    cursor in the program's place. One on the server cannot go back there, nor one whose session has
    ended: then everything that reads the result takes them first.
    """

    __slots__ = ("_ahead", "_has_last_run", "_run")

    arraysize: Any
    _guard: Guard
    _closed: bool
    _error: type[Exception]
    # The rows that an iteration has fetched last, and those of them that it has not given yet.
    _run: list[Any]
    _ahead: Iterator[Any] | None
    # Whether there are no more than those; False without any.
    _has_last_run: bool

    def _raw_cursor(self) -> Any:
        raise NotImplementedError

    def _refuse_closed(self) -> NoReturn:
        raise NotImplementedError

    def fetchone(self) -> Any:
        if self._ahead is not None and (rows := self._take_ahead(1)):
            return rows[0]
        return self._answer("fetchone")

    def fetchmany(self, size: int | None = None) -> Any:
        size = self.arraysize if size is None else size
        if self._ahead is not None:
            self.have_raw_cursor_in_place()
        if self._ahead is None:
            return self._answer("fetchmany", size)
        # psycopg2 takes a negative number for all that are left.
        rows = self._take_ahead(size if size >= 0 else None)
        if len(rows) == size or self._has_last_run:
            return rows
        return [*rows, *self._answer("fetchmany", size - len(rows))]

    def fetchall(self) -> Any:
        if self._ahead is not None:
            self.have_raw_cursor_in_place()
        if self._ahead is None:
            return self._answer("fetchall")
        rows = self._take_ahead(None)
        return rows if self._has_last_run else [*rows, *self._answer("fetchall")]

    @IfThere
    def scroll(self, value: int, mode: str = "relative") -> Any:
        """As in psycopg2, psycopg 3 and MySQL's modules; sqlite3 has none."""
        self.have_raw_cursor_in_place()
        ahead = operator.length_hint(self._ahead or ())
        result = self._answer("scroll", value - ahead if mode == "relative" else value, mode)
        self._forget_rows_ahead()
        return result

    @IfThere
    def nextset(self) -> Any:
        """As in PEP 249; sqlite3 has none."""
        self.have_raw_cursor_in_place()
        result = self._answer("nextset")
        if result:
            self._forget_rows_ahead()
        return result

    @IfThere
    def set_result(self, index: int) -> Any:
        """As in psycopg 3."""
        self._answer("set_result", index)
        self._forget_rows_ahead()
        return self

    @IfThere
    def results(self) -> Iterator[Any]:
        """As in psycopg 3."""
        if self._raw_cursor().pgresult is not None:
            yield self
            while self.nextset():
                yield self

    def __iter__(self) -> Iterator[Any]:
        # Most rows cost no Python frame.
        return chain.from_iterable(self._runs())

    def __next__(self) -> Any:
        if self._ahead is not None and (rows := self._take_ahead(1)):
            return rows[0]
        return self._answer("__next__")

    @property
    def description(self) -> Any:
        """The columns of the last result, as in PEP 249; None if there was none."""
        return None if self._raw is None else self._raw.description

    @property
    def rowcount(self) -> int:
        """How many rows the last statement has returned or changed, as in PEP 249; -1 if there was
        none, or the driver does not know."""
        return -1 if self._raw is None else self._raw.rowcount

    @property
    def rownumber(self) -> Any:
        """The index of the row that is fetched next, as in PEP 249; None if it is not known."""
        number = self._raw_cursor().rownumber
        return None if number is None else number - operator.length_hint(self._ahead or ())

    # This does what Guard.in_turn() and Guard.asking() do, with fewer Python calls.

    def _answer(self, method: str, *args: Any, of: Any = None) -> Any:
        work, guard, link = self._work, self._guard, self._work.link
        try:
            if not work.turn.is_mine():
                guard.take_turn()
            if work.state is not State.ACTIVE:
                work.ask(Request.LOOK)
            if self._closed:
                self._refuse_closed()
            raw = self._raw_cursor() if self._raw is None else self._raw
            try:
                call = getattr(raw if of is None else of, method)
                if link.options.response_timeout is not None:
                    call = partial(link.session.watch.call, link.options.response_timeout, call)
                return call(*args)
            except StopIteration:
                raise
            except BaseException as error:
                self._meet(error)
                raise
        finally:
            if work.state is not State.ACTIVE:
                work.give_turn()

    def _meet(self, error: BaseException) -> None:
        """What an error of reading rows leads to."""
        link, module = self._work.link, self._work.link.driver.module
        if self._session is link.session:
            self._guard.meet(error, Moment.STATEMENT)
        elif isinstance(error, (module.InterfaceError, module.OperationalError)):
            # Of an older session, it says nothing about the present one.
            raise module.InterfaceError(
                "The rows of this cursor that were not fetched are gone with the session in which "
                "its statement was executed, which has ended: execute it again"
            ) from error

    # Rows that an iteration has fetched

    def _runs(self) -> Iterator[Iterator[Any]]:
        """The rows that were not fetched, as many at a time as are at hand."""
        raw = rows = None
        while True:
            if raw is None or self._raw is not raw:
                rows = self._answer("__iter__")
                raw = self._raw
            if operator.length_hint(self._ahead or ()):
                with self._guard.in_turn():
                    self._work.ask(Request.LOOK)
            else:
                if self._has_last_run:
                    return
                self._fetch_run(raw, rows)
                if not self._run:
                    return
            # One iterator for all loops, which do not give rows that were fetched inside another.
            yield self._ahead  # type: ignore[misc]

    def _fetch_run(self, raw: Any, rows: Any) -> None:
        size = self._work.link.driver.rows_at_hand(raw)
        if size > 1 and self._fetch_at_once(raw, size):
            return
        try:
            run = [self._answer("__next__", of=rows)]
        except StopIteration:
            run = []
        self._run, self._ahead = run, iter(run)

    def _fetch_at_once(self, raw: Any, size: int) -> bool:
        """Fetch so many rows, or those that are left.

        Not if one of them cannot be read: that is met in its place, behind those before it.
        """
        place = raw.rownumber if self._can_go_back() else None
        try:
            run = list(self._answer("fetchmany", size))
            self._run, self._ahead, self._has_last_run = run, iter(run), 0 < len(run) < size
        except BaseException as error:
            self._forget_rows_ahead()
            again = place is not None and _fails_again(raw, place, size)
            if again and isinstance(error, Exception) and self._session is self._work.link.session:
                return False
            raise
        if len(run) > 1:
            self._work.link.keepers.add(self)
        return True

    def _take_ahead(self, size: int | None) -> list[Any]:
        """So many of the rows that an iteration has fetched and not given yet."""
        with self._guard.in_turn():
            self._work.ask(Request.LOOK)
        rows = list(islice(self._ahead or (), size))
        if (size is None or len(rows) < size) and not self._has_last_run:
            self._ahead = None
        return rows

    def leave_session(self) -> None:
        super().leave_session()
        run, left = self._run, operator.length_hint(self._ahead or ())
        if left:
            self._run = run[-left:]
            self._ahead = iter(self._run)
            # A loop comes to an end of these, and asks before it gives the others.
            run.clear()

    def have_raw_cursor_in_place(self) -> None:
        """Before something else reads its rows, or decides how they are read."""
        ahead = operator.length_hint(self._ahead or ())
        if ahead == 0:
            self._forget_rows_ahead()
        elif self._can_go_back():
            # Not if its session has ended: then they stay ahead.
            with suppress(self._error):
                self._raw.scroll(-ahead, "relative")
                self._forget_rows_ahead()

    def _can_go_back(self) -> bool:
        """Whether the raw cursor has its rows in the client, and not on the server."""
        return getattr(self._raw, "name", None) is None

    def _forget_rows_ahead(self) -> None:
        # A loop that goes on has the next result.
        self._run.clear()
        self._ahead, self._has_last_run = None, False


def _fails_again(raw: Any, place: int, size: int) -> bool:
    """Whether so many rows cannot be read. The raw cursor is in its place afterwards.

    If not, what has been raised was that of a signal's handler.
    """
    try:
        raw.scroll(place, "absolute")
        raw.fetchmany(size)
    except Exception:
        return True
    else:
        return False
    finally:
        with suppress(Exception):
            raw.scroll(place, "absolute")
