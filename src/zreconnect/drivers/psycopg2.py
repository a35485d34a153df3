"""PostgreSQL through psycopg2.

The raw connection is kept in psycopg2's autocommit mode, in which psycopg2 sends nothing of its
own, and BEGIN, COMMIT and ROLLBACK are statements of this driver. So BEGIN can be sent, and fail,
before the user's first statement. psycopg2's own BEGIN is sent from inside that statement, where
a failure leaves it open which of the two the server has seen.

A transaction can begin along with its first statement, in one string. The server reads all of it
before it executes any of it, so that after a syntax error there is no transaction. The results of
all statements but the last are lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import psycopg2
import psycopg2.errors
from psycopg2 import extensions, sql

from zreconnect.documented import implements
from zreconnect.drivers.base import (
    AT_HAND,
    OF_ANOTHER_MODULE,
    Begun,
    SessionSettings,
    reads_as,
)
from zreconnect.drivers.greenlets import tell_if_it_blocks
from zreconnect.drivers.postgresql import (
    COMMIT_STATEMENT,
    PostgresqlDriver,
    begin_statement,
    looks_like_reading,
    may_follow_begin,
    plain_encoding,
)
from zreconnect.exceptions import DisconnectionError
from zreconnect.interfaces import IPipeliningDriver, Meaning

ISOLATION_LEVELS = {
    extensions.ISOLATION_LEVEL_READ_UNCOMMITTED: "READ UNCOMMITTED",
    extensions.ISOLATION_LEVEL_READ_COMMITTED: "READ COMMITTED",
    extensions.ISOLATION_LEVEL_REPEATABLE_READ: "REPEATABLE READ",
    extensions.ISOLATION_LEVEL_SERIALIZABLE: "SERIALIZABLE",
}
AT_REST = (
    extensions.TRANSACTION_STATUS_IDLE,
    extensions.TRANSACTION_STATUS_INTRANS,
    extensions.TRANSACTION_STATUS_INERROR,
)
IN_TRANSACTION = (
    extensions.TRANSACTION_STATUS_ACTIVE,
    extensions.TRANSACTION_STATUS_INTRANS,
    extensions.TRANSACTION_STATUS_INERROR,
)
# What goes before the first statement, in a line of its own.
FIRST_LINE = re.compile(rb"\ABEGIN[^\n]*; -- zreconnect\n")
# The number of a line, in the server's message of an error.
LINE = re.compile(r"^LINE (\d+):", re.MULTILINE)
# What to do under gevent.
GREENLETS = (
    "Install psycogreen, and call psycogreen.gevent.patch_psycopg() where the program begins (with "
    "gunicorn in post_fork); or use psycopg 3 (postgresql+psycopg://), which waits as gevent does."
)
# Cursor classes of psycopg2's own, in psycopg2.extras, that do nothing but execute the statement.
PLAIN_CURSORS = ("DictCursor", "NamedTupleCursor", "RealDictCursor")


class Psycopg2DisconnectionError(DisconnectionError, psycopg2.OperationalError):
    """A `DisconnectionError` for code that was written against psycopg2."""


@implements(IPipeliningDriver)
class Psycopg2Driver(PostgresqlDriver):
    """The `IPipeliningDriver` for psycopg2."""

    name = "psycopg2"
    module = psycopg2
    sql = sql
    answers_begin = False
    returns_cursor = False
    disconnection_error = Psycopg2DisconnectionError
    loses_rows = True
    isolation_levels = ISOLATION_LEVELS

    def parse_conninfo(self, dsn: str) -> dict[str, str]:
        return dict(extensions.parse_dsn(dsn))

    def start_connecting(self, parameters: Mapping[str, str]) -> None:
        keywords: dict[str, Any] = {**parameters, "async_": True}
        psycopg2.connect(**keywords)

    def parameters(self, raw: Any) -> dict[str, str]:
        return dict(raw.info.dsn_parameters)

    def prepare(self, raw: Any) -> None:
        if not isinstance(raw, extensions.connection):
            raise TypeError(
                "connection_factory must return a psycopg2 connection, "
                f"not {raw!r}{OF_ANOTHER_MODULE}"
            )
        if raw.async_:
            raise psycopg2.ProgrammingError("connection_factory made an asynchronous connection")
        if raw.autocommit:
            raise psycopg2.ProgrammingError(
                "connection_factory made a connection in autocommit mode; set autocommit on the "
                "reconnecting connection instead"
            )
        if self.in_transaction(raw):
            raise psycopg2.ProgrammingError(
                "connection_factory made a connection that is in a transaction: have it commit"
            )
        raw.autocommit = True
        _tell_overridden(raw)
        if extensions.get_wait_callback() is None:
            tell_if_it_blocks("psycopg2", GREENLETS)

    def restore(self, raw: Any, settings: SessionSettings, replaced: dict[str, str]) -> None:
        raw.autocommit = True  # Again, because on_connect may have changed it.
        if settings.cursor_factory is not None:
            raw.cursor_factory = settings.cursor_factory
        if settings.client_encoding is not None:
            raw.set_client_encoding(settings.client_encoding)
        self.set_default_modes(raw, settings, replaced)

    def begin(self, raw: Any, settings: SessionSettings, rider: str = "") -> Any:
        cursor = extensions.cursor(raw)  # As in query().
        cursor.execute(f"{_begin(raw, settings)};{rider}")
        return cursor.fetchone() if cursor.description else None

    def commit(self, raw: Any, rider: str = "") -> None:
        failed = raw.get_transaction_status() == extensions.TRANSACTION_STATUS_INERROR
        if failed:
            rider = ""
        if raw.autocommit:
            extensions.cursor(raw).execute(f"{rider};COMMIT" if rider else "COMMIT")
        else:
            self._commit_own(raw, rider)
        if failed:
            raise psycopg2.errors.InFailedSqlTransaction(
                "Nothing was committed: a statement of the transaction had failed, so the server "
                "rolled it back. Do not go on to commit after an error."
            )

    def _commit_own(self, raw: Any, rider: str) -> None:
        """Commit a transaction that psycopg2 knows of."""
        if rider:
            self.query(raw, rider)
        try:
            raw.tpc_commit()
        except psycopg2.Error:
            if raw.get_transaction_status() == extensions.TRANSACTION_STATUS_IDLE:
                raw.autocommit = True
            raise
        raw.autocommit = True

    def prepare_transaction(self, raw: Any, gid: str) -> None:
        super().prepare_transaction(raw, gid)
        if not raw.autocommit:
            # psycopg2 does not know, and takes nothing but the end of its transaction. The server
            # answers with a warning.
            self.rollback(raw)

    def rollback(self, raw: Any) -> None:
        if raw.autocommit:
            self.query(raw, "ROLLBACK")
        else:
            raw.tpc_rollback()
            raw.autocommit = True

    # Beginning along with a statement

    def may_begin_with(self, raw: Any, raw_cursor: Any, query: Any, parameters: Any = None) -> bool:
        kind = type(raw_cursor)
        return (
            isinstance(query, str)
            and may_follow_begin(query) is not None
            # A class of the user's may do more than to execute one statement.
            and (
                kind is extensions.cursor
                or (kind.__module__ == "psycopg2.extras" and kind.__name__ in PLAIN_CURSORS)
            )
            and raw.autocommit
        )

    def begin_with(
        self,
        raw: Any,
        raw_cursor: Any,
        settings: SessionSettings,
        rider: str,
        arguments: tuple[Any, ...],
        options: Mapping[str, Any],
        answered: Callable[[Any], object] | None = None,
    ) -> Begun | None:
        query, *parameters = arguments
        first_line = f"{_begin(raw, settings)};{rider}; -- zreconnect\n"
        try:
            raw_cursor.execute(first_line + query, *parameters, **options)
        except BaseException as error:
            if not self.is_at_rest(raw) or self.meaning(error, raw) is Meaning.DISCONNECT:
                raise
            if self.in_transaction(raw):
                _leave_out_first_line(error)
                return None, error
            if isinstance(error, psycopg2.Error):
                return None
            if not isinstance(error, Exception):
                raise
            # Nothing was sent: a parameter is missing, or has raised it.
            return self.begin(raw, settings, rider), error
        return None, None

    # Statements

    def query(self, raw: Any, statement: str, parameters: Any = None) -> list[Any]:
        # Not raw.cursor(): a cursor class of the user's may log or change what it executes.
        cursor = extensions.cursor(raw)
        cursor.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []

    def own_transaction(self, raw: Any) -> None:
        # psycopg2 refuses server-side cursors and large objects in autocommit mode, and offers no
        # way to tell it that there is a transaction but to send another BEGIN. tpc_begin() sends
        # it at once. The server answers with a warning and leaves the transaction as it is.
        if raw.autocommit:
            notices, raw.notices = raw.notices, None
            raw.autocommit = False
            raw.tpc_begin(raw.xid(0, "zreconnect", ""))
            raw.poll()  # Makes psycopg2 list the warning now, without a round trip.
            raw.notices = notices

    def is_at_rest(self, raw: Any) -> bool:
        # Between the lines of own_transaction() psycopg2 and the server are of two minds.
        knows = raw.autocommit or raw.status != extensions.STATUS_READY
        return bool(knows and raw.get_transaction_status() in AT_REST)

    def in_transaction(self, raw: Any) -> bool:
        return bool(raw.get_transaction_status() in IN_TRANSACTION)

    def in_failed_transaction(self, raw: Any) -> bool:
        return bool(raw.get_transaction_status() == extensions.TRANSACTION_STATUS_INERROR)

    def is_commit(self, raw_cursor: Any) -> bool:
        text = FIRST_LINE.sub(b"", raw_cursor.query or b"", count=1)
        return COMMIT_STATEMENT.search(text) is not None

    def sqlstate(self, error: BaseException) -> str | None:
        return getattr(error, "pgcode", None)

    def parameter_status(self, raw: Any, name: str) -> str | None:
        status: str | None = raw.get_parameter_status(name)
        return status

    def server_version(self, raw: Any) -> int:
        version: int = raw.server_version
        return version

    def uses_tls(self, raw: Any) -> bool:
        return bool(raw.info.ssl_in_use)

    def fileno(self, raw: Any) -> int:
        number: int = raw.fileno()
        return number

    def transaction_flag(self, raw: Any) -> Callable[[], object]:
        # TRANSACTION_STATUS_IDLE is 0.
        flag: Callable[[], object] = raw.get_transaction_status
        return flag

    def attribute(self, raw: Any, name: str) -> Any:
        value = getattr(raw, name)
        # Helpers such as register_hstore() roll back if there is no transaction as they began.
        if name == "status" and self.in_transaction(raw):
            return extensions.STATUS_IN_TRANSACTION
        if name == "query" and value is not None:
            return FIRST_LINE.sub(b"", value, count=1)
        return value

    def check_cursor(self, name: str | None, options: Mapping[str, Any]) -> None:
        if name is None and (options.get("scrollable") is not None or options.get("withhold")):
            raise psycopg2.ProgrammingError(
                "scrollable and withhold are for server-side cursors: give the cursor a name"
            )

    def keep(self, raw: Any) -> Any:
        # A list is psycopg2's own, and starts anew.
        lists = {
            name: value
            for name in ("notices", "notifies")
            if type(value := getattr(raw, name)) is not list
        }
        return dict(raw.string_types), dict(raw.binary_types), lists

    def inherit(self, raw: Any, kept: Any) -> None:
        string_types, binary_types, lists = kept
        raw.string_types.update(string_types)
        raw.binary_types.update(binary_types)
        for name, value in lists.items():
            setattr(raw, name, value)

    def cursor(self, raw: Any, name: str | None, options: Mapping[str, Any]) -> Any:
        return raw.cursor(**options) if name is None else raw.cursor(name, **options)

    def set_client_encoding(self, raw: Any, encoding: str) -> None:
        raw.set_client_encoding(encoding)

    def has_client_encoding(self, raw: Any, encoding: str) -> bool:
        # It does not notice that a statement has set another one.
        is_its_own = plain_encoding(raw.encoding) == plain_encoding(encoding)
        return is_its_own and super().has_client_encoding(raw, encoding)

    def set_cursor_factory(self, raw: Any, factory: Any) -> None:
        raw.cursor_factory = factory

    def rows_at_hand(self, raw_cursor: Any) -> int:
        if not reads_as(raw_cursor.__class__, extensions.cursor):
            return 1
        return AT_HAND if raw_cursor.name is None else int(raw_cursor.itersize)

    def looks_like_reading(self, raw_cursor: Any) -> bool:
        text = FIRST_LINE.sub(b"", raw_cursor.query or b"", count=1)
        return looks_like_reading(raw_cursor.statusmessage, text)


class _Overridden(extensions.connection):
    """What ``super()`` leads to in a class of the program's that overrides these methods."""

    __slots__ = ()
    zreconnect_overridden: dict[str, Callable[[], None]]

    def commit(self) -> None:
        self.zreconnect_overridden.get("commit", super().commit)()

    def rollback(self) -> None:
        self.zreconnect_overridden.get("rollback", super().rollback)()


def _tell_overridden(raw: Any) -> None:
    """See `zreconnect.overrides`. In autocommit mode psycopg2's own methods do nothing."""
    own, base = type(raw), extensions.connection
    if hasattr(raw, "__dict__") and (own.commit, own.rollback) != (base.commit, base.rollback):
        raw.zreconnect_overridden = {}
        names = {"__slots__": (), "__module__": own.__module__, "__qualname__": own.__qualname__}
        metaclass: Any = type(own)
        raw.__class__ = metaclass(own.__name__, (own, _Overridden), names)


def _begin(raw: Any, settings: SessionSettings) -> str:
    """BEGIN with the modes that the user has set, or else those of the connection factory."""
    level = raw.isolation_level if settings.isolation_level is None else settings.isolation_level
    return begin_statement(
        None if level is None else ISOLATION_LEVELS[level],
        raw.readonly if settings.readonly is None else settings.readonly,
        raw.deferrable if settings.deferrable is None else settings.deferrable,
    )


def _leave_out_first_line(error: BaseException) -> None:
    """Have an error's message count the lines as the program has them."""
    # A position in the text of a function is another thing.
    if isinstance(error, psycopg2.Error) and error.diag.statement_position is not None:
        message, *others = error.args
        own = LINE.sub(lambda found: f"LINE {int(found[1]) - 1}:", message, count=1)
        error.args = (own, *others)


driver = Psycopg2Driver()
