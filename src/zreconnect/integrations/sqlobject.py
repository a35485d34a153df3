"""SQLObject: URIs whose connections reconnect, and the connection of a class under `initZopeless`.

`register` is for programs that use SQLObject's own transactions, or none. In a batch job
``initZopeless(dsn, sqlClass=SQLBase)`` finds `ZopelessConnection` by an entry point if ``SQLBase``
is a class of SQLObject's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote, urlencode

from transaction.interfaces import ISynchronizer, TransientError

from zreconnect.connection import ReconnectingConnection
from zreconnect.documented import implements
from zreconnect.exceptions import DisconnectionError
from zreconnect.integrations import check_scheme, needs
from zreconnect.options import Options, Witness
from zreconnect.policy import PERSIST, RetryPolicy
from zreconnect.server import server_from_dsn
from zreconnect.turn import AnyThreadsTurn

with needs(__name__, "zreconnect[sqlobject]"):
    from pydispatch import dispatcher
    from sqlobject import dberrors
    from sqlobject.cache import CacheSet
    from sqlobject.dbconnection import TheURIOpener
    from sqlobject.events import RowDestroySignal, RowUpdateSignal
    from sqlobject.main import instanceName
    from sqlobject.postgres.pgconnection import PostgresConnection

if TYPE_CHECKING:
    from zreconnect.zopeless import ZopelessTransactionManager

DRIVERS = ("psycopg2", "psycopg")
SCHEME = "reconnecting-postgres"
OTHER_BACKENDS = ["firebird", "interbase", "maxdb", "mssql", "mysql", "sapdb", "sqlite", "sybase"]
# What `transaction` sets; it exports no name for it.
COMMITTED = "Committed"


class TransientOperationalError(dberrors.OperationalError, TransientError):
    """A deadlock or a serialization failure: the unit of work may run again."""


class ErrorsThatTell(PostgresConnection):
    """What SQLObject makes of the errors of statements, but for those that say what to do."""

    # The place where each of SQLObject's backends has its driver's errors turned into SQLObject's;
    # there is none without an underscore.
    def _executeRetry(self, conn: ReconnectingConnection, cursor: Any, query: str) -> Any:
        try:
            # A transaction of SQLObject's calls this with itself in the connection's place.
            return PostgresConnection._executeRetry(self, conn, cursor, query)
        except dberrors.OperationalError as error:
            original = error.__context__
            assert original is not None
            if isinstance(original, DisconnectionError):
                raise original from original.__cause__
            if conn.guard.may_run_again(original):
                raise TransientOperationalError(*error.args) from original
            raise


class PooledConnection(ReconnectingConnection):
    """What SQLObject's pool keeps."""

    __slots__ = ()

    turn_class = AnyThreadsTurn


class ReconnectingPostgres(ErrorsThatTell):
    """SQLObject's connection, whose pool has connections that reconnect; see `register`.

    options: those of its connections.

    Raises ValueError if the URI's driver is another one than psycopg2 and psycopg.
    """

    options: Options

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        if self.driver not in DRIVERS:
            raise ValueError(
                f"driver must be one of {', '.join(DRIVERS)} in a URI of SQLObject's, not "
                f"{self.driver}"
            )
        parameters = dict(self.dsn_dict)
        if "database" in parameters:
            parameters["dbname"] = parameters.pop("database")
        dsn = "postgresql://?" + urlencode(parameters, quote_via=quote)
        self._server = server_from_dsn(dsn, self.driver)

    def makeConnection(self) -> ReconnectingConnection:
        options = self.options
        connection = PooledConnection(
            self._server,
            policy=options.policy,
            witness=options.witness,
            on_connect=self._set_up,
            response_timeout=options.response_timeout,
            pooled=options.pooled,
        )
        connection.autocommit = bool(self.autoCommit)
        return connection

    def _set_up(self, raw: Any) -> None:
        """Set what the URI says of sessions, for one of them."""
        if self.schema:
            pooling = self._server.driver.pooling
            pooling.check_set_up(raw, self.options.pooled, "the schema of a URI")
            self._server.driver.query(raw, f"SET search_path TO {self.schema}")
        if self.dbEncoding:
            self._server.driver.set_client_encoding(raw, self.dbEncoding)
        if self.options.on_connect is not None:
            self.options.on_connect(raw)


def register(
    scheme: str = SCHEME,
    policy: RetryPolicy = PERSIST,
    witness: Witness | str | None = "xid",
    on_connect: Callable[[Any], object] | None = None,
    response_timeout: float | None = None,
    pooled: bool | None = None,
) -> None:
    """Have SQLObject make reconnecting connections for URIs with this scheme.

    Call it before the first such URI is used. PostgreSQL is the only database that is supported.

    scheme: what stands before the colon of a URI. ``postgres`` replaces SQLObject's own backend, so
    that the URIs that a program has stay as they are.
    policy: how long connecting is tried when a transaction begins.
    witness: how the outcome of a lost COMMIT is looked up: "xid", a `Ledger`, or None for not.
    on_connect: called with each new raw connection, outside a transaction, to set up the session.
    response_timeout: seconds of silence after which a request counts as a disconnect; None
    waits for ever, except for beginning and rolling back.
    pooled: whether each transaction may have another server process, as behind PgBouncer with
    ``pool_mode=transaction``; None finds out whether there is a pooler, and takes it for one.

    What uses such a connection raises `DisconnectionError`, `ReconnectTimeout` and
    `CommitOutcomeUnknown` as they are, and all other errors of statements as SQLObject does.

    Raises TypeError or ValueError, naming the argument, for one that makes no sense.
    """
    check_scheme(scheme, OTHER_BACKENDS, "SQLObject")

    class Registered(ReconnectingPostgres):
        options = Options(policy, witness, on_connect, response_timeout, pooled=pooled)

    # Its registerConnection() does not replace what is there.
    TheURIOpener.schemeBuilders[scheme] = lambda: Registered


class ZopelessConnection(ErrorsThatTell):
    """SQLObject's connection of a class: every thread works on its own of the manager's.

    It neither connects nor pools nor commits. The transaction is the manager's, and so are its
    errors: `DisconnectionError`, `ReconnectTimeout` and `CommitOutcomeUnknown` are not wrapped.

    Raises ValueError if the manager's driver is not one for PostgreSQL.
    """

    def __init__(self, manager: ZopelessTransactionManager) -> None:
        driver = manager.descriptor.connection().work.link.driver.name
        if driver not in DRIVERS:
            raise ValueError(
                f"sqlClass is SQLObject's, for which driver must be one of {', '.join(DRIVERS)}, "
                f"not {driver}"
            )
        self._manager = manager
        # autoCommit would have InheritableSQLObject clean up after errors by itself.
        super().__init__(driver=driver, autoCommit=False)
        self.objects = ThreadObjects(manager)

    @property
    def cache(self) -> CacheSet:
        return self.objects.cache

    @cache.setter
    def cache(self, cache: CacheSet) -> None:
        """SQLObject makes one for all threads, in which they would see each other's values."""

    @property
    def db(self) -> Any:
        return self.getConnection().info.dbname

    @db.setter
    def db(self, db: None) -> None:
        """It is the manager's."""

    def getConnection(self) -> ReconnectingConnection:
        connection = self._manager.connection()
        # What SQLObject's debug output calls it.
        self._connectionNumbers.setdefault(id(connection), len(self._connectionNumbers) + 1)
        return connection

    def releaseConnection(self, conn: ReconnectingConnection, explicit: bool = False) -> None:
        """It stays the thread's, in its transaction."""

    def uri(self) -> str:
        """The server's address, without password: for people, and to tell databases apart."""
        return self._manager.descriptor.connection().server

    oldUri = uri

    def expireAll(self) -> None:
        self.objects.expire_all()

    def transaction(self) -> NoReturn:
        raise dberrors.NotSupportedError(
            "SQLObject's own transactions are switched off under initZopeless(): use begin(), "
            "commit() and abort() of the manager that it returned, or its run(); or, without "
            "initZopeless(), a URI of zreconnect.integrations.sqlobject.register()"
        )

    def createEmptyDatabase(self) -> NoReturn:
        raise dberrors.NotSupportedError("Databases cannot be created under initZopeless()")

    def dropDatabase(self) -> NoReturn:
        raise dberrors.NotSupportedError("Databases cannot be dropped under initZopeless()")


@implements(ISynchronizer)
class ThreadObjects(threading.local):
    """The objects of the calling thread. Their values last until its next transaction.

    After a commit they can still be read, unless a transaction begins implicitly. After an abort
    they are not what is in the database.
    """

    def __init__(self, manager: ZopelessTransactionManager) -> None:
        self.cache = CacheSet()
        self._manager = manager
        self._lazily_updated: dict[int, Any] = {}
        self._destroyed: list[Any] = []
        manager.transaction_manager.registerSynch(self)

    def newTransaction(self, transaction: Any) -> None:
        self.expire_all()

    def beforeCompletion(self, transaction: Any) -> None:
        """Also called before an abort; what is to be written is written by a hook."""

    def afterCompletion(self, transaction: Any) -> None:
        committed = transaction.status == COMMITTED
        if not committed:
            self._take_back_destroyed()
        self._destroyed.clear()
        if not committed or self._manager.implicitBegin is not False:
            self.expire_all()

    def expire_all(self) -> None:
        self._lazily_updated.clear()
        self.cache.weakrefAll()
        for instance in filter(None, self.cache.getAll()):
            expire(instance)

    def update_lazily(self, instance: Any) -> None:
        """Have the update of ``instance`` that is about to be made written before COMMIT."""
        self._manager.connection().guard.need_transaction()
        if instance.sqlmeta.expired:
            # The row, when it is read later, would hide the update.
            instance.sync()
        if not self._lazily_updated:
            self._manager.transaction_manager.get().addBeforeCommitHook(self._write)
        self._lazily_updated[id(instance)] = instance

    def destroy(self, instance: Any) -> None:
        """Keep in mind that ``instance`` is about to be deleted, which may be rolled back."""
        self._destroyed.append(instance)

    def _write(self) -> None:
        while self._lazily_updated:
            first = next(iter(self._lazily_updated))
            self._lazily_updated.pop(first).syncUpdate()

    def _take_back_destroyed(self) -> None:
        for instance in self._destroyed:
            # SQLObject has nothing that takes it back.
            instance.sqlmeta._obsolete = False
            self.cache.created(instance.id, type(instance), instance)


def expire(instance: Any) -> None:
    """Forget the values of an object of SQLObject's; the next access reads them again.

    Its own ``expire()`` forgets none that were set after the one before, and lets the next
    ``get()`` make a second object for the same row.
    """
    for column in instance.sqlmeta.columnList:
        vars(instance).pop(instanceName(column.name), None)
    instance.sqlmeta.expired = True
    instance.sqlmeta.dirty = False
    # What waits for syncUpdate(): only SQLObject's expire() clears it, otherwise.
    instance._SO_createValues = {}


def _will_update(instance: Any, *arguments: Any) -> None:
    connection = instance._connection
    if instance.sqlmeta.lazyUpdate and isinstance(connection, ZopelessConnection):
        connection.objects.update_lazily(instance)


def _will_destroy(instance: Any, *arguments: Any) -> None:
    connection = instance._connection
    if isinstance(connection, ZopelessConnection):
        connection.objects.destroy(instance)


# sqlobject.events.listen() would not hear of classes that exist already.
dispatcher.connect(_will_update, signal=RowUpdateSignal)
dispatcher.connect(_will_destroy, signal=RowDestroySignal)
