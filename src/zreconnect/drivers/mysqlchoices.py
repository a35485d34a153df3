"""What a program chooses in a session of MySQL's, and the next session has again.

That is the selected database, the character set, and mysqlclient's ``set_sql_mode()``. No module
tells what the session tracker of a server says, so it has to show in the methods that are called
and in the text of statements. Where it does not, the server is asked: along with the end of the
transaction, or at once, if there is none. Whatever else a statement sets is for ``on_connect``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import copy
from operator import methodcaller
from typing import Any

from zreconnect.documented import documented_by
from zreconnect.drivers.base import BaseDriver, SessionSettings
from zreconnect.drivers.mysqltext import choices
from zreconnect.interfaces import IDriver

# The client's flag for a session that takes several statements in one string.
MULTI_STATEMENTS = 1 << 16
# What chooses something, by what of it; the other name is PyMySQL's old one.
METHODS = {"select_db": "database", "set_character_set": "encoding", "set_sql_mode": "mode"}
OLD_NAMES = {"set_charset": "set_character_set"}
CHARACTER_SETS = ("character_set_client", "character_set_results", "collation_connection")
#: What is asked, for `ChoosingDriver.note_answer`.
QUESTION = f"SELECT DATABASE(), {', '.join(f'@@{name}' for name in CHARACTER_SETS)}"
# What a program sets on a connection itself; the modules have a copy of the converters for each.
ATTRIBUTES = ("cursorclass", "encoders", "decoders", "converter")


@documented_by(IDriver)
class ChoosingDriver(BaseDriver):
    """The part of the drivers for MySQL that knows what was chosen.

    Of a raw connection, ``zreconnect_choices`` has what was chosen by what it is about, the last
    one last, as what chooses it again: a statement, a function of the raw connection, or None for
    no database. ``zreconnect_due`` has that of the session before, until it is chosen again.
    ``zreconnect_unsure`` says whether something else may have been chosen since.
    """

    query: Callable[..., list[Any]]
    asking: Callable[[Any], AbstractContextManager[None]]
    choosing_methods = frozenset({*METHODS, *OLD_NAMES})

    def choose_nothing(self, raw: Any) -> None:
        """For a new raw connection."""
        raw.zreconnect_choices, raw.zreconnect_due, raw.zreconnect_unsure = {}, {}, False

    def keep(self, raw: Any) -> Any:
        attributes = {name: getattr(raw, name, None) for name in ATTRIBUTES}
        return attributes, dict(raw.zreconnect_choices)

    def inherit(self, raw: Any, kept: Any) -> None:
        attributes, raw.zreconnect_due = kept
        for name, value in attributes.items():
            # mysqlclient's converters are gone from a connection that is closed.
            if value is not None:
                setattr(raw, name, copy(value))

    def choose_again(self, raw: Any, settings: SessionSettings) -> None:
        """Choose what was chosen in the session before, in the same order."""
        due, raw.zreconnect_due = raw.zreconnect_due, {}
        is_set = "encoding" in due or "encoding" in raw.zreconnect_choices
        if settings.client_encoding is not None and not is_set:
            self.attribute(raw, "set_character_set")(settings.client_encoding)
        for subject, again in due.items():
            self._choose(raw, subject, again)

    def attribute(self, raw: Any, name: str) -> Any:
        value = getattr(raw, name)
        method = OLD_NAMES.get(name, name)
        if method not in METHODS:
            return value

        def choose(*args: Any, **keywords: Any) -> None:
            self._choose(raw, METHODS[method], methodcaller(method, *args, **keywords))

        return choose

    def _choose(self, raw: Any, subject: str, again: Any) -> None:
        if again is None:
            self._select_nothing(raw)
        elif isinstance(again, str):
            self.query(raw, again)
        else:
            with self.asking(raw):
                again(raw)
        _note(raw, subject, again)

    def _select_nothing(self, raw: Any) -> None:
        """Have no database selected in which names would lead to what is not meant."""
        if self.query(raw, "SELECT DATABASE()") != [(None,)]:
            # Nothing takes a selection back. This one is on each server, and nobody's own.
            self.query(raw, "USE information_schema")

    def note_choices(self, raw: Any, cursor: Any) -> None:
        """Note what the statement that a cursor has executed has chosen."""
        text = cursor.zreconnect_sent
        found = choices(text, bool(raw.client_flag & MULTI_STATEMENTS))
        for subject, again in (found or {}).items():
            _note(raw, subject, again)
        raw.zreconnect_unsure |= found is None
        # Results that wait to be read are left alone.
        is_last = cursor.description is None and ";" not in text.rstrip("; \t\r\n")
        if raw.zreconnect_unsure and not raw.zreconnect_begun and is_last:
            self.note_answer(raw, self.query(raw, QUESTION)[0])

    def note_answer(self, raw: Any, answer: Any) -> None:
        """Note what the server has answered to `QUESTION`."""
        database, *values = answer
        sets = zip(CHARACTER_SETS, values, strict=True)
        assignments = ", ".join(f"{name} = {value or 'NULL'}" for name, value in sets)
        _note(raw, "names", f"SET {assignments}")
        # None is selected if it was dropped.
        _note(raw, "database", None if database is None else f"USE {quoted(database)}")
        raw.zreconnect_unsure = False


def _note(raw: Any, subject: str, again: Any) -> None:
    # The order counts: of the encoding and a SET NAMES, the later one holds.
    raw.zreconnect_choices.pop(subject, None)
    raw.zreconnect_choices[subject] = again


def quoted(name: str) -> str:
    """A name as the server takes any."""
    return "`{}`".format(name.replace("`", "``"))
