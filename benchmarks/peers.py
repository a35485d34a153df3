"""zreconnect and its peers, each used as its manual tells: begin, statements, commit.

A peer imports what it needs when it is made, so that a process has no other one's modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote


@dataclass(frozen=True)
class Address:
    """Where the server is. A host with a slash in it is the directory of a unix socket."""

    host: str
    port: int
    user: str
    password: str
    dbname: str

    def url(self, scheme: str = "postgresql") -> str:
        """As libpq, and zreconnect, read it. A host in percent encoding may be a directory."""
        host = quote(self.host, safe="")
        return f"{scheme}://{self.user}:{self.password}@{host}:{self.port}/{self.dbname}"

    def sqlalchemy_url(self) -> str:
        """As SQLAlchemy reads it."""
        return (
            f"postgresql+psycopg2://{self.user}:{self.password}@/{self.dbname}"
            f"?host={quote(self.host, safe='')}&port={self.port}"
        )


@dataclass(frozen=True)
class Statement:
    """SQL with ``%s`` for each of the parameters; whether it has rows to fetch."""

    sql: str
    parameters: tuple[Any, ...] = ()
    has_rows: bool = False


class Peer:
    """One way to a database, with one connection.

    An instance has been made, but need not have connected. What it is given to execute is what
    its `prepared` has returned.
    """

    def __init__(self, address: Address) -> None:
        raise NotImplementedError

    def transaction(self, statements: Sequence[Any]) -> None:
        """Begin, execute the statements, fetch their rows, commit. Raises what it raises."""
        raise NotImplementedError

    def reading(self, sql: str, is_named: bool = False) -> AbstractContextManager[Any]:
        """A cursor that has executed the SQL, in a transaction that ends with the block.

        is_named: whether the server keeps the rows until they are fetched.
        """
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def refresh(self) -> None:
        """What a program calls before each request, if its manual has anything for that."""

    def mend(self, address: Address) -> None:
        """What a program calls after an error, before it makes a transaction again."""

    def prepared(self, statements: Sequence[Statement]) -> list[Any]:
        """The statements as this peer wants them, since a program has them so."""
        return [(each.sql, each.parameters or None, each.has_rows) for each in statements]


class Dbapi(Peer):
    """What has `cursor` and `commit`: a driver, or zreconnect in its place."""

    connection: Any

    def cursor(self, *arguments: Any) -> Any:
        """A cursor, in a transaction; with a name, one that the server keeps the rows for."""
        return self.connection.cursor(*arguments)

    @contextmanager
    def reading(self, sql: str, is_named: bool = False) -> Iterator[Any]:
        cursor = self.cursor(*(["reading"] if is_named else []))
        cursor.execute(sql)
        yield cursor
        cursor.close()
        self.commit()

    def transaction(self, statements: Sequence[Any]) -> None:
        cursor = self.connection.cursor()
        _execute(cursor, statements)
        cursor.close()
        self.connection.commit()

    def commit(self) -> None:
        self.connection.commit()

    def close(self) -> None:
        self.connection.close()


def _execute(cursor: Any, statements: Sequence[Any]) -> None:
    for sql, parameters, has_rows in statements:
        cursor.execute(sql, parameters)
        if has_rows:
            cursor.fetchall()


class Psycopg2(Dbapi):
    def __init__(self, address: Address) -> None:
        import psycopg2

        self.connection = psycopg2.connect(address.url())

    def mend(self, address: Address) -> None:
        self.connection.close()
        self.__init__(address)  # type: ignore[misc]


class Psycopg(Dbapi):
    def __init__(self, address: Address) -> None:
        import psycopg

        self.connection = psycopg.connect(address.url())

    def mend(self, address: Address) -> None:
        self.connection.close()
        self.__init__(address)  # type: ignore[misc]


def _witness(name: str) -> Any:
    from zreconnect import Ledger

    return {"xid": "xid", "ledger": Ledger(), "none": None}[name]


class Connect(Dbapi):
    """zreconnect.connect"""

    def __init__(self, address: Address, driver: str, witness: str, **options: Any) -> None:
        import zreconnect

        self.connection = zreconnect.connect(
            address.url(), driver=driver, witness=_witness(witness), **options
        )

    def mend(self, address: Address) -> None:
        self.connection.rollback()


class Zopeless(Dbapi):
    """zreconnect.initZopeless"""

    def __init__(self, address: Address, witness: str, **options: Any) -> None:
        import zreconnect

        self._ztm = zreconnect.initZopeless(
            address.url(), implicitBegin=False, witness=_witness(witness), **options
        )

    def cursor(self, *arguments: Any) -> Any:
        self._ztm.begin()
        return self._ztm.connection().cursor(*arguments)

    def transaction(self, statements: Sequence[Any]) -> None:
        self._ztm.begin()
        cursor = self._ztm.cursor()
        _execute(cursor, statements)
        cursor.close()
        self._ztm.commit()

    def mend(self, address: Address) -> None:
        self._ztm.abort()

    def commit(self) -> None:
        self._ztm.commit()

    def close(self) -> None:
        self._ztm.uninstall()


class Adapter(Dbapi):
    """zreconnect.ReconnectingDatabaseAdapter"""

    def __init__(self, address: Address, witness: str, **options: Any) -> None:
        import transaction

        import zreconnect

        self._adapter = zreconnect.ReconnectingDatabaseAdapter(
            address.url(), witness=_witness(witness), **options
        )
        self.commit, self._abort = transaction.commit, transaction.abort

    def mend(self, address: Address) -> None:
        self._abort()

    def cursor(self, *arguments: Any) -> Any:
        return self._adapter().cursor(*arguments)

    def transaction(self, statements: Sequence[Any]) -> None:
        cursor = self._adapter().cursor()
        _execute(cursor, statements)
        cursor.close()
        self.commit()

    def close(self) -> None:
        self._adapter.disconnect()


class PsycopgPool(Peer):
    """psycopg_pool.ConnectionPool, of one connection."""

    def __init__(self, address: Address, is_checking: bool, **options: Any) -> None:
        from psycopg_pool import ConnectionPool

        check = ConnectionPool.check_connection if is_checking else None
        self._pool = ConnectionPool(
            address.url(), min_size=1, max_size=1, check=check, open=True, **options
        )

    def transaction(self, statements: Sequence[Any]) -> None:
        with self._pool.connection() as connection, connection.cursor() as cursor:
            _execute(cursor, statements)

    @contextmanager
    def reading(self, sql: str, is_named: bool = False) -> Iterator[Any]:
        arguments = ["reading"] if is_named else []
        with self._pool.connection() as connection, connection.cursor(*arguments) as cursor:
            cursor.execute(sql)
            yield cursor

    def close(self) -> None:
        self._pool.close()


class _OfSqlalchemy(Peer):
    def prepared(self, statements: Sequence[Statement]) -> list[Any]:
        from sqlalchemy import text

        prepared = []
        for each in statements:
            names = [f"p{number}" for number in range(len(each.parameters))]
            sql = text(each.sql % tuple(f":{name}" for name in names))
            parameters = dict(zip(names, each.parameters, strict=True)) or None
            prepared.append((sql, parameters, each.has_rows))
        return prepared


def _execute_with_sqlalchemy(connection: Any, statements: Sequence[Any]) -> None:
    for sql, parameters, has_rows in statements:
        result = connection.execute(sql, parameters)
        if has_rows:
            result.all()


def _engine(address: Address, reconnects: bool, **options: Any) -> Any:
    from sqlalchemy import create_engine

    engine = create_engine(address.sqlalchemy_url(), **options)
    if reconnects:
        from zreconnect.integrations.sqlalchemy import register

        register(engine)
    return engine


class Sqlalchemy(_OfSqlalchemy):
    """SQLAlchemy's Core."""

    def __init__(self, address: Address, reconnects: bool = False, **options: Any) -> None:
        self._engine = _engine(address, reconnects, **options)

    def transaction(self, statements: Sequence[Any]) -> None:
        with self._engine.begin() as connection:
            _execute_with_sqlalchemy(connection, statements)

    @contextmanager
    def reading(self, sql: str, is_named: bool = False) -> Iterator[Any]:
        from sqlalchemy import text

        with self._engine.begin() as connection:
            options = {"stream_results": True} if is_named else {}
            yield connection.execute(text(sql), execution_options=options)

    def close(self) -> None:
        self._engine.dispose()


class ZopeSqlalchemy(_OfSqlalchemy):
    """SQLAlchemy's session in the transactions of `transaction`."""

    def __init__(self, address: Address, reconnects: bool = False) -> None:
        import transaction
        import zope.sqlalchemy
        from sqlalchemy.orm import scoped_session, sessionmaker

        self._engine = _engine(address, reconnects)
        self._session = scoped_session(sessionmaker(self._engine))
        zope.sqlalchemy.register(self._session)
        self._mark_changed = zope.sqlalchemy.mark_changed
        self._commit, self._abort = transaction.commit, transaction.abort

    def mend(self, address: Address) -> None:
        self._abort()

    def transaction(self, statements: Sequence[Any]) -> None:
        session = self._session()
        _execute_with_sqlalchemy(session, statements)
        # It does not see by itself that SQL has written.
        if not all(has_rows for _, _, has_rows in statements):
            self._mark_changed(session)
        self._commit()

    def close(self) -> None:
        self._session.remove()
        self._engine.dispose()


class OsloDb(_OfSqlalchemy):
    def __init__(self, address: Address) -> None:
        from oslo_db.sqlalchemy import enginefacade

        self._manager = enginefacade.transaction_context()
        self._manager.configure(connection=address.sqlalchemy_url())
        self._context = enginefacade.transaction_context_provider(type("Context", (), {}))()

    def transaction(self, statements: Sequence[Any]) -> None:
        with self._manager.writer.using(self._context) as session:
            _execute_with_sqlalchemy(session, statements)

    def close(self) -> None:
        self._manager.dispose_pool()


class Storm(Peer):
    def __init__(self, address: Address, reconnects: bool = False) -> None:
        from storm.locals import Store, create_database

        scheme = "postgres"
        if reconnects:
            from zreconnect.integrations.storm import register

            register()
            scheme = "reconnecting-postgres"
        self._store = Store(create_database(address.url(scheme)))

    def mend(self, address: Address) -> None:
        self._store.rollback()

    def prepared(self, statements: Sequence[Statement]) -> list[Any]:
        return [
            (each.sql.replace("%s", "?"), each.parameters or None, each.has_rows)
            for each in statements
        ]

    def transaction(self, statements: Sequence[Any]) -> None:
        for sql, parameters, has_rows in statements:
            if has_rows:
                self._store.execute(sql, parameters).get_all()
            else:
                self._store.execute(sql, parameters, noresult=True)
        self._store.commit()

    def close(self) -> None:
        self._store.close()


class Django(Peer):
    """Django's connection, which is kept for ever; on psycopg."""

    def __init__(self, address: Address, engine: str, **options: Any) -> None:
        import django
        from django.conf import settings

        database = {
            "ENGINE": engine,
            "HOST": address.host,
            "PORT": address.port,
            "NAME": address.dbname,
            "USER": address.user,
            "PASSWORD": address.password,
            "CONN_MAX_AGE": None,
            **options,
        }
        settings.configure(DATABASES={"default": database})
        django.setup()
        from django.db import close_old_connections, connection, transaction

        self._connection, self._atomic = connection, transaction.atomic
        self._close_old = close_old_connections

    def refresh(self) -> None:
        # As Django does when a request begins.
        self._close_old()

    def transaction(self, statements: Sequence[Any]) -> None:
        with self._atomic(), self._connection.cursor() as cursor:
            _execute(cursor, statements)

    @contextmanager
    def reading(self, sql: str, is_named: bool = False) -> Iterator[Any]:
        cursors = self._connection.chunked_cursor if is_named else self._connection.cursor
        with self._atomic(), cursors() as cursor:
            cursor.execute(sql)
            yield cursor

    def close(self) -> None:
        self._connection.close()


@dataclass(frozen=True)
class Described:
    """A peer that can be made.

    name: in the results, and for ``--peers``. title: in tables. beside: the name of what it is
    compared with, apart from bare psycopg2: what a program would be without it. reconnects: whether
    it finds a lost connection before a transaction begins.
    """

    name: str
    title: str
    make: Callable[..., Peer]
    beside: str
    reconnects: bool = False

    @property
    def is_ours(self) -> bool:
        return "zreconnect" in self.title


def _ours() -> list[Described]:
    described = []
    for driver, title in [("psycopg2", "connect"), ("psycopg", "connect on psycopg")]:
        for witness in WITNESSES:
            make = partial(Connect, driver=driver, witness=witness)
            name = f"connect-{driver}-{witness}"
            described.append(Described(name, f"zreconnect {title}, {witness}", make, driver, True))
    for kind, title in [(Zopeless, "initZopeless"), (Adapter, "adapter")]:
        for witness in WITNESSES:
            make = partial(kind, witness=witness)
            name = f"{title.removeprefix('init').lower()}-{witness}"
            described.append(
                Described(name, f"zreconnect {title}, {witness}", make, "psycopg2", True)
            )
    return described


WITNESSES = ("xid", "ledger", "none")
ON_ZRECONNECT = "zreconnect.integrations.django"

PEERS = {
    described.name: described
    for described in [
        Described("psycopg2", "psycopg2", Psycopg2, "psycopg2"),
        Described("psycopg", "psycopg", Psycopg, "psycopg"),
        *_ours(),
        Described(
            "psycopg_pool", "psycopg_pool", partial(PsycopgPool, is_checking=False), "psycopg"
        ),
        Described(
            "psycopg_pool-check",
            "psycopg_pool, check",
            partial(PsycopgPool, is_checking=True),
            "psycopg",
            True,
        ),
        Described("sqlalchemy", "SQLAlchemy", Sqlalchemy, "psycopg2"),
        Described(
            "sqlalchemy-pre_ping",
            "SQLAlchemy, pre-ping",
            partial(Sqlalchemy, pool_pre_ping=True),
            "sqlalchemy",
            True,
        ),
        Described(
            "sqlalchemy-zreconnect",
            "SQLAlchemy on zreconnect",
            partial(Sqlalchemy, reconnects=True),
            "sqlalchemy",
            True,
        ),
        Described("zope.sqlalchemy", "zope.sqlalchemy", ZopeSqlalchemy, "sqlalchemy"),
        Described(
            "zope.sqlalchemy-zreconnect",
            "zope.sqlalchemy on zreconnect",
            partial(ZopeSqlalchemy, reconnects=True),
            "zope.sqlalchemy",
            True,
        ),
        Described("oslo.db", "oslo.db", OsloDb, "sqlalchemy", True),
        Described("storm", "Storm", Storm, "psycopg2"),
        Described(
            "storm-zreconnect",
            "Storm on zreconnect",
            partial(Storm, reconnects=True),
            "storm",
            True,
        ),
        Described(
            "django", "Django", partial(Django, engine="django.db.backends.postgresql"), "psycopg"
        ),
        Described(
            "django-zreconnect",
            "Django on zreconnect",
            partial(Django, engine=ON_ZRECONNECT),
            "django",
            True,
        ),
    ]
}


#: What everything is compared with.
LIMIT = "psycopg2"


def chosen(names: Sequence[str], others: Sequence[str] = tuple(PEERS)) -> list[Described]:
    """Those of ``others`` that have one of the names, and what these are compared with.

    All of ``others`` for no name. Raises ValueError for a name that nobody has.
    """
    if unknown := sorted(set(names) - set(PEERS)):
        raise ValueError(f"there is no {', '.join(unknown)}; there are {', '.join(PEERS)}")
    wanted = {LIMIT}
    for name in names or others:
        while name not in wanted:
            wanted.add(name)
            name = PEERS[name].beside
    return [PEERS[name] for name in PEERS if name in others and name in wanted]
