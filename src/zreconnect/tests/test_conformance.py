"""Every driver here passes the conformance test that others have for theirs."""

import sqlite3
import tempfile
import textwrap
import unittest
from pathlib import Path

from zreconnect.testing import DriverConformance, conformance

# The example in the documentation is psycopg2's test case.
_, _, rest = conformance.__doc__.partition("complete::\n")
EXAMPLE = textwrap.dedent(rest.partition("\nA driver in a distribution")[0])
exec(compile(EXAMPLE, conformance.__file__, "exec"))


class ExampleTests(unittest.TestCase):
    def test_the_example_is_a_test_case(self):
        example = globals()["Psycopg2Conformance"]
        self.assertTrue(issubclass(example, DriverConformance))
        self.assertGreater(len(unittest.defaultTestLoader.getTestCaseNames(example)), 50)


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
