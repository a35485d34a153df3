"""Rows that have arrived before their session ended, with every module that has sessions."""

import os
import threading
from contextlib import suppress

import psycopg
import psycopg2
from psycopg2 import extensions
from psycopg2.extras import DictCursor, NamedTupleCursor, RealDictCursor, execute_values

from zreconnect import DisconnectionError
from zreconnect.link import FEW_ROWS
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests.base import DatabaseTestCase, LineTestCase, needs_mysqlclient, on_mariadb
from zreconnect.tests.interrupts import Alarm
from zreconnect.tests.test_mysql import MysqlTestCase

NUMBERS = (
    "SELECT n FROM (SELECT 1 AS n UNION ALL SELECT 2 UNION ALL SELECT 3 UNION ALL SELECT 4"
    " UNION ALL SELECT 5) AS numbers ORDER BY n"
)
ROWS = [(1,), (2,), (3,), (4,), (5,)]


class SharedTests:
    """Of a connection ``self.connection``, whose cursor has executed and fetched one row."""

    def numbers(self, connection):
        cursor = connection.cursor()
        cursor.execute(NUMBERS)
        self.assertEqual(cursor.fetchone(), (1,))
        return cursor

    def numbers_after_commit(self, connection):
        cursor = self.numbers(connection)
        connection.commit()
        return cursor

    def lose_while_idle(self, connection):
        self.forward.drop()
        connection.begin()

    def lose_at_statement_of_another_cursor(self, connection):
        with connection.cursor() as other:
            other.execute("SELECT 1")
            self.forward.drop()
            with self.assertRaises(DisconnectionError):
                other.execute("SELECT 1")
        connection.rollback()

    def lose_at_rollback(self, connection):
        connection.begin()
        self.forward.drop()
        connection.rollback()

    def lose_at_ping(self, connection):
        self.forward.drop()
        connection.ping()

    def lose_at_setting(self, connection):
        self.forward.drop()
        with suppress(DisconnectionError):
            connection.autocommit = True
        connection.begin()

    ways = (
        lose_while_idle,
        lose_at_statement_of_another_cursor,
        lose_at_rollback,
        lose_at_ping,
        lose_at_setting,
    )

    def test_they_can_be_fetched_after_a_loss_in_a_later_transaction(self):
        for lose in self.ways:
            with self.subTest(lose.__name__):
                connection = self.connect()
                cursor = self.numbers_after_commit(connection)
                lose(self, connection)
                self.assertEqual(cursor.fetchone(), (2,))
                self.assertEqual(list(cursor.fetchmany(2)), ROWS[2:4])
                self.assertEqual(list(cursor.fetchall()), ROWS[4:])
                self.assertIsNone(cursor.fetchone())
                self.assertEqual(list(cursor.fetchall()), [])

    def test_they_can_be_iterated_while_sessions_come_and_go(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute(NUMBERS)
        connection.commit()
        rows = []
        for row in cursor:
            self.forward.drop()
            with connection.transaction() as other:
                other.execute("SELECT 1")
            rows.append(row)
        self.assertEqual(rows, ROWS)

    def test_they_can_be_iterated_after_others_were(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute(NUMBERS)
        self.assertEqual(list(cursor), ROWS)
        self.assertIsNone(cursor.fetchone())
        cursor.execute(NUMBERS)
        connection.commit()
        self.lose_while_idle(connection)
        self.assertEqual(list(cursor), ROWS)

    def test_several_iterations_share_them(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute(NUMBERS)
        pairs = [(row, next(iter(cursor), None)) for row in cursor]
        self.assertEqual(pairs, [(ROWS[0], ROWS[1]), (ROWS[2], ROWS[3]), (ROWS[4], None)])
        cursor.execute(NUMBERS)
        one, other = iter(cursor), iter(cursor)
        self.assertEqual([next(each) for each in (one, other, one, other, one)], ROWS)

    def test_what_is_known_of_them_is_known_afterwards(self):
        connection = self.connect()
        cursor = self.numbers_after_commit(connection)
        name = cursor.description[0][0]
        self.lose_while_idle(connection)
        self.assertEqual((cursor.description[0][0], cursor.rowcount), (name, 5))
        self.assertEqual(cursor.rownumber, 1)

    def test_they_can_be_scrolled(self):
        connection = self.connect()
        cursor = self.numbers_after_commit(connection)
        self.lose_while_idle(connection)
        cursor.scroll(2)
        self.assertEqual(cursor.fetchone(), (4,))
        cursor.scroll(-4)
        self.assertEqual(cursor.fetchone(), (1,))
        cursor.scroll(4, mode="absolute")
        self.assertEqual(cursor.fetchone(), (5,))
        for outside in ((-1, "absolute"), (9, "relative"), (0, "by day")):
            with self.assertRaises((IndexError, ValueError, self.module.ProgrammingError)):
                cursor.scroll(*outside)
        self.assertEqual(connection.state, "active")

    def test_the_cursor_executes_again(self):
        connection = self.connect()
        cursor = self.numbers_after_commit(connection)
        self.lose_while_idle(connection)
        cursor.execute(NUMBERS)
        self.assertEqual(list(cursor.fetchall()), ROWS)
        connection.commit()

    def test_another_transaction_without_a_loss_leaves_them_alone(self):
        connection = self.connect()
        cursor = self.numbers_after_commit(connection)
        with connection.transaction() as other:
            other.execute("SELECT 1")
            self.assertEqual(cursor.fetchone(), (2,))
        self.assertEqual(list(cursor), ROWS[2:])
        cursor.execute(NUMBERS)
        self.assertEqual(list(cursor), ROWS)

    def test_those_of_several_cursors(self):
        for commit in (True, False):
            connection = self.connect()
            cursors = [self.numbers(connection) for _ in range(3)]
            if commit:
                connection.commit()
                self.lose_while_idle(connection)
            else:
                self.forward.drop()
                self.assertRaises(DisconnectionError, connection.cursor().execute, "SELECT 1")
                connection.rollback()
            for cursor in cursors:
                self.assertEqual(list(cursor), ROWS[1:])

    def test_in_the_lost_transaction_itself(self):
        connection = self.connect()
        cursor = self.numbers(connection)
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            connection.cursor().execute("SELECT 1")
        with self.assertRaises(DisconnectionError):
            cursor.fetchone()
        connection.rollback()
        self.assertEqual(list(cursor), ROWS[1:])

    def test_in_a_transaction_that_is_lost_by_another_statement(self):
        connection = self.connect()
        cursor = self.numbers(connection)
        other = connection.cursor()
        other.execute("SELECT 1")
        self.forward.cut("to_client", 0)
        with self.assertRaises(DisconnectionError):
            other.execute("SELECT 1")
        connection.rollback()
        self.assertEqual(list(cursor), ROWS[1:])

    def test_after_the_session_was_given_up(self):
        connection = self.connect()
        cursor = self.numbers_after_commit(connection)
        connection.reset()
        self.assertEqual(list(cursor), ROWS[1:])

    def test_in_autocommit_mode(self):
        connection = self.connect()
        connection.autocommit = True
        for lose in (self.lose_at_ping, self.lose_at_setting):
            cursor = self.numbers(connection)
            lose(connection)
            connection.rollback()
            self.assertEqual(list(cursor), ROWS[1:])
        cursor = self.numbers(connection)
        self.forward.drop()
        connection.cursor().execute("SELECT 1")
        self.assertEqual(list(cursor), ROWS[1:])

    def test_in_a_forked_child(self):
        connection = self.connect()
        cursor = self.numbers_after_commit(connection)
        other = connection.fork()
        self.addCleanup(other.close)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with connection.transaction() as another:
                    another.execute("SELECT 1")
                status = 0 if list(cursor) == ROWS[1:] else 2
            finally:
                os._exit(status)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
        other.begin()
        self.assertEqual(list(cursor), ROWS[1:])

    def test_a_closed_cursor_has_none(self):
        connection = self.connect()
        cursor = self.numbers_after_commit(connection)
        rows = iter(cursor)
        self.assertEqual(next(rows), (2,))
        self.lose_while_idle(connection)
        cursor.close()
        for fetch in (cursor.fetchone, lambda: next(rows)):
            with self.assertRaises(self.module.InterfaceError):
                fetch()


class PostgresTests(SharedTests):
    def test_a_lost_commit_that_is_found(self):
        connection = self.connect()
        cursor = self.numbers(connection)
        self.make_table()
        connection.cursor().execute("INSERT INTO item VALUES ('one')")
        self.forward.cut("to_client", 0)
        connection.commit()
        self.assertEqual(self.names(), ["one"])
        self.assertEqual(list(cursor), ROWS[1:])

    def test_those_of_a_server_side_cursor_are_gone(self):
        connection = self.connect()
        cursor = connection.cursor("numbers", withhold=True)
        cursor.execute(NUMBERS)
        self.assertEqual(cursor.fetchone(), (1,))
        connection.commit()
        self.lose_while_idle(connection)
        for fetch in (cursor.fetchone, lambda: list(cursor)):
            with self.assertRaisesRegex(self.module.InterfaceError, "execute it again"):
                fetch()
        self.assertEqual(connection.state, "active")
        cursor.close()


class CountingCursor(extensions.cursor):
    statements = 0

    def execute(self, *arguments):
        self.statements += 1
        return super().execute(*arguments)


class ShoutingCursor(extensions.cursor):
    def fetchone(self):
        row = super().fetchone()
        return row and (*row, "!")


class SumCursor(extensions.cursor):
    def fetchall(self):
        return sum(number for (number,) in super().fetchall())


class Psycopg2Tests(PostgresTests, DatabaseTestCase):
    def test_a_class_with_ways_of_its_own(self):
        for factory, found in ((ShoutingCursor, [(2, "!"), ROWS[2:]]), (SumCursor, [(2,), 12])):
            with self.subTest(factory.__name__):
                connection = self.connect()
                cursor = connection.cursor(cursor_factory=factory)
                for _ in range(2):
                    cursor.execute(NUMBERS)
                    cursor.fetchone()
                    connection.commit()
                    self.assertEqual([cursor.fetchone(), cursor.fetchall()], found)
                cursor.execute(NUMBERS)
                connection.commit()
                self.lose_while_idle(connection)
                with self.assertRaisesRegex(self.module.InterfaceError, "execute it again"):
                    cursor.fetchone()
                connection.close()

    def test_what_is_set_meanwhile_holds(self):
        connection = self.connect()
        cursor = self.numbers_after_commit(connection)
        cursor.string_types = {23: extensions.new_type((23,), "ODD", lambda value, _: f"{value}!")}
        cursor.execute(NUMBERS)
        self.assertEqual(cursor.fetchone(), ("1!",))

    def test_whatever_finds_the_loss(self):
        connection = self.connect()
        for autocommit in (False, True):
            connection.autocommit = autocommit
            for request in (
                connection.begin if autocommit else connection.savepoint,
                lambda: connection.transaction().__enter__(),
                lambda: connection.call_driver(lambda raw: raw.cursor().execute("S"), connection),
                connection.lobject,
                connection.ping,
                connection.tpc_recover,
                lambda: connection.tpc_rollback("nothing"),
            ):
                with self.subTest(request, autocommit=autocommit):
                    cursor = self.numbers(connection)
                    self.forward.drop()
                    with suppress(self.module.Error):
                        request()
                    connection.rollback()
                    self.assertEqual(cursor.fetchall(), ROWS[1:])

    def test_an_interrupt_while_they_are_kept(self):
        interrupts = [Alarm()]

        class Interrupted(extensions.cursor):
            def fetchall(self):
                rows = super().fetchall()
                if interrupts:
                    raise interrupts.pop()
                return rows

        connection = self.connect()
        cursor = connection.cursor(cursor_factory=Interrupted)
        cursor.execute(NUMBERS)
        with self.assertRaises(Alarm):
            connection.commit()
        connection.rollback()
        self.lose_while_idle(connection)
        self.assertEqual(cursor.fetchall(), ROWS)

    def test_of_a_statement_that_a_function_executes(self):
        connection = self.connect()
        cursor = connection.cursor()
        for query in (NUMBERS, f"{NUMBERS} OFFSET 1"):
            connection.call_driver(lambda raw, query=query: raw.execute(query), cursor)
            connection.commit()
        self.lose_while_idle(connection)
        self.assertEqual(cursor.fetchall(), ROWS[1:])

    def test_with_cursor_factories(self):
        for factory in (DictCursor, NamedTupleCursor, RealDictCursor, LoudCursor):
            with self.subTest(factory.__name__):
                connection = self.connect()
                cursor = connection.cursor(cursor_factory=factory)
                cursor.execute(NUMBERS)
                rows = iter(cursor)
                first = next(rows)
                connection.commit()
                self.lose_while_idle(connection)
                found = [first, next(rows), cursor.fetchone(), *cursor.fetchall()]
                self.assertEqual({type(row) for row in found}, {type(first)})
                plain = [
                    tuple(row.values()) if factory is RealDictCursor else tuple(row)
                    for row in found
                ]
                self.assertEqual(plain, ROWS)

    def test_a_negative_number_is_all_that_are_left(self):
        connection = self.connect()
        cursor = self.numbers_after_commit(connection)
        self.assertEqual((cursor.fetchmany(-1), cursor.fetchmany(-1)), (ROWS[1:], []))

    def test_the_raw_cursor_stays_as_long_as_its_session(self):
        connection = self.connect()
        cursor = connection.cursor(cursor_factory=CountingCursor)
        for expected in (1, 2, 3):
            cursor.execute(NUMBERS)
            self.assertEqual(cursor.statements, expected)
            connection.commit()
            self.assertEqual(cursor.fetchone(), (1,))
        self.lose_while_idle(connection)
        cursor.execute(NUMBERS)
        self.assertEqual(cursor.statements, 1)

    def test_cursors_that_are_gone_are_forgotten(self):
        connection = self.connect()
        for _ in range(3):
            self.numbers(connection)
        cursor = self.numbers(connection)
        link = connection.work.link
        self.assertEqual([reader() for reader in link.readers], [cursor])
        connection.commit()
        self.assertEqual([*link.keepers], [cursor])
        del cursor
        self.assertEqual([*link.keepers], [])

    def test_what_psycopg2_knows_besides(self):
        connection = self.connect()
        cursor = self.numbers_after_commit(connection)
        self.lose_while_idle(connection)
        self.assertEqual(cursor.statusmessage, "SELECT 5")
        self.assertEqual(cursor.query, NUMBERS.encode())
        self.assertEqual(cursor.mogrify("SELECT %s", (1,)), b"SELECT 1")
        self.assertEqual(list(cursor), ROWS[1:])

    def test_helpers_that_take_the_cursor_before_it_executes_again(self):
        self.query("CREATE TABLE number (n int)")
        connection = self.connect()
        cursor = self.numbers_after_commit(connection)
        self.lose_while_idle(connection)
        connection.rollback()
        execute_values(cursor, "INSERT INTO number VALUES %s", ROWS)
        connection.commit()
        self.assertEqual(self.query("SELECT * FROM number ORDER BY n"), ROWS)

    def test_rows_that_cannot_be_read_are_met_where_they_are(self):
        connection = self.connect()
        extensions.register_type(
            extensions.new_type((23,), "ODD", lambda value, _: 6 // (3 - int(value))),
            connection.driver_connection,
        )
        cursor = connection.cursor()
        cursor.execute(NUMBERS)
        connection.commit()
        connection.begin()
        self.assertEqual(cursor.fetchone(), (3,))
        self.assertEqual(cursor.fetchone(), (6,))
        with self.assertRaises(ZeroDivisionError):
            cursor.fetchone()

    def test_many_rows_and_a_loss_that_nothing_tells_of_in_the_transaction_itself(self):
        """Whoever runs that again executes again; nothing is fetched in vain for it."""
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("SELECT generate_series(0, %s)", (FEW_ROWS,))
        connection.cursor().execute("SELECT 1")
        self.forward.cut("to_client", 0)
        with self.assertRaises(DisconnectionError):
            connection.cursor().execute("SELECT 1")
        connection.rollback()
        with self.assertRaisesRegex(psycopg2.InterfaceError, "execute it again"):
            cursor.fetchone()
        with self.assertRaisesRegex(psycopg2.InterfaceError, "execute it again"):
            next(iter(cursor))


class OthersTests(DatabaseTestCase):
    def test_a_call_of_the_drivers_keeps_the_rows_of_another_cursor(self):
        connection = self.connect()
        first, second = connection.cursor(), connection.cursor()
        first.execute("SELECT generate_series(1, 3)")
        connection.call_driver(lambda raw: raw.execute("SELECT 4"), second)
        self.forward.drop()
        connection.rollback()
        self.assertEqual(first.fetchall(), [(1,), (2,), (3,)])

    def test_a_thread_may_ask_for_what_is_known_of_anothers_connection(self):
        connection = self.connect()
        connection.begin()
        found = []
        thread = threading.Thread(target=lambda: found.append(connection.get_backend_pid()))
        thread.start()
        thread.join()
        self.assertEqual(found, [connection.get_backend_pid()])


class MethodTests(DatabaseTestCase):
    def test_a_method_that_was_had_before_is_refused_after_a_loss(self):
        connection = self.connect()
        connection.begin()
        ask = connection.get_backend_pid
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            connection.cursor().execute("SELECT 1")
        with self.assertRaises(DisconnectionError):
            ask()
        connection.rollback()


class LoudCursor(extensions.cursor):
    def execute(self, query, vars=None):
        super().execute(query, vars)


class PsycopgTests(PostgresTests, DatabaseTestCase):
    # Of its own, so that it can be tested beside psycopg2.
    layer = PortForwardLayer(PostgresLayer("KeptPostgresLayer"), "KeptPortForwardLayer")
    driver = "psycopg"
    module = psycopg


@on_mariadb()
class PymysqlTests(SharedTests, MysqlTestCase, LineTestCase):
    driver_name = "pymysql"


@needs_mysqlclient
@on_mariadb()
class MysqlclientTests(SharedTests, MysqlTestCase, LineTestCase):
    driver_name = "mysqlclient"
