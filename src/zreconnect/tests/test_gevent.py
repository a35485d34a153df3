"""Greenlets: web applications under gunicorn with gevent's workers."""

import unittest
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psycopg2
import psycopg2.extras
import pymysql

from zreconnect import DisconnectionError
from zreconnect.drivers import greenlets
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests.base import (
    DatabaseTestCase,
    LineTestCase,
    needs_mysqlclient,
    on_mariadb,
    wait_until,
)
from zreconnect.tests.web import ExampleProcess, Stack

GUNICORN = Stack(
    "gunicorn --config python:zreconnect.tests.gevent_application"
    " zreconnect.tests.gevent_application",
    Path(__file__).parents[2],
)
# More than the worker's sessions would be if it kept one that nobody has any more.
MANY = 30
BLOCKS = "keeps all greenlets of this process waiting"


class GreenletTestCase(LineTestCase):
    """Has tables. driver_dsn: a DSN that asks for the driver."""

    def make_tables(self):
        self.query("CREATE TABLE guest (name varchar(10))")
        self.query("CREATE TABLE door (passed integer)")
        self.query("INSERT INTO door VALUES (0)")

    def serve(self, **environment):
        # A measurement of coverage knows nothing of greenlets.
        environment |= {"COVERAGE_PROCESS_CONFIG": "", "COVERAGE_PROCESS_START": ""}
        served = ExampleProcess(GUNICORN, self.driver_dsn, **environment)
        self.addCleanup(served.stop)
        served.start()
        return served

    def check_that_nobody_keeps_others_waiting(self, **environment):
        served = self.serve(**environment)
        with ThreadPoolExecutor() as pool, closing(self.lock_door()) as lock:
            waiting = [pool.submit(served.get, "/wait") for _ in range(3)]
            wait_until(lambda: self.number_of_waiting() == 3)
            self.assertEqual(served.get("/").body, "here")
            self.assertEqual(served.get("/guests").body, "0")
            self.assertFalse(any(each.done() for each in waiting))
            lock.rollback()
            self.assertEqual([each.result().body for each in waiting], ["passed"] * 3)
            self.forward.silence("to_client")
            silenced = pool.submit(served.get, "/enter")
            self.assertEqual(served.get("/").body, "here")
            self.assertEqual(silenced.result().status, 503)
            self.forward.resume()
        self.server.restart()
        for _ in range(MANY):
            self.assertEqual(served.get("/guests").body, "0")
        wait_until(lambda: self.number_of_sessions() < MANY)
        self.assertNotIn(BLOCKS, served.output())

    def check_that_it_is_told_once_that_it_blocks(self, remedy):
        served = self.serve()
        for path in ("/guests", "/wait", "/guests"):
            self.assertEqual(served.get(path).status, 200)
        self.server.restart()
        self.assertEqual(served.get("/guests").body, "0")
        self.assertEqual(served.output().count(BLOCKS), 1, served.output())
        self.assertIn(remedy, served.output())


class PostgresqlGreenletTests(GreenletTestCase, DatabaseTestCase):
    layer = PortForwardLayer(PostgresLayer("GreenletPostgresLayer"), "GreenletLayer")

    def setUp(self):
        super().setUp()
        self.make_tables()
        self.driver_dsn = self.dsn

    def lock_door(self):
        connection = psycopg2.connect(self.server.dsn())
        connection.cursor().execute("UPDATE door SET passed = 0")
        return connection

    def number_of_waiting(self):
        return self.query("SELECT count(*) FROM pg_locks WHERE NOT granted")[0][0]

    def number_of_sessions(self):
        return len(self.sessions())

    def test_psycopg2_with_psycogreen(self):
        self.check_that_nobody_keeps_others_waiting(PSYCOGREEN="1")

    def test_psycopg2_that_waits_in_a_function_of_python(self):
        psycopg2.extensions.set_wait_callback(psycopg2.extras.wait_select)
        self.addCleanup(psycopg2.extensions.set_wait_callback, None)
        connection = self.connect()
        connection.run(connection.execute, "INSERT INTO guest VALUES ('one')")
        connection.execute("INSERT INTO guest VALUES ('two')")
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            connection.commit()
        connection.rollback()
        connection.execute("INSERT INTO guest VALUES ('two')")
        self.forward.cut("to_client", 0)
        connection.commit()
        self.assertEqual(self.query("SELECT name FROM guest"), [("one",), ("two",)])

    def test_psycopg2_without_it(self):
        self.check_that_it_is_told_once_that_it_blocks("psycogreen.gevent.patch_psycopg()")

    def test_psycopg(self):
        self.driver_dsn = self.dsn.replace("postgresql:", "postgresql+psycopg:")
        self.check_that_nobody_keeps_others_waiting()


@on_mariadb()
class MysqlGreenletTests(GreenletTestCase):
    def setUp(self):
        self.server, self.forward = self.layer.server, self.layer.forward
        self.server.create_database("greenlets")
        self.addCleanup(self.server.drop_database, "greenlets")
        self.make_tables()
        self.dsn = self.layer.dsn(dbname="greenlets")

    def query(self, statement):
        return self.server.query(statement, dbname="greenlets")

    def lock_door(self):
        connection = pymysql.connect(
            host=self.server.host,
            port=self.server.port,
            user=self.server.user,
            password=self.server.password,
            database="greenlets",
        )
        connection.cursor().execute("UPDATE door SET passed = 0")
        return connection

    def number_of_waiting(self):
        # Who asks innodb_trx too often is shown what it has shown before.
        waiting = "SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'"
        return int(self.query(waiting)[0][1])

    def number_of_sessions(self):
        return len(self.server.session_ids())

    def test_pymysql(self):
        self.driver_dsn = self.dsn.replace("mysql:", "mysql+pymysql:")
        self.check_that_nobody_keeps_others_waiting()

    @needs_mysqlclient
    def test_mysqlclient(self):
        self.driver_dsn = self.dsn.replace("mysql:", "mysql+mysqldb:")
        self.check_that_it_is_told_once_that_it_blocks("Use PyMySQL")


class TellingTests(unittest.TestCase):
    def test_where_nothing_waits_as_gevent_does(self):
        unpatched = SimpleNamespace(is_module_patched=lambda name: False)
        for modules in ({}, {"gevent.monkey": unpatched}):
            with mock.patch.dict("sys.modules", modules), self.assertNoLogs("zreconnect"):
                greenlets.tell_if_it_blocks("a module", "Use another one.")

    def test_it_is_told_once(self):
        patched = SimpleNamespace(is_module_patched=lambda name: name == "threading")
        with (
            mock.patch.dict("sys.modules", {"gevent.monkey": patched}),
            mock.patch.object(greenlets, "_told", set()),
            self.assertLogs("zreconnect", "WARNING") as log,
        ):
            for _ in range(2):
                greenlets.tell_if_it_blocks("a module", "Use another one.")
        (line,) = log.output
        self.assertIn(f"a module {BLOCKS}", line)
        self.assertIn("Use another one.", line)
