"""psycopg2: BEGIN travels along with the first statement, and nobody sees it."""

import signal
from unittest import mock

from psycopg2 import errors, extensions, extras, sql

from zreconnect import DisconnectionError, Ledger, XidWitness, beginning
from zreconnect.tests.base import DatabaseTestCase, wait_until

WITNESSES = ("xid", XidWitness(at_commit=True), Ledger(), None)


class BeginAlongTestCase(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()
        # It counts what is executed, in transactions that are rolled back too.
        self.query("CREATE SEQUENCE executions")

    def ready(self, **keywords):
        """A connection with a session, and without a transaction."""
        connection = self.connect(**keywords)
        connection.begin()
        connection.rollback()
        return connection

    def trips(self, cursor, *arguments):
        return self.round_trips(lambda: cursor.execute(*arguments))

    def insert(self, connection, name="one"):
        connection.cursor().execute("INSERT INTO item SELECT %s || nextval('executions')", (name,))

    def executions(self):
        """How often `insert` was executed since it was asked last."""
        ((count,),) = self.query(
            "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM executions"
        )
        self.query("SELECT setval('executions', 1, false)")
        return count


class RoundTripTests(BeginAlongTestCase):
    def test_forms_of_statements(self):
        connection = self.ready()
        cursor = connection.cursor()
        for trips, statement, *parameters in [
            (1, "SELECT 1"),
            (1, " \n with n AS (SELECT 1) TABLE n ; "),
            (1, "values (%(n)s)", {"n": 1}),
            (1, "SELECT 10 %% %s", [3]),
            (1, "SELECT 10 % 3"),
            # These go after BEGIN.
            (2, b"SELECT 1"),
            (2, sql.SQL("SELECT {}").format(sql.Literal(1))),
            (2, "SELECT 1; SELECT 1"),
            (2, "SELECT 1 -- ;\nUNION SELECT 1"),
            (2, "SHOW work_mem"),
            (2, "SET LOCAL work_mem TO '1MB'"),
            (2, "-- what for\nSELECT 1"),
        ]:
            with self.subTest(statement=statement):
                self.assertEqual(self.trips(cursor, statement, *parameters), trips)
                if cursor.description and "SHOW" not in str(statement):
                    self.assertEqual(cursor.fetchall(), [(1,)])
                self.assertEqual(connection.state, "active")
                connection.rollback()

    def test_a_long_value(self):
        cursor = self.ready().cursor()
        # Its hexadecimal form is one word, which nothing may try again from each of its letters.
        cursor.execute("SELECT length(%s)", (b"x" * 500_000,))
        self.assertEqual(cursor.fetchone(), (500_000,))

    def test_commit_asks_for_the_id_where_it_cannot_see_what_was_done(self):
        connection = self.ready()
        cursor = connection.cursor()

        def trips(*statements):
            cursor.execute("SELECT 1")
            for statement in statements:
                cursor.execute(statement)
            return self.round_trips(connection.commit)

        self.assertEqual(trips("DECLARE one CURSOR FOR SELECT 1"), 1)
        self.assertEqual(trips("DECLARE two CURSOR WITH HOLD FOR SELECT 1"), 2)
        self.assertEqual(trips(), 1)
        # Whoever has it can notify with it, at any time.
        raw = connection.driver_connection
        for _ in range(2):
            self.assertEqual(trips(), 2)
        cursor.execute("SELECT 1")
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            connection.commit()
        connection.rollback()
        connection.begin()
        self.assertIsNot(connection.raw_connection, raw)
        connection.rollback()
        self.assertEqual(trips(), 1)
        cursor.execute("SELECT 1")
        connection.driver_connection.cursor().execute("NOTIFY one")
        self.assertEqual(self.round_trips(connection.commit), 2)

    def test_classes_of_cursors(self):
        class Own(extensions.cursor):
            def execute(self, query, vars=None):
                assert query == "SELECT 1", query
                super().execute(query, vars)

        class Plain(extensions.cursor):
            pass

        connection = self.ready()
        for trips, factory in [
            (1, None),
            (1, extras.DictCursor),
            (1, extras.RealDictCursor),
            (1, extras.NamedTupleCursor),
            (2, Own),
            (2, Plain),
        ]:
            with self.subTest(factory=factory):
                cursor = connection.cursor(cursor_factory=factory)
                self.assertEqual(self.trips(cursor, "SELECT 1"), trips)
                self.assertEqual(len(cursor.fetchall()), 1)
                connection.rollback()

    def test_after_a_pause_begin_goes_by_itself(self):
        connection = self.ready()
        cursor = connection.cursor()
        for seconds, trips in ((0.0, 2), (60.0, 1)):
            with mock.patch.object(beginning, "SURE_OF_SESSION", seconds):
                self.assertEqual(self.trips(cursor, "SELECT 1"), trips)
            connection.rollback()

    def test_modes_go_along(self):
        connection = self.ready()
        connection.set_session("SERIALIZABLE", readonly=True, deferrable=True)
        cursor = connection.cursor()
        trips = self.trips(
            cursor,
            "SELECT current_setting('transaction_isolation'),"
            " current_setting('transaction_read_only'),"
            " current_setting('transaction_deferrable')",
        )
        self.assertEqual((trips, cursor.fetchone()), (1, ("serializable", "on", "on")))

    def test_what_is_asked_at_commit(self):
        """An id for what has written, and nothing for what has not."""
        connection = self.ready()
        for statement, trips in (
            ("SELECT 1", 2),
            ("SELECT FROM item FOR UPDATE", 3),
            ("INSERT INTO item VALUES ('one')", 3),
        ):

            def use(statement=statement):
                connection.cursor().execute(statement)
                connection.commit()

            self.assertEqual(self.round_trips(use), trips, statement)
        self.assertEqual(self.names(), ["one"])

    def test_it_is_part_of_the_ledger(self):
        connection = self.ready(witness=Ledger())
        for number in (1, 2):
            self.insert(connection)
            self.forward.cut("to_client", 0)
            connection.commit()
            self.assertEqual(len(self.names()), number)
        self.assertEqual(self.executions(), 2)


class MeanwhileTests(BeginAlongTestCase):
    """What is told along must not come as one of the server's messages, in ``notices``.

    psycopg2 drops what is raised while it decodes one, which is Python for UTF-8: there the handler
    of a signal runs that has come while the statement was executed.
    """

    def test_what_a_signals_handler_raises_is_raised(self):
        class Alarm(Exception):
            pass

        def ring(number, frame):
            raise Alarm

        self.addCleanup(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, ring))
        self.addCleanup(signal.setitimer, signal.ITIMER_REAL, 0)
        for witness in WITNESSES:
            with self.subTest(witness=witness):
                connection = self.ready(witness=witness)
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with self.assertRaises(Alarm):
                    connection.cursor().execute("INSERT INTO item SELECT 'one' FROM pg_sleep(0.3)")
                # As with psycopg2 alone, it was executed.
                self.assertEqual(connection.state, "active")
                connection.commit()
                self.assertEqual(self.query("DELETE FROM item RETURNING name"), [("one",)])


class HiddenTests(BeginAlongTestCase):
    """What a program sees of its statement is what it has written."""

    def test_the_query(self):
        cursor = self.ready().cursor()
        self.assertIsNone(cursor.query)
        self.assertIsNone(cursor.execute("SELECT %s, '%%'", ("a",)))
        self.assertEqual(cursor.query, b"SELECT 'a', '%'")
        self.assertEqual(cursor.fetchall(), [("a", "%")])
        self.assertEqual((cursor.rowcount, cursor.statusmessage), (1, "SELECT 1"))

    def test_the_line_of_an_error(self):
        connection = self.ready()
        for statement, message in (
            ("SELECT *\nFROM nowhere", 'nowhere" does not exist\nLINE 2: FROM nowhere\n'),
            ("SELECT FROM\nWHERE", "syntax error at or near .*\nLINE 2: WHERE\n"),
        ):
            with self.assertRaisesRegex(errors.ProgrammingError, message):
                connection.cursor().execute(statement)
            self.assertEqual(connection.state, "active")
            with self.assertRaises(errors.InFailedSqlTransaction):
                connection.cursor().execute("SELECT 1")
            connection.rollback()

    def test_the_line_in_a_function(self):
        self.query(
            "CREATE FUNCTION wrong() RETURNS void LANGUAGE plpgsql AS "
            "$$BEGIN EXECUTE 'SELECT *\nFROM\nnowhere'; END$$"
        )
        with self.assertRaisesRegex(errors.UndefinedTable, "LINE 3: nowhere"):
            self.ready().cursor().execute("SELECT wrong()")

    def test_errors_without_a_line(self):
        connection = self.ready()
        with self.assertRaisesRegex(errors.DivisionByZero, "^division by zero\n$"):
            connection.cursor().execute("SELECT 1 / 0")
        self.assertEqual(connection.state, "active")

    def test_an_interrupt_while_parameters_are_adapted(self):
        class Interrupting:
            def getquoted(self):
                raise KeyboardInterrupt

            def __conform__(self, protocol):
                return self

        connection = self.ready()
        with self.assertRaises(KeyboardInterrupt):
            connection.cursor().execute("SELECT %s", (Interrupting(),))
        connection.rollback()
        self.insert(connection)
        connection.commit()
        self.assertEqual((self.executions(), self.names()), (1, ["one1"]))

    def test_parameters_that_are_wrong(self):
        class Unspeakable:
            def getquoted(self):
                raise KeyError("what")

            def __conform__(self, protocol):
                return self

        connection = self.ready()
        for parameters, error in (
            ((), IndexError),
            ((1, 2), TypeError),
            ((object(),), errors.ProgrammingError),
            ((Unspeakable(),), KeyError),
        ):
            with self.assertRaises(error):
                connection.cursor().execute("SELECT 'a' || %s || nextval('executions')", parameters)
            # As after BEGIN by itself.
            self.assertEqual(connection.state, "active")
            cursor = connection.cursor()
            cursor.execute("SELECT 1")
            self.assertEqual(cursor.fetchone(), (1,))
            connection.rollback()
        self.assertEqual(self.executions(), 0)


class RunsOfRowsTests(DatabaseTestCase):
    def test_what_is_left_of_a_run_comes_first(self):
        cursor = self.connect().cursor()
        cursor.execute("SELECT generate_series(1, 250)")
        for (number,) in cursor:
            if number == 95:
                break
        self.assertEqual((next(cursor), cursor.fetchone()), ((96,), (97,)))
        self.assertEqual(cursor.fetchmany(10), [(each,) for each in range(98, 108)])
        self.assertEqual([number for (number,) in cursor], list(range(108, 251)))

    def test_a_server_side_cursor_that_only_reads_and_is_asked_about_at_commit(self):
        connection = self.connect(witness=XidWitness(at_commit=True))
        cursor = connection.cursor("numbers")
        cursor.execute("SELECT generate_series(1, 3)")
        self.assertEqual(len(list(cursor)), 3)
        connection.commit()
        self.assertEqual(connection.state, "idle")


class LossTests(BeginAlongTestCase):
    def test_what_has_ended_while_idle_costs_nothing(self):
        for witness in WITNESSES:
            connection = self.ready(witness=witness)
            self.forward.drop()
            wait_until(lambda watch=connection.work.link.session.watch: not watch.is_quiet())
            self.insert(connection)
            connection.commit()
            self.assertEqual((self.executions(), self.names()), (1, ["one1"]))
            self.query("DELETE FROM item")

    def test_what_ends_on_the_way_dooms(self):
        for direction in ("to_server", "to_client"):
            for witness in WITNESSES:
                connection = self.ready(witness=witness)
                self.forward.cut(direction, 0)
                with (
                    self.assertRaises(DisconnectionError),
                    self.assertLogs("zreconnect", "WARNING") as log,
                ):
                    self.insert(connection)
                # The log does not say that it was idle.
                self.assertIn("while active", log.output[0])
                self.assertEqual(connection.state, "doomed")
                connection.rollback()
                wait_until(lambda: not self.sessions())
                self.assertEqual(self.names(), [])
                self.assertLessEqual(self.executions(), 1)

    def test_rows_of_others_are_kept(self):
        connection = self.ready()
        cursor = connection.cursor()
        cursor.execute("SELECT generate_series(1, 3)")
        connection.commit()
        other = connection.cursor()
        self.forward.cut("to_client", 0)
        with self.assertRaises(DisconnectionError):
            other.execute("SELECT 1")
        connection.rollback()
        self.assertEqual(cursor.fetchall(), [(1,), (2,), (3,)])

    def test_the_ledger_is_gone(self):
        connection = self.ready(witness=Ledger())
        self.query("DROP TABLE zreconnect_ledger")
        with self.assertRaisesRegex(errors.UndefinedTable, "zreconnect_ledger"):
            self.insert(connection)
        self.assertEqual(self.executions(), 0)
        connection.rollback()
        connection.reset()
        self.insert(connection)
        connection.commit()
        self.assertEqual((self.executions(), self.names()), (1, ["one1"]))
