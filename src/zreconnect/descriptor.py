"""A class attribute that gives each thread a connection of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import transaction

from zreconnect.connection import ReconnectingConnection
from zreconnect.datamanager import join_transactions
from zreconnect.documented import implements
from zreconnect.interfaces import IConnectionDescriptor
from zreconnect.options import Witness
from zreconnect.policy import PERSIST, RetryPolicy
from zreconnect.server import server_from_dsn


@implements(IConnectionDescriptor)
class ConnectionDescriptor:
    """See `IConnectionDescriptor`.

    dsn, driver, policy, witness, on_connect, response_timeout, pooled: as for `connect`.
    transaction_manager: whose current transaction the connections take part in.
    implicit_begin: whether a statement outside a transaction begins one; if not, it raises the
    driver's ProgrammingError.
    two_phase: commit in two phases, as for `connect`.

    Raises TypeError or ValueError, naming the argument, for one that makes no sense.
    """

    def __init__(
        self,
        dsn: str,
        driver: str | None = None,
        policy: RetryPolicy = PERSIST,
        witness: Witness | str | None = "xid",
        on_connect: Callable[[Any], object] | None = None,
        response_timeout: float | None = None,
        transaction_manager: Any = transaction.manager,
        implicit_begin: bool = True,
        two_phase: bool = False,
        pooled: bool | None = None,
    ) -> None:
        # Made once to check the arguments, and never connected: each thread's is a fork of it.
        self._model = ReconnectingConnection(
            server_from_dsn(dsn, driver),
            policy=policy,
            witness=witness,
            on_connect=on_connect,
            response_timeout=response_timeout,
            two_phase=two_phase,
            pooled=pooled,
        )
        self._transaction_manager = transaction_manager
        self._implicit_begin = implicit_begin
        self._thread_connection = threading.local()
        self._closed = False

    def __get__(self, instance: object, owner: type | None = None) -> ReconnectingConnection:
        return self.connection()

    def connection(self) -> ReconnectingConnection:
        if self._closed:
            raise self._model.InterfaceError("The connection descriptor is closed")
        held = getattr(self._thread_connection, "held", None)
        if held is None:
            held = self._thread_connection.held = HeldByThread(self._model)
            held.connection.work.implicit_begin = self._implicit_begin
            join_transactions(held.connection, self._transaction_manager)
        connection: ReconnectingConnection = held.connection
        return connection

    def close(self) -> None:
        self._closed = True
        self._thread_connection.__dict__.pop("held", None)

    def set_isolation_level(self, level: int | str | None) -> None:
        self.connection().isolation_level = level
        self._model.isolation_level = level


class HeldByThread:
    """A connection that is the calling thread's own, and is closed when the thread ends.

    The thread's storage holds the only reference; the connection itself may be part of a
    transaction that the garbage collector finds later.

    model: the connection has its settings.
    """

    def __init__(self, model: ReconnectingConnection) -> None:
        self.model = model
        self.connection: Any = model.fork()
        self.connection.work.turn.keep()

    def __del__(self) -> None:
        self.connection.close()
