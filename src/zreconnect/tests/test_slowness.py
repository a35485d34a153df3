"""What takes long while the server is there, as opposed to a server that went silent in it."""

import contextlib
import gc
import io
import os
import socket
import weakref
from concurrent.futures import ThreadPoolExecutor

import psycopg
import psycopg2
import zope.event

from zreconnect import DisconnectionError
from zreconnect.events import ConnectionLost
from zreconnect.tests.base import (
    DatabaseTestCase,
    LineTestCase,
    needs_mysqlclient,
    on_mariadb,
    wait_until,
)
from zreconnect.tests.test_mysql import MysqlTestCase
from zreconnect.tests.test_watchdog import RESPONSE_TIMEOUT, counts_of, watchdogs_time

# What is sent or received, in bytes, and how many of them a second.
SIZE = 4_000_000
RATE = 4_000_000
# Less than BEGIN may take, in seconds.
STEP = 5
# What programs raise that is not to be taken for anything else.
CAUSES = (TimeoutError, KeyboardInterrupt, SystemExit)


class SlownessTestCase:
    def setUp(self):
        super().setUp()
        self.time = watchdogs_time(self)
        self.addCleanup(self.forward.resume)
        self.addCleanup(self.forward.throttle, None)
        zope.event.subscribers.append(self.speak_again)
        self.addCleanup(zope.event.subscribers.remove, self.speak_again)
        self.query(f"CREATE TABLE {self.schema}blob_of_text (content {self.long_text})")
        self.connection = self.connect(response_timeout=RESPONSE_TIMEOUT)
        self.connection.run(lambda: None)
        self.watch = self.connection.work.link.session.watch
        number = self.connection.work.link.driver.fileno(self.connection.driver_connection)
        self.line = self.enterContext(socket.socket(fileno=os.dup(number)))

    def speak_again(self, event):
        if isinstance(event, ConnectionLost):
            self.time.hurries = False
            self.forward.resume()

    def has_moved(self, request):
        before = counts_of(self.line)
        wait_until(lambda: request.done() or counts_of(self.line) != before)
        return not request.done()

    def over_a_slow_line(self, function):
        """What the function, which has the connection, returns when it takes very long."""
        self.forward.throttle(RATE)
        seconds = 0
        with ThreadPoolExecutor(1) as threads:
            request = threads.submit(function)
            while self.has_moved(request):
                self.watch.look()
                self.time.go_on(STEP)
                seconds += STEP
        self.assertGreater(seconds, 2 * RESPONSE_TIMEOUT)
        return request.result()

    def assertNoticed(self, direction, function):
        """A silence in the middle of what the function does is noticed."""
        self.forward.throttle(RATE)
        with ThreadPoolExecutor(1) as threads:
            request = threads.submit(function)
            for _ in range(3):
                self.assertTrue(self.has_moved(request))
            self.forward.silence(direction)
            self.time.hurries = True
            with self.assertRaises(DisconnectionError):
                request.result()
        self.assertEqual(self.connection.state, "idle")

    def take_long(self):
        """The program itself takes long, inside a request."""
        self.time.go_on(2 * RESPONSE_TIMEOUT)
        self.watch.look()
        self.assertIsNone(self.watch.cut_after)


class SlownessTests(SlownessTestCase):
    """For each driver: schema, long_text."""

    def send(self):
        with self.connection as connection:
            connection.cursor().execute("INSERT INTO blob_of_text VALUES (%s)", ("x" * SIZE,))

    def receive(self):
        with self.connection as connection, connection.cursor() as cursor:
            cursor.execute(f"SELECT repeat('x', {SIZE})")
            return len(cursor.fetchone()[0])

    def sizes(self):
        return self.query(f"SELECT length(content) FROM {self.schema}blob_of_text")

    def test_a_first_statement_that_is_long_to_send(self):
        self.over_a_slow_line(self.send)
        self.assertEqual([tuple(row) for row in self.sizes()], [(SIZE,)])

    def test_a_result_that_keeps_coming(self):
        self.assertEqual(self.over_a_slow_line(self.receive), SIZE)

    def test_a_silence_while_a_statement_is_sent(self):
        self.assertNoticed("to_server", self.send)

    def test_a_silence_in_a_result(self):
        self.assertNoticed("to_client", self.receive)

    def test_parameters_that_come_slowly(self):
        class Parameters:
            def __iter__(parameters):
                for number in range(3):
                    self.watch.look()
                    self.take_long()
                    yield (str(number),)

        with self.connection as connection:
            for parameters in (Parameters(), iter(Parameters())):
                connection.cursor().executemany("INSERT INTO blob_of_text VALUES (%s)", parameters)
        self.assertEqual([tuple(row) for row in self.sizes()], [(1,)] * 6)

    def test_parameters_that_fail(self):
        for cause in CAUSES:
            error = cause("the program's own")

            def parameters(error=error):
                yield ("one",)
                raise error

            with self.assertRaises(cause) as raised, self.connection as connection:
                connection.cursor().executemany(
                    "INSERT INTO blob_of_text VALUES (%s)", parameters()
                )
            self.assertIs(raised.exception, error)
        self.assertEqual(self.sizes(), [])


class PostgresqlTests(SlownessTests):
    schema = ""
    long_text = "text"
    rows = "SELECT repeat('x', 1000) FROM generate_series(1, 4000)"

    def send_copy(self):
        self.copy_from(io.StringIO("x\n" * (SIZE // 2)))

    def copy_from(self, file):
        with self.connection as connection, connection.cursor() as cursor:
            cursor.copy_expert("COPY blob_of_text FROM STDIN", file)

    def receive_copy(self):
        file = io.StringIO()
        self.copy_to(file)
        return len(file.getvalue())

    def copy_to(self, file):
        with self.connection as connection, connection.cursor() as cursor:
            cursor.copy_expert(f"COPY ({self.rows}) TO STDOUT", file)

    def test_a_copy_that_is_long_to_send(self):
        self.over_a_slow_line(self.send_copy)
        self.assertEqual(self.query("SELECT count(*) FROM blob_of_text"), [(SIZE // 2,)])

    def test_a_copy_that_keeps_coming(self):
        self.assertEqual(self.over_a_slow_line(self.receive_copy), 4000 * 1001)

    def test_a_silence_while_a_copy_is_sent(self):
        self.assertNoticed("to_server", self.send_copy)

    def test_a_silence_while_a_copy_comes(self):
        self.assertNoticed("to_client", self.receive_copy)


class SlowFile:
    """One whose program takes long."""

    def __init__(self, take_long):
        self._take_long = take_long
        self.lines = ["one\n", "two\n", "three\n"]
        self.encoding = "utf-8"

    def read(self, size):
        self._take_long()
        return self.lines.pop(0) if self.lines else ""

    def readline(self):
        raise AssertionError("psycopg2 has never called it")

    def write(self, data):
        self._take_long()
        self.lines.append(data)


class FailingFile(SlowFile):
    def __init__(self, error):
        super().__init__(self._fail)
        self._error = error

    def _fail(self):
        raise self._error


class InterruptedFile(io.StringIO):
    def read(self, size):
        raise KeyboardInterrupt


class Psycopg2Tests(PostgresqlTests, DatabaseTestCase):
    def test_a_file_that_is_slow_to_read(self):
        with self.connection as connection:
            connection.cursor().copy_expert(
                "COPY blob_of_text FROM STDIN", SlowFile(self.take_long)
            )
            connection.cursor().copy_from(SlowFile(self.take_long), "blob_of_text")
        self.assertEqual(self.query("SELECT count(*) FROM blob_of_text"), [(6,)])

    def test_a_file_that_is_slow_to_write(self):
        self.query("INSERT INTO blob_of_text VALUES ('four')")
        file = SlowFile(self.take_long)
        with self.connection as connection:
            connection.cursor().copy_expert("COPY blob_of_text TO STDOUT", file)
            connection.cursor().copy_to(file, "blob_of_text")
        self.assertEqual(file.lines[3:], [b"four\n", b"four\n"])

    def test_files_of_text_and_of_bytes(self):
        self.query("INSERT INTO blob_of_text VALUES ('four')")
        for file, content in ((io.StringIO(), "four\n"), (io.BytesIO(), b"four\n")):
            with self.connection as connection:
                connection.cursor().copy_expert("COPY blob_of_text TO STDOUT", file)
            self.assertEqual(file.getvalue(), content)

    def test_what_a_file_raises(self):
        """psycopg2 itself has the server raise an error in the place of what read() raises."""
        for copy in (self.copy_from, self.copy_to):
            for cause in CAUSES:
                error = cause("the program's own")
                with self.assertRaises(cause) as raised:
                    copy(FailingFile(error))
                self.assertIs(raised.exception, error)
                self.assertEqual(self.connection.state, "idle")

    def test_what_a_file_raises_when_the_session_is_lost(self):
        for cause in CAUSES:
            error = cause("the program's own")

            def lose(error=error):
                self.forward.drop()
                raise error

            for copy in (self.copy_from, self.copy_to):
                with self.assertRaises(cause) as raised:
                    copy(SlowFile(lose))
                self.assertIs(raised.exception, error)
                self.assertEqual(self.connection.state, "idle")

    def test_an_error_of_the_servers(self):
        with self.assertRaises(psycopg2.DataError), self.connection as connection:
            connection.cursor().copy_expert(
                "COPY blob_of_text FROM STDIN", io.StringIO("one\ttwo\n")
            )

    def test_a_cursor_class_that_looks_at_the_file(self):
        seen = []

        class Looking(psycopg2.extensions.cursor):
            def copy_expert(self, sql, file, size):
                seen.extend((file.encoding, isinstance(file, SlowFile)))
                super().copy_expert(sql, file, size)

        with self.connection as connection:
            connection.cursor(cursor_factory=Looking).copy_expert(
                "COPY blob_of_text FROM STDIN", SlowFile(self.take_long)
            )
        self.assertEqual(seen, ["utf-8", True])

    def test_no_file(self):
        with self.assertRaises(TypeError), self.connection as connection:
            connection.cursor().copy_expert("COPY blob_of_text FROM STDIN", None)

    def test_no_file_is_kept(self):
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        for kind in (InterruptedFile, io.StringIO):
            file = kind()
            reference = weakref.ref(file)
            with contextlib.suppress(KeyboardInterrupt):
                self.copy_from(file)
            del file
            self.assertIsNone(reference())


class PsycopgTests(PostgresqlTests, DatabaseTestCase):
    driver = "psycopg"
    module = psycopg

    def copy_from(self, file):
        with (
            self.connection as connection,
            connection.cursor() as cursor,
            cursor.copy("COPY blob_of_text FROM STDIN") as copy,
        ):
            while data := file.read(8192):
                copy.write(data)

    def copy_to(self, file):
        with (
            self.connection as connection,
            connection.cursor() as cursor,
            cursor.copy(f"COPY ({self.rows}) TO STDOUT") as copy,
        ):
            for data in copy:
                file.write(bytes(data).decode())

    def test_a_program_that_is_slow_to_copy(self):
        self.copy_from(SlowFile(self.take_long))
        self.assertEqual(self.query("SELECT count(*) FROM blob_of_text"), [(3,)])
        self.copy_to(SlowFile(self.take_long))

    def test_what_is_raised_while_copying(self):
        for copy in (self.copy_from, self.copy_to):
            for cause in CAUSES:
                error = cause("the program's own")
                for file in (FailingFile(error), self.losing(error)):
                    with self.assertRaises(cause) as raised:
                        copy(file)
                    self.assertIs(raised.exception, error)
                    self.assertEqual(self.connection.state, "idle")

    def losing(self, error):
        def lose():
            self.forward.drop()
            raise error

        return SlowFile(lose)


class MysqlTests(SlownessTests):
    schema = "test."
    long_text = "longtext"


@on_mariadb()
class PymysqlTests(MysqlTests, MysqlTestCase, LineTestCase):
    driver_name = "pymysql"


@on_mariadb()
@needs_mysqlclient
class MysqlclientTests(MysqlTests, MysqlTestCase, LineTestCase):
    driver_name = "mysqlclient"
