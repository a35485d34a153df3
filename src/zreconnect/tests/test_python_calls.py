"""What zreconnect costs in Python: the function calls of a transaction, a statement, and a row.

Calls inside the standard library, such as those of a logger, are not counted.
"""

import encodings
import io
import logging
import os
import sys
import unittest
from contextlib import contextmanager
from functools import partial
from itertools import islice
from unittest import mock

import psycopg
import transaction
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CollectorRegistry
from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import Engine

from zreconnect import ReconnectingDatabaseAdapter, engines, initZopeless
from zreconnect.integrations import opentelemetry, prometheus
from zreconnect.integrations.sqlalchemy import register
from zreconnect.tests.base import DatabaseTestCase

STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
# What is made once, such as the first session or the plan of a prepared statement, does not count.
WARM_UP = 10
TIMES = 5


class Counter:
    """Counts the calls of Python functions in a ``with`` block."""

    def __enter__(self):
        self.calls = 0
        # That of a measurement of the tests.
        self._before = sys.getprofile()
        sys.setprofile(self._count)
        return self

    def __exit__(self, *error):
        sys.setprofile(self._before)
        # The call of this method.
        self.calls -= 1

    def _count(self, frame, event, argument):
        if event == "call" and not is_of_the_standard_library(frame.f_code.co_filename):
            self.calls += 1


def is_of_the_standard_library(path):
    return path.startswith(STANDARD_LIBRARY) and "site-packages" not in path


def calls(function):
    """How many Python functions are called by it, apart from itself.

    Of some runs it is the least: the garbage collector may come in between.
    """
    for _ in range(WARM_UP):
        function()
    counts = []
    for _ in range(TIMES):
        with Counter() as counter:
            function()
        counts.append(counter.calls)
    return min(counts) - 1


class CounterTests(unittest.TestCase):
    def test_nothing(self):
        self.assertEqual(calls(lambda: None), 0)

    def test_calls(self):
        def inner():
            "-".join(["1", "2"])

        def outer():
            inner()
            inner()

        self.assertEqual(calls(outer), 2)

    def test_those_of_the_standard_library_are_none(self):
        self.assertEqual(calls(lambda: encodings.utf_8.decode(b"one")), 0)
        self.assertEqual(calls(lambda: logging.getLogger("zreconnect.tests")), 0)


class CallsTestCase(DatabaseTestCase):
    """The limits are the numbers of calls that are allowed."""

    def assert_calls(self, limit, function):
        self.assertLessEqual(calls(function), limit)

    @contextmanager
    def open_cursor(self, statement):
        """A cursor that has executed the statement, in a transaction."""
        connection = self.connect()
        connection.begin()
        with connection.cursor() as cursor:
            cursor.execute(statement)
            yield cursor


class TransactionCalls:
    transaction_limit: int
    statement_limit: int
    fetchone_limit: int
    row_limit: int

    def test_a_transaction_of_one_statement(self):
        connection = self.connect()
        cursor = connection.cursor()

        def use():
            cursor.execute("SELECT 1")
            cursor.fetchone()
            connection.commit()

        self.assert_calls(self.transaction_limit, use)

    def test_one_more_statement(self):
        with self.open_cursor("SELECT 1") as cursor:
            self.assert_calls(self.statement_limit, lambda: cursor.execute("SELECT 1"))

    def test_fetchone(self):
        with self.open_cursor("SELECT generate_series(1, 100)") as cursor:
            self.assert_calls(self.fetchone_limit, cursor.fetchone)
            self.assertIsNotNone(cursor.fetchone())

    def test_one_more_row_of_an_iteration(self):
        with self.open_cursor("SELECT generate_series(1, 100)") as cursor:
            rows = iter(cursor)
            # Without a call of next(), as a for statement has it.
            self.assert_calls(self.row_limit, lambda: all(islice(rows, 1)))
            self.assertIsNotNone(next(rows))


class Psycopg2Tests(TransactionCalls, CallsTestCase):
    transaction_limit = 45
    statement_limit = 8
    fetchone_limit = 3
    row_limit = 0


class MeasuredTests(Psycopg2Tests):
    """Where metrics are registered, the limits are the same."""

    def setUp(self):
        super().setUp()
        registry, provider = CollectorRegistry(), MeterProvider()
        prometheus.register(registry)
        self.addCleanup(prometheus.unregister, registry)
        opentelemetry.register(provider)
        self.addCleanup(opentelemetry.unregister, provider)
        self.addCleanup(provider.shutdown)


class PsycopgTests(TransactionCalls, CallsTestCase):
    driver = "psycopg"
    module = psycopg
    transaction_limit = 95
    statement_limit = 32
    fetchone_limit = 6
    row_limit = 0


class TransactionManagerTests(CallsTestCase):
    def setUp(self):
        super().setUp()
        # SQLObject keeps the objects of a manager that other tests had, until the process ends.
        transaction.manager.clearSynchs()

    def test_init_zopeless(self):
        manager = initZopeless(self.dsn, implicitBegin=False)
        self.addCleanup(manager.uninstall)

        def use():
            manager.begin()
            cursor = manager.cursor()
            cursor.execute("SELECT 1")
            cursor.fetchone()
            manager.commit()

        self.assert_calls(105, use)

    def test_the_adapter(self):
        adapter = ReconnectingDatabaseAdapter(self.dsn)
        self.addCleanup(adapter.disconnect)

        def use():
            adapter().cursor().execute("SELECT 1")
            transaction.commit()

        self.assert_calls(105, use)


class SqlalchemyTests(CallsTestCase):
    def setUp(self):
        super().setUp()
        # Other tests have the engines of the process watched, which takes calls of its own.
        for each in engines.LISTENERS:
            if event.contains(Engine, *each):
                event.remove(Engine, *each)
        # SQLAlchemy notes that there were listeners, for good.
        no_events = mock.patch.object(Engine, "_has_events", False)
        no_events.start()
        self.addCleanup(no_events.stop)

    def test_an_engine(self):
        engine = create_engine(self.dsn.replace("postgresql:", "postgresql+psycopg2:"))
        register(engine)
        self.addCleanup(engine.dispose)
        query = text("SELECT 1")

        def use():
            with engine.begin() as connection:
                connection.execute(query).scalar()

        self.assert_calls(190, use)


class CopyCalls(CallsTestCase):
    """Of a row that COPY gives."""

    def assert_row_calls(self, limit, copy):
        copied = "COPY (SELECT generate_series(1, {})) TO STDOUT"
        few, many = (calls(partial(copy, copied.format(rows))) for rows in (100, 200))
        self.assertLessEqual(many - few, limit * 100)


class Psycopg2CopyTests(CopyCalls):
    def test_a_row_for_a_file(self):
        with self.open_cursor("SELECT 1") as cursor:
            self.assert_row_calls(1, lambda copy: cursor.copy_expert(copy, io.BytesIO()))


class PsycopgCopyTests(CopyCalls):
    driver = "psycopg"
    module = psycopg

    def test_a_row_of_a_block(self):
        def read(copy):
            with cursor.copy(copy) as rows:
                self.assertTrue(all(rows))

        with self.open_cursor("SELECT 1") as cursor:
            # Of which psycopg makes five.
            self.assert_row_calls(13, read)
