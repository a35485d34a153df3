"""Servers that go silent."""

import contextlib
import gc
import io
import os
import signal
import socket
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from unittest import mock

import zope.event

import zreconnect
from zreconnect import DisconnectionError, Ledger, ReconnectTimeout, RetryPolicy, watchdog
from zreconnect.beginning import limit_of_begin
from zreconnect.events import CommitLookedUp, ConnectionAttemptFailed, ConnectionLost
from zreconnect.tests.base import PATIENCE, ContextTestCase, DatabaseTestCase, policy_of, wait_until
from zreconnect.tests.steps import interrupted, moments

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
        # No handler can hold up the watchdog.
        self.assertEqual(logs.records[0].thread, threading.get_ident())
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
            (looked_up,) = (event for event in seen if isinstance(event, CommitLookedUp))
            self.assertEqual(looked_up.outcome, "committed")
            self.assertEqual(self.names(), ["one"])
            self.query("DELETE FROM item")

    def test_rollback_does_not_hang(self):
        for response_timeout, limit in ((RESPONSE_TIMEOUT, RESPONSE_TIMEOUT), (None, 10)):
            connection = self.connect(response_timeout=response_timeout)
            connection.cursor().execute("SELECT 1")
            self.fall_silent()
            with self.assertLogs("zreconnect", "WARNING") as logs:
                connection.rollback()
            self.assertIn(f"within {limit:.1f} seconds", logs.output[0])
            self.assertEqual(connection.state, "idle")

    def test_close_does_not_hang(self):
        connection = self.connect(witness=Ledger(), response_timeout=RESPONSE_TIMEOUT)
        connection.run(lambda: None)
        self.fall_silent()
        connection.close()
        self.time.hurries = False
        self.forward.resume()
        self.assertEqual(connection.state, "closed")

    def test_a_wait_that_an_interrupt_has_left_ends_with_the_transaction(self):
        self.connection.run(lambda: None)
        for request in (
            *(self.connection.begin, self.connection.rollback),
            *(lambda: self.cursor.execute("SELECT 1"), self.connection.rollback),
        ):
            watch = self.connection.work.link.session.watch
            watch.awaiting(RESPONSE_TIMEOUT).__enter__()
            request()
            watch.look()
            self.time.go_on(2 * RESPONSE_TIMEOUT)
            watch.look()
            self.assertIsNone(watch.cut_after)

    def test_the_answer_to_begin_leaves_half_of_the_time_for_connecting_again(self):
        for timeout, response_timeout, limit in (
            (8, None, 4),
            (8, 30, 4),
            (8, 3, 3),
            (100, None, 10),
            (None, None, 10),
            (None, 3, 3),
        ):
            connection = self.connect(response_timeout=response_timeout)
            policy = RetryPolicy(timeout=timeout)
            self.assertEqual(limit_of_begin(connection.work, policy), limit)

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
        watch = weakref.ref(connection.work.link.session.watch)
        del connection
        wait_until(lambda: watch() is None)

    def test_a_closed_watch_cuts_nothing(self):
        connection = self.connect()
        connection.begin()
        watch = connection.work.link.session.watch
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


class WatchTestCase(ContextTestCase):
    def setUp(self):
        self.addCleanup(mock.patch.stopall)
        mock.patch.object(watchdog, "INTERVAL", 0.01).start()
        self.watch, self.peer = self.make()

    def make(self, kind=watchdog.Watch):
        """A watch of a socket, and the socket at the other end."""
        ours, peer = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(peer.close)
        peer.settimeout(PATIENCE)
        watch = kind(ours.fileno(), "here")
        self.addCleanup(watch.close)
        return watch, peer

    def assertCut(self, watch, peer, limit):
        self.assertEqual(peer.recv(1), b"")
        self.assertEqual(watch.cut_after, limit)

    def assertWatched(self):
        """A session that is made now has its time limits."""
        watch, peer = self.make()
        with watch.awaiting(0):
            self.assertCut(watch, peer, 0)

    def threads(self):
        return [each for each in threading.enumerate() if each.name == "zreconnect watchdog"]


class WaitTests(WatchTestCase):
    def test_the_nearest_of_nested_deadlines_holds(self):
        for limits, nearest in [
            ((PATIENCE, 0.01), 0.01),
            ((0.01, PATIENCE), 0.01),
            ((0.01, None), 0.01),
            ((None, 0.01), 0.01),
            ((0.02, 0.01, PATIENCE), 0.01),
        ]:
            watch, peer = self.make()
            with contextlib.ExitStack() as stack:
                # All are seen at the same time.
                with mock.patch.object(watchdog, "_look_at_all"):
                    for limit in limits:
                        stack.enter_context(watch.awaiting(limit))
                self.assertCut(watch, peer, nearest)

    def test_the_outer_one_goes_on_with_the_time_that_it_has_waited(self):
        time = watchdogs_time(self)
        with self.watch.awaiting(60):
            self.watch.look()
            time.go_on(40)
            with self.watch.awaiting(60):
                self.watch.look()
                self.assertIsNone(self.watch.cut_after)
            time.go_on(30)
            self.assertCut(self.watch, self.peer, 60)

    def test_a_request_has_a_time_of_its_own(self):
        time = watchdogs_time(self)
        for _ in range(3):
            with self.watch.awaiting(60):
                self.watch.look()
                time.go_on(40)
                self.watch.look()
        self.assertIsNone(self.watch.cut_after)

    def test_it_can_begin_anew_without_a_limit(self):
        time = watchdogs_time(self)
        with self.watch.awaiting(60) as nothing, contextlib.ExitStack() as stack:
            self.assertIsNone(nothing)
            wait = self.watch.awaiting(30)
            stack.enter_context(wait)
            self.watch.look()
            wait.renew(None)
            time.go_on(40)
            self.watch.look()
        self.assertIsNone(self.watch.cut_after)

    def test_it_can_begin_anew_with_another_limit(self):
        time = watchdogs_time(self)
        with self.watch.awaiting(30) as nothing, contextlib.ExitStack() as stack:
            self.assertIsNone(nothing)
            wait = self.watch.awaiting(30)
            stack.enter_context(wait)
            wait.renew(60)
            self.watch.reset()
            with wait:
                self.watch.look()
                time.go_on(50)
                self.watch.look()
                self.assertIsNone(self.watch.cut_after)
                time.go_on(20)
                self.watch.look()
        self.assertEqual(self.watch.cut_after, 60)

    def test_that_of_another_thread(self):
        with self.watch.awaiting(PATIENCE):
            thread = threading.Thread(target=self.wait_for_nothing)
            thread.start()
            thread.join()
            with self.watch.awaiting(0):
                self.assertCut(self.watch, self.peer, 0)

    def wait_for_nothing(self):
        with self.watch.awaiting(PATIENCE):
            pass

    def test_a_wait_that_an_interrupt_has_left_can_be_forgotten(self):
        time = watchdogs_time(self)
        for moment in moments():
            is_interrupted, _ = interrupted(self.wait_for_nothing, watchdog, moment)
            self.watch.look()
            self.watch.reset()
            if not is_interrupted:
                break
        time.go_on(2 * PATIENCE)
        self.watch.look()
        self.assertIsNone(self.watch.cut_after)
        self.assertGreater(moment, 10)

    def test_forgetting_inside_a_wait(self):
        with self.watch.awaiting(PATIENCE):
            self.watch.reset()

    def test_three_python_calls(self):
        for limit in (None, PATIENCE):
            calls = []
            before = sys.getprofile()
            sys.setprofile(lambda frame, event, argument, calls=calls: calls.append(event))
            try:
                with self.watch.awaiting(limit):
                    pass
            finally:
                sys.setprofile(before)
            self.assertEqual(calls.count("call"), 3)

    def test_no_watch(self):
        watch = watchdog.NO_WATCH
        with watch.awaiting(0):
            self.assertFalse(watch.is_quiet())
            watch.look()
        watch.reset()
        watch.close()
        self.assertIsNone(watch.cut_after)

    def test_quiet(self):
        self.assertTrue(self.watch.is_quiet())
        self.peer.sendall(b"news")
        self.assertFalse(self.watch.is_quiet())
        watch, _ = self.make()
        watch.cut(0)
        self.assertFalse(watch.is_quiet())


class ProgressTests(WatchTestCase):
    """While bytes come, or arrive, the server is not silent."""

    def setUp(self):
        super().setUp()
        self.time = watchdogs_time(self)
        listener = self.enterContext(socket.create_server(("127.0.0.1", 0)))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self.ours = self.enterContext(socket.create_connection(listener.getsockname()))
        self.peer = self.enterContext(listener.accept()[0])
        self.peer.settimeout(PATIENCE)
        self.watch = watchdog.Watch(self.ours.fileno(), "here")
        self.addCleanup(self.watch.close)

    def fill(self):
        """Send until the peer has to read; no time passes until then."""
        self.ours.setblocking(False)
        self.move(lambda: self.ours.send(bytes(1 << 20)))
        with contextlib.suppress(BlockingIOError):
            while True:
                self.ours.send(bytes(1 << 20))
        counts = None
        while counts != (counts := counts_of(self.ours)):
            time.sleep(0.05)
        self.watch.look()

    def move(self, function):
        """Do something that lets bytes come or arrive, and wait until they have."""
        before = counts_of(self.ours)
        function()
        wait_until(lambda: counts_of(self.ours) != before)

    def assertSlow(self, function):
        """With what the function does the time of a wait begins anew."""
        for _ in range(4):
            self.move(function)
            self.watch.look()
            self.time.go_on(40)
            self.watch.look()
            self.assertIsNone(self.watch.cut_after)

    def assertSilent(self):
        """Of the limit of 60, 40 have passed."""
        self.time.go_on(15)
        self.watch.look()
        self.assertIsNone(self.watch.cut_after)
        self.time.go_on(10)
        self.watch.look()
        self.assertEqual(self.watch.cut_after, 60)

    def test_rows_that_keep_coming(self):
        with self.watch.awaiting(60):
            self.assertSlow(lambda: self.peer.send(b"row"))
            self.assertSilent()

    def test_a_request_that_is_long_to_send(self):
        with self.watch.awaiting(60):
            self.fill()
            self.assertSlow(lambda: self.peer.recv(1 << 20))
            self.assertSilent()

    def test_a_request_that_does_not_arrive(self):
        with self.watch.awaiting(60):
            self.fill()
            self.time.go_on(40)
            self.assertSilent()

    def test_a_request_that_has_arrived(self):
        with self.watch.awaiting(60):
            self.move(lambda: self.ours.send(b"SELECT"))
            self.watch.look()
            self.time.go_on(40)
            self.assertSilent()

    def test_the_nearest_of_nested_deadlines_holds(self):
        with self.watch.awaiting(60), self.watch.awaiting(90):
            self.assertSlow(lambda: self.peer.send(b"row"))
            self.assertSilent()

    def test_a_deadline_whatever_comes(self):
        with self.watch.within(60):
            self.watch.look()
            self.move(lambda: self.peer.send(b"row"))
            self.time.go_on(40)
            self.assertSilent()

    def test_other_systems_tell_nothing(self):
        with mock.patch.object(sys, "platform", "other"), self.watch.awaiting(60):
            self.watch.look()
            self.move(lambda: self.peer.send(b"row"))
            self.time.go_on(40)
            self.assertSilent()

    def test_what_came_before_is_no_progress(self):
        with self.watch.awaiting(60):
            self.watch.look()
        self.move(lambda: self.peer.send(b"news"))
        with self.watch.awaiting(60):
            self.watch.look()
            self.time.go_on(40)
            self.assertSilent()

    def test_without_a_wait_nobody_looks_at_the_socket(self):
        with mock.patch.object(watchdog, "_counts") as counts:
            self.watch.look()
        counts.assert_not_called()


def counts_of(connected):
    """The bytes that the kernel has seen arrive and come."""
    return connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)[120:]


class PauseTests(WatchTestCase):
    """What the program does itself is no silence of the server's."""

    def setUp(self):
        super().setUp()
        self.time = watchdogs_time(self)

    def test_the_time_begins_anew_at_its_end(self):
        with self.watch.awaiting(60):
            self.watch.look()
            self.time.go_on(40)
            with self.watch.pausing():
                self.watch.look()
                self.time.go_on(100)
                self.watch.look()
            # Not even seen.
            with self.watch.pausing():
                self.time.go_on(100)
            self.watch.look()
            self.time.go_on(40)
            self.watch.look()
            self.assertIsNone(self.watch.cut_after)
            self.time.go_on(20)
            self.assertCut(self.watch, self.peer, 60)

    def test_one_that_an_interrupt_has_left_is_forgotten(self):
        self.watch.pausing().__enter__()
        self.watch.reset()
        with self.watch.awaiting(0):
            self.assertCut(self.watch, self.peer, 0)


class Broken(watchdog.Watch):
    looks = 0

    def look(self):
        Broken.looks += 1
        raise LookupError("no luck")


class WatchdogTests(WatchTestCase):
    def setUp(self):
        super().setUp()
        # As in a forked child: one that other tests have left ends.
        watchdog._start_anew()

    def test_it_survives_a_watch_that_is_broken(self):
        broken, _ = self.make(Broken)
        looks = Broken.looks
        wait_until(lambda: Broken.looks > looks + 2)
        self.assertWatched()
        self.assertIsNone(broken.cut_after)

    def test_a_thread_that_cannot_be_started(self):
        ours, peer = socket.socketpair()
        peer.settimeout(PATIENCE)
        error = RuntimeError("can't start new thread")
        with (
            mock.patch.object(threading.Thread, "start", side_effect=error),
            self.assertRaises(RuntimeError) as raised,
        ):
            watchdog.Watch(ours.fileno(), "here")
        self.assertIs(raised.exception, error)
        ours.close()
        # There is no copy of it.
        with peer:
            self.assertEqual(peer.recv(1), b"")
        self.assertWatched()

    def test_an_interrupt_at_any_moment_leaves_a_process_with_a_watchdog(self):
        for moment in moments():
            watchdog._start_anew()
            with warnings.catch_warnings():
                # Just before a socket is closed, it leaves that to the garbage collector.
                warnings.simplefilter("ignore", ResourceWarning)
                is_interrupted, _ = interrupted(self.make, watchdog, moment)
            self.assertWatched()
            if not is_interrupted:
                break
        self.assertGreater(moment, 10)

    def test_an_interrupt_when_it_has_been_started(self):
        start = threading.Thread.start

        def start_and_interrupt(thread):
            start(thread)
            raise KeyboardInterrupt

        with (
            mock.patch.object(threading.Thread, "start", start_and_interrupt),
            self.assertRaises(KeyboardInterrupt),
        ):
            self.make()
        self.assertWatched()

    def test_it_ends_and_comes_back(self):
        for _ in range(100):
            watch, peer = self.make()
            with watch.awaiting(0):
                self.assertCut(watch, peer, 0)
            self.doCleanups()
            del watch
            mock.patch.object(watchdog, "INTERVAL", 0.0001).start()
        wait_until(lambda: len(self.threads()) <= 1)

    def test_a_fork_at_any_moment_leaves_the_child_free(self):
        has_ended = threading.Event()

        def make_and_cut():
            while not has_ended.is_set():
                ours, peer = socket.socketpair()
                with ours, peer, contextlib.closing(watchdog.Watch(ours.fileno(), "")) as watch:
                    peer.settimeout(PATIENCE)
                    watches.append(watch)
                    with watch.awaiting(0):
                        peer.recv(1)

        watches = deque(maxlen=20)
        threads = [threading.Thread(target=make_and_cut) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(30):
                self.assertEqual(self.status_of_child(watches), 0)
        finally:
            has_ended.set()
            for thread in threads:
                thread.join()

    def status_of_child(self, watches):
        pid = os.fork()
        if pid:
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.005)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs"
        status = 1
        try:
            for watch in [*watches, self.watch]:
                watch.close()
            self.assertWatched()
            status = 0
        finally:
            os._exit(status)

    def test_a_child_cuts_no_session_of_its_parents(self):
        with self.watch.awaiting(PATIENCE):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    status = len(watchdog._watches)
                finally:
                    os._exit(status)
            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
        self.assertTrue(self.watch.is_quiet())
