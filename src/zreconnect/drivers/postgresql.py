"""What the drivers for PostgreSQL have in common: SQLSTATEs, messages, and statements of ours."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping
from functools import cache, cached_property, lru_cache
from typing import Any

from zreconnect import dsn as dsn_module
from zreconnect.documented import documented_by
from zreconnect.drivers import conninfo
from zreconnect.drivers.base import (
    Condition,
    Evidence,
    ServerSession,
    SessionSettings,
    redirect_to_null,
    set_own_default,
)
from zreconnect.drivers.pooling import Pooling
from zreconnect.exceptions import one_line
from zreconnect.history import History
from zreconnect.interfaces import IDriver, Meaning
from zreconnect.marks import HISTORY

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
# Of target_session_attrs, for programs that do not want to write.
READING = ("read-only", "standby", "prefer-standby")
TRANSIENT_STATES = {
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
}
CONDITIONS = {
    "42P01": Condition.UNDEFINED_TABLE,
    "42501": Condition.INSUFFICIENT_PRIVILEGE,
    "23505": Condition.ALREADY_EXISTS,  # unique_violation, of a system catalogue
    "42710": Condition.ALREADY_EXISTS,  # duplicate_object
    "42P07": Condition.ALREADY_EXISTS,  # duplicate_table
    "55P03": Condition.LOCK_NOT_AVAILABLE,
    READ_ONLY_SQL_TRANSACTION: Condition.READ_ONLY_TRANSACTION,
    "42704": Condition.UNDEFINED_OBJECT,
    "55000": Condition.OBJECT_NOT_IN_PREREQUISITE_STATE,
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
# PgBouncer's (client.c), which then hangs up. psycopg2 does not pass it on.
REFUSES_TRANSACTIONS = "not allowed in statement pooling mode"
# What may stand before a statement.
BLANK = r"(?:\s|--[^\n]*(?:\n|\Z)|/\*(?:[^*]|\*(?!/))*\*/)*"
# What the server takes before the transaction's first query only.
SETS_MODES = re.compile(
    rf"{BLANK}(?:SET\s+(?:(?:LOCAL|SESSION)\s+)?TRANSACTION(?:_|\b)"
    r"|(?:BEGIN|START)\b[^;]*\b(?:ISOLATION|READ|DEFERRABLE)\b)",
    re.IGNORECASE,
)
# A program may end the transaction by a statement of its own, with comments before it.
COMMIT_STATEMENT = re.compile(
    rb"(?:^|;)(?:\s|--[^\n]*(?:\n|\Z)|/\*(?:[^*]|\*(?!/))*\*/)*"
    rb"(?:COMMIT|END|PREPARE\s+TRANSACTION)\b",
    re.IGNORECASE,
)
# What ends a transaction, by itself or in a string of statements; and what goes on after that.
ENDS = r"(?:COMMIT|END|ABORT|ROLLBACK|PREPARE\s+TRANSACTION)\b"
CHAINING = re.compile(
    rf"(?:^|;)\s*{ENDS}(?:[^;]*\bAND\s+CHAIN\b|(?![^;]*\bTO\b)[^;]*;[\s;]*[^\s;])", re.IGNORECASE
)
# Most that have a semicolon have no such word after it, which is found out fast.
FOLLOWING = re.compile(rf";{BLANK}{ENDS}", re.IGNORECASE)
# What can contain such words and is no part of a statement.
QUOTED_OR_COMMENT = re.compile(
    r"\bE'[^'\\]*(?:(?:\\.|'')[^'\\]*)*'|'[^']*'|\"[^\"]*\"|(\$\w*\$).*?\1"
    r"|--[^\n]*|/\*(?:[^*]|\*(?!/))*\*/",
    re.IGNORECASE | re.DOTALL,
)
# Statements that mean the same if they travel along with BEGIN; those that end a transaction do
# not, nor does COPY in a pipeline.
may_follow_begin = re.compile(
    # One statement. What was matched up to a semicolon is not tried again in parts.
    r"\s*(?:SELECT|INSERT|UPDATE|DELETE|MERGE|WITH|VALUES|TABLE)\b(?=([^;]*))\1[;\s]*\Z",
    re.IGNORECASE,
).match
# Tags of what the server executed.
READING_TAGS = frozenset(
    ("SELECT", "FETCH", "MOVE", "SHOW", "SET", "DECLARE", "CLOSE", "SAVEPOINT", "RELEASE")
)
# A program has some statements that it executes again and again, and they are short.
LONGEST_KNOWN = 2000
# A SELECT can write all the same: in a WITH, as a prepared statement, by a function that it calls,
# by a statement that follows it in the same string, as a cursor WITH HOLD inside COMMIT.
# A comment can stand between the function's name and its arguments.
WRITING = re.compile(rb"--|\*/\s*\(|;\s*\S|\b(?:insert|update|delete|merge|execute|with\s+hold)\b")
# A word without a parenthesis is found, too: else a long one, such as a value in hexadecimal, would
# be tried again in each of its parts.
WORDS = re.compile(rb'([\w$."\x80-\xff]+)\s*(\(?)')
# Words before a parenthesis that are no functions, and functions that do nothing but compute.
HARMLESS = frozenset(
    b"""
    abs age all and any array array_agg as avg between bit bool_and bool_or by case cast
    ceil char char_length clock_timestamp coalesce concat concat_ws count current_schema
    current_setting date_part date_trunc decimal distinct else every except exists extract
    filter first_value float floor format from generate_series greatest group having in
    initcap intersect interval is join json_agg json_build_object json_object_agg jsonb_agg
    jsonb_build_object jsonb_object_agg lag last_value lateral lead least left length like
    limit lower lpad ltrim materialized max md5 min mod not now ntile nullif numeric
    octet_length offset on or over overlay pg_backend_pid position power quote_ident random
    rank regexp_replace replace right round row row_number row_to_json rows rtrim select
    some split_part sqrt string_agg strpos substr substring sum then time timestamp to_char
    to_date to_json to_jsonb to_number to_timestamp trim trunc union unnest upper using
    values varchar version when where with
    """.split()
)
# Errors of connecting carry no SQLSTATE, as long as the modules do not ask libpq for it.
REFUSAL_CLASSES = ("0A", "22", "28", "3D", "42", "55P02")
# These pass, although they quote the name of the role or the database as refusals do: 53300, 55000,
# and PgBouncer's DISABLE.
PASSING_MESSAGES = (
    "too many connections for",
    "is not currently accepting connections",
    "is disabled",
)
# Parts of messages of libpq (fe-connect.c, fe-auth.c, fe-secure*.c), of the server (postinit.c,
# auth.c, guc.c) and of PgBouncer (client.c, objects.c).
OTHER_PROTOCOL = re.compile(
    # libpq quotes the first byte, but for the zero that it begins with itself: the program can
    # come to be connected to itself, where nobody listens on a port of those given at random.
    r"(?:invalid response to SSL negotiation: |authentication request from server, but received )\S"
)
NO_SERVER = (
    "Who answers there is no PostgreSQL server, nor a pooler: see whether the DSN has the right "
    "host and port"
)
REFUSAL_MESSAGES = re.compile(
    # Who logs in, and where.
    "authentication failed|no password supplied|pg_hba.conf (?:entry|rejects)|does not exist"
    "|permission denied|not permitted to log in|must be superuser|no such (?:user|database)"
    "|login rejected|bouncer config error"
    # What the server is asked to set.
    "|unrecognized configuration parameter|invalid configuration parameter|invalid value for"
    "|cannot be (?:changed|set)|valid range for parameter|requires a"
    "|invalid command-line argument|unsupported startup parameter"
    "|no Python encoding"
    # How the two agree upon their ways.
    "|does(?: not|n't) support (?:SSL|GSSAPI)|(?:SSL|TLS connection|certificate) required"
    "|channel binding|authentication method|authentication mechanisms|protocol version"
    "|GSSAPI encryption required|requirepeer|unsupported frontend protocol|ALPN"
    # Certificates.
    "|certificate verify failed|match host name|host name must be specified|private key"
    "|certificate file|client certificate|root certificate|certificate present"
    "|SSL error: .*(?:certificate|alert (?:handshake failure|unknown ca|access denied)"
    "|unsupported protocol|no protocols available|key too small|md too weak)"
    # What libpq refuses without having contacted anybody.
    "|invalid \\S+ value:|invalid integer value|invalid port number|could not match"
    "|definition of service|service file|may not be used with|could not parse network address"
    "|socket path .* is too long|invalid SCRAM|invalid connection option"
)
# Parameters whose values a refusal may quote, whatever its language is.
QUOTED = (
    "user",
    "dbname",
    "client_encoding",
    "require_auth",
    "sslcert",
    "sslkey",
    "sslrootcert",
)
OPTION_WORDS = re.compile(r"[^\s=]+")
QUOTES = "\"'«»„“”‚‘’‹›「」『』"  # noqa: RUF001
# libpq's ConnStatusType.
CONNECTION_OK = 0
# pg_current_xact_id() and pg_xact_status() exist since PostgreSQL 13.
FIRST_VERSION_WITH_XACT_STATUS = 130000
# As the role that has logged in: after SET ROLE its other sessions may neither be seen nor ended.
# Statements that are sent together are one transaction.
AS_WHO_LOGGED_IN = "SET LOCAL SESSION AUTHORIZATION DEFAULT; SET LOCAL ROLE NONE; "
# As text, because the program may have types of its own for times.
STARTED = "to_char(backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US+00')"
IDENTIFY = (
    f"{AS_WHO_LOGGED_IN}SELECT pid, {STARTED}, pg_is_in_recovery(){{history}}"
    " FROM pg_stat_activity WHERE pid = pg_backend_pid()"
)
# backend_xid has the lower half of a transaction id's 64 bits, as xmax has.
# Who has been given the session, or the lock of our row, has it after our transaction's end.
SINCE_BEGIN = "xact_start <= clock_timestamp() - make_interval(secs => %s)"
BY_SESSION = f"(pid = %s AND {STARTED} = %s AND {SINCE_BEGIN})"
BY_MARK = "(pid = %s AND extract(epoch FROM xact_start)::text = %s)"
BY_ROW = f"(backend_xid::text = %s AND {SINCE_BEGIN})"
# Whoever writes to a table keeps one of the other locks on it until the transaction ends; an index
# has the same as its table. On system catalogues locks are given back at once, so what has been
# written there, such as a function or a large object, is counted, for up to a second too long.
HAS_WRITTEN = (
    "SELECT EXISTS (SELECT FROM pg_lock_status() LEFT JOIN pg_index ON indexrelid = relation"
    " WHERE pid = pg_backend_pid() AND locktype = 'relation'"
    " AND mode NOT IN ('AccessShareLock', 'RowShareLock', 'SIReadLock')"
    " AND coalesce(indrelid, relation) IS DISTINCT FROM to_regclass(%s::text))"
    " OR EXISTS (SELECT FROM pg_class WHERE relnamespace = 'pg_catalog'::regnamespace"
    " AND pg_stat_get_xact_tuples_inserted(oid) + pg_stat_get_xact_tuples_updated(oid)"
    " + pg_stat_get_xact_tuples_deleted(oid) > 0)"
)


# What a session keeps for all of its transactions, others' included.
LISTEN = re.compile(rf"(?:\A|;){BLANK}LISTEN\b", re.IGNORECASE)
HOLD = re.compile(rf"(?:\A|;){BLANK}DECLARE\b[^;'(]*\bCURSOR\s+WITH\s+HOLD\b", re.IGNORECASE)
# The value before is read before the new one is set.
SET_DEFAULT = (
    "SELECT current_setting(name), set_config(name, %s, false) FROM (VALUES (%s)) AS _ (name)"
)


@documented_by(IDriver)
class PostgresqlDriver:
    """The part of `zreconnect.interfaces.IDriver` that all modules for PostgreSQL share."""

    module: Any
    sql: Any
    has_sessions = True
    loses_rows = False
    supports_two_phase = True
    calls_autocommit = False
    refused_methods: frozenset[str] = frozenset()
    committing_methods: frozenset[str] = frozenset()
    choosing_methods: frozenset[str] = frozenset()
    rollback_request: Any = ()
    quote = '"'
    may_chain = re.compile(BLANK + ENDS, re.IGNORECASE).match
    disconnect_messages: tuple[str, ...] = DISCONNECT_MESSAGES
    ledger_table = (
        "CREATE TABLE IF NOT EXISTS {table} ("
        " id uuid PRIMARY KEY,"
        " number bigint NOT NULL DEFAULT 0,"
        " used timestamptz NOT NULL DEFAULT now()"
        # Room for updates in place, which leave the index alone.
        ") WITH (fillfactor = 50)"
    )
    ledger_conflict = "ON CONFLICT (id) DO UPDATE SET"
    ledger_isolation = "READ COMMITTED"
    ledger_free = "FOR UPDATE SKIP LOCKED"
    ledger_writer = "xmax::text"
    # Whether the line of a raw connection is encrypted with TLS.
    uses_tls: Callable[[Any], bool]
    # The names in SQL of the module's own constants.
    isolation_levels: Mapping[Any, str]

    @cached_property
    def pooling(self) -> Pooling:
        return Pooling(self)

    def parse(self, dsn: str) -> dict[str, str]:
        parameters = self._parse(dsn)
        conninfo.check(parameters, self.start_connecting, self.module.Error)
        return parameters

    def _parse(self, dsn: str) -> dict[str, str]:
        if dsn[:6].lower() == "dbi://":
            return dsn_module.parse_dbi(dsn)
        try:
            return self.parse_conninfo(dsn_module.plain(dsn))
        except self.module.ProgrammingError:
            # libpq's message quotes the part that it does not understand, which can be the
            # password.
            raise ValueError(
                f"dsn is no connection string that libpq understands; it has the form "
                f"{dsn_module.FORMS}, with special characters in URLs written as %XX"
            ) from None

    def connect(self, parameters: Mapping[str, str], timeout: float) -> Any:
        try:
            return self.module.connect(**conninfo.connect_keywords(parameters, timeout))
        except UnicodeDecodeError as error:
            # psycopg2 raises it in place of what is told, if that is not in UTF-8.
            told = self.module.OperationalError(error.object.decode("utf-8", "replace"))
            _explain(told)
            raise told from None
        except self.module.OperationalError as error:
            _explain(error)
            raise

    def places(self, parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return conninfo.places(parameters)

    def encrypted(self, raw: Any, parameters: Mapping[str, str]) -> Mapping[str, str] | None:
        if not self.uses_tls(raw):
            return None
        # The environment or the service may have asked for more.
        is_a_wish = self.parameters(raw).get("sslmode", "prefer") in ("allow", "prefer")
        return {**parameters, "sslmode": "require"} if is_a_wish else parameters

    def isolation_level(self, level: Any) -> Any:
        for constant, name in self.isolation_levels.items():
            if level == constant or (isinstance(level, str) and level.upper() == name):
                return constant
        if level is None or (isinstance(level, str) and level.upper() == "DEFAULT"):
            return None
        names = ", ".join([*self.isolation_levels.values(), "DEFAULT"])
        raise ValueError(f"isolation level {level!r} is unknown; known are {names}")

    def address(self, parameters: Mapping[str, str]) -> str:
        return dsn_module.redacted(parameters)

    def sets_modes(self, statement: Any) -> bool:
        return SETS_MODES.match(self.text_of(statement)) is not None

    def chains(self, statement: Any) -> bool:
        text = self.text_of(statement)
        if FOLLOWING.search(text) is None and self.may_chain(text) is None:
            return False
        return CHAINING.search(QUOTED_OR_COMMENT.sub(" ", text)) is not None

    def stays(self, statement: Any) -> str:
        """What of a statement, as text or composed, or of one of several, stays in its session:
        LISTEN, or a cursor; empty if there is none."""
        text = self.text_of(statement)
        if ";" in text:
            text = QUOTED_OR_COMMENT.sub(" ", text)
        if LISTEN.search(text):
            return "LISTEN"
        return "A cursor WITH HOLD" if HOLD.search(text) else ""

    def text_of(self, statement: Any) -> str:
        """What the program has written of a statement, as far as it is known without a session."""
        if isinstance(statement, bytes):
            return statement.decode("ascii", "replace")
        if isinstance(statement, self.sql.Composed):
            return "".join(map(self.text_of, statement))
        if isinstance(statement, self.sql.SQL):
            statement = statement.as_string(None)
        return statement if isinstance(statement, str) else " "

    def begins_read_only(self, raw: Any, settings: SessionSettings) -> bool:
        return bool(raw.readonly if settings.readonly is None else settings.readonly)

    def set_default_modes(
        self, raw: Any, settings: SessionSettings, replaced: dict[str, str]
    ) -> None:
        """Have autocommit mode's statements run in the modes that BEGIN states otherwise."""

        def change(name: str, value: Any) -> str:
            rows = self.query(raw, SET_DEFAULT, (str(value), f"default_transaction_{name}"))
            return str(rows[0][0])

        if settings.pooled:
            self.pooling.check_settings(settings)
        level = settings.isolation_level
        for name, mode in (
            ("isolation", None if level is None else self.isolation_levels[level]),
            ("read_only", settings.readonly),
            ("deferrable", settings.deferrable),
        ):
            set_own_default(name, mode if settings.autocommit else None, replaced, change)

    def prepare_transaction(self, raw: Any, gid: str) -> None:
        quoted = gid.replace("'", "''")
        self.query(raw, f"PREPARE TRANSACTION '{quoted}'")

    def keep(self, raw: Any) -> Any:
        return None

    def inherit(self, raw: Any, kept: Any) -> None:
        """Nothing is kept."""

    def hand_out(self, raw: Any) -> None:
        """The transaction's status tells enough afterwards."""

    def close(self, raw: Any) -> None:
        with contextlib.suppress(self.module.Error):
            raw.close()

    def abandon(self, raw: Any) -> None:
        # Whatever libpq may still write goes to the null device, and the parent's socket has one
        # holder less. psycopg2 does not finish a connection in a process that did not make it.
        # There is no socket if a thread of the parent's was just about to learn that it has ended.
        with contextlib.suppress(self.module.Error, OSError):
            redirect_to_null(raw.fileno())

    def autocommit_mode(self, query: Any) -> bool | None:
        return None

    def has_client_encoding(self, raw: Any, encoding: str) -> bool:
        present = self.parameter_status(raw, "client_encoding") or ""
        return plain_encoding(present) == plain_encoding(encoding)

    def check_cursor(self, name: str | None, options: Mapping[str, Any]) -> None:
        """The module says what it refuses when it makes the cursor."""

    def has_committed(self, raw: Any) -> bool:
        return False

    # Errors

    def meaning(self, error: BaseException, raw: Any) -> Meaning:
        if REFUSES_TRANSACTIONS in str(error):
            return Meaning.PERMANENT
        if raw.closed or raw.info.status != CONNECTION_OK:
            return Meaning.DISCONNECT
        state = self.sqlstate(error)
        if state is not None:
            is_disconnect = state[:2] == CONNECTION_EXCEPTION_CLASS or state in DISCONNECT_STATES
            # After an ERROR the session goes on: a function has raised it, for another server.
            if is_disconnect and self.severity(error) != "ERROR":
                return Meaning.DISCONNECT
            return Meaning.TRANSIENT if state in TRANSIENT_STATES else Meaning.USER
        if any(message in str(error) for message in self.disconnect_messages):
            return Meaning.DISCONNECT
        return Meaning.USER

    def condition(self, error: BaseException) -> Condition | None:
        return CONDITIONS.get(self.sqlstate(error) or "")

    def is_transient(self, error: BaseException) -> bool:
        return isinstance(error, self.module.Error) and self.sqlstate(error) in TRANSIENT_STATES

    def is_refused_by_standby(
        self, error: BaseException, raw: Any, is_old_news: bool = False
    ) -> bool:
        if self.sqlstate(error) != READ_ONLY_SQL_TRANSACTION or self._is_for_reading(raw):
            return False
        # Reported since PostgreSQL 14; before, nobody can tell.
        return is_old_news or self.parameter_status(raw, "in_hot_standby") != "off"

    def _is_for_reading(self, raw: Any) -> bool:
        """Whether the session itself says that nobody wants to write in it."""
        return (
            self.begins_read_only(raw, SessionSettings())
            or self.parameter_status(raw, "default_transaction_read_only") == "on"
            or self.parameters(raw).get("target_session_attrs") in READING
        )

    def is_standby(self, raw: Any) -> bool:
        return self.parameter_status(raw, "in_hot_standby") == "on"

    def takes_writes(self, raw: Any) -> bool:
        return self.query(raw, "SELECT pg_is_in_recovery()") == [(False,)]

    def misses_target(self, raw: Any, parameters: Mapping[str, str]) -> bool:
        target = parameters.get("target_session_attrs", "any")
        if target in ("any", "prefer-standby"):
            return False
        refuses_writes = self.parameter_status(raw, "in_hot_standby") == "on"
        if target in ("read-write", "read-only"):
            refuses_writes |= self.parameter_status(raw, "default_transaction_read_only") == "on"
        return refuses_writes == (target in ("read-write", "primary"))

    def connect_meaning(self, error: BaseException, parameters: Mapping[str, str]) -> Meaning:
        if not isinstance(error, (self.module.OperationalError, OSError)):
            return Meaning.PERMANENT
        state = self.sqlstate(error)
        if state is not None:
            return Meaning.PERMANENT if state.startswith(REFUSAL_CLASSES) else Meaning.DISCONNECT
        message = self.connection_message(error)
        if any(passing in message for passing in PASSING_MESSAGES):
            return Meaning.DISCONNECT
        if REFUSAL_MESSAGES.search(message) or OTHER_PROTOCOL.search(message):
            return Meaning.PERMANENT
        # Messages of the server are translated. In every language it is a refusal that quotes what
        # it was asked for; a server that is starting, stopping or full does not.
        answer = " ".join(line.partition(" failed: ")[2] for line in message.splitlines())
        asked = [parameters[name] for name in QUOTED if parameters.get(name)]
        asked += OPTION_WORDS.findall(parameters.get("options", ""))
        quoted = "|".join(map(re.escape, asked))
        if quoted and re.search(rf"[{QUOTES}]\s?({quoted})\s?[{QUOTES}]", answer):
            return Meaning.PERMANENT
        return Meaning.DISCONNECT

    # For the witnesses

    def has_transaction_ids(self, raw: Any) -> bool:
        return self.server_version(raw) >= FIRST_VERSION_WITH_XACT_STATUS

    def identify(self, raw: Any) -> ServerSession:
        try:
            (row,) = self.query(raw, IDENTIFY.format(history=f", {HISTORY}"))
        except self.module.ProgrammingError:
            # Somebody took the right to ask for the history away.
            (row,) = self.query(raw, IDENTIFY.format(history=""))
        pid, start, is_standby, *told = row
        history = History(*told) if told and not is_standby else None
        is_lent = pid != raw.info.backend_pid
        return ServerSession(pid, start, is_standby, is_lent=is_lent, history=history)

    def end_session(self, raw: Any, session: ServerSession, evidence: Evidence) -> bool:
        seconds = max(0.0, time.monotonic() - evidence.began)
        found: list[tuple[str, Any]] = [(BY_MARK, mark) for mark in evidence.marks]
        if not (session.is_pooled or session.is_lent):
            found.append((BY_SESSION, (session.pid, session.start, seconds)))
        if evidence.xid is not None:
            found.append((BY_ROW, (evidence.xid, seconds)))
        if not found:
            return False
        conditions = " OR ".join(condition for condition, _ in found)
        orphan = f"FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND ({conditions})"
        values = [value for _, values in found for value in values]
        try:
            rows = self.query(
                raw, f"{AS_WHO_LOGGED_IN}SELECT pg_terminate_backend(pid) {orphan}", values
            )
        except self.module.ProgrammingError:
            # A session of a superuser's cannot be ended by others; it is waited for.
            rows = self.query(raw, f"{AS_WHO_LOGGED_IN}SELECT pid {orphan}", values)
        return bool(rows)

    def has_written(self, raw: Any, but_for: str | None = None) -> bool:
        ((has_written,),) = self.query(raw, HAS_WRITTEN, (but_for,))
        return bool(has_written)

    def full_name(self, raw: Any, table: str) -> str | None:
        rows = self.query(
            raw,
            "SELECT quote_ident(nspname) || '.' || quote_ident(relname)"
            " FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace"
            " WHERE pg_class.oid = to_regclass(%s)",
            (table,),
        )
        return str(rows[0][0]) if rows else None

    def limit_lock_waits(self, raw: Any, limit: float) -> None:
        self.query(raw, "SELECT set_config('lock_timeout', %s, true)", (f"{limit}s",))

    def severity(self, error: Any) -> str | None:
        """ERROR if the session goes on after ``error``, FATAL or PANIC if not."""
        severity: str | None = error.diag.severity_nonlocalized
        return severity

    def connection_message(self, error: BaseException) -> str:
        """What libpq says about a failed attempt to connect."""
        return str(error)

    # What differs between the modules

    def parse_conninfo(self, dsn: str) -> dict[str, str]:
        """The parameters in libpq's URL or key=value string; raises ProgrammingError."""
        raise NotImplementedError

    def start_connecting(self, parameters: Mapping[str, str]) -> None:
        """Have libpq start to connect; raises the module's error if it refuses, or cannot."""
        raise NotImplementedError

    def query(self, raw: Any, statement: str, parameters: Any = None) -> list[Any]:
        raise NotImplementedError

    def parameters(self, raw: Any) -> dict[str, str]:
        """The parameters that ``raw`` was connected with."""
        raise NotImplementedError

    def sqlstate(self, error: BaseException) -> str | None:
        """The SQLSTATE of an error, if it has one."""
        raise NotImplementedError

    def parameter_status(self, raw: Any, name: str) -> str | None:
        """A setting as the server has reported it last, without a round trip."""
        raise NotImplementedError

    def server_version(self, raw: Any) -> int:
        """The server's version as libpq has it, such as 180001."""
        raise NotImplementedError


def looks_like_reading(tag: str | None, text: bytes | None) -> bool:
    """Whether a statement writes nothing, as far as can be seen.

    tag: what the server has said of it. text: the statement; None if it is not known.
    """
    if not text or (tag or "").partition(" ")[0] not in READING_TAGS:
        return False
    return _has_known(text) if len(text) < LONGEST_KNOWN else _has_known.__wrapped__(text)


@lru_cache(maxsize=512)
def _has_known(text: bytes) -> bool:
    """Whether the text has none but words and functions that are known to do nothing but read."""
    text = text.lower()
    called = {word for word, parenthesis in WORDS.findall(text) if parenthesis}
    return HARMLESS.issuperset(called) and WRITING.search(text) is None


def _explain(error: BaseException) -> None:
    """Have an error of connecting say what to do, if who has answered is no server."""
    if OTHER_PROTOCOL.search(str(error)):
        error.args = (f"{one_line(error)}. {NO_SERVER}",)


def plain_encoding(name: str) -> str:
    """The name of an encoding as the server compares it; UTF-8 has two."""
    plain = "".join(filter(str.isalnum, name)).upper()
    return "UTF8" if plain == "UNICODE" else plain


@cache
def begin_statement(level: str | None, readonly: bool | None, deferrable: bool | None) -> str:
    """BEGIN with the transaction modes that are not None."""
    statement = "BEGIN"
    if level is not None:
        statement += f" ISOLATION LEVEL {level}"
    if readonly is not None:
        statement += " READ ONLY" if readonly else " READ WRITE"
    if deferrable is not None:
        statement += " DEFERRABLE" if deferrable else " NOT DEFERRABLE"
    return statement
