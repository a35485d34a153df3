"""SQLAlchemy, alone and with zope.sqlalchemy: an engine that `register` was called for."""

import gc
import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import unittest
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from unittest import mock

import psycopg
import sqlalchemy
import transaction
import zope.sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from pyramid.config import Configurator
from pyramid.request import Request
from pyramid.response import Response
from sqlalchemy import event, pool, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session
from sqlalchemy.orm import sessionmaker as make_sessions

from zreconnect import (
    FAIL_FAST,
    CommitOutcomeUnknown,
    DisconnectionError,
    Ledger,
    ReconnectTimeout,
    RetryPolicy,
)
from zreconnect.events import CommitLookedUp
from zreconnect.integrations.sqlalchemy import register, without_ledger
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests.base import PATIENCE, DatabaseTestCase, wait_until, with_time_to_connect
from zreconnect.tests.restarts import ATTEMPTS, SurvivesRestarts

# With prepared transactions for test_retry.
SETTINGS = {"fsync": "off", "max_prepared_transactions": 5}
LAYER = PortForwardLayer(PostgresLayer("SqlalchemyServerLayer", SETTINGS), "SqlalchemyLayer")
QUICK = RetryPolicy(timeout=PATIENCE, initial=0.01, maximum=0.05)
SHORT = RetryPolicy(timeout=0.2, initial=0.01, maximum=0.05)
LEVEL = text("SHOW transaction_isolation")
ONE = text("SELECT 1")
XID = text("SELECT pg_current_xact_id()")
BACKEND = text("SELECT pg_backend_pid()")


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    name: Mapped[str] = mapped_column(primary_key=True)


class Typed(Base):
    """Whose types need something done to each raw connection."""

    __tablename__ = "typed"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    data = mapped_column(postgresql.JSONB)
    tags = mapped_column(postgresql.HSTORE)


class SqlalchemyTestCase(DatabaseTestCase):
    layer = LAYER

    def url(self):
        url = sqlalchemy.make_url(self.dsn)
        return url.set(drivername=f"postgresql+{self.driver}")

    def plain_engine(self, **options):
        engine = sqlalchemy.create_engine(self.url(), **options)
        self.addCleanup(engine.dispose)
        return engine

    def engine(self, policy=QUICK, witness="xid", response_timeout=None, **options):
        engine = self.plain_engine(**options)
        register(engine, policy, witness, response_timeout)
        return engine

    def zope_sessions(self, engine, **options):
        sessions = scoped_session(make_sessions(engine))
        zope.sqlalchemy.register(sessions, **options)
        self.addCleanup(sessions.remove)
        return sessions

    def scalar(self, engine, statement=ONE, **options):
        with engine.connect().execution_options(**options) as connection:
            return connection.scalar(statement)

    def add(self, engine, name):
        with Session(engine) as session, session.begin():
            session.add(Item(name=name))

    def lose(self, *sent):
        """Lose the line when the next bytes are sent in this direction."""
        self.forward.cut(*sent, 0)

    @contextmanager
    def raises(self, error_type):
        """Not even wrapped: that is what loops that run work again look at."""
        with self.assertRaises(error_type) as raised:
            yield raised
        self.assertNotIsInstance(raised.exception, sqlalchemy.exc.SQLAlchemyError)


@with_time_to_connect
class Psycopg2Tests(SqlalchemyTestCase):
    # Of a transaction of one statement, BEGIN and COMMIT included.
    round_trips_of_one_statement = 2

    # Between transactions

    def test_reconnects_when_a_transaction_begins(self):
        self.make_table()
        engine = self.engine()
        self.add(engine, "before")
        self.server.restart()
        with self.events() as seen:
            self.add(engine, "after")
        self.assertEqual(self.names(), ["after", "before"])
        names = [type(each).__name__ for each in seen]
        self.assertEqual(names, ["ConnectionLost", "Reconnected"])

    def test_no_connection_of_the_pool_is_dead(self):
        engine = self.engine(pool_size=3)
        connections = [engine.connect() for _ in range(3)]
        for connection in connections:
            connection.scalar(ONE)
        for connection in connections:
            connection.close()
        kept = self.pooled(engine)
        self.forward.drop()
        connections = [engine.connect() for _ in range(3)]
        self.assertEqual([connection.scalar(ONE) for connection in connections], [1, 1, 1])
        for connection in connections:
            connection.close()
        self.assertEqual(self.pooled(engine), kept)

    def pooled(self, engine):
        """The connections that are checked out next."""
        connections = [engine.raw_connection() for _ in range(engine.pool.checkedin())]
        try:
            return {id(connection.dbapi_connection) for connection in connections}
        finally:
            for connection in connections:
                connection.close()

    def test_no_round_trip_more_than_without(self):
        counts = []
        for engine in (self.engine(), self.engine(witness=Ledger()), self.plain_engine()):
            self.scalar(engine)
            counts.append(self.round_trips(lambda engine=engine: self.scalar(engine)))
        self.assertEqual(counts, [self.round_trips_of_one_statement] * 2 + [3])

    def test_waits_for_the_server(self):
        """A new connection of the pool does, and one that it has."""
        old, new = self.engine(), self.engine()
        self.scalar(old)
        self.server.stop_immediately()
        with ThreadPoolExecutor() as executor, self.events() as seen:
            answers = [executor.submit(self.scalar, engine) for engine in (old, new)]
            wait_until(lambda: len(seen) > 4)
            self.server.start()
            self.assertEqual([answer.result(PATIENCE) for answer in answers], [1, 1])

    def test_timeout(self):
        for warm in (True, False):
            engine = self.engine(SHORT)
            if warm:
                self.scalar(engine)
            self.forward.refuse()
            self.forward.drop()
            for _ in range(2):
                with self.raises(ReconnectTimeout):
                    self.scalar(engine)
            self.forward.accept()
            self.assertEqual(self.scalar(engine), 1)

    def test_fail_fast(self):
        for warm in (True, False):
            engine = self.engine(FAIL_FAST)
            if warm:
                self.scalar(engine)
            self.forward.refuse()
            self.forward.drop()
            for _ in range(2):
                with self.raises(DisconnectionError):
                    self.scalar(engine)
            self.forward.accept()
            self.assertEqual(self.scalar(engine), 1)

    def test_refused_for_good(self):
        engine = sqlalchemy.create_engine(self.url().set(password="wrong"))
        register(engine)
        with self.assertRaisesRegex(sqlalchemy.exc.OperationalError, "authentication failed"):
            engine.connect()

    def test_a_silent_host_keeps_no_other_from_being_tried(self):
        seconds = mock.patch.object(type(FAIL_FAST), "longest_attempt", return_value=3.0)
        with socket.create_server(("127.0.0.1", 0)) as silent, seconds:
            hosts = (
                f"127.0.0.1:{silent.getsockname()[1]}",
                f"127.0.0.1:{self.server.port}",
            )
            url = self.url().set(host=None, port=None).update_query_dict({"host": hosts})
            engine = sqlalchemy.create_engine(url)
            self.addCleanup(engine.dispose)
            register(engine, FAIL_FAST)
            self.assertEqual(self.scalar(engine), 1)

    def test_its_address_is_known_before_it_is_reached(self):
        engine = self.engine(SHORT)
        self.forward.refuse()
        with self.assertRaises(ReconnectTimeout) as raised:
            engine.connect()
        address = f"postgresql://postgres@127.0.0.1:{self.forward.port}/postgres"
        self.assertEqual(raised.exception.server, address)

    # Inside a transaction

    def test_a_lost_connection_is_our_error(self):
        engine = self.engine()
        with self.raises(DisconnectionError) as raised, engine.begin() as connection:
            connection.execute(ONE)
            self.forward.drop()
            connection.execute(ONE)
        error = raised.exception
        self.assertIsInstance(error, self.module.OperationalError)
        original = error.getOriginalException()[1]
        self.assertIsInstance(original, self.module.OperationalError)
        self.assertNotIsInstance(original, DisconnectionError)
        # The chain of causes ends, which is to say, with the driver's error.
        self.assertIs(error.__cause__.__cause__, original)
        self.assertIsNone(original.__cause__)

    def test_doomed_until_rollback(self):
        self.make_table()
        engine = self.engine()
        with engine.connect() as connection:
            connection.execute(ONE)
            held = connection.connection.dbapi_connection
            self.forward.drop()
            for _ in range(2):
                with self.raises(DisconnectionError):
                    connection.execute(ONE)
            self.assertEqual(held.state, "doomed")
            with self.raises(DisconnectionError):
                connection.commit()
            connection.rollback()
            connection.execute(sqlalchemy.insert(Item).values(name="again"))
            connection.commit()
            self.assertIs(connection.connection.dbapi_connection, held)
        self.assertEqual(self.names(), ["again"])

    def test_session_is_doomed_until_rollback(self):
        self.make_table()
        with Session(self.engine()) as session:
            session.execute(ONE)
            self.forward.drop()
            for _ in range(2):
                with self.raises(DisconnectionError):
                    session.execute(ONE)
            with self.raises(DisconnectionError):
                session.commit()
            session.rollback()
            session.add(Item(name="again"))
            session.commit()
        self.assertEqual(self.names(), ["again"])

    def test_lost_in_flush(self):
        self.make_table()
        with Session(self.engine()) as session:
            session.execute(ONE)
            session.add(Item(name="one"))
            self.forward.drop()
            with self.raises(DisconnectionError):
                session.flush()
            with self.assertRaises(sqlalchemy.exc.PendingRollbackError):
                session.commit()
            session.rollback()
            session.add(Item(name="two"))
            session.commit()
        self.assertEqual(self.names(), ["two"])

    def test_lost_in_nested_transaction(self):
        self.make_table()
        engine = self.engine()
        with self.raises(DisconnectionError), Session(engine) as session, session.begin():
            session.add(Item(name="outer"))
            session.flush()
            with session.begin_nested():
                session.add(Item(name="inner"))
                self.forward.drop()
        self.add(engine, "again")
        self.assertEqual(self.names(), ["again"])

    def test_nested_transaction(self):
        self.make_table()
        with Session(self.engine()) as session, session.begin():
            session.add(Item(name="outer"))
            with suppress(ZeroDivisionError), session.begin_nested():
                session.add(Item(name="inner"))
                session.flush()
                1 / 0  # noqa: B018
            with session.begin_nested():
                session.add(Item(name="kept"))
        self.assertEqual(self.names(), ["kept", "outer"])

    def test_other_errors_are_sqlalchemys(self):
        self.make_table()
        engine = self.engine()
        self.add(engine, "one")
        with self.assertRaises(sqlalchemy.exc.IntegrityError):
            self.add(engine, "one")
        with self.assertRaises(sqlalchemy.exc.ProgrammingError):
            self.scalar(engine, text("SELECT nonsense"))
        self.add(engine, "two")
        # That of a query before may still be ending.
        wait_until(lambda: len(self.sessions()) == 1)

    def test_the_orphan_is_fenced(self):
        """Its lock would make the next transaction wait."""
        self.make_table()
        engine = self.engine()
        self.add(engine, "one")
        with engine.connect() as connection:
            connection.execute(sqlalchemy.delete(Item))
            held = connection.connection.dbapi_connection.driver_connection
            # The server does not notice.
            self.forward.silence("to_server")
            held.close() if self.driver == "psycopg2" else held.pgconn.finish()
            with self.raises(DisconnectionError):
                connection.execute(ONE)
            connection.rollback()
            self.forward.resume()
            connection.execute(sqlalchemy.delete(Item))
            connection.commit()
        self.assertEqual(self.names(), [])

    def test_server_side_cursor(self):
        engine = self.engine()
        numbers = text("SELECT generate_series(1, 100)")
        for _ in range(2):
            with engine.connect().execution_options(yield_per=10) as connection:
                self.assertEqual(sum(connection.scalars(numbers)), 5050)
            self.forward.drop()
        with engine.connect().execution_options(yield_per=10) as connection:
            rows = connection.scalars(numbers)
            next(rows)
            self.forward.drop()
            with self.raises(DisconnectionError):
                rows.all()
        self.assertEqual(self.scalar(engine), 1)
        # What psycopg says of a cursor that nobody has closed.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResourceWarning)
            del rows
            gc.collect()
        self.assertEqual([each for each in caught if "Cursor" in str(each.message)], [])

    def test_response_timeout(self):
        engine = self.engine(response_timeout=2.0)
        with self.raises(DisconnectionError):
            self.scalar(engine, text("SELECT pg_sleep(60)"))
        self.assertEqual(self.scalar(engine), 1)

    # At COMMIT

    def test_lost_commit_that_was_applied(self):
        self.make_table()
        engine = self.engine()
        with self.events() as seen, Session(engine) as session, session.begin():
            session.add(Item(name="one"))
            session.flush()
            self.lose("to_client")
        self.assertEqual(self.names(), ["one"])
        self.assertIn("committed", [each.outcome for each in self.looked_up(seen)])
        self.add(engine, "two")

    def looked_up(self, seen):
        return [each for each in seen if isinstance(each, CommitLookedUp)]

    def test_lost_commit_that_was_not_applied(self):
        self.make_table()
        engine = self.engine()
        with self.raises(DisconnectionError), Session(engine) as session, session.begin():
            session.add(Item(name="one"))
            session.flush()
            self.lose("to_server")
        self.assertEqual(self.names(), [])
        self.add(engine, "two")

    def test_one_connection_goes_on_after_a_lost_commit(self):
        """SQLAlchemy sends no ROLLBACK after a COMMIT that has failed."""
        self.make_table()
        engine = self.engine()
        with engine.connect() as connection:
            connection.execute(sqlalchemy.insert(Item).values(name="one"))
            self.lose("to_server")
            with self.raises(DisconnectionError):
                connection.commit()
            with self.assertRaises(sqlalchemy.exc.PendingRollbackError):
                connection.execute(ONE)
            connection.rollback()
            connection.execute(sqlalchemy.insert(Item).values(name="two"))
            connection.commit()
        self.assertEqual(self.names(), ["two"])

    def test_asking_for_the_level_does_not_undo_the_doom(self):
        engine = self.engine()
        with engine.connect() as connection:
            connection.execute(ONE)
            self.forward.drop()
            with self.raises(DisconnectionError):
                connection.get_isolation_level()
            with self.raises(DisconnectionError):
                connection.execute(ONE)

    def test_isolation_level_is_reset_after_a_lost_commit(self):
        engine = self.engine()
        with (
            self.raises(DisconnectionError),
            engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection,
        ):
            connection.execute(XID)
            self.lose("to_server")
            connection.commit()
        self.assertEqual(self.scalar(engine, LEVEL), "read committed")
        self.assertEqual(engine.pool.checkedin(), 1)

    def test_lost_commit_of_unknown_outcome(self):
        self.make_table()
        engine = self.engine(witness=None)
        held = self.pooled_connection(engine)
        with self.raises(CommitOutcomeUnknown), Session(engine) as session, session.begin():
            session.add(Item(name="one"))
            session.flush()
            self.lose("to_client")
        self.assertEqual(held.state, "idle")
        self.add(engine, "two")
        self.assertIs(self.pooled_connection(engine), held)

    def pooled_connection(self, engine):
        with closing(engine.raw_connection()) as connection:
            return connection.dbapi_connection

    # zope.sqlalchemy

    def test_run_again_after_a_disconnect(self):
        for lost in ("to_server", "to_client"):
            self.check_run_again(lost, f"statement {lost}", at_commit=False, attempts=2)

    def test_run_again_after_a_lost_commit_that_was_not_applied(self):
        self.check_run_again("to_server", "COMMIT", at_commit=True, attempts=2)

    def test_not_run_again_after_a_lost_commit_that_was_applied(self):
        self.check_run_again("to_client", "COMMIT", at_commit=True, attempts=1)

    def check_run_again(self, lost, name, at_commit, attempts):
        self.query("CREATE TABLE IF NOT EXISTS item (name text)")
        for witness in ("xid", Ledger()):
            sessions = self.zope_sessions(self.engine(witness=witness))
            runs = self.run_losing(transaction.manager, sessions, name, lost, at_commit)
            self.assertEqual(runs, attempts)
            self.assertEqual(self.names(), [name])
            self.query("DELETE FROM item")

    def run_losing(self, manager, sessions, name, lost, at_commit=True):
        runs = []

        def work():
            runs.append(name)
            sessions.execute(ONE)
            sessions.add(Item(name=name))
            if at_commit:
                sessions.flush()
            if len(runs) == 1:
                self.lose(lost)

        try:
            manager.run(work)
        finally:
            # Not those that follow.
            self.forward.cancel_cut()
        return len(runs)

    def test_unknown_outcome_is_never_run_again(self):
        self.make_table()
        sessions = self.zope_sessions(self.engine(witness=None))
        for name in ("one", "two"):
            runs = []

            def work(name=name, runs=runs):
                runs.append(name)
                sessions.add(Item(name=name))
                sessions.flush()
                self.lose("to_client")

            with self.raises(CommitOutcomeUnknown):
                transaction.manager.run(work)
            transaction.abort()
            self.assertEqual(runs, [name])
        self.assertEqual(self.names(), ["one", "two"])

    def test_timeout_is_never_run_again(self):
        sessions = self.zope_sessions(self.engine(SHORT))
        runs = []

        def work():
            runs.append(1)
            sessions.execute(ONE)

        self.forward.refuse()
        with self.raises(ReconnectTimeout):
            transaction.manager.run(work)
        self.assertEqual(runs, [1])

    def test_serialization_failure_is_run_again_as_ever(self):
        self.make_table()
        sessions = self.zope_sessions(self.engine())
        runs = []

        def work():
            runs.append(1)
            if len(runs) == 1:
                sessions.execute(text("DO $$BEGIN RAISE SQLSTATE '40001'; END$$"))

        transaction.manager.run(work)
        self.assertEqual(runs, [1, 1])

    def test_swallowed_disconnect_is_not_committed(self):
        self.make_table()
        sessions = self.zope_sessions(self.engine())
        runs = []

        def work():
            runs.append(1)
            sessions.add(Item(name="one"))
            sessions.flush()
            if len(runs) == 1:
                self.forward.drop()
                with suppress(DisconnectionError):
                    sessions.execute(ONE)

        transaction.manager.run(work)
        self.assertEqual(runs, [1, 1])
        self.assertEqual(self.names(), ["one"])

    def test_savepoint_does_not_help_against_a_disconnect(self):
        self.make_table()
        sessions = self.zope_sessions(self.engine())
        runs = []

        def work():
            runs.append(1)
            sessions.add(Item(name="outer"))
            savepoint = transaction.savepoint()
            sessions.add(Item(name="inner"))
            if len(runs) == 1:
                self.forward.drop()
            try:
                sessions.flush()
            except DisconnectionError:
                savepoint.rollback()

        transaction.manager.run(work)
        self.assertEqual(runs, [1, 1])
        self.assertEqual(self.names(), ["inner", "outer"])

    def test_other_data_managers_vote_first(self):
        """What one of them refuses is not committed."""
        self.make_table()
        sessions = self.zope_sessions(self.engine())
        sessions.add(Item(name="one"))
        transaction.get().join(Refusing())
        with self.assertRaises(ZeroDivisionError):
            transaction.commit()
        transaction.abort()
        self.assertEqual(self.names(), [])

    def test_explicit_transaction_manager(self):
        self.make_table()
        manager = transaction.TransactionManager(explicit=True)
        sessions = self.zope_sessions(self.engine(), transaction_manager=manager)
        self.assertEqual(self.run_losing(manager, sessions, "one", "to_server"), 2)
        self.assertEqual(self.names(), ["one"])

    def test_pyramid_runs_a_request_again(self):
        self.make_table()
        with self.application(self.engine()) as application:
            answer = Request.blank("/?lose=to_server").get_response(application)
        self.assertEqual((answer.status_code, answer.text), (200, "2 runs"))
        self.assertEqual(self.names(), ["guest"])

    def test_pyramid_does_not_run_a_request_of_unknown_outcome_again(self):
        self.make_table()
        with (
            self.application(self.engine(witness=None)) as application,
            self.assertRaises(CommitOutcomeUnknown),
        ):
            Request.blank("/?lose=to_client").get_response(application)
        self.assertEqual(self.names(), ["guest"])

    @contextmanager
    def application(self, engine):
        """With pyramid_tm, its explicit manager, and pyramid_retry."""
        runs = []

        def view(request):
            runs.append(1)
            with Session(engine) as session:
                zope.sqlalchemy.register(session, transaction_manager=request.tm)
                session.add(Item(name="guest"))
                session.flush()
                if len(runs) == 1:
                    self.lose(request.GET["lose"])
                request.tm.commit()
                request.tm.begin()
            return Response(f"{len(runs)} runs")

        settings = {"tm.manager_hook": "pyramid_tm.explicit_manager"}
        with Configurator(settings=settings) as configurator:
            configurator.include("pyramid_tm")
            configurator.include("pyramid_retry")
            configurator.add_route("view", "/")
            configurator.add_view(view, route_name="view")
            yield configurator.make_wsgi_app()

    # The session is the same after reconnecting

    def test_types_of_the_dialect(self):
        self.query("CREATE EXTENSION hstore")
        engine = self.engine(json_deserializer=lambda value: ["mine", value])
        Base.metadata.create_all(engine, tables=[Typed.__table__])
        key = uuid.uuid4()
        with Session(engine) as session, session.begin():
            session.add(Typed(id=key, data={"a": 1}, tags={"b": "2"}))
        raw = text("SELECT id, data, tags FROM typed")
        for _ in range(3):
            with Session(engine) as session:
                row = session.scalars(select(Typed)).one()
                self.assertEqual(row.id, key)
                self.assertEqual(row.data[0], "mine")
                self.assertEqual(row.tags, {"b": "2"})
                # What the driver itself makes of them.
                row = session.execute(raw).one()
                self.assertEqual((row.id, row.data[0], row.tags), (key, "mine", {"b": "2"}))
            self.forward.drop()

    def test_client_encoding(self):
        engine = self.engine(client_encoding="latin1")
        for _ in range(2):
            self.assertEqual(self.scalar(engine, text("SHOW client_encoding")), "LATIN1")
            self.forward.drop()

    def test_listeners_are_called_for_each_session(self):
        """With the driver's own connection, whether they were there before or came later."""
        engine = self.plain_engine()
        seen = []

        def before(dbapi_connection, record):
            seen.append(("before", type(dbapi_connection).__module__.partition(".")[0]))
            # Commits nothing.
            with closing(dbapi_connection.cursor()) as cursor:
                cursor.execute("SET application_name = 'listener'")

        def after(dbapi_connection, record):
            seen.append(("after", dbapi_connection.autocommit))

        event.listen(engine, "connect", before)
        register(engine, QUICK)
        event.listen(engine, "connect", after)
        each = [("before", self.module.__name__), ("after", False)]
        for times in (1, 2):
            for _ in range(2):
                name = self.scalar(engine, text("SHOW application_name"))
                self.assertEqual(name, "listener")
            self.assertEqual(seen, each * times)
            self.forward.drop()

    def test_listener_that_leaves_autocommit_mode(self):
        engine = self.plain_engine()
        register(engine, QUICK)

        @event.listens_for(engine, "connect")
        def set_autocommit(dbapi_connection, record):
            dbapi_connection.autocommit = True

        self.assert_autocommit(engine)

    def test_listeners_to_do_connect(self):
        """They give the password of the moment; or the connection."""
        url = self.url()
        engine = sqlalchemy.create_engine(
            sqlalchemy.URL.create(
                url.drivername, url.username, None, url.host, url.port, url.database
            )
        )
        self.addCleanup(engine.dispose)
        password, module, dsn, calls = self.server.password, self.module, self.dsn, []

        @event.listens_for(engine, "do_connect")
        def give_password(dialect, record, cargs, cparams):
            calls.append(cparams.get("password"))
            cparams["password"] = password

        register(engine, QUICK)
        for _ in range(2):
            self.assertEqual(self.scalar(engine), 1)
            self.forward.drop()
        self.assertEqual(calls, [None, None])

        @event.listens_for(engine, "do_connect")
        def connect(dialect, record, cargs, cparams):
            self.assertEqual(record.info, {})
            connected = module.connect(dsn, application_name="mine")
            connected.cursor().execute("SET search_path = pg_catalog")
            record.info["process"] = connected.info.backend_pid
            return connected

        for _ in range(2):
            with engine.connect() as connection:
                self.assertEqual(connection.scalar(text("SHOW application_name")), "mine")
                self.assertEqual(connection.scalar(text("SHOW search_path")), "pg_catalog")
                process = connection.scalar(text("SELECT pg_backend_pid()"))
                self.assertEqual(connection.info["process"], process)
            self.forward.drop()

    def test_lost_while_the_pool_sets_it_up(self):
        engine = self.plain_engine()
        register(engine, QUICK)
        times = itertools.count(1)

        @event.listens_for(engine, "connect")
        def use(dbapi_connection, record):
            if next(times) in (1, 3):
                self.forward.drop()
            with closing(dbapi_connection.cursor()) as cursor:
                cursor.execute("SELECT 1")

        with self.raises(DisconnectionError) as raised:
            engine.connect()
        self.assertIsInstance(raised.exception.__cause__, self.module.OperationalError)
        self.assertEqual(self.scalar(engine), 1)
        # The next session is lost like this, and tried again.
        self.forward.drop()
        self.assertEqual(self.scalar(engine), 1)
        self.assertEqual(next(times), 5)

    def test_lost_while_the_dialect_is_initialised(self):
        """By the first connection of an engine, around which SQLAlchemy puts one of its own."""
        # Nothing is asked before.
        engine = self.plain_engine(use_native_hstore=False)
        register(engine, QUICK)
        sessions = self.zope_sessions(engine)
        times, runs = itertools.count(1), []

        @event.listens_for(engine, "connect", insert=True)
        def lose(dbapi_connection, record):
            if next(times) in (1, 2):
                self.forward.drop()

        with self.raises(DisconnectionError) as raised:
            engine.connect()
        original = raised.exception.getOriginalException()[1]
        self.assertIsInstance(original, self.module.OperationalError)
        self.assertNotIsInstance(original, DisconnectionError)

        def work():
            runs.append(1)
            sessions.execute(ONE)

        transaction.manager.run(work)
        self.assertEqual(runs, [1, 1])
        self.assertEqual(next(times), 4)

    def test_lost_anywhere_before_there_is_a_transaction(self):
        """It is tried again, or ours."""
        for direction in ("to_server", "to_client"):
            for witness in ("xid", Ledger()):
                with self.subTest(direction, witness=witness):
                    self.check_lost_before_there_is_a_transaction(direction, witness)

    def check_lost_before_there_is_a_transaction(self, direction, witness):
        lost = 0
        for after in itertools.count(0, 97):
            engine = self.engine(witness=witness)
            cut = self.forward.cut(direction, after)
            try:
                engine.connect().close()
            except Exception as error:
                self.assertIsInstance(error, DisconnectionError, after)
                lost += 1
            if self.forward.cancel_cut():
                break
            self.assertTrue(cut.happened)
            self.assertEqual(self.scalar(engine), 1)
            engine.dispose()
        self.assertGreater(lost, 2)

    def test_lost_after_it_was_invalidated_by_the_program(self):
        engine = self.engine()
        with engine.connect() as connection:
            connection.invalidate()
            connection.rollback()

            @event.listens_for(engine, "connect", once=True)
            def use(dbapi_connection, record):
                self.forward.drop()
                dbapi_connection.cursor().execute("SELECT 1")

            with self.raises(DisconnectionError):
                connection.execute(ONE)
            self.assertEqual(connection.scalar(ONE), 1)

    def test_error_of_a_listener(self):
        engine = self.plain_engine()
        register(engine, QUICK)

        @event.listens_for(engine, "connect")
        def fail(dbapi_connection, record):
            with closing(dbapi_connection.cursor()) as cursor:
                cursor.execute("SELECT nonsense")

        with self.assertRaisesRegex(sqlalchemy.exc.ProgrammingError, "nonsense"):
            engine.connect()

    def test_isolation_level_of_the_engine(self):
        engine = self.engine(isolation_level="SERIALIZABLE")
        for _ in range(2):
            self.assertEqual(self.scalar(engine, LEVEL), "serializable")
            level = self.scalar(engine, LEVEL, isolation_level="REPEATABLE READ")
            self.assertEqual(level, "repeatable read")
            self.assertEqual(self.scalar(engine, LEVEL), "serializable")
            self.forward.drop()

    def test_isolation_level_of_a_connection(self):
        engine = self.engine()
        with engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
            for _ in range(2):
                self.assertEqual(connection.scalar(LEVEL), "serializable")
                connection.rollback()
                self.forward.drop()
        self.assertEqual(self.scalar(engine, LEVEL), "read committed")

    def test_another_level_after_the_present_one_was_asked_for(self):
        with self.engine().connect() as connection:
            connection.execute(text("CREATE TABLE note (text text)"))
            connection.commit()
            level = connection.get_isolation_level()
            for other in ("SERIALIZABLE", level):
                connection.execution_options(isolation_level=other)
                self.assertEqual(connection.get_isolation_level().upper(), other)
            connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.execute(text("CREATE INDEX CONCURRENTLY note_text ON note (text)"))
            self.assertTrue(connection.scalar(text("SELECT indisvalid FROM pg_index LIMIT 1")))

    def test_modes_of_a_connection(self):
        engine = self.engine()
        options = {"postgresql_readonly": True, "postgresql_deferrable": True}
        for name in ("transaction_read_only", "transaction_deferrable"):
            for _ in range(2):
                self.assertEqual(self.scalar(engine, text(f"SHOW {name}"), **options), "on")
                self.forward.drop()
            self.assertEqual(self.scalar(engine, text(f"SHOW {name}")), "off")

    def test_autocommit_of_the_engine(self):
        engine = self.engine(isolation_level="AUTOCOMMIT")
        self.assert_autocommit(engine)
        level = self.scalar(engine, LEVEL, isolation_level="SERIALIZABLE")
        self.assertEqual(level, "serializable")
        self.assert_autocommit(engine)

    def test_autocommit_of_a_connection(self):
        engine = self.engine()
        for _ in range(2):
            self.assert_autocommit(engine.execution_options(isolation_level="AUTOCOMMIT"))
            self.assert_not_autocommit(engine)
            self.server.restart()

    def test_a_disconnect_in_autocommit_mode(self):
        engine = self.engine(isolation_level="AUTOCOMMIT")
        self.scalar(engine)
        self.forward.drop()
        self.assert_autocommit(engine)
        self.forward.cut("to_client", 0)
        with self.raises(CommitOutcomeUnknown):
            self.scalar(engine)
        self.assert_autocommit(engine)

    def assert_autocommit(self, engine, expected=True):
        with engine.connect() as connection:
            self.assertIs(connection.scalar(XID) != connection.scalar(XID), expected)

    def assert_not_autocommit(self, engine):
        self.assert_autocommit(engine, expected=False)

    # Pools

    def test_pools(self):
        for poolclass in (pool.NullPool, pool.StaticPool, pool.QueuePool, pool.AssertionPool):
            engine = self.engine(poolclass=poolclass)
            for _ in range(2):
                for _ in range(2):
                    self.assertEqual(self.scalar(engine), 1)
                self.forward.drop()
            with self.raises(DisconnectionError), engine.begin() as connection:
                connection.execute(ONE)
                self.forward.drop()
                connection.execute(ONE)
            self.assertEqual(self.scalar(engine), 1)
            engine.dispose()
            wait_until(lambda: self.sessions() == [])
            self.assertEqual(self.scalar(engine), 1)
            self.forward.drop()
            self.assertEqual(self.scalar(engine), 1)

    def test_recycling(self):
        engine = self.engine(pool_recycle=0)
        pids = {self.scalar(engine, BACKEND) for _ in range(3)}
        self.assertEqual(len(pids), 3)
        self.forward.drop()
        self.scalar(engine)

    def test_invalidated_by_the_program(self):
        engine = self.engine()
        with engine.connect() as connection:
            pid = connection.scalar(BACKEND)
            connection.invalidate()
            connection.rollback()
            self.assertNotEqual(connection.scalar(BACKEND), pid)

    def test_interrupted(self):
        """SQLAlchemy gives up the connection, as ever."""
        engine = self.engine()

        @event.listens_for(engine, "before_cursor_execute")
        def interrupt(connection, cursor, statement, *others):
            if statement == "SELECT 2":
                raise KeyboardInterrupt

        with self.assertRaises(KeyboardInterrupt), engine.begin() as connection:
            connection.execute(ONE)
            connection.execute(text("SELECT 2"))
        self.assertEqual(self.scalar(engine), 1)

    def test_detached(self):
        engine = self.engine()
        with engine.connect() as connection:
            connection.detach()
            for _ in range(2):
                self.assertEqual(connection.scalar(ONE), 1)
                connection.rollback()
                self.forward.drop()
            self.assertTrue(connection.connection.is_detached)

    def test_reset_on_return(self):
        self.make_table()
        engine = self.engine(pool_reset_on_return="commit")
        with engine.connect() as connection:
            connection.execute(ONE)
            self.forward.drop()
            with self.raises(DisconnectionError):
                connection.execute(ONE)
        self.add(engine, "one")
        with engine.connect() as connection:
            connection.execute(sqlalchemy.insert(Item).values(name="two"))
        self.assertEqual(self.names(), ["one"])

    def test_a_session_is_handed_to_another_thread(self):
        """In the middle of a transaction, too: the pool sees to it that nobody else has it."""
        self.make_table()
        engine = self.engine()
        with ThreadPoolExecutor(1) as executor:
            for end in (Session.commit, Session.rollback, Session.close):
                session = Session(engine)
                session.add(Item(name=end.__name__))
                session.flush()
                executor.submit(session.execute, ONE).result(PATIENCE)
                executor.submit(end, session).result(PATIENCE)
                session.close()
                self.assertEqual(self.pooled_connection(engine).state, "idle")
        self.assertEqual(self.names(), ["commit"])

    def test_a_forgotten_session_of_another_thread(self):
        engine = self.engine()
        held = []

        def forget():
            session = Session(engine)
            held.append(session.connection().connection.dbapi_connection)
            session.execute(ONE)
            # Only the garbage collector finds it.
            session.info["myself"] = session

        thread = threading.Thread(target=forget)
        thread.start()
        thread.join()
        with self.assertNoLogs("sqlalchemy.pool", logging.ERROR):
            gc.collect()
        self.assertEqual(held[0].state, "idle")
        self.assertIs(self.pooled_connection(engine), held[0])

    def test_in_a_forked_child(self):
        """The session is the parent's; the turn is whose it was."""
        engine = self.engine()
        turn = self.pooled_connection(engine).work.turn
        self.assertIs(turn.in_child(), turn)

    def test_two_engines(self):
        self.make_table()
        one, two = self.engine(), self.engine(witness=Ledger())
        with one.begin() as first, two.begin() as second:
            first.execute(sqlalchemy.insert(Item).values(name="one"))
            second.execute(sqlalchemy.insert(Item).values(name="two"))
        self.forward.drop()
        self.assertEqual([self.scalar(one), self.scalar(two)], [1, 1])
        self.assertEqual(self.names(), ["one", "two"])

    def test_threads(self):
        """They wait at one door together."""
        engine = self.engine(pool_size=4)
        both = threading.Barrier(4)

        def use():
            with engine.connect() as connection:
                both.wait(PATIENCE)
                return connection.connection.dbapi_connection.work.link.server, connection.scalar(
                    ONE
                )

        with ThreadPoolExecutor(4) as executor:
            for _ in range(2):
                futures = [executor.submit(use) for _ in range(4)]
                answers = {future.result(PATIENCE) for future in futures}
                self.assertEqual([one for _, one in answers], [1])
                self.forward.drop()

    # The Core and the ORM at large

    def test_many_rows_at_once(self):
        engine = self.engine()
        Base.metadata.create_all(engine, tables=[Item.__table__])
        names = [f"{n:04}" for n in range(1500)]
        with Session(engine) as session, session.begin():
            session.add_all(Item(name=name) for name in names)
        with engine.begin() as connection:
            connection.execute(
                sqlalchemy.update(Item.__table__)
                .where(Item.name == sqlalchemy.bindparam("old"))
                .values(name=sqlalchemy.bindparam("new")),
                [{"old": name, "new": f"{name}!"} for name in names],
            )
        self.assertEqual(self.names(), [f"{name}!" for name in names])
        self.assertTrue(sqlalchemy.inspect(engine).has_table("item"))

    def test_notices_are_logged(self):
        engine = self.engine()
        raising = text("DO $$BEGIN RAISE NOTICE 'listen'; END$$")
        for _ in range(2):
            with (
                self.assertLogs("sqlalchemy.dialects.postgresql", logging.INFO) as logged,
                engine.begin() as connection,
            ):
                connection.execute(raising)
            self.assertEqual(len(logged.output), 1)
            self.forward.drop()

    # What is refused

    def migrations(self, engine, schemas=False, **options):
        """The names of the tables that alembic's autogenerate would drop."""
        with engine.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"include_schemas": schemas, **options}
            )
            found = compare_metadata(context, sqlalchemy.MetaData())
        return sorted(table.name for operation, table in found if operation == "remove_table")

    def test_alembic_leaves_the_ledger_alone(self):
        self.query("CREATE SCHEMA ours")
        self.addCleanup(self.query, "DROP SCHEMA ours CASCADE")
        for ledger, schemas in (
            (Ledger(), False),
            (Ledger("Entries"), False),
            (Ledger("public.entries"), False),
            (Ledger("ours.entries"), True),
            (Ledger("public.entries"), True),
        ):
            with self.subTest(ledger, schemas=schemas):
                engine = self.engine(witness=ledger)
                self.scalar(engine)
                self.query("CREATE TABLE another ()")
                table = ledger.table.lower().rpartition(".")[2]
                found = self.migrations(engine, schemas)
                self.assertEqual(found, sorted(["another", table]))
                mine = None if ledger.table == Ledger().table else ledger
                include_name = without_ledger(mine)
                found = self.migrations(engine, schemas, include_name=include_name)
                self.assertEqual(found, ["another"])
                include_name = without_ledger(mine, lambda name, kind, parents: kind != "table")
                self.assertEqual(self.migrations(engine, include_name=include_name), [])
                engine.dispose()
                self.query("DROP TABLE another")
                self.query(f"DROP TABLE {ledger.table}")

    def test_alembic_sees_a_table_of_the_same_name_in_another_schema(self):
        self.query("CREATE SCHEMA ours")
        self.addCleanup(self.query, "DROP SCHEMA ours CASCADE")
        self.query("CREATE TABLE ours.entries ()")
        include_name = without_ledger(Ledger("public.entries"))
        found = self.migrations(self.plain_engine(), schemas=True, include_name=include_name)
        self.assertEqual(found, ["entries"])

    def test_two_phase(self):
        with (
            self.assertRaisesRegex(sqlalchemy.exc.InvalidRequestError, "twophase=True"),
            Session(self.engine(), twophase=True) as session,
        ):
            session.execute(ONE)

    def test_creator(self):
        module, dsn = self.module, self.dsn
        engine = self.engine(creator=lambda: module.connect(dsn))
        with self.assertRaisesRegex(sqlalchemy.exc.InvalidRequestError, "do_connect"):
            engine.connect()

    def test_registered_when_it_has_connected(self):
        engine = self.plain_engine()
        with engine.connect() as connection:
            register(engine)
            self.assertEqual(connection.scalar(ONE), 1)
        with self.assertRaisesRegex(sqlalchemy.exc.InvalidRequestError, "before the engine"):
            engine.connect()
        self.assertEqual(self.scalar(engine), 1)

    def test_what_was_connected_before_is_not_ours(self):
        """It may be in a transaction, or at its COMMIT."""
        engine = self.plain_engine()
        with engine.connect() as connection:
            register(engine)
            connection.execute(ONE)
            self.lose("to_client")
            with self.assertRaises(sqlalchemy.exc.OperationalError):
                connection.commit()

    def test_bad_engines(self):
        engine = self.engine()
        for error, bad in (
            (TypeError, self.dsn),
            (ValueError, engine),
            (ValueError, engine.execution_options(isolation_level="AUTOCOMMIT")),
            (ValueError, self.plain_engine(pool_pre_ping=True)),
            (ValueError, sqlalchemy.create_engine("sqlite://")),
            (ValueError, sqlalchemy.create_engine("postgresql+psycopg_async://")),
            (ValueError, sqlalchemy.create_engine("mysql+pymysql://localhost")),
        ):
            with self.assertRaisesRegex(error, "^engine "):
                register(bad)

    def test_bad_arguments(self):
        for error, name, bad in (
            (TypeError, "policy", "persist"),
            ((TypeError, ValueError), "witness", "nobody"),
            (ValueError, "response_timeout", -1),
        ):
            engine = self.plain_engine()
            with self.assertRaisesRegex(error, name):
                register(engine, **{name: bad})
            # It can be made up for.
            register(engine)

    def test_target_session_attrs(self):
        """A session with a server that is no longer what was asked for is left."""
        for options, is_left in (({"target_session_attrs": "read-write"}, True), ({}, False)):
            engine = self.engine(connect_args=options)
            with engine.begin() as connection:
                pid = connection.scalar(BACKEND)
                connection.execute(text("SET default_transaction_read_only = on"))
            self.assertIs(self.scalar(engine, BACKEND) != pid, is_left)


class PsycopgTests(Psycopg2Tests):
    driver = "psycopg"
    module = psycopg
    round_trips_of_one_statement = 2


class Refusing:
    """A data manager that votes against."""

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args: None

    def sortKey(self):
        return "refusing"

    def tpc_vote(self, transaction):
        raise ZeroDivisionError


class ImportTests(unittest.TestCase):
    def run_python(self, program):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )

    def test_nothing_else_imports_it(self):
        done = self.run_python("import sys, zreconnect; print('sqlalchemy' in sys.modules)")
        self.assertEqual((done.stderr, done.stdout), ("", "False\n"))


class RestartTests(SurvivesRestarts, SqlalchemyTestCase):
    threads = 3

    def setUp(self):
        super().setUp()
        # Without a unique constraint, so that what is done twice is there twice.
        self.query("CREATE TABLE item (name text)")

    def restarted_engine(self):
        return self.engine(witness=Ledger(), pool_size=self.threads)

    def applied(self):
        return [int(name) for name in self.names()]

    def test_zope_sqlalchemy(self):
        sessions = self.zope_sessions(self.restarted_engine())

        def work(number):
            sessions.scalar(select(sqlalchemy.func.count()).where(Item.name == "nobody"))
            sessions.add(Item(name=str(number)))
            savepoint = transaction.savepoint()
            sessions.add(Item(name="rolled back"))
            sessions.flush()
            savepoint.rollback()

        def unit(number):
            transaction.manager.run(lambda: work(number), ATTEMPTS)

        self.survive(unit, self.threads, self.applied, leave=sessions.remove)

    def test_plain_sessions_through_psycopg(self):
        self.driver = "psycopg"
        engine = self.restarted_engine()

        def unit(number):
            for _ in range(ATTEMPTS):
                with suppress(DisconnectionError):
                    return self.add(engine, str(number))
            raise AssertionError(f"{ATTEMPTS} attempts were not enough")

        self.survive(unit, self.threads, self.applied)
