"""Servers that go silent."""

import gc
import io
import os
import threading
import time
import weakref
from unittest import mock

import zope.event

import zreconnect
from zreconnect import DisconnectionError, Ledger, ReconnectTimeout, RetryPolicy, watchdog
from zreconnect.events import CommitLookedUp, ConnectionAttemptFailed, ConnectionLost
from zreconnect.tests.base import DatabaseTestCase, policy_of, wait_until

# Seconds. No answer takes that long on the busiest machine.
RESPONSE_TIMEOUT = 60


class WatchdogsTime:
    """Stands for the module time in the watchdog, so that a long limit is soon reached.

    hurries: whether time flies.
    """

    sleep = staticmethod(time.sleep)

    def __init__(self):
        self.hurries = False
        self._ahead = 0.0
        self._last = time.monotonic()

    def monotonic(self):
        last, self._last = self._last, time.monotonic()
        if self.hurries:
            self.go_on(1000 * (self._last - last))
        return self._last + self._ahead

    def go_on(self, seconds):
        self._ahead += seconds


def watchdogs_time(test_case):
    """Have a `WatchdogsTime` during the test."""
    patch = mock.patch.object(watchdog, "time", WatchdogsTime())
    test_case.addCleanup(patch.stop)
    return patch.start()


class SilenceTests(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()
        self.time = watchdogs_time(self)
        self.connection = self.connect(response_timeout=RESPONSE_TIMEOUT)
        self.cursor = self.connection.cursor()
        self.addCleanup(self.forward.resume)
        zope.event.subscribers.append(self.speak_again)
        self.addCleanup(zope.event.subscribers.remove, self.speak_again)

    def fall_silent(self):
        """Let no answer come, and all limits pass, until a session is lost."""
        self.forward.silence("to_client")
        self.time.hurries = True

    def speak_again(self, event):
        if self.time.hurries and isinstance(event, (ConnectionLost, ConnectionAttemptFailed)):
            self.time.hurries = False
            self.forward.resume()

    def test_a_statement_without_an_answer_is_a_disconnect(self):
        self.cursor.execute("SELECT 1")
        self.fall_silent()
        with (
            self.assertLogs("zreconnect", "WARNING") as logs,
            self.assertRaises(DisconnectionError),
        ):
            self.cursor.execute("SELECT 2")
        self.assertIn("within 60.0 seconds: the connection is cut", logs.output[0])
        self.assertIn(self.connection.server, logs.output[0])
        self.connection.rollback()
        self.cursor.execute("SELECT 3")
        self.assertEqual(self.cursor.fetchone(), (3,))

    def test_a_stopped_server_process_is_ended_before_the_work_runs_again(self):
        calls = []

        def work():
            self.cursor.execute("INSERT INTO item VALUES ('one')")
            calls.append(self.connection.info.backend_pid)
            if len(calls) == 1:
                self.server.suspend_backend(calls[0])
                resuming.start()
                self.time.hurries = True
                self.cursor.execute("SELECT 1")

        def resume():
            wait_until(lambda: len(self.sessions()) == 2)
            # SIGTERM waits for a stopped process too.
            self.server.resume_backend(calls[0])

        resuming = threading.Thread(target=resume)
        self.connection.run(work)
        resuming.join()
        self.assertEqual(len(calls), 2)
        self.assertEqual(self.names(), ["one"])
        self.assertNotIn(calls[0], self.sessions())

    def test_reading_and_copying(self):
        file = io.StringIO()
        for read in (
            lambda: self.connection.cursor("numbers").execute("SELECT 1"),
            lambda: self.connection.lobject(),
            lambda: self.cursor.copy_expert("COPY item TO STDOUT", file),
        ):
            self.connection.begin()
            self.fall_silent()
            with self.assertRaises(DisconnectionError):
                read()
            self.connection.rollback()

    def test_commit_is_looked_up(self):
        for witness in ("xid", Ledger()):
            connection = self.connect(witness=witness, response_timeout=RESPONSE_TIMEOUT)
            connection.cursor().execute("INSERT INTO item VALUES ('one')")
            with self.events() as seen:
                self.fall_silent()
                connection.commit()
            self.assertIn(CommitLookedUp(connection.server, "committed"), seen)
            self.assertEqual(self.names(), ["one"])
            self.query("DELETE FROM item")

    def test_rollback_does_not_hang(self):
        self.cursor.execute("SELECT 1")
        self.fall_silent()
        self.connection.rollback()
        self.assertEqual(self.connection.state, "idle")

    def test_begin_has_the_deadline_of_an_attempt(self):
        connection = self.connect()
        connection.begin()
        connection.rollback()
        self.forward.silence("to_client")
        with policy_of(connection, timeout=0.5), self.assertRaises(ReconnectTimeout):
            connection.begin()
        self.forward.resume()
        connection.begin()

    def test_so_has_the_beginning_of_a_session(self):
        silences = []

        def on_connect(raw):
            self.fall_silent()
            silences.append(raw)
            raw.cursor().execute("SELECT 1")

        connection = self.connect(policy=RetryPolicy(attempts=3), on_connect=on_connect)
        with self.assertRaises(ReconnectTimeout):
            connection.begin()
        self.assertEqual(len(silences), 3)
        self.assertTrue(all(raw.closed for raw in silences))

    def test_a_statement_may_take_for_ever_by_default(self):
        connection = self.connect()
        connection.cursor().execute("SELECT pg_sleep(1)")
        self.assertEqual(connection.state, "active")

    def test_an_answer_in_time_is_no_disconnect(self):
        for _ in range(4):
            self.cursor.execute("SELECT pg_sleep(0.3)")
            self.time.go_on(RESPONSE_TIMEOUT / 3)
        self.assertEqual(self.connection.state, "active")

    def test_bad_values(self):
        for value, error in [(-1, ValueError), ("soon", TypeError)]:
            with self.assertRaisesRegex(error, "response_timeout"):
                zreconnect.connect(self.dsn, response_timeout=value)


class ThreadTests(DatabaseTestCase):
    def threads(self):
        return [each for each in threading.enumerate() if each.name == "zreconnect watchdog"]

    def test_one_thread_while_there_are_sessions(self):
        connections = [self.connect() for _ in range(3)]
        for connection in connections:
            connection.begin()
        # One that has nothing to watch any more may be about to end.
        wait_until(lambda: len(self.threads()) == 1)
        for connection in connections:
            connection.close()
        gc.collect()
        wait_until(lambda: not self.threads())

    def test_a_forgotten_session_is_not_kept(self):
        connection = zreconnect.connect(self.dsn, driver=self.driver)
        connection.begin()
        watch = weakref.ref(connection._watch)
        del connection
        wait_until(lambda: watch() is None)

    def test_a_closed_watch_cuts_nothing(self):
        connection = self.connect()
        connection.begin()
        watch = connection._watch
        connection.close()
        watch.cut(1.0)
        watch.close()

    def test_a_forked_child_has_one_of_its_own(self):
        connection = self.connect(response_timeout=0.2)
        connection.begin()
        connection.rollback()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                connection.begin()
                # It ends some time after the session.
                others = len(self.threads()) - 1
                connection.cursor().execute("SELECT pg_sleep(60)")
            except DisconnectionError:
                status = others
            finally:
                os._exit(status)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
        connection.begin()

    def test_a_socket_that_is_gone_already_is_no_error(self):
        left = self.module.connect(self.dsn)
        watch = watchdog.Watch(left.fileno(), "here")
        self.forward.drop(reset=True)
        wait_until(lambda: left.closed or self.fails(left))
        watch.cut(1.0)
        watch.cut(1.0)
        watch.close()

    def fails(self, connection):
        try:
            connection.cursor().execute("SELECT 1")
        except self.module.Error:
            return True
        return False
