"""PostgreSQL through psycopg 3.

The raw connection is kept in psycopg's autocommit mode, in which psycopg sends no BEGIN of its own;
BEGIN, COMMIT and ROLLBACK are sent by this driver. psycopg goes by libpq's transaction status, so
that in a transaction that it did not begin everything else works as it does natively: server-side
cursors, COPY, pipeline mode.

A transaction can begin along with its first statement, in libpq's pipeline mode. There an error
makes the server skip everything up to the next sync, so that a statement whose BEGIN has failed is
not executed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, NoReturn

import psycopg
from psycopg import IsolationLevel, generators, pq, sql
from psycopg.abc import PQGen
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import tuple_row

from zreconnect.documented import implements
from zreconnect.drivers import handlers
from zreconnect.drivers.base import (
    AT_HAND,
    OF_ANOTHER_MODULE,
    Begun,
    SessionSettings,
    reads_as,
)
from zreconnect.drivers.pipelines import pass_on_first_errors
from zreconnect.drivers.postgresql import (
    COMMIT_STATEMENT,
    DISCONNECT_MESSAGES,
    PostgresqlDriver,
    begin_statement,
    looks_like_reading,
    may_follow_begin,
)
from zreconnect.exceptions import DisconnectionError, ExceptionInfo
from zreconnect.interfaces import IPipeliningDriver, Meaning

ISOLATION_LEVELS: dict[int, str] = {level: level.name.replace("_", " ") for level in IsolationLevel}
#: What can be set on a connection, besides what `SessionSettings` has.
ATTRIBUTES = ("row_factory", "server_cursor_factory", "prepare_threshold", "prepared_max")
# `_SharedTrip` builds on what psycopg does not document: with another version, BEGIN goes first.
KNOWS_PIPELINE = psycopg.__version__.startswith(("3.2.", "3.3."))
_OURS: Any = object()
# psycopg's own words, before libpq's: one line for each address that it has tried.
PREFIX = re.compile(r"^(?:- host: .*?, hostaddr: \S+: )?connection (?:failed|is bad): ", re.M)


class PsycopgDisconnectionError(DisconnectionError, psycopg.OperationalError):
    """A `DisconnectionError` for code that was written against psycopg 3."""

    def __init__(self, message: str, original: ExceptionInfo | None = None) -> None:
        # Retry does not pass this on.
        psycopg.OperationalError.__init__(self)
        super().__init__(message, original)


@implements(IPipeliningDriver)
class PsycopgDriver(PostgresqlDriver):
    """The `IPipeliningDriver` for psycopg 3."""

    name = "psycopg"
    module = psycopg
    sql = sql
    answers_begin = True
    returns_cursor = True
    disconnection_error = PsycopgDisconnectionError
    rollback_request = psycopg.Rollback
    # psycopg's own words (waiting.py, pgconn.pyx): the socket has hung up, and libpq does not know
    # it yet, or has none any more.
    disconnect_messages = (
        *DISCONNECT_MESSAGES,
        "connection socket closed",
        "the connection is lost",
    )
    isolation_levels = ISOLATION_LEVELS

    def parse_conninfo(self, dsn: str) -> dict[str, str]:
        return {name: str(value) for name, value in conninfo_to_dict(dsn).items()}

    # Sessions

    def start_connecting(self, parameters: Mapping[str, str]) -> None:
        keywords: dict[str, Any] = dict(parameters)
        started = pq.PGconn.connect_start(make_conninfo("", **keywords).encode())
        raise psycopg.OperationalError(started.get_error_message())

    def parameters(self, raw: Any) -> dict[str, str]:
        # psycopg leaves out what is libpq's default.
        return {**raw.info.get_parameters(), "host": raw.info.host, "port": str(raw.info.port)}

    def prepare(self, raw: Any) -> None:
        if not isinstance(raw, psycopg.Connection):
            raise TypeError(
                "connection_factory must return a psycopg.Connection, "
                f"not {raw!r}{OF_ANOTHER_MODULE}"
            )
        if raw.autocommit:
            raise psycopg.ProgrammingError(
                "connection_factory made a connection in autocommit mode; set autocommit on the "
                "reconnecting connection instead"
            )
        if self.in_transaction(raw):
            raise psycopg.ProgrammingError(
                "connection_factory made a connection that is in a transaction: have it commit"
            )
        raw.autocommit = True
        pass_on_first_errors(raw)
        handlers.start(raw, [])

    def attribute(self, raw: Any, name: str) -> Any:
        return handlers.noting(raw, name) if name in handlers.METHODS else getattr(raw, name)

    def keep(self, raw: Any) -> Any:
        names = ("adapters", "zreconnect_handlers", *ATTRIBUTES)
        return {name: getattr(raw, name) for name in names}

    def inherit(self, raw: Any, kept: Any) -> None:
        handlers.start(raw, kept["zreconnect_handlers"])
        # There is no public way but a parameter of psycopg.connect().
        raw._adapters = AdaptersMap(kept["adapters"])
        for name in ATTRIBUTES:
            setattr(raw, name, kept[name])

    def restore(self, raw: Any, settings: SessionSettings, replaced: dict[str, str]) -> None:
        raw.autocommit = True  # Again, because on_connect may have changed it.
        if settings.cursor_factory is not None:
            raw.cursor_factory = settings.cursor_factory
        if settings.client_encoding is not None:
            self.set_client_encoding(raw, settings.client_encoding)
        self.set_default_modes(raw, settings, replaced)

    def set_client_encoding(self, raw: Any, encoding: str) -> None:
        self.query(raw, "SELECT set_config('client_encoding', %s, false)", (encoding,))

    def set_cursor_factory(self, raw: Any, factory: Any) -> None:
        raw.cursor_factory = factory or psycopg.Cursor

    def uses_tls(self, raw: Any) -> bool:
        return bool(raw.pgconn.ssl_in_use)

    def fileno(self, raw: Any) -> int:
        number: int = raw.fileno()
        return number

    def abandon(self, raw: Any) -> None:
        super().abandon(raw)
        # Into the null device: psycopg complains of a connection that nobody has closed.
        self.close(raw)

    # Transactions

    def begin(self, raw: Any, settings: SessionSettings, rider: str = "") -> Any:
        return _first_row(self._execute(raw, _begin(raw, settings), *([rider] if rider else [])))

    def begins_read_only(self, raw: Any, settings: SessionSettings) -> bool:
        return bool(raw.read_only if settings.readonly is None else settings.readonly)

    def commit(self, raw: Any, rider: str = "") -> None:
        goes_along = rider and not self.in_failed_transaction(raw)
        answer = self._execute(raw, *([rider] if goes_along else []), "COMMIT")
        if answer.command_status == b"ROLLBACK":
            raise psycopg.errors.InFailedSqlTransaction(
                "Nothing was committed: a statement of the transaction had failed, so the server "
                "rolled it back. Do not go on to commit after an error."
            )

    def rollback(self, raw: Any) -> None:
        _check_not_locked(raw)
        if _is_in_pipeline(raw):
            # The errors of what the pipeline has under way do not matter any more. If it could not
            # end, psycopg has lost track, and raises IndexError.
            with contextlib.suppress(psycopg.Error, IndexError), raw.pipeline():
                pass
        # psycopg's own forgets the statements that it has prepared in the transaction.
        raw.rollback()

    def own_transaction(self, raw: Any) -> None:
        """psycopg knows of it."""

    def is_at_rest(self, raw: Any) -> bool:
        # In a pipeline nothing is certain: answers may have been taken and lost.
        return not _is_in_pipeline(raw) and raw.info.transaction_status in (
            pq.TransactionStatus.IDLE,
            pq.TransactionStatus.INTRANS,
            pq.TransactionStatus.INERROR,
        )

    def transaction_flag(self, raw: Any) -> Callable[[], object]:
        # TransactionStatus.IDLE is 0.
        return partial(attrgetter("transaction_status"), raw.pgconn)

    def in_transaction(self, raw: Any) -> bool:
        return raw.info.transaction_status in (
            pq.TransactionStatus.ACTIVE,
            pq.TransactionStatus.INTRANS,
            pq.TransactionStatus.INERROR,
        )

    def in_failed_transaction(self, raw: Any) -> bool:
        return bool(raw.info.transaction_status == pq.TransactionStatus.INERROR)

    # Beginning along with a statement

    def may_begin_with(self, raw: Any, raw_cursor: Any, query: Any, parameters: Any = None) -> bool:
        if (
            not KNOWS_PIPELINE
            # A class of the user's may do more than to execute one statement.
            or type(raw_cursor).execute is not psycopg.Cursor.execute
            # As _is_in_pipeline(), without its call.
            or raw.pgconn.pipeline_status
            or raw.lock.locked()
        ):
            return False
        if isinstance(query, bytes):
            query = query.decode("ascii", "replace")
        elif not isinstance(query, str):
            if not isinstance(query, sql.Composable):
                return False
            query = query.as_string(raw)
        # A parameter that is not there is an error of a pipeline's protocol.
        has_placeholder = parameters is None and "$" in query
        return not has_placeholder and may_follow_begin(query) is not None

    def begin_with(
        self,
        raw: Any,
        raw_cursor: Any,
        settings: SessionSettings,
        rider: str,
        arguments: tuple[Any, ...],
        options: Mapping[str, Any],
        answered: Any = None,
    ) -> Begun | None:
        begin = _begin(raw, settings)
        statements = (begin, rider) if rider else (begin,)
        trip = _SharedTrip(raw, statements, answered)
        error: BaseException | None = None
        try:
            with trip:
                raw_cursor.execute(*arguments, **options)
        except BaseException as problem:
            error = problem
        try:
            if error is not None and not (
                self.is_at_rest(raw) and self.meaning(error, raw) is not Meaning.DISCONNECT
            ):
                raise error
            if len(trip.answers) == len(statements):
                return None, error
            if self.in_transaction(raw):
                self.rollback(raw)
            if error is None or isinstance(error, psycopg.Error):
                return None
            # It need not come again: it can be an interrupt.
            answered(self.begin(raw, settings, rider))
            return None, error
        finally:
            # Its traceback refers to this frame.
            del error

    # Statements

    def query(self, raw: Any, statement: str, parameters: Any = None) -> list[Any]:
        cursor = self._ask(raw, statement, parameters)
        return cursor.fetchall() if cursor.description else []

    def cursor(self, raw: Any, name: str | None, options: Mapping[str, Any]) -> Any:
        options = dict(options)
        factory = options.pop("cursor_factory", None)
        if factory is None:
            return raw.cursor(name or "", **options)
        binary = options.pop("binary", False)
        cursor = factory(raw, *([name] if name else []), **options)
        if binary:
            cursor.format = pq.Format.BINARY
        return cursor

    def is_commit(self, raw_cursor: Any) -> bool:
        query = raw_cursor._query
        if query is not None:
            return COMMIT_STATEMENT.search(query.query) is not None
        # The cursor does not tell which prepared statement it has executed.
        prepared = raw_cursor.connection._prepared
        return any(
            COMMIT_STATEMENT.search(text) for text, _ in (*prepared._counts, *prepared._names)
        )

    def rows_at_hand(self, raw_cursor: Any) -> int:
        if reads_as(raw_cursor.__class__, psycopg.ServerCursor):
            return int(raw_cursor.itersize)
        return AT_HAND if reads_as(raw_cursor.__class__, psycopg.Cursor) else 1

    def looks_like_reading(self, raw_cursor: Any) -> bool:
        query = raw_cursor._last_query
        if isinstance(query, sql.Composable):
            query = query.as_bytes(raw_cursor.connection)
        elif isinstance(query, str):
            query = query.encode()
        return looks_like_reading(raw_cursor.statusmessage, query)

    # What libpq knows

    def sqlstate(self, error: BaseException) -> str | None:
        return getattr(error, "sqlstate", None)

    def connection_message(self, error: BaseException) -> str:
        return PREFIX.sub("", str(error))

    def parameter_status(self, raw: Any, name: str) -> str | None:
        status: str | None = raw.info.parameter_status(name)
        return status

    def server_version(self, raw: Any) -> int:
        version: int = raw.info.server_version
        return version

    def _execute(self, raw: Any, *statements: str) -> Any:
        """Execute statements without parameters, in one round trip; the answer to the last."""
        if _is_in_pipeline(raw):
            return self._ask(raw, ";".join(statements)).pgresult
        if raw.lock.locked():
            _refuse_locked()
        # A cursor would make many times the work of it.
        with raw.lock:
            raw.pgconn.send_query(";".join(statements).encode())
            results = raw.wait(generators.execute(raw.pgconn))
        for result in results:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise psycopg.errors.error_from_result(result, raw.info.encoding)
        return results[-1]

    def _ask(self, raw: Any, statement: str, parameters: Any = None) -> Any:
        """A cursor that has executed statements, at the result of the last one."""
        _check_not_locked(raw)
        if not _is_in_pipeline(raw):
            with _without_preparing(raw):
                cursor = _own_cursor(raw).execute(statement, parameters)
            while cursor.nextset():
                pass
            return cursor
        # A pipeline takes one statement at a time; at the end of the block they are answered.
        with raw.pipeline(), _without_preparing(raw):
            for part in statement.split(";"):
                cursor = _own_cursor(raw).execute(part, parameters)
        return cursor


def _first_row(result: Any) -> Any:
    return (result.get_value(0, 0).decode(),) if result.ntuples else None


class _SharedTrip(psycopg.Pipeline):
    """A pipeline for a single round trip: at the end of the block all is sent, in one piece.

    psycopg's own sends each statement by itself, which costs a system call and a packet each.

    statements: those of ours, which go first. answered: called with the row, or None, that the last
    one returns, if all of them are executed.
    """

    def __init__(
        self, raw: Any, statements: tuple[str, ...], answered: Callable[[Any], object]
    ) -> None:
        super().__init__(raw)
        self._answered = answered
        # What stands for those of ours in psycopg's queue of what has a result.
        self._ours = [_OURS] * len(statements)
        #: What the server has answered to those that it has executed.
        self.answers: list[Any] = []
        for statement in statements:
            send = partial(self.pgconn.send_query_params, statement.encode(), None)
            self.command_queue.append(send)
        # The server answers them at once, and not together with what follows.
        self.command_queue.append(self.pgconn.send_flush_request)

    def __enter__(self) -> _SharedTrip:
        self.pgconn.enter_pipeline_mode()
        self._conn._pipeline = self
        return self

    def __exit__(self, *error: object) -> None:
        try:
            with self._conn.lock:
                self._conn.wait(self._send_and_fetch())
        finally:
            self._conn._pipeline = None
            # Not if an interrupted wait has left answers behind: the session is of no use then.
            # A context manager would take three Python calls of each transaction.
            try:  # noqa: SIM105
                self.pgconn.exit_pipeline_mode()
            except psycopg.OperationalError:
                pass

    def _send_and_fetch(self) -> PQGen[None]:
        self._enqueue_sync()
        while self.command_queue:
            self.command_queue.popleft()()
        yield from generators.send(self.pgconn)
        error: Exception | None = None
        for queued in [*self._ours, *self.result_queue]:
            try:
                results = yield from generators.fetch_many(self.pgconn)
            except psycopg.Error as problem:
                # What was answered before may tell why there is no more of it.
                raise error or problem from None
            try:
                if queued is not _OURS:
                    self._process_results(queued, results)
                    continue
                if results[0].status == pq.ExecStatus.FATAL_ERROR:
                    raise psycopg.errors.error_from_result(results[0])
                if results[0].status != pq.ExecStatus.PIPELINE_ABORTED:
                    self.answers.append(results[0])
                    if len(self.answers) == len(self._ours):
                        row = results[0].get_value(0, 0) if results[0].ntuples else None
                        self._answered(row and (row.decode(),))
            except Exception as problem:
                # Also that of a row factory: what is answered after it has to be read all the same.
                error = error or problem
        if error is not None:
            try:
                raise error
            finally:
                # Its traceback refers to this frame.
                del error

    def _communicate_gen(self) -> PQGen[None]:
        """Nothing is sent before the end of the block."""
        return
        yield


def _begin(raw: Any, settings: SessionSettings) -> str:
    """BEGIN with the modes that the user has set, or else those of the connection factory."""
    level = raw.isolation_level if settings.isolation_level is None else settings.isolation_level
    return begin_statement(
        None if level is None else ISOLATION_LEVELS[level],
        raw.read_only if settings.readonly is None else settings.readonly,
        raw.deferrable if settings.deferrable is None else settings.deferrable,
    )


def _own_cursor(raw: Any) -> Any:
    """A cursor for statements of zreconnect's.

    Not raw.cursor(): a cursor class of the user's may log or change what it executes.
    """
    return psycopg.ClientCursor(raw, row_factory=tuple_row)


@contextlib.contextmanager
def _without_preparing(raw: Any) -> Iterator[None]:
    """Keep the statements in this block out of those that psycopg counts, to prepare them."""
    threshold, raw.prepare_threshold = raw.prepare_threshold, None
    try:
        yield
    finally:
        raw.prepare_threshold = threshold


def _is_in_pipeline(raw: Any) -> bool:
    return bool(raw.pgconn.pipeline_status)


def _check_not_locked(raw: Any) -> None:
    if raw.lock.locked():
        _refuse_locked()


def _refuse_locked() -> NoReturn:
    # psycopg would wait for ever, for a generator of this very thread.
    raise psycopg.ProgrammingError(
        "stream(), notifies() or a copy() block is not finished: close it before the "
        "transaction begins or ends"
    )


driver = PsycopgDriver()
