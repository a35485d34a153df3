"""A DB-API connection that reconnects when a transaction begins: its four states."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn, ParamSpec, TypeVar

import transaction
from transaction.interfaces import TransientError
from zope.interface import implementer

from zreconnect import commits, events
from zreconnect.cursor import ReconnectingCursor
from zreconnect.datamanager import ConnectionDataManager, join_transactions
from zreconnect.drivers.base import Meaning, SessionSettings
from zreconnect.exceptions import (
    CommitOutcomeUnknown,
    DisconnectedConnectionError,
    ReconnectTimeout,
    make_transient,
    one_line,
)
from zreconnect.guarded import Guarded
from zreconnect.interfaces import (
    ACTIVE,
    CLOSED,
    DOOMED,
    IDLE,
    PREPARED,
    IPipeliningDriver,
    IReconnectingConnection,
    ISavepoint,
)
from zreconnect.policy import (
    LONGEST_ATTEMPT,
    PERSIST,
    RetryPolicy,
    check_attempts,
    check_number,
)
from zreconnect.retry import check_function, run_unit_of_work
from zreconnect.server import Server, server_from_dsn, server_from_factory
from zreconnect.session import open_session
from zreconnect.turn import Turn
from zreconnect.twophase import TwoPhaseDataManager
from zreconnect.watchdog import NO_WATCH, Watch
from zreconnect.witness import NoObserver, Outcome, choose_witness

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# How many seconds a thread waits for the transaction of another one to end, if the policy has no
# timeout.
PATIENCE_WITH_THREADS = 60.0
# PEP 249, "Exceptions": a connection has them as attributes.
DBAPI_EXCEPTIONS = {
    "Warning",
    "Error",
    "InterfaceError",
    "DatabaseError",
    "DataError",
    "OperationalError",
    "IntegrityError",
    "InternalError",
    "ProgrammingError",
    "NotSupportedError",
}


class _DriverAttribute:
    """An attribute of the raw connection that can be set, if the driver's has it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, connection: ReconnectingConnection | None, owner: type) -> Any:
        return self if connection is None else getattr(connection.driver_connection, self._name)

    def __set__(self, connection: ReconnectingConnection, value: Any) -> None:
        setattr(connection.driver_connection, self._name, value)


@implementer(IReconnectingConnection)
class ReconnectingConnection:
    """A DB-API 2.0 connection that outlives its server sessions; see `IReconnectingConnection`.

    The server is first contacted when the first transaction begins.

    connection_factory: called without arguments, returns a new raw connection, not in autocommit
    mode. It is called in a thread of its own, so that the policy's deadline holds for it too.
    driver: the name of the driver that the raw connections belong to.
    policy: how long connecting is tried when a transaction begins.
    witness: how the outcome of a lost COMMIT is looked up: "xid", a `Ledger`, or None for not.
    on_connect: called with each new raw connection, outside a transaction, to set up the session.
    response_timeout: seconds after which a request without an answer counts as a disconnect; None
    waits for ever, except for beginning and rolling back.
    two_phase: take part in the current transaction of ``transaction.manager``, and commit in two
    phases, so that the transaction can have a part in several databases. The servers must allow
    prepared transactions.

    Raises TypeError or ValueError, naming the argument, for one that makes no sense.
    """

    # With slots, setting an attribute that is not kept here is an error and not ignored.
    __slots__ = (
        "__weakref__",
        "_before_begin",
        "_begins_with_statements",
        "_data_manager",
        "_data_manager_class",
        "_driver",
        "_ended_by_error",
        "_had_session",
        "_implicit_begin",
        "_inside_with",
        "_is_explicit",
        "_kept",
        "_observer",
        "_on_connect",
        "_policy",
        "_process",
        "_raw",
        "_response_timeout",
        "_savepoints",
        "_server",
        "_settings",
        "_state",
        "_turn",
        "_waited_for_turn",
        "_watch",
        "_witness",
    )

    def __init__(
        self,
        connection_factory: Callable[[], Any] | Server,
        driver: str = "psycopg2",
        policy: RetryPolicy = PERSIST,
        witness: Any = "xid",
        on_connect: Callable[[Any], object] | None = None,
        response_timeout: float | None = None,
        two_phase: bool = False,
    ) -> None:
        # First, so that nothing goes on to __getattr__ if an argument is refused.
        self._raw: Any = None
        self._state = IDLE
        self._watch = NO_WATCH
        if not isinstance(connection_factory, Server):
            connection_factory = server_from_factory(connection_factory, driver)
        if not isinstance(policy, RetryPolicy):
            raise TypeError(f"policy must be a RetryPolicy, not {policy!r}")
        if on_connect is not None and not callable(on_connect):
            raise TypeError(f"on_connect must be callable, not {on_connect!r}")
        if response_timeout is not None:
            check_number("response_timeout", response_timeout, at_least=0)
        self._server = connection_factory
        self._driver = self._server.driver
        if two_phase and not self._driver.supports_two_phase:
            raise ValueError(f"two_phase is not possible with the driver {self._driver.name}")
        self._policy = policy
        self._on_connect = on_connect
        self._response_timeout = response_timeout
        self._witness = choose_witness(witness)
        self._observer = self._new_observer()
        self._settings = SessionSettings()
        self._begins_with_statements = IPipeliningDriver.providedBy(self._driver)
        # What the driver has kept of the last raw connection.
        self._kept: Any = None
        self._process = os.getpid()
        self._had_session = False
        self._inside_with = False
        # Whether the server has rolled the transaction back by itself, because of an error.
        self._ended_by_error = False
        self._savepoints = itertools.count(1)
        # Set by the data manager and the descriptor, which make this connection part of something
        # larger.
        self._data_manager: Any = None
        self._data_manager_class = TwoPhaseDataManager if two_phase else ConnectionDataManager
        self._before_begin: Callable[[], None] | None = None
        self._turn = Turn()
        self._waited_for_turn = 0.0
        self._implicit_begin = True
        # Whether the transaction was begun by begin(), and not by a statement.
        self._is_explicit = False
        if two_phase:
            join_transactions(self, transaction.manager)
        _connections.add(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.server} {self._state}>"

    # State

    @property
    def state(self) -> str:
        return self._state

    @property
    def closed(self) -> int:
        return int(self._state == CLOSED)

    @property
    def broken(self) -> bool:
        """As in psycopg 3. A lost session breaks nothing: the next one takes its place."""
        return False

    @property
    def server(self) -> str:
        return self._server.address

    @property
    def driver_connection(self) -> Any:
        self._need_session()
        return self._raw

    # Transactions

    def begin(self) -> None:
        with self._in_turn():
            self._check_usable()
            if self._state == ACTIVE:
                raise self._driver.module.ProgrammingError(
                    "begin() inside a transaction: commit() or rollback() first"
                )
            self._begin()
            self._is_explicit = True

    def commit(self) -> None:
        if self._turn.is_anothers():
            raise self._driver.module.ProgrammingError(
                "commit() of another thread's transaction: it belongs to the thread that began it"
            )
        with self._in_turn():
            self._check_usable()
            if self._data_manager is not None:
                raise self._driver.module.ProgrammingError(
                    "This connection is part of a transaction manager's transaction: commit that "
                    "instead, with transaction.commit() or the manager's own commit(), or leave it "
                    "to the framework that does"
                )
            self._commit()

    def rollback(self) -> None:
        self._check_open()
        if not self._turn.is_for_good and not self._turn.take(0):
            # The transaction is another thread's, so there is none of this one.
            return
        with self._in_turn():
            self._roll_back()
            self._be_idle()

    def close(self) -> None:
        if self._state == IDLE and self._raw is not None and self._process == os.getpid():
            with (
                contextlib.suppress(self._driver.module.Error),
                self._watch.awaiting(self._response_timeout or LONGEST_ATTEMPT),
            ):
                self._observer.close(self._raw)
        self._state = CLOSED
        self._drop_session()
        self._turn.end()

    def savepoint(self) -> Savepoint:
        with self._in_turn():
            if self._is_autocommit():
                raise self._driver.module.ProgrammingError(
                    "savepoint() outside a transaction, in autocommit mode"
                )
            return Savepoint(self, f"zreconnect_{next(self._savepoints)}")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[ReconnectingCursor]:
        self.begin()
        try:
            with self.cursor() as cursor:
                yield cursor
            self.commit()
        finally:
            self.rollback()

    def run(
        self, function: Callable[..., Any], *args: Any, attempts: int = 3, **keywords: Any
    ) -> Any:
        return run_unit_of_work(
            functools.partial(function, *args, **keywords),
            begin=self.begin,
            commit=self.commit,
            abort=self.rollback,
            may_run_again=self._may_run_again,
            attempts=attempts,
        )

    def transactional(
        self, attempts: int = 3
    ) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
        check_attempts(attempts)

        def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
            check_function(function)

            @functools.wraps(function)
            def call(*args: Parameters.args, **keywords: Parameters.kwargs) -> Result:
                if self._turn.is_mine() and self._is_explicit:
                    return function(*args, **keywords)
                # The function may have an argument of its own that is named attempts.
                result: Result = self.run(lambda: function(*args, **keywords), attempts=attempts)
                return result

            return call

        return decorate

    def __enter__(self) -> ReconnectingConnection:
        """As in psycopg2: commit at the end, or roll back on an error; do not close."""
        with self._in_turn():
            self._check_usable()
            if self._inside_with:
                raise self._driver.module.ProgrammingError(
                    "The connection is already inside a with block"
                )
            self._inside_with = True
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error_type is None:
                self.commit()
        finally:
            self._inside_with = False
            self.rollback()

    def fork(self) -> ReconnectingConnection:
        forked = type(self)(
            self._server,
            policy=self._policy,
            witness=self._witness,
            on_connect=self._on_connect,
            response_timeout=self._response_timeout,
            two_phase=self._data_manager_class is TwoPhaseDataManager,
        )
        forked._settings = replace(self._settings)
        forked._kept = self._kept if self._raw is None else self._driver.keep(self._raw)
        return forked

    # Cursors and large objects

    def cursor(
        self, name: str | None = None, cursor_factory: Any = None, **options: Any
    ) -> ReconnectingCursor:
        if self._turn.is_anothers() and not self._turn.is_for_good:
            # What that one's transaction has come to does not matter to this thread.
            self._check_open()
        else:
            with self._in_turn():
                self._check_usable()
        return ReconnectingCursor(self, name, cursor_factory, options)

    def execute(self, query: Any, params: Any = None, **options: Any) -> ReconnectingCursor:
        """As in psycopg 3 and sqlite3: a new cursor, which has executed the statement."""
        cursor = self.cursor()
        cursor.execute(query, params, **options)
        return cursor

    @contextlib.contextmanager
    def pipeline(self) -> Iterator[Any]:
        """As in psycopg 3. Begins a transaction if there is none, and does not end it.

        Raises the driver's ProgrammingError in autocommit mode outside a transaction.
        """
        with self._in_turn():
            if self._is_autocommit():
                raise self._driver.module.ProgrammingError(
                    "pipeline() in autocommit mode: begin() a transaction first"
                )
            self._need_transaction()
        with self._guarded_block(self._raw.pipeline()) as pipeline:
            yield Guarded(self, pipeline)

    def lobject(self, *args: Any, **keywords: Any) -> Any:
        """A large object, as the driver has it; it lives as long as the transaction."""
        with self._in_turn():
            self._need_transaction()
            with self._guarded():
                self._driver.own_transaction(self._raw)
                return Guarded(self, self._raw.lobject(*args, **keywords))

    # Session settings

    row_factory = _DriverAttribute()
    server_cursor_factory = _DriverAttribute()
    prepare_threshold = _DriverAttribute()
    prepared_max = _DriverAttribute()

    @property
    def autocommit(self) -> bool:
        return self._settings.autocommit

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self.set_session(autocommit=value)

    @property
    def isolation_level(self) -> int | None:
        return self._settings.isolation_level

    @isolation_level.setter
    def isolation_level(self, level: int | str | None) -> None:
        self._change_settings(isolation_level=self._driver.isolation_level(level))

    @property
    def readonly(self) -> bool | None:
        return self._settings.readonly

    @readonly.setter
    def readonly(self, value: bool | str | None) -> None:
        self._change_settings(readonly=_flag("readonly", value))

    # psycopg 3's names.
    read_only = readonly

    def set_autocommit(self, value: bool) -> None:
        self.autocommit = value

    def set_read_only(self, value: bool | None) -> None:
        self.readonly = value

    def set_deferrable(self, value: bool | None) -> None:
        self.deferrable = value

    @property
    def deferrable(self) -> bool | None:
        return self._settings.deferrable

    @deferrable.setter
    def deferrable(self, value: bool | str | None) -> None:
        self._change_settings(deferrable=_flag("deferrable", value))

    @property
    def cursor_factory(self) -> Any:
        return self._settings.cursor_factory

    @cursor_factory.setter
    def cursor_factory(self, value: Any) -> None:
        self._settings.cursor_factory = value
        if self._raw is not None:
            self._driver.set_cursor_factory(self._raw, value)

    def set_session(
        self,
        isolation_level: int | str | None = None,
        readonly: bool | str | None = None,
        deferrable: bool | str | None = None,
        autocommit: bool | None = None,
    ) -> None:
        """Set what is given, as in psycopg2; None leaves a setting as it is.

        Raises the driver's ProgrammingError inside a transaction, ValueError for an unknown value.
        """
        changes: dict[str, Any] = {}
        if isolation_level is not None:
            changes["isolation_level"] = self._driver.isolation_level(isolation_level)
        if readonly is not None:
            changes["readonly"] = _flag("readonly", readonly)
        if deferrable is not None:
            changes["deferrable"] = _flag("deferrable", deferrable)
        if autocommit is not None:
            changes["autocommit"] = bool(autocommit)
        self._change_settings(**changes)

    def set_isolation_level(self, level: int | str | None) -> None:
        """Set the isolation level, as in psycopg2: 0 is autocommit mode, any other one ends it.

        Raises the driver's ProgrammingError inside a transaction, ValueError for an unknown level.
        """
        if level == 0:
            self._change_settings(autocommit=True)
        else:
            number = self._driver.isolation_level(level)
            self._change_settings(isolation_level=number, autocommit=False)

    def set_client_encoding(self, encoding: str) -> None:
        """Set the encoding of this session and of later ones.

        Raises the driver's ProgrammingError inside a transaction, since a rollback would undo it.
        """
        with self._in_turn():
            self._check_outside_transaction("set_client_encoding()")
            self._need_session()
            with self._guarded():
                self._driver.set_client_encoding(self._raw, encoding)
            self._settings.client_encoding = encoding

    def reset(self) -> None:
        """Roll back, and forget all settings but those of ``on_connect``; the next transaction
        gets a new session."""
        with self._in_turn():
            self.rollback()
            self._settings = SessionSettings()
            self._drop_session()
            self._kept = None

    def _change_settings(self, **changes: Any) -> None:
        with self._in_turn():
            self._check_outside_transaction("Changing the session's settings")
            self._settings = replace(self._settings, **changes)
            if self._raw is not None:
                # If the session has ended meanwhile, the next one has them from its beginning.
                with contextlib.suppress(self._driver.disconnection_error), self._guarded():
                    self._driver.restore(self._raw, self._settings)

    # Everything else that the driver's connection has

    def __getattr__(self, name: str) -> Any:
        if name in DBAPI_EXCEPTIONS:
            return getattr(self._driver.module, name)
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self._need_session()
        return self._guarded_attribute(self._raw, name, self)

    # For the cursor, the data manager and the descriptor

    def _need_transaction(self) -> None:
        """Begin a transaction if a statement needs one; else see that there is a session."""
        self._check_usable()
        if self._state == ACTIVE:
            self._check_not_ended()
        elif self._is_autocommit():
            self._need_live_session()
            commits.note()
        elif not self._implicit_begin:
            raise self._driver.module.ProgrammingError(
                "There is no transaction: call begin() first (implicitBegin is False)"
            )
        else:
            self._begin_for_statement()

    def _is_autocommit(self) -> bool:
        """Whether a statement would be a transaction of its own."""
        return self._state == IDLE and self._settings.autocommit and not self._inside_with

    @contextlib.contextmanager
    def _guarded(self, raw_cursor: Any = None) -> Iterator[None]:
        """Turn the driver's errors in this block into ours where they mean a lost session.

        raw_cursor: that of the statement that is executed in the block, if there is one.
        """
        try:
            with self._watch.awaiting(self._response_timeout):
                yield
        except self._driver.module.Error as error:
            if raw_cursor is not None:
                self._check_statement_lost(error, raw_cursor)
            self._check_lost(error)
            raise

    def _guarded_attribute(
        self, wrapped: Any, name: str, owner: Any, raw_cursor: Any = None
    ) -> Any:
        """``wrapped.name``; if it is a method, one whose errors are guarded.

        owner: what it returns in the place of ``wrapped``.
        """
        value = getattr(wrapped, name)
        if not callable(value):
            return value

        def call(*args: Any, **keywords: Any) -> Any:
            self._check_not_doomed()
            # Not for the connection's own: cancel() is called while another thread's turn lasts.
            turn = _MINE if wrapped is self._raw else self._in_turn()
            with turn, self._guarded(raw_cursor):
                result = value(*args, **keywords)
            if isinstance(result, Generator):
                rows = self._guarded_rows(result, raw_cursor, waits=wrapped is not self._raw)
                return (owner if row is wrapped else row for row in rows)
            return owner if result is wrapped else result

        return call

    def _guarded_rows(self, rows: Any, raw_cursor: Any = None, waits: bool = True) -> Iterator[Any]:
        """What an iterator of the driver's gives.

        waits: whether each is an answer of the server's, which can be overdue. Notifications are
        not.
        """
        limit = self._response_timeout if waits else None
        with self._guarded_block(contextlib.closing(rows), raw_cursor):
            while True:
                with self._in_turn():
                    self._check_usable()
                    with self._guarded(raw_cursor), self._watch.awaiting(limit):
                        row = next(rows, _END)
                if row is _END:
                    return
                yield row

    @contextlib.contextmanager
    def _guarded_block(self, block: Any, raw_cursor: Any = None) -> Iterator[Any]:
        """Enter one of the driver's context managers, and leave it."""
        raw = self._raw
        with self._guarded(raw_cursor):
            value = block.__enter__()
        try:
            yield value
        except BaseException:
            self._leave_block(block, raw, raw_cursor, *sys.exc_info())
            raise
        self._leave_block(block, raw, raw_cursor, None, None, None)

    def _leave_block(self, block: Any, raw: Any, raw_cursor: Any, *error: Any) -> None:
        if raw is not None and raw is self._raw:
            with self._guarded(raw_cursor):
                block.__exit__(*error)
        else:
            # It has ended with its session.
            with contextlib.suppress(self._driver.module.Error):
                block.__exit__(*error)

    def _may_begin_with_statement(self) -> bool:
        """Whether a statement begins a transaction, and BEGIN may travel along with it."""
        return (
            self._begins_with_statements
            and self._state == IDLE
            and self._raw is not None
            and self._implicit_begin
            and not self._is_autocommit()
            # What has arrived can be the end of the session, and BEGIN finds that out.
            and self._watch.is_quiet()
        )

    def _begin_with_statement(
        self, raw_cursor: Any, arguments: tuple[Any, ...], execute: Callable[[], object]
    ) -> bool:
        """Begin a transaction along with its first statement, in one round trip.

        Whether that was done; else the statement has not been executed, and there is no
        transaction.
        """
        self._check_usable()
        if not self._driver.may_begin_with(raw_cursor, *arguments):
            return False
        if self._before_begin is not None:
            self._before_begin()
        # Whatever interrupts this, a rollback() is due afterwards.
        self._state = ACTIVE
        try:
            with self._watch.awaiting(self._limit_of_begin(self._patience())):
                begun = self._driver.begin_with(
                    self._raw,
                    self._settings,
                    self._observer.rider(self._raw, self._settings),
                    execute,
                    lambda: self._watch.awaiting(self._response_timeout),
                )
            if begun is None:
                self._be_idle()
                return False
            self._observer.began(begun.row)
            if begun.error is not None:
                try:
                    raise begun.error
                finally:
                    # Its error's traceback refers to this frame.
                    del begun
        except self._driver.module.Error as error:
            self._check_statement_lost(error, raw_cursor)
            raise
        if self._server.is_missed_by(self._raw):
            missed = self._missed()
            self._end_session(missed)
            self._doom()
            self._raise_lost(missed, was_active=True)
        if self._observer.watches_statements:
            self._observer.executed(raw_cursor)
        return True

    def _check_statement_lost(self, error: BaseException, raw_cursor: Any) -> None:
        """As `_check_lost`, for a statement, which may have been a commit as well."""
        if self._state != CLOSED and self._means_disconnect(error):
            if self._state == IDLE:
                self._end_session(error)
                raise CommitOutcomeUnknown(self.server, "a statement in autocommit mode") from error
            if self._driver.may_have_committed(raw_cursor):
                self._end_session(error)
                self._doom()
                raise CommitOutcomeUnknown(self.server) from error
        self._check_lost(error)

    def _check_lost(self, error: BaseException) -> None:
        """Doom the transaction and raise `DisconnectionError` if ``error`` means a lost session."""
        if self._state == CLOSED:
            return
        if not self._means_disconnect(error):
            # Later statements would each be a transaction of its own.
            if self._state == ACTIVE and not self._driver.in_transaction(self._raw):
                self._ended_by_error = True
            self._mark_transient(error)
            return
        was_active = self._state == ACTIVE
        has_committed = was_active and self._has_committed()
        self._end_session(error)
        if was_active:
            self._doom()
        if has_committed:
            raise CommitOutcomeUnknown(self.server) from error
        self._raise_lost(error, was_active)

    def _has_committed(self) -> bool:
        """Whether a statement of the transaction may have committed a part of it."""
        return self._raw is not None and self._driver.has_committed(self._raw)

    def _raise_lost(self, error: BaseException, was_active: bool) -> NoReturn:
        raise self._driver.disconnection_error(
            f"The connection to {self.server} was lost"
            + (" inside a transaction, and nothing of it is committed" if was_active else "")
            + f". Roll back (or abort) and run the work again. The driver said: {one_line(error)}",
            (type(error), error, error.__traceback__),
        ) from error

    def _check_not_ended(self) -> None:
        if self._ended_by_error:
            raise self._driver.module.InternalError(
                f"The transaction ended on {self.server} with the error before, and what follows "
                "would not be a part of it. Roll back (or abort) before the connection is used "
                "again."
            )

    def _check_not_doomed(self) -> None:
        if self._state == DOOMED:
            self._raise_already_disconnected()

    def _raise_already_disconnected(self) -> NoReturn:
        original = DisconnectedConnectionError("Already disconnected")
        raise self._driver.disconnection_error(
            f"Already disconnected from {self.server}, and nothing of the transaction is "
            "committed. Roll back (or abort) before the connection is used again.",
            (DisconnectedConnectionError, original, None),
        )

    def _commit(self) -> None:
        """Commit, also for a transaction manager."""
        self._check_usable()
        if self._state != ACTIVE:
            return
        try:
            self._check_not_ended()
            with self._watch.awaiting(self._response_timeout):
                self._observer.commit(self._raw)
        except self._driver.module.Error as error:
            if not self._means_disconnect(error):
                if not self._driver.in_transaction(self._raw):
                    self._be_idle()
                self._mark_transient(error)
                raise
            self._settle_lost_commit(error)
        else:
            self._be_idle()
        commits.note()

    def _settle_lost_commit(self, error: BaseException) -> None:
        """Return if the transaction was committed; else raise what became of it."""
        may_have_written = self._observer.may_have_written
        evidence = self._observer.describe()
        is_witnessed = self._witness is not None and not self._has_committed()
        self._end_session(error)
        self._doom()
        if not may_have_written:
            self._raise_lost(error, was_active=True)
        outcome, problem = Outcome.UNKNOWN, error
        if is_witnessed:
            outcome, problem = self._look_up_outcome(error)
            events.announce(events.CommitLookedUp(self.server, outcome.value))
        if outcome is Outcome.UNKNOWN:
            raise CommitOutcomeUnknown(self.server, evidence=evidence) from problem
        if outcome is Outcome.ABORTED:
            self._raise_lost(error, was_active=True)
        if self._data_manager is not None:
            self._data_manager.disconnected = False
        self._be_idle()

    def _look_up_outcome(self, error: BaseException) -> tuple[Outcome, BaseException]:
        """What became of the transaction, and the error that keeps us from knowing better."""
        outcome: Outcome | None = None

        def look_up(raw: Any) -> None:
            nonlocal outcome
            if outcome is None:
                outcome = self._observer.outcome(raw)
            self._take_down_session(raw)

        try:
            self._connect(look_up)
        except Exception as problem:
            error = problem
        return outcome or Outcome.UNKNOWN, error

    def _may_run_again(self, error: BaseException) -> bool:
        """Whether a unit of work that raised ``error`` was not committed and may succeed later."""
        return isinstance(error, TransientError) or self._driver.is_transient(error)

    def _mark_transient(self, error: BaseException) -> None:
        if self._driver.is_transient(error):
            make_transient(error)

    def _means_disconnect(self, error: BaseException) -> bool:
        if self._raw is None or self._driver.meaning(error, self._raw) is Meaning.DISCONNECT:
            return True
        # A primary that became a standby is of no use to who did not ask for a read-only session.
        return self._settings.readonly is not True and bool(
            self._driver.is_refused_by_standby(error, self._raw)
        )

    # Threads

    def _in_turn(self) -> contextlib.AbstractContextManager[None]:
        """Have the connection until the transaction ends, or else for this block."""
        return _MINE if self._turn.is_mine() else self._taking_turn()

    @contextlib.contextmanager
    def _taking_turn(self) -> Iterator[None]:
        self._take_turn()
        try:
            yield
        finally:
            self._give_turn()

    def _take_turn(self) -> None:
        if self._turn.is_for_good:
            raise self._driver.module.ProgrammingError(
                "The connection belongs to another thread: use a connection for each thread; "
                "fork() makes one"
            )
        self._waited_for_turn = 0.0 if self._turn.take(0) else self._wait_for_turn()
        self._roll_back_orphan()

    def _wait_for_turn(self) -> float:
        """Take it, and return the seconds that this took."""
        started = time.monotonic()
        events.logger.debug("A thread waits for another one's transaction on %s", self.server)
        patience = PATIENCE_WITH_THREADS if self._policy.timeout is None else self._policy.timeout
        if not self._turn.take(patience):
            raise self._driver.module.OperationalError(
                f"This thread has waited {patience:.1f} seconds for its turn: another one has a "
                f"transaction on {self.server}. End transactions sooner, or use a connection for "
                "each thread; fork() makes one"
            )
        return time.monotonic() - started

    def _roll_back_orphan(self) -> None:
        """End the transaction of a thread that has not lived to do it."""
        if self._state in (ACTIVE, DOOMED):
            events.logger.warning(
                "A thread has ended inside its transaction on %s, which is rolled back",
                self.server,
            )
            self._roll_back()
            self._data_manager = None
            self._inside_with = False
            self._forget_transaction()

    def _give_turn(self) -> None:
        if self._state in (IDLE, CLOSED) and self._data_manager is None and not self._inside_with:
            self._turn.give()

    def _leave_transaction_manager(self) -> None:
        self._data_manager = None
        self._give_turn()

    # Checks

    def _check_open(self) -> None:
        if self._state == CLOSED:
            raise self._driver.module.InterfaceError("The connection is closed")
        if self._state == PREPARED:
            raise self._driver.module.ProgrammingError(
                "The connection's transaction is prepared: its transaction manager is about to "
                "commit or abort it, and the connection can be used afterwards"
            )

    def _check_usable(self) -> None:
        if self._state != ACTIVE and self._state != IDLE:
            self._check_open()
            self._check_not_doomed()

    def _check_outside_transaction(self, what: str) -> None:
        self._check_usable()
        if self._state == ACTIVE:
            raise self._driver.module.ProgrammingError(f"{what} inside a transaction")

    # Sessions

    def _begin_for_statement(self) -> None:
        try:
            self._begin()
        except (self._driver.disconnection_error, ReconnectTimeout):
            # The statement belongs to a unit of work, which without it must not be committed.
            self._doom()
            raise

    def _begin(self) -> None:
        if self._before_begin is not None:
            self._before_begin()
        started = time.monotonic()
        policy = self._patience()
        if self._raw is None or not self._begin_in_session(policy):
            policy = policy.after(time.monotonic() - started)
            self._connect(self._begin_in_new_session, policy)
        self._state = ACTIVE

    def _patience(self) -> RetryPolicy:
        """The policy for beginning a transaction now."""
        return self._policy.after(self._waited_for_turn) if self._waited_for_turn else self._policy

    def _take_down_session(self, raw: Any) -> None:
        self._observer.new_session(raw, self._settings)

    def _begin_in_new_session(self, raw: Any) -> None:
        self._take_down_session(raw)
        self._begin_raw(raw)

    def _begin_raw(self, raw: Any) -> None:
        observer = self._observer
        row = self._driver.begin(raw, self._settings, observer.rider(raw, self._settings))
        if not observer.began(row):
            # Somebody has emptied the ledger.
            self._driver.rollback(raw)
            observer.new_session(raw, self._settings)
            observer.began(
                self._driver.begin(raw, self._settings, observer.rider(raw, self._settings))
            )

    def _begin_in_session(self, policy: RetryPolicy) -> bool:
        """Whether BEGIN arrived: if the session has ended while idle, this is how it shows."""
        try:
            with self._watch.awaiting(self._limit_of_begin(policy)):
                self._begin_raw(self._raw)
        except self._driver.module.Error as error:
            if not self._means_disconnect(error):
                if self._driver.in_transaction(self._raw):
                    # BEGIN was executed, and its rider failed.
                    self._drop_session()
                raise
            self._end_session(error)
            return False
        if self._server.is_missed_by(self._raw):
            self._end_session(self._missed())
            return False
        return True

    def _limit_of_begin(self, policy: RetryPolicy) -> float:
        """The seconds that the answer to BEGIN may take."""
        # Half of the time is left for connecting again.
        limit = policy.longest_attempt((policy.timeout or 0) / 2)
        return min(limit, self._response_timeout or limit)

    def _missed(self) -> BaseException:
        error: BaseException = self._driver.module.OperationalError(
            "the server is no longer what target_session_attrs asks for"
        )
        return error

    def _need_live_session(self) -> None:
        """Have a session for a statement in autocommit mode, which has no BEGIN to find out."""
        # Only if something has arrived, such as the end of the session, is there a round trip.
        if self._raw is not None and self._driver.has_sessions and not self._watch.is_quiet():
            try:
                with self._watch.awaiting(self._limit_of_begin(self._patience())):
                    self._driver.query(self._raw, "SELECT 1")
            except self._driver.module.Error as error:
                if not self._means_disconnect(error):
                    raise
                self._end_session(error)
        self._need_session()

    def _need_session(self) -> None:
        self._check_open()
        if self._raw is None:
            with self._in_turn():
                self._check_not_doomed()
                if self._raw is None:
                    self._connect(self._take_down_session)

    def _connect(self, first_use: Callable[[Any], None], policy: RetryPolicy | None = None) -> None:
        """Open a session; ``first_use`` of the raw connection is part of an attempt."""

        def prepare(raw: Any, timeout: float) -> None:
            watch = Watch(self._driver.fileno(raw), self.server)
            try:
                with watch.awaiting(timeout):
                    if self._kept is not None:
                        self._driver.inherit(raw, self._kept)
                    if self._on_connect is not None:
                        self._on_connect(raw)
                    self._driver.restore(raw, self._settings)
                    # Until the orphan of the session before has ended, it can commit late, and
                    # holds locks.
                    self._observer.fence(raw)
                    first_use(raw)
            except BaseException:
                watch.close()
                raise
            self._watch = watch

        self._raw = open_session(self._server, policy or self._policy, prepare, self._had_session)
        self._process = os.getpid()
        self._had_session = True

    def _roll_back(self) -> None:
        if self._state == ACTIVE:
            try:
                # A session that does not answer is given up, which rolls back as well.
                with self._watch.awaiting(self._response_timeout or LONGEST_ATTEMPT):
                    self._driver.rollback(self._raw)
            except self._driver.module.Error as error:
                self._end_session(error)

    def _be_idle(self) -> None:
        self._forget_transaction()
        self._give_turn()

    def _forget_transaction(self) -> None:
        self._state = IDLE
        self._ended_by_error = False
        self._is_explicit = False

    def _doom(self) -> None:
        self._state = DOOMED
        if self._data_manager is not None:
            self._data_manager.disconnected = True

    def _end_session(self, error: BaseException) -> None:
        """The session is lost: let go of it and tell."""
        state = self._state
        self._drop_session()
        self._server.lost()
        events.announce(events.ConnectionLost(self.server, error, state))

    def _drop_session(self) -> None:
        raw, self._raw = self._raw, None
        if raw is None:
            return
        if self._state == ACTIVE:
            # Already here, because an interrupt in what follows must not leave a transaction
            # without a session.
            self._state = DOOMED
        self._kept = self._driver.keep(raw)
        self._watch.close()
        self._watch = NO_WATCH
        if self._process == os.getpid():
            self._driver.close(raw)
        else:
            self._driver.abandon(raw)

    def _leave_to_parent(self) -> None:
        """In a forked child: the session, and a transaction in it, are the parent's."""
        self._turn = self._turn.in_child()
        if self._raw is not None:
            was_active = self._state == ACTIVE
            self._drop_session()
            # What the parent's observer knows is of a session that must not be ended.
            self._observer = self._new_observer()
            if was_active:
                self._doom()

    def _new_observer(self) -> Any:
        if self._witness is None or not self._driver.has_sessions:
            return NoObserver(self._driver)
        return self._witness.observer(self._driver)


@implementer(ISavepoint)
class Savepoint:
    """A savepoint inside a transaction of a `ReconnectingConnection`."""

    def __init__(self, connection: ReconnectingConnection, name: str) -> None:
        self._connection = connection
        self._name = name
        self._execute(f"SAVEPOINT {name}")

    def rollback(self) -> None:
        self._execute(f"ROLLBACK TO SAVEPOINT {self._name}")

    def release(self) -> None:
        self._execute(f"RELEASE SAVEPOINT {self._name}")

    def _execute(self, statement: str) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(statement)


def connect(
    dsn: str,
    driver: str | None = None,
    policy: RetryPolicy = PERSIST,
    witness: Any = "xid",
    on_connect: Callable[[Any], object] | None = None,
    response_timeout: float | None = None,
    two_phase: bool = False,
) -> ReconnectingConnection:
    """A `ReconnectingConnection` to the server that ``dsn`` names.

    The server is first contacted when the first transaction begins.

    dsn: ``postgresql://user:password@host:port/dbname``, the same with ``dbi://`` or ``mysql://``,
    ``sqlite:///path``, or libpq's ``host=... dbname=...``.
    driver: the driver's name, such as "psycopg"; None takes the one for the DSN's scheme.
    policy: how long connecting is tried when a transaction begins.
    witness: how the outcome of a lost COMMIT is looked up: "xid", a `Ledger`, or None for not.
    on_connect: called with each new raw connection, outside a transaction, to set up the session.
    response_timeout: seconds after which a request without an answer counts as a disconnect; None
    waits for ever, except for beginning and rolling back.
    two_phase: take part in the current transaction of ``transaction.manager``, and commit in two
    phases, so that the transaction can have a part in several databases. The servers must allow
    prepared transactions.

    Raises TypeError or ValueError, naming the argument, for one that makes no sense; ImportError,
    which says what to install, if the driver's database module is missing.
    """
    server = server_from_dsn(dsn, driver)
    return ReconnectingConnection(
        server,
        policy=policy,
        witness=witness,
        on_connect=on_connect,
        response_timeout=response_timeout,
        two_phase=two_phase,
    )


def _flag(name: str, value: bool | str | None) -> bool | None:
    if value is None or (isinstance(value, str) and value.upper() == "DEFAULT"):
        return None
    if isinstance(value, str):
        raise ValueError(f"{name} must be a truth value, None or 'DEFAULT', not {value!r}")
    return bool(value)


# What next() returns at the end.
_END = object()
# For a thread that has the connection already.
_MINE = contextlib.nullcontext()

_connections: weakref.WeakSet[ReconnectingConnection] = weakref.WeakSet()


def _leave_sessions_to_parent() -> None:
    for connection in list(_connections):
        connection._leave_to_parent()


os.register_at_fork(after_in_child=_leave_sessions_to_parent)
