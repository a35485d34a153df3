"""A database adapter for Zope and other web applications."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import transaction
from transaction.interfaces import ITransactionManager

from zreconnect.connection import ReconnectingConnection
from zreconnect.cursor import ReconnectingCursor
from zreconnect.datamanager import join_transactions
from zreconnect.descriptor import HeldByThread
from zreconnect.documented import implements
from zreconnect.exceptions import ReconnectTimeout
from zreconnect.interfaces import (
    CLOSED,
    IManageableZopeDatabaseAdapter,
    IZopeConnection,
    IZopeCursor,
)
from zreconnect.options import Witness
from zreconnect.policy import FAIL_FAST, Patience, RetryPolicy
from zreconnect.server import Server, server_from_dsn
from zreconnect.session import NO_SESSION
from zreconnect.witness import XidWitness

# Nobody waits longer for a web page.
RESPONSE_TIMEOUT = 30.0


@implements(IZopeCursor)
class ZopeCursor(ReconnectingCursor):
    """See `IZopeCursor`. Rows that are no plain tuples stay as the cursor factory makes them."""

    __slots__ = ()

    def fetchone(self) -> Any:
        return _as_list(super().fetchone())

    def fetchmany(self, size: int | None = None) -> list[Any]:
        return [_as_list(row) for row in super().fetchmany(size)]

    def fetchall(self) -> list[Any]:
        return [_as_list(row) for row in super().fetchall()]

    def __iter__(self) -> Iterator[Any]:
        return map(_as_list, super().__iter__())

    def __next__(self) -> Any:
        return _as_list(super().__next__())


class PatienceOfRequests(Patience):
    """Has the attempts at a web request share the time that it may wait.

    With a policy that does not fail fast, a publisher runs a request again only after a transaction
    that was lost, at once and in the same thread. So the time that the request has waited is the
    thread's: it counts from transaction to transaction, until one ends that was not lost, or the
    policy's timeout is used up, or nothing has happened for as long.

    When it is used up, nobody runs the request again, and what comes next is another one.

    waited: the seconds that the present request has waited, and waited_until: when.
    """

    is_shared = True

    def __init__(self, policy: RetryPolicy, server: Server) -> None:
        super().__init__(policy, server)
        self.waited = 0.0
        self.waited_until = 0.0
        self._began = 0.0

    def begins(self, waited: float) -> RetryPolicy:
        self._began = time.monotonic()
        timeout = self.policy.timeout
        if self.policy.fails_fast or timeout is None:
            return self.policy
        if self._began - self.waited_until > timeout:
            self.waited = 0.0
        return self.policy.after(self.waited)

    def has_begun(self) -> None:
        self.waited_until = time.monotonic()
        self.waited += self.waited_until - self._began

    def has_failed(self, error: BaseException) -> None:
        self.waited_until = time.monotonic()
        if isinstance(error, ReconnectTimeout):
            self.waited = 0.0

    def has_ended(self, lost: bool) -> None:
        if lost:
            self.waited_until = time.monotonic()
        else:
            self.waited = 0.0


@implements(IZopeConnection)
class ZopeConnection(ReconnectingConnection):
    """See `IZopeConnection`."""

    __slots__ = {"adapter": "The `ReconnectingDatabaseAdapter` that it belongs to."}

    patience_class = PatienceOfRequests

    adapter: ReconnectingDatabaseAdapter

    def cursor(
        self, name: str | None = None, cursor_factory: Any = None, **options: Any
    ) -> ZopeCursor:
        self._look()
        self.registerForTxn()
        return ZopeCursor(self, name, cursor_factory, options)

    def registerForTxn(self) -> None:
        assert self.work.join is not None
        self.work.join()

    def getTypeInfo(self) -> Any:
        return self.adapter


@implements(IManageableZopeDatabaseAdapter)
class ReconnectingDatabaseAdapter:
    """See `IManageableZopeDatabaseAdapter`.

    dsn, driver, on_connect: as for `connect`.
    timeout: seconds that a request waits in all for a transaction to begin, its retries included,
    and that all requests together wait for a server that is away: whoever comes when they are over
    makes one attempt. None does not wait: one attempt to connect, then `DisconnectionError`, for
    the publisher to run the request again.
    witness: as for `connect`; "xid" stands for ``XidWitness(at_commit=True)``.
    response_timeout: seconds of silence after which a statement counts as a disconnect; None
    waits for ever.
    two_phase: commit in two phases, as for `connect`.
    pooled: as for `connect`.

    It can be pickled; a copy has no connection.

    Raises TypeError or ValueError, naming the argument, for one that makes no sense.
    """

    def __init__(
        self,
        dsn: str,
        timeout: float | None = None,
        driver: str | None = None,
        witness: Witness | str | None = "xid",
        on_connect: Callable[[Any], object] | None = None,
        response_timeout: float | None = RESPONSE_TIMEOUT,
        two_phase: bool = False,
        pooled: bool | None = None,
    ) -> None:
        self._driver_name = driver
        self._policy = FAIL_FAST
        if timeout is not None:
            self._policy = RetryPolicy(timeout=timeout, since_outage=True)
        self._witness = XidWitness(at_commit=True) if witness == "xid" else witness
        self._on_connect = on_connect
        self._response_timeout = response_timeout
        self._two_phase = two_phase
        self._pooled = pooled
        self._encoding: str | None = None
        self._dsn = dsn
        self._start()

    def _start(self) -> None:
        self._thread = threading.local()
        self._model = self._new_model(self._dsn)

    def _new_model(self, dsn: str) -> ZopeConnection:
        """A connection that is never used: the threads' are forks of it."""
        model = ZopeConnection(
            server_from_dsn(dsn, self._driver_name),
            policy=self._policy,
            witness=self._witness,
            on_connect=self._on_connect,
            response_timeout=self._response_timeout,
            two_phase=self._two_phase,
            pooled=self._pooled,
        )
        model.work.link.settings.client_encoding = self._encoding
        return model

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.server}>"

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name not in ("_thread", "_model")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    # IZopeDatabaseAdapter

    @property
    def paramstyle(self) -> str:
        paramstyle: str = self._model.work.link.driver.module.paramstyle
        return paramstyle

    @property
    def threadsafety(self) -> int:
        return 1

    def __call__(self, transaction_manager: ITransactionManager | None = None) -> ZopeConnection:
        if transaction_manager is None:
            transaction_manager = transaction.manager
        connection = self._connection()
        data_manager = connection.work.member
        if data_manager is None or data_manager.transaction_manager is not transaction_manager:
            _leave_forgotten_transaction(connection)
            join_transactions(connection, transaction_manager)
        return connection

    def isConnected(self) -> bool:
        held = self._held()
        return held is not None and held.connection.work.link.session is not NO_SESSION

    def getConverter(self, type: Any) -> Callable[[Any], Any]:
        return _unchanged

    def getEncoding(self) -> str | None:
        return self._encoding

    def setEncoding(self, encoding: str) -> None:
        self._encoding = encoding
        self._model = self._new_model(self._dsn)

    # IManageableZopeDatabaseAdapter

    @property
    def server(self) -> str:
        return self._model.server

    @property
    def dsn(self) -> str:
        return self._dsn

    def getDSN(self) -> str:
        return self._dsn

    def setDSN(self, dsn: str) -> None:
        self._model = self._new_model(dsn)
        self._dsn = dsn

    def connect(self) -> None:
        _ = self._connection().raw_connection

    def disconnect(self) -> None:
        self._model = self._new_model(self._dsn)
        vars(self._thread).pop("held", None)

    def _held(self) -> HeldByThread | None:
        """What the calling thread holds, unless it is out of date."""
        held: HeldByThread | None = vars(self._thread).get("held")
        if held is None or held.connection.state == CLOSED:
            return None
        if held.model is not self._model and held.connection.work.member is None:
            return None
        return held

    def _connection(self) -> ZopeConnection:
        held = self._held()
        if held is None:
            held = self._thread.held = HeldByThread(self._model)
            held.connection.adapter = self
        connection: ZopeConnection = held.connection
        return connection


def _leave_forgotten_transaction(connection: ZopeConnection) -> None:
    """Abort the transaction that the connection is part of if its manager does not exist any more.

    Raises the driver's ProgrammingError if it does.
    """
    work = connection.work
    if work.member is None:
        return
    work.join = None
    # A manager and its transaction refer to each other.
    gc.collect()
    connection.guard.end_forgotten()
    manager = None if work.member is None else work.member.transaction_manager
    if manager is not None:
        join_transactions(connection, manager)
        raise connection.ProgrammingError(
            "The thread's connection is part of the transaction of another transaction manager: "
            "commit or abort that first"
        )


def _as_list(row: Any) -> Any:
    return list(row) if type(row) is tuple else row


def _unchanged(value: Any) -> Any:
    return value
