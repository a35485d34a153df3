"""What the drivers for MySQL and MariaDB have in common: errors, statements, and transactions.

Outside a transaction a session is in MySQL's autocommit mode, inside one it is not: so no statement
commits by itself when the server has ended the transaction, and the mode, which each answer of the
server tells, says where the session is. BEGIN sets a savepoint, the mark, which COMMIT releases: it
is gone if the server has rolled the transaction back, as it does with the victim of a deadlock.

MariaDB gets all this in one compound statement and so in one round trip. MySQL has compound
statements in procedures alone, and gets one statement after the other.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import socket
import ssl
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from zreconnect import dsn as dsn_module
from zreconnect.documented import documented_by
from zreconnect.drivers.base import (
    OF_ANOTHER_MODULE,
    Condition,
    Evidence,
    ServerSession,
    SessionSettings,
    named_as,
    redirect_to_null,
    set_own_default,
)
from zreconnect.drivers.mysqlchoices import MULTI_STATEMENTS, QUESTION, ChoosingDriver, quoted
from zreconnect.drivers.mysqltext import (
    CHOOSING,
    READING,
    SWITCHING,
    is_committing,
    is_inside,
    may_commit,
)
from zreconnect.exceptions import DisconnectionError, ExceptionInfo
from zreconnect.history import History
from zreconnect.interfaces import IDriver, Meaning

FORM = "mysql://user:password@host:port/dbname?option=value"

# The server's errors: https://mariadb.com/kb/en/mariadb-error-code-reference/
ER_CHECKREAD = 1020
ER_OPEN_AS_READONLY = 1036
ER_CON_COUNT_ERROR = 1040
ER_DBACCESS_DENIED_ERROR = 1044
ER_UNKNOWN_COM_ERROR = 1047
ER_TABLE_EXISTS_ERROR = 1050
ER_SERVER_SHUTDOWN = 1053
ER_NORMAL_SHUTDOWN = 1077
ER_SHUTDOWN_COMPLETE = 1079
ER_FORCING_CLOSE = 1080
ER_NO_SUCH_THREAD = 1094
ER_TABLEACCESS_DENIED_ERROR = 1142
ER_NO_SUCH_TABLE = 1146
ER_NET_PACKET_TOO_LARGE = 1153
ER_ERROR_DURING_COMMIT = 1180
ER_TOO_MANY_USER_CONNECTIONS = 1203
ER_LOCK_WAIT_TIMEOUT = 1205
ER_LOCK_TABLE_FULL = 1206
ER_LOCK_DEADLOCK = 1213
ER_USER_LIMIT_REACHED = 1226
ER_SPECIFIC_ACCESS_DENIED_ERROR = 1227
ER_OPTION_PREVENTS_STATEMENT = 1290
ER_SP_DOES_NOT_EXIST = 1305
ER_QUERY_INTERRUPTED = 1317
ER_TABLE_DEF_CHANGED = 1412
ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION = 1792
ER_READ_ONLY_MODE = 1836
ER_CONNECTION_KILLED = 1927
ER_STATEMENT_TIMEOUT = 1969
ER_QUERY_TIMEOUT = 3024
ER_TRANSACTION_ROLLBACK_DURING_COMMIT = 3101
ER_CLIENT_INTERACTION_TIMEOUT = 4031
# The client library's: https://dev.mysql.com/doc/mysql-errors/en/client-error-reference.html
CR_CONNECTION_ERROR = 2002
CR_CONN_HOST_ERROR = 2003
CR_SERVER_GONE_ERROR = 2006
CR_SERVER_HANDSHAKE_ERR = 2012
CR_SERVER_LOST = 2013
CR_CANT_READ_CHARSET = 2019
CR_SSL_CONNECTION_ERROR = 2026
CR_SECURE_AUTH = 2049
CR_SERVER_LOST_EXTENDED = 2055
CR_AUTH_PLUGIN_CANNOT_LOAD = 2059
CR_AUTH_PLUGIN_ERR = 2061
FIRST_CLIENT_ERROR, LAST_CLIENT_ERROR = 2000, 2999

LOST = {
    ER_SERVER_SHUTDOWN,
    ER_NORMAL_SHUTDOWN,
    ER_SHUTDOWN_COMPLETE,
    ER_FORCING_CLOSE,
    ER_CONNECTION_KILLED,
    ER_CLIENT_INTERACTION_TIMEOUT,
    CR_CONNECTION_ERROR,
    CR_CONN_HOST_ERROR,
    CR_SERVER_GONE_ERROR,
    CR_SERVER_LOST,
    CR_SERVER_LOST_EXTENDED,
}
# In a session TLS has no other reason to fail; for connecting see TLS_REFUSAL.
LOST_IN_SESSION = LOST | {CR_SSL_CONNECTION_ERROR}
PASSING_WHILE_CONNECTING = LOST | {
    ER_CON_COUNT_ERROR,
    ER_TOO_MANY_USER_CONNECTIONS,
    ER_USER_LIMIT_REACHED,
}
REFUSED_BY_CLIENT = {
    CR_SERVER_HANDSHAKE_ERR,
    CR_CANT_READ_CHARSET,
    CR_SECURE_AUTH,
    CR_AUTH_PLUGIN_CANNOT_LOAD,
    CR_AUTH_PLUGIN_ERR,
}
# Of TLS, the client libraries have one number for what passes and for what does not.
TLS_REFUSAL = re.compile(
    "certificate|required|no such file|permission denied|no start line|key values|private key"
    "|alert|protocol version|unsupported protocol|no protocols|no shared cipher|verification",
    re.IGNORECASE,
)
READ_ONLY = {ER_OPEN_AS_READONLY, ER_READ_ONLY_MODE}
# Somebody else was in the way. InnoDB, or group replication at COMMIT, has rolled back the whole
# transaction with those below, and not the statement alone.
TRANSIENT = {
    ER_CHECKREAD,
    ER_LOCK_DEADLOCK,
    ER_LOCK_WAIT_TIMEOUT,
    ER_TABLE_DEF_CHANGED,
    ER_TRANSACTION_ROLLBACK_DURING_COMMIT,
}
ENDS_TRANSACTION = {
    ER_CHECKREAD,
    ER_LOCK_DEADLOCK,
    ER_LOCK_TABLE_FULL,
    ER_TRANSACTION_ROLLBACK_DURING_COMMIT,
}
# Of COMMIT, these leave it open whether it was done.
UNDECIDED = {ER_QUERY_INTERRUPTED, ER_STATEMENT_TIMEOUT, ER_QUERY_TIMEOUT, ER_ERROR_DURING_COMMIT}
CONDITIONS = {
    ER_NO_SUCH_TABLE: Condition.UNDEFINED_TABLE,
    ER_DBACCESS_DENIED_ERROR: Condition.INSUFFICIENT_PRIVILEGE,
    ER_TABLEACCESS_DENIED_ERROR: Condition.INSUFFICIENT_PRIVILEGE,
    ER_SPECIFIC_ACCESS_DENIED_ERROR: Condition.INSUFFICIENT_PRIVILEGE,
    ER_TABLE_EXISTS_ERROR: Condition.ALREADY_EXISTS,
    ER_LOCK_WAIT_TIMEOUT: Condition.LOCK_NOT_AVAILABLE,
    ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION: Condition.READ_ONLY_TRANSACTION,
}

# Where a history is one for certain. Between two servers there is no promotion that ends what is on
# its way: a replica that takes writes may still be executing what it has received, or receive more.
SYSTEM = "CONCAT('server_id ', @@global.server_id)"
# To Galera's nodes nothing is on its way when they take a write.
SYSTEM_OF_MARIADB = (
    f"IF(@@global.wsrep_on, CONCAT('cluster ', @@global.wsrep_cluster_name), {SYSTEM})"
)
ISOLATION_LEVELS = ("READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
MARK = "zreconnect_transaction"
# By so many bytes a statement has to be shorter than max_allowed_packet: its command is one, and
# MariaDB's net_serv.cc wants two more. A character takes four at most.
BYTES_OF_PACKET = 3
BYTES_OF_CHARACTER = 4
# The names that this package, PyMySQL and mysqlclient have for the class of a cursor.
CURSOR_CLASSES = ("cursor_factory", "cursor", "cursorclass")
# Options of DSNs whose values are numbers, in seconds.
NUMBERS = ("connect_timeout", "read_timeout", "write_timeout")
TEXTS = ("charset", "collation", "init_command", "sql_mode", "unix_socket")
FILES = ("read_default_file", "read_default_group", "ssl_ca", "ssl_cert", "ssl_key")
SSL_MODES = ("DISABLED", "PREFERRED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")
REQUIRED = {"ssl_mode": "REQUIRED"}
DEFAULT_PORT = 3306
CHARSET = "utf8mb4"
# As with PostgreSQL, in seconds; the last is in milliseconds.
KEEPALIVE = {
    socket.TCP_KEEPIDLE: 30,
    socket.TCP_KEEPINTVL: 10,
    socket.TCP_KEEPCNT: 3,
    socket.TCP_USER_TIMEOUT: 60000,
}


class MysqlDisconnectionError(DisconnectionError):
    """A `DisconnectionError` that begins with a number, as the errors of modules for MySQL do.

    It is that of the module's error; or the one for a server that has gone away.
    """

    args: tuple[Any, ...]

    def __init__(self, message: str, original: ExceptionInfo | None = None) -> None:
        super().__init__(message, original)
        number = original and errno(original[1])
        self.args = (number or CR_SERVER_GONE_ERROR, message)

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[1],), {"args": self.args}


@documented_by(IDriver)
class MysqlDriver(ChoosingDriver):
    """The part of `zreconnect.interfaces.IDriver` that all modules for MySQL share."""

    ledger_table = (
        "CREATE TABLE IF NOT EXISTS {table} ("
        " id char(36) CHARACTER SET ascii PRIMARY KEY,"
        " number bigint NOT NULL DEFAULT 0,"
        " used timestamp NOT NULL DEFAULT CURRENT_TIMESTAMP"
        ") ENGINE=InnoDB"
    )
    quote = "`"
    ledger_conflict = "ON DUPLICATE KEY UPDATE"
    calls_autocommit = True
    # The module's class of connections, and its usual cursors.
    connection_class: Any
    plain_cursor: type
    server_side_cursor: type
    # Of a raw connection, as `IDriver` has it.
    parameters: Callable[[Any], dict[str, str]]

    # Connecting

    def parse(self, dsn: str) -> dict[str, str]:
        try:
            parts = urlsplit(dsn_module.plain(dsn))
            port = parts.port
            options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
        except ValueError:
            # Python's message quotes what it does not understand.
            raise ValueError(
                f"dsn is no URL of the form {FORM}, with special characters written as %XX"
            ) from None
        is_mysql = parts.scheme in ("mysql", "mariadb") and port != 0
        if not is_mysql or not parts.netloc + parts.query or parts.fragment:
            raise ValueError(f"dsn has not the form {FORM}")
        _check_options(options)
        found = {
            "user": parts.username,
            "password": parts.password,
            "host": parts.hostname,
            "port": None if port is None else str(port),
            "dbname": parts.path[1:],
        }
        return {name: unquote(part) for name, part in found.items() if part} | options

    def address(self, parameters: Mapping[str, str]) -> str:
        return dsn_module.redacted(parameters, "mysql")

    def connect(self, parameters: Mapping[str, str], timeout: float) -> Any:
        return self.module.connect(**self.connect_keywords(parameters, timeout))

    def connect_keywords(self, parameters: Mapping[str, str], timeout: float) -> dict[str, Any]:
        """The module's keywords for a connection that is given up after so many seconds."""
        limit = math.ceil(timeout)
        # PEP 249: not in autocommit mode; `prepare` looks whether somebody has changed that.
        keywords: dict[str, Any] = {"charset": CHARSET, "autocommit": False}
        keywords |= {name: parameters[name] for name in (*TEXTS, *FILES[:2]) if name in parameters}
        keywords |= {name: int(parameters[name]) for name in NUMBERS if name in parameters}
        keywords |= {
            name: parameters[name] for name in ("host", "user", "password") if name in parameters
        }
        keywords["port"] = int(parameters.get("port", DEFAULT_PORT))
        if "dbname" in parameters:
            keywords["database"] = parameters["dbname"]
        # At least a second, and not more than asked for.
        keywords["connect_timeout"] = max(1, min(limit, keywords.get("connect_timeout", limit)))
        return {**keywords, **self.tls_keywords(parameters)}

    def prepare(self, raw: Any) -> None:
        if not isinstance(raw, self.connection_class):
            raise TypeError(
                f"connection_factory must return a connection of {self.module.__name__}, "
                f"not {raw!r}{OF_ANOTHER_MODULE}"
            )
        if raw.get_autocommit():
            raise self.module.ProgrammingError(
                "connection_factory made a connection in autocommit mode; set autocommit on the "
                "reconnecting connection instead"
            )
        # MySQL does not tell the latter.
        inside = "@@in_transaction" if self._is_mariadb(raw) else "0"
        ((limit, is_inside),) = self.query(raw, f"SELECT @@max_allowed_packet, {inside}")
        if is_inside:
            raise self.module.ProgrammingError(
                "connection_factory made a connection that is in a transaction"
            )
        raw.zreconnect_longest = limit - BYTES_OF_PACKET
        raw.autocommit(True)
        raw.zreconnect_begun = raw.zreconnect_committed = raw.zreconnect_own = False
        self.choose_nothing(raw)
        _keep_alive(self.fileno(raw))

    def restore(self, raw: Any, settings: SessionSettings, replaced: dict[str, Any]) -> None:
        raw.autocommit(True)  # Again, because on_connect may have changed it.
        if settings.cursor_factory is not None:
            self.set_cursor_factory(raw, settings.cursor_factory)
        self.choose_again(raw, settings)
        self._set_default_modes(raw, settings, replaced)

    def _set_default_modes(
        self, raw: Any, settings: SessionSettings, replaced: dict[str, Any]
    ) -> None:
        """Have autocommit mode's statements run in the modes that BEGIN states otherwise."""
        # MySQL has new names since 8.0, MariaDB since 11.1.
        prefix = "@@session.tx" if self._is_mariadb(raw) else "@@session.transaction"

        def change(name: str, value: Any) -> Any:
            ((before,),) = self.query(raw, f"SELECT {prefix}_{name}")
            self.query(raw, f"SET {prefix}_{name} = %s", (value,))
            return before

        level = settings.isolation_level
        for name, mode in (
            ("isolation", None if level is None else str(level).replace(" ", "-")),
            ("read_only", settings.readonly),
        ):
            set_own_default(name, mode if settings.autocommit else None, replaced, change)

    def isolation_level(self, level: Any) -> Any:
        if level is None or (isinstance(level, str) and level.upper() == "DEFAULT"):
            return None
        if isinstance(level, str) and level.upper().replace("-", " ") in ISOLATION_LEVELS:
            return level.upper().replace("-", " ")
        names = ", ".join([*ISOLATION_LEVELS, "DEFAULT"])
        raise ValueError(f"isolation level {level!r} is unknown; known are {names}")

    def set_client_encoding(self, raw: Any, encoding: str) -> None:
        self.attribute(raw, "set_character_set")(encoding)

    def set_cursor_factory(self, raw: Any, factory: Any) -> None:
        raw.cursorclass = factory or self.plain_cursor

    def abandon(self, raw: Any) -> None:
        # mysqlclient says goodbye on the socket when the object is deleted.
        with contextlib.suppress(self.module.Error, OSError):
            redirect_to_null(self.fileno(raw))

    # Transactions

    def begin(self, raw: Any, settings: SessionSettings, rider: str = "") -> Any:
        raw.zreconnect_begun, raw.zreconnect_committed = True, False
        statements = ["SET autocommit = 0"]
        if settings.isolation_level is not None:
            statements.append(f"SET TRANSACTION {_level(settings)}")
        access = "" if settings.readonly is None else f" {_access(settings)}"
        statements += [f"START TRANSACTION{access}", f"SAVEPOINT {MARK}"]
        if rider:
            statements.append(rider)
        try:
            return self._execute_all(raw, statements)
        except self.module.Error as error:
            if self.meaning(error, raw) is not Meaning.DISCONNECT:
                # The transaction had begun before the rider failed.
                self.rollback(raw)
            raise

    def commit(self, raw: Any, rider: str = "") -> None:
        statements = [rider] if rider else []
        try:
            self._end(raw, [*statements, f"RELEASE SAVEPOINT {MARK}", "COMMIT"])
        except self.module.Error as error:
            number = errno(error)
            if number in UNDECIDED:
                # What became of it is looked up, as after a lost answer.
                self.close(raw)
            elif number == ER_SP_DOES_NOT_EXIST:
                self._roll_back_too(raw)
                message = _PARTLY if raw.zreconnect_committed else _NOTHING
                raise self.module.InternalError(message) from error
            elif number in ENDS_TRANSACTION:
                self._roll_back_too(raw)
            raise

    def rollback(self, raw: Any) -> None:
        self._end(raw, ["ROLLBACK"])

    def _end(self, raw: Any, statements: list[str]) -> None:
        """End the transaction, and ask along with it what is not known of choices."""
        is_asked = raw.zreconnect_unsure
        answer = self._execute_all(
            raw, [*statements, "SET autocommit = 1", *([QUESTION] if is_asked else [])]
        )
        raw.zreconnect_begun = raw.zreconnect_committed = False
        if is_asked:
            self.note_answer(raw, answer)

    def _roll_back_too(self, raw: Any) -> None:
        """The server has rolled back: have the session know it, so that what follows is refused."""
        has_committed = raw.zreconnect_committed
        self.rollback(raw)
        raw.zreconnect_committed = has_committed

    def is_at_rest(self, raw: Any) -> bool:
        # It is there from the first request on, which can be before `prepare`.
        return bool(raw.open) and not getattr(raw, "zreconnect_busy", False)

    def in_transaction(self, raw: Any) -> bool:
        return bool(raw.open) and (
            not raw.get_autocommit() or getattr(raw, "zreconnect_own", False)
        )

    def autocommit_mode(self, query: Any) -> bool | None:
        text = query.decode(errors="replace") if isinstance(query, bytes) else query
        switch = SWITCHING.match(text) if isinstance(text, str) else None
        return None if switch is None else switch[1] is not None

    def has_committed(self, raw: Any) -> bool:
        return bool(getattr(raw, "zreconnect_committed", False))

    def hand_out(self, raw: Any) -> None:
        # Neither the modules' own cursors nor their commit() show what they do.
        raw.zreconnect_committed = raw.zreconnect_begun

    def _execute_all(self, raw: Any, statements: list[str]) -> Any:
        """Execute statements, in one round trip if the server can; the row of the last one."""
        if self._is_mariadb(raw):
            statements = [f"BEGIN NOT ATOMIC {'; '.join(statements)}; END"]
        with self._own_cursor(raw) as cursor:
            for statement in statements:
                cursor.execute(statement)
            return cursor.fetchone() if cursor.description else None

    @contextlib.contextmanager
    def _own_cursor(self, raw: Any) -> Iterator[Any]:
        """A cursor for statements of zreconnect's.

        Not raw.cursor(): a cursor class of the user's may log or change what it executes.
        """
        with self.asking(raw):
            cursor = self.plain_cursor(raw)
            yield cursor
            # Not after an interrupt, when mysqlclient would raise in its place that it is not done.
            cursor.close()

    @contextlib.contextmanager
    def asking(self, raw: Any) -> Iterator[None]:
        """Note that the session is not at rest until there is an answer, read to its end.

        The modules do not tell: after an interrupt they take the rest of the answer for that to the
        next statement.
        """
        # The modules themselves read the rest of a server-side cursor's rows.
        if not MysqlDriver.is_at_rest(self, raw):
            self.close(raw)
        raw.zreconnect_busy = True
        try:
            yield
        except self.module.Error:
            raw.zreconnect_busy = False
            raise
        raw.zreconnect_busy = False

    def _is_mariadb(self, raw: Any) -> bool:
        return "MariaDB" in raw.get_server_info()

    # Statements

    def query(self, raw: Any, statement: str, parameters: Any = None) -> list[Any]:
        with self._own_cursor(raw) as cursor:
            cursor.execute(statement, parameters)
            return list(cursor.fetchall()) if cursor.description else []

    def cursor(self, raw: Any, name: str | None, options: Mapping[str, Any]) -> Any:
        # The modules' own argument is a class, and the first one.
        chosen = [options[key] for key in CURSOR_CLASSES if options.get(key) is not None]
        if isinstance(name, type):
            chosen.append(name)
        elif name is not None:
            chosen.append(self.server_side_cursor)
        unknown = set(options) - set(CURSOR_CLASSES)
        if unknown:
            raise TypeError(f"cursor() has no argument {', '.join(sorted(unknown))}")
        cursor_class = chosen[-1] if chosen else raw.cursorclass
        cursor = _watched(cursor_class)(raw)
        cursor.zreconnect_driver = self
        return cursor

    def is_commit(self, raw_cursor: Any) -> bool:
        return bool(raw_cursor.zreconnect_may_commit)

    def looks_like_reading(self, raw_cursor: Any) -> bool:
        return READING.match(raw_cursor.zreconnect_sent) is not None

    def execute_watched(self, raw: Any, cursor: Any, execute: Any, statement: Any) -> Any:
        """Execute a statement of the user's, and keep track of the transaction."""
        # PyMySQL's executemany() makes a bytearray.
        text = statement if isinstance(statement, str) else statement.decode(errors="replace")
        cursor.zreconnect_sent = text
        if len(statement) * BYTES_OF_CHARACTER > raw.zreconnect_longest:
            self._check_length(raw, statement)
        are_several = bool(raw.client_flag & MULTI_STATEMENTS)
        if not raw.zreconnect_begun:
            try:
                with self.asking(raw):
                    result = execute(statement)
            except self.module.Error as error:
                if errno(error) in ENDS_TRANSACTION:
                    raw.zreconnect_own = False
                raise
            raw.zreconnect_own = self.is_inside_own(raw, text)
            if are_several or CHOOSING.match(text):
                self.note_choices(raw, cursor)
            return result
        self._check_mode(raw)
        had_committed = raw.zreconnect_committed
        cursor.zreconnect_may_commit = may_commit(text, are_several)
        raw.zreconnect_committed = had_committed or cursor.zreconnect_may_commit
        try:
            with self.asking(raw):
                result = execute(statement)
        except self.module.Error as error:
            if errno(error) in ENDS_TRANSACTION or self._timeout_ended_transaction(raw, error):
                self._roll_back_too(raw)
            elif self.is_refused_by_standby(error, raw) and is_committing(text, are_several):
                # It was refused before it could commit anything.
                raw.zreconnect_committed, cursor.zreconnect_may_commit = had_committed, False
            raise
        self._check_mode(raw)
        if is_committing(text, are_several):
            # What follows is a transaction of its own.
            self.query(raw, f"SAVEPOINT {MARK}")
        if are_several or CHOOSING.match(text):
            self.note_choices(raw, cursor)
        return result

    def is_inside_own(self, raw: Any, text: str) -> bool:
        """Whether the program is in a transaction that a statement has begun in autocommit mode.

        text: that of the last statement.
        """
        are_several = bool(raw.client_flag & MULTI_STATEMENTS)
        return is_inside(text, are_several, raw.zreconnect_own)

    def _check_length(self, raw: Any, statement: Any) -> None:
        """Raise the server's error for a statement that it would end the session for."""
        is_text = isinstance(statement, str)
        length = len(statement.encode(raw.encoding, "replace") if is_text else statement)
        if length > raw.zreconnect_longest:
            limit = raw.zreconnect_longest + BYTES_OF_PACKET
            server = self.address(self.parameters(raw))
            raise self.module.OperationalError(
                ER_NET_PACKET_TOO_LARGE,
                f"A statement of {length:,} bytes is too long for {server}, whose "
                f"max_allowed_packet is {limit:,} bytes. It was not sent, and would fail again: "
                "store less at once (executemany() does with a smaller max_stmt_length of the "
                "cursor), or have the limit raised, for sessions that begin afterwards",
            )

    def _check_mode(self, raw: Any) -> None:
        """Raise what tells that somebody has ended the transaction by switching the mode."""
        if raw.get_autocommit():
            raw.zreconnect_committed = True
            raise self.module.InternalError(
                "Autocommit mode was switched on inside a transaction, which commits what came "
                "before. Roll back, and set the connection's attribute autocommit instead, outside "
                "a transaction: it holds for later sessions, too"
            )

    def _timeout_ended_transaction(self, raw: Any, error: BaseException) -> bool:
        return errno(error) == ER_LOCK_WAIT_TIMEOUT and self.query(
            raw, "SELECT @@innodb_rollback_on_timeout"
        ) == [(1,)]

    # Errors

    def meaning(self, error: BaseException, raw: Any) -> Meaning:
        if not raw.open or errno(error) in LOST_IN_SESSION or _is_refused_by_node(error):
            return Meaning.DISCONNECT
        return Meaning.TRANSIENT if errno(error) in TRANSIENT else Meaning.USER

    def is_transient(self, error: BaseException) -> bool:
        return isinstance(error, self.module.Error) and errno(error) in TRANSIENT

    def condition(self, error: BaseException) -> Condition | None:
        return CONDITIONS.get(errno(error) or 0)

    def is_refused_by_standby(
        self, error: BaseException, raw: Any, is_old_news: bool = False
    ) -> bool:
        number = errno(error)
        # The message quotes the option, in every language.
        return number in READ_ONLY or (
            number == ER_OPTION_PREVENTS_STATEMENT and "read-only" in str(error)
        )

    def takes_writes(self, raw: Any) -> bool:
        return not self.query(
            raw,
            "SHOW GLOBAL VARIABLES WHERE value <> 'OFF'"
            " AND variable_name IN ('read_only', 'innodb_read_only')",
        )

    def connect_meaning(self, error: BaseException, parameters: Mapping[str, str]) -> Meaning:
        number = errno(error)
        if isinstance(error, OSError) or number in PASSING_WHILE_CONNECTING:
            # PyMySQL has the same numbers for whatever the socket raises.
            met = getattr(error, "original_exception", None) or error.__context__ or error
            return Meaning.PERMANENT if _is_refusal_of_tls(met) else Meaning.DISCONNECT
        if _is_refused_by_node(error):
            return Meaning.DISCONNECT
        is_operational = isinstance(error, self.module.OperationalError)
        if not is_operational or not FIRST_CLIENT_ERROR <= (number or 0) <= LAST_CLIENT_ERROR:
            return Meaning.PERMANENT
        is_refusal = number == CR_SSL_CONNECTION_ERROR and TLS_REFUSAL.search(str(error))
        is_for_good = is_refusal or number in REFUSED_BY_CLIENT
        return Meaning.PERMANENT if is_for_good else Meaning.DISCONNECT

    # After a loss

    def identify(self, raw: Any) -> ServerSession:
        # A number may be given again after a restart of the server; the lock is the session's own,
        # and free when its transaction has ended.
        lock = f"zreconnect:{uuid.uuid4()}"
        system = SYSTEM_OF_MARIADB if self._is_mariadb(raw) else SYSTEM
        try:
            ((locked, name),) = self.query(raw, f"SELECT GET_LOCK(%s, 0), {system}", (lock,))
        except self.module.Error as error:
            # A cluster may refuse such locks.
            if self.meaning(error, raw) is Meaning.DISCONNECT:
                raise
            ((locked, name),) = self.query(raw, f"SELECT NULL, {system}")
        history = History(name, timeline="", stats_reset=None)
        return ServerSession(
            raw.thread_id(), lock if locked else None, history=history, start_is="with the lock"
        )

    def end_session(self, raw: Any, session: ServerSession, evidence: Evidence) -> bool:
        if session.start is None:
            return False
        ((number,),) = self.query(
            raw, "SELECT NULLIF(IS_USED_LOCK(%s), CONNECTION_ID())", (session.start,)
        )
        if number is None:
            return False
        try:
            self.query(raw, f"KILL CONNECTION {number}")
        except self.module.Error as error:
            if errno(error) != ER_NO_SUCH_THREAD:
                raise
        return True

    def full_name(self, raw: Any, table: str) -> str | None:
        if "." in table:
            return table
        ((database,),) = self.query(raw, "SELECT DATABASE()")
        return None if database is None else f"{quoted(database)}.{table}"

    def limit_lock_waits(self, raw: Any, limit: float) -> int:
        ((before,),) = self.query(raw, "SELECT @@innodb_lock_wait_timeout")
        self.query(raw, f"SET SESSION innodb_lock_wait_timeout = {math.ceil(limit)}")
        return int(before)

    # What differs between the modules

    def tls_keywords(self, parameters: Mapping[str, str]) -> dict[str, Any]:
        """The module's keywords for the DSN's options ``ssl_...``."""
        raise NotImplementedError

    def fileno(self, raw: Any) -> int:
        raise NotImplementedError


_NOTHING = (
    "Nothing was committed: the server has ended the transaction before, by itself. Do not go on "
    "to commit after an error."
)
_PARTLY = (
    "The rest was not committed: the transaction was ended before, in a procedure, by a statement "
    "that contains others, or in call_driver(). What came before that, it may have committed."
)


def _is_refusal_of_tls(error: BaseException) -> bool:
    return isinstance(error, ssl.SSLError) and not isinstance(
        error, (ssl.SSLEOFError, ssl.SSLSyscallError, ssl.SSLZeroReturnError)
    )


def errno(error: BaseException) -> int | None:
    """The number of an error, if it has one."""
    number = error.args[0] if error.args else None
    return number if isinstance(number, int) else None


def _is_refused_by_node(error: BaseException) -> bool:
    """Whether a node of a Galera cluster answers nothing, as without its primary component."""
    # The message is not translated; the number alone is that of an unknown command.
    return errno(error) == ER_UNKNOWN_COM_ERROR and "WSREP" in str(error)


@functools.cache
def _watched(cursor_class: type[Any]) -> type[Any]:
    """A subclass that lets the driver execute its statements."""

    class Watched(cursor_class):
        zreconnect_sent = ""
        zreconnect_may_commit = False
        zreconnect_driver: Any

        def _query(self, statement: Any) -> Any:
            return self.zreconnect_driver.execute_watched(
                self.connection, self, super()._query, statement
            )

    return named_as(cursor_class, Watched)


def _level(settings: SessionSettings) -> str:
    return f"ISOLATION LEVEL {settings.isolation_level}"


def _access(settings: SessionSettings) -> str:
    return "READ ONLY" if settings.readonly else "READ WRITE"


def _check_options(options: Mapping[str, str]) -> None:
    known = (*NUMBERS, *TEXTS, *FILES, "ssl_mode")
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"dsn has the unknown option {name!r}; known are {', '.join(sorted(known))}"
            )
        if name in NUMBERS and not value.isdigit():
            raise ValueError(f"dsn: {name} must be a whole number of seconds, not {value!r}")
        if name == "ssl_mode" and value not in SSL_MODES:
            raise ValueError(f"dsn: ssl_mode must be one of {', '.join(SSL_MODES)}, not {value!r}")


def _keep_alive(fileno: int) -> None:
    """Let the kernel notice a silent peer in minutes, where it takes hours by itself."""
    with socket.socket(fileno=os.dup(fileno)) as copy:
        if copy.family != socket.AF_UNIX:
            copy.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEPALIVE.items():
                copy.setsockopt(socket.IPPROTO_TCP, option, value)
