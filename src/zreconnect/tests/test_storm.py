"""Storm under zstorm: its stores go on when their server sessions are lost."""

import contextlib
import gc
import io
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import uuid
import warnings
from collections import Counter
from types import SimpleNamespace

import psycopg2
import storm.exceptions
import transaction
from storm.database import create_database
from storm.databases.postgres import PostgresTimeoutTracer
from storm.locals import Int, Store, Unicode
from storm.tracer import DebugTracer, install_tracer, remove_tracer
from storm.xid import Xid
from storm.zope.interfaces import IZStorm
from storm.zope.zstorm import ZStorm, global_zstorm
from transaction.interfaces import TransientError
from zope.component import getUtility, testing
from zope.configuration import xmlconfig
from zope.publisher.base import DefaultPublication
from zope.publisher.browser import TestRequest
from zope.publisher.interfaces import Retry
from zope.publisher.publish import publish

from zreconnect import (
    FAIL_FAST,
    CommitOutcomeUnknown,
    DisconnectionError,
    Ledger,
    ReconnectTimeout,
    RetryPolicy,
    recover,
)
from zreconnect.events import CommitLookedUp
from zreconnect.integrations import storm as integrations_storm
from zreconnect.integrations.storm import SCHEME, StormDisconnectionError, register
from zreconnect.interfaces import IDatabaseUnavailable
from zreconnect.testing import PortForward
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests.base import PATIENCE, DatabaseTestCase, wait_until, with_time_to_connect
from zreconnect.tests.restarts import ATTEMPTS, SurvivesRestarts
from zreconnect.tests.situations import Child
from zreconnect.tests.test_twophase import DATABASES, Database, Hook, make_databases

SETTINGS = {"fsync": "off", "max_prepared_transactions": 20}
LAYER = PortForwardLayer(PostgresLayer("StormPostgresLayer", SETTINGS), "StormForwardLayer")
IMPATIENT = RetryPolicy(timeout=1.0)
TERMINATE = "SELECT pg_terminate_backend(pg_backend_pid())"
schemes = (f"storm-test-{number}" for number in itertools.count())


class Item:
    __storm_table__ = "item"
    id = Int(primary=True)
    name = Unicode()

    def __init__(self, name):
        self.name = name


class StormTestCase(DatabaseTestCase):
    """``self.zstorm`` has the stores; ``self.store`` is one of the calling thread."""

    layer = LAYER

    def setUp(self):
        super().setUp()
        self.query("CREATE TABLE item (id serial PRIMARY KEY, name text)")
        self.zstorm = ZStorm()
        self.addCleanup(self.zstorm._reset)
        self.addCleanup(transaction.abort)

    def uri(self, dsn=None, options="", **keywords):
        """A URI of a scheme of its own, which is registered with these keywords."""
        scheme = next(schemes)
        register(scheme, **keywords)
        return (dsn or self.dsn).replace("postgresql:", f"{scheme}:") + options

    def configure(self, options="", **keywords):
        self.zstorm.set_default_uri("main", self.uri(options=options, **keywords))

    @property
    def store(self):
        return self.zstorm.get("main")

    def raw(self, store=None):
        """The store's `ReconnectingConnection`."""
        return (store or self.store)._connection._raw_connection._connection

    def add(self, name="one"):
        item = self.store.add(Item(name))
        self.store.flush()
        return item

    def names(self):
        return [name for (name,) in self.query("SELECT name FROM item ORDER BY id")]

    def lose(self):
        with self.assertRaises(storm.exceptions.DisconnectionError):
            self.store.execute(TERMINATE)


class RegisterTests(StormTestCase):
    def test_the_usual_scheme(self):
        register()
        uri = self.dsn.replace("postgresql:", f"{SCHEME}:")
        store = Store(create_database(uri))
        self.addCleanup(store.close)
        self.assertEqual(store.execute("SELECT 1").get_one(), (1,))
        store.commit()

    def test_in_the_place_of_storms_own(self):
        register("postgres", on_connect=lambda raw: seen.append(raw))
        self.addCleanup(storm.database._database_schemes.pop, "postgres")
        seen = []
        store = Store(create_database(self.dsn.replace("postgresql:", "postgres:")))
        self.addCleanup(store.close)
        store.execute("SELECT 1")
        self.assertEqual(len(seen), 1)

    def test_arguments(self):
        for keywords, error, words in (
            ({"scheme": 1}, TypeError, "scheme must be a string"),
            ({"scheme": ""}, ValueError, "scheme must be what stands before"),
            ({"scheme": "postgres://"}, ValueError, "scheme must be what stands before"),
            ({"scheme": "mysql"}, ValueError, "only PostgreSQL"),
            ({"scheme": "sqlite"}, ValueError, "only PostgreSQL"),
            ({"policy": 3}, TypeError, "policy"),
            ({"witness": "oath"}, ValueError, "witness"),
            ({"on_connect": 1}, TypeError, "on_connect"),
            ({"response_timeout": -1}, ValueError, "response_timeout"),
        ):
            with self.assertRaisesRegex(error, words):
                register(**keywords)

    def test_uris(self):
        with self.assertRaisesRegex(ValueError, "no connection string"):
            create_database(self.uri(options="?no_such_parameter=1"))
        with self.assertRaisesRegex(ValueError, "Unknown serialization level"):
            create_database(self.uri(options="?isolation=best"))

    def test_nothing_is_contacted_before_the_first_statement(self):
        self.server.shut_down()
        self.configure()
        connection = self.raw()
        self.assertEqual(connection.state, "idle")
        self.server.start()
        self.add()
        transaction.commit()
        self.assertEqual(self.names(), ["one"])

    def test_round_trips(self):
        self.configure()
        self.zstorm.set_default_uri("plain", self.dsn.replace("postgresql:", "postgres:"))
        spent = []
        for name in ("plain", "main"):
            self.zstorm.get(name).execute("SELECT 1")
            transaction.commit()

            def work(name=name):
                self.zstorm.get(name).add(Item("one"))
                transaction.commit()

            spent.append(self.round_trips(work))
        self.assertEqual(spent, [3, 3])


class SettingsTests(StormTestCase):
    """What Storm sets on each new raw connection is there in each new session."""

    def show(self, name):
        ((value,),) = self.store.execute(f"SHOW {name}").get_all()
        return value

    def test_isolation_and_encoding(self):
        for options, level in (
            ("", "repeatable read"),
            ("?isolation=serializable", "serializable"),
            ("?isolation=read-committed", "read committed"),
        ):
            self.query("ALTER DATABASE postgres SET client_encoding TO latin1")
            self.addCleanup(self.query, "ALTER DATABASE postgres RESET client_encoding")
            self.configure(options)
            for _ in range(2):
                self.assertEqual(self.show("transaction_isolation"), level)
                self.assertEqual(self.show("client_encoding"), "UTF8")
                self.lose()
                transaction.abort()
            self.zstorm.remove(self.store)

    def test_other_parameters(self):
        self.configure("?application_name=importer")
        self.assertEqual(self.show("application_name"), "importer")

    def test_on_connect(self):
        def set_up(raw):
            with raw.cursor() as cursor:
                cursor.execute("SET lock_timeout = '7s'")
            raw.commit()

        self.configure(on_connect=set_up)
        for _ in range(2):
            self.assertEqual(self.show("lock_timeout"), "7s")
            self.lose()
            transaction.abort()

    def test_autocommit(self):
        self.configure("?isolation=autocommit")
        self.add()
        self.assertEqual(self.names(), ["one"])
        with self.assertRaises(CommitOutcomeUnknown):
            self.store.execute(TERMINATE)
        transaction.abort()
        self.add("two")
        self.assertEqual(self.names(), ["one", "two"])
        self.zstorm.remove(self.store)
        self.zstorm.set_default_tpc("main", True)
        with self.assertRaisesRegex(storm.exceptions.ProgrammingError, "in autocommit mode"):
            self.store.execute("SELECT 1")


class LossTests(StormTestCase):
    def setUp(self):
        super().setUp()
        self.configure()

    def test_between_transactions(self):
        self.add()
        transaction.commit()
        connection = self.raw()
        self.server.restart()
        self.add("two")
        transaction.commit()
        self.assertEqual(self.names(), ["one", "two"])
        self.assertIs(self.raw(), connection)

    def test_inside_a_transaction(self):
        self.add()
        connection = self.raw()
        self.server.restart()
        for use in (
            lambda: self.store.execute("SELECT 1"),
            lambda: self.store.find(Item).count(),
            lambda: self.add("two"),
            transaction.commit,
        ):
            with self.assertRaises(storm.exceptions.DisconnectionError):
                use()
        self.assertEqual(connection.state, "doomed")
        transaction.abort()
        self.assertEqual(self.store.find(Item).count(), 0)
        self.assertIs(self.raw(), connection)

    def test_a_loss_that_is_swallowed(self):
        self.add()
        self.lose()
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        transaction.abort()
        self.assertEqual(self.names(), [])

    def test_what_is_raised(self):
        self.add()
        with self.assertRaises(storm.exceptions.DisconnectionError) as caught:
            self.store.execute(TERMINATE)
        for kind in (
            StormDisconnectionError,
            DisconnectionError,
            TransientError,
            Retry,
            psycopg2.OperationalError,
            storm.exceptions.OperationalError,
            storm.exceptions.StormError,
        ):
            self.assertIsInstance(caught.exception, kind)
        kind, original, _ = caught.exception.getOriginalException()
        self.assertTrue(issubclass(kind, psycopg2.Error))
        self.assertTrue(IDatabaseUnavailable.providedBy(original))
        self.assertTrue(IDatabaseUnavailable.providedBy(caught.exception))
        self.assertNotIn(self.server.password, str(caught.exception))
        self.assertIsNone(caught.exception.pgcode)
        copy = pickle.loads(pickle.dumps(caught.exception))
        self.assertEqual((type(copy), str(copy)), (StormDisconnectionError, str(caught.exception)))

    def test_run_runs_again(self):
        calls = []

        def work():
            calls.append(1)
            self.add()
            if len(calls) == 1:
                self.server.restart()
            self.add("two")

        transaction.manager.run(work)
        self.assertEqual(len(calls), 2)
        self.assertEqual(self.names(), ["one", "two"])

    def test_while_rows_are_read(self):
        for number in range(30):
            self.add(str(number))
        transaction.commit()
        rows = iter(self.store.execute("SELECT name FROM item"))
        next(rows)
        self.lose()
        with self.assertRaises(storm.exceptions.DisconnectionError):
            list(rows)

    def test_rollback_of_the_store(self):
        self.add()
        self.lose()
        self.store.rollback()
        self.add("two")
        self.store.commit()
        self.assertEqual(self.names(), ["two"])

    def test_objects(self):
        item = self.add()
        transaction.commit()
        self.assertEqual(item.name, "one")
        item.name = "lost"
        added = self.store.add(Item("added"))
        self.store.flush()
        self.lose()
        self.query("UPDATE item SET name = 'changed'")
        transaction.abort()
        self.assertEqual(item.name, "changed")
        with self.assertRaises(storm.exceptions.LostObjectError):
            added.name  # noqa: B018
        item.name = "kept"
        transaction.commit()
        self.assertEqual(self.names(), ["kept"])

    def test_an_error_of_the_users(self):
        with self.assertRaises(storm.exceptions.ProgrammingError) as caught:
            self.store.execute("SELECT nothing")
        self.assertIsInstance(caught.exception, psycopg2.errors.UndefinedColumn)
        self.assertNotIsInstance(caught.exception, TransientError)
        # Storm's rollback is due; what was swallowed must not be committed.
        with self.assertRaisesRegex(storm.exceptions.InternalError, "Nothing was committed"):
            transaction.commit()
        transaction.abort()
        self.add()
        transaction.commit()
        self.assertEqual(self.names(), ["one"])

    def test_a_serialization_failure_is_run_again(self):
        self.add()
        transaction.commit()
        raised = []

        def work():
            item = self.store.find(Item).one()
            if not raised:
                self.query("UPDATE item SET name = name || '+'")
            item.name += "!"
            try:
                self.store.flush()
            except storm.exceptions.OperationalError as error:
                raised.append(error)
                raise

        transaction.manager.run(work)
        self.assertEqual(self.names(), ["one+!"])
        (error,) = raised
        self.assertIsInstance(error, TransientError)
        self.assertIsInstance(error, psycopg2.errors.SerializationFailure)
        self.assertNotIsInstance(error, storm.exceptions.DisconnectionError)


@with_time_to_connect
class PatienceTests(StormTestCase):
    def vanish(self):
        self.forward.refuse()
        self.forward.drop()

    def test_timeout(self):
        self.configure(policy=IMPATIENT)
        self.vanish()
        calls = []

        def work():
            calls.append(1)
            self.add()

        with self.assertRaises(ReconnectTimeout):
            transaction.manager.run(work)
        self.assertEqual(len(calls), 1)
        self.forward.accept()
        transaction.manager.run(work)
        self.assertEqual(self.names(), ["one"])

    def test_what_follows_a_timeout_is_not_committed(self):
        self.configure(policy=IMPATIENT)
        self.vanish()
        with self.assertRaises(ReconnectTimeout):
            self.add()
        self.forward.accept()
        with self.assertRaises(DisconnectionError):
            transaction.commit()

    def test_failing_fast(self):
        for two_phase in (False, True):
            self.configure(policy=FAIL_FAST)
            self.zstorm.set_default_tpc("main", two_phase)
            self.vanish()
            calls = []

            def work(calls=calls):
                calls.append(1)
                if len(calls) == 3:
                    self.forward.accept()
                self.add()

            transaction.manager.run(work)
            self.assertEqual(len(calls), 3)
            self.zstorm.remove(self.store)
        self.assertEqual(self.names(), ["one", "one"])

    def test_a_wrong_password(self):
        wrong = self.dsn.replace(self.server.password, "wrong")
        self.zstorm.set_default_uri("main", self.uri(wrong))
        for _ in range(2):
            with self.assertRaises(storm.exceptions.OperationalError) as caught:
                self.add()
            self.assertNotIsInstance(caught.exception, TransientError)
            transaction.abort()

    def test_a_silent_server(self):
        self.configure(response_timeout=2.0)
        self.add()
        self.forward.silence()
        with self.assertRaises(storm.exceptions.DisconnectionError):
            self.store.execute("SELECT 1")
        self.forward.drop()
        self.forward.resume()
        transaction.abort()
        self.assertEqual(self.store.find(Item).count(), 0)

    def test_the_orphan_of_the_lost_session_is_ended(self):
        """It holds a lock that the next transaction needs, which comes by another line."""
        other_line = PortForward(self.server.host, self.server.port)
        other_line.start()
        self.addCleanup(other_line.stop)
        lines = (self.forward, other_line)
        options = {
            "host": ",".join(line.host for line in lines),
            "port": ",".join(str(line.port) for line in lines),
            "user": self.server.user,
            "password": self.server.password,
        }
        dsn = "postgresql:postgres?" + "&".join(f"{name}={options[name]}" for name in options)
        self.zstorm.set_default_uri("main", self.uri(dsn, response_timeout=2.0))
        item = self.add()
        transaction.commit()
        item.name = "lost"
        self.store.flush()
        orphan = self.raw().driver_connection.info.backend_pid
        self.forward.silence()
        self.forward.refuse()
        with self.assertRaises(storm.exceptions.DisconnectionError):
            self.store.execute("SELECT 1")
        self.assertIn(orphan, self.sessions())
        transaction.abort()
        item.name = "two"
        transaction.commit()
        self.assertEqual(self.names(), ["two"])
        self.assertNotIn(orphan, self.sessions())


class LostCommitTests(StormTestCase):
    """zstorm sends COMMIT in tpc_finish."""

    def commit(self, prepare):
        Hook("a", tpc_finish=prepare)
        with self.events() as events, contextlib.suppress(DisconnectionError):
            transaction.commit()
        return [event.outcome for event in events if isinstance(event, CommitLookedUp)]

    def test_applied(self):
        for witness in ("xid", Ledger()):
            self.configure(witness=witness)
            item = self.add()
            Hook("a", tpc_finish=lambda: self.forward.cut("to_client", 0))
            with self.events() as events, self.assertNoLogs("txn", "CRITICAL"):
                transaction.commit()
            (looked_up,) = [each for each in events if isinstance(each, CommitLookedUp)]
            self.assertEqual(looked_up.outcome, "committed")
            self.assertEqual(item.name, "one")
            item.name = "two"
            transaction.commit()
            self.assertEqual(self.names(), ["two"])
            self.query("DELETE FROM item")
            self.zstorm.remove(self.store)

    def test_not_applied(self):
        for witness in ("xid", Ledger()):
            self.configure(witness=witness)
            calls = []

            def work(calls=calls):
                calls.append(1)
                self.add()
                if len(calls) == 1:
                    Hook("a", tpc_finish=lambda: self.forward.cut("to_server", 0))

            with self.assertLogs("txn", "CRITICAL"):
                transaction.manager.run(work)
            self.assertEqual(len(calls), 2)
            self.assertEqual(self.names(), ["one"])
            self.query("DELETE FROM item")
            self.zstorm.remove(self.store)

    def test_unknown(self):
        self.configure(witness=None)
        calls = []

        def work():
            calls.append(1)
            self.add()
            Hook("a", tpc_finish=lambda: self.forward.cut("to_client", 0))

        with self.assertRaises(CommitOutcomeUnknown), self.assertLogs("txn", "CRITICAL"):
            transaction.manager.run(work)
        self.assertEqual(len(calls), 1)
        self.assertEqual(self.names(), ["one"])
        self.add("two")
        transaction.commit()
        self.assertEqual(self.names(), ["one", "two"])

    def test_several_stores_in_one_phase(self):
        """What the first has committed stays so; the second's work is done again with it."""
        self.configure()
        self.zstorm.set_default_uri("other", self.uri())
        calls = []

        def work():
            calls.append(1)
            for name in ("main", "other"):
                self.zstorm.get(name).add(Item(name))
                self.zstorm.get(name).flush()
            if len(calls) == 1:
                first, _ = sorted(each.sortKey() for each in transaction.get()._resources)
                Hook(first + "!", tpc_finish=lambda: self.forward.cut("to_server", 0))

        with self.assertLogs("txn", "CRITICAL"):
            transaction.manager.run(work)
        self.assertEqual(len(calls), 2)
        self.assertEqual(sorted(Counter(self.names()).values()), [1, 2])


class WebTests(StormTestCase):
    """The request is run again by who runs requests again."""

    def setUp(self):
        super().setUp()
        self.configure()
        self.calls = 0

    def work(self):
        """Loses a statement, then COMMIT, and then nothing."""
        self.calls += 1
        self.add(f"call {self.calls}")
        if self.calls == 1:
            self.server.restart()
            self.store.execute("SELECT 1")
        if self.calls == 2:
            Hook("a", tpc_finish=lambda: self.forward.cut("to_server", 0))
        return str(self.calls)

    def check(self, body):
        self.assertEqual((body, self.calls), ("3", 3))
        self.assertEqual(self.names(), ["call 3"])

    def test_pyramid(self):
        # Its imports warn of what is deprecated elsewhere.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pyramid.config import Configurator
            from pyramid.request import Request
            from pyramid.response import Response
        with Configurator(settings={"retry.attempts": 3}) as config:
            config.include("pyramid_retry")
            config.include("pyramid_tm")
            config.add_view(lambda request: Response(self.work()))
        with self.assertLogs("txn", "CRITICAL"):
            self.check(Request.blank("/").get_response(config.make_wsgi_app()).text)

    def test_zope_publisher(self):
        class Publication(DefaultPublication):
            def afterCall(self, request, object):
                transaction.commit()

            def handleException(self, object, request, exc_info, retry_allowed=True):
                transaction.abort()
                raise exc_info[1]

        def sign():
            """The page."""
            return self.work()

        request = TestRequest(PATH_INFO="/sign")
        request.setPublication(Publication(SimpleNamespace(__doc__="The site.", sign=sign)))
        with self.assertLogs("txn", "CRITICAL"):
            self.check(publish(request).response.consumeBody().decode())


class PartsOfStormTests(StormTestCase):
    def test_debug_tracer(self):
        self.configure()
        stream = io.StringIO()
        tracer = DebugTracer(stream)
        install_tracer(tracer)
        self.addCleanup(remove_tracer, tracer)
        self.add()
        transaction.commit()
        self.lose()
        transaction.abort()
        for words in ("EXECUTE: 'INSERT", "DONE", "COMMIT", "ERROR: The connection to", "ROLLBACK"):
            self.assertIn(words, stream.getvalue())

    def test_timeout_tracer(self):
        class Tracer(PostgresTimeoutTracer):
            remaining = 60.0

            def get_remaining_time(self):
                return self.remaining

        tracer = Tracer()
        self.configure()
        install_tracer(tracer)
        self.addCleanup(remove_tracer, tracer)
        for _ in range(2):
            ((shown,),) = self.store.execute("SHOW statement_timeout").get_all()
            self.assertEqual(shown, "1min")
            tracer.remaining = 0.05
            transaction.abort()
            with self.assertRaises(storm.exceptions.TimeoutError):
                self.store.execute("SELECT pg_sleep(60)")
            transaction.abort()
            tracer.remaining = 0
            with self.assertRaises(storm.exceptions.TimeoutError):
                self.store.execute("SELECT 1")
            transaction.abort()
            tracer.remaining = 60.0
            self.lose()
            transaction.abort()

    def test_zcml(self):
        register()
        testing.setUp()
        self.addCleanup(testing.tearDown)
        self.addCleanup(global_zstorm._reset)
        self.addCleanup(transaction.abort)
        uri = self.dsn.replace("postgresql:", f"{SCHEME}:")
        xmlconfig.string(
            f"""<configure xmlns="http://namespaces.zope.org/zope">
              <include package="storm.zope" file="meta.zcml" />
              <include package="storm.zope" />
              <store name="main" uri="{uri}" />
            </configure>"""
        )
        self.zstorm = getUtility(IZStorm)
        self.assertIs(self.zstorm, global_zstorm)
        self.add()
        transaction.commit()
        self.server.restart()
        self.assertEqual(self.store.find(Item).count(), 1)

    def test_reset(self):
        self.configure()
        self.add()
        connection = self.raw()
        transaction.commit()
        self.zstorm._reset()
        self.assertEqual(connection.state, "closed")
        wait_until(lambda: not self.sessions())

    def test_blocked_access(self):
        self.configure()
        self.store._connection.block_access()
        with self.assertRaises(storm.exceptions.ConnectionBlockedError):
            self.add()
        self.store._connection.unblock_access()
        transaction.abort()

    def test_storm_throws_the_connection_away(self):
        """As programs do that make Storm reconnect."""
        self.configure()
        self.add()
        connection = self.store._connection
        connection._raw_connection.close()
        connection._raw_connection = None
        connection._state = storm.database.STATE_DISCONNECTED
        transaction.abort()
        self.add("two")
        transaction.commit()
        self.assertEqual(self.names(), ["two"])

    def test_threads(self):
        """Each has a store of its own, whose session ends with the thread."""
        self.configure()
        self.add()
        seen = []

        def work():
            self.add("of another thread")
            seen.append(self.raw().driver_connection.info.backend_pid)
            transaction.commit()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        gc.collect()
        transaction.commit()
        self.assertEqual(sorted(self.names()), ["of another thread", "one"])
        wait_until(lambda: seen[0] not in self.sessions())


class Side(Database):
    """One of two databases, the line to it, and its store."""

    def __init__(self, case, dbname):
        super().__init__(case.server, dbname)
        case.addCleanup(self.forward.stop)
        self.zstorm = case.zstorm

    def configure(self, case, **keywords):
        self.zstorm.set_default_uri(self.dbname, case.uri(self.forwarded_dsn, **keywords))
        self.zstorm.set_default_tpc(self.dbname, True)

    @property
    def store(self):
        return self.zstorm.get(self.dbname)

    def names(self):
        return [name for (name,) in self.query("SELECT name FROM item ORDER BY name")]

    def add(self, name="one"):
        self.store.add(Item(name))
        self.store.flush()

    def come_back(self):
        self.forward.cancel_cut()
        self.forward.accept()


class TwoPhaseTestCase(StormTestCase):
    """``self.deciding`` and ``self.other`` are the two sides of the transaction under way."""

    def setUp(self):
        super().setUp()
        make_databases(self.server, "id serial PRIMARY KEY, name text")
        self.sides = [Side(self, dbname) for dbname in DATABASES]
        self.addCleanup(transaction.abort)

    def configure(self, **keywords):
        for side in self.sides:
            side.configure(self, **keywords)

    def add(self, name="one"):
        for side in self.sides:
            side.add(name)
        managers = sorted(transaction.get()._resources, key=lambda each: each.sortKey())
        sides = {side.store: side for side in self.sides}
        self.deciding, self.other = (sides[each._store] for each in managers)
        self.between = managers[0].sortKey() + "!"

    def before_prepare(self, function):
        Hook("a", commit=function)

    def between_prepares(self, function):
        Hook(self.between, commit=function)

    def before_commit(self, function):
        Hook("a", tpc_finish=function)

    def between_commits(self, function):
        Hook(self.between, tpc_finish=function)

    def check(self, *names):
        for side in self.sides:
            self.assertEqual(side.names(), list(names))
            self.assertEqual(side.prepared(), 0)

    def recover(self):
        dsns = [side.dsn for side in self.sides]
        settled = recover(*dsns, older_than=0, settle=True)
        self.assertTrue(all(each.settled for each in settled), settled)
        return [each.decision for each in settled]


@with_time_to_connect
class TwoPhaseTests(TwoPhaseTestCase):
    def test_commit_and_abort(self):
        self.configure()
        for name in ("one", "two"):
            self.add(name)
            prepared = []
            self.before_commit(
                lambda seen=prepared: seen.extend(side.prepared() for side in self.sides)
            )
            transaction.commit()
            self.assertEqual(prepared, [1, 1])
        self.add("three")
        transaction.abort()
        self.check("one", "two")

    def test_a_store_that_is_not_used(self):
        self.configure()
        self.sides[0].add()
        transaction.commit()
        self.assertEqual([side.names() for side in self.sides], [["one"], []])

    def test_a_store_without_a_statement(self):
        """It joins the transaction when an object is added, and begins none when it is removed."""
        self.configure()
        store = self.sides[0].store
        item = store.add(Item("one"))
        store.remove(item)
        transaction.commit()
        self.check()

    def test_another_data_manager_refuses(self):
        self.configure()

        def refuse():
            raise LookupError

        self.add()
        Hook("zzz", tpc_vote=refuse)
        with self.assertRaises(LookupError):
            transaction.commit()
        transaction.abort()
        self.check()
        self.add()
        transaction.commit()
        self.check("one")

    def test_run_runs_again(self):
        """Whatever is lost before the decision, and however often."""
        for witness in ("xid", Ledger()):
            self.configure(witness=witness)
            losses = iter(
                (
                    lambda: self.other.forward.drop(),
                    lambda: self.before_prepare(lambda: self.deciding.lose_request()),
                    lambda: self.between_prepares(lambda: self.other.lose_request()),
                    lambda: self.between_prepares(self.server.restart),
                )
            )
            calls = []

            def work(losses=losses, calls=calls):
                calls.append(1)
                self.add()
                next(losses, lambda: None)()

            transaction.manager.run(work, 5)
            self.assertEqual(len(calls), 5)
            self.check("one")
            for side in self.sides:
                side.query("DELETE FROM item")
                self.zstorm.remove(side.store)

    def test_losses_that_are_no_losses(self):
        """What was prepared, or is decided, is committed, on new sessions."""
        for lose in (
            lambda: self.between_prepares(self.other.lose_answer),
            lambda: self.between_prepares(self.deciding.forward.drop),
            lambda: self.before_commit(self.deciding.lose_request),
            lambda: self.before_commit(self.deciding.lose_answer),
            lambda: self.before_commit(self.server.restart),
            lambda: self.between_commits(self.other.lose_request),
            lambda: self.between_commits(self.other.lose_answer),
            lambda: self.between_commits(self.server.restart),
        ):
            self.configure()
            self.add()
            lose()
            transaction.commit()
            self.check("one")
            for side in self.sides:
                side.query("DELETE FROM item")
                self.zstorm.remove(side.store)

    def test_the_decision_is_not_known(self):
        self.configure(policy=IMPATIENT)
        calls = []

        def work():
            calls.append(1)
            self.add()
            self.before_commit(lambda: self.deciding.lose_answer(then=self.deciding.vanish))

        with (
            self.assertLogs("zreconnect", "ERROR"),
            self.assertLogs("txn", "CRITICAL"),
            self.assertRaisesRegex(CommitOutcomeUnknown, "zreconnect recover"),
        ):
            transaction.manager.run(work)
        self.assertEqual(len(calls), 1)
        self.assertEqual((self.deciding.names(), self.other.names()), (["one"], []))
        self.deciding.come_back()
        self.assertEqual(self.recover(), ["commit"])
        self.check("one")
        self.add("two")
        transaction.commit()
        self.check("one", "two")

    def test_the_other_cannot_be_reached(self):
        self.configure(policy=IMPATIENT)
        self.add()
        self.between_commits(self.other.vanish)
        with self.assertLogs("zreconnect", "ERROR") as logs:
            transaction.commit()
        self.assertIn("although the transaction is committed", "".join(logs.output))
        self.assertEqual((self.deciding.names(), self.other.prepared()), (["one"], 1))
        self.other.come_back()
        self.assertEqual(self.recover(), ["commit"])
        self.check("one")

    def test_one_store_in_one_phase(self):
        """zstorm commits it first, so that it decides."""
        # It has nothing to ask for before COMMIT.
        self.configure(witness=Ledger())
        alone, _ = self.sides
        self.zstorm.set_default_tpc(alone.dbname, False)
        for lose, runs in ((alone.lose_request, 2), (alone.lose_answer, 1)):
            calls = []

            def work(calls=calls, lose=lose):
                calls.append(1)
                self.add()
                self.assertIs(self.deciding, alone)
                if len(calls) == 1:
                    self.before_commit(lose)

            transaction.manager.run(work)
            self.assertEqual(len(calls), runs)
            self.check("one")
            for side in self.sides:
                side.query("DELETE FROM item")

    def test_an_error_after_the_decision(self):
        """`transaction` aborts the other store, which is committed all the same."""
        self.configure()

        def fail():
            raise LookupError

        self.add()
        self.between_commits(fail)
        with self.assertRaises(LookupError), self.assertLogs("txn", "CRITICAL"):
            transaction.commit()
        transaction.abort()
        self.check("one")

    def test_every_so_many_bytes(self):
        """A cut anywhere: both or neither, after recover() at the latest."""
        self.configure(policy=RetryPolicy(timeout=PATIENCE), witness=Ledger())
        self.add()
        transaction.commit()
        seen = Counter()
        for side, direction in itertools.product(self.sides, ("to_server", "to_client")):
            for after in itertools.count(step=67):
                for each in self.sides:
                    each.query("DELETE FROM item")
                cut = side.forward.cut(direction, after, reset=bool(after % 2))
                calls = []

                def work(calls=calls):
                    calls.append(1)
                    self.add()

                transaction.manager.run(work)
                happened = cut.happened
                side.forward.cancel_cut()
                self.assertEqual(self.recover(), [])
                self.check("one")
                seen[len(calls)] += 1
                if not happened:
                    break
        self.assertEqual(set(seen), {1, 2}, seen)

    def test_a_process_that_dies(self):
        """recover() settles what it has left, by what the deciding store has done."""
        for phase, decisions in (
            ("commit", ["rollback"]),
            ("tpc_vote", ["rollback", "rollback"]),
            ("tpc_finish", ["commit"]),
        ):
            dsns = [side.dsn for side in self.sides]
            child = subprocess.run(
                [sys.executable, "-c", DYING_PROGRAM, phase, *dsns],
                check=False,
                env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
            )
            self.assertEqual(child.returncode, -signal.SIGKILL)
            wait_until(lambda: not self.sessions())
            self.assertEqual(self.recover(), decisions)
            self.check(*(["one"] if "commit" in decisions else []))


class TwoPhaseOfAStoreTests(TwoPhaseTestCase):
    """Storm's own methods, without zstorm."""

    def setUp(self):
        super().setUp()
        self.configure()
        self.stores = [Store(self.zstorm._get_database(uri)) for uri in self.uris()]
        for store in self.stores:
            self.addCleanup(store.close)

    def uris(self):
        uris = dict(self.zstorm.get_default_uris())
        return [uris[side.dbname] for side in self.sides]

    def begin(self, global_id=None):
        global_id = global_id or uuid.uuid4().hex
        for number, store in enumerate(self.stores):
            store.begin(Xid(0, global_id, str(number)))
            store.add(Item("one"))
            store.flush()

    def test_commit(self):
        self.begin()
        for store in self.stores:
            store.prepare()
        for store in self.stores:
            store.commit()
        self.check("one")

    def test_rollback(self):
        self.begin()
        for store in self.stores:
            store.rollback()
        self.begin()
        for store in self.stores:
            store.prepare()
        for store in self.stores:
            store.rollback()
        self.check()

    def test_the_same_id_again(self):
        """It may be given again as soon as nothing is under way with it."""
        for ends, names in (("commit", ["one"]), ("rollback", ["one"]), ("commit", ["one", "one"])):
            self.begin("the same")
            for store in self.stores:
                store.prepare()
            for store in self.stores:
                getattr(store, ends)()
            self.check(*names)

    def test_a_process_that_is_forked_has_parts_of_its_own(self):
        """Also while another thread is about to begin one."""
        (first, second) = self.stores
        first.begin(Xid(0, "the same", "1"))
        first.add(Item("parent's"))
        first.flush()
        first.prepare()

        def work(child):
            second.begin(Xid(0, "the same", "2"))
            second.add(Item("child's"))
            second.flush()
            second.prepare()
            # Of two, it would not be the one that decides.
            second.commit()
            second.close()

        is_held, has_forked = threading.Event(), threading.Event()

        def hold():
            with integrations_storm._lock:
                is_held.set()
                has_forked.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        is_held.wait()
        try:
            Child(self, work).join()
        finally:
            has_forked.set()
            holder.join()
        first.rollback()
        self.assertEqual([side.names() for side in self.sides], [[], ["child's"]])

    def test_a_store_that_begins_anew_is_part_of_what_goes_on(self):
        self.begin("the same")
        anew = self.stores[1]
        anew.rollback()
        anew.begin(Xid(0, "the same", "1"))
        anew.add(Item("one"))
        anew.flush()
        for store in self.stores:
            store.prepare()
        with self.assertRaisesRegex(storm.exceptions.ProgrammingError, "prepared first"):
            anew.commit()
        for store in self.stores:
            store.commit()
        self.check("one")

    def test_commit_without_prepare(self):
        self.begin()
        self.sides[0].lose_answer()
        for store in self.stores:
            store.commit()
        self.check("one")

    def test_the_order_of_commits(self):
        self.begin()
        for store in self.stores:
            store.prepare()
        with self.assertRaisesRegex(storm.exceptions.ProgrammingError, "prepared first"):
            self.stores[1].commit()
        for store in self.stores:
            store.commit()
        self.check("one")

    def test_what_cannot_be_begun(self):
        (store, _) = self.stores
        connection = self.raw(store)
        for use in (connection.tpc_prepare, connection.tpc_commit, connection.tpc_rollback):
            with self.assertRaisesRegex(psycopg2.ProgrammingError, "was not called"):
                use()
        connection.tpc_begin(connection.xid(0, "one", ""))
        with self.assertRaisesRegex(psycopg2.ProgrammingError, "was called already"):
            connection.tpc_begin(connection.xid(0, "two", ""))
        connection.tpc_rollback()
        store.execute("SELECT 1")
        with self.assertRaisesRegex(storm.exceptions.ProgrammingError, "inside a transaction"):
            store.begin(Xid(0, "one", ""))

    def test_recovery_by_hand(self):
        """Storm's own way to end what others have prepared, and ours."""
        self.begin()
        self.stores[0].prepare()
        with contextlib.closing(psycopg2.connect(self.sides[0].dsn)) as plain:
            plain.tpc_begin(plain.xid(0, "of another", "program"))
            with plain.cursor() as cursor:
                cursor.execute("INSERT INTO item (name) VALUES ('two')")
            plain.tpc_prepare()
        recovering = Store(self.zstorm._get_database(self.uris()[0]))._connection
        self.addCleanup(recovering.close)
        found = {xid.global_transaction_id: xid for xid in recovering.recover()}
        recovering.commit(found.pop("of another"))
        (ours,) = found.values()
        self.assertTrue(ours.global_transaction_id.startswith("zreconnect:"))
        recovering.rollback(ours)
        self.assertEqual(self.sides[0].names(), ["two"])
        self.assertEqual(self.sides[0].prepared(), 0)


# Adds an item in both databases, and dies while they are committed.
DYING_PROGRAM = """
import os, signal, sys
import transaction
from storm.zope.zstorm import ZStorm
from zreconnect.integrations.storm import register

class Death:
    def sortKey(self):
        return key

    def tpc_begin(self, transaction):
        pass

    commit = tpc_vote = tpc_finish = tpc_begin

setattr(Death, sys.argv[1], lambda self, transaction: os.kill(os.getpid(), signal.SIGKILL))
register()
zstorm = ZStorm()
for dsn in sys.argv[2:]:
    zstorm.set_default_uri(dsn, dsn.replace("postgresql:", "reconnecting-postgres:"))
    zstorm.set_default_tpc(dsn, True)
    zstorm.get(dsn).execute("INSERT INTO item (name) VALUES ('one')")
key = min(each.sortKey() for each in transaction.get()._resources) + "!"
transaction.get().join(Death())
transaction.commit()
"""


class RestartTests(SurvivesRestarts, StormTestCase):
    def test_fifty_restarts(self):
        self.configure(policy=RetryPolicy(timeout=PATIENCE), witness=Ledger())
        own = threading.local()

        def work(number):
            # An object that lives through all restarts, and a new one.
            own.counter.name = str(int(own.counter.name) + 1)
            self.store.flush()
            self.store.add(Item(f"unit {number}"))

        def unit(number):
            if not hasattr(own, "counter"):
                own.counter = transaction.manager.run(lambda: self.store.add(Item("0")), ATTEMPTS)
            transaction.manager.run(lambda: work(number), ATTEMPTS)

        def applied():
            return [int(name.split()[1]) for name in self.names() if name.startswith("unit")]

        self.survive(unit, threads=3, applied=applied)
        counts = [int(name) for name in self.names() if name.isdigit()]
        self.assertEqual((len(counts), sum(counts)), (3, len(applied())))
