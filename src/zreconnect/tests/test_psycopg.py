"""psycopg 3: what it shares with psycopg2, what it has besides, BEGIN along with a statement."""

import contextlib
import gc
import itertools
import os
import signal
import socket
import threading
import traceback
import unittest
import weakref
from unittest import mock

import psycopg
import transaction
from psycopg import errors, sql
from psycopg.rows import dict_row, tuple_row
from psycopg.types.composite import CompositeInfo, register_composite
from psycopg.types.numeric import FloatLoader
from psycopg.types.string import StrDumper, TextLoader

import zreconnect
from zreconnect import (
    CommitOutcomeUnknown,
    DisconnectionError,
    Ledger,
    ReconnectingConnection,
    ReconnectingCursor,
    ReconnectTimeout,
    RetryPolicy,
    XidWitness,
    initZopeless,
)
from zreconnect.drivers import psycopg as psycopg_driver
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests import (
    test_begin_along,
    test_connection,
    test_round_trips,
    test_session,
    test_twophase,
    test_watchdog,
    test_witness,
)
from zreconnect.tests.base import DatabaseTestCase, policy_of, wait_until
from zreconnect.tests.interrupts import Alarm, AtLines

# Passed on: they begin and end nothing, and execute nothing outside a transaction of their own.
HAS_RESULTS = unittest.skipUnless(
    hasattr(psycopg.Cursor, "results"), "psycopg 3.3 is the first with results()"
)
PASSED_ON_BY_CONNECTION = {
    "adapters", "add_notice_handler", "add_notify_handler", "cancel", "cancel_safe",
    "connect", "fileno", "info", "remove_notice_handler", "remove_notify_handler", "wait", "xid",
}  # fmt: skip
PASSED_ON_BY_CURSOR = {
    "adapters", "pgresult", "setinputsizes", "setoutputsize", "statusmessage",
}  # fmt: skip


class Psycopg:
    # Of its own, so that it can be tested beside psycopg2.
    layer = PortForwardLayer(PostgresLayer("PsycopgPostgresLayer"), "PsycopgPortForwardLayer")
    driver = "psycopg"
    module = psycopg


# What the drivers share. The tests that are None are of psycopg2 itself; what psycopg has in its
# place is tested beside.


class StateTests(Psycopg, test_connection.StateTests):
    pass


class DisconnectTests(Psycopg, test_connection.DisconnectTests):
    """What the driver says of a lost session."""

    def test_a_socket_that_has_hung_up(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        # The end of a pipe that nobody writes to is not readable and has hung up, as a socket that
        # was reset can be for a moment.
        reading, writing = os.pipe()
        os.dup2(reading, connection.driver_connection.fileno())
        os.close(reading)
        os.close(writing)
        with self.assertRaisesRegex(DisconnectionError, "socket closed|non-socket"):
            cursor.execute("SELECT 2")
        self.assertEqual(connection.state, "doomed")


class OwnObjectTests(Psycopg, DatabaseTestCase):
    """What psycopg makes for its own connections."""

    def test_what_is_refused_says_what_to_do(self):
        connection = self.connect()
        for make in (psycopg.Cursor, psycopg.RawCursor):
            with (
                self.subTest(make),
                self.assertRaisesRegex(AttributeError, r"on_connect.*cursor\(cursor_factory="),
            ):
                make(connection).execute("SELECT 1")
        self.assertEqual(connection.state, "idle")
        cursor = connection.cursor(cursor_factory=psycopg.RawCursor)
        self.assertEqual(cursor.execute("SELECT $1::int", [1]).fetchone(), (1,))

    def test_types_that_are_fetched_and_registered(self):
        self.query("CREATE TYPE pair AS (a int, b text)")

        def register(raw):
            register_composite(CompositeInfo.fetch(raw, "pair"), raw)

        for connection in (self.connect(on_connect=register), self.connect()):
            if connection.work.link.options.on_connect is None:
                info = CompositeInfo.fetch(connection.driver_connection, "pair")
                register_composite(info, connection)
            for _ in range(2):
                with connection.transaction() as cursor:
                    ((pair,),) = cursor.execute("SELECT (1, 'one')::pair").fetchall()
                    self.assertEqual((pair.a, pair.b), (1, "one"))
                self.forward.drop()


class PipelineBlockTests(Psycopg, DatabaseTestCase):
    """Blocks of transaction() in a pipeline wait for their answers."""

    def setUp(self):
        super().setUp()
        self.make_table()
        self.connection = self.connect()

    def test_an_error_comes_out_of_its_block(self):
        with self.connection.pipeline():
            self.connection.execute("INSERT INTO item VALUES ('one')")
            with self.assertRaises(psycopg.errors.UndefinedTable), self.connection.transaction():
                self.connection.execute("SELECT 1 FROM nothing")
            with self.connection.transaction() as cursor:
                self.connection.execute("INSERT INTO item VALUES ('two')")
            self.assertEqual(cursor.connection.execute("SELECT 3").fetchone(), (3,))
            self.connection.commit()
        self.assertEqual(self.names(), ["one", "two"])

    def test_a_block_of_an_idle_pipeline_is_the_whole_transaction(self):
        with self.connection.pipeline():
            self.assertEqual(self.connection.state, "idle")
            with self.connection.transaction():
                self.connection.execute("INSERT INTO item VALUES ('one')")
            self.assertEqual((self.connection.state, self.names()), ("idle", ["one"]))
            with self.assertRaises(errors.UniqueViolation), self.connection.transaction():
                self.connection.execute("INSERT INTO item VALUES ('one')")
            self.connection.execute("INSERT INTO item VALUES ('two')")
            self.connection.commit()
        self.assertEqual(self.names(), ["one", "two"])

    def test_a_session_that_is_lost_before_the_first_statement(self):
        for lose in (self.forward.drop, self.lose_session):
            with self.connection.pipeline():
                lose()
                with self.connection.transaction():
                    self.connection.execute(f"INSERT INTO item VALUES ('{lose.__name__}')")
            lose()
            with self.connection.pipeline(), self.connection.transaction():
                self.connection.execute(f"INSERT INTO item VALUES ('{lose.__name__} before')")
        self.assertEqual(len(self.names()), 4)

    def lose_session(self):
        (pid,) = self.sessions()
        self.server.terminate_backend(pid)
        wait_until(lambda: pid not in self.sessions())

    def test_a_pipeline_inside(self):
        with self.connection.transaction():
            with (
                self.assertRaises(psycopg.errors.UndefinedTable),
                self.connection.transaction(),
                self.connection.pipeline(),
            ):
                self.connection.execute("SELECT 1 FROM nothing")
            with self.connection.transaction(), self.connection.pipeline():
                self.connection.execute("INSERT INTO item VALUES ('one')")
        self.assertEqual(self.names(), ["one"])


class DoomedTests(Psycopg, test_connection.DoomedTests):
    test_everything_raises_until_rollback = None


class ReadingTests(Psycopg, test_connection.ReadingTests):
    has_next = hasattr(psycopg.ServerCursor, "__next__")
    test_copy_from = None
    test_copy_to = None
    test_rows_that_have_arrived_can_be_read_until_the_next_session = None


class CommitTests(Psycopg, test_connection.CommitTests):
    test_an_error_that_leaves_the_transaction_open_keeps_it_active = None


class BlockTests(Psycopg, test_connection.BlockTests):
    pass


class TransientErrorTests(Psycopg, test_connection.TransientErrorTests):
    pass


class RunTests(Psycopg, test_connection.RunTests):
    pass


class ThreadTests(Psycopg, test_connection.ThreadTests):
    pass


class FactoryTests(Psycopg, test_connection.FactoryTests):
    test_unusable_connections = None

    def set_modes(self, raw):
        raw.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        raw.read_only = raw.deferrable = True

    def test_connections_that_cannot_be_used(self):
        def in_a_transaction():
            raw = self.left_open(psycopg.connect(self.dsn))
            raw.execute("SELECT 1")
            return raw

        def in_autocommit_mode():
            return self.left_open(psycopg.connect(self.dsn, autocommit=True))

        for factory, error, message in [
            (in_autocommit_mode, psycopg.ProgrammingError, "in autocommit mode"),
            (
                in_a_transaction,
                psycopg.ProgrammingError,
                "connection that is in a transaction",
            ),
            (lambda: None, TypeError, "must return a psycopg.Connection, not None"),
        ]:
            with self.subTest(message), self.assertRaisesRegex(error, message):
                ReconnectingConnection(factory, driver="psycopg").begin()

    def left_open(self, raw):
        self.addCleanup(raw.close)
        return raw

    def test_a_read_only_one_has_no_witness(self):
        def connection_factory():
            raw = psycopg.connect(self.dsn)
            raw.read_only = True
            return raw

        connection = ReconnectingConnection(connection_factory, driver="psycopg")
        self.addCleanup(connection.close)
        cursor = connection.execute("SELECT pg_current_xact_id_if_assigned()")
        self.assertEqual(cursor.fetchone(), (None,))

    def test_the_name_of_a_database_or_role_is_no_refusal_by_itself(self):
        # The host that cannot be reached has the name of the role.
        connection = self.connect(
            f"host=127.0.0.1,localhost port={self.closed_port()},{self.forward.port} user=postgres "
            f"dbname=localhost password={self.server.password}",
            policy=RetryPolicy(timeout=0),
        )
        self.forward.refuse()
        self.addCleanup(self.forward.accept)
        with self.assertRaises(ReconnectTimeout):
            connection.begin()

    def closed_port(self):
        # Bound until the test ends, so that nobody else listens there.
        bound = socket.socket()
        self.addCleanup(bound.close)
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


class ForkTests(Psycopg, test_connection.ForkTests):
    pass


class GarbageTests(Psycopg, test_connection.GarbageTests):
    pass


class SettingsTests(Psycopg, test_session.SettingsTests):
    test_transaction_modes_return_after_a_disconnect = None
    test_they_cost_no_round_trip = None
    test_set_isolation_level_of_psycopg2 = None
    test_client_encoding = None
    test_an_unknown_client_encoding_is_not_kept = None
    test_cursor_factory = None

    def test_isolation_levels(self):
        connection = self.connection
        level = psycopg.IsolationLevel.REPEATABLE_READ
        for given in (level, 3, "repeatable read"):
            connection.isolation_level = given
            self.assertIs(connection.isolation_level, level)
            self.assertEqual(self.show()[0], "repeatable read")
            self.forward.drop()
            self.assertEqual(self.show()[0], "repeatable read")
            connection.isolation_level = "DEFAULT"
            self.assertIsNone(connection.isolation_level)
            self.assertEqual(self.show()[0], "read committed")

    def test_psycopgs_names(self):
        connection = self.connection
        connection.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
        connection.set_read_only(True)
        connection.set_deferrable(True)
        self.forward.drop()
        self.assertEqual(self.show(), ("serializable", "on", "on"))
        self.assertTrue(connection.read_only)
        connection.read_only = False
        self.assertEqual(self.show(), ("serializable", "off", "on"))
        connection.set_autocommit(True)
        connection.execute("SELECT 1")
        self.assertEqual(connection.state, "idle")

    def test_encoding(self):
        self.connection.set_client_encoding("LATIN1")
        self.forward.drop()
        cursor = self.connection.execute("SHOW client_encoding")
        self.assertEqual(cursor.fetchone(), ("LATIN1",))
        self.connection.set_client_encoding("latin-1")
        with self.assertRaises(psycopg.ProgrammingError):
            self.connection.set_client_encoding("UTF8")
        self.connection.rollback()
        with self.assertRaises(psycopg.DataError):
            self.connection.set_client_encoding("KLINGON")
        self.assertEqual(self.connection.info.encoding, "iso8859-1")

    def test_cursor_factories(self):
        connection = self.connection
        connection.begin()
        connection.rollback()
        connection.cursor_factory = psycopg.ClientCursor
        connection.server_cursor_factory = psycopg.RawServerCursor
        for _ in range(2):
            self.assertEqual(connection.cursor().mogrify("%s", (1,)), "1")
            with connection.cursor("numbers") as cursor:
                cursor.execute("SELECT $1::int", (1,))
                self.assertEqual(cursor.fetchone(), (1,))
            self.forward.drop()
            connection.rollback()
        cursor = connection.cursor(cursor_factory=psycopg.RawCursor, row_factory=dict_row)
        cursor.execute("SELECT $1::int AS one", (1,))
        self.assertEqual(cursor.fetchone(), {"one": 1})
        factory = psycopg.RawServerCursor
        with connection.cursor("numbers", cursor_factory=factory, binary=True) as cursor:
            cursor.execute("SELECT $1::int", (1,))
            self.assertEqual(cursor.fetchone(), (1,))
            self.assertEqual(cursor.pgresult.fformat(0), psycopg.pq.Format.BINARY)

    def test_row_factories(self):
        connection = self.connection
        cursor = connection.cursor()
        connection.row_factory = dict_row
        cursor.row_factory = tuple_row
        for _ in range(2):
            self.assertEqual(connection.execute("SELECT 1 AS one").fetchone(), {"one": 1})
            cursor.execute("SELECT 1 AS one")
            self.assertEqual(cursor.fetchone(), (1,))
            self.assertIs(connection.row_factory, dict_row)
            self.forward.drop()
            connection.rollback()
        forked = connection.fork()
        self.addCleanup(forked.close)
        self.assertEqual(forked.execute("SELECT 1 AS one").fetchone(), {"one": 1})
        connection.reset()
        self.assertIs(connection.row_factory, tuple_row)

    def test_adapters(self):
        class Word(str):
            pass

        class Dumper(StrDumper):
            def dump(self, word):
                return super().dump(word.upper())

        connection = self.connection
        connection.adapters.register_dumper(Word, Dumper)
        connection.adapters.register_loader("numeric", FloatLoader)
        forked = connection.fork()
        self.addCleanup(forked.close)
        for each in (connection, connection, forked):
            cursor = each.execute("SELECT %s, 1.5", (Word("word"),))
            self.assertEqual(cursor.fetchone(), ("WORD", 1.5))
            self.forward.drop()
            each.rollback()

    def test_what_on_connect_registers_comes_last(self):
        def on_connect(raw):
            raw.adapters.register_loader("numeric", FloatLoader)

        connection = self.connect(on_connect=on_connect)
        for _ in range(2):
            self.assertEqual(connection.execute("SELECT 1.5").fetchone(), (1.5,))
            connection.adapters.register_loader("numeric", TextLoader)
            self.forward.drop()
            connection.rollback()

    def test_preparing(self):
        connection = self.connection
        connection.prepare_threshold = 0
        connection.prepared_max = 5
        self.assertEqual(self.prepared(), ["SELECT $1"])
        self.forward.drop()
        connection.rollback()
        self.assertEqual(self.prepared(), ["SELECT $1"])
        self.assertEqual(connection.prepared_max, 5)
        connection.prepare_threshold = None
        self.forward.drop()
        connection.rollback()
        self.assertEqual(self.prepared(), [])

    def prepared(self):
        """The statements that are prepared after several transactions."""
        for _ in range(7):
            self.connection.execute("SELECT %s", (1,))
            self.connection.commit()
        cursor = self.connection.execute(
            "SELECT statement FROM pg_prepared_statements", prepare=False
        )
        statements = [statement for (statement,) in cursor]
        self.connection.commit()
        return statements

    def test_a_threshold_of_the_factory_holds(self):
        self.connection = ReconnectingConnection(
            lambda: psycopg.connect(self.dsn, prepare_threshold=None), driver="psycopg"
        )
        self.addCleanup(self.connection.close)
        for _ in range(2):
            self.assertEqual(self.prepared(), [])
            self.forward.drop()


class AutocommitTests(Psycopg, test_session.AutocommitTests):
    def test_copy(self):
        with self.cursor.copy("COPY item FROM STDIN") as copy:
            copy.write_row(["one"])
        self.assertEqual((self.names(), self.connection.state), (["one"], "idle"))
        with (
            self.assertRaises(CommitOutcomeUnknown),
            self.cursor.copy("COPY item FROM STDIN") as copy,
        ):
            copy.write_row(["two"])
            self.forward.drop()
        self.assertEqual(self.names(), ["one"])

    def test_stream(self):
        (row,) = self.cursor.stream("INSERT INTO item VALUES ('one') RETURNING name")
        self.assertEqual((row, self.names()), (("one",), ["one"]))
        self.forward.drop()
        self.assertEqual(list(self.cursor.stream("SELECT 1")), [(1,)])
        self.forward.cut("to_client", 0)
        with self.assertRaises(CommitOutcomeUnknown):
            list(self.cursor.stream("SELECT 1"))

    def test_pipeline(self):
        with (
            self.assertRaisesRegex(psycopg.ProgrammingError, "begin.. a transaction first"),
            self.connection.pipeline(),
        ):
            pass
        self.connection.begin()
        with self.connection.pipeline():
            self.cursor.execute("INSERT INTO item VALUES ('one')")
        self.connection.rollback()
        self.assertEqual(self.names(), [])

    def test_a_server_side_cursor_needs_a_transaction(self):
        with self.assertRaises(errors.NoActiveSqlTransaction):
            self.connection.cursor("numbers").execute("SELECT 1")


class OnConnectTests(Psycopg, test_session.OnConnectTests):
    test_it_may_change_the_mode_but_not_leave_a_transaction = None


class SilenceTests(Psycopg, test_watchdog.SilenceTests):
    test_reading_and_copying = None

    def test_whatever_waits_for_the_server(self):
        for wait in (
            lambda: self.connection.cursor("numbers").execute("SELECT 1"),
            lambda: self.cursor.executemany("SELECT %s", [(1,), (2,)], returning=True),
            lambda: next(self.cursor.stream("SELECT 1")),
            self.copy,
            self.pipeline,
        ):
            self.connection.begin()
            self.fall_silent()
            with self.assertRaises(DisconnectionError):
                wait()
            self.connection.rollback()

    def copy(self):
        with self.cursor.copy("COPY item TO STDOUT") as copy:
            copy.read()

    def pipeline(self):
        with self.connection.pipeline() as pipeline:
            self.cursor.execute("SELECT 1")
            pipeline.sync()

    def test_a_session_that_fell_silent_while_idle(self):
        connection = self.connect()
        connection.begin()
        connection.rollback()
        self.fall_silent()
        with self.assertRaises(DisconnectionError):
            connection.execute("SELECT 1")

    def test_the_deadline_is_not_that_of_the_statement_that_travels_along_with_begin(self):
        connection = self.connect()
        connection.begin()
        connection.rollback()
        # Half of the time is that of BEGIN.
        with policy_of(connection, timeout=4):
            trips = self.round_trips(lambda: connection.execute("SELECT pg_sleep(3)"))
        self.assertEqual((trips, connection.state), (1, "active"))


class WatchdogThreadTests(Psycopg, test_watchdog.ThreadTests):
    pass


class TwoPhaseTests(Psycopg, test_twophase.HealthyTests):
    layer = test_twophase.LAYER
    test_between_the_phases_the_connection_takes_no_statements = None
    test_round_trips = None

    def connect_to(self, *databases, **keywords):
        super().connect_to(*databases, driver="psycopg", **keywords)


# What psycopg 3 has besides.


class CursorTests(Psycopg, DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()
        self.connection = self.connect()
        self.cursor = self.connection.cursor()

    @HAS_RESULTS
    def test_several_results(self):
        self.cursor.execute("SELECT 1; SELECT 2; SELECT 3")
        self.assertEqual(self.connection.state, "active")
        self.assertEqual(self.cursor.fetchone(), (1,))
        self.assertTrue(self.cursor.nextset())
        self.assertEqual(self.cursor.fetchone(), (2,))
        self.assertIs(self.cursor.set_result(0), self.cursor)
        self.assertEqual([each.fetchone() for each in self.cursor.results()], [(1,), (2,), (3,)])
        self.assertIsNone(self.cursor.nextset())

    @HAS_RESULTS
    def test_several_results_and_iterations(self):
        two = "VALUES (1), (2); VALUES (3), (4)"
        self.cursor.execute(two)
        self.assertEqual(
            [list(each) for each in self.cursor.results()], [[(1,), (2,)], [(3,), (4,)]]
        )
        self.cursor.set_result(0)
        self.assertEqual(list(self.cursor), [(1,), (2,)])
        self.cursor.nextset()
        self.assertEqual(self.cursor.fetchall(), [(3,), (4,)])
        self.cursor.execute(two)
        rows = iter(self.cursor)
        self.assertEqual(next(rows), (1,))
        self.cursor.nextset()
        self.assertEqual(list(rows), [(3,), (4,)])
        self.assertEqual(list(self.connection.cursor().results()), [])

    @HAS_RESULTS
    def test_executemany(self):
        self.cursor.executemany(
            "INSERT INTO item VALUES (%s) RETURNING name", [("one",), ("two",)], returning=True
        )
        self.assertEqual(self.connection.state, "active")
        rows = [cursor.fetchone() for cursor in self.cursor.results()]
        self.assertEqual(rows, [("one",), ("two",)])
        self.connection.rollback()
        self.assertEqual(self.names(), [])

    def test_the_names_that_the_driver_gives_to_parameters(self):
        self.cursor.execute("INSERT INTO item VALUES (%s)", params=["one"])
        self.cursor.executemany("INSERT INTO item VALUES (%s)", params_seq=[["two"], ["three"]])
        self.connection.commit()
        self.assertEqual(self.names(), ["one", "three", "two"])

    def test_the_drivers_connection_is_closed_by_hand(self):
        for cursor in (self.cursor, self.connection.cursor()):
            self.connection.driver_connection.close()
            cursor.execute("SELECT 1")
            self.assertEqual(cursor.fetchone(), (1,))
            self.connection.commit()

    def test_execute_of_the_connection(self):
        cursor = self.connection.execute("SELECT %s::int", [1], binary=True)
        self.assertIs(cursor.connection, self.connection)
        self.assertEqual(cursor.fetchone(), (1,))
        self.assertEqual(self.connection.state, "active")

    def test_iteration_and_scrolling(self):
        self.cursor.execute("SELECT generate_series(1, 5)")
        self.assertEqual(self.cursor.fetchmany(2), [(1,), (2,)])
        self.cursor.scroll(-1)
        self.assertEqual(self.cursor.rownumber, 1)
        self.assertEqual(list(self.cursor), [(2,), (3,), (4,), (5,)])
        self.assertEqual(self.cursor.statusmessage, "SELECT 5")

    def test_binary(self):
        cursor = self.connection.cursor(binary=True)
        for _ in range(2):
            cursor.execute("SELECT 1")
            self.assertEqual(cursor.pgresult.fformat(0), psycopg.pq.Format.BINARY)
            self.forward.drop()
            self.connection.rollback()
        self.cursor.format = psycopg.pq.Format.BINARY
        self.cursor.execute("SELECT 1")
        self.assertEqual(self.cursor.pgresult.fformat(0), psycopg.pq.Format.BINARY)

    def test_server_side_cursor(self):
        with self.connection.cursor("numbers", scrollable=True, row_factory=dict_row) as cursor:
            self.assertEqual(cursor.name, "numbers")
            cursor.itersize = 3
            cursor.execute("SELECT generate_series(1, 10) AS n")
            self.assertEqual(cursor.fetchone(), {"n": 1})
            self.assertEqual([row["n"] for row in cursor], list(range(2, 11)))
            cursor.scroll(0, mode="absolute")
            self.assertEqual(cursor.fetchmany(2), [{"n": 1}, {"n": 2}])
            self.assertEqual((cursor.scrollable, cursor.withhold), (True, False))
            self.assertEqual(cursor.itersize, 3)

    def test_server_side_cursor_that_outlives_the_transaction(self):
        cursor = self.connection.cursor("numbers", withhold=True)
        cursor.execute("SELECT generate_series(1, 3)")
        self.assertEqual(cursor.itersize, 100)
        self.connection.commit()
        self.assertEqual(cursor.fetchall(), [(1,), (2,), (3,)])
        cursor.close()

    def test_a_lost_server_side_cursor_is_closed(self):
        cursor = self.connection.cursor("numbers")
        cursor.execute("SELECT 1")
        raw = cursor._raw
        self.forward.drop()
        self.connection.rollback()
        cursor.execute("SELECT 2")
        self.assertEqual(cursor.fetchone(), (2,))
        self.assertTrue(raw.closed)
        cursor.close()

    def test_settings_that_psycopgs_cursor_has_not(self):
        for name in ("tzinfo_factory", "unknown", "_unknown"):
            with self.assertRaises(AttributeError):
                getattr(self.cursor, name)

    def test_errors_of_the_user_pass_unchanged(self):
        with self.assertRaises(errors.SyntaxError) as wrong:
            self.cursor.execute("SELEC 1")
        self.assertEqual(wrong.exception.sqlstate, "42601")
        self.assertEqual(self.connection.state, "active")
        with self.assertRaises(errors.InFailedSqlTransaction):
            self.cursor.execute("SELECT 1")

    def test_another_number_of_parameters_is_no_disconnect(self):
        cursor = self.connection.cursor(cursor_factory=psycopg.RawCursor)
        for begin in (self.connection.begin, self.connection.rollback):
            self.connection.rollback()
            begin()
            with self.assertRaises(errors.ProtocolViolation):
                cursor.execute("SELECT $1::int, $2::int", (1,))
            self.assertEqual(self.connection.state, "active")

    def test_a_commit_by_statement_that_is_lost(self):
        for threshold in (5, 0):
            self.connection.prepare_threshold = threshold
            for _ in range(2):
                self.cursor.execute("INSERT INTO item VALUES ('one') ON CONFLICT DO NOTHING")
                self.cursor.execute("COMMIT")
                self.connection.rollback()
            self.cursor.execute("SELECT 1")
            self.forward.drop()
            with self.assertRaises(CommitOutcomeUnknown):
                self.cursor.execute("COMMIT")
            self.connection.rollback()

    def test_a_prepared_statement_that_is_lost_is_no_commit(self):
        self.connection.prepare_threshold = 0
        for _ in range(2):
            self.cursor.execute("SELECT 1")
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            self.cursor.execute("SELECT 1")

    def test_a_transaction_that_the_user_ended_is_not_found_committed(self):
        self.cursor.execute("INSERT INTO item VALUES ('one')")
        self.cursor.execute("ROLLBACK")
        self.connection.rollback()
        self.assertEqual((self.connection.state, self.names()), ("idle", []))


class StreamTests(Psycopg, DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.connection = self.connect()
        self.cursor = self.connection.cursor()
        self.query("CREATE TABLE number (n int)")

    def test_it_begins_a_transaction(self):
        rows = self.cursor.stream("INSERT INTO number VALUES (%s), (2) RETURNING n", (1,))
        self.assertEqual(self.connection.state, "idle")
        self.assertEqual(list(rows), [(1,), (2,)])
        self.assertEqual(self.connection.state, "active")
        self.connection.rollback()
        self.assertEqual(self.query("SELECT * FROM number"), [])

    def test_one_that_is_not_read_to_its_end(self):
        for row in self.cursor.stream("SELECT generate_series(1, 1000000)"):
            self.assertEqual(row, (1,))
            break
        self.connection.rollback()
        self.assertEqual(self.connection.execute("SELECT 1").fetchone(), (1,))

    def test_a_loss_dooms(self):
        rows = self.cursor.stream("SELECT generate_series(1, 1000000)")
        next(rows)
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            list(rows)
        self.assertEqual(self.connection.state, "doomed")
        self.connection.rollback()
        self.assertEqual(self.connection.execute("SELECT 1").fetchone(), (1,))

    def test_one_that_is_open_does_not_hang_the_connection(self):
        rows = self.cursor.stream("SELECT generate_series(1, 1000000)")
        next(rows)
        with self.assertRaisesRegex(psycopg.ProgrammingError, "is not finished"):
            self.connection.commit()
        self.assertEqual(self.connection.state, "active")
        self.connection.rollback()
        self.connection.begin()
        rows.close()
        self.assertEqual(self.connection.state, "active")

    def test_the_users_error_passes(self):
        with self.assertRaises(errors.UndefinedTable):
            list(self.cursor.stream("SELECT * FROM missing"))
        self.assertEqual(self.connection.state, "active")


class WitnessTests(Psycopg, test_witness.XidAtCommitTests):
    test_a_server_side_cursor_that_only_reads = None


class CopyTests(Psycopg, DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.query("CREATE TABLE number (n int, name text)")
        self.connection = self.connect()
        self.cursor = self.connection.cursor()

    def test_writing_and_reading(self):
        with self.cursor.copy("COPY number FROM STDIN") as copy:
            copy.set_types(["int4", "text"])
            for n in range(3):
                copy.write_row((n, str(n)))
            copy.write("3\t3\n")
        self.assertEqual((self.connection.state, self.cursor.rowcount), ("active", 4))
        statement = "COPY (SELECT * FROM number WHERE n < %s ORDER BY n) TO STDOUT"
        with self.cursor.copy(statement, (2,)) as copy:
            self.assertEqual(b"".join(copy), b"0\t0\n1\t1\n")
        with self.cursor.copy(statement, (2,)) as copy:
            copy.set_types(["int4", "text"])
            self.assertEqual(copy.read_row(), (0, "0"))
            self.assertEqual(list(copy.rows()), [(1, "1")])
            self.assertEqual(copy.read(), b"")
        self.connection.rollback()
        self.assertEqual(self.query("SELECT * FROM number"), [])

    def test_the_witness_takes_note(self):
        connection = self.connect(witness=XidWitness(at_commit=True))
        with connection.cursor().copy("COPY number FROM STDIN") as copy:
            copy.write_row((1, "one"))
        # The id, and COMMIT.
        self.assertEqual(self.round_trips(connection.commit), 2)

    def test_what_psycopg_refuses_to_write_leaves_the_session_alone(self):
        with (
            self.assertRaises(TypeError),
            self.cursor.copy("COPY number FROM STDIN") as copy,
        ):
            copy.write(5)
        self.assertEqual(self.connection.state, "active")

    def test_an_error_of_the_users_ends_it(self):
        with self.assertRaises(LookupError), self.cursor.copy("COPY number FROM STDIN") as copy:
            copy.write_row((1, "one"))
            raise LookupError
        self.assertEqual(self.connection.state, "active")
        with self.assertRaisesRegex(psycopg.InternalError, "Nothing was committed"):
            self.connection.commit()
        with (
            self.assertRaises(errors.InvalidTextRepresentation),
            self.cursor.copy("COPY number FROM STDIN") as copy,
        ):
            copy.write_row(("one", "one"))
        self.connection.rollback()
        with self.assertRaises(errors.UndefinedTable), self.cursor.copy("COPY missing TO STDOUT"):
            pass

    def test_a_block_that_is_entered_again(self):
        with self.cursor.copy("COPY number FROM STDIN") as copy:
            copy.write_row((1, "one"))
        with self.assertRaisesRegex(TypeError, "only once"), copy:
            self.fail("it has ended")
        with self.connection.pipeline() as pipeline:
            with pipeline as same:
                self.assertIs(same, pipeline)
                cursor = self.connection.execute("SELECT n FROM number")
            self.assertEqual(pipeline.status, psycopg.pq.PipelineStatus.ON)
        self.assertEqual(cursor.fetchall(), [(1,)])
        self.connection.commit()

    def test_a_loss_dooms(self):
        def write():
            with self.cursor.copy("COPY number FROM STDIN") as copy:
                self.forward.drop()
                while True:
                    copy.write("1\tone\n" * 10000)

        def read():
            with self.cursor.copy("COPY (SELECT generate_series(1, 1000000)) TO STDOUT") as copy:
                copy.read()
                self.forward.drop()
                for _ in copy:
                    pass

        def finish():
            with self.cursor.copy("COPY number FROM STDIN") as copy:
                copy.write_row((1, "one"))
                self.forward.drop()

        for use in (write, read, finish):
            with self.assertRaises(DisconnectionError):
                use()
            self.assertEqual(self.connection.state, "doomed")
            self.connection.rollback()
        self.assertEqual(self.query("SELECT * FROM number"), [])

    def test_a_loss_inside_that_is_swallowed(self):
        with self.cursor.copy("COPY number FROM STDIN") as copy:
            self.forward.drop()
            with self.assertRaises(DisconnectionError):
                while True:
                    copy.write("1\tone\n" * 10000)
            with self.assertRaisesRegex(DisconnectionError, "Already disconnected"):
                copy.write_row((1, "one"))
            self.connection.rollback()
            self.connection.begin()
        self.assertEqual(self.connection.state, "active")


class PipelineTests(Psycopg, DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()
        self.connection = self.connect()
        self.cursor = self.connection.cursor()

    def test_statements_travel_together(self):
        self.connection.begin()

        def use():
            with self.connection.pipeline():
                for name in ("one", "two", "three"):
                    self.connection.execute("INSERT INTO item VALUES (%s)", (name,))

        self.assertEqual(self.round_trips(use), 1)
        self.connection.commit()
        self.assertEqual(self.names(), ["one", "three", "two"])

    def test_it_begins_a_transaction(self):
        with self.connection.pipeline() as pipeline:
            self.cursor.execute("INSERT INTO item VALUES ('one')")
            pipeline.sync()
            self.assertEqual(pipeline.status, psycopg.pq.PipelineStatus.ON)
            cursor = self.connection.execute("SELECT 1")
            self.assertEqual(cursor.fetchone(), (1,))
        self.assertEqual(self.connection.state, "active")
        self.connection.rollback()
        self.assertEqual(self.names(), [])

    def test_transactions_inside(self):
        for witness in ("xid", Ledger(), XidWitness(at_commit=True), None):
            with self.subTest(witness):
                connection = self.connect(witness=witness)
                with connection.pipeline():
                    for name in ("one", "two"):
                        connection.execute("INSERT INTO item VALUES (%s)", (name,))
                        connection.commit()
                        self.assertEqual(connection.state, "idle")
                    connection.execute("INSERT INTO item VALUES ('three')")
                    connection.rollback()
                self.assertEqual(self.names(), ["one", "two"])
                self.query("DELETE FROM item")

    def test_what_was_begun_outside(self):
        self.query(
            "CREATE FUNCTION add_item() RETURNS text LANGUAGE sql"
            " AS $$ INSERT INTO item VALUES ('one') RETURNING name $$"
        )
        connection = self.connect(witness=XidWitness(at_commit=True))
        for statement in ("SELECT 1", "SELECT add_item()"):
            connection.execute(statement)
            with connection.pipeline():
                connection.commit()
        self.assertEqual(self.names(), ["one"])

    def test_errors_inside(self):
        with self.connection.pipeline() as pipeline:
            with self.assertRaises(errors.UndefinedTable):
                self.cursor.execute("SELECT * FROM missing")
                pipeline.sync()
            with self.assertRaisesRegex(psycopg.InternalError, "Nothing was committed"):
                self.connection.commit()
            self.cursor.execute("SELECT * FROM missing")
            self.connection.rollback()
            self.cursor.execute("INSERT INTO item VALUES ('one')")
            self.connection.commit()
        self.assertEqual(self.names(), ["one"])
        with self.assertRaises(errors.UndefinedTable), self.connection.pipeline():
            self.cursor.execute("SELECT * FROM missing")
        self.assertEqual(self.connection.state, "active")

    def test_a_loss_dooms(self):
        with self.assertRaises(DisconnectionError), self.connection.pipeline():
            self.cursor.execute("INSERT INTO item VALUES ('one')")
            self.forward.drop()
        self.assertEqual(self.connection.state, "doomed")
        self.connection.rollback()
        with self.connection.pipeline() as pipeline:
            self.cursor.execute("INSERT INTO item VALUES ('one')")
            self.forward.drop()
            with self.assertRaises(DisconnectionError):
                pipeline.sync()
            self.connection.rollback()
            self.cursor.execute("INSERT INTO item VALUES ('two')")
        self.connection.commit()
        self.assertEqual(self.names(), ["two"])

    def test_a_lost_commit_inside_is_looked_up(self):
        for witness in ("xid", Ledger()):
            connection = self.connect(witness=witness)
            with connection.pipeline() as pipeline:
                connection.execute("INSERT INTO item VALUES ('one')")
                pipeline.sync()
                self.forward.cut("to_client", 0)
                connection.commit()
            self.assertEqual(self.names(), ["one"])
            self.query("DELETE FROM item")


class NotifyTests(Psycopg, DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.time = test_watchdog.watchdogs_time(self)
        self.connection = self.connect(response_timeout=test_watchdog.RESPONSE_TIMEOUT)
        self.connection.autocommit = True
        self.connection.execute("LISTEN news")

    def test_notifications(self):
        rows = self.connection.notifies(stop_after=2)
        # Longer than an answer may take.
        self.time.hurries = True
        threading.Timer(0.8, self.notify).start()
        self.assertEqual(next(rows).payload, "hello")
        self.time.hurries = False
        with self.assertRaisesRegex(psycopg.ProgrammingError, "notifies"):
            self.connection.begin()
        self.notify()
        self.assertEqual([each.payload for each in rows], ["hello"])
        self.assertEqual(list(self.connection.notifies(timeout=0)), [])
        self.connection.begin()

    def notify(self):
        self.query("NOTIFY news, 'hello'")

    def test_a_loss(self):
        rows = self.connection.notifies()
        self.notify()
        next(rows)
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            next(rows)
        self.assertEqual(self.connection.state, "idle")
        self.connection.execute("SELECT 1")

    def test_a_notification_on_the_way_is_no_loss(self):
        seen = []
        self.connection.autocommit = False
        self.connection.add_notify_handler(seen.append)
        pid = self.connection.info.backend_pid
        self.notify()
        wait_until(lambda: not self.connection.work.link.session.watch.is_quiet())
        self.connection.execute("SELECT 1")
        self.assertEqual((len(seen), self.connection.info.backend_pid), (1, pid))


class AttributeTests(Psycopg, DatabaseTestCase):
    """All that psycopg's connections and cursors have: what is ours, and what is passed on."""

    def test_all_are_known(self):
        exceptions = {name for name in dir(psycopg.Connection) if name[0].isupper()}
        for theirs, ours, passed in [
            (psycopg.Connection, ReconnectingConnection, PASSED_ON_BY_CONNECTION | exceptions),
            (psycopg.Cursor, ReconnectingCursor, PASSED_ON_BY_CURSOR),
        ]:
            names = {name for name in dir(theirs) if not name.startswith("_")}
            self.assertEqual(names - set(dir(ours)), passed)

    def test_information(self):
        connection = self.connect()
        self.assertEqual(connection.info.dbname, self.dbname)
        self.assertEqual(connection.info.transaction_status, psycopg.pq.TransactionStatus.IDLE)
        self.assertFalse(connection.broken)
        self.assertIsInstance(connection.driver_connection, psycopg.Connection)
        self.assertIs(connection.connection, connection)
        identifier = sql.Identifier('a"b')
        self.assertEqual(identifier.as_string(connection), '"a""b"')
        with self.assertRaises(AttributeError):
            _ = connection.missing

    def test_notices(self):
        connection = self.connect()
        seen = []
        connection.add_notice_handler(lambda notice: seen.append(notice.message_primary))
        connection.execute("DO $$ BEGIN RAISE NOTICE 'hear me'; END $$")
        self.assertEqual(seen, ["hear me"])

    def test_handlers_are_there_again(self):
        heard = {name: [] for name in ("notify", "notice", "removed", "on_connect", "theirs")}

        def on_connect(raw):
            raw.execute("LISTEN news")
            raw.add_notify_handler(lambda notification: heard["on_connect"].append(notification))

        connection = self.connect(on_connect=on_connect)
        connection.add_notify_handler(heard["notify"].append)
        connection.add_notice_handler(heard["notice"].append)
        for name in ("removed", "notify"):
            connection.add_notify_handler(heard[name].append)
            connection.remove_notify_handler(heard[name].append)
        connection.driver_connection.add_notify_handler(heard["theirs"].append)
        connection.remove_notify_handler(heard["theirs"].append)
        for number in range(1, 4):
            self.forward.drop()
            with connection.transaction():
                connection.execute("NOTIFY news")
                connection.execute("DO $$ BEGIN RAISE NOTICE 'hear me'; END $$")
            connection.execute("SELECT 1")
            connection.commit()
            self.assertEqual(
                {name: len(each) for name, each in heard.items()},
                {
                    "notify": number,
                    "notice": number,
                    "removed": 0,
                    "on_connect": number,
                    "theirs": 0,
                },
            )

    def test_composed_sql(self):
        self.make_table()
        connection = self.connect()
        statement = sql.SQL("INSERT INTO {} VALUES ({})").format(sql.Identifier("item"), "one")
        connection.begin()
        connection.rollback()
        self.assertEqual(self.round_trips(lambda: connection.execute(statement)), 1)
        connection.commit()
        self.assertEqual(self.names(), ["one"])


class ProcessTests(Psycopg, DatabaseTestCase):
    def test_a_forked_child_leaves_the_session_to_its_parent(self):
        connection = self.connect()
        connection.execute("SELECT 1")
        raw = connection.driver_connection
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                connection.rollback()
                other = connection.execute("SELECT pg_backend_pid()").fetchone()
                del raw
                gc.collect()
                status = other == (0,)
                connection.close()
            finally:
                os._exit(status)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
        self.assertFalse(raw.closed)
        self.assertEqual(connection.execute("SELECT 2").fetchone(), (2,))
        self.assertEqual(connection.state, "active")


class TransactionManagerTests(Psycopg, DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()

    def test_zopeless(self):
        ztm = initZopeless(self.dsn, driver="psycopg", timeout=30)
        self.addCleanup(ztm.uninstall)
        ztm.cursor().execute("INSERT INTO item VALUES ('one')")
        ztm.commit()
        self.forward.drop()
        ztm.cursor().execute("INSERT INTO item VALUES ('two')")
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            ztm.commit()
        ztm.abort()
        ztm.cursor().execute("INSERT INTO item VALUES ('three')")
        ztm.commit()
        self.assertEqual(self.names(), ["one", "three"])

    def test_a_loss_in_the_shared_trip_dooms_the_transaction(self):
        ztm = initZopeless(self.dsn, driver="psycopg", timeout=30)
        self.addCleanup(ztm.uninstall)
        cursor = ztm.cursor()
        cursor.execute("SELECT 1")
        ztm.abort()
        self.forward.cut("to_client", 0)
        with self.assertRaises(DisconnectionError):
            cursor.execute("INSERT INTO item VALUES ('one')")
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        ztm.abort()
        self.assertEqual(self.names(), [])


# BEGIN along with a statement.


class BeginWithStatementTests(Psycopg, test_begin_along.BeginAlongTestCase):
    """A transaction begins along with its first statement."""

    witnesses = ("xid", XidWitness(at_commit=True), Ledger(), None)

    def insert(self, connection, name="one"):
        return connection.execute(
            "INSERT INTO item SELECT %s || nextval('executions') RETURNING name", (name,)
        )

    def test_the_witness_knows_the_id_of_the_transaction(self):
        connection = self.ready()
        ((number,),) = connection.execute("SELECT pg_current_xact_id()").fetchall()
        self.assertEqual(connection.work.link.observer.xid, int(number))

    # Round trips

    def test_a_transaction_of_one_statement(self):
        for witness in self.witnesses:
            connection = self.ready(witness=witness)

            def use(connection=connection):
                connection.execute("SELECT 1").fetchall()
                connection.commit()

            def use_begin(connection=connection, use=use):
                connection.begin()
                use()

            with self.subTest(witness=witness):
                self.assertEqual(self.round_trips(use), 2)
                self.assertEqual(self.round_trips(use_begin), 3)

    def test_forms_of_statements(self):
        connection = self.ready()
        for trips, statement, parameters in [
            (1, "SELECT 1", None),
            (1, b"SELECT %s", [1]),
            (1, " \n with n AS (SELECT 1) TABLE n ; ", None),
            (1, "values (%(n)s)", {"n": 1}),
            (1, sql.SQL("SELECT {}").format(1), None),
            (1, "SELECT $$a$$ || %s", ["b"]),
            # These go after BEGIN.
            (2, "SELECT $$a$$", None),
            (2, "SELECT ';'", None),
            (2, "SELECT 1; SELECT 2", None),
            (2, "SET LOCAL work_mem TO '1MB'", None),
            (2, "-- what for\nSELECT 1", None),
            (2, b"LISTEN news", None),
        ]:
            with self.subTest(statement=statement):
                use = self.execution(connection, statement, parameters)
                self.assertEqual(self.round_trips(use), trips)
                connection.rollback()

    def execution(self, connection, statement, parameters):
        return lambda: connection.execute(statement, parameters)

    def test_cursors(self):
        class Subclass(psycopg.Cursor):
            def execute(self, *args, **keywords):
                return super().execute(*args, **keywords)

        connection = self.ready()
        for trips, factory in [
            (1, psycopg.ClientCursor),
            (1, psycopg.RawCursor),
            (2, Subclass),
        ]:
            cursor = connection.cursor(cursor_factory=factory)
            self.assertEqual(self.round_trips(self.execution(cursor, "SELECT 1", None)), trips)
            self.assertEqual(cursor.fetchall(), [(1,)])
            connection.rollback()

    def test_what_has_no_form(self):
        connection = self.ready()
        with self.assertRaises(TypeError):
            connection.execute(5)
        self.assertEqual(connection.state, "active")

    def test_an_interrupt_before_anything_is_sent(self):
        connection = self.ready()
        with (
            mock.patch.object(psycopg_driver._SharedTrip, "__enter__", side_effect=TimeoutError),
            self.assertRaises(TimeoutError),
        ):
            self.insert(connection)
        self.assertEqual((self.executions(), connection.state), (0, "active"))

    def test_prepared_statements(self):
        connection = self.ready()
        for _ in range(8):
            self.assertEqual(self.round_trips(lambda: self.insert(connection)), 1)
            connection.rollback()
        self.assertEqual(self.executions(), 8)

    def test_settings_travel_along(self):
        connection = self.ready()
        connection.set_session("SERIALIZABLE", readonly=True, deferrable=True)
        cursor = connection.cursor()
        self.assertEqual(self.round_trips(lambda: cursor.execute(test_session.SHOW)), 1)
        self.assertEqual(cursor.fetchone(), ("serializable", "on", "on"))

    def test_the_version_of_psycopg_is_not_known(self):
        connection = self.ready()
        with mock.patch.object(psycopg_driver, "KNOWS_PIPELINE", False):
            self.assertEqual(self.round_trips(lambda: connection.execute("SELECT 1")), 2)

    def test_large_parameters_and_results(self):
        connection = self.ready()
        large = "x" * 5_000_000
        cursor = connection.execute("SELECT %s", (large,))
        self.assertEqual(cursor.fetchone(), (large,))
        self.assertEqual(connection.state, "active")

    # The session has ended while idle

    def test_it_reconnects_and_executes_once(self):
        for witness in self.witnesses:
            connection = self.ready(witness=witness)
            for end in (
                self.forward.drop,
                lambda: self.forward.drop(reset=True),
                lambda: [self.server.terminate_backend(pid) for pid in self.sessions()],
            ):
                end()
                wait_until(
                    lambda connection=connection: not connection.work.link.session.watch.is_quiet()
                )
                self.insert(connection)
                connection.commit()
                self.assertEqual((self.executions(), self.names()), (1, ["one1"]))
                self.query("DELETE FROM item")

    # The session ends on the way

    def test_a_loss_dooms(self):
        for direction in ("to_server", "to_client"):
            for witness in self.witnesses:
                connection = self.ready(witness=witness)
                self.forward.cut(direction, 0)
                with self.assertRaises(DisconnectionError):
                    self.insert(connection)
                self.assertEqual(connection.state, "doomed")
                connection.rollback()
                # The server may have BEGIN answered, and the statement yet to execute.
                wait_until(lambda: not self.sessions())
                self.assertEqual(self.names(), [])
                self.assertLessEqual(self.executions(), 1)

    def test_a_server_that_ends_the_session_dooms(self):
        connection = self.ready()
        with self.assertRaises(DisconnectionError) as lost:
            connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        self.assertIs(lost.exception.getOriginalException()[0], errors.AdminShutdown)
        self.assertEqual(connection.state, "doomed")

    def test_the_work_runs_again(self):
        connection = self.ready()

        def work():
            self.insert(connection)

        self.forward.cut("to_client", 0)
        with self.assertRaises(DisconnectionError):
            work()
        connection.rollback()
        connection.run(work)
        self.assertEqual(len(self.names()), 1)

    # BEGIN or its rider fails

    def test_the_ledgers_row_is_gone(self):
        connection = self.ready(witness=Ledger())
        self.query("DELETE FROM zreconnect_ledger")
        self.insert(connection)
        self.assertEqual(self.executions(), 1)
        connection.commit()
        self.assertEqual(self.names(), ["one1"])
        self.insert(connection, "two")
        self.forward.cut("to_client", 0)
        connection.commit()
        self.assertEqual(self.names(), ["one1", "two1"])

    def test_the_ledger_is_gone(self):
        connection = self.ready(witness=Ledger())
        self.query("DROP TABLE zreconnect_ledger")
        with self.assertRaises(errors.UndefinedTable):
            self.insert(connection)
        self.assertEqual((self.executions(), connection.state), (0, "doomed"))
        connection.rollback()
        # The next session has it again.
        self.insert(connection)
        connection.commit()
        self.assertEqual((self.executions(), self.names()), (1, ["one1"]))

    def test_begin_itself_fails(self):
        connection = self.ready()
        begin = psycopg_driver._begin
        for beginnings, seen in [
            (["BEGIN ISOLATION LEVEL NONE", "BEGIN"], None),
            (["BEGIN ISOLATION LEVEL NONE"] * 2, errors.SyntaxError),
        ]:
            with mock.patch.object(psycopg_driver, "_begin", side_effect=beginnings) as patched:
                if seen is None:
                    self.insert(connection)
                    self.assertEqual((self.executions(), connection.state), (1, "active"))
                    connection.rollback()
                else:
                    with self.assertRaises(seen):
                        self.insert(connection)
                    self.assertEqual((self.executions(), connection.state), (0, "doomed"))
                    connection.rollback()
            self.assertEqual(patched.call_count, 2)
        self.assertIs(psycopg_driver._begin, begin)
        self.assertEqual(self.names(), [])

    def busy(self, connection):
        with self.assertRaises(psycopg.OperationalError) as busy:
            self.insert(connection)
        self.assertNotIsInstance(busy.exception, DisconnectionError)
        return self.executions(), connection.state

    def test_a_session_that_is_busy(self):
        connection = self.ready()
        with self.plain() as other:
            other.execute("LOCK TABLE item")
            connection.driver_connection.pgconn.send_query(b"SELECT * FROM item")
            self.assertEqual(self.busy(connection), (0, "doomed"))
        connection.rollback()
        self.insert(connection)
        self.assertEqual((self.executions(), connection.state), (1, "active"))

    def test_a_session_with_an_answer_that_nobody_has_read(self):
        connection = self.ready()
        raw = connection.driver_connection.pgconn
        raw.send_query(b"SELECT 1")
        # BEGIN goes first then, and is refused.
        wait_until(lambda: not connection.work.link.session.watch.is_quiet())
        self.assertEqual(self.busy(connection), (0, "doomed"))
        connection.rollback()
        self.insert(connection)
        self.assertEqual((self.executions(), connection.state), (1, "active"))

    def test_the_server_is_no_longer_what_was_asked_for(self):
        connection = self.ready(dsn=self.dsn + "?target_session_attrs=read-write")
        self.addCleanup(self.query, "SELECT pg_reload_conf()")
        self.addCleanup(self.query, "ALTER SYSTEM RESET default_transaction_read_only")
        self.query("ALTER SYSTEM SET default_transaction_read_only TO on")
        self.query("SELECT pg_reload_conf()")
        wait_until(lambda: self.query("SHOW default_transaction_read_only") == [("on",)])
        with self.assertRaisesRegex(DisconnectionError, "target_session_attrs"):
            connection.execute("SELECT 1")
        self.assertEqual(connection.state, "doomed")

    # The statement fails

    def test_the_users_error(self):
        connection = self.ready()
        try:
            connection.execute("SELECT * FROM missing")
        except errors.UndefinedTable as wrong:
            self.assertEqual(wrong.sqlstate, "42P01")
            self.assertIn("test_the_users_error", traceback.format_exc())
        else:
            self.fail("no error")
        self.assertEqual(connection.state, "active")
        with self.assertRaises(errors.InFailedSqlTransaction):
            connection.execute("SELECT 1")
        with self.assertRaisesRegex(psycopg.InternalError, "Nothing was committed"):
            connection.commit()
        self.assertEqual(connection.state, "idle")

    def test_an_error_keeps_nothing_alive(self):
        gc.disable()
        self.addCleanup(gc.enable)
        connection = zreconnect.connect(self.dsn, driver="psycopg")
        connection.begin()
        connection.rollback()
        with contextlib.suppress(psycopg.Error):
            connection.execute("SELECT * FROM missing")
        forgotten = weakref.ref(connection)
        del connection
        self.assertIsNone(forgotten())

    def test_an_error_before_it_is_sent(self):
        connection = self.ready()
        for arguments, error in [
            (("SELECT %s, %s", (1,)), psycopg.ProgrammingError),
            (("SELECT %s", (object(),)), psycopg.ProgrammingError),
            (("SELECT %s", 5), TypeError),
            (("SELECT %(one)s", (1,)), TypeError),
        ]:
            with self.assertRaises(error):
                connection.execute(*arguments)
            self.assertEqual(connection.state, "active")
            self.assertEqual(connection.execute("SELECT 1").fetchone(), (1,))
            connection.rollback()

    def test_copy_by_execute(self):
        connection = self.ready()
        with self.assertRaises(psycopg.ProgrammingError):
            connection.execute("COPY item TO STDOUT")
        connection.rollback()
        self.assertEqual(connection.execute("SELECT 1").fetchone(), (1,))

    def test_an_interrupt(self):
        class Interrupted(psycopg.adapt.Dumper):
            def dump(self, obj):
                raise KeyboardInterrupt

        class Never:
            pass

        connection = self.ready()
        connection.adapters.register_dumper(Never, Interrupted)
        with self.assertRaises(KeyboardInterrupt):
            connection.execute("SELECT %s", (Never(),))
        self.assertEqual(connection.state, "active")
        connection.rollback()
        self.insert(connection)
        connection.commit()
        self.assertEqual(len(self.names()), 1)

    def test_an_interrupt_at_every_line_of_a_first_statement(self):
        connection = self.ready()
        number, interrupt = 0, None
        while interrupt is None or interrupt.places:
            connection.execute("SELECT 1")
            connection.rollback()
            number += 1
            interrupt = AtLines([number], [Alarm()])
            with contextlib.suppress(Alarm), interrupt():
                connection.execute("SELECT 1")
                self.assertTrue(interrupt.is_unraisable or not interrupt.places, interrupt.place)
            interrupt.forget()
            connection.rollback()

    def test_an_interrupt_at_the_end_of_a_pipeline(self):
        connection = self.ready()

        def executemany():
            connection.cursor().executemany("INSERT INTO item VALUES (%s)", [("one",), ("two",)])

        def pipeline():
            with connection.pipeline():
                connection.execute("INSERT INTO item VALUES ('one')")

        for request, error in itertools.product(
            (executemany, pipeline), (Alarm, KeyboardInterrupt)
        ):

            def interrupted(pipeline, error=error):
                raise error
                yield

            with self.subTest(request.__name__, error=error):
                with (
                    self.assertRaises(error),
                    mock.patch("psycopg.Pipeline._exit_gen", interrupted),
                ):
                    request()
                connection.rollback()
                executemany()
                connection.rollback()
        self.assertEqual(self.names(), [])

    def test_an_error_at_the_end_of_a_pipeline(self):
        connection = self.ready()
        lost = psycopg.OperationalError("server closed the connection unexpectedly")
        for error, expected in (
            (lost, DisconnectionError),
            (psycopg.errors.DivisionByZero(), psycopg.errors.DivisionByZero),
        ):

            def met(pipeline, error=error):
                raise error
                yield

            with self.subTest(error):
                with (
                    mock.patch("psycopg.Pipeline._exit_gen", met),
                    self.assertRaises(expected),
                ):
                    connection.cursor().executemany("INSERT INTO item VALUES (%s)", [("one",)])
                connection.rollback()
                self.assertEqual(connection.execute("SELECT 1").fetchone(), (1,))
                connection.rollback()

    def test_a_pipeline_that_cannot_end(self):
        """Of what the program handles already nothing is raised."""
        connection = self.ready()
        with mock.patch("psycopg.Pipeline._exit_gen", lambda pipeline: (_ for _ in ())):
            try:
                raise ValueError
            except ValueError:
                with self.assertRaisesRegex(psycopg.OperationalError, "pipeline mode"):
                    connection.cursor().executemany("INSERT INTO item VALUES (%s)", [("one",)])
        connection.rollback()
        self.assertEqual(connection.execute("SELECT 1").fetchone(), (1,))

    def test_an_interrupt_while_it_waits(self):
        connection = self.ready()
        pid = connection.info.backend_pid
        # A shell's background jobs ignore the signal, and so would this one.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, handler)

        def interrupt():
            wait_until(
                lambda: self.query(
                    "SELECT true FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'",
                    pid,
                )
            )
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with self.assertRaises(KeyboardInterrupt):
            connection.execute("SELECT pg_sleep(60)")
        thread.join()
        self.assertEqual(connection.state, "active")
        connection.rollback()
        self.insert(connection)
        connection.commit()
        self.assertEqual(len(self.names()), 1)

    # Who does without

    def test_not_without_an_implicit_begin(self):
        connection = self.ready()
        connection.work.implicit_begin = False
        with self.assertRaisesRegex(psycopg.ProgrammingError, "call begin"):
            connection.execute("SELECT 1")

    def test_not_in_autocommit_mode(self):
        connection = self.ready()
        connection.autocommit = True
        self.assertEqual(self.round_trips(lambda: self.insert(connection)), 1)
        self.assertEqual(len(self.names()), 1)
        with connection:
            self.assertEqual(self.round_trips(lambda: self.insert(connection)), 1)
            self.assertEqual(connection.state, "active")


class RoundTripTests(Psycopg, test_round_trips.RoundTripTests):
    test_one_statement = None
    test_either_witness_costs_none = None
    test_a_server_side_cursor_costs_one_more = None
    test_reconnecting_sends_begin_once_more = None
    trips_of_writing = 2

    def test_a_server_side_cursor(self):
        connection = self.connect()

        def use():
            with connection.cursor("numbers") as cursor:
                cursor.execute("SELECT 1")
                cursor.fetchall()
            connection.commit()

        use()
        # BEGIN, DECLARE, its description, FETCH, CLOSE, COMMIT.
        self.assertEqual(self.round_trips(use), 6)
