"""The door of a server: attempts, who waits for them, and what comes in between."""

import math
import os
import signal
import socket
import sqlite3
import threading
import time
import unittest
from unittest import mock

import psycopg2

from zreconnect import ReconnectTimeout, RetryPolicy, outage
from zreconnect import server as server_module
from zreconnect import session as session_module
from zreconnect.answers import Answers
from zreconnect.server import AttemptFailed, server_from_dsn, server_from_factory
from zreconnect.tests.base import PATIENCE, DatabaseTestCase, wait_until
from zreconnect.tests.interrupts import is_in_measurement
from zreconnect.tests.steps import interrupted, moments

# Seconds. Long enough for a thread to begin to wait, and what a test waits for in vain.
SHORT = 1.0


class Connection(sqlite3.Connection):
    # Not to be asked of SQLite while another thread closes it.
    is_closed = False

    def close(self):
        super().close()
        self.is_closed = True


def connection():
    return sqlite3.connect(":memory:", check_same_thread=False, factory=Connection)


class Call(threading.Thread):
    """Calls a function in a thread, which has to end."""

    def __init__(self, function, *args):
        super().__init__(daemon=True)
        self._function = function, args
        self.returned = self.raised = None
        self.start()

    def run(self):
        function, args = self._function
        try:
            self.returned = function(*args)
        except BaseException as error:
            self.raised = error

    def end(self):
        self.join(PATIENCE)
        assert not self.is_alive()
        return self


class Attempts:
    """A connection factory whose attempts succeed, but for those that a test has planned."""

    def __init__(self, *planned):
        self._planned = list(planned)
        self.begun = 0

    def __call__(self):
        self.begun += 1
        return self._planned.pop(0)() if self._planned else connection()


class Hanging:
    """An attempt that does not end before it is told how."""

    def __init__(self):
        self.has_begun = threading.Event()
        self._goes_on = threading.Event()

    def __call__(self):
        self.has_begun.set()
        self._goes_on.wait(10 * PATIENCE)
        return self._end()

    def end(self, function=connection):
        self._end = function
        self._goes_on.set()


class DoorTestCase(unittest.TestCase):
    def setUp(self):
        super().setUp()
        # An interrupt in a test before may have left one that is not there any more.
        self.threads_before = set(threading.enumerate())

    def make(self, *planned):
        """A server, and the factory of its connections."""
        self.attempts = Attempts(*planned)
        self.server = server_from_factory(self.attempts, "sqlite")
        return self.server

    def hanging(self):
        hanging = Hanging()
        self.addCleanup(hanging.end)
        return hanging

    def wait_for_waiting(self, number=1):
        wait_until(lambda: len(self.server._latest._answers_to_others) == number)

    def fails(self, timeout):
        with self.assertRaises(AttemptFailed) as failed:
            self.server.connect(timeout)
        return failed.exception.error


class OutcomeTests(DoorTestCase):
    def test_a_connection(self):
        raw = self.make().connect(PATIENCE)
        self.assertFalse(raw.is_closed)

    def test_a_failure_that_passes(self):
        error = sqlite3.OperationalError("database is locked")
        self.make(mock.Mock(side_effect=error))
        self.assertIs(self.fails(PATIENCE), error)

    def test_a_refusal_is_the_drivers_own_error(self):
        error = sqlite3.OperationalError("unable to open database file")
        self.make(mock.Mock(side_effect=error))
        with self.assertRaises(sqlite3.OperationalError) as refused:
            self.server.connect(PATIENCE)
        self.assertIs(refused.exception, error)

    def test_a_connection_of_another_kind_is_refused(self):
        with self.assertRaisesRegex(TypeError, "must return an sqlite3 connection"):
            self.make(object).connect(PATIENCE)

    def test_no_answer_in_time(self):
        self.make(self.hanging())
        error = self.fails(0.3)
        self.assertIsInstance(error, TimeoutError)
        self.assertEqual(str(error), "no answer within 0.3 seconds")

    def test_a_late_connection_is_closed(self):
        hanging, late = self.hanging(), connection()
        self.make(hanging)
        self.fails(0)
        hanging.end(lambda: late)
        wait_until(lambda: late.is_closed)

    def test_a_thread_that_cannot_be_started(self):
        self.make()
        error = RuntimeError("can't start new thread")
        with mock.patch.object(threading.Thread, "start", side_effect=error):
            self.assertIs(self.fails(PATIENCE), error)
        self.server.connect(PATIENCE)
        self.assertEqual(self.attempts.begun, 1)

    def test_another_error_while_it_is_started(self):
        self.make()
        error = RuntimeError("the job's time limit")
        with (
            mock.patch.object(threading.Thread, "start", side_effect=error),
            self.assertRaises(RuntimeError) as raised,
        ):
            self.server.connect(PATIENCE)
        self.assertIs(raised.exception, error)

    def test_an_interrupt_before_it_is_started(self):
        """Nobody waits for what never began."""
        self.make()
        with (
            mock.patch.object(threading.Thread, "start", side_effect=KeyboardInterrupt),
            self.assertRaises(KeyboardInterrupt),
        ):
            self.server.connect(10 * PATIENCE)
        self.assertIsNotNone(self.server.connect(PATIENCE))
        self.assertEqual(self.attempts.begun, 1)


class PostgresTests(DatabaseTestCase):
    def test_outcomes(self):
        server = server_from_dsn(f"{self.dsn}?application_name=outcomes")
        self.forward.refuse()
        with self.assertRaises(AttemptFailed) as failed:
            server.connect(PATIENCE)
        self.assertIsInstance(failed.exception.error, psycopg2.OperationalError)
        self.forward.accept()
        server.connect(PATIENCE).close()
        with self.assertRaisesRegex(psycopg2.OperationalError, "does not exist"):
            server_from_dsn(self.layer.dsn(dbname="nowhere")).connect(PATIENCE)

    def test_a_silent_server(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            server = server_from_dsn(f"host=127.0.0.1 port={silent.getsockname()[1]} dbname=x")
            with self.assertRaises(AttemptFailed) as failed:
                server.connect(0.5)
        self.assertIsInstance(failed.exception.error, TimeoutError)


class SharingTests(DoorTestCase):
    def leaves(self, pause, patience):
        """Another thread, which leaves it to this one to knock."""
        return Call(self.server.leave_to_another, pause, patience, math.inf)

    def test_a_failure_is_everybodys(self):
        hanging = self.hanging()
        self.make(hanging)
        calls = [Call(self.server.connect, PATIENCE) for _ in range(3)]
        self.wait_for_waiting(2)
        error = sqlite3.OperationalError("database is locked")
        hanging.end(mock.Mock(side_effect=error))
        self.assertEqual([call.end().raised.error for call in calls], [error] * 3)
        self.assertEqual(self.attempts.begun, 1)

    def test_who_pauses_makes_none_if_another_thread_has(self):
        error = sqlite3.OperationalError("database is locked")
        self.make(mock.Mock(side_effect=error))
        self.fails(PATIENCE)
        self.server.knocks_again(1000)
        for _ in range(3):
            failure = self.leaves(0.01, PATIENCE).end().raised
            self.assertIs(failure.error, error)
            self.assertTrue(failure.is_anothers)
        self.assertEqual(self.attempts.begun, 1)

    def test_the_success_of_another_thread_ends_a_pause(self):
        self.make(mock.Mock(side_effect=sqlite3.OperationalError("database is locked")))
        self.fails(PATIENCE)
        self.server.knocks_again(1000)
        calls = [self.leaves(1000, math.inf) for _ in range(3)]
        wait_until(lambda: self.server._knocking.waiting == 3)
        self.server.connect(PATIENCE)
        for call in calls:
            self.assertIsNone(call.end().raised)

    def test_a_refusal_ends_it_too(self):
        failures = ["database is locked", "unable to open database file"]
        self.make(*(mock.Mock(side_effect=sqlite3.OperationalError(text)) for text in failures))
        self.fails(PATIENCE)
        self.server.knocks_again(1000)
        call = self.leaves(1000, math.inf)
        wait_until(lambda: self.server._knocking.waiting)
        self.assertRaises(sqlite3.OperationalError, self.server.connect, PATIENCE)
        self.assertIsNone(call.end().raised)

    def test_as_does_the_end_of_who_knocks(self):
        self.make(mock.Mock(side_effect=sqlite3.OperationalError("database is locked")))
        self.fails(PATIENCE)
        self.server.knocks_again(1000)
        call = self.leaves(1000, math.inf)
        wait_until(lambda: self.server._knocking.waiting)
        self.server.leaves()
        self.assertIsNone(call.end().raised)

    def test_after_a_success_each_connects_for_itself(self):
        hanging = self.hanging()
        self.make(hanging)
        calls = [Call(self.server.connect, PATIENCE) for _ in range(3)]
        self.wait_for_waiting(2)
        hanging.end()
        self.assertEqual(len({id(call.end().returned) for call in calls}), 3)
        self.assertEqual(self.attempts.begun, 3)

    def test_who_comes_after_an_attempt_that_hangs_makes_the_next_one(self):
        hanging = self.hanging()
        self.make(hanging)
        self.fails(0)
        hanging.has_begun.wait(PATIENCE)
        self.server.connect(PATIENCE)
        self.assertEqual(self.attempts.begun, 2)

    def test_who_waits_for_an_attempt_that_hangs_makes_the_next_one(self):
        hanging = self.hanging()
        self.make(hanging)
        first = Call(self.server.connect, SHORT)
        hanging.has_begun.wait(PATIENCE)
        calls = [Call(self.server.connect, PATIENCE) for _ in range(3)]
        self.assertIsInstance(first.end().raised, AttemptFailed)
        for call in calls:
            self.assertIsNotNone(call.end().returned)
        # One that hangs, and one for each connection.
        self.assertEqual(self.attempts.begun, 4)

    def test_who_has_no_time_left_makes_none(self):
        hanging = self.hanging()
        self.make(hanging)
        first = Call(self.server.connect, PATIENCE)
        hanging.has_begun.wait(PATIENCE)
        self.assertIsInstance(self.fails(0.1), TimeoutError)
        self.assertEqual(self.attempts.begun, 1)
        hanging.end()
        self.assertIsNotNone(first.end().returned)

    def test_who_waits_for_a_thread_that_cannot_be_started_makes_the_next_one(self):
        self.make()
        start = threading.Thread.start
        must_fail = threading.Event()
        must_fail.set()

        def start_later(thread):
            if not thread.name.startswith("zreconnect") or not must_fail.is_set():
                return start(thread)
            must_fail.clear()
            self.wait_for_waiting()
            raise RuntimeError("can't start new thread")

        with mock.patch.object(threading.Thread, "start", start_later):
            first = Call(self.server.connect, PATIENCE)
            wait_until(lambda: not must_fail.is_set())
            second = Call(self.server.connect, PATIENCE)
            self.assertIsInstance(first.end().raised, AttemptFailed)
            self.assertIsNotNone(second.end().returned)

    def test_who_waits_for_one_that_has_not_begun_has_its_outcome(self):
        attempt, outcome = server_module._Attempt(math.inf), (None, ConnectionError())
        call = Call(attempt.shared_outcome, time.monotonic() + PATIENCE)
        wait_until(lambda: attempt._answers_to_others)
        attempt.end(outcome)
        self.assertEqual(call.end().returned, outcome)

    def test_who_has_waited_for_one_to_begin_goes_on(self):
        attempt, outcome = server_module._Attempt(math.inf), (None, ConnectionError())

        class SlowAnswers(Answers):
            def get(self, until):
                if attempt._has_begun:
                    return super().get(until)
                # Just before the time for that is over.
                attempt.begin()
                return None

        with mock.patch.object(server_module, "Answers", SlowAnswers):
            call = Call(attempt.shared_outcome, time.monotonic() + PATIENCE)
            wait_until(lambda: attempt._has_begun)
            attempt.end(outcome)
            self.assertEqual(call.end().returned, outcome)

    def test_a_late_failure_is_old_news(self):
        hanging = self.hanging()
        self.make(hanging)
        self.fails(0)
        hanging.has_begun.wait(PATIENCE)
        self.server.connect(PATIENCE)
        hanging.end(mock.Mock(side_effect=sqlite3.OperationalError("database is locked")))
        self.wait_for_attempts_to_end()
        # Both are in the factory at the same time only if they do not share an attempt.
        together = threading.Barrier(2, timeout=PATIENCE)
        self.attempts._planned = [lambda: (together.wait() and None) or connection()] * 2
        for call in [Call(self.server.connect, PATIENCE) for _ in range(2)]:
            self.assertIsNotNone(call.end().returned)

    def test_a_late_success_does_not_open_the_door(self):
        hanging, present, late = self.hanging(), self.hanging(), connection()
        self.make(hanging, present)
        self.fails(0)
        hanging.has_begun.wait(PATIENCE)
        first = Call(self.server.connect, PATIENCE)
        present.has_begun.wait(PATIENCE)
        hanging.end(lambda: late)
        wait_until(lambda: late.is_closed)
        second = Call(self.server.connect, PATIENCE)
        self.wait_for_waiting()
        self.assertEqual(self.attempts.begun, 2)
        present.end()
        for call in (first, second):
            self.assertIsNotNone(call.end().returned)

    def wait_for_attempts_to_end(self):
        name = "zreconnect connection attempt"
        wait_until(
            lambda: all(
                each.name != name for each in set(threading.enumerate()) - self.threads_before
            )
        )

    def test_no_thread_outlasts_its_attempt(self):
        self.make().connect(10 * PATIENCE)
        self.wait_for_attempts_to_end()


class TurnsTests(DoorTestCase):
    """Threads with a policy, which knock by turns."""

    error = sqlite3.OperationalError("database is locked")

    def setUp(self):
        super().setUp()
        self.make(*[mock.Mock(side_effect=self.error)] * 2)

    def open(self, **policy):
        session_module.open_session(
            self.server, RetryPolicy(**policy), lambda: None, lambda session: None, bool
        )

    def knocks(self):
        return self.server._knocking._next is not None

    def test_who_leaves_it_to_another_pauses_nowhere_else(self):
        turns = [None, AttemptFailed(self.error, is_anothers=True), None, None]
        leaving = mock.patch.object(self.server, "leave_to_another", side_effect=turns)
        with leaving, mock.patch.object(session_module, "_wait") as wait:
            self.open()
        pauses = [call.args[1] for call in wait.call_args_list]
        self.assertEqual([pause > 0 for pause in pauses], [True, False, True])

    def test_it_does_not_say_that_it_knocks(self):
        turns = [AttemptFailed(self.error, is_anothers=True), KeyboardInterrupt]
        leaving = mock.patch.object(self.server, "leave_to_another", side_effect=turns)
        with leaving, mock.patch.object(self.server, "knocks_again") as knocks_again:
            self.assertRaises(KeyboardInterrupt, self.open)
        self.assertFalse(knocks_again.called)

    def test_who_gives_up_says_that_it_knocks_no_more(self):
        knocked = []

        def wait(*arguments):
            knocked.append(self.knocks())

        with mock.patch.object(session_module, "_wait", side_effect=wait):
            self.assertRaises(ReconnectTimeout, self.open, attempts=2)
        self.assertEqual((knocked, self.knocks()), ([True], False))

    def test_as_does_who_is_interrupted(self):
        with mock.patch.object(session_module, "_wait", side_effect=KeyboardInterrupt):
            self.assertRaises(KeyboardInterrupt, self.open)
        self.assertFalse(self.knocks())

    def test_who_counts_its_attempts_waits_for_one_pause_each(self):
        for attempts, is_counted in ((None, False), (2, True)):
            leaving = mock.patch.object(self.server, "leave_to_another", side_effect=KeyError)
            with leaving as leave:
                self.assertRaises(KeyError, self.open, attempts=attempts)
            self.assertEqual(leave.call_args.args[2:], (0.9, is_counted))


class OutageTests(DoorTestCase):
    def test_it_lasts_until_somebody_has_a_session(self):
        self.make()
        self.assertEqual(self.server.outage.away_for(PATIENCE), 0)
        self.server.outage.missed(time.monotonic() - 5)
        self.server.outage.missed(time.monotonic())
        self.assertGreaterEqual(self.server.outage.away_for(PATIENCE), 5)
        self.server.outage.reached()
        self.assertEqual(self.server.outage.away_for(PATIENCE), 0)

    def test_it_is_forgotten_when_nobody_has_met_it_again(self):
        self.make()
        self.server.outage.missed(time.monotonic() - 5)
        self.assertEqual(self.server.outage.away_for(-1), 0)
        self.server.outage.missed(time.monotonic())
        self.assertLess(self.server.outage.away_for(PATIENCE), 5)

    def test_it_is_told_of_for_as_long_as_somebody_waits(self):
        self.make()
        self.server.outage.missed(time.monotonic() - 5)
        with self.server.outage.awaited():
            self.assertEqual(self.server.outage.away_for(-1), 0)
            self.assertLess(self.server.outage.until_told(), PATIENCE)

    def test_who_comes_long_after_all_have_given_up_meets_another_one(self):
        self.make()
        self.server.outage.missed(time.monotonic())
        with mock.patch.object(outage, "FORGOTTEN_AFTER", -1), self.server.outage.awaited():
            self.assertEqual(self.server.outage.until_told(), math.inf)

    def test_an_attempt_may_last_longer_than_its_maker_waits(self):
        hanging, late = self.hanging(), connection()
        self.make(hanging)
        self.server.outage.missed(time.monotonic())
        for _ in range(2):
            with self.assertRaises(AttemptFailed):
                self.server.connect(0, lasting=10 * PATIENCE)
        other = Call(self.server.connect, PATIENCE)
        self.wait_for_waiting(2)
        self.assertEqual(self.attempts.begun, 1)
        hanging.end(lambda: late)
        self.assertIsNotNone(other.end().returned)
        wait_until(lambda: late.is_closed and self.server.outage.away_for(PATIENCE) == 0)


class InterruptTests(DoorTestCase):
    def raise_while_it_waits(self, error):
        """Let a signal's handler raise it; returns the attempt that is still under way."""
        has_raised = threading.Event()

        def handler(number, frame):
            if not has_raised.is_set() and not is_in_measurement(frame):
                has_raised.set()
                raise error

        hanging = self.hanging()
        self.make(hanging)
        self.addCleanup(signal.signal, signal.SIGUSR1, signal.signal(signal.SIGUSR1, handler))

        def interrupt():
            hanging.has_begun.wait(PATIENCE)
            # Again, because one that comes just before the main thread begins to wait is seen late.
            while not has_raised.wait(0.01):
                os.kill(os.getpid(), signal.SIGUSR1)

        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        started = time.monotonic()
        with self.assertRaises(BaseException) as raised:
            self.server.connect(10 * PATIENCE)
        interrupting.join()
        self.assertLess(time.monotonic() - started, 5 * PATIENCE)
        self.assertIs(raised.exception, error)
        return hanging

    def test_what_a_handler_raises_is_not_the_outcome(self):
        for error in (
            TimeoutError("the job's own time limit"),
            sqlite3.OperationalError("database is locked"),
            KeyboardInterrupt(),
        ):
            late = connection()
            self.raise_while_it_waits(error).end(lambda late=late: late)
            # Whose maker has left.
            wait_until(lambda late=late: late.is_closed)

    def test_at_any_moment_it_leaves_the_door_usable(self):
        for moment in moments():
            self.make()
            was_interrupted, _ = interrupted(self.connect_soon, server_module, moment)
            call = Call(self.server.connect, PATIENCE)
            self.assertIsNotNone(call.end().returned, f"interrupted at step {moment}")
            if not was_interrupted:
                break
        self.assertGreater(moment, 100)

    def connect_soon(self):
        try:
            return self.server.connect(0.1)
        except AttemptFailed:
            # On a busy machine.
            return None

    def test_at_any_moment_it_leaves_those_who_wait_an_attempt(self):
        for moment in range(1, 400, 23):
            self.make()
            calls = [Call(self.server.connect, PATIENCE) for _ in range(2)]
            interrupted(self.connect_soon, server_module, moment)
            for call in calls:
                self.assertIsNotNone(call.end().returned, f"interrupted at step {moment}")


class ForkTests(DoorTestCase):
    def test_a_child_does_not_wait_for_the_parents_attempt(self):
        hanging = self.hanging()
        self.make(hanging)
        call = Call(self.server.connect, PATIENCE)
        hanging.has_begun.wait(PATIENCE)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self.server.connect(PATIENCE / 2)
                status = 0
            finally:
                os._exit(status)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
        hanging.end()
        self.assertIsNotNone(call.end().returned)
