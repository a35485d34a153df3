"""SQLAlchemy 2: an engine whose connections reconnect when a transaction begins.

What the engine's pool keeps, for each of its connections, is a `ReconnectingConnection`. A new one
opens its first session at once, within the policy, and lends the raw connection to the pool, which
sets it up as ever: with the dialect's type adapters, the engine's isolation level, and all
listeners to "connect". Many of these accept nothing but the driver's own connection. Afterwards the
pool gets the reconnecting one in its place, and the same listeners are called for each later raw
connection, too.

Only the second part of that is repeated within the policy. A session that is lost while the pool
sets it up is a `DisconnectionError` under any policy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

from zreconnect import hosts
from zreconnect.connection import ReconnectingConnection
from zreconnect.drivers.base import load_driver
from zreconnect.drivers.conninfo import connect_keywords, known
from zreconnect.drivers.postgresql import CONNECTION_OK
from zreconnect.exceptions import (
    CommitOutcomeUnknown,
    DisconnectionError,
    ReconnectTimeout,
    one_line,
)
from zreconnect.integrations import needs
from zreconnect.interfaces import Meaning
from zreconnect.ledger import Ledger
from zreconnect.options import Witness
from zreconnect.policy import PERSIST, RetryPolicy
from zreconnect.server import Server
from zreconnect.turn import AnyThreadsTurn

with needs(__name__, "zreconnect[sqlalchemy]"):
    from sqlalchemy import event
    from sqlalchemy.engine import Engine
    from sqlalchemy.exc import InvalidRequestError

#: SQLAlchemy's names of the drivers that it works with; zreconnect has the same ones.
DRIVERS = ("psycopg2", "psycopg")
# In the ``info`` of a connection that the pool is setting up.
KEY = "zreconnect"
# The driver judges by the error alone: of what the pool could not set up it has closed the raw
# connection.
_RAW_OF_UNKNOWN_STATE = SimpleNamespace(closed=False, info=SimpleNamespace(status=CONNECTION_OK))
_registered: weakref.WeakSet[Any] = weakref.WeakSet()
# alembic's: called with a name, its kind, and those of what it is in.
IncludeName = Callable[[str | None, str, Any], bool]


def register(
    engine: Engine,
    policy: RetryPolicy = PERSIST,
    witness: Witness | str | None = "xid",
    response_timeout: float | None = None,
    pooled: bool | None = None,
) -> None:
    """Make the connections of ``engine`` reconnect. To be called before it connects.

    engine: from ``create_engine()``, for PostgreSQL with psycopg2 or psycopg. It connects as it
    would without this, listeners to "do_connect" and "connect" included; the latter are called for
    each new session.
    policy: how long connecting is tried when the pool gets a new connection, and when a transaction
    begins.
    witness: how the outcome of a lost COMMIT is looked up: "xid", a `Ledger`, or None for not.
    response_timeout: seconds of silence after which a request counts as a disconnect; None
    waits for ever, except for beginning and rolling back.
    pooled: whether each transaction may have another server process, as behind PgBouncer with
    ``pool_mode=transaction``; None finds out whether there is a pooler, and takes it for one.

    What uses the engine then raises `DisconnectionError`, `ReconnectTimeout` and
    `CommitOutcomeUnknown` as they are, not wrapped in an error of SQLAlchemy's.

    Raises TypeError or ValueError, naming the argument, for one that makes no sense: an engine with
    another driver, with ``pool_pre_ping``, or one that was registered before.
    """
    _check_engine(engine)
    registration = _Registration(engine, policy, witness, response_timeout, pooled)
    _listen_first(engine, "do_connect", registration.connect)
    event.listen(engine, "checkout", registration.check_out, insert=True)
    event.listen(engine, "handle_error", registration.handle_error)
    _registered.add(engine.dialect)


def without_ledger(
    ledger: Ledger | None = None, include_name: IncludeName | None = None
) -> IncludeName:
    """For alembic: have autogenerate leave the table of the ledger alone. In ``env.py``::

        context.configure(connection=connection, ..., include_name=without_ledger())

    ledger: the `Ledger` that is the engine's witness; None for ``Ledger()``.
    include_name: what has been there before, and is asked for all other names.
    """
    schema, _, table = (ledger or Ledger()).table.lower().rpartition(".")

    def includes(name: str | None, kind: str, parents: Any) -> bool:
        if kind == "table" and name == table:
            # It has no name if it is the default one.
            found = parents.get("schema_name") or "public"
            if schema in ("", found):
                return False
        return include_name is None or include_name(name, kind, parents)

    return includes


def _check_engine(engine: Any) -> None:
    if not isinstance(engine, Engine):
        raise TypeError(f"engine must be a sqlalchemy.Engine, not {engine!r}")
    dialect = engine.dialect
    if dialect.name != "postgresql" or dialect.driver not in DRIVERS or dialect.is_async:
        kind = "asynchronous " if dialect.is_async else ""
        raise ValueError(
            f"engine must use PostgreSQL with one of the drivers {', '.join(DRIVERS)}, not "
            f"{kind}{dialect.name}+{dialect.driver}"
        )
    if dialect in _registered:
        raise ValueError("engine is registered already")
    # There is no public way to ask.
    if getattr(engine.pool, "_pre_ping", False):
        raise ValueError(
            "engine has pool_pre_ping, which is to be left out: BEGIN finds out whether the "
            "session has ended"
        )


def _listen_first(engine: Engine, name: str, listener: Any) -> None:
    """Have ``listener`` called before those that are there; ``insert`` is ignored for "do_connect".

    SQLAlchemy goes on to the next one only if it returns nothing.
    """
    present = getattr(engine.dialect.dispatch, name)
    others = [other for other in present if event.contains(engine, name, other)]
    for other in others:
        event.remove(engine, name, other)
    for each in (listener, *others):
        event.listen(engine, name, each)


class PooledConnection(ReconnectingConnection):
    """What the pool keeps."""

    __slots__ = ()

    turn_class = AnyThreadsTurn

    def commit(self) -> None:
        try:
            super().commit()
        except BaseException as error:
            # SQLAlchemy sends no ROLLBACK after a COMMIT that has failed. It does not use the
            # connection any more, either, until it is told to roll back.
            self.rollback_after(error)
            raise

    def tpc_begin(self, xid: Any) -> NoReturn:
        # A listener to "begin_twophase" would have SQLAlchemy call some 50 functions more for each
        # transaction.
        raise InvalidRequestError(
            "An engine that zreconnect is registered for has no two-phase transactions: do without "
            "twophase=True. zope.sqlalchemy's data manager then commits last, when all others have "
            "voted."
        )

    def set_isolation_level(self, level: int | str | None) -> None:
        # As psycopg2's does. SQLAlchemy has no transaction when it calls this, but may have asked
        # for the level before.
        self.rollback()
        super().set_isolation_level(level)


class _Registration:
    """What listens to the events of one engine."""

    def __init__(
        self,
        engine: Engine,
        policy: RetryPolicy,
        witness: Any,
        response_timeout: float | None,
        pooled: bool | None,
    ) -> None:
        self._engine = engine
        self._driver = load_driver(engine.driver)
        self._parameters: dict[str, str] = {}
        # What listeners to "do_connect" have noted with a raw connection.
        self._noted: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
        # The raw connections that the pool was given to set up.
        self._lent: weakref.WeakSet[Any] = weakref.WeakSet()
        # The places that were silent the last time.
        self._silent: set[int] = set()
        # One for all connections, which knock at its door one at a time.
        self._server = Server(self._driver, self._open, self._parameters)
        self._options: dict[str, Any] = {
            "policy": policy,
            "witness": witness,
            "response_timeout": response_timeout,
            "pooled": pooled,
        }
        # Checks them.
        PooledConnection(self._server, **self._options)

    # Listeners

    def connect(self, dialect: Any, record: Any, cargs: list[Any], cparams: dict[str, Any]) -> Any:
        """The raw connection of a new `ReconnectingConnection`, for the pool to set up."""
        self._arguments = list(cargs), dict(cparams)
        self._parameters.update(known(cparams))
        set_up = _SessionSetUp(self._engine, self._driver, record, self._noted)
        connection = PooledConnection(self._server, on_connect=set_up, **self._options)
        raw = connection.raw_connection
        record.info[KEY] = connection, set_up
        # As the driver makes it.
        raw.autocommit = False
        self._lent.add(raw)
        return raw

    def check_out(self, dbapi_connection: Any, record: Any, pooled: Any) -> None:
        """Put the reconnecting connection into the place of one that the pool has set up."""
        if KEY in record.info:
            connection, set_up = record.info.pop(KEY)
            autocommit = set_up.finish(dbapi_connection)
            connection.set_session(autocommit=autocommit)
            record.dbapi_connection = pooled.dbapi_connection = connection
        elif not isinstance(dbapi_connection, PooledConnection):
            raise InvalidRequestError(
                "The engine got a connection past zreconnect: call register() before the engine "
                "connects, and use a listener to 'do_connect' instead of create_engine(creator=...)"
            )

    def handle_error(self, context: Any) -> BaseException | None:
        """Let our errors pass, and have SQLAlchemy keep the connection, which will reconnect."""
        error = context.original_exception
        if isinstance(error, (CommitOutcomeUnknown, DisconnectionError, ReconnectTimeout)):
            context.is_disconnect = context.invalidate_pool_on_disconnect = False
        if isinstance(error, DisconnectionError):
            # A new one, because SQLAlchemy raises it from `error`.
            original = error.getOriginalException()
            lost: BaseException = type(error)(str(error), original)
            return lost
        if self._is_lost(error) and self._is_being_set_up(context.connection):
            # No ROLLBACK is sent, and no other connection of the pool is thrown away.
            context.is_disconnect, context.invalidate_pool_on_disconnect = True, False
            return self._lost_in_set_up(error)
        return None

    def _is_being_set_up(self, connection: Any) -> bool:
        """Whether ``connection`` has not got one of ours yet, so that there is no transaction.

        The dialect asks the server for its version, and more, by a connection of its own around the
        first raw one. What was connected before `register` has a raw one, too, and may be in a
        transaction.
        """
        if connection is None or connection.invalidated:
            return True
        return not connection.closed and connection.connection.dbapi_connection in self._lent

    def _is_lost(self, error: BaseException) -> bool:
        return (
            isinstance(error, self._driver.module.Error)
            and self._driver.meaning(error, _RAW_OF_UNKNOWN_STATE) is Meaning.DISCONNECT
        )

    def _lost_in_set_up(self, error: BaseException) -> BaseException:
        lost: BaseException = self._driver.disconnection_error(
            f"The connection to {self._server.address} was lost before there was a transaction. "
            f"Run the work again. The driver said: {one_line(error)}",
            (type(error), error, error.__traceback__),
        )
        return lost

    # Connecting

    def _open(self, timeout: float, pauses: hosts.Pauses) -> Any:
        """A raw connection, as ``create_engine()`` makes it."""
        dialect: Any = self._engine.dialect
        cargs, cparams = self._arguments
        cargs, cparams = list(cargs), dict(cparams)
        # Whose connection it will be is not known yet.
        record = SimpleNamespace(info={}, record_info={}, dbapi_connection=None)
        for listener in dialect.dispatch.do_connect:
            if listener != self.connect:
                raw = listener(dialect, record, cargs, cparams)
                if raw is not None:
                    # What it has set is to last.
                    raw.commit()
                    break
        else:

            def open_session(place: Any, timeout: float) -> Any:
                return dialect.connect(*cargs, **connect_keywords(place, timeout))

            raw = hosts.connect(
                *(self._driver, cparams, timeout, open_session), pauses=pauses, silent=self._silent
            )
        self._noted[raw] = record.info
        return raw


class _SessionSetUp:
    """Sets up the later sessions of a pool's connection as the pool does with the first one."""

    def __init__(self, engine: Engine, driver: Any, record: Any, noted: Any) -> None:
        self._engine = engine
        self._driver = driver
        self._record = record
        self._noted = noted
        self._is_first = True

    def __call__(self, raw: Any) -> None:
        self._record.info.update(self._noted.pop(raw, {}))
        if self._is_first:
            return
        raw.autocommit = False
        self._engine.pool.dispatch.connect(raw, self._record)
        self.finish(raw)

    def finish(self, raw: Any) -> bool:
        """End what the listeners have begun; whether they have left it in autocommit mode."""
        self._is_first = False
        if self._driver.in_transaction(raw):
            # What they have set is to last.
            raw.commit()
        return bool(raw.autocommit)
