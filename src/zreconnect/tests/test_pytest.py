"""The fixtures for pytest, as other projects' tests use them: in a process of pytest's own."""

import os
import subprocess
import sys
import tempfile
import textwrap
import unittest
from pathlib import Path

import psycopg2
import pymysql

import zreconnect
from zreconnect.testing import line_to_fresh_database
from zreconnect.testing.layers import MARIADB_LAYER, POSTGRES_LAYER
from zreconnect.tests.base import PATIENCE, on_mariadb

# The program under test has nothing of zreconnect.
PLAIN = """
import psycopg2
import pytest


@pytest.fixture
def plain(zreconnect_line):
    connection = psycopg2.connect(zreconnect_line.dsn())
    yield connection
    connection.close()


def test_a_connection_is_lost(plain, lose_connection):
    plain.cursor().execute("CREATE TABLE item (name text)")
    assert lose_connection() == 1
    with pytest.raises(psycopg2.OperationalError):
        plain.cursor().execute("SELECT 1")


def test_a_lost_answer(plain, zreconnect_line, lose_commit_answer):
    plain.cursor().execute("CREATE TABLE item (name text)")
    lost = lose_commit_answer()
    with pytest.raises(psycopg2.OperationalError):
        plain.commit()
    assert lost.wait(60)
    rows = zreconnect_line.server.query("SELECT * FROM item", dbname=zreconnect_line.dbname)
    assert rows == []


def test_a_crash(plain, zreconnect_server):
    zreconnect_server.kill_all()
    with pytest.raises(psycopg2.OperationalError):
        plain.cursor().execute("SELECT 1")


@pytest.mark.parametrize("number", range(2))
def test_after_the_crash(zreconnect_server, number):
    assert zreconnect_server.query("SELECT 1") == [(1,)]
    zreconnect_server.shut_down()
"""
RECONNECTING = """
import pytest
import zreconnect


@pytest.fixture
def connection(zreconnect_line):
    connection = zreconnect.connect(zreconnect_line.dsn())
    connection.run(connection.execute, "CREATE TABLE item (name text)")
    yield connection
    connection.close()


def names(connection):
    return connection.run(lambda: connection.execute("SELECT name FROM item").fetchall())


def test_a_lost_answer_is_found(connection, lose_commit_answer):
    connection.execute("INSERT INTO item VALUES ('once')")
    lose_commit_answer()
    connection.commit()
    assert names(connection) == [("once",)]


def test_work_is_run_again(connection, lose_connection):
    losses = iter([lose_connection])

    def work():
        connection.execute("INSERT INTO item VALUES ('once')")
        next(losses, int)()

    connection.run(work)
    assert names(connection) == [("once",)]


def test_an_hour_is_over(zreconnect_line, no_waiting):
    zreconnect_line.refuse()
    policy = zreconnect.RetryPolicy(timeout=3600)
    with pytest.raises(zreconnect.ReconnectTimeout):
        zreconnect.connect(zreconnect_line.dsn(), policy=policy).begin()


def test_without_a_server():
    assert names
"""
NOTHING_LOST = """
def test_nothing_is_lost(lose_commit_answer):
    lose_commit_answer()
"""
NOTHING_OF_OURS = """
import sys


def test_what_is_imported():
    ours = {name for name in sys.modules if name.partition(".")[0] == "zreconnect"}
    plugin = {"zreconnect", "zreconnect.integrations", "zreconnect.integrations.pytest"}
    assert ours == plugin
    for name in ("psycopg2", "transaction", "zope.interface"):
        assert name not in sys.modules
"""


OWN_SERVER = """
import pytest
from zreconnect.testing import EmbeddedPostgres


@pytest.fixture(scope="session")
def zreconnect_server():
    with EmbeddedPostgres(settings={"work_mem": "9MB"}) as server:
        yield server


@pytest.mark.parametrize("number", range(2))
def test_after_the_end(zreconnect_server, number):
    assert zreconnect_server.query("SHOW work_mem") == [("9MB",)]
    zreconnect_server.shut_down()
"""


class FixtureTests(unittest.TestCase):
    def pytest(self, *options, status=0, **tests):
        """What pytest says of these modules of tests. status: with which it is to exit."""
        with tempfile.TemporaryDirectory() as directory:
            for name, text in tests.items():
                Path(directory, f"test_{name}.py").write_text(textwrap.dedent(text))
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
                cwd=directory,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=2 * PATIENCE,
            )
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        return done.stdout

    def test_in_several_processes(self):
        said = self.pytest(
            *("-n", "2"), plain=PLAIN, reconnecting=RECONNECTING, lost=NOTHING_LOST, status=1
        )
        self.assertRegex(said, r"\b10 passed, 1 error\b")
        self.assertIn("no COMMIT has passed on zreconnect_line", said)

    def test_a_server_of_the_programs_own_fixture_is_in_order(self):
        self.assertRegex(self.pytest(own=OWN_SERVER), r"\b2 passed\b")

    def test_who_does_not_use_them_has_nothing_of_them(self):
        said = self.pytest(nothing=NOTHING_OF_OURS)
        self.assertRegex(said, r"\b1 passed\b")


class LineTests:
    """A mixin for each database."""

    def test_a_database_of_its_own(self):
        server = self.layer.server
        with line_to_fresh_database(server) as line:
            server.query("CREATE TABLE item (name varchar(40))", dbname=line.dbname)
            connection = zreconnect.connect(line.dsn())
            self.addCleanup(connection.close)
            connection.run(connection.execute, "INSERT INTO item VALUES ('here')")
            self.assertEqual(server.query("SELECT * FROM item", dbname=line.dbname), [("here",)])
            self.assertGreater(line.count().connections, 0)
            server.shut_down()
        with self.assertRaises(self.error):
            server.query("SELECT 1", dbname=line.dbname)


class PostgresLineTests(LineTests, unittest.TestCase):
    layer = POSTGRES_LAYER
    error = psycopg2.OperationalError


@on_mariadb(MARIADB_LAYER)
class MariaDBLineTests(LineTests, unittest.TestCase):
    error = pymysql.OperationalError
