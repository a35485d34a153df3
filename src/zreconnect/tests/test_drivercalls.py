"""Functions that want a driver's own objects, and are called in the place of statements."""

import sqlite3
import unittest
from contextlib import closing

import psycopg
from psycopg.types import TypeInfo
from psycopg2 import extensions, sql
from psycopg2.extras import execute_values, register_hstore

import zreconnect
from zreconnect import CommitOutcomeUnknown, DisconnectionError, Ledger, XidWitness
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests.base import DatabaseTestCase, LineTestCase, needs_mysqlclient, on_mariadb
from zreconnect.tests.test_mysql import MysqlTestCase


def execute(cursor, statement):
    cursor.execute(statement)
    return cursor


class SharedTests:
    def setUp(self):
        super().setUp()
        self.make_table()

    def test_the_drivers_own_objects(self):
        connection = self.connect()
        cursor = connection.cursor()
        given = connection.call_driver(
            lambda *args, **keywords: (args, keywords), connection, x=cursor
        )
        (raw,), keywords = given
        self.assertIs(raw, connection.driver_connection)
        self.assertNotIsInstance(keywords["x"], zreconnect.ReconnectingCursor)
        self.assertIs(connection.call_driver(lambda own: own, connection), connection)
        self.assertIs(connection.call_driver(lambda own: own, cursor), cursor)
        other = self.connect()
        self.assertIs(connection.call_driver(lambda own: own, other), other)

    def test_it_is_a_part_of_the_transaction(self):
        for witness in ("xid", Ledger()):
            connection = self.connect(witness=witness)
            cursor = connection.cursor()
            connection.call_driver(execute, cursor, "INSERT INTO item VALUES ('one')")
            self.assertEqual(connection.state, "active")
            connection.rollback()
            connection.call_driver(execute, cursor, "INSERT INTO item VALUES ('two')")
            self.forward.cut("to_client", 0)
            connection.commit()
            self.assertEqual(self.names(), ["two"])
            self.query("DELETE FROM item")

    def test_a_witness_that_watches_statements_knows_of_it(self):
        connection = self.connect(witness=XidWitness(at_commit=True))
        cursor = connection.cursor()
        connection.call_driver(execute, cursor, "INSERT INTO item VALUES ('one')")
        self.assertTrue(connection.work.link.observer.may_have_written)
        connection.commit()
        self.assertEqual(self.names(), ["one"])

    def test_rows_can_be_fetched_afterwards(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        connection.commit()
        self.forward.drop()
        connection.call_driver(execute, cursor, "SELECT 2")
        self.assertEqual(cursor.fetchall(), [(2,)])

    def test_a_loss(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("INSERT INTO item VALUES ('one')")
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            connection.call_driver(execute, connection.cursor(), "SELECT 1")
        with self.assertRaises(DisconnectionError):
            connection.call_driver(execute, cursor, "SELECT 1")
        connection.rollback()
        connection.call_driver(execute, cursor, "SELECT 1")

    def test_a_loss_in_autocommit_mode(self):
        connection = self.connect()
        connection.autocommit = True
        cursor = connection.cursor()
        connection.call_driver(execute, cursor, "INSERT INTO item VALUES ('one')")
        self.assertEqual(self.names(), ["one"])
        self.forward.cut("to_client", 0)
        with self.assertRaises(CommitOutcomeUnknown):
            connection.call_driver(execute, cursor, "INSERT INTO item VALUES ('two')")

    def test_an_error_of_the_functions(self):
        connection = self.connect()
        with self.assertRaises(ZeroDivisionError):
            connection.call_driver(lambda: 1 // 0)
        self.assertEqual(connection.state, "active")
        closed = connection.cursor()
        closed.close()
        with self.assertRaises(self.module.InterfaceError):
            connection.call_driver(execute, closed, "SELECT 1")

    def test_a_function_that_ends_the_transaction(self):
        connection = self.connect()
        connection.call_driver(execute, connection.cursor(), "COMMIT")
        self.forward.cut("to_client", 0)
        with self.assertRaises(CommitOutcomeUnknown):
            connection.commit()


class Psycopg2Tests(SharedTests, DatabaseTestCase):
    def test_registering_types(self):
        self.query("CREATE EXTENSION hstore")
        connection = self.connect()
        for scope in (connection, connection.cursor()):
            with self.assertRaises(TypeError):
                register_hstore(scope)
            connection.call_driver(register_hstore, scope)
        connection.rollback()
        self.forward.drop()
        cursor = connection.cursor()
        cursor.execute("SELECT 'a=>1'::hstore")
        self.assertEqual(cursor.fetchone(), ({"a": "1"},))

    def test_composed_statements(self):
        connection = self.connect()
        cursor = connection.cursor()
        statement = sql.SQL("INSERT INTO {} VALUES %s RETURNING name").format(
            sql.Identifier("item")
        )
        rows = connection.call_driver(
            execute_values, cursor, statement, [("one",), ("two",)], fetch=True
        )
        self.assertEqual(rows, [("one",), ("two",)])
        self.assertIn('"item"', connection.call_driver(statement.as_string, cursor))
        connection.commit()
        self.assertEqual(self.names(), ["one", "two"])

    def test_a_caster_that_looks_into_the_cursor(self):
        connection = self.connect()
        cursor = connection.cursor()
        value = "2026-11-28 12:00:00+01"
        moment = connection.call_driver(extensions.PYDATETIMETZ, value, cursor)
        self.assertEqual(moment.utcoffset().total_seconds(), 3600)

    def test_a_server_side_cursor(self):
        connection = self.connect()
        cursor = connection.cursor("numbers")
        connection.call_driver(execute, cursor, "SELECT generate_series(1, 2)")
        self.assertEqual(cursor.fetchall(), [(1,), (2,)])
        connection.rollback()
        self.assertEqual(connection.notices, [])


class PsycopgTests(SharedTests, DatabaseTestCase):
    # Of its own, so that it can be tested beside psycopg2.
    layer = PortForwardLayer(PostgresLayer("CallsPostgresLayer"), "CallsPortForwardLayer")
    driver = "psycopg"
    module = psycopg

    def test_types(self):
        connection = self.connect()
        self.assertEqual(connection.call_driver(TypeInfo.fetch, connection, "text").oid, 25)


class MysqlTests:
    def test_what_a_function_may_have_committed_is_not_run_again(self):
        def commit(raw):
            raw.commit()

        def create(raw):
            with closing(raw.cursor()) as cursor:
                cursor.execute("CREATE OR REPLACE TABLE another (number int)")

        def lose(connection):
            self.server.kill_session(connection.driver_connection.thread_id())

        def fail(connection):
            raise DisconnectionError("another")

        for function, end, error in (
            (commit, lose, CommitOutcomeUnknown),
            (create, fail, DisconnectionError),
            (create, lambda connection: None, self.module.InternalError),
        ):
            connection, names = self.connect(), iter("abcdef")

            def work(connection=connection, names=names, function=function, end=end):
                self.insert(connection, next(names))
                connection.call_driver(function, connection)
                end(connection)
                self.insert(connection, next(names))

            with self.subTest(function=function.__name__, error=error.__name__):
                with self.assertRaises(error) as raised:
                    connection.run(work)
                self.assertNotIn("Nothing was committed", str(raised.exception))
                self.assertEqual(self.names(), ["a"])
            self.query("DELETE FROM test.item")

    def test_outside_a_transaction_it_ends_nothing(self):
        connection = self.connect()
        connection.autocommit = True
        connection.call_driver(lambda raw: raw.commit(), connection)
        connection.autocommit = False
        connection.run(self.insert, connection)
        self.assertEqual(self.names(), ["one"])


@on_mariadb()
class PymysqlTests(MysqlTests, MysqlTestCase, LineTestCase):
    driver_name = "pymysql"


@on_mariadb()
@needs_mysqlclient
class MysqlclientTests(MysqlTests, MysqlTestCase, LineTestCase):
    driver_name = "mysqlclient"


class SqliteTests(unittest.TestCase):
    def test_a_function_of_the_connection(self):
        connection = zreconnect.connect("sqlite://")
        self.addCleanup(connection.close)
        script = list(connection.call_driver(sqlite3.Connection.iterdump, connection))
        self.assertEqual(script, ["BEGIN TRANSACTION;", "COMMIT;"])

    def test_a_script_has_committed_what_came_before(self):
        connection = zreconnect.connect("sqlite://")
        self.addCleanup(connection.close)
        connection.execute("CREATE TABLE item (name text)")
        connection.commit()
        for owner in (connection, connection.cursor()):
            for script in ("SELECT 1", "BEGIN; SELECT 1"):

                def work(owner=owner, script=script):
                    connection.execute("INSERT INTO item VALUES ('one')")
                    owner.executescript(script)
                    raise DisconnectionError("another")

                with self.assertRaises(DisconnectionError):
                    connection.run(work)
        self.assertEqual(connection.execute("SELECT count(*) FROM item").fetchall(), [(4,)])
