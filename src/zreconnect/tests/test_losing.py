"""Losses for unit tests without a server, and waiting that takes no time."""

import sqlite3
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import transaction

import zreconnect
from zreconnect import (
    CommitOutcomeUnknown,
    DisconnectionError,
    ReconnectTimeout,
    RetryPolicy,
    initZopeless,
    session,
)
from zreconnect.testing import losing, no_waiting
from zreconnect.testing._ports import bind
from zreconnect.tests.base import PATIENCE


class LosingTests(unittest.TestCase):
    def setUp(self):
        directory = TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = Path(directory.name, "unit.db")
        self.dsn = f"sqlite:///{self.path}"
        self.connection = zreconnect.connect(self.dsn)
        self.addCleanup(self.connection.close)
        self.connection.run(self.connection.execute, "CREATE TABLE item (name text)")
        self.runs = 0

    def names(self):
        with closing(sqlite3.connect(self.path)) as other:
            return [name for (name,) in other.execute("SELECT name FROM item ORDER BY rowid")]

    def work(self):
        self.runs += 1
        cursor = self.connection.cursor()
        cursor.execute("INSERT INTO item VALUES (?)", ("first",))
        cursor.executemany("INSERT INTO item VALUES (?)", [("second",), ("third",)])

    def test_the_statement_of_that_number(self):
        for number in (1, 2):
            with self.subTest(number), losing(statement=number):
                self.connection.begin()
                with self.assertRaises(DisconnectionError):
                    self.work()
                self.assertEqual(self.connection.state, "doomed")
                self.connection.rollback()
                self.assertEqual(self.names(), [])

    def test_work_is_run_again(self):
        for lost in ({"statement": 1}, {"statement": 2}, {"commit": 1}):
            with self.subTest(lost), losing(**lost):
                self.runs = 0
                self.connection.run(self.work)
                self.assertEqual(self.runs, 2)
                self.assertEqual(self.names(), ["first", "second", "third"])
            self.connection.run(self.connection.execute, "DELETE FROM item")

    def test_one_of_each(self):
        with losing(statement=2, commit=1):
            self.connection.run(self.work)
        self.assertEqual(self.runs, 3)
        self.assertEqual(self.names(), ["first", "second", "third"])

    def test_a_commit_that_is_rolled_back(self):
        with losing(commit=2):
            self.connection.run(self.connection.execute, "INSERT INTO item VALUES ('zeroth')")
            self.work()
            with self.assertRaises(DisconnectionError):
                self.connection.commit()
        self.connection.rollback()
        self.assertEqual(self.names(), ["zeroth"])

    def test_a_commit_whose_outcome_is_unknown_is_not_run_again(self):
        with losing(commit=1, unknown=True), self.assertRaises(CommitOutcomeUnknown):
            self.connection.run(self.work)
        self.assertEqual(self.runs, 1)
        self.assertEqual(self.names(), ["first", "second", "third"])
        self.connection.run(self.connection.execute, "DELETE FROM item")
        self.assertEqual(self.names(), [])

    def test_a_block_within_another(self):
        with (
            losing(commit=1, unknown=True),
            losing(statement=1),
            self.assertRaises(CommitOutcomeUnknown),
        ):
            self.connection.run(self.work)
        self.assertEqual(self.runs, 2)
        self.assertEqual(self.names(), ["first", "second", "third"])

    def test_a_transaction_manager(self):
        ztm = initZopeless(self.dsn, implicitBegin=False)
        self.addCleanup(ztm.uninstall)
        self.addCleanup(transaction.abort)
        with losing(commit=1):
            ztm.run(lambda: ztm.cursor().execute("INSERT INTO item VALUES ('one')"))
        self.assertEqual(self.names(), ["one"])

    def test_cursors_of_the_programs_own_class(self):
        class Cursor(sqlite3.Cursor):
            def first(self):
                return self.fetchone()[0]

        with losing(statement=2):
            cursor = self.connection.cursor(cursor_factory=Cursor)
            cursor.execute("SELECT 1")
            self.assertEqual(cursor.first(), 1)
            self.assertIsInstance(cursor, Cursor)
            with self.assertRaises(DisconnectionError):
                cursor.execute("SELECT 2")

    def test_what_was_to_be_lost_and_did_not_come(self):
        for lost, said in (({"statement": 3}, "statement 3 .* only 2"), ({"commit": 2}, "only 1")):
            with self.assertRaisesRegex(AssertionError, said), losing(**lost):
                self.connection.run(self.work)
        # A test that fails fails as it is.
        with self.assertRaises(ZeroDivisionError), losing(statement=1):
            raise ZeroDivisionError

    def test_after_the_block_nothing_is_lost(self):
        with self.assertRaises(AssertionError), losing(statement=3):
            self.connection.run(self.work)
        self.connection.run(self.work)
        self.connection.run(self.work)
        self.assertEqual(len(self.names()), 9)

    def test_what_makes_no_sense(self):
        for keywords, message in (
            ({"statement": 0}, "statement must be a whole number of at least 1, not 0"),
            ({"commit": 1.5}, "commit must be"),
            ({"unknown": True}, "say which one"),
        ):
            with self.assertRaisesRegex(ValueError, message), losing(**keywords):
                self.fail("it was entered")


class NoWaitingTests(unittest.TestCase):
    def test_a_timeout_of_an_hour_is_over_at_once(self):
        with bind() as nobody:
            dsn = f"postgresql://somebody@127.0.0.1:{nobody.getsockname()[1]}/"
            policy = RetryPolicy(timeout=3600, initial=600, maximum=600)
            connection = zreconnect.connect(dsn, policy=policy)
            with no_waiting(), self.assertRaises(ReconnectTimeout) as raised:
                connection.begin()
        self.assertGreater(raised.exception.seconds, 3599)
        self.assertGreater(raised.exception.attempts, 5)

    def test_for_several_threads_at_once(self):
        with bind() as nobody:
            dsn = f"postgresql://somebody@127.0.0.1:{nobody.getsockname()[1]}/"
            policy = RetryPolicy(timeout=600, initial=60, maximum=60)
            connections = [zreconnect.connect(dsn, policy=policy) for _ in range(4)]
            with no_waiting(), ThreadPoolExecutor() as executor:
                raised = [executor.submit(each.begin).exception for each in connections]
                attempts = [get(PATIENCE).attempts for get in raised]
        # As many of each as if it were alone.
        self.assertGreater(min(attempts), 10)

    def test_after_the_block_time_is_as_ever(self):
        with no_waiting():
            self.assertIsNot(session.time, time)
        self.assertIs(session.time, time)
