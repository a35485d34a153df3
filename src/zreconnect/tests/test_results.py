"""Rows that an iteration fetches many at once: nothing shows it but the time."""

from functools import partial
from itertools import islice, repeat

import psycopg
from psycopg2 import extensions
from psycopg2.extras import execute_values

from zreconnect.drivers.base import load_driver
from zreconnect.tests.base import DatabaseTestCase, LineTestCase, needs_mysqlclient, on_mariadb
from zreconnect.tests.interrupts import Alarm
from zreconnect.tests.test_mysql import MysqlTestCase

COUNT = 250


def numbers(*bounds):
    return [(number,) for number in range(*bounds)]


class SharedTests:
    """``statement`` gives the numbers up to ``COUNT``."""

    statement: str

    def read(self, prepare=lambda cursor: None):
        """A cursor that has given the first three in an iteration, and fetched more."""
        self.connection = self.connect()
        cursor = self.connection.cursor()
        prepare(cursor)
        cursor.execute(self.statement)
        self.assertEqual([*islice(cursor, 3)], numbers(1, 4))
        return cursor

    def test_one_by_one(self):
        cursor = self.read()
        self.assertEqual(list(iter(cursor.fetchone, None)), numbers(4, COUNT + 1))
        self.assertIsNone(cursor.fetchone())
        self.assertEqual(cursor.fetchall() or [], [])

    def test_other_ways_to_read_go_on_from_there(self):
        for way, found in (
            (lambda cursor: cursor.fetchall(), numbers(4, COUNT + 1)),
            (lambda cursor: cursor.fetchmany(2), numbers(4, 6)),
            (lambda cursor: cursor.fetchmany(200), numbers(4, 204)),
            (list, numbers(4, COUNT + 1)),
            (lambda cursor: [next(iter(cursor)), cursor.fetchone(), next(cursor)], numbers(4, 7)),
        ):
            cursor = self.read()
            self.assertEqual([*way(cursor)], found)
            following = (found[-1][0] + 1,)
            self.assertEqual(cursor.fetchone(), None if following > (COUNT,) else following)

    def test_the_place_is_that_of_the_program(self):
        cursor = self.read()
        self.assertEqual(cursor.rownumber, 3)
        cursor.scroll(2)
        self.assertEqual(cursor.fetchone(), (6,))
        self.assertEqual(cursor.fetchone(), (7,))
        cursor.scroll(0, "absolute")
        self.assertEqual([cursor.fetchone() for _ in range(3)], numbers(1, 4))

    def test_the_next_statement(self):
        cursor = self.read()
        for _ in range(2):
            cursor.execute(self.statement)
            self.assertEqual([cursor.fetchone() for _ in range(4)], numbers(1, 5))

    def test_a_function_of_the_drivers_reads_on(self):
        cursor = self.read()
        read = self.connection.call_driver(lambda raw: raw.fetchone(), cursor)
        self.assertEqual([read, cursor.fetchone(), cursor.fetchone()], numbers(4, 7))
        loop = iter(cursor)
        self.assertEqual(next(loop), (7,))
        read = self.connection.call_driver(lambda raw: raw.fetchmany(2), cursor)
        self.assertEqual([*read, *loop], numbers(8, COUNT + 1))

    def test_after_the_transaction(self):
        cursor = self.read()
        self.connection.commit()
        self.assertEqual([cursor.fetchone() for _ in range(200)], numbers(4, 204))

    def test_a_lost_session_has_given_them(self):
        cursor = self.read()
        self.connection.commit()
        self.forward.drop()
        self.connection.begin()
        self.assertEqual(list(iter(cursor.fetchone, None)), numbers(4, COUNT + 1))

    def test_a_lost_session_leaves_them_whatever_else_is_done(self):
        cursor = self.read()
        # All that are left have been fetched. psycopg2's own cursor cannot go back any more.
        self.assertEqual([*islice(cursor, 200)], numbers(4, 204))
        self.connection.commit()
        self.forward.drop()
        self.connection.begin()
        cursor.arraysize = 2
        self.assertEqual([*cursor.fetchmany()], numbers(204, 206))
        self.connection.call_driver(lambda raw: raw.execute(self.statement), cursor)
        self.assertEqual(cursor.fetchone(), (1,))

    def test_a_function_of_the_drivers_executes_the_next_statement(self):
        cursor = self.read()
        # All of them, and it is known that there are no more.
        self.assertEqual(len(list(cursor)), COUNT - 3)
        for read in (list, lambda cursor: [*cursor.fetchall()]):
            self.connection.call_driver(lambda raw: raw.execute(self.statement), cursor)
            self.assertEqual(read(cursor), numbers(1, COUNT + 1))

    def test_some_together_are_what_the_driver_gives(self):
        for way in (
            lambda cursor: cursor.fetchmany(2),
            lambda cursor: cursor.fetchmany(0),
            lambda cursor: cursor.fetchmany(150),
            lambda cursor: cursor.fetchall(),
            lambda cursor: [cursor.fetchall(), cursor.fetchmany(2), cursor.fetchall()],
        ):
            found, cursor = way(self.read()), self.read()
            given = self.connection.call_driver(way, cursor)
            # A tuple equals no list: Django reads on until it is given ().
            self.assertEqual(found, given)

    def test_a_doomed_transaction_gives_none(self):
        cursor = self.read()
        self.assertEqual([*islice(cursor, 200)], numbers(4, 204))
        self.forward.drop()
        for _ in range(2):
            with self.assertRaises(self.module.OperationalError):
                self.connection.cursor().execute("SELECT 1")
        # As with the driver's own, this is no request.
        cursor.arraysize = 2
        with self.assertRaises(self.module.OperationalError):
            cursor.fetchone()


class PostgresTests(SharedTests):
    statement = f"SELECT generate_series(1, {COUNT})"

    def fail_at(self, cursor, number, errors):
        """Have the cursor raise errors where it makes that row, each of them once."""
        raise NotImplementedError

    def test_a_row_that_cannot_be_read(self):
        for way in (lambda cursor: cursor.fetchone(), lambda cursor: next(iter(cursor))):
            errors = repeat(ValueError("no number"))
            cursor = self.read(partial(self.fail_at, number=150, errors=errors))
            self.assertEqual([way(cursor) for _ in range(146)], numbers(4, 150))
            with self.assertRaisesRegex(ValueError, "no number"):
                way(cursor)

    def test_a_cursor_on_the_server_goes_on_after_an_iteration(self):
        for way, count in (
            (lambda cursor: [cursor.fetchone()], 1),
            (lambda cursor: cursor.fetchmany(2), 2),
            (lambda cursor: cursor.fetchmany(200), 200),
            (lambda cursor: cursor.fetchall(), COUNT - 3),
        ):
            with self.connect().cursor("numbers") as cursor:
                cursor.itersize = 100
                cursor.execute(self.statement)
                self.assertEqual([*islice(cursor, 3)], numbers(1, 4))
                self.assertEqual(way(cursor), numbers(4, 4 + count))
                self.assertEqual(list(cursor), numbers(4 + count, COUNT + 1))

    def test_a_method_of_the_cursors_class_reads_on(self):
        class Reading(self.cursor_class):
            def read(self):
                return self.fetchone()

        cursor = self.connect().cursor(cursor_factory=Reading)
        cursor.execute(self.statement)
        ways = (cursor.fetchone, cursor.read, lambda: next(iter(cursor)))
        self.assertEqual([way() for _ in range(4) for way in ways], numbers(1, 13))

    def test_what_a_signals_handler_raises(self):
        for error in (Alarm(), KeyboardInterrupt()):
            cursor = self.read(partial(self.fail_at, number=150, errors=iter([error])))
            found = []
            with self.assertRaises(type(error)):
                found.extend(cursor)
            self.assertEqual([*found, *cursor.fetchall()], numbers(4, COUNT + 1))


class Psycopg2Tests(PostgresTests, DatabaseTestCase):
    cursor_class = extensions.cursor

    def fail_at(self, cursor, number, errors):
        def cast(value, _):
            if value == str(number):
                for error in errors:
                    raise error
            return int(value)

        cursor.string_types = {23: extensions.new_type((23,), "NUMBER", cast)}

    def test_a_cursor_on_the_server_is_where_the_program_is(self):
        connection = self.connect()
        connection.cursor().execute("CREATE TEMPORARY TABLE number AS SELECT generate_series(1, 9)")
        with connection.cursor("numbers") as cursor:
            cursor.execute("SELECT * FROM number")
            self.assertEqual([cursor.fetchone() for _ in range(3)], numbers(1, 4))
            with connection.cursor() as other:
                other.execute("DELETE FROM number WHERE CURRENT OF numbers RETURNING *")
                self.assertEqual(other.fetchone(), (3,))
            self.assertEqual(cursor.fetchone(), (4,))

    def test_a_statement_that_is_refused_leaves_them(self):
        cursor = self.read()
        with self.assertRaises(self.module.ProgrammingError):
            cursor.execute("")
        self.assertEqual(cursor.fetchone(), (4,))

    def test_execute_values_gives_its_own(self):
        cursor = self.read()
        execute_values(cursor, "VALUES %s", [(1,), (2,)])
        self.assertEqual(cursor.fetchall(), [(1,), (2,)])

    def test_execute_values_in_the_next_session(self):
        cursor = self.read()
        self.assertEqual([*islice(cursor, 200)], numbers(4, 204))
        self.connection.commit()
        self.forward.drop()
        self.connection.begin()
        execute_values(cursor, "VALUES %s", [(1,), (2,)])
        self.assertEqual(cursor.fetchall(), [(1,), (2,)])


class PsycopgTests(PostgresTests, DatabaseTestCase):
    driver = "psycopg"
    module = psycopg
    cursor_class = psycopg.Cursor

    def fail_at(self, cursor, number, errors):
        def make(values):
            if values[0] == number:
                for error in errors:
                    raise error
            return tuple(values)

        cursor.row_factory = lambda cursor: make

    def test_rows_are_made_as_is_chosen_meanwhile(self):
        cursor = self.read()
        cursor.row_factory = psycopg.rows.scalar_row
        self.assertEqual([cursor.fetchone(), cursor.fetchone()], [4, 5])

    def test_some_together_of_which_one_cannot_be_read(self):
        errors = repeat(ValueError("no number"))
        cursor = self.read(partial(self.fail_at, number=200, errors=errors))
        for way in (lambda: cursor.fetchmany(220), cursor.fetchall):
            with self.assertRaisesRegex(ValueError, "no number"):
                way()
            self.assertEqual(cursor.rownumber, 3)
        self.assertEqual(cursor.fetchone(), (4,))

    def test_a_row_of_nothing(self):
        def rows(connection):
            cursor = connection.cursor(row_factory=psycopg.rows.scalar_row)
            cursor.execute("SELECT nullif(n, 2) FROM generate_series(1, 4) n")
            return [cursor.fetchone() for _ in range(4)]

        # The lowest version does not go on behind it.
        with psycopg.connect(self.dsn) as bare:
            self.assertEqual(rows(self.connect()), rows(bare))


class MysqlTests(SharedTests, MysqlTestCase):
    statement = f"SELECT seq FROM seq_1_to_{COUNT}"

    def test_a_statement_that_is_none_leaves_them(self):
        cursor = self.read()
        cursor.executemany("INSERT INTO item VALUES (%s, 0)", [])
        self.assertEqual(cursor.fetchone(), (4,))

    def test_the_cursors_class_in_the_place_of_a_name(self):
        connection = self.connect()
        cursor = connection.cursor(load_driver(self.driver_name).plain_cursor)
        cursor.execute(self.statement)
        loop = iter(cursor)
        self.assertEqual([next(loop), next(loop)], numbers(1, 3))
        read = connection.call_driver(lambda raw: raw.fetchone(), cursor)
        self.assertEqual([read, next(loop)], numbers(3, 5))


@on_mariadb()
class PymysqlTests(MysqlTests, LineTestCase):
    driver_name = "pymysql"


@needs_mysqlclient
@on_mariadb()
class MysqlclientTests(MysqlTests, LineTestCase):
    driver_name = "mysqlclient"

    def test_the_errors_that_are_attributes(self):
        cursor = self.read()
        with self.assertRaises(cursor.ProgrammingError):
            cursor.execute("SELECT")

    def test_there_is_no_other_result(self):
        cursor = self.read()
        self.assertIsNone(cursor.nextset())
        # It has read what was left.
        self.assertIsNone(cursor.fetchone())
