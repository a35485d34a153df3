"""A DB-API connection that reconnects when a transaction begins: what a program sees of it.

What is known of its transaction is in `zreconnect.work`, what becomes of errors in
`zreconnect.guard`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import transaction

from zreconnect.blocks import transaction_block
from zreconnect.cursor import ReconnectingCursor
from zreconnect.datamanager import ConnectionDataManager, join_transactions
from zreconnect.documented import implements
from zreconnect.drivercalls import DriverCalls
from zreconnect.exceptions import DBAPI_EXCEPTIONS
from zreconnect.guard import Guard
from zreconnect.interfaces import DOOMED, IReconnectingConnection
from zreconnect.link import Link
from zreconnect.options import Options, Witness
from zreconnect.overrides import end_by_class
from zreconnect.policy import PERSIST, Patience, RetryPolicy
from zreconnect.proxies import Guarded, guarded_attribute, guarded_block, no_attribute
from zreconnect.retry import check_function, check_patience, run_unit_of_work
from zreconnect.savepoint import Savepoint
from zreconnect.server import Server, server_from_dsn, server_from_factory
from zreconnect.settings import DriverAttribute
from zreconnect.states import Request, State
from zreconnect.turn import Turn
from zreconnect.twophase import TwoPhaseDataManager
from zreconnect.work import Work

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_block = contextlib.contextmanager(transaction_block)


@implements(IReconnectingConnection)
class ReconnectingConnection(DriverCalls):
    """A DB-API 2.0 connection that outlives its server sessions; see `IReconnectingConnection`.

    The server is first contacted when the first transaction begins.

    connection_factory: called without arguments, returns a new raw connection, not in autocommit
    mode. It is called in a thread of its own, so that the policy's deadline holds for it too.
    driver: the name of the driver that the raw connections belong to.
    policy: how long connecting is tried when a transaction begins.
    witness: how the outcome of a lost COMMIT is looked up: "xid", a `Ledger`, or None for not.
    on_connect: called with each new raw connection, outside a transaction, to set up the session.
    response_timeout: seconds of silence after which a request counts as a disconnect; None
    waits for ever, except for beginning and rolling back.
    two_phase: take part in the current transaction of ``transaction.manager``, and commit in two
    phases, so that the transaction can have a part in several databases. The servers must allow
    prepared transactions.
    pooled: whether each transaction may have another server process, as behind PgBouncer with
    ``pool_mode=transaction``; None finds out whether there is a pooler, and takes it for one.

    Raises TypeError or ValueError, naming the argument, for one that makes no sense.
    """

    # With slots, setting an attribute that is not kept here is an error and not ignored.
    __slots__ = ("__weakref__",)

    #: How threads share a connection of this class.
    turn_class: type[Turn] = Turn
    #: How long its transactions wait until they begin.
    patience_class: type[Patience] = Patience

    def __init__(
        self,
        connection_factory: Callable[[], Any] | Server,
        driver: str = "psycopg2",
        policy: RetryPolicy = PERSIST,
        witness: Witness | str | None = "xid",
        on_connect: Callable[[Any], object] | None = None,
        response_timeout: float | None = None,
        two_phase: bool = False,
        pooled: bool | None = None,
    ) -> None:
        server = connection_factory
        if not isinstance(server, Server):
            server = server_from_factory(server, driver)
        options = Options(policy, witness, on_connect, response_timeout, two_phase, pooled)
        options.check(server.driver, server.parameters)
        self._start(Link(server, options))
        if two_phase:
            join_transactions(self, transaction.manager)

    def _start(self, link: Link) -> None:
        patience = self.patience_class(link.options.policy, link.server)
        self.work = Work(link, self.turn_class(), patience)
        self.guard = Guard(self.work)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.server} {self.state}>"

    # State

    @property
    def state(self) -> str:
        return self.work.state.shown

    @property
    def closed(self) -> int:
        return 2 if self.broken else int(self.work.state is State.CLOSED)

    @property
    def broken(self) -> bool:
        """As in psycopg 3; but ``rollback()`` ends it, and the next session takes the place of the
        one that was lost."""
        return self.work.state.shown == DOOMED and self.work.state is not State.TORN

    @property
    def server(self) -> str:
        return self.work.link.server.address

    @property
    def data_manager_class(self) -> type[ConnectionDataManager]:
        """What joins a transaction manager's transaction for this connection."""
        return TwoPhaseDataManager if self.work.link.options.two_phase else ConnectionDataManager

    # Transactions

    def begin(self) -> None:
        try:
            if not self.work.turn.is_mine():
                self.guard.take_turn()
            if self.work.member is not None:
                self.guard.end_forgotten()
            if self.work.state is not State.IDLE:
                self.work.ask(Request.BEGIN, "begin()")
            elif self.work.link.settings.autocommit:
                self.refuse_if_begun_by_statement("begin()")
            self.guard.begin(explicit=True)
        finally:
            if self.work.state is not State.ACTIVE:
                self.work.give_turn()

    def commit(self) -> None:
        self._commit()
        _ = [*self.work.own.telling()]

    def _commit(self) -> None:
        """Commit; that the program is told is to follow, when nothing else has to be done."""
        try:
            if not self.work.turn.is_mine():
                was_idle = self.work.state is State.IDLE
                # What a thread has left that has ended is rolled back when the next has its turn.
                if self.work.turn.is_anothers() or (
                    self.guard.take_turn() and not was_idle and self.work.state is State.IDLE
                ):
                    raise self.work.link.driver.module.ProgrammingError(
                        "commit() of another thread's transaction: it belongs to that thread, and "
                        "is rolled back when that has ended"
                    )
            if self.work.member is not None:
                self.guard.end_forgotten()
            if self.work.member is not None:
                self.work.ask(Request.LOOK)
                raise self.work.link.driver.module.ProgrammingError(self.work.member.commit_refused)
            if self.work.state is State.IDLE:
                self.refuse_if_begun_by_statement("commit()")
            if hasattr(self.work.link.session.raw, "zreconnect_overridden"):
                end_by_class(self.guard, "commit", self.guard.commit)
            else:
                self.guard.commit()
        finally:
            self.work.give_turn()

    def rollback(self) -> None:
        if self.work.member is not None and self.work.turn.is_mine():
            self.guard.end_forgotten()
            self.refuse_rollback()
        if self.guard.try_turn():
            try:
                if self.is_begun_by_statement():
                    self.work.link.end()
                self.roll_back()
            finally:
                self.work.give_turn()
        else:
            self.guard.tell()

    def close(self) -> None:
        self.work.close()

    def savepoint(self) -> Savepoint:
        with self.guard.in_turn():
            if self.work.is_autocommit():
                raise self.work.link.driver.module.ProgrammingError(
                    "savepoint() outside a transaction, in autocommit mode"
                )
            savepoint = Savepoint(self)
            savepoint.set()
            return savepoint

    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> contextlib.AbstractContextManager[ReconnectingCursor]:
        return _block(self, savepoint_name, force_rollback)

    def run(
        self,
        function: Callable[..., Result],
        *args: Any,
        attempts: int = 3,
        timeout: float | None = None,
        **keywords: Any,
    ) -> Result:
        result = run_unit_of_work(
            functools.partial(function, *args, **keywords),
            guard=self.guard,
            check_idle=self._check_idle,
            begin=self.begin,
            commit=self._commit,
            abort_after=self.rollback_after,
            attempts=attempts,
            timeout=timeout,
        )
        return [result, *self.work.own.telling()][0]  # type: ignore[return-value]

    def transactional(
        self, attempts: int = 3, timeout: float | None = None
    ) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
        check_patience(attempts, timeout)

        def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
            check_function(function)

            @functools.wraps(function)
            def call(*args: Parameters.args, **keywords: Parameters.kwargs) -> Result:
                work = self.work
                if work.turn.is_mine() and work.is_explicit and work.state is not State.IDLE:
                    return function(*args, **keywords)
                # The function may have arguments of its own that are named so.
                return self.run(
                    functools.partial(function, *args, **keywords),
                    attempts=attempts,
                    timeout=timeout,
                )

            return call

        return decorate

    def __enter__(self) -> ReconnectingConnection:
        """As in psycopg2: commit at the end, or roll back on an error; do not close."""
        work = self.work
        try:
            if not work.turn.is_mine():
                self.guard.take_turn()
            work.ask(Request.LOOK)
            if work.link.settings.autocommit:
                self.refuse_if_begun_by_statement("A with block")
            if work.block:
                raise work.link.driver.module.ProgrammingError(
                    "The connection is already inside a with block"
                )
        except BaseException:
            work.give_turn()
            raise
        work.block_began_after = work.number
        # In one step with the return, because __exit__() is called only after that.
        block: dict[str, ReconnectingConnection] = work.block
        return block.setdefault("with", self)

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error_type is GeneratorExit and self._is_late():
            return
        try:
            if error is None:
                self._commit()
        except BaseException as problem:
            error = problem
            raise
        finally:
            self.work.block.clear()
            if error is not None:
                self.rollback_after(error)
            self.work.give_turn()
        _ = [*self.work.own.telling()]

    def _is_late(self) -> bool:
        """Whether a ``with`` block that was left suspended, in a generator, has ended before."""
        work = self.work
        if work.block and (work.state is State.IDLE or work.number <= work.block_began_after + 1):
            return False
        # Its thread has ended; or the transaction, which goes on, may have begun since.
        work.block.clear()
        return True

    def fork(self) -> ReconnectingConnection:
        forked = type(self).__new__(type(self))
        forked._start(self.work.link.fork())
        if self.work.link.options.two_phase:
            join_transactions(forked, transaction.manager)
        return forked

    def rollback_after(self, error: BaseException) -> None:
        """Roll back because of ``error``, which the caller then raises, as a framework does.

        An interrupt is not hidden by what the rollback finds out of an interrupted COMMIT: that is
        logged. `CommitOutcomeUnknown` is raised where ``error`` would have the work run again.
        """
        if self.work.state is State.CLOSED:
            return
        has_turn = self.guard.try_turn()
        try:
            self.guard.roll_back_after(error, self.roll_back if has_turn else self.guard.tell)
        finally:
            self.work.give_turn()

    def _check_idle(self) -> None:
        """Raise what refuses ``begin()`` inside a transaction, which is not to be rolled back."""
        if self.work.turn.is_mine():
            self.guard.end_forgotten()
            self.work.ask(Request.BEGIN, "begin()")
        if self.work.link.settings.autocommit:
            self.refuse_if_begun_by_statement("begin()")

    # Cursors

    def cursor(
        self, name: str | None = None, cursor_factory: Any = None, **options: Any
    ) -> ReconnectingCursor:
        work, state = self.work, self.work.state
        if (state is not State.IDLE and state is not State.ACTIVE) or (
            work.turn.is_for_good and not work.turn.is_mine()
        ):
            self._look()
        return ReconnectingCursor(self, name, cursor_factory, options)

    def _look(self) -> None:
        """Raise what refuses a cursor, which asks the server nothing yet."""
        work = self.work
        if work.turn.is_mine():
            self.guard.end_forgotten()
            work.ask(Request.LOOK)
        elif work.turn.is_for_good or not work.turn.is_anothers():
            self.guard.take_turn()
            work.give_turn()
            work.ask(Request.LOOK)
        # What another thread's transaction has come to does not matter to this one.

    def execute(self, query: Any, params: Any = None, **options: Any) -> ReconnectingCursor:
        """As in psycopg 3 and sqlite3: a new cursor, which has executed the statement."""
        cursor = self.cursor()
        cursor.execute(query, params, **options)
        return cursor

    def executemany(self, query: Any, params: Any) -> ReconnectingCursor:
        """As in sqlite3: a new cursor, which has executed the statement for all parameters."""
        cursor = self.cursor()
        cursor.executemany(query, params)
        return cursor

    @contextlib.contextmanager
    def pipeline(self) -> Iterator[Any]:
        """As in psycopg 3. Its first statement begins a transaction, if there is none.

        Raises the driver's ProgrammingError in autocommit mode outside a transaction.
        """
        with self.guard.in_turn():
            if self.work.is_autocommit():
                raise self.work.link.driver.module.ProgrammingError(
                    "pipeline() in autocommit mode: begin() a transaction first"
                )
            is_idle = self.work.state is State.IDLE
            (self.guard.need_live_session if is_idle else self.guard.need_transaction)()
        with guarded_block(self.guard, self.work.link.session.raw.pipeline()) as pipeline:
            yield Guarded(self.guard, pipeline, in_block=True)

    # Everything else that the driver's connection has

    row_factory = DriverAttribute()
    server_cursor_factory = DriverAttribute()
    prepare_threshold = DriverAttribute()
    prepared_max = DriverAttribute()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("work", "guard"):
            raise no_attribute(self, name)
        if name in DBAPI_EXCEPTIONS:
            return getattr(self.work.link.driver.module, name)
        return guarded_attribute(self.guard, self.raw_in_session(), name, self)


def connect(
    dsn: str,
    driver: str | None = None,
    policy: RetryPolicy = PERSIST,
    witness: Witness | str | None = "xid",
    on_connect: Callable[[Any], object] | None = None,
    response_timeout: float | None = None,
    two_phase: bool = False,
    pooled: bool | None = None,
) -> ReconnectingConnection:
    """A `ReconnectingConnection` to the server that ``dsn`` names.

    The server is first contacted when the first transaction begins.

    dsn: ``postgresql://user:password@host:port/dbname``, the same with ``dbi://`` or ``mysql://``,
    ``sqlite:///path``, libpq's ``host=... dbname=...``, or a URL of SQLAlchemy's, which names the
    driver: ``postgresql+psycopg://...``.
    driver: the driver's name, such as "psycopg"; None takes the one for the DSN's scheme.
    policy: how long connecting is tried when a transaction begins.
    witness: how the outcome of a lost COMMIT is looked up: "xid", a `Ledger`, or None for not.
    on_connect: called with each new raw connection, outside a transaction, to set up the session.
    response_timeout: seconds of silence after which a request counts as a disconnect; None
    waits for ever, except for beginning and rolling back.
    two_phase: take part in the current transaction of ``transaction.manager``, and commit in two
    phases, so that the transaction can have a part in several databases. The servers must allow
    prepared transactions.
    pooled: whether each transaction may have another server process, as behind PgBouncer with
    ``pool_mode=transaction``; None finds out whether there is a pooler, and takes it for one.

    Raises TypeError or ValueError, naming the argument, for one that makes no sense; ImportError,
    which says what to install, if the driver's database module is missing.
    """
    return ReconnectingConnection(
        server_from_dsn(dsn, driver),
        policy=policy,
        witness=witness,
        on_connect=on_connect,
        response_timeout=response_timeout,
        two_phase=two_phase,
        pooled=pooled,
    )
