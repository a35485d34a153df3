"""retry_on_disconnect: a function runs again until it succeeds, time is up, or it may be done."""

import contextlib
import contextvars
import inspect
import logging
import os
import subprocess
import sys
import threading
import unittest
from contextlib import closing
from functools import partial

import psycopg2
import sqlalchemy
import transaction
from sqlalchemy import text
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.orm import Session
from zope.interface.verify import verifyObject

from zreconnect import (
    FAIL_FAST,
    CommitOutcomeUnknown,
    DisconnectionError,
    Ledger,
    ReconnectTimeout,
    initZopeless,
    retry_on_disconnect,
)
from zreconnect.drivers.base import load_driver
from zreconnect.events import GaveUpRunning, RunAgain
from zreconnect.interfaces import IRetryOnDisconnect
from zreconnect.testing import no_waiting
from zreconnect.tests.base import DatabaseTestCase, policy_of, wait_until
from zreconnect.tests.test_sqlalchemy import LAYER, Item

# No test waits for an interval.
SOON = {"timeout": 60, "min_interval": 0, "max_interval": 0.01, "increment": 0.001}


class RetryTestCase(DatabaseTestCase):
    layer = LAYER

    def setUp(self):
        super().setUp()
        self.make_table()
        self.runs = 0
        self.witness = "xid"

    def make_connection(self, **keywords):
        return self.connect(**{"witness": self.witness, **keywords})

    def adder(self, connection, accident=lambda: None, **keywords):
        """A decorated function that inserts a name, and meets an accident in its first run."""

        @retry_on_disconnect(**{**SOON, **keywords})
        def add(name):
            self.runs += 1
            with connection.transaction() as cursor:
                cursor.execute("INSERT INTO item VALUES (%s)", (name,))
                if self.runs == 1:
                    accident()
            return name

        return add

    def raises(self, error_type, function, *args):
        with self.assertRaises(error_type) as caught:
            function(*args)
        return caught.exception


class NoFunctionTests(DatabaseTestCase):
    """What is refused by all that runs functions."""

    def runners(self):
        connection = self.connect()
        ztm = initZopeless(self.dsn, implicitBegin=False)
        self.addCleanup(ztm.uninstall)
        return [retry_on_disconnect(), connection.run, connection.transactional(), ztm.run]

    def test_what_returns_before_it_has_done_its_work(self):
        def generator():
            yield

        async def coroutine():
            pass

        async def asynchronous_generator():
            yield

        for runner in self.runners():
            for function in (generator, coroutine, asynchronous_generator):
                with self.assertRaisesRegex(TypeError, "returns before it has done its work"):
                    runner(function)

    def test_what_cannot_be_called(self):
        for runner in self.runners():
            with self.assertRaisesRegex(TypeError, "function is to be run|must be callable"):
                runner("text")


class FunctionTests(RetryTestCase):
    def test_it_returns_what_the_function_returns(self):
        self.assertEqual(self.adder(self.make_connection())("a"), "a")
        self.assertEqual((self.runs, self.names()), (1, ["a"]))

    def test_a_lost_statement(self):
        connection = self.make_connection()

        def lose():
            self.forward.drop()
            connection.cursor().execute("SELECT 1")

        self.assertEqual(self.adder(connection, lose)("a"), "a")
        self.assertEqual((self.runs, self.names()), (2, ["a"]))

    def test_a_lost_statement_whose_error_is_caught(self):
        connection = self.make_connection()

        def lose():
            self.forward.drop()
            with contextlib.suppress(psycopg2.Error):
                connection.cursor().execute("SELECT 1")

        self.assertEqual(self.adder(connection, lose)("a"), "a")
        self.assertEqual((self.runs, self.names()), (2, ["a"]))

    def test_a_loss_before_the_run(self):
        """Half of a transaction would be committed without the other half."""
        connection = self.make_connection()

        @retry_on_disconnect(**SOON)
        def second_half():
            self.runs += 1
            try:
                connection.cursor().execute("INSERT INTO item VALUES ('b')")
                connection.commit()
            except psycopg2.Error:
                connection.rollback()
                raise

        connection.cursor().execute("INSERT INTO item VALUES ('a')")
        self.forward.drop()
        with contextlib.suppress(psycopg2.Error):
            connection.cursor().execute("SELECT 1")
        self.raises(DisconnectionError, second_half)
        self.assertEqual((self.runs, self.names()), (1, []))

    def test_a_restart_in_each_of_some_runs(self):
        connection = self.make_connection(policy=FAIL_FAST)
        restarts = 0

        @retry_on_disconnect(**SOON)
        def add(name):
            nonlocal restarts
            with connection.transaction() as cursor:
                cursor.execute("INSERT INTO item VALUES (%s)", (name,))
                if restarts < 3:
                    restarts += 1
                    self.server.restart()
                    cursor.execute("SELECT 1")

        add("a")
        self.assertEqual((restarts, self.names()), (3, ["a"]))

    def test_a_server_that_is_down_for_a_while(self):
        for policy, error_type in [
            ({"timeout": 2, "attempts": 1}, DisconnectionError),
            ({"timeout": 0}, ReconnectTimeout),
        ]:
            self.query("DELETE FROM item")
            connection = self.make_connection()
            self.forward.refuse()
            self.forward.drop()
            with self.events() as seen:
                thread = threading.Thread(target=self.adder(connection), args=["a"])
                with policy_of(connection, **policy):
                    thread.start()
                    wait_until(lambda: sum(isinstance(event, RunAgain) for event in seen) > 2)
                self.forward.accept()
                thread.join()
            self.assertEqual(self.names(), ["a"])
            again = [event for event in seen if isinstance(event, RunAgain)]
            self.assertIsInstance(again[0].error, error_type)
            self.assertEqual([event.runs for event in again][:3], [1, 2, 3])
            connection.close()

    def test_other_errors_are_raised_at_once(self):
        connection = self.make_connection()

        def fail(statement):
            return self.raises(
                psycopg2.Error,
                self.adder(connection, lambda: connection.cursor().execute(statement)),
                "a",
            )

        for statement in ("SELECT 1/0", "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"):
            self.runs = 0
            fail(statement)
            self.assertEqual((self.runs, self.names()), (1, []))

    def test_errors_of_a_plain_connection_are_raised_at_once(self):
        @retry_on_disconnect(idempotent=True, **SOON)
        def add():
            self.runs += 1
            with closing(psycopg2.connect(self.dsn)) as plain:
                self.forward.drop()
                plain.cursor().execute("SELECT 1")

        self.raises(psycopg2.OperationalError, add)
        self.assertEqual(self.runs, 1)

    def test_a_commit_that_is_a_statement_counts(self):
        other, connection = self.make_connection(), self.make_connection()

        @retry_on_disconnect(**SOON)
        def add():
            self.runs += 1
            other.cursor().execute("INSERT INTO item VALUES (%s)", (str(self.runs),))
            other.cursor().execute("COMMIT")
            connection.cursor().execute("SELECT 1")
            self.forward.drop()
            try:
                connection.cursor().execute("SELECT 1")
            finally:
                connection.rollback()

        self.raises(DisconnectionError, add)
        self.assertEqual((self.runs, self.names()), (1, ["1"]))

    def test_run_inside_has_its_own_attempts(self):
        connection = self.make_connection()

        @retry_on_disconnect(**SOON)
        def add():
            def work():
                self.runs += 1
                if self.runs < 3:
                    self.forward.drop()
                connection.cursor().execute("INSERT INTO item VALUES ('a')")

            connection.run(work, attempts=2)

        add()
        self.assertEqual((self.runs, self.names()), (3, ["a"]))


class LostCommitTests(RetryTestCase):
    """The line is cut at every byte of COMMIT, or of its answer."""

    def sweep(self, connection, direction, idempotent=False):
        """Cut at each byte; yields the name that was inserted then, and what the call raised."""
        for after in range(self.bytes_of_commit(connection, direction)):
            self.runs = 0
            name, raised = f"{direction} {after}", None
            cut = partial(self.forward.cut, direction, after)
            try:
                self.adder(connection, cut, idempotent=idempotent)(name)
            except CommitOutcomeUnknown as error:
                raised = error
            self.assertFalse(self.forward.cancel_cut())
            yield name, raised

    def bytes_of_commit(self, connection, direction):
        counts = []
        self.runs = 0
        self.adder(connection, lambda: counts.append(self.forward.count()))("count")
        self.query("DELETE FROM item")
        return getattr(self.forward.count() - counts[0], f"bytes_{direction}")

    def test_with_a_witness_it_is_there_once(self):
        for witness in ("xid", Ledger()):
            self.witness = witness
            connection = self.make_connection()
            for direction, runs in [("to_client", 1), ("to_server", 2)]:
                names = []
                for name, raised in self.sweep(connection, direction):
                    self.assertIsNone(raised)
                    self.assertEqual(self.runs, runs)
                    names.append(name)
                self.assertEqual(sorted(names), self.names())

    def test_an_unknown_outcome_is_raised(self):
        connection = self.make_connection(witness=None)
        for direction in ("to_client", "to_server"):
            for _, raised in self.sweep(connection, direction):
                self.assertIsNotNone(raised)
                self.assertEqual(self.runs, 1)

    def test_an_idempotent_function_runs_again(self):
        self.query("ALTER TABLE item DROP CONSTRAINT item_pkey")
        connection = self.make_connection(witness=None)
        for direction, times in [("to_client", 2), ("to_server", 1)]:
            for name, raised in self.sweep(connection, direction, idempotent=True):
                self.assertIsNone(raised)
                self.assertEqual(self.runs, 2)
                # This one is not what it claims to be.
                self.assertEqual(self.names().count(name), times)


class CommittedBeforeTests(RetryTestCase):
    """A loss after a commit of the same call."""

    def call(self, commit, lose, **keywords):
        @retry_on_disconnect(**{**SOON, **keywords})
        def function():
            self.runs += 1
            commit()
            lose()

        return function

    def assert_runs_once(self, commit, lose):
        """Once; and twice, if it is idempotent."""
        with self.events() as seen:
            self.raises(DisconnectionError, self.call(commit, lose))
        self.assertEqual(self.runs, 1)
        (gave_up,) = (event for event in seen if isinstance(event, GaveUpRunning))
        self.assertIn("may have committed something, and is not idempotent", str(gave_up))
        self.runs = 0
        self.call(commit, lose, idempotent=True)()
        self.assertEqual(self.runs, 2)

    def setUp(self):
        super().setUp()
        self.connection = self.make_connection()
        self.other = self.make_connection()

    def lose(self):
        with self.other.transaction() as cursor:
            if self.runs == 1:
                self.forward.drop()
            cursor.execute("SELECT 1")

    def test_a_transaction(self):
        def commit():
            with self.connection.transaction() as cursor:
                cursor.execute("SELECT 1")

        self.assert_runs_once(commit, self.lose)

    def test_a_unit_of_work(self):
        self.assert_runs_once(lambda: self.connection.run(int), self.lose)

    def test_a_commit_that_was_looked_up(self):
        def commit():
            with self.connection.transaction() as cursor:
                cursor.execute("INSERT INTO item VALUES (%s)", (str(self.runs),))
                self.forward.cut("to_client", 0)
            self.query("DELETE FROM item")

        self.assert_runs_once(commit, self.lose)

    def test_autocommit(self):
        self.connection.autocommit = True
        self.assert_runs_once(lambda: self.connection.execute("SELECT 1"), self.lose)

    def test_transaction_manager(self):
        ztm = initZopeless(self.dsn, implicitBegin=False)
        self.addCleanup(ztm.uninstall)

        def commit():
            ztm.begin()
            ztm.cursor().execute("SELECT 1")
            transaction.commit()

        self.assert_runs_once(commit, self.lose)

    def test_two_phases(self):
        connection = self.make_connection(two_phase=True)

        def commit():
            connection.execute("INSERT INTO item VALUES (%s)", (str(self.runs),))
            transaction.commit()
            self.query("DELETE FROM item")

        self.assert_runs_once(commit, self.lose)

    def test_what_was_rolled_back_does_not_count(self):
        def roll_back():
            self.connection.execute("INSERT INTO item VALUES ('a')")
            self.connection.rollback()

        self.call(roll_back, self.lose)()
        self.assertEqual(self.runs, 2)

    def test_each_run_is_counted_for_itself(self):
        """A commit of an earlier call is no commit of this one."""
        self.call(lambda: self.connection.run(int), lambda: None)()
        self.runs = 0
        self.call(lambda: None, self.lose)()
        self.assertEqual(self.runs, 2)


class NestedTests(RetryTestCase):
    def test_the_outermost_call_runs_again(self):
        connection = self.make_connection()
        outer_runs = 0

        @retry_on_disconnect(**SOON)
        def inner():
            self.runs += 1
            connection.cursor().execute("SELECT 1")

        @retry_on_disconnect(**SOON)
        def outer():
            nonlocal outer_runs
            outer_runs += 1
            with connection.transaction() as cursor:
                cursor.execute("INSERT INTO item VALUES ('a')")
                if outer_runs == 1:
                    self.forward.drop()
                inner()

        outer()
        self.assertEqual((outer_runs, self.runs, self.names()), (2, 2, ["a"]))

    def test_afterwards_it_retries_by_itself_again(self):
        connection = self.make_connection()
        add = self.adder(connection, lambda: self.forward.drop() and connection.execute("SELECT 1"))
        retry_on_disconnect(**SOON)(lambda: None)()
        add("a")
        self.assertEqual(self.runs, 2)

    def test_what_it_has_started_retries_by_itself_when_it_has_ended(self):
        """As the tasks of asyncio do, which go on in a copy of the context."""
        connection = self.make_connection()
        add = self.adder(connection, lambda: self.forward.drop() and connection.execute("SELECT 1"))
        retry_on_disconnect(**SOON)(contextvars.copy_context)().run(add, "a")
        self.assertEqual((self.runs, self.names()), (2, ["a"]))

    def test_the_commits_of_the_inner_one_count(self):
        connection, other = self.make_connection(), self.make_connection()
        add = self.adder(connection)

        @retry_on_disconnect(**SOON)
        def outer():
            add("a")
            with other.transaction() as cursor:
                self.forward.drop()
                cursor.execute("SELECT 1")

        self.raises(DisconnectionError, outer)
        self.assertEqual((self.runs, self.names()), (1, ["a"]))

    def test_in_the_transaction_of_somebody_else(self):
        """Its owner has to abort it before anything can succeed."""
        ztm = initZopeless(self.dsn, implicitBegin=False)
        self.addCleanup(ztm.uninstall)

        @retry_on_disconnect(**SOON)
        def add():
            self.runs += 1
            if self.runs == 1:
                self.forward.drop()
            ztm.cursor().execute("INSERT INTO item VALUES ('a')")

        units = []

        def unit_of_work():
            units.append(self.runs)
            add()

        ztm.run(unit_of_work)
        self.assertEqual(units, [0, 2])
        self.assertEqual(self.names(), ["a"])


class TimeTests(RetryTestCase):
    def lose_always(self, **keywords):
        """Call a function that always loses its connection; what it raised, and the events."""
        connection = self.make_connection()

        @retry_on_disconnect(**keywords)
        def lose():
            with connection.transaction() as cursor:
                self.forward.drop()
                cursor.execute("SELECT 1")

        with self.events() as seen:
            error = self.raises(DisconnectionError, lose)
        return error, [event for event in seen if isinstance(event, (RunAgain, GaveUpRunning))]

    def test_no_time(self):
        error, (gave_up,) = self.lose_always(timeout=0)
        self.assertIs(gave_up.error, error)
        self.assertEqual(gave_up.runs, 1)
        self.assertRegex(str(gave_up), r"lose was run once in .* not run again: the time is up$")

    def test_intervals_grow_to_the_maximum(self):
        connection = self.make_connection()
        intervals = {"min_interval": 0.001, "max_interval": 0.005, "increment": 0.003}

        @retry_on_disconnect(**{**SOON, **intervals})
        def lose():
            self.runs += 1
            with connection.transaction() as cursor:
                if self.runs < 5:
                    self.forward.drop()
                cursor.execute("SELECT 1")

        with self.events() as seen, self.assertLogs("zreconnect", logging.WARNING) as log:
            lose()
        again = [event for event in seen if isinstance(event, RunAgain)]
        self.assertEqual([event.runs for event in again], [1, 2, 3, 4])
        self.assertEqual([event.pause for event in again], [0.001, 0.004, 0.005, 0.005])
        for event in again:
            self.assertIn("grow_to_the_maximum.<locals>.lose failed after", str(event))
            self.assertIn(f"WARNING:zreconnect:{event}", log.output)

    def test_the_last_run_begins_when_the_time_is_up(self):
        with self.assertLogs("zreconnect", logging.ERROR) as log, no_waiting():
            error, (again, gave_up) = self.lose_always(
                timeout=600, min_interval=6000, max_interval=6000
            )
        self.assertAlmostEqual(again.seconds + again.pause, 600)
        self.assertIs(gave_up.error, error)
        self.assertEqual(gave_up.runs, 2)
        self.assertIn(f"ERROR:zreconnect:{gave_up}", log.output)
        self.assertEqual(getattr(error, "__notes__", [str(gave_up)]), [str(gave_up)])

    def test_for_ever(self):
        connection = self.make_connection(policy=FAIL_FAST)
        self.forward.refuse()
        add = self.adder(connection, timeout=None)
        with self.events() as seen:
            thread = threading.Thread(target=add, args=["a"])
            thread.start()
            wait_until(lambda: sum(isinstance(event, RunAgain) for event in seen) > 3)
            self.forward.accept()
            thread.join()
        self.assertEqual(self.names(), ["a"])


class DialectWithoutAdapters(PGDialect_psycopg2):
    """One that hands its connections to no C function of psycopg2's."""

    supports_statement_cache = True

    def on_connect(self):
        return None


sqlalchemy.dialects.registry.register(
    "postgresql.without_adapters", __name__, DialectWithoutAdapters.__name__
)


class SQLAlchemyTests(RetryTestCase):
    """Engines that zreconnect does not serve."""

    def engines(self, *drivers, **keywords):
        for driver in drivers or ("psycopg2", "psycopg"):
            with self.subTest(driver):
                self.query("DELETE FROM item")
                self.runs = 0
                url = self.dsn.replace("postgresql:", f"postgresql+{driver}:")
                engine = sqlalchemy.create_engine(url, **keywords)
                try:
                    yield engine
                finally:
                    engine.dispose()
                    self.forward.cancel_cut()

    def adder(self, engine, accident=lambda connection: None, **keywords):
        @retry_on_disconnect(**{**SOON, **keywords})
        def add(name):
            self.runs += 1
            with engine.begin() as connection:
                connection.execute(text("INSERT INTO item VALUES (:name)"), {"name": name})
                if self.runs == 1:
                    accident(connection)
            return name

        return add

    def test_a_lost_statement(self):
        def lose(connection):
            self.forward.drop()
            connection.execute(text("SELECT 1"))

        for engine in self.engines():
            self.adder(engine, lose)("a")
            self.assertEqual((self.runs, self.names()), (2, ["a"]))

    def test_lost_rows(self):
        def lose(connection):
            rows = connection.execution_options(yield_per=10).execute(
                text("SELECT repeat('x', 1000) FROM generate_series(1, 100000)")
            )
            self.forward.drop()
            list(rows)

        # With psycopg, SQLAlchemy leaves a cursor open, which psycopg complains of.
        for engine in self.engines("psycopg2"):
            self.adder(engine, lose)("a")
            self.assertEqual((self.runs, self.names()), (2, ["a"]))

    def test_a_connection_that_was_lost_while_idle(self):
        for engine in self.engines():
            self.adder(engine)("a")
            self.server.restart()
            self.adder(engine)("b")
            self.assertEqual((self.runs, self.names()), (3, ["a", "b"]))

    def test_a_connection_that_is_refused_for_a_while(self):
        for engine in self.engines():
            self.forward.refuse()
            with self.events() as seen:
                thread = threading.Thread(target=self.adder(engine), args=["a"])
                thread.start()
                wait_until(lambda: len(seen) > 2)
                self.forward.accept()
                thread.join()
            self.assertEqual(self.names(), ["a"])

    def test_a_connection_that_is_cut_while_it_is_made(self):
        for engine in self.engines():
            self.forward.cut("to_client", 3)
            self.adder(engine)("a")
            self.assertEqual((self.runs, self.names()), (2, ["a"]))

    def test_a_connection_that_is_refused_for_good(self):
        self.dsn += "_misspelt"
        for engine in self.engines():
            self.raises(sqlalchemy.exc.OperationalError, self.adder(engine), "a")
            self.assertEqual(self.runs, 1)

    def cutter(self, direction):
        return lambda connection: self.forward.cut(direction, 0)

    def test_a_database_without_sessions(self):
        engine = sqlalchemy.create_engine("sqlite:////no/such/directory/file")
        self.raises(sqlalchemy.exc.OperationalError, self.adder(engine), "a")

    def test_a_lost_commit_is_unknown(self):
        for direction, names in [("to_client", ["a"]), ("to_server", [])]:
            for engine in self.engines():
                add = self.adder(engine, self.cutter(direction))
                error = self.raises(sqlalchemy.exc.OperationalError, add, "a")
                self.assertTrue(error.connection_invalidated)
                self.assertEqual((self.runs, self.names()), (1, names))

    def test_a_lost_commit_of_an_idempotent_function(self):
        self.query("ALTER TABLE item DROP CONSTRAINT item_pkey")
        for direction, names in [("to_client", ["a", "a"]), ("to_server", ["a"])]:
            for engine in self.engines():
                self.adder(engine, self.cutter(direction), idempotent=True)("a")
                self.assertEqual((self.runs, self.names()), (2, names))

    def test_a_statement_in_autocommit_mode_is_unknown(self):
        def add(engine):
            self.runs += 1
            with engine.connect() as connection:
                connection.execute(text("SELECT 1"))
                if self.runs == 1:
                    self.forward.cut("to_client", 0)
                connection.execute(text("INSERT INTO item VALUES ('a') ON CONFLICT DO NOTHING"))

        for engine in self.engines(isolation_level="AUTOCOMMIT"):
            add_once = retry_on_disconnect(**SOON)(add)
            self.raises(sqlalchemy.exc.OperationalError, add_once, engine)
            self.assertEqual((self.runs, self.names()), (1, ["a"]))
            self.runs = 0
            retry_on_disconnect(idempotent=True, **SOON)(add)(engine)
            self.assertEqual((self.runs, self.names()), (2, ["a"]))

    def test_an_object_that_is_refreshed_after_the_commit(self):
        """Its attributes are read in another transaction."""

        @retry_on_disconnect(**SOON)
        def add(engine, name):
            self.runs += 1
            with Session(engine) as session:
                item = Item(name=name)
                session.add(item)
                session.commit()
                self.forward.drop()
                return item.name

        for engine in self.engines():
            self.raises(sqlalchemy.exc.OperationalError, add, engine, "a")
            self.assertEqual((self.runs, self.names()), (1, ["a"]))

    def test_a_two_phase_commit_that_is_lost_is_unknown(self):
        @retry_on_disconnect(**SOON)
        def add(engine, name):
            self.runs += 1
            with engine.connect() as connection:
                branch = connection.begin_twophase()
                connection.execute(text("INSERT INTO item VALUES (:name)"), {"name": name})
                branch.prepare()
                self.forward.cut("to_client", 0)
                branch.commit()

        for engine in self.engines():
            self.raises(sqlalchemy.exc.OperationalError, add, engine, "a")
            self.assertEqual(self.runs, 1)

    def test_other_errors_are_raised_at_once(self):
        for engine in self.engines():
            add = self.adder(engine, lambda connection: connection.execute(text("SELECT 1/0")))
            self.raises(sqlalchemy.exc.DBAPIError, add, "a")
            self.assertEqual((self.runs, self.names()), (1, []))

    def test_an_error_of_commit_that_is_no_loss(self):
        self.query("ALTER TABLE item ADD UNIQUE (name) DEFERRABLE INITIALLY DEFERRED")
        self.query("ALTER TABLE item DROP CONSTRAINT item_pkey")
        self.query("INSERT INTO item VALUES ('b')")

        def collide(connection):
            connection.execute(text("INSERT INTO item VALUES ('a')"))

        for engine in self.engines():
            self.raises(sqlalchemy.exc.IntegrityError, self.adder(engine, collide), "a")
            self.assertEqual((self.runs, self.names()), (1, []))

    def test_an_engine_whose_connections_are_zreconnects(self):
        """They tell by themselves what is committed: a COMMIT whose answer is lost is looked up."""
        for direction, runs in [("to_client", 1), ("to_server", 2)]:
            self.query("DELETE FROM item")
            self.runs = 0
            engine = sqlalchemy.create_engine(
                "postgresql+without_adapters://",
                # With "xid", the next answer would be that to the question for the id.
                creator=lambda: self.make_connection(witness=Ledger()),
                use_native_hstore=False,
            )
            self.adder(engine, self.cutter(direction))("a")
            self.assertEqual((self.runs, self.names()), (runs, ["a"]))
            engine.dispose()

    def test_sqlalchemy_that_is_imported_in_the_run_itself(self):
        """What it has committed was not watched."""
        program = """
import sys
from zreconnect import retry_on_disconnect

runs = 0

@retry_on_disconnect(timeout=60, min_interval=0)
def add():
    global runs
    runs += 1
    import sqlalchemy
    engine = sqlalchemy.create_engine(sys.argv[1])
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("SELECT pg_terminate_backend(pg_backend_pid())"))

assert "sqlalchemy" not in sys.modules
try:
    add()
except Exception as error:
    print(type(error).__name__, runs)
"""
        dsn = self.server.dsn(dbname=self.dbname)
        output = subprocess.run(
            [sys.executable, "-c", program, dsn],
            env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        self.assertEqual(output.stdout, "OperationalError 1\n")


class ArgumentTests(unittest.TestCase):
    def test_numbers(self):
        for name, value, error_type in [
            ("timeout", "1", TypeError),
            ("timeout", -1, ValueError),
            ("min_interval", None, TypeError),
            ("min_interval", -0.1, ValueError),
            ("max_interval", float("inf"), ValueError),
            ("max_interval", 0.05, ValueError),  # Less than min_interval.
            ("increment", True, TypeError),
            ("increment", -1, ValueError),
            ("idempotent", 1, TypeError),
        ]:
            with self.subTest(name, value=value), self.assertRaisesRegex(error_type, f"^{name} "):
                retry_on_disconnect(**{name: value})

    def test_without_parentheses(self):
        with self.assertRaises(TypeError):
            retry_on_disconnect(lambda: None)

    def test_methods_and_signatures(self):
        class Api:
            def __init__(self, greeting):
                self.greeting = greeting

            @retry_on_disconnect()
            def greet(self, name: str, *, mark: str = "!") -> str:
                """Greet somebody."""
                return f"{self.greeting} {name}{mark}"

            @staticmethod
            @retry_on_disconnect()
            def static(name):
                return name

            @classmethod
            @retry_on_disconnect()
            def of_class(cls, name):
                return cls, name

        self.assertEqual(Api("Hello").greet("you", mark="?"), "Hello you?")
        self.assertEqual(Api.static("you"), "you")
        self.assertEqual(Api.of_class("you"), (Api, "you"))
        self.assertEqual(Api.greet.__doc__, "Greet somebody.")
        self.assertEqual(
            str(inspect.signature(Api.greet)), "(self, name: str, *, mark: str = '!') -> str"
        )

    def test_interface(self):
        function = retry_on_disconnect()(lambda: None)
        verifyObject(IRetryOnDisconnect, function)

    def test_an_error_that_has_travelled(self):
        """Between processes it has lost the original."""
        runs = []
        error = load_driver("psycopg2").disconnection_error("gone")

        @retry_on_disconnect(**SOON)
        def fail_once():
            runs.append(None)
            if len(runs) == 1:
                raise error

        fail_once()
        self.assertEqual(len(runs), 2)
