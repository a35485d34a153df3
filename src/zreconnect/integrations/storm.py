"""Storm: stores whose connections reconnect, under zstorm or alone.

`register` makes a URI scheme known to Storm. A store of that scheme has a `ReconnectingConnection`
in the place of psycopg2's connection, and keeps it: Storm's own way of dealing with a lost session,
to throw the connection away and to make another one at the next statement, is not used.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

from transaction import Transaction
from transaction.interfaces import TransientError

from zreconnect.integrations import check_scheme, needs

with needs(__name__, "zreconnect[storm]"):
    import storm.exceptions
    from storm.database import ConnectionWrapper, register_scheme
    from storm.databases.postgres import Postgres, PostgresConnection
    from storm.uri import URI

from zreconnect.connection import ReconnectingConnection
from zreconnect.drivers.psycopg2 import Psycopg2DisconnectionError
from zreconnect.exceptions import DisconnectionError
from zreconnect.interfaces import PREPARED
from zreconnect.options import Witness
from zreconnect.policy import PERSIST, RetryPolicy
from zreconnect.server import server_from_dsn
from zreconnect.states import Request
from zreconnect.twophase import TwoPhaseDataManager
from zreconnect.witness import Outcome

SCHEME = "reconnecting-postgres"
OTHER_BACKENDS = ("mysql", "sqlite")
# The one from which on Storm has INSERT return the new row's key. Storm asks each server for its
# version; those with an older one are long gone.
VERSION_WITH_RETURNING = 80200

Xid = tuple[int | None, str, str | None]


class StormDisconnectionError(Psycopg2DisconnectionError, storm.exceptions.DisconnectionError):
    """A `DisconnectionError` for code that was written against Storm or psycopg2."""


class StormTransientError(storm.exceptions.OperationalError, TransientError):
    """A serialization failure or deadlock: zstorm's data manager does not say that the same work
    may succeed when it is run again, so the error does."""


class StoreBranch(TwoPhaseDataManager):
    """The part that one store has in a two-phase commit.

    global_id: the same for all stores that take part, and for nothing else under way.
    """

    # zstorm ends each store but once.
    tells_in_abort = False

    def __init__(self, connection: StoreConnection, global_id: str) -> None:
        self._global_id = global_id
        # What has ended is no part of another transaction with its id.
        others = (
            each.transaction
            for each in _branches
            if each._global_id == global_id and each.is_present()
        )
        self.transaction: Transaction = next(others, None) or Transaction()
        super().__init__(connection, self.transaction)
        _branches.add(self)

    def tpc_finish(self, transaction: Transaction) -> None:
        """Commit what is prepared.

        Raises the driver's ProgrammingError if the branch that was prepared first, and decides, has
        not been committed; otherwise as `TwoPhaseDataManager.tpc_finish`.
        """
        is_deciding = self.branch is None or self.branch.number == 0
        if not is_deciding and self.decision.outcome is not Outcome.COMMITTED:
            raise self.work.link.driver.module.ProgrammingError(
                "The store that was prepared first is to be committed first: its commit is the "
                "decision for all"
            )
        super().tpc_finish(transaction)


# A signal's handler may begin a part, too, while its thread has the lock.
_lock = threading.RLock()
_branches: weakref.WeakSet[StoreBranch] = weakref.WeakSet()


def _forget_parents_branches() -> None:
    global _lock, _branches
    _lock, _branches = threading.RLock(), weakref.WeakSet()


os.register_at_fork(after_in_child=_forget_parents_branches)


class StoreConnection(ReconnectingConnection):
    """What a store has as its raw connection: a `ReconnectingConnection` with PEP 249's methods for
    two-phase commit, as Storm uses them.

    A prepared transaction has the name that `zreconnect.recover` knows it by, and not the one in
    the ``xid`` that it was begun with.
    """

    __slots__ = ()

    def xid(self, format_id: int | None, gtrid: str, bqual: str | None) -> Xid:
        """PEP 249's transaction id. Without a ``format_id``, ``gtrid`` is the name that the server
        knows a prepared transaction by."""
        return format_id, gtrid, bqual

    def tpc_begin(self, xid: Xid) -> None:
        """Have the next statement begin a transaction that is committed in two phases.

        Raises the driver's ProgrammingError inside a transaction and in autocommit mode.
        """
        with self.guard.in_turn():
            self.work.ask(Request.SETTINGS, "tpc_begin()")
            if self.work.member is not None:
                raise self.ProgrammingError("tpc_begin() was called already")
            if self.autocommit:
                raise self.ProgrammingError("tpc_begin() in autocommit mode")
            with _lock:
                self.work.become_part(StoreBranch(self, xid[1]))

    def tpc_prepare(self) -> None:
        """Prepare the transaction; see `TwoPhaseDataManager.tpc_vote`."""
        with self.guard.in_turn():
            branch = self._need_branch()
            branch.tpc_vote(branch.transaction)

    def tpc_commit(self, xid: Xid | None = None) -> None:
        """Commit the transaction, in one phase if it is not prepared.

        Raises what ``commit()`` raises, or for a prepared one `TwoPhaseDataManager.tpc_finish`.
        xid: one from ``tpc_recover()``, outside a transaction: commit that.
        """
        if xid is not None:
            self._end_recovered("tpc_commit", xid)
            return
        with self.guard.in_turn():
            branch = self._need_branch()
            if self.state != PREPARED:
                self.guard.commit()
            branch.tpc_finish(branch.transaction)

    def tpc_rollback(self, xid: Xid | None = None) -> None:
        """Roll back the transaction, prepared or not. Never fails because of a lost connection.

        xid: one from ``tpc_recover()``, outside a transaction: roll back that.
        """
        if xid is not None:
            self._end_recovered("tpc_rollback", xid)
            return
        with self.guard.in_turn():
            branch = self._need_branch()
            branch.abort(branch.transaction)

    def _need_branch(self) -> StoreBranch:
        branch: StoreBranch | None = self.work.member
        if branch is None:
            raise self.ProgrammingError("tpc_begin() was not called")
        return branch

    def _end_recovered(self, method: str, xid: Xid) -> None:
        with self.guard.in_turn():
            self.work.ask(Request.SETTINGS, f"{method}() of another transaction")
            self.work.need_session()
            raw = self.work.link.session.raw
            format_id, gtrid, _ = xid
            # psycopg2 takes a string for what the server knows the transaction by.
            name = gtrid if format_id is None else raw.xid(*xid)
            with self.guard.asking():
                getattr(raw, method)(name)


class ReconnectingPostgresConnection(PostgresConnection):
    """Storm's connection to PostgreSQL."""

    def is_disconnection_error(
        self, exc: BaseException, extra_disconnection_errors: Any = ()
    ) -> bool:
        """Whether Storm has to give up its raw connection: never, for that reconnects."""
        return False


class ReconnectingPostgres(Postgres):
    """Storm's database of a URI.

    uri: as for Storm's own ``postgres:``, with another scheme. policy, witness, on_connect,
    response_timeout, pooled: as for `connect`.

    Raises TypeError or ValueError, naming the argument, for one that makes no sense.
    """

    connection_factory = ReconnectingPostgresConnection
    # Private in Storm. Without it Storm's connection could not make an INSERT.
    _version = VERSION_WITH_RETURNING

    def __init__(
        self,
        uri: URI,
        policy: RetryPolicy = PERSIST,
        witness: Witness | str | None = "xid",
        on_connect: Callable[[Any], object] | None = None,
        response_timeout: float | None = None,
        pooled: bool | None = None,
    ) -> None:
        super().__init__(uri)
        # Made once to check the arguments, and never connected: each store's is a fork of it. What
        # the DSN and the isolation level are is known to Storm, by private names.
        self._model = StoreConnection(
            server_from_dsn(f"{self._dsn} client_encoding=UTF8", "psycopg2"),
            policy=policy,
            witness=witness,
            on_connect=on_connect,
            response_timeout=response_timeout,
            pooled=pooled,
        )
        self._model.set_isolation_level(self._isolation)

    def raw_connect(self) -> Any:
        """A connection for a store. The server is contacted by its first statement."""
        return ConnectionWrapper(self._model.fork(), self)

    def _wrap_exception(self, wrapper_type: type, exception: Any) -> BaseException:
        """The error of Storm's for one of psycopg2's; Storm has subclasses replace this."""
        if isinstance(exception, DisconnectionError):
            return StormDisconnectionError(str(exception), exception.getOriginalException())
        if self._model.guard.may_run_again(exception):
            wrapper_type = StormTransientError
        wrapped: BaseException = super()._wrap_exception(wrapper_type, exception)
        return wrapped


def register(
    scheme: str = SCHEME,
    policy: RetryPolicy = PERSIST,
    witness: Witness | str | None = "xid",
    on_connect: Callable[[Any], object] | None = None,
    response_timeout: float | None = None,
    pooled: bool | None = None,
) -> None:
    """Have Storm make reconnecting connections for URIs with this scheme.

    Call it before the first such URI is used. PostgreSQL is the only database that is supported.

    scheme: what stands before the colon of a URI. ``postgres`` replaces Storm's own backend, so
    that the URIs that a program has stay as they are.
    policy: how long connecting is tried when a transaction begins.
    witness: how the outcome of a lost COMMIT is looked up: "xid", a `Ledger`, or None for not.
    on_connect: called with each new raw connection, outside a transaction, to set up the session.
    response_timeout: seconds of silence after which a request counts as a disconnect; None
    waits for ever, except for beginning and rolling back.
    pooled: whether each transaction may have another server process, as behind PgBouncer with
    ``pool_mode=transaction``; None finds out whether there is a pooler, and takes it for one.

    Raises TypeError or ValueError, naming the argument, for one that makes no sense.
    """

    def create_from_uri(uri: URI) -> ReconnectingPostgres:
        return ReconnectingPostgres(uri, policy, witness, on_connect, response_timeout, pooled)

    check_scheme(scheme, OTHER_BACKENDS, "Storm")
    # Checks the other arguments.
    create_from_uri(URI("postgres:postgres"))
    register_scheme(scheme, create_from_uri)
