"""The commands ``zreconnect recover`` and ``zreconnect ledger``."""

import contextlib
import io
import json

import psycopg2
import transaction

import zreconnect
from zreconnect.cli import main
from zreconnect.tests.base import with_time_to_connect
from zreconnect.tests.test_twophase import Hook, TwoPhaseTestCase


def run(*arguments):
    """The exit status and what a command prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main(arguments)
    return status, output.getvalue()


def refused(*arguments):
    """What a command says that cannot be done."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        status, _output = run(*arguments)
    if status != 2:
        raise AssertionError(f"{arguments} ended with {status}")
    return errors.getvalue()


@with_time_to_connect
class RecoverCommandTests(TwoPhaseTestCase):
    def setUp(self):
        super().setUp()
        self.connect(policy=zreconnect.FAIL_FAST)

    def leave(self):
        """Leave both branches prepared."""
        self.insert()
        Hook("a", tpc_finish=self.deciding.vanish)
        with self.assertRaises(zreconnect.CommitOutcomeUnknown):
            transaction.commit()
        transaction.abort()

    def test_nothing(self):
        self.assertEqual(run("recover", *self.dsns), (0, "Nothing is left prepared.\n"))

    def test_it_shows_before_it_touches(self):
        self.leave()
        status, output = run("recover", "--older-than", "0", *self.dsns)
        self.assertEqual(status, 1)
        self.assertEqual(output.count("rollback: "), 2)
        self.assertIn("add --settle", output)
        self.assertNotIn(self.server.password, output)
        self.check(rows=0, prepared=1)
        status, output = run("recover", "--older-than", "0", "--settle", *self.dsns)
        self.assertEqual(status, 0)
        self.assertLess(output.index("rollback: "), output.index("rollback done"))
        self.assertIn("2 settled, 0 left", output)
        self.check(rows=0)

    def test_young_ones(self):
        self.leave()
        self.assertEqual(run("recover", "--settle", *self.dsns)[0], 0)
        self.check(rows=0, prepared=1)

    def test_what_cannot_be_decided(self):
        self.leave()
        status, output = run("recover", "--older-than", "0", "--settle", self.other.dsn)
        self.assertEqual(status, 1)
        self.assertIn("undecidable NOT done", output)
        self.assertIn("0 settled, 1 left", output)

    def test_bad_arguments(self):
        for seconds in ("-1", "nan", "inf", "soon"):
            self.assertIn("at least 0", refused("recover", "--older-than", seconds, "dbname=x"))
        self.assertIn("argument DSN", refused("recover", "mongodb://x"))
        missing = refused("recover", self.server.dsn(dbname="none"))
        self.assertIn("cannot ask a database", missing)

    def test_json(self):
        self.leave()
        arguments = ("recover", "--json", "--older-than", "0", *self.dsns)
        for more, expected, settled in (((), 1, False), (("--settle",), 0, True)):
            status, output = run(*arguments, *more)
            self.assertEqual(status, expected)
            told = json.loads(output)
            self.assertEqual(told["status"], expected)
            self.assertEqual([each["settled"] for each in told["prepared"]], [settled] * 2)
            self.assertNotIn(self.server.password, output)


class LedgerCommandTests(TwoPhaseTestCase):
    def setUp(self):
        super().setUp()
        self.dsn = self.server.dsn(dbname="first")
        self.server.query("DROP ROLE IF EXISTS worker")
        self.server.query(f"CREATE ROLE worker LOGIN PASSWORD '{self.server.password}'")
        self.addCleanup(self.server.query, "DROP ROLE worker")
        self.server.query("GRANT USAGE ON SCHEMA public TO PUBLIC", dbname="first")
        self.worker = self.server.dsn(user="worker", dbname="first")

    def use(self, table):
        connection = zreconnect.connect(self.worker, witness=zreconnect.Ledger(table))
        try:
            with connection.transaction() as cursor:
                cursor.execute("SELECT 1")
        finally:
            connection.close()

    def test_a_role_that_may_not_create_tables(self):
        for arguments, table in [((), "zreconnect_ledger"), (("--table", "commits"), "commits")]:
            with self.assertRaisesRegex(psycopg2.ProgrammingError, f"ledger --table {table}"):
                self.use(table)
            status, output = run("ledger", *arguments, self.dsn)
            self.assertEqual(status, 0)
            self.assertIn(f"{table} was made in", output)
            self.assertIn("granted to PUBLIC", output)
            self.assertNotIn(self.server.password, output)
            self.use(table)
            self.assertIn(f"{table} exists in", run("ledger", *arguments, self.dsn)[1])

    def test_json(self):
        for existed in (False, True):
            status, output = run("ledger", "--json", self.dsn)
            told = json.loads(output)
            self.assertEqual((status, told["status"], told["existed"]), (0, 0, existed))
            self.assertEqual(told["table"], "zreconnect_ledger")
            self.assertNotIn(self.server.password, output)

    def test_it_cannot_be_made(self):
        self.assertIn("permission denied for schema public", refused("ledger", self.worker))
        missing = self.server.dsn(dbname="none")
        self.assertIn("does not exist", refused("ledger", missing))
        with contextlib.redirect_stderr(io.StringIO()):
            status, output = run("ledger", "--json", missing)
        self.assertEqual((status, json.loads(output)["status"]), (2, 2))
        self.assertIn("does not exist", json.loads(output)["error"])

    def test_bad_arguments(self):
        self.assertIn("argument --table", refused("ledger", "--table", "a; b", self.dsn))
        self.assertIn("argument DSN", refused("ledger", "mongodb://x"))
