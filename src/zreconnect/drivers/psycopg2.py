"""PostgreSQL through psycopg2.

The raw connection is kept in psycopg2's autocommit mode, in which psycopg2 sends nothing of its
own, and BEGIN, COMMIT and ROLLBACK are statements of this driver. So BEGIN can be sent, and fail,
before the user's first statement. psycopg2's own BEGIN is sent from inside that statement, where
a failure leaves it open which of the two the server has seen.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import psycopg2
import psycopg2.errors
from psycopg2 import extensions
from zope.interface import implementer

from zreconnect import dsn as dsn_module
from zreconnect.drivers.base import Meaning, SessionSettings
from zreconnect.exceptions import DisconnectionError
from zreconnect.interfaces import IDriver

# https://www.postgresql.org/docs/current/errcodes-appendix.html
CONNECTION_EXCEPTION_CLASS = "08"
DISCONNECT_STATES = {
    "57P01",  # admin_shutdown
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now
    "57P04",  # database_dropped
    "57P05",  # idle_session_timeout
    "25P03",  # idle_in_transaction_session_timeout
}
READ_ONLY_SQL_TRANSACTION = "25006"
TRANSIENT_STATES = {
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
}
# libpq's own words (fe-misc.c, fe-secure*.c, fe-exec.c), for errors that carry no SQLSTATE and
# leave the connection's state undecided.
DISCONNECT_MESSAGES = (
    "server closed the connection unexpectedly",
    "no connection to the server",
    "could not send data to server",
    "could not receive data from server",
    "SSL connection has been closed unexpectedly",
    "SSL SYSCALL error",
    "connection already closed",
)
# A program may end the transaction by a statement of its own.
COMMIT_STATEMENT = re.compile(rb"(?:^|;)\s*(?:COMMIT|END|PREPARE\s+TRANSACTION)\b", re.IGNORECASE)
# Tags of what the server executed. A SELECT can write all the same, by a function that it calls.
READING_TAGS = re.compile(r"(SELECT|FETCH|MOVE|SHOW|SET|DECLARE|CLOSE|SAVEPOINT|RELEASE)\b")
# Errors of connecting carry no SQLSTATE. These are 53300 and 55000, which pass, although they
# quote the name of the role or the database as refusals do.
PASSING_MESSAGES = (
    "too many connections for",
    "is not currently accepting connections",
)
REFUSAL_MESSAGES = (
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "does not exist",
    "does not support SSL",
    "certificate verify failed",
)

QUOTES = "\"'«»„“”‚‘’‹›「」『』"  # noqa: RUF001
# The kernel's defaults notice a silent peer after two hours if nothing is sent, and after a quarter
# of an hour if something is. tcp_user_timeout is in milliseconds.
KEEPALIVE = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60000,
}
# libpq's ConnStatusType; psycopg2 has no name for it.
CONNECTION_OK = 0

ISOLATION_LEVELS = {
    extensions.ISOLATION_LEVEL_READ_UNCOMMITTED: "READ UNCOMMITTED",
    extensions.ISOLATION_LEVEL_READ_COMMITTED: "READ COMMITTED",
    extensions.ISOLATION_LEVEL_REPEATABLE_READ: "REPEATABLE READ",
    extensions.ISOLATION_LEVEL_SERIALIZABLE: "SERIALIZABLE",
}


class Psycopg2DisconnectionError(DisconnectionError, psycopg2.OperationalError):
    """A `DisconnectionError` for code that was written against psycopg2."""


@implementer(IDriver)
class Psycopg2Driver:
    name = "psycopg2"
    module = psycopg2
    disconnection_error = Psycopg2DisconnectionError

    def parse(self, dsn: str) -> dict[str, str]:
        if dsn[:6].lower() == "dbi://":
            return dsn_module.parse_dbi(dsn)
        try:
            return dict(extensions.parse_dsn(dsn))
        except psycopg2.ProgrammingError:
            # libpq's message quotes the part that it does not understand, which can be the
            # password.
            raise ValueError(
                f"dsn is no connection string that libpq understands; it has the form "
                f"{dsn_module.FORMS}, with special characters in URLs written as %XX"
            ) from None

    def address(self, parameters: Mapping[str, str]) -> str:
        return dsn_module.redacted(parameters)

    def isolation_level(self, level: int | str | None) -> int | None:
        for number, name in ISOLATION_LEVELS.items():
            if level == number or (isinstance(level, str) and level.upper() == name):
                return number
        if level is None or (isinstance(level, str) and level.upper() == "DEFAULT"):
            return None
        names = ", ".join([*ISOLATION_LEVELS.values(), "DEFAULT"])
        raise ValueError(f"isolation level {level!r} is unknown; known are {names}")

    def connect(self, parameters: Mapping[str, str], timeout: float) -> Any:
        # libpq takes whole seconds, for each address of the host.
        limit = math.ceil(timeout)
        if int(parameters.get("connect_timeout") or 0) > 0:
            limit = min(limit, int(parameters["connect_timeout"]))
        keywords: dict[str, Any] = {**KEEPALIVE, **parameters, "connect_timeout": limit}
        return psycopg2.connect(**keywords)

    def parameters(self, raw: Any) -> dict[str, str]:
        return dict(raw.info.dsn_parameters)

    def prepare(self, raw: Any) -> None:
        if not isinstance(raw, extensions.connection):
            raise TypeError(f"connection_factory must return a psycopg2 connection, not {raw!r}")
        if raw.async_:
            raise psycopg2.ProgrammingError("connection_factory made an asynchronous connection")
        if raw.autocommit:
            raise psycopg2.ProgrammingError(
                "connection_factory made a connection in autocommit mode; set autocommit on the "
                "reconnecting connection instead"
            )
        raw.autocommit = True

    def restore(self, raw: Any, settings: SessionSettings) -> None:
        raw.autocommit = True  # Again, because on_connect may have changed it.
        if settings.cursor_factory is not None:
            raw.cursor_factory = settings.cursor_factory
        if settings.client_encoding is not None:
            raw.set_client_encoding(settings.client_encoding)
        # BEGIN states these; without a BEGIN they must be the session's defaults.
        if settings.autocommit:
            raw.set_session(
                isolation_level=settings.isolation_level,
                readonly=settings.readonly,
                deferrable=settings.deferrable,
            )

    def begin(self, raw: Any, settings: SessionSettings, rider: str = "") -> Any:
        cursor = extensions.cursor(raw)  # As in query().
        cursor.execute(f"BEGIN{_modes(raw, settings)};{rider}")
        return cursor.fetchone() if rider else None

    def begins_read_only(self, raw: Any, settings: SessionSettings) -> bool:
        return bool(raw.readonly if settings.readonly is None else settings.readonly)

    def commit(self, raw: Any, rider: str = "") -> None:
        failed = self.in_failed_transaction(raw)
        if raw.autocommit:
            self.query(raw, f"{rider};COMMIT" if rider else "COMMIT")
        else:
            if rider:
                self.query(raw, rider)
            raw.tpc_commit()
            raw.autocommit = True
        if failed:
            raise psycopg2.errors.InFailedSqlTransaction(
                "Nothing was committed: a statement of the transaction had failed, so the server "
                "rolled it back. Do not go on to commit after an error."
            )

    def prepare_transaction(self, raw: Any, gid: str) -> None:
        self.query(raw, f"PREPARE TRANSACTION '{gid}'")
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
            notices = len(raw.notices)
            raw.autocommit = False
            raw.tpc_begin(raw.xid(0, "zreconnect", ""))
            raw.poll()  # Makes psycopg2 list the warning now, without a round trip.
            del raw.notices[notices:]

    def in_transaction(self, raw: Any) -> bool:
        status = raw.get_transaction_status()
        return bool(
            status in (extensions.TRANSACTION_STATUS_INTRANS, extensions.TRANSACTION_STATUS_INERROR)
        )

    def in_failed_transaction(self, raw: Any) -> bool:
        return bool(raw.get_transaction_status() == extensions.TRANSACTION_STATUS_INERROR)

    def close(self, raw: Any) -> None:
        with contextlib.suppress(psycopg2.Error):
            raw.close()

    def abandon(self, raw: Any) -> None:
        # Whatever libpq may still write goes to the null device, and the parent's socket has one
        # holder less. psycopg2 does not finish a connection in a process that did not make it.
        with contextlib.suppress(psycopg2.Error), open(os.devnull, "r+b") as null:
            os.dup2(null.fileno(), raw.fileno(), inheritable=False)

    def meaning(self, error: BaseException, raw: Any) -> Meaning:
        if raw.closed or raw.info.status != CONNECTION_OK:
            return Meaning.DISCONNECT
        state = getattr(error, "pgcode", None)
        if state is not None:
            if state[:2] == CONNECTION_EXCEPTION_CLASS or state in DISCONNECT_STATES:
                return Meaning.DISCONNECT
            return Meaning.TRANSIENT if self.is_transient(error) else Meaning.USER
        if any(message in str(error) for message in DISCONNECT_MESSAGES):
            return Meaning.DISCONNECT
        return Meaning.USER

    def is_refused_by_standby(self, error: BaseException, raw: Any) -> bool:
        if getattr(error, "pgcode", None) != READ_ONLY_SQL_TRANSACTION:
            return False
        # Reported since PostgreSQL 14; before, nobody can tell.
        return bool(raw.get_parameter_status("in_hot_standby") != "off")

    def misses_target(self, raw: Any, parameters: Mapping[str, str]) -> bool:
        target = parameters.get("target_session_attrs", "any")
        if target in ("any", "prefer-standby"):
            return False
        refuses_writes: bool = raw.get_parameter_status("in_hot_standby") == "on"
        if target in ("read-write", "read-only"):
            refuses_writes |= raw.get_parameter_status("default_transaction_read_only") == "on"
        return refuses_writes == (target in ("read-write", "primary"))

    def may_have_committed(self, raw_cursor: Any) -> bool:
        return COMMIT_STATEMENT.search(raw_cursor.query or b"") is not None

    def looks_like_reading(self, raw_cursor: Any) -> bool:
        return READING_TAGS.match(raw_cursor.statusmessage or "") is not None

    def is_transient(self, error: BaseException) -> bool:
        return isinstance(error, psycopg2.Error) and error.pgcode in TRANSIENT_STATES

    def connect_meaning(self, error: BaseException, parameters: Mapping[str, str]) -> Meaning:
        if not isinstance(error, (psycopg2.OperationalError, OSError)):
            return Meaning.PERMANENT
        message = str(error)
        if any(passing in message for passing in PASSING_MESSAGES):
            return Meaning.DISCONNECT
        if any(refusal in message for refusal in REFUSAL_MESSAGES):
            return Meaning.PERMANENT
        # Messages of the server are translated. In every language it is a refusal that quotes the
        # name of the role or the database; a server that is starting, stopping or full does not.
        _, _, answer = message.partition(" failed: ")
        names = "|".join(
            re.escape(parameters[part]) for part in ("user", "dbname") if parameters.get(part)
        )
        if names and re.search(rf"[{QUOTES}]\s?({names})\s?[{QUOTES}]", answer):
            return Meaning.PERMANENT
        return Meaning.DISCONNECT


def _modes(raw: Any, settings: SessionSettings) -> str:
    """The transaction modes for BEGIN: the user's, or else those of the connection factory."""
    level = raw.isolation_level if settings.isolation_level is None else settings.isolation_level
    readonly = raw.readonly if settings.readonly is None else settings.readonly
    deferrable = raw.deferrable if settings.deferrable is None else settings.deferrable
    modes = ""
    if level is not None:
        modes += " ISOLATION LEVEL " + ISOLATION_LEVELS[level]
    if readonly is not None:
        modes += " READ ONLY" if readonly else " READ WRITE"
    if deferrable is not None:
        modes += " DEFERRABLE" if deferrable else " NOT DEFERRABLE"
    return modes


driver = Psycopg2Driver()
