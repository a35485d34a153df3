"""Data source names, and what is shown of them."""

import unittest

from zreconnect import connect
from zreconnect.drivers.psycopg2 import driver
from zreconnect.dsn import driver_name, parse_dbi, redacted


class DriverNameTests(unittest.TestCase):
    def test_schemes(self):
        for dsn in [
            "postgresql://me@here/db",
            "POSTGRES://me@here/db",
            "dbi://me:secret@here/db",
            "host=here dbname=db",
            "dbname=db options='-c search_path=a'",
        ]:
            with self.subTest(dsn):
                self.assertEqual(driver_name(dsn), "psycopg2")

    def test_unknown_scheme(self):
        with self.assertRaisesRegex(ValueError, "dsn has the unknown scheme 'oracle'"):
            driver_name("oracle://me@here/db")

    def test_empty(self):
        with self.assertRaisesRegex(ValueError, "dsn is empty"):
            driver_name(" ")

    def test_no_string(self):
        with self.assertRaisesRegex(TypeError, "dsn must be a string, not NoneType"):
            driver_name(None)


class ParseTests(unittest.TestCase):
    def test_url(self):
        self.assertEqual(
            driver.parse("postgresql://me:s%40cret@here:5433/db?sslmode=disable"),
            {
                "user": "me",
                "password": "s@cret",
                "host": "here",
                "port": "5433",
                "dbname": "db",
                "sslmode": "disable",
            },
        )

    def test_key_value(self):
        self.assertEqual(driver.parse("host=here dbname=db"), {"host": "here", "dbname": "db"})

    def test_dbi(self):
        for dsn, parts in {
            "dbi://db": {"dbname": "db"},
            "dbi:///db": {"dbname": "db"},
            "dbi://me:secret/db": {"dbname": "db", "user": "me", "password": "secret"},
            "dbi://me:@here:5433/db": {
                "dbname": "db",
                "user": "me",
                "host": "here",
                "port": "5433",
            },
            "DBI://me:s%2Fcret@here/db;sslmode=disable;connect_timeout=3": {
                "dbname": "db",
                "user": "me",
                "password": "s/cret",
                "host": "here",
                "sslmode": "disable",
                "connect_timeout": "3",
            },
        }.items():
            with self.subTest(dsn):
                self.assertEqual(driver.parse(dsn), parts)

    def test_dbi_without_its_parts(self):
        for dsn in ["dbi://", "dbi://me:secret@here/", "dbi://me@here/db;sslmode"]:
            with self.subTest(dsn), self.assertRaisesRegex(ValueError, "dsn is no dbi:// name"):
                parse_dbi(dsn)

    def test_what_libpq_does_not_understand_is_not_quoted(self):
        for dsn in ["host=here s3cret", "postgresql://me:s3cret%zz@here/db"]:
            with self.subTest(dsn), self.assertRaisesRegex(ValueError, "^dsn is no") as caught:
                connect(dsn)
            self.assertNotIn("s3cret", str(caught.exception))
            self.assertIsNone(caught.exception.__cause__)
            self.assertTrue(caught.exception.__suppress_context__)


class RedactedTests(unittest.TestCase):
    def test_all_parts(self):
        address = redacted(driver.parse("postgresql://me:s3cret@here:5433/db"))
        self.assertEqual(address, "postgresql://me@here:5433/db")

    def test_few_parts(self):
        self.assertEqual(redacted({"dbname": "db"}), "postgresql:///db")
        self.assertEqual(redacted({"hostaddr": "10.0.0.1"}), "postgresql://10.0.0.1/")

    def test_several_hosts_and_sockets(self):
        self.assertEqual(
            redacted({"host": "one,two", "port": "1,2", "dbname": "db"}),
            "postgresql://one,two:1,2/db",
        )
        self.assertEqual(redacted({"host": "/run/postgresql"}), "postgresql:///run/postgresql/")
