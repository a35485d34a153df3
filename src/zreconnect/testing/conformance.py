"""Does a driver keep the contract? A test case that every driver passes, also one of your own.

Derive a test case from `DriverConformance`, say in it how to reach a database and how to trouble
it, and run it with any runner for unittest. This is the one for psycopg2, complete::

    import unittest

    import psycopg2
    import psycopg2.extras

    from zreconnect.testing import DriverConformance
    from zreconnect.testing.layers import PortForwardLayer, PostgresLayer

    SETTINGS = {"max_prepared_transactions": 5}

    class Psycopg2Conformance(DriverConformance, unittest.TestCase):
        layer = PortForwardLayer(PostgresLayer("Conformance", SETTINGS), "ConformanceForward")
        driver_name = "psycopg2"
        cursor_class = psycopg2.extras.DictCursor
        isolation_query = "SHOW transaction_isolation"
        client_encoding, encoding_query = "LATIN1", "SHOW client_encoding"

        @property
        def forward(self):
            return self.layer.forward

        def dsn(self):
            return self.layer.dsn()

        def dsn_with_password(self, password):
            return f"postgresql://somebody:{password}@localhost/somewhere"

        def malformed_dsns(self, password):
            return [f"postgresql://somebody:{password}%zz@localhost/somewhere"]

        def refused_dsns(self):
            refused = [self.layer.dsn(user="nobody"), self.layer.dsn(dbname="nothing")]
            return [*refused, self.dsn() + "?options=-cnothing%3D1"]

        def connect_plainly(self, autocommit=False):
            raw = psycopg2.connect(self.dsn())
            raw.autocommit = autocommit
            return raw

        def kill(self, number):
            self.layer.server.query("SELECT pg_terminate_backend(%s, 30000)", number)

The layer has zope.testrunner start the server and the line. For another runner, such as pytest,
the class does that, and the other methods ask ``self`` instead of ``self.layer``::

        @classmethod
        def setUpClass(cls):
            super().setUpClass()
            cls.server = EmbeddedPostgres(settings=SETTINGS)
            cls.server.start()
            cls.addClassCleanup(cls.server.stop)
            cls.forward = PortForward("127.0.0.1", cls.server.port)
            cls.forward.start()
            cls.addClassCleanup(cls.forward.stop)

        def dsn(self, **changes):
            return self.server.dsn(host="127.0.0.1", port=self.forward.port, **changes)

A driver in a distribution of its own is found by its entry point in the group
``zreconnect.drivers``; the name of the entry point is the name of the driver, and the scheme of the
DSNs that ask for it::

    [project.entry-points."zreconnect.drivers"]
    acme = "acme_zreconnect:driver"

Two-phase commit is tested if the server allows prepared transactions, as it does here.

What a database cannot do, its driver says in its attributes and answers (``has_sessions``,
``supports_two_phase``, ``has_transaction_ids()``, ``fileno()``,
``in_failed_transaction()``); tests of what is not there are skipped.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import socketserver
import threading
import time
import traceback
import unittest
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

import transaction
from transaction.interfaces import TransientError
from zope.interface.verify import verifyObject
from zope.publisher.interfaces import Retry

from zreconnect.branch import end_branch, is_prepared
from zreconnect.connection import ReconnectingConnection, connect
from zreconnect.drivers.base import Condition, Evidence, Meaning, SessionSettings, load_driver
from zreconnect.exceptions import CommitOutcomeUnknown, DisconnectionError
from zreconnect.history import History
from zreconnect.interfaces import DOOMED, IDLE, IDriver
from zreconnect.ledger import Ledger
from zreconnect.marks import TOLD
from zreconnect.policy import RetryPolicy
from zreconnect.server import server_from_dsn
from zreconnect.testing.portforward import PortForward
from zreconnect.witness import Outcome, XidWitness

if TYPE_CHECKING:
    TestCase = unittest.TestCase
else:
    # A mixin, lest a test runner take the promises for tests where they are only imported.
    TestCase = object

#: How long anything is waited for, in seconds.
PATIENCE = 30.0
POLL_INTERVAL = 0.01
TABLE = "conformance_item"
LEDGER = "conformance_ledger"
PASSWORD = "not-to-be-shown"
ISOLATION_LEVELS = ("READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
WRONG_STATEMENT = "SELECT name FROM conformance_nothing"
# How long a connection may take, and a statement of it that has to take longer, in seconds. A
# module may round the first up.
SHORT_TIME, LONGER_TIME = 1.0, 3.0
# What can be heard from who is no server of the kind, or is none that is in order, and hangs up.
NONSENSE = {
    "nothing": b"",
    "a line of text": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "zeros": bytes(64),
    "bytes": bytes(range(255, -1, -1)),
    "a refusal of PostgreSQL's": b"E\0\0\0\x26SFATAL\0C53300\0Mtoo many clients\0\0",
    "its yes to TLS, and no TLS": b"Syes, but there is none",
    "its no to TLS, and no more": b"N",
    "a packet of MySQL's with nothing in it": b"\0\0\0\0",
    "a greeting of MySQL's that breaks off": b"\x09\0\0\0\x0a8.0.36\0\x01",
    "a refusal of MySQL's": b"\x0c\0\0\0\xff\x10\x04Too many!",
}


class DriverConformance(TestCase):
    """The promises of `zreconnect.interfaces.IDriver`, as tests.

    The tests make the tables ``conformance_item`` and ``conformance_ledger`` in the database of
    `dsn`, and remove them. The attributes and methods up to `kill` are to be set and defined in
    the derived class, unless it is said that they may be left alone.
    """

    #: The name that ``connect(driver=...)`` takes.
    driver_name: str
    #: The `PortForward` that the connections of `dsn` go through, started and in order. Without
    #: one, disconnects are tested with `kill` alone, and round trips are not counted. A test
    #: listens in its place while it refuses.
    forward: PortForward | None = None
    #: A cursor class of the module's, other than its usual one.
    cursor_class: type
    #: Tells the isolation level of the transaction, as SQL spells it; None if there is but one.
    isolation_query: str | None = None
    #: An encoding other than the usual one; None if there is but one.
    client_encoding: str | None = None
    #: Tells the session's encoding.
    encoding_query = ""

    def dsn(self) -> str:
        """The DSN of the database to test with."""
        raise NotImplementedError

    def dsn_with_password(self, password: str) -> str | None:
        """Any DSN with that password; None if there are none, or leave the method alone."""
        return None

    def malformed_dsns(self, password: str) -> list[str]:
        """DSNs that cannot be parsed, with that password in them if there can be one."""
        raise NotImplementedError

    def refused_dsns(self) -> list[str]:
        """DSNs that connecting is refused for, now and later: a wrong role, password, database."""
        raise NotImplementedError

    def connect_plainly(self, autocommit: bool = False) -> Any:
        """A connection to the database as the module's users make it."""
        raise NotImplementedError

    def kill(self, number: int) -> None:
        """End a session as an administrator does, and return when it has ended.

        number: the server's number for it. To be defined if the driver ``has_sessions``.
        """
        raise NotImplementedError

    # What the tests share

    def setUp(self) -> None:
        super().setUp()
        self.driver = load_driver(self.driver_name)
        self.module = self.driver.module
        self._drop_tables()
        self.addCleanup(self._drop_tables)
        self.addCleanup(self._reset_line)
        self._ask(f"CREATE TABLE {TABLE} (name varchar(40) PRIMARY KEY, number integer)")

    def _drop_tables(self) -> None:
        for table in (TABLE, LEDGER):
            self._ask(f"DROP TABLE IF EXISTS {table}")

    def _reset_line(self) -> None:
        if self.forward is not None:
            self.forward.cancel_cut()
            self.forward.resume()
            self.forward.accept()
            self.forward.drop()

    def _open(self, settings: SessionSettings | None = None) -> Any:
        """A raw connection, made in another thread and prepared, as the core does it."""
        raw = server_from_dsn(self.dsn(), self.driver_name).connect(PATIENCE)
        self.addCleanup(self.driver.close, raw)
        self.driver.restore(raw, settings or SessionSettings(), {})
        return raw

    def _connect(self, **keywords: Any) -> ReconnectingConnection:
        keywords.setdefault("policy", RetryPolicy(timeout=PATIENCE))
        connection = connect(self.dsn(), self.driver_name, **keywords)
        self.addCleanup(connection.close)
        return connection

    def _ask(self, statement: str) -> list[Any]:
        """The rows that a session of its own gets."""
        raw = server_from_dsn(self.dsn(), self.driver_name).connect(PATIENCE)
        try:
            return cast("list[Any]", self.driver.query(raw, statement))
        finally:
            self.driver.close(raw)

    def _names(self) -> list[str]:
        return [name for (name,) in self._ask(f"SELECT name FROM {TABLE} ORDER BY name")]

    def _begin(self, raw: Any, rider: str = "") -> Any:
        return self.driver.begin(raw, SessionSettings(), rider)

    def _insert(self, raw: Any, name: str) -> None:
        self.driver.query(raw, insert(name))

    def _round_trips(self, function: Callable[[], object]) -> int:
        before = self._line().count()
        function()
        return (self._line().count() - before).round_trips

    def _line(self) -> PortForward:
        if self.forward is None:
            self.skipTest("the test case has no forwarder")
        return self.forward

    def _need_sessions(self) -> None:
        if not self.driver.has_sessions:
            self.skipTest(f"{self.driver_name} has no sessions that can be lost")

    def _ways_to_lose(self) -> dict[str, Callable[[Any], object]]:
        self._need_sessions()
        ways: dict[str, Callable[[Any], object]] = {
            "killed": lambda raw: self.kill(self.driver.identify(raw).pid)
        }
        forward = self.forward
        if forward is not None:
            ways["FIN"] = lambda raw: forward.drop()
            ways["RST"] = lambda raw: forward.drop(reset=True)
        return ways

    @contextmanager
    def _error(self) -> Iterator[list[Any]]:
        """Expects an error of the module's, and gives it, in a list, after the block."""
        errors: list[Any] = []
        with self.assertRaises(self.module.Error) as raised:
            yield errors
        errors.append(raised.exception)

    # The driver itself

    def test_it_provides_the_interface(self) -> None:
        verifyObject(IDriver, self.driver)
        self.assertEqual(self.driver.name, self.driver_name)
        self.assertTrue(issubclass(self.module.OperationalError, self.module.Error))

    def test_its_disconnection_error_is_understood_by_publishers_loops_and_old_code(self) -> None:
        original = self.module.OperationalError("gone")
        error = self.driver.disconnection_error("lost", (type(original), original, None))
        for base in (DisconnectionError, self.module.OperationalError, Retry, TransientError):
            self.assertIsInstance(error, base)
        self.assertIs(error.getOriginalException()[1], original)
        self.assertEqual(str(error), "lost")

    def test_its_disconnection_error_travels_between_processes(self) -> None:
        original = self.module.OperationalError("gone")
        error = self.driver.disconnection_error("lost", (type(original), original, None))
        copy = pickle.loads(pickle.dumps(error))
        self.assertIs(type(copy), type(error))
        self.assertEqual(str(copy), "lost")

    def test_two_phase_is_refused_if_it_is_not_supported(self) -> None:
        if self.driver.supports_two_phase:
            self.skipTest("two-phase commit is supported")
        with self.assertRaisesRegex(ValueError, "two_phase"):
            connect(self.dsn(), self.driver_name, two_phase=True)

    # DSNs

    def test_the_address_has_no_password(self) -> None:
        dsn = self.dsn_with_password(PASSWORD)
        if dsn is None:
            self.skipTest("there are no passwords")
        parameters = self.driver.parse(dsn)
        self.assertIn(PASSWORD, parameters.values())
        self.assertNotIn(PASSWORD, self.driver.address(parameters))
        self.assertNotIn(PASSWORD, repr(connect(dsn, self.driver_name)))

    def test_parameters_and_address_are_strings(self) -> None:
        parameters = self.driver.parse(self.dsn())
        self.assertEqual({type(each) for pair in parameters.items() for each in pair}, {str})
        self.assertIsInstance(self.driver.address(parameters), str)

    def test_a_malformed_dsn_is_refused_and_not_quoted(self) -> None:
        for dsn in self.malformed_dsns(PASSWORD):
            with self.subTest(dsn), self.assertRaises(ValueError) as raised:
                self.driver.parse(dsn)
            shown = "".join(traceback.format_exception(raised.exception))
            self.assertNotIn(PASSWORD, shown)
            self.assertNotIn(dsn, shown)

    # Connecting

    def test_a_session_tells_the_address_that_it_was_connected_to(self) -> None:
        raw = self._open()
        self.assertEqual(
            self.driver.address(self.driver.parameters(raw)),
            self.driver.address(self.driver.parse(self.dsn())),
        )
        self.assertNotIn("password", self.driver.parameters(raw))

    def test_each_place_can_be_connected_to(self) -> None:
        places = self.driver.places(self.driver.parse(self.dsn()))
        self.assertTrue(places)
        for place in places:
            self.assertEqual(self.driver.places(place), [place])
            self.driver.close(self.driver.connect(place, PATIENCE))

    def test_a_refused_port_means_to_try_again(self) -> None:
        self._line().refuse()
        parameters = self.driver.parse(self.dsn())
        with self.assertRaises((self.module.Error, OSError)) as raised:
            self.driver.connect(parameters, PATIENCE)
        self.assertIs(self.driver.connect_meaning(raised.exception, parameters), Meaning.DISCONNECT)

    def test_a_silent_server_is_given_up_and_means_to_try_again(self) -> None:
        self._line().silence()
        parameters = self.driver.parse(self.dsn())
        with ThreadPoolExecutor(1) as threads:
            attempt = threads.submit(self.driver.connect, parameters, 0.5)
            try:
                error = attempt.exception(PATIENCE)
            finally:
                # Lets an attempt that does not end by itself end all the same.
                self._line().drop()
        self.assertIsInstance(error, (self.module.Error, OSError))
        self.assertIs(self.driver.connect_meaning(error, parameters), Meaning.DISCONNECT)

    def test_who_is_no_server_is_an_error_of_connecting(self) -> None:
        self._need_sessions()
        line, parameters = self._line(), self.driver.parse(self.dsn())
        line.refuse()
        for said, answer in NONSENSE.items():
            with self.subTest(said), Impostor(line, answer), ThreadPoolExecutor(1) as threads:
                error = threads.submit(self.driver.connect, parameters, PATIENCE).exception()
                self.assertIsInstance(
                    error,
                    (self.module.Error, OSError),
                    f"connect() has raised {error!r}, which is neither the module's nor an OSError",
                )

    def test_the_time_for_connecting_is_none_for_statements(self) -> None:
        self._need_sessions()
        other, parameters = self._open(), self.driver.parse(self.dsn())
        self._insert(other, "a")
        raw = self._connect_within(SHORT_TIME, parameters)
        self._begin(other)
        self.driver.query(other, increment("a"))
        self._begin(raw)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(self.driver.query, raw, increment("a"))
            # Until it fails, or should have done so.
            wait([waiting], LONGER_TIME)
            # Gives the lock to who still waits for it.
            self.driver.rollback(other)
        error = waiting.exception()
        self.assertIsNone(error, "a statement may not take longer than connecting was to take")
        self.driver.rollback(raw)

    def _connect_within(self, seconds: float, parameters: Any) -> Any:
        """A raw connection that was to be made in that time, on a machine that may be busy."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                raw = self.driver.connect(parameters, seconds)
                break
            except (self.module.Error, OSError):
                if time.monotonic() > deadline:
                    raise
        self.addCleanup(self.driver.close, raw)
        self.driver.prepare(raw)
        return raw

    def test_an_attempt_that_the_caller_gave_up_means_to_try_again(self) -> None:
        error = TimeoutError("no answer within 10.0 seconds")
        parameters = self.driver.parse(self.dsn())
        self.assertIs(self.driver.connect_meaning(error, parameters), Meaning.DISCONNECT)

    def test_a_wrong_role_or_database_is_refused_for_good(self) -> None:
        for dsn in self.refused_dsns():
            with self.subTest(dsn):
                parameters = self.driver.parse(dsn)
                with self._error() as errors:
                    self.driver.close(self.driver.connect(parameters, PATIENCE))
                meaning = self.driver.connect_meaning(errors[0], parameters)
                self.assertIs(meaning, Meaning.PERMANENT)

    def test_prepare_refuses_what_is_no_connection(self) -> None:
        with self.assertRaises(TypeError):
            self.driver.prepare(object())

    def test_prepare_refuses_a_connection_in_autocommit_mode(self) -> None:
        raw = self.connect_plainly(autocommit=True)
        self.addCleanup(self.driver.close, raw)
        with self.assertRaises(self.module.ProgrammingError):
            self.driver.prepare(raw)

    def test_prepare_refuses_a_connection_in_a_transaction(self) -> None:
        raw = self.connect_plainly()
        self.addCleanup(self.driver.close, raw)
        raw.cursor().execute(insert("a"))
        with self.assertRaises(self.module.ProgrammingError):
            self.driver.prepare(raw)

    def test_prepare_takes_a_plain_connection(self) -> None:
        connection = ReconnectingConnection(self.connect_plainly, self.driver_name)
        self.addCleanup(connection.close)
        with connection.transaction() as cursor:
            cursor.execute(insert("a"))
        self.assertEqual(self._names(), ["a"])
        self.assertEqual(connection.server, self.driver.address(self.driver.parse(self.dsn())))

    # Transactions

    def test_outside_a_transaction_each_statement_is_one(self) -> None:
        raw = self._open()
        self._insert(raw, "a")
        self.assertFalse(self.driver.in_transaction(raw))
        self.assertEqual(self._names(), ["a"])

    def test_commit(self) -> None:
        raw = self._open()
        self._begin(raw)
        self.assertTrue(self.driver.in_transaction(raw))
        self._insert(raw, "a")
        self.assertEqual(self._names(), [])
        self.assertFalse(self.driver.in_failed_transaction(raw))
        self.driver.commit(raw)
        self.assertFalse(self.driver.in_transaction(raw))
        self.assertEqual(self._names(), ["a"])

    def test_rollback(self) -> None:
        raw = self._open()
        self._begin(raw)
        self._insert(raw, "a")
        self.driver.rollback(raw)
        self.assertFalse(self.driver.in_transaction(raw))
        self.assertEqual(self._names(), [])
        self.driver.rollback(raw)
        self.assertFalse(self.driver.in_transaction(raw))

    def test_rows_that_were_not_read_do_not_keep_it_from_rolling_back(self) -> None:
        raw = self._open()
        self._insert(raw, "a")
        self._begin(raw)
        self._insert(raw, "b")
        cursor = self.driver.cursor(raw, None, {})
        cursor.execute(f"SELECT name FROM {TABLE}")
        self.driver.rollback(raw)
        self.assertFalse(self.driver.in_transaction(raw))
        self.assertEqual(self._names(), ["a"])

    def test_a_rider_on_begin_returns_its_row(self) -> None:
        raw = self._open()
        self._insert(raw, "a")
        for rider, changed in [
            (f"SELECT name FROM {TABLE} WHERE name = 'a'", ("a",)),
            (f"SELECT name FROM {TABLE} WHERE name = 'b'", None),
            ("", None),
        ]:
            with self.subTest(rider):
                self.assertEqual(self._begin(raw, rider), changed)
                self.assertTrue(self.driver.in_transaction(raw))
                self.driver.rollback(raw)

    def test_a_rider_on_begin_is_a_part_of_the_transaction(self) -> None:
        raw = self._open()
        self._insert(raw, "a")
        for end in (self.driver.rollback, self.driver.commit):
            self.assertIsNone(self._begin(raw, self._update("a", 1)))
            end(raw)
        self.assertEqual(self._ask(f"SELECT number FROM {TABLE}"), [(1,)])

    def _update(self, name: str, number: int) -> str:
        return f"UPDATE {TABLE} SET number = {number} WHERE name = '{name}'"

    def test_a_rider_on_commit_is_committed(self) -> None:
        raw = self._open()
        self._begin(raw)
        self.driver.commit(raw, insert("a"))
        self.assertFalse(self.driver.in_transaction(raw))
        self.assertEqual(self._names(), ["a"])

    def test_nothing_is_committed_if_the_rider_fails(self) -> None:
        raw = self._open()
        self._begin(raw)
        self._insert(raw, "a")
        with self.assertRaises(self.module.Error):
            self.driver.commit(raw, WRONG_STATEMENT)
        self.driver.rollback(raw)
        self.assertFalse(self.driver.in_transaction(raw))
        self.assertEqual(self._names(), [])

    def test_the_round_trips_of_a_transaction(self) -> None:
        driver, raw = self.driver, self._open()
        self._begin(raw)
        self._insert(raw, "a")
        driver.commit(raw)
        rider = self._update("a", 1)
        for end in (lambda: driver.commit(raw), lambda: driver.rollback(raw)):
            self.assertEqual(self._round_trips(lambda: self._begin(raw, rider)), 1)
            self.assertEqual(self._round_trips(end), 1)
        self.assertEqual(self._round_trips(lambda: self._begin(raw)), 1)
        self.assertEqual(self._round_trips(lambda: driver.commit(raw, insert("b"))), 1)

    def test_the_modes_of_a_transaction_cost_no_round_trip(self) -> None:
        settings = SessionSettings(
            isolation_level=self.driver.isolation_level("SERIALIZABLE"), readonly=True
        )
        raw = self._open(settings)
        self.driver.begin(raw, settings)
        self.driver.rollback(raw)
        self.assertEqual(self._round_trips(lambda: self.driver.begin(raw, settings)), 1)
        self.assertEqual(self._round_trips(lambda: self.driver.rollback(raw)), 1)

    def test_what_needs_no_round_trip(self) -> None:
        driver, raw = self.driver, self._open()
        parameters = driver.parse(self.dsn())
        self._begin(raw)
        cursor = driver.cursor(raw, None, {})
        cursor.execute(insert("a"))

        def look() -> None:
            driver.in_transaction(raw)
            driver.in_failed_transaction(raw)
            driver.begins_read_only(raw, SessionSettings())
            driver.misses_target(raw, parameters)
            driver.is_commit(cursor)
            driver.looks_like_reading(cursor)
            driver.cursor(raw, None, {})
            driver.fileno(raw)

        self.assertEqual(self._round_trips(look), 0)

    def test_whether_a_transaction_has_written_takes_a_round_trip(self) -> None:
        raw = self._open()
        self._begin(raw)
        self.assertEqual(self._round_trips(lambda: self.driver.has_written(raw)), 1)

    def test_a_transaction_that_has_written_says_so(self) -> None:
        raw = self._open()
        self._begin(raw)
        self._insert(raw, "a")
        self.assertTrue(self.driver.has_written(raw))
        self.assertTrue(self.driver.has_written(raw, LEDGER))

    def test_a_failed_transaction_is_not_committed_silently(self) -> None:
        driver, raw = self.driver, self._open()
        self._begin(raw)
        self._insert(raw, "a")
        with self.assertRaises(self.module.Error):
            driver.query(raw, WRONG_STATEMENT)
        self.assertTrue(driver.in_transaction(raw))
        if driver.in_failed_transaction(raw):
            with self.assertRaises(self.module.InternalError):
                driver.commit(raw)
            self.assertEqual(self._names(), [])
        else:
            # Where a failed statement leaves no trace, the rest of the transaction counts.
            driver.commit(raw)
            self.assertEqual(self._names(), ["a"])
        self.assertFalse(driver.in_transaction(raw))
        self.assertFalse(driver.in_failed_transaction(raw))

    def test_own_transaction_leaves_the_transaction_as_it_is(self) -> None:
        driver, raw = self.driver, self._open()
        for name, end in [("a", driver.commit), ("b", driver.rollback)]:
            self._begin(raw)
            self._insert(raw, name)
            driver.own_transaction(raw)
            self.assertTrue(driver.in_transaction(raw))
            end(raw)
            self.assertFalse(driver.in_transaction(raw))
            self.assertEqual(self._names(), ["a"])

    def test_savepoints(self) -> None:
        with self._connect().transaction() as cursor:
            cursor.execute(insert("a"))
            savepoint = cursor.connection.savepoint()
            cursor.execute(insert("b"))
            savepoint.rollback()
            cursor.execute(insert("c"))
            savepoint.release()
        self.assertEqual(self._names(), ["a", "c"])

    def test_a_block_inside_a_transaction_is_a_savepoint(self) -> None:
        connection = self._connect()
        with connection.transaction() as cursor:
            cursor.execute(insert("a"))
            for name in (None, f"one '{2 * self.driver.quote}; two"):
                with connection.transaction(name, force_rollback=True):
                    cursor.execute(insert("b"))
            with connection.transaction():
                cursor.execute(insert("c"))
                with self.assertRaises(self.module.ProgrammingError):
                    connection.commit()
        self.assertEqual(self._names(), ["a", "c"])

    def test_a_savepoint_heals_a_failed_statement(self) -> None:
        connection = self._connect()
        with connection.transaction() as cursor:
            cursor.execute(insert("a"))
            savepoint = connection.savepoint()
            with self.assertRaises(self.module.Error):
                cursor.execute(insert("a"))
            savepoint.rollback()
            cursor.execute(insert("b"))
        self.assertEqual(self._names(), ["a", "b"])

    def test_work_that_meets_a_deadlock_is_run_again(self) -> None:
        self._need_sessions()
        raw = self._open()
        for name in ("a", "b"):
            self.driver.query(raw, f"INSERT INTO {TABLE} VALUES ('{name}', 0)")
        each_has_one = threading.Barrier(2, timeout=PATIENCE)
        runs: list[str] = []
        errors: list[BaseException] = []

        def work(connection: Any, first: str, second: str) -> None:
            is_first_run = first not in runs
            runs.append(first)
            cursor = connection.cursor()
            cursor.execute(increment(first))
            if is_first_run:
                each_has_one.wait()
            try:
                cursor.execute(increment(second))
            except self.module.Error as error:
                errors.append(error)
                raise

        with ThreadPoolExecutor(2) as threads:
            for done in [
                threads.submit(connection.run, work, connection, *order)
                for order in ("ab", "ba")
                for connection in [self._connect()]
            ]:
                done.result(PATIENCE)
        self.assertGreater(len(runs), 2)
        for error in errors:
            self.assertIsInstance(error, TransientError)
            self.assertTrue(self.driver.is_transient(error))
        self.assertEqual(self._ask(f"SELECT number FROM {TABLE}"), [(2,), (2,)])

    def test_what_follows_a_deadlock_is_not_committed(self) -> None:
        self._need_sessions()
        raw = self._open()
        for name in ("a", "b"):
            self.driver.query(raw, f"INSERT INTO {TABLE} VALUES ('{name}', 0)")
        each_has_one = threading.Barrier(2, timeout=PATIENCE)

        def work_on_after_an_error(first: str, second: str) -> int:
            connection = self._connect()
            connection.begin()
            cursor = connection.cursor()
            cursor.execute(increment(first))
            each_has_one.wait()
            errors = 0
            for statement in (increment(second), insert(f"after {first}")):
                try:
                    cursor.execute(statement)
                except self.module.Error:
                    errors += 1
            try:
                connection.commit()
            except self.module.Error:
                errors += 1
                connection.rollback()
            return errors

        with ThreadPoolExecutor(2) as threads:
            done = [threads.submit(work_on_after_an_error, *order) for order in ("ab", "ba")]
            errors = sorted(each.result(PATIENCE) for each in done)
        # The victim's error, the statement after it, and its commit.
        self.assertEqual(errors, [0, 3])
        self.assertEqual(
            self._ask(f"SELECT DISTINCT number FROM {TABLE} WHERE name < 'aa'"), [(1,)]
        )
        self.assertEqual(len(self._names()), 3)

    # Statements and cursors

    def test_query_returns_rows(self) -> None:
        raw = self._open()
        self.assertEqual(self.driver.query(raw, insert("a")), [])
        statement = f"SELECT name, number FROM {TABLE} WHERE name = %s"
        self.assertEqual(list(self.driver.query(raw, statement, ("a",))), [("a", None)])
        self.assertEqual(list(self.driver.query(raw, statement, ("b",))), [])

    def test_parameters_of_query_are_not_read(self) -> None:
        raw = self._open()
        for text in ("a\\b", "it's", 'say "a"', "100 %", "%s", "a\\'; --"):
            with self.subTest(text):
                (row,) = self.driver.query(raw, "SELECT %s", (text,))
                self.assertEqual(tuple(row), (text,))

    def test_query_does_not_use_the_cursor_class_of_the_user(self) -> None:
        raw = self._open()
        self.driver.set_cursor_factory(raw, Forbidden)
        self.assertEqual(list(self.driver.query(raw, "SELECT 1")), [(1,)])

    def test_a_cursor_class(self) -> None:
        raw = self._open()
        self.assertNotIsInstance(self.driver.cursor(raw, None, {}), self.cursor_class)
        self.driver.set_cursor_factory(raw, self.cursor_class)
        for session in (raw, self._open(SessionSettings(cursor_factory=self.cursor_class))):
            self.assertIsInstance(self.driver.cursor(session, None, {}), self.cursor_class)
            self.driver.set_cursor_factory(session, None)
            self.assertNotIsInstance(self.driver.cursor(session, None, {}), self.cursor_class)

    def test_a_statement_that_is_commit(self) -> None:
        self._need_sessions()
        raw = self._open()
        cursor = self.driver.cursor(raw, None, {})
        for statement, expected in [
            (insert("a"), False),
            ("COMMIT", True),
            (f"SELECT name FROM {TABLE}", False),
            ("commit", True),
            ("/* a; comment */ -- and another\n COMMIT", True),
            (f"SELECT name /* COMMIT */ FROM {TABLE}", False),
        ]:
            with self.subTest(statement):
                self._begin(raw)
                cursor.execute(statement)
                self.assertIs(bool(self.driver.is_commit(cursor)), expected)
                # A module may close none whose rows have not been read.
                if cursor.description:
                    cursor.fetchall()
                cursor.close()
                cursor = self.driver.cursor(raw, None, {})
                self.driver.rollback(raw)

    def test_a_statement_that_commits_and_goes_on_says_so(self) -> None:
        self._need_sessions()
        raw, statement = self._open(), "COMMIT AND CHAIN"
        self._begin(raw)
        try:
            self.driver.cursor(raw, None, {}).execute(statement)
        except self.module.Error:
            self.skipTest(f"there is no {statement}")
        told = bool(self.driver.may_chain(statement)) and self.driver.chains(statement)
        self.assertTrue(told or self.driver.has_committed(raw))
        self.driver.rollback(raw)

    def test_a_statement_that_writes_does_not_look_like_reading(self) -> None:
        raw = self._open()
        cursor = self.driver.cursor(raw, None, {})
        cursor.execute(insert("a"))
        self.assertFalse(self.driver.looks_like_reading(cursor))
        if self.driver.has_transaction_ids(raw):
            cursor.execute(f"SELECT name FROM {TABLE}")
            self.assertTrue(self.driver.looks_like_reading(cursor))

    # Session settings

    def test_isolation_levels_have_names_and_constants(self) -> None:
        level = self.driver.isolation_level
        self.assertIsNone(level("DEFAULT"))
        for unknown in ("chaos", object()):
            with self.assertRaises(ValueError):
                level(unknown)
        self.assertIn("SERIALIZABLE", self._levels())
        for name, constant in self._levels().items():
            self.assertEqual(level(constant), constant)
            self.assertEqual(level(name.lower()), constant)

    def _levels(self) -> dict[str, Any]:
        """The levels of SQL that the driver knows, with its constants for them."""
        levels = {}
        for name in ISOLATION_LEVELS:
            try:
                levels[name] = self.driver.isolation_level(name)
            except ValueError:
                continue
        return levels

    def test_a_transaction_has_the_isolation_level(self) -> None:
        if self.isolation_query is None:
            self.skipTest("there is but one isolation level")
        for name, constant in self._levels().items():
            for autocommit in (False, True):
                with self.subTest(name, autocommit=autocommit):
                    settings = SessionSettings(isolation_level=constant, autocommit=autocommit)
                    raw = self._open(settings)
                    self.driver.begin(raw, settings)
                    self.driver.query(raw, f"SELECT name FROM {TABLE}")
                    ((found,),) = self.driver.query(raw, self.isolation_query)
                    self.assertEqual(found.upper().replace("-", " "), name)
                    self.driver.rollback(raw)

    def test_a_read_only_transaction_refuses_to_write(self) -> None:
        settings = SessionSettings(readonly=True)
        raw = self._open(settings)
        self.assertTrue(self.driver.begins_read_only(raw, settings))
        self.driver.begin(raw, settings)
        self.assertEqual(self.driver.query(raw, f"SELECT name FROM {TABLE}"), [])
        self._check_refusal_to_write(raw)
        self.driver.rollback(raw)
        # The next one may write.
        self.assertFalse(self.driver.begins_read_only(raw, SessionSettings(readonly=False)))
        self.driver.begin(raw, SessionSettings(readonly=False))
        self._insert(raw, "a")
        self.driver.commit(raw)
        self.assertEqual(self._names(), ["a"])

    def test_a_read_only_session_in_autocommit_mode_refuses_to_write(self) -> None:
        raw = self._open(SessionSettings(readonly=True, autocommit=True))
        self._check_refusal_to_write(raw)
        self.driver.restore(raw, SessionSettings(readonly=False, autocommit=True), {})
        self._insert(raw, "a")
        self.assertEqual(self._names(), ["a"])

    def test_the_modes_of_autocommit_mode_end_with_it(self) -> None:
        connection = self._connect()
        connection.set_session("SERIALIZABLE", readonly=True, autocommit=True)
        with self._error():
            self._insert(connection.driver_connection, "a")
        connection.autocommit = False
        connection.readonly, connection.isolation_level = None, "DEFAULT"
        with connection.transaction():
            self._insert(connection.driver_connection, "a")
        connection.autocommit = True
        self._insert(connection.driver_connection, "b")
        self.assertEqual(self._names(), ["a", "b"])

    def _check_refusal_to_write(self, raw: Any) -> None:
        with self._error() as errors:
            self._insert(raw, "a")
        self.assertIs(self.driver.condition(errors[0]), Condition.READ_ONLY_TRANSACTION)
        self.assertIs(self.driver.meaning(errors[0], raw), Meaning.USER)
        self.assertFalse(self.driver.is_refused_by_standby(errors[0], raw))

    def test_a_deferrable_transaction_begins(self) -> None:
        settings = SessionSettings(
            isolation_level=self.driver.isolation_level("SERIALIZABLE"),
            readonly=True,
            deferrable=True,
        )
        raw = self._open(settings)
        self.driver.begin(raw, settings)
        self.assertTrue(self.driver.in_transaction(raw))
        self.driver.rollback(raw)

    def test_an_encoding(self) -> None:
        if self.client_encoding is None:
            self.skipTest("there is but one encoding")
        changed = self._open()
        self.driver.set_client_encoding(changed, self.client_encoding)
        for raw in (changed, self._open(SessionSettings(client_encoding=self.client_encoding))):
            ((encoding,),) = self.driver.query(raw, self.encoding_query)
            self.assertEqual(encoding.lower(), self.client_encoding.lower())

    # Errors

    def test_an_error_of_the_users(self) -> None:
        raw = self._open()
        self._insert(raw, "a")
        for statement in (WRONG_STATEMENT, insert("a"), "SELEKT"):
            with self.subTest(statement):
                with self._error() as errors:
                    self.driver.query(raw, statement)
                self.assertIs(self.driver.meaning(errors[0], raw), Meaning.USER)
                self.assertFalse(self.driver.is_transient(errors[0]))
                self.assertFalse(self.driver.is_refused_by_standby(errors[0], raw))
        self.assertEqual(list(self.driver.query(raw, "SELECT 1")), [(1,)])
        self.assertFalse(self.driver.is_transient(ValueError("not of the module")))

    def test_conditions(self) -> None:
        raw = self._open()
        for statement, condition in [
            (WRONG_STATEMENT, Condition.UNDEFINED_TABLE),
            (f"CREATE TABLE {TABLE} (name integer)", Condition.ALREADY_EXISTS),
            ("SELEKT", None),
        ]:
            with self.subTest(statement):
                with self._error() as errors:
                    self.driver.query(raw, statement)
                self.assertIs(self.driver.condition(errors[0]), condition)

    def test_a_lock_that_is_not_given_in_time(self) -> None:
        self._need_sessions()
        raw, other = self._open(), self._open()
        self._insert(raw, "a")
        self._begin(raw)
        self.driver.query(raw, increment("a"))
        self._begin(other)
        before = self.driver.limit_lock_waits(other, 1.0)
        statement = f"SELECT name FROM {TABLE} WHERE name = 'a' FOR UPDATE"
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(self.driver.query, other, statement)
            try:
                error = waiting.exception(PATIENCE)
            finally:
                # Gives the lock to who still waits for it.
                self.driver.rollback(raw)
        self.assertIsInstance(error, self.module.Error)
        self.assertIs(self.driver.condition(error), Condition.LOCK_NOT_AVAILABLE)
        self.driver.rollback(other)
        if before is not None:
            self.assertNotEqual(self.driver.limit_lock_waits(other, before), before)
            self.assertEqual(self.driver.limit_lock_waits(other, before), before)

    def test_the_full_name_of_a_table(self) -> None:
        raw = self._open()
        full_name = self.driver.full_name(raw, TABLE)
        self._insert(raw, "a")
        self.assertEqual(list(self.driver.query(raw, f"SELECT name FROM {full_name}")), [("a",)])
        self.assertEqual(self.driver.full_name(raw, full_name), full_name)

    # Losing a session

    def test_a_session_that_is_lost_inside_a_transaction(self) -> None:
        for way, lose in self._ways_to_lose().items():
            with self.subTest(way):
                raw = self._open()
                self._begin(raw)
                lose(raw)
                with self._error() as errors:
                    self._insert(raw, "a")
                self.assertIs(self.driver.meaning(errors[0], raw), Meaning.DISCONNECT)
                self.assertFalse(self.driver.is_transient(errors[0]))
                self.driver.close(raw)
        self.assertEqual(self._names(), [])

    def test_a_session_that_is_lost_while_idle(self) -> None:
        for way, lose in self._ways_to_lose().items():
            with self.subTest(way):
                raw = self._open()
                lose(raw)
                with self._error() as errors:
                    self._begin(raw)
                self.assertIs(self.driver.meaning(errors[0], raw), Meaning.DISCONNECT)
                self.driver.close(raw)

    def test_a_session_that_is_lost_before_commit_or_rollback(self) -> None:
        for way, lose in self._ways_to_lose().items():
            for end in (self.driver.commit, self.driver.rollback):
                with self.subTest(way, end=end):
                    raw = self._open()
                    self._begin(raw)
                    self._insert(raw, "a")
                    lose(raw)
                    with self._error() as errors:
                        end(raw)
                    self.assertIs(self.driver.meaning(errors[0], raw), Meaning.DISCONNECT)
        self.assertEqual(self._names(), [])

    def test_the_connection_reconnects(self) -> None:
        for way, lose in self._ways_to_lose().items():
            with self.subTest(way):
                connection = self._connect()
                connection.begin()
                connection.commit()
                lose(connection.driver_connection)
                connection.begin()
                cursor = connection.cursor()
                cursor.execute(insert("a"))
                lose(connection.driver_connection)
                with self.assertRaises(self.driver.disconnection_error):
                    cursor.execute(insert("b"))
                self.assertEqual(connection.state, DOOMED)
                connection.rollback()
                with connection.transaction() as cursor:
                    cursor.execute(insert(way))
        self.assertCountEqual(self._names(), self._ways_to_lose())

    def test_what_the_program_has_committed_itself_is_not_to_be_done_again(self) -> None:
        for way, lose in self._ways_to_lose().items():
            with self.subTest(way):
                connection = self._connect()
                connection.begin()
                cursor = connection.cursor()
                cursor.execute(insert(way))
                cursor.execute("COMMIT")
                lose(connection.driver_connection)
                self._see_no_retry(lambda: cursor.execute(insert("more")))  # noqa: B023
                connection.rollback()
        self.assertCountEqual(self._names(), self._ways_to_lose())

    def test_work_that_commits_and_begins_by_itself_is_not_run_again(self) -> None:
        for way, lose in self._ways_to_lose().items():
            with self.subTest(way):
                self._see_one_run(way, lose)
        self.assertCountEqual(self._names(), self._ways_to_lose())

    def _see_one_run(self, name: str, lose: Callable[[Any], object]) -> None:
        connection, runs = self._connect(), []

        def work() -> None:
            runs.append(name)
            cursor = connection.cursor()
            for statement in (insert(name), "COMMIT", "BEGIN", insert("more")):
                cursor.execute(statement)
            lose(connection.driver_connection)
            cursor.execute(insert("yet more"))

        self._see_no_retry(lambda: connection.run(work))
        connection.rollback()
        self.assertEqual(len(runs), 1, "transaction_flag() has not told of the work's own COMMIT")

    def test_what_a_definition_has_committed_is_not_to_be_done_again(self) -> None:
        ((_, lose), *_) = self._ways_to_lose().items()
        connection = self._connect()
        connection.begin()
        cursor = connection.cursor()
        cursor.execute(insert("a"))
        cursor.execute(f"CREATE TABLE {LEDGER} (name varchar(40))")
        if not self._names():
            connection.rollback()
            self.skipTest("definitions are a part of the transaction")
        lose(connection.driver_connection)
        self._see_no_retry(lambda: cursor.execute(insert("b")))
        connection.rollback()

    def _see_no_retry(self, function: Callable[[], object]) -> None:
        with self.assertRaises((self.module.Error, CommitOutcomeUnknown)) as raised:
            function()
        self.assertNotIsInstance(raised.exception, (Retry, TransientError))

    def test_close_raises_nothing(self) -> None:
        raw = self._open()
        self.driver.close(raw)
        self.driver.close(raw)
        if self.driver.has_sessions:
            for lose in self._ways_to_lose().values():
                raw = self._open()
                lose(raw)
                self.driver.close(raw)

    def test_abandon_raises_nothing(self) -> None:
        closed = self._open()
        self.driver.close(closed)
        self._in_child(lambda: self.driver.abandon(closed))
        if self.driver.has_sessions:
            for lose in self._ways_to_lose().values():
                raw = self._open()
                lose(raw)
                self._in_child(lambda raw=raw: self.driver.abandon(raw))  # type: ignore[misc]

    def test_abandon_leaves_the_session_to_the_parent(self) -> None:
        raw = self._open()
        self._begin(raw)
        self._insert(raw, "a")
        self._in_child(lambda: self.driver.abandon(raw))
        self._insert(raw, "b")
        self.driver.commit(raw)
        self.assertEqual(self._names(), ["a", "b"])

    def test_a_forked_child_connects_for_itself(self) -> None:
        connection = self._connect()
        with connection.transaction() as cursor:
            cursor.execute(insert("a"))
        session = connection.driver_connection

        def work() -> None:
            with connection.transaction() as cursor:
                cursor.execute(insert("b"))
            connection.close()

        self._in_child(work)
        with connection.transaction() as cursor:
            cursor.execute(insert("c"))
        self.assertIs(connection.driver_connection, session)
        self.assertEqual(self._names(), ["a", "b", "c"])

    def _in_child(self, function: Callable[[], object]) -> None:
        """Call the function in a forked process, and see that it raises nothing there."""
        with warnings.catch_warnings():
            # Python warns of forks beside other threads, which no child needs.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                function()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        deadline = time.monotonic() + PATIENCE
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
                self.fail(f"the forked process did not end within {PATIENCE} seconds")
            time.sleep(POLL_INTERVAL)
        self.assertEqual(os.waitstatus_to_exitcode(ended[1]), 0)

    def test_a_silent_server_is_noticed(self) -> None:
        line = self._line()
        connection = self._connect(response_timeout=2.0)
        connection.begin()
        self.assertIsInstance(self.driver.fileno(connection.driver_connection), int)
        line.silence()
        with self.assertRaises(self.driver.disconnection_error):
            connection.cursor().execute(insert("a"))
        line.resume()
        connection.rollback()
        with connection.transaction() as cursor:
            cursor.execute(insert("b"))
        self.assertEqual(self._names(), ["b"])

    def test_an_interrupted_session_is_not_at_rest(self) -> None:
        line, raw = self._line(), self._open()
        if threading.current_thread() is not threading.main_thread():
            self.skipTest("only the main thread can be interrupted")
        is_silent, was_silent = True, []
        # A lock, because CPython 3.11 never comes back from a Python function that another thread
        # calls, if it is traced, while a signal waits for the main thread.
        unmet, mine = threading.Lock(), threading.get_ident()
        unmet.acquire()

        def interrupt(number: int, frame: object) -> None:
            was_silent.append(is_silent)
            unmet.release()
            raise Interrupted

        def disturb() -> None:
            nonlocal is_silent
            deadline = time.monotonic() + PATIENCE
            while line.count().bytes_to_server == before and time.monotonic() < deadline:
                time.sleep(POLL_INTERVAL)
            signal.pthread_kill(mine, signal.SIGUSR1)
            # A module in C may hear of it only with the answer.
            unmet.acquire(timeout=1.0)
            is_silent = False
            line.resume()

        self._begin(raw)
        line.silence("to_client")
        before = line.count().bytes_to_server
        self.addCleanup(signal.signal, signal.SIGUSR1, signal.signal(signal.SIGUSR1, interrupt))
        with ThreadPoolExecutor(1) as threads:
            disturbing = threads.submit(disturb)
            with self.assertRaises(Interrupted):
                self._insert(raw, "a")
                disturbing.result(PATIENCE)
            disturbing.result(PATIENCE)
        if was_silent == [True]:
            self.assertFalse(self.driver.is_at_rest(raw))
        self.driver.close(raw)
        self.assertEqual(self._names(), [])

    def test_without_sessions_there_is_nothing_to_watch(self) -> None:
        if self.driver.has_sessions:
            self.skipTest("there are sessions")
        self.assertIsNone(self.driver.fileno(self._open()))

    # The outcome of a lost COMMIT

    def test_a_session_is_fenced(self) -> None:
        self._need_sessions()
        raw, other = self._open(), self._open()
        self._insert(raw, "a")
        self._begin(raw, self._update("a", 1))
        evidence = Evidence(began=time.monotonic())
        session = self.driver.identify(raw)
        self.assertFalse(session.is_standby)
        self.assertFalse(session.is_pooled)
        self.assertTrue(self.driver.end_session(other, session, evidence))
        deadline = time.monotonic() + PATIENCE
        while self.driver.end_session(other, session, evidence):
            self.assertLess(time.monotonic(), deadline, "the session does not end")
            time.sleep(POLL_INTERVAL)
        self.driver.query(other, increment("a"))
        with self._error() as errors:
            self.driver.commit(raw)
        self.assertIs(self.driver.meaning(errors[0], raw), Meaning.DISCONNECT)

    def test_no_other_session_is_fenced(self) -> None:
        self._need_sessions()
        raw, other = self._open(), self._open()
        self._begin(raw)
        self._begin(other)
        evidence = Evidence(began=time.monotonic())
        # Of the number that it has itself, and of one that the server has given to somebody else.
        mine, ended = self.driver.identify(raw), self._open()
        session = self.driver.identify(ended)
        self.driver.close(ended)
        for each in (mine, replace(session, pid=self.driver.identify(other).pid)):
            self.assertFalse(self.driver.end_session(raw, each, evidence))
        for each in (raw, other):
            self.driver.commit(each)

    def test_the_life_of_a_ledger(self) -> None:
        self._need_sessions()
        connection = self._connect(witness=Ledger(LEDGER))
        numbers = f"SELECT number FROM {LEDGER}"
        with connection.transaction() as cursor:
            cursor.execute(insert("a"))
        self.assertEqual(self._ask(numbers), [(1,)])
        with connection.transaction() as cursor:
            cursor.execute(insert("b"))
        self.assertEqual(self._ask(numbers), [(2,)])
        self._ask(f"DELETE FROM {LEDGER}")
        with connection.transaction() as cursor:
            cursor.execute(insert("c"))
        self.assertEqual(len(self._ask(numbers)), 1)
        connection.close()
        self.assertEqual(self._ask(numbers), [])
        self.assertEqual(self._names(), ["a", "b", "c"])

    def test_the_ledger_knows_a_transaction_that_was_not_committed(self) -> None:
        for way, lose in self._ways_to_lose().items():
            with self.subTest(way):
                connection = self._connect(witness=Ledger(LEDGER))
                connection.begin()
                connection.cursor().execute(insert("a"))
                lose(connection.driver_connection)
                with self.assertRaises(self.driver.disconnection_error):
                    connection.commit()
                connection.rollback()
        self.assertEqual(self._names(), [])

    def test_the_ledger_knows_a_transaction_whose_commit_had_no_answer(self) -> None:
        line = self._line()
        for reset in (False, True):
            with self.subTest(reset=reset):
                connection = self._connect(witness=Ledger(LEDGER))
                connection.begin()
                connection.cursor().execute(insert(f"arrived {reset}"))
                line.cut("to_client", 0, reset)
                connection.commit()
                self.assertEqual(connection.state, IDLE)
                connection.begin()
                connection.cursor().execute(insert(f"not arrived {reset}"))
                line.cut("to_server", 0, reset)
                with self.assertRaises(self.driver.disconnection_error):
                    connection.commit()
                connection.rollback()
        self.assertEqual(self._names(), ["arrived False", "arrived True"])

    def test_transaction_ids_if_there_are_any(self) -> None:
        line, committed = self._line(), []
        for at_commit in (False, True):
            for direction in ("to_client", "to_server"):
                name = f"{direction} {at_commit}"
                connection = self._connect(witness=XidWitness(at_commit))
                connection.begin()
                connection.cursor().execute(insert(name))
                has_ids = self.driver.has_transaction_ids(connection.driver_connection)
                if not at_commit:
                    line.cut(direction, 0)
                    arrives = direction == "to_client"
                else:
                    # The id is asked for before.
                    arrives = True
                    line.cut_at_commit()
                if arrives:
                    committed.append(name)
                if has_ids and arrives:
                    connection.commit()
                    continue
                error = self.driver.disconnection_error if has_ids else CommitOutcomeUnknown
                with self.assertRaises(error):
                    connection.commit()
                connection.rollback()
        self.assertCountEqual(self._names(), committed)

    def test_the_history_is_told_as_the_server_tells_it(self) -> None:
        self._need_sessions()
        raw = self._open()
        if not self.driver.has_transaction_ids(raw):
            self.skipTest("there are no transaction ids")
        history = self.driver.identify(raw).history
        self.assertIsInstance(history, History, "identify() gives no history, or not as a History")
        ((told,),) = self.driver.query(raw, f"SELECT {TOLD}")
        for name, value in asdict(History(*told.split())).items():
            found = getattr(history, name)
            self.assertEqual(
                found,
                value,
                f"{name} of the History that identify() gives is {found!r}, and {value!r} is what "
                "the server is asked to compare it with",
            )
        self.assertEqual(self.driver.identify(self._open()).history, history)

    # Two phases

    def _need_two_phases(self) -> None:
        if not self.driver.supports_two_phase:
            self.skipTest(f"{self.driver_name} has no two-phase commit")
        ((limit,),) = self._ask("SHOW max_prepared_transactions")
        if int(limit) == 0:
            self.skipTest("the server's max_prepared_transactions is 0")

    def _prepare(self, name: str) -> str:
        """Prepare a transaction that has written a row; returns what it is called."""
        gid = f"conformance's {uuid.uuid4()}"
        raw = self._open()
        self._begin(raw)
        self._insert(raw, name)
        self.driver.prepare_transaction(raw, gid)
        self.addCleanup(self._end_if_prepared, gid)
        self.assertFalse(self.driver.in_transaction(raw))
        self.driver.close(raw)
        return gid

    def _end_if_prepared(self, gid: str) -> None:
        raw = self._open()
        if is_prepared(self.driver, raw, gid):
            end_branch(self.driver, raw, gid, Outcome.ABORTED)

    def test_what_is_prepared_is_ended_by_another_session(self) -> None:
        self._need_two_phases()
        raw = self._open()
        for outcome, names in ((Outcome.ABORTED, []), (Outcome.COMMITTED, ["a"])):
            with self.subTest(outcome):
                gid = self._prepare("a")
                self.assertTrue(is_prepared(self.driver, raw, gid))
                self.assertEqual(self._names(), [])
                end_branch(self.driver, raw, gid, outcome)
                self.assertFalse(is_prepared(self.driver, raw, gid))
                self.assertEqual(self._names(), names)

    def test_a_failed_transaction_is_not_prepared(self) -> None:
        self._need_two_phases()
        connection = self._connect(two_phase=True)
        self.addCleanup(transaction.abort)
        connection.cursor().execute(insert("a"))
        with self.assertRaises(self.module.Error):
            connection.cursor().execute(WRONG_STATEMENT)
        with self.assertRaises(self.module.Error):
            transaction.commit()
        transaction.abort()
        self.assertEqual(self._names(), [])

    def test_the_conditions_of_what_is_not_prepared(self) -> None:
        self._need_two_phases()
        raw = self._open()
        for outcome in (Outcome.ABORTED, Outcome.COMMITTED):
            with self._error() as errors:
                end_branch(self.driver, raw, "nothing", outcome)
            self.assertIs(self.driver.condition(errors[0]), Condition.UNDEFINED_OBJECT)
            self.assertIs(self.driver.meaning(errors[0], raw), Meaning.USER)
        # As is told of what another session is about to end, which no test can have it do.
        self.driver.query(raw, "CREATE TEMPORARY SEQUENCE conformance_sequence")
        with self._error() as errors:
            self.driver.query(raw, "SELECT currval('conformance_sequence')")
        self.assertIs(self.driver.condition(errors[0]), Condition.OBJECT_NOT_IN_PREREQUISITE_STATE)

    def test_two_phases_whose_last_answer_is_lost(self) -> None:
        self._need_two_phases()
        line = self._line()
        for reset in (False, True):
            with self.subTest(reset=reset):
                connection = self._connect(two_phase=True)
                self.addCleanup(transaction.abort)
                connection.cursor().execute(insert(f"lost {reset}"))
                cut = line.cut_at_commit(reset)
                transaction.commit()
                self.assertTrue(cut.wait(PATIENCE))
                self.assertEqual(connection.state, IDLE)
        self.assertEqual(self._names(), ["lost False", "lost True"])

    def test_an_id_that_is_asked_for_at_commit(self) -> None:
        self._need_sessions()
        connection = self._connect(witness=XidWitness(at_commit=True))
        with connection.transaction() as cursor:
            cursor.execute(insert("a"))
        for end in ("", " FOR UPDATE"):
            # What looks as if it only read may have an id all the same.
            with connection.transaction() as cursor:
                cursor.execute(f"SELECT name FROM {TABLE}{end}")
                self.assertEqual(len(cursor.fetchall()), 1)
        self.assertEqual(connection.state, IDLE)

    def test_no_witness_is_needed_without_sessions(self) -> None:
        if self.driver.has_sessions:
            self.skipTest("there are sessions")
        for number, witness in enumerate(("xid", Ledger(LEDGER), None)):
            with self._connect(witness=witness).transaction() as cursor:
                cursor.execute(insert(str(number)))
        self.assertEqual(self._names(), ["0", "1", "2"])
        with self._error() as errors:
            self._ask(f"SELECT number FROM {LEDGER}")
        self.assertIs(self.driver.condition(errors[0]), Condition.UNDEFINED_TABLE)


class Interrupted(BaseException):
    """What a signal's handler raises."""


class Impostor(socketserver.ThreadingTCPServer):
    """Listens in the place of a forwarder that refuses, and answers whatever it hears the same."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, line: PortForward, answer: bytes) -> None:
        super().__init__((line.host, line.port), Hearing)
        self.answer = answer
        self._thread = threading.Thread(target=self.serve_forever, args=(POLL_INTERVAL,))

    def __enter__(self) -> Impostor:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class Hearing(socketserver.BaseRequestHandler):
    """One connection to an `Impostor`."""

    server: Impostor

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.request.settimeout(PATIENCE)
            self.request.sendall(self.server.answer)
            self.request.shutdown(socket.SHUT_WR)
            # Closed with something unread, it would be reset, and the answer perhaps not be read.
            while self.request.recv(4096):
                pass


class Forbidden:
    """A cursor class that cannot be used."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        raise AssertionError("a statement of zreconnect's own goes through the user's cursor class")


def insert(name: str) -> str:
    """A statement that writes a row."""
    return f"INSERT INTO {TABLE} (name) VALUES ('{name}')"


def increment(name: str) -> str:
    """A statement that locks a row."""
    return f"UPDATE {TABLE} SET number = number + 1 WHERE name = '{name}'"
