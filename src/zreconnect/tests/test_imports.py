"""What is imported with zreconnect, and when."""

import os
import subprocess
import sys
import unittest

import zreconnect

# What programs have not asked for: other modules than the DSN's, and what takes long to import.
UNASKED = {
    "MySQLdb",
    "asyncio",
    "importlib.metadata",
    "psycopg",
    "pymysql",
    "sqlalchemy",
    "sqlite3",
    "zreconnect.adapter",
    "zreconnect.cli",
    "zreconnect.integrations",
    "zreconnect.ledger",
    "zreconnect.recovery",
    "zreconnect.testing",
    "zreconnect.zopeless",
}
NEEDED = "import transaction, zope.interface, zope.publisher"


class ImportTests(unittest.TestCase):
    def imported(self, statement):
        """The modules that it imports, in a process that has those of zreconnect's needs."""
        program = (
            f"import sys, typing\n{NEEDED}\nbefore = set(sys.modules)\n{statement}\n"
            "print(*sorted(set(sys.modules) - before))"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        return set(done.stdout.split())

    def test_the_package_imports_nothing(self):
        self.assertEqual(self.imported("import zreconnect"), {"zreconnect"})

    def test_a_name_imports_what_it_needs(self):
        imported = self.imported("from zreconnect import connect")
        self.assertIn("zreconnect.connection", imported)
        self.assertEqual(imported & {*UNASKED, "psycopg2"}, set())

    def test_a_connection_imports_its_driver(self):
        imported = self.imported(
            "import zreconnect; zreconnect.connect('postgresql://localhost/nothing')"
        )
        self.assertIn("psycopg2", imported)
        self.assertEqual(imported & UNASKED, set())

    def test_each_public_name_is_there(self):
        for name in zreconnect.__all__:
            with self.subTest(name):
                self.assertIsNotNone(getattr(zreconnect, name))
                self.assertIn(name, dir(zreconnect))

    def test_no_other_name_is(self):
        with self.assertRaisesRegex(AttributeError, "no attribute 'reconnect'"):
            zreconnect.reconnect  # noqa: B018
