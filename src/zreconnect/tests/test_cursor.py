"""Everything that works on a psycopg2 cursor works on ours."""

import contextlib
import io
import logging
import tempfile
import threading

import psycopg2
import psycopg2.extensions
import psycopg2.extras

import zreconnect
from zreconnect import DisconnectionError, ReconnectingCursor
from zreconnect.tests.base import DatabaseTestCase
from zreconnect.tests.interrupts import Alarm, AtLines


class CursorTests(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.connection = self.connect()
        self.cursor = self.connection.cursor()

    def test_before_the_first_statement(self):
        cursor = self.cursor
        self.assertIsNone(cursor.description)
        self.assertEqual((cursor.rowcount, cursor.arraysize, cursor.itersize), (-1, 1, 2000))
        self.assertFalse(cursor.closed)
        self.assertIs(cursor.connection, self.connection)
        with self.assertRaisesRegex(psycopg2.ProgrammingError, "no results to fetch"):
            cursor.fetchone()

    def test_fetching(self):
        self.cursor.execute("SELECT generate_series(1, %s)", (10,))
        self.assertEqual(self.cursor.rowcount, 10)
        self.assertEqual(self.cursor.fetchone(), (1,))
        self.assertEqual(self.cursor.fetchmany(), [(2,)])
        self.assertEqual(self.cursor.fetchmany(2), [(3,), (4,)])
        self.cursor.arraysize = 3
        self.assertEqual(self.cursor.fetchmany(), [(5,), (6,), (7,)])
        self.assertEqual(next(self.cursor), (8,))
        self.assertEqual(list(self.cursor), [(9,), (10,)])
        with self.assertRaises(StopIteration):
            next(self.cursor)

    def test_fetching_after_an_iteration(self):
        for size, number in ((2, 2), (-1, 4), (9, 4), (0, 0)):
            self.cursor.execute("SELECT generate_series(1, 5)")
            self.assertEqual(next(iter(self.cursor)), (1,))
            self.assertEqual(self.cursor.fetchmany(size), [(n + 2,) for n in range(number)])

    def test_an_iteration_is_that_of_the_cursors_class(self):
        class Next(psycopg2.extensions.cursor):
            def __next__(self):
                return ("next", *super().__next__())

        class Many(psycopg2.extensions.cursor):
            def fetchmany(self, size):
                return [("many", *row) for row in super().fetchmany(size)]

        for factory, row in ((Next, ("next", 1)), (Many, (1,))):
            cursor = self.connection.cursor(cursor_factory=factory)
            cursor.execute("SELECT 1")
            self.assertEqual(list(cursor), [row])

    def test_named_parameters_and_executemany(self):
        self.cursor.execute("CREATE TEMPORARY TABLE number (n int)")
        self.cursor.executemany("INSERT INTO number VALUES (%(n)s)", [{"n": 1}, {"n": 2}])
        self.cursor.execute("SELECT sum(n) FROM number")
        self.assertEqual(self.cursor.fetchone(), (3,))

    def test_callproc_and_mogrify(self):
        self.cursor.callproc("upper", ["word"])
        self.assertEqual(self.cursor.fetchone(), ("WORD",))
        self.assertEqual(self.cursor.mogrify("SELECT %s", ("it's",)), b"SELECT 'it''s'")
        self.assertEqual(self.cursor.query, b"SELECT * FROM upper('word')")

    def test_it_has_the_methods_that_the_drivers_has(self):
        names = ("callproc", "copy", "copy_expert", "copy_from", "copy_to", "stream")
        with tempfile.TemporaryDirectory() as directory:
            for driver, dsn, has in (
                ("psycopg2", self.dsn, {"callproc", "copy_expert", "copy_from", "copy_to"}),
                ("psycopg", self.dsn, {"copy", "stream"}),
                ("sqlite", f"sqlite:///{directory}/database", set()),
            ):
                with self.subTest(driver):
                    connection = zreconnect.connect(dsn, driver=driver)
                    self.addCleanup(connection.close)
                    cursor = connection.cursor()
                    self.assertEqual({name for name in names if hasattr(cursor, name)}, has)
                    self.assertEqual(connection.state, "idle")

    def test_mogrify_begins_nothing(self):
        self.cursor.mogrify("SELECT 1")
        self.assertEqual(self.connection.state, "idle")

    def test_copy(self):
        self.cursor.execute("CREATE TEMPORARY TABLE number (n int)")
        self.cursor.copy_from(io.StringIO("1\n2\n"), "number")
        self.cursor.copy_expert("COPY number FROM STDIN", io.StringIO("3\n"))
        out = io.StringIO()
        self.cursor.copy_to(out, "number")
        self.assertEqual(out.getvalue(), "1\n2\n3\n")

    def test_execute_values(self):
        self.cursor.execute("CREATE TEMPORARY TABLE number (n int, name text)")
        psycopg2.extras.execute_values(
            self.cursor, "INSERT INTO number VALUES %s", [(n, str(n)) for n in range(250)]
        )
        self.cursor.execute("SELECT count(*) FROM number")
        self.assertEqual(self.cursor.fetchone(), (250,))
        psycopg2.extras.execute_batch(self.cursor, "SELECT %s", [(1,), (2,)])

    def test_hstore_adapter(self):
        self.query("CREATE EXTENSION hstore")
        psycopg2.extras.register_hstore(self.connection.driver_connection)
        self.cursor.execute("SELECT 'a=>b'::hstore")
        self.assertEqual(self.cursor.fetchone(), ({"a": "b"},))

    def test_server_side_cursor(self):
        with self.connection.cursor("numbers", scrollable=True) as cursor:
            self.assertEqual(cursor.name, "numbers")
            cursor.itersize = 3
            cursor.execute("SELECT generate_series(1, 10)")
            self.assertEqual(cursor.fetchone(), (1,))
            self.assertEqual(list(cursor), [(n,) for n in range(2, 11)])
            cursor.scroll(0, mode="absolute")
            self.assertEqual(cursor.fetchmany(2), [(1,), (2,)])
        self.assertEqual(self.connection.notices, [])
        self.connection.commit()

    def test_server_side_cursor_that_outlives_the_transaction(self):
        cursor = self.connection.cursor("numbers", withhold=True)
        cursor.execute("SELECT generate_series(1, 3)")
        self.connection.commit()
        self.assertEqual(cursor.fetchall(), [(1,), (2,), (3,)])
        cursor.close()

    def test_server_side_cursor_outside_a_transaction(self):
        self.connection.autocommit = True
        with self.assertRaisesRegex(psycopg2.ProgrammingError, "outside of transactions"):
            self.connection.cursor("numbers").execute("SELECT 1")

    def test_statements_after_a_server_side_cursor(self):
        for end in (self.connection.commit, self.connection.rollback):
            self.connection.cursor("numbers").execute("SELECT 1")
            self.cursor.execute("SELECT 2")
            self.assertEqual(self.cursor.fetchone(), (2,))
            end()
            self.cursor.execute("SELECT 3")
            self.assertEqual(self.connection.state, "active")
            end()

    def test_cursor_factories(self):
        for factory, row in [
            (psycopg2.extras.DictCursor, [1, 2]),
            (psycopg2.extras.RealDictCursor, {"a": 1, "b": 2}),
            (psycopg2.extras.NamedTupleCursor, (1, 2)),
        ]:
            for name in (None, "server_side"):
                with self.subTest(factory=factory, name=name):
                    cursor = self.connection.cursor(name, cursor_factory=factory)
                    cursor.execute("SELECT 1 AS a, 2 AS b")
                    self.assertEqual(list(cursor), [row])
                    cursor.close()
        self.connection.cursor_factory = psycopg2.extras.DictCursor
        cursor = self.connection.cursor()
        cursor.execute("SELECT 1 AS a")
        self.assertEqual(cursor.fetchone()["a"], 1)

    def test_a_cursor_is_of_the_class_that_was_asked_for(self):
        cursor = self.connection.cursor(cursor_factory=psycopg2.extras.DictCursor)
        self.assertIsInstance(cursor, psycopg2.extras.DictCursor)
        self.assertIsInstance(cursor, ReconnectingCursor)
        self.assertIs(self.cursor.__class__, ReconnectingCursor)
        self.connection.cursor_factory = psycopg2.extras.DictCursor
        self.assertIsInstance(self.connection.cursor(), psycopg2.extras.DictCursor)
        function = self.connection.cursor(cursor_factory=lambda *args: None)
        self.assertIs(function.__class__, ReconnectingCursor)

    def test_a_cursor_is_of_the_class_that_the_connection_chooses(self):
        factory = psycopg2.extras.DictConnection
        connection = zreconnect.ReconnectingConnection(
            lambda: psycopg2.connect(self.dsn, connection_factory=factory)
        )
        self.addCleanup(connection.close)
        cursor = connection.cursor()
        self.assertIs(cursor.__class__, ReconnectingCursor)
        connection.ping()
        self.assertIs(cursor.__class__, psycopg2.extras.DictCursor)
        cursor.execute("SELECT 1 AS a")
        connection.commit()
        self.forward.drop()
        connection.cursor().execute("SELECT 1")
        self.assertIs(cursor.__class__, psycopg2.extras.DictCursor)
        self.assertEqual(cursor.fetchone()["a"], 1)
        connection.rollback()
        with connection.cursor() as cursor:
            connection.driver_connection.close()
            self.assertIs(cursor.__class__, ReconnectingCursor)
        cursor = connection.cursor()
        connection.close()
        self.assertIs(cursor.__class__, ReconnectingCursor)

    def test_what_is_refused_is_refused_at_once(self):
        for option in ({"scrollable": True}, {"scrollable": False}, {"withhold": True}):
            with self.assertRaisesRegex(psycopg2.ProgrammingError, "a name"):
                self.connection.cursor(**option)
        self.connection.cursor(withhold=False, scrollable=None)
        self.assertEqual(self.connection.state, "idle")

    def test_a_closed_cursor(self):
        self.cursor.execute("SELECT 1 AS n")
        rows = iter(self.cursor)
        for cursor in (self.cursor, self.connection.cursor()):
            cursor.close()
            cursor.close()
            self.assertTrue(cursor.closed)
            self.assertEqual(cursor.mogrify("SELECT %s", (1,)), b"SELECT 1")
            for request in (
                cursor.fetchone,
                lambda cursor=cursor: cursor.execute("SELECT 1"),
                lambda cursor=cursor: cursor.scroll(1),
                cursor.nextset,
                lambda cursor=cursor: list(cursor),
            ):
                with self.assertRaises(psycopg2.InterfaceError):
                    request()
        with self.assertRaises(psycopg2.InterfaceError):
            next(rows)
        self.assertEqual(self.cursor.description[0].name, "n")
        self.assertEqual(self.connection.state, "active")

    def test_a_cursor_that_was_closed_before_the_first_session(self):
        self.cursor.close()
        self.assertIsNone(self.cursor.query)
        with self.assertRaises(psycopg2.InterfaceError):
            self.cursor.nextset()

    def test_a_cursor_is_closed_with_its_connection(self):
        self.connection.close()
        self.assertTrue(self.cursor.closed)

    def test_a_cursor_class_with_a_log_sees_only_the_users_statements(self):
        def connection_factory():
            raw = psycopg2.connect(self.dsn, connection_factory=psycopg2.extras.LoggingConnection)
            raw.initialize(logging.getLogger("zreconnect.tests.statements"))
            return raw

        from zreconnect import ReconnectingConnection

        connection = ReconnectingConnection(connection_factory)
        self.addCleanup(connection.close)
        with (
            self.assertLogs("zreconnect.tests.statements", "DEBUG") as logs,
            connection.transaction() as cursor,
        ):
            cursor.execute("SELECT 1")
        self.assertEqual([record.getMessage() for record in logs.records], ["b'SELECT 1'"])

    def test_settings_of_psycopg2s_cursor(self):
        self.cursor.tzinfo_factory = None
        self.assertIsNone(self.cursor.tzinfo_factory)
        self.cursor.execute("SELECT now()")
        self.assertIsNone(self.cursor.fetchone()[0].tzinfo)
        with self.assertRaises(AttributeError):
            self.cursor.unknown = 1
        with self.assertRaises(AttributeError):
            _ = self.cursor.unknown
        with self.assertRaises(AttributeError):
            _ = self.cursor._unknown
        self.assertTrue(callable(self.connection.cursor().tzinfo_factory))

    def test_close(self):
        self.cursor.execute("SELECT 1")
        self.cursor.close()
        self.cursor.close()
        self.assertTrue(self.cursor.closed)
        for use in (lambda: self.cursor.execute("SELECT 1"), self.cursor.fetchone):
            with self.assertRaisesRegex(psycopg2.InterfaceError, "The cursor is closed"):
                use()

    def test_close_of_a_class_that_was_never_used(self):
        closed = []

        class Cursor(psycopg2.extensions.cursor):
            def close(self):
                closed.append(self.name)
                super().close()

        def close(name=None):
            with self.connection.cursor(name, cursor_factory=Cursor):
                pass

        def in_thread():
            thread = threading.Thread(target=close)
            thread.start()
            thread.join()

        close()
        self.assertEqual((self.sessions(), closed), ([], []))
        self.connection.ping()
        close()
        self.assertEqual(self.round_trips(lambda: close("idle")), 0)
        self.connection.begin()
        close("active")
        # Which would have to wait for this one's transaction.
        in_thread()
        self.assertEqual(closed, [None, "active"])

    def test_close_of_a_server_side_cursor_that_a_statement_has_declared(self):
        for _ in range(2):
            self.cursor.execute("DECLARE numbers CURSOR FOR SELECT generate_series(1, 7)")
            self.connection.cursor("numbers").close()
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            self.connection.cursor("numbers").close()

    def test_errors_of_the_user_pass_unchanged(self):
        with self.assertRaises(psycopg2.errors.SyntaxError) as wrong:
            self.cursor.execute("SELEC 1")
        self.assertEqual(wrong.exception.pgcode, "42601")
        self.assertEqual(self.connection.state, "active")
        with self.assertRaises(psycopg2.errors.InFailedSqlTransaction):
            self.cursor.execute("SELECT 1")
        self.connection.rollback()
        self.cursor.execute("SELECT 1")

    def test_an_error_while_reading_passes_unchanged(self):
        for read in (lambda cursor: list(cursor), lambda cursor: cursor.fetchall()):
            cursor = self.connection.cursor("numbers")
            cursor.execute("SELECT 1 / (3 - n) FROM generate_series(1, 5) n")
            with self.assertRaises(psycopg2.errors.DivisionByZero):
                read(cursor)
            self.connection.rollback()

    def test_an_error_while_closing_passes_unchanged(self):
        cursor = self.connection.cursor("numbers")
        cursor.execute("SELECT 1")
        self.cursor.execute("CLOSE numbers")
        with self.assertRaises(psycopg2.errors.InvalidCursorName):
            cursor.close()

    def test_an_interrupt_of_close_passes_unchanged(self):
        self.cursor.execute("SELECT 1")
        number, interrupt = 0, None
        while interrupt is None or interrupt.places:
            number += 1
            cursor, interrupt = self.connection.cursor(), AtLines([number], [Alarm()])
            with contextlib.suppress(Alarm), interrupt():
                cursor.close()
                self.assertEqual(interrupt.places, [])
            interrupt.forget()

    def test_it_outlives_reconnecting_with_its_settings(self):
        self.cursor.arraysize = 2
        self.cursor.execute("SELECT 1")
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            self.cursor.execute("SELECT 1")
        self.connection.rollback()
        self.cursor.execute("SELECT generate_series(1, 3)")
        self.assertEqual(self.cursor.fetchmany(), [(1,), (2,)])

    def test_a_server_side_cursor_executes_again_after_a_disconnect(self):
        cursor = self.connection.cursor("numbers")
        cursor.execute("SELECT 1")
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            cursor.fetchone()
        self.connection.rollback()
        cursor.execute("SELECT 2")
        self.assertEqual(cursor.fetchone(), (2,))

    def test_an_old_cursor_closes_after_its_session(self):
        cursor = self.connection.cursor("numbers")
        cursor.execute("SELECT 1")
        self.forward.drop()
        self.connection.rollback()
        self.connection.begin()
        cursor.close()
        self.assertEqual(self.connection.state, "active")
