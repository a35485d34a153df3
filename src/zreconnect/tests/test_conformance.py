"""Every driver here passes the conformance test that others have for theirs."""

import sqlite3
import tempfile
import textwrap
import unittest
from importlib import import_module
from pathlib import Path

import psycopg
import pymysql.cursors

from zreconnect import testing
from zreconnect.testing import DriverConformance, conformance
from zreconnect.tests.base import needs_mysqlclient, on_mariadb, wait_until

# The example in the documentation is psycopg2's test case.
_, _, rest = conformance.__doc__.partition("complete::\n")
EXAMPLE = textwrap.dedent(rest.partition("\nThe layer has zope.testrunner")[0])
exec(compile(EXAMPLE, conformance.__file__, "exec"))


class ExampleTests(unittest.TestCase):
    def test_the_example_is_a_test_case(self):
        example = globals()["Psycopg2Conformance"]
        self.assertTrue(issubclass(example, DriverConformance))
        self.assertGreater(len(unittest.defaultTestLoader.getTestCaseNames(example)), 50)

    def test_the_example_for_other_runners_starts_what_it_needs(self):
        _, _, rest = conformance.__doc__.partition("instead of ``self.layer``::\n")
        methods = textwrap.dedent(rest.partition("\nA driver in a distribution")[0])
        heading = "class Example(Psycopg2Conformance):\n    forward = None\n"
        namespace = {**vars(testing), **globals()}
        exec(heading + textwrap.indent(methods, "    "), namespace)
        example, result = namespace["Example"], unittest.TestResult()
        names = ("test_commit", "test_the_round_trips_of_a_transaction")
        unittest.TestSuite(map(example, names))(result)
        self.assertEqual((result.testsRun, result.errors, result.failures), (2, [], []))


class PsycopgConformance(globals()["Psycopg2Conformance"]):
    driver_name = "psycopg"
    cursor_class = psycopg.ClientCursor

    def connect_plainly(self, autocommit=False):
        return psycopg.connect(self.dsn(), autocommit=autocommit)


class MysqlConformance(DriverConformance):
    # The table is of a tenth of a second ago.
    isolation_query = (
        "SELECT trx_isolation_level FROM (SELECT SLEEP(0.2)) AS pause"
        " STRAIGHT_JOIN information_schema.innodb_trx"
        " WHERE trx_mysql_thread_id = CONNECTION_ID()"
    )
    client_encoding, encoding_query = "latin1", "SELECT @@character_set_client"

    @property
    def forward(self):
        return self.layer.forward

    def dsn(self):
        return self.layer.dsn()

    def dsn_with_password(self, password):
        return f"mysql://somebody:{password}@localhost/somewhere"

    def malformed_dsns(self, password):
        return [
            f"mysql://somebody:{password}@localhost:{password}/somewhere",
            f"mysql://somebody@localhost/somewhere?{password}",
        ]

    def refused_dsns(self):
        return [self.layer.dsn(user="nobody"), self.layer.dsn(dbname="nothing")]

    def connect_plainly(self, autocommit=False):
        parameters = self.driver.parse(self.dsn())
        return self.driver.module.connect(
            host=parameters["host"],
            port=int(parameters["port"]),
            user=parameters["user"],
            password=parameters["password"],
            database=parameters["dbname"],
            autocommit=autocommit,
        )

    def kill(self, number):
        self.layer.server.kill_session(number)
        wait_until(lambda: number not in self.layer.server.session_ids())


@on_mariadb()
class PymysqlConformance(MysqlConformance, unittest.TestCase):
    driver_name = "pymysql"
    cursor_class = pymysql.cursors.DictCursor


@on_mariadb()
@needs_mysqlclient
class MysqlclientConformance(MysqlConformance, unittest.TestCase):
    driver_name = "mysqlclient"

    @property
    def cursor_class(self):
        return import_module("MySQLdb.cursors").DictCursor


class SqliteConformance(DriverConformance, unittest.TestCase):
    driver_name = "sqlite"
    cursor_class = type("Cursor", (sqlite3.Cursor,), {})

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        # As SQLite itself tells it.
        self.path = Path(directory.name).resolve() / "a database?.db"
        super().setUp()

    def dsn(self):
        return f"sqlite:///{self.path}".replace("?", "%3F")

    def malformed_dsns(self, password):
        return [
            f"sqlite://somebody:{password}@localhost/somewhere.db",
            f"sqlite:///somewhere.db?password={password}",
            f"sqlite:somewhere{password}",
        ]

    def refused_dsns(self):
        return [f"sqlite:///{self.path.parent}", f"sqlite:///{self.path.parent}/nothing/x.db"]

    def connect_plainly(self, autocommit=False):
        level = None if autocommit else "DEFERRED"
        return sqlite3.connect(self.path, isolation_level=level, check_same_thread=False)
