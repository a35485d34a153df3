"""What an outage looks like in the log: told once, for all threads, and when it is over."""

import ast
import collections
import contextlib
import functools
import itertools
import json
import logging
import math
import random
import signal
import threading
import time
import traceback
import unittest
from pathlib import Path
from unittest import mock

import zope.event
from transaction.interfaces import TransientError

import zreconnect
from zreconnect import (
    CommitOutcomeUnknown,
    DisconnectionError,
    ReconnectTimeout,
    RetryPolicy,
    events,
    outage,
    retry,
    retry_on_disconnect,
    session,
)
from zreconnect.advice import advice
from zreconnect.exceptions import PartlyCommitted
from zreconnect.outage import FORGOTTEN_AFTER, RESUMED_WITHIN, Outage
from zreconnect.server import AttemptFailed, Server
from zreconnect.tests.base import PATIENCE, DatabaseTestCase, policy_of, wait_until
from zreconnect.tests.steps import interrupted, moments

PACKAGE = Path(zreconnect.__file__).parent
THREADS = 20
# Of a screen.
LINES = 24
TEN_MINUTES = 600.0
# What every record has.
USUAL = set(vars(logging.makeLogRecord({})))


def own_fields(record):
    """What a record has in ``extra``."""
    return {name: value for name, value in vars(record).items() if name not in USUAL}


class Clock:
    """Stands for the module time."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


class OutageTestCase(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()
        patch = mock.patch.object(outage, "time", self.clock)
        patch.start()
        self.addCleanup(patch.stop)
        self.outage = Outage()

    def pass_by(self, seconds):
        self.clock.now += seconds

    def miss(self, **keywords):
        self.outage.missed(keywords.get("since", self.clock.now))

    def told(self):
        """Whether somebody tells that it is away."""
        return self.outage.is_news("away")


class OutageTests(OutageTestCase):
    def test_when_it_is_told(self):
        self.miss()
        told = []
        with self.outage.awaited():
            for second in range(1000):
                told += [second for _ in range(THREADS) if self.told()]
                self.pass_by(1)
        self.assertEqual(told, [0, 10, 60, 360, 660, 960])

    def test_until_then_a_thread_sleeps(self):
        self.assertEqual(self.outage.until_told(), float("inf"))
        self.miss()
        slept = []
        with self.outage.awaited():
            for _ in range(4):
                self.assertTrue(self.told())
                slept.append(self.outage.until_told())
                self.pass_by(slept[-1])
        self.assertEqual(slept, [10, 50, 300, 300])

    def test_its_end_is_told_once_with_how_long_it_was(self):
        self.miss()
        self.pass_by(5)
        self.miss()
        self.assertEqual(self.outage.seconds, 5)
        self.assertEqual([self.outage.reached() for _ in range(3)], [5, None, None])
        self.assertIsNone(self.outage.seconds)

    def test_it_begins_with_the_attempt_that_failed_first(self):
        self.miss(since=self.clock.now - 3)
        self.assertEqual(self.outage.reached(), 3)

    def test_nothing_is_told_of_a_server_that_was_never_away(self):
        self.assertIsNone(self.outage.reached())
        self.assertTrue(self.told())
        self.assertTrue(self.told())

    def test_a_lost_session_is_news_once(self):
        self.assertTrue(self.outage.lost(self.clock.now - 1))
        self.assertFalse(self.outage.lost(self.clock.now - 1))
        self.assertEqual([self.outage.reached() for _ in range(2)], [0, None])

    def test_what_was_lost_with_it_and_shows_later_is_no_news(self):
        opened = self.clock.now - 1
        self.outage.lost(opened)
        self.miss()
        self.assertTrue(self.told())
        self.outage.reached()
        self.pass_by(FORGOTTEN_AFTER - 1)
        self.assertFalse(self.outage.lost(opened))
        self.assertFalse(self.told())
        self.assertIsNone(self.outage.reached())

    def test_another_loss_is(self):
        opened = self.clock.now - 1
        self.outage.lost(opened)
        self.outage.reached()
        self.pass_by(1)
        self.assertTrue(self.outage.lost(self.clock.now))
        self.outage.reached()
        self.pass_by(FORGOTTEN_AFTER + 1)
        self.assertTrue(self.outage.lost(opened))

    def test_a_server_that_lets_some_in_and_others_not_is_away(self):
        self.miss()
        self.assertTrue(self.told())
        self.assertEqual(self.outage.reached(), 0)
        self.pass_by(RESUMED_WITHIN)
        self.miss()
        self.assertEqual(self.outage.seconds, RESUMED_WITHIN)
        self.assertTrue(self.told())
        self.assertEqual(self.outage.reached(), RESUMED_WITHIN)
        self.miss()
        self.assertFalse(self.told())
        self.assertIsNone(self.outage.reached())
        self.pass_by(RESUMED_WITHIN + 1)
        self.miss()
        self.assertTrue(self.told())
        self.assertEqual(self.outage.seconds, 0)

    def test_whatever_happens_the_last_word_is_true_and_few_are_said(self):
        choice = random.Random(1)
        for _ in range(50):
            self.outage = Outage()
            words = []
            for _ in range(choice.randrange(1, 60)):
                self.pass_by(choice.choice((0.1, 1, 5, 20)))
                if choice.random() < 0.5:
                    self.miss()
                    words += ["away"] * self.told()
                else:
                    words += ["back"] * (self.outage.reached() is not None)
            words += ["back"] * (self.outage.reached() is not None)
            self.assertEqual(words[-1:], ["back"] * bool(words))
            self.assertNotIn(("back", "back"), itertools.pairwise(words))

    def test_who_comes_long_after_all_have_given_up_tells_of_another_one(self):
        self.miss()
        self.assertTrue(self.told())
        self.pass_by(FORGOTTEN_AFTER + 1)
        self.assertTrue(self.told())
        self.miss()
        self.assertTrue(self.told())
        self.assertFalse(self.told())

    def test_that_it_is_back_is_told_then_too_but_not_after_how_long(self):
        self.miss()
        self.told()
        self.pass_by(10 * FORGOTTEN_AFTER)
        with self.outage.awaited():
            self.assertIsNone(self.outage.seconds)
        self.assertEqual(self.outage.reached(), 0)

    def test_it_is_not_forgotten_while_somebody_waits(self):
        self.miss()
        with self.outage.awaited():
            self.pass_by(10 * FORGOTTEN_AFTER)
            self.assertEqual(self.outage.waiting, 1)
            self.assertTrue(self.told())
            self.assertEqual(self.outage.seconds, 10 * FORGOTTEN_AFTER)
        self.assertEqual(self.outage.reached(), 10 * FORGOTTEN_AFTER)

    def test_in_a_forked_child_nobody_waits_and_all_is_news(self):
        server = Server(mock.Mock(), mock.Mock(), {})
        with server.outage.awaited():
            server.outage.missed(self.clock.now)
            server.outage.is_news("away")
            server.reopen_door()
            self.assertEqual(server.outage.waiting, 0)
            self.assertTrue(server.outage.is_news("away"))

    def test_that_the_watchdog_has_cut_a_session_is_told_once(self):
        server = Server(mock.Mock(), mock.Mock(), {})
        with self.assertLogs("zreconnect", logging.DEBUG) as logs:
            server.outage.lost(self.clock.now)
            for _ in range(3):
                session.tell_if_cut(server, mock.Mock(address="s", cut_after=2.0))
        levels = [record.levelno for record in logs.records]
        self.assertEqual(levels, [logging.WARNING, logging.DEBUG, logging.DEBUG])


class AtOnceTests(unittest.TestCase):
    def in_threads(self, function):
        """What it returned in each of several threads that call it at the same moment."""
        returned, barrier = [], threading.Barrier(THREADS)

        def call():
            barrier.wait(PATIENCE)
            returned.append(function())

        threads = [threading.Thread(target=call) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return returned

    def test_one_of_them_tells(self):
        server, opened = Outage(), time.monotonic()
        self.assertEqual(sum(self.in_threads(lambda: server.lost(opened))), 1)
        self.in_threads(lambda: server.missed(time.monotonic()))
        self.assertEqual(sum(self.in_threads(lambda: server.is_news("away"))), 1)
        back = self.in_threads(server.reached)
        self.assertEqual(sum(seconds is not None for seconds in back), 1)


class InterruptTests(unittest.TestCase):
    def test_an_interrupt_leaves_nobody_waiting_and_nothing_locked(self):
        for moment in moments():
            server = Outage()

            def outage_of(server=server):
                server.lost(time.monotonic())
                with server.awaited():
                    server.missed(time.monotonic())
                    server.is_news("away")
                return server.reached()

            goes_on, _ = interrupted(outage_of, outage, moment)
            self.assertEqual(server.waiting, 0)
            server.missed(time.monotonic())
            server.is_news("away")
            server.reached()
            self.assertIsNone(server.reached())
            self.assertIsNone(server.seconds)
            if not goes_on:
                break


class EventTests(unittest.TestCase):
    def all_events(self):
        error = OSError("no\nroute")
        where = ("a",), ("b",), ("c",)
        return [
            events.ConnectionLost("s", error, "idle"),
            events.ConnectionAttemptFailed("s", 1, 0.5, 0.1, error),
            events.Waiting("s", 10.0, 20, error),
            events.Reconnected("s", 2, 0.5, 600.0),
            events.CommitLookedUp("s", "unknown", "COMMIT", "Look here.", 7),
            events.CommittedInPart("s", *where, PartlyCommitted(*where, "why")),
            events.HistoryChanged("s", "timeline", None),
            events.GaveUp("s", 3, 60.0, error, 600.0),
            events.RunAgain("module.job", 1, 0.5, 0.1, error),
            events.GaveUpRunning("module.job", 3, 60.0, error, "the time is up"),
        ]

    def test_the_line_has_its_fields_for_json(self):
        for event in self.all_events():
            with self.subTest(event), self.assertLogs("zreconnect", logging.DEBUG) as logs:
                events.announce(event)
                (record,) = logs.records
                fields = json.loads(json.dumps(own_fields(record)))
                self.assertEqual(fields["event_name"], type(event).__name__)
                self.assertNotIn("\n", record.getMessage() + "".join(map(str, fields.values())))
                self.assertLessEqual(set(vars(event)), set(fields))

    def test_what_is_no_news_is_a_line_for_debugging(self):
        for event in self.all_events():
            known = type(event)(**{**vars(event), "is_news": False})
            is_outcome = isinstance(event, (events.CommitLookedUp, events.HistoryChanged))
            self.assertEqual(known.level, event.level if is_outcome else logging.DEBUG)

    def test_how_long_it_was_away_is_said_by_who_has_waited_for_less(self):
        self.assertIn("; it was away for 600 seconds", str(events.Reconnected("s", 2, 0.5, 600.0)))
        self.assertNotIn("away", str(events.Reconnected("s", 2, 600.0, 600.2)))

    def test_a_conflict_is_no_warning(self):
        conflict = TransientError("deadlock")
        self.assertEqual(events.RunAgain("f", 1, 0.0, 0.0, conflict).level, logging.INFO)
        lost = DisconnectionError("lost")
        self.assertEqual(events.RunAgain("f", 1, 0.0, 0.0, lost).level, logging.WARNING)

    def test_the_evidence_of_an_outcome_is_said_if_it_is_unknown(self):
        for outcome, level in (("unknown", logging.ERROR), ("committed", logging.WARNING)):
            event = events.CommitLookedUp("s", outcome, "COMMIT", "Look here.")
            self.assertEqual(event.level, level)
            self.assertEqual("Look here" in str(event), outcome == "unknown")

    def test_an_error_that_is_told(self):
        error = CommitOutcomeUnknown("s", "COMMIT", "Look here.")
        with self.assertLogs("zreconnect") as logs:
            self.assertIs(events.told(error, 7), error)
        self.assertEqual(own_fields(logs.records[0])["xid"], 7)

    def test_a_subscriber_that_fails_is_logged_with_the_event(self):
        def fail(event):
            raise LookupError("pager is out of order")

        with (
            mock.patch.object(zope.event, "subscribers", [fail]),
            self.assertLogs("zreconnect") as logs,
        ):
            events.announce(events.Reconnected("s", 2, 0.5))
        self.assertEqual([own_fields(each)["server"] for each in logs.records], ["s", "s"])
        self.assertIn("pager is out of order", logs.output[1])

    def test_all_lines_have_fields(self):
        """Of each call of the logger, in the source."""
        calls = 0
        for path in PACKAGE.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and "logger." in ast.unparse(node.func):
                    calls += 1
                    keywords = {keyword.arg for keyword in node.keywords}
                    self.assertIn("extra", keywords, f"{path.name}, line {node.lineno}")
        self.assertGreater(calls, 10)


class AdviceTests(unittest.TestCase):
    def test_it_fits_the_cause(self):
        for message, word in (
            ("connection to server at 127.0.0.1, port 1 failed: Connection refused", "Start"),
            ('could not translate host name "dbb" to address: Name or service not known', "name"),
            ("(2005, \"Unknown MySQL server host 'dbb' (-2)\")", "name"),
            ("FATAL:  sorry, too many clients already", "End connections"),
            ("(1040, 'Too many connections')", "End connections"),
            ("more than 'max_user_connections' active connections", "End connections"),
            ("can't start new thread", "fewer threads"),
            ("[Errno 24] Too many open files", "files"),
            ("database is locked", "transaction of the other program"),
            ('database "shop" is not currently accepting connections', "let connections in"),
            ("the database system is not yet accepting connections", "log"),
            ("the database system is starting up", "log"),
            ("WSREP has not yet prepared node for application use", "log"),
            ("no answer within 2.0 seconds", "machine is up"),
            ("server closed the connection unexpectedly", "pooler or proxy"),
            ("SSL SYSCALL error: EOF detected", "pooler or proxy"),
            ("ein Fehler, den niemand kennt", "Start"),
        ):
            with self.subTest(message):
                self.assertIn(word, advice(OSError(message)))


class SimulatedTime:
    """Stands for the module time in threads. It goes on when all of them sleep."""

    def __init__(self, threads):
        self._condition = threading.Condition()
        # After all that happens in real time.
        self._now = time.monotonic() + TEN_MINUTES
        self._working = threads
        self._alarms = []

    def monotonic(self):
        return self._now

    def sleep(self, seconds):
        if seconds <= 0:
            return
        with self._condition:
            # Later in any case: the sum of floats may not be.
            alarm = max(self._now + seconds, math.nextafter(self._now, math.inf))
            self._alarms.append(alarm)
            self.leave()
            self._condition.wait_for(lambda: self._now >= alarm)

    def leave(self):
        """For a thread that does nothing, or nothing any more."""
        with self._condition:
            self._working -= 1
            if self._working == 0 and self._alarms:
                self._now = min(self._alarms)
                due = [alarm for alarm in self._alarms if alarm <= self._now]
                self._alarms = [alarm for alarm in self._alarms if alarm > self._now]
                self._working += len(due)
                self._condition.notify_all()


class ThreadsTestCase(DatabaseTestCase):
    """Twenty threads lose their sessions at the same moment."""

    policy = RetryPolicy()

    def setUp(self):
        super().setUp()
        self.barrier = threading.Barrier(THREADS, self.lose, PATIENCE)
        # A server of its own, of which nothing was told before.
        self.dsn += f"?application_name={self.id()}"

    def lose(self):
        self.forward.refuse()
        self.forward.drop()

    def nightly_sums(self, connection, runs):
        """A unit of work; each thread's first one is lost."""
        runs.append(1)
        connection.execute("SELECT 1")
        if len(runs) == 1:
            self.barrier.wait()
            connection.execute("SELECT 1")

    def start(self, run, at_end=lambda: None):
        """Call ``run`` with each thread's connection and unit of work; returns the threads."""

        def work(connection):
            try:
                run(connection, functools.partial(self.nightly_sums, connection, []))
            finally:
                at_end()

        connections = [self.connect(policy=self.policy) for _ in range(THREADS)]
        threads = [threading.Thread(target=work, args=[each]) for each in connections]
        for thread in threads:
            thread.start()
        self.outage = connections[0].work.link.server.outage
        self.address = connections[0].server
        return threads

    def read(self, logs):
        """The records that are seen at INFO, and all of them by the names of their events."""
        by_name = collections.defaultdict(list)
        for record in logs.records:
            fields = json.loads(json.dumps(own_fields(record)))
            by_name[fields.get("event_name")].append(record)
        seen = [record for record in logs.records if record.levelno >= logging.INFO]
        lines = [record.getMessage() for record in seen]
        self.assertLessEqual(len(lines), LINES, "\n".join(lines))
        for words in (f"Lost the connection to {self.address} while active", "onnection refused"):
            self.assertTrue(any(words in line for line in lines), lines)
        self.assertIn(f"Connected again to {self.address} after ", lines[-1])
        return seen, by_name


def seconds_told(records):
    return [int(record.seconds) for record in records if record.levelno >= logging.WARNING]


class TenMinutesTests(ThreadsTestCase):
    # The pauses are long, so that the test is short.
    policy = RetryPolicy(maximum=20.0)

    def lose(self):
        self.back = self.clock.monotonic() + TEN_MINUTES
        self.forward.drop()

    def outage_of_ten_minutes(self, run):
        self.clock, self.back, connect = SimulatedTime(THREADS), 0.0, Server.connect

        def connect_later(server, *arguments, **keywords):
            if self.clock.monotonic() < self.back:
                raise AttemptFailed(ConnectionRefusedError("Connection refused"))
            return connect(server, *arguments, **keywords)

        with contextlib.ExitStack() as stack:
            for module in (session, outage, retry):
                stack.enter_context(mock.patch.object(module, "time", self.clock))
            stack.enter_context(mock.patch.object(Server, "connect", connect_later))
            logs = stack.enter_context(self.assertLogs("zreconnect", logging.DEBUG))
            for thread in self.start(run, self.clock.leave):
                thread.join()
        seen, by_name = self.read(logs)
        # The first attempt may be made after a pause.
        self.assertGreater(seen[-1].away, TEN_MINUTES - 20)
        return seen, by_name

    def test_threads_that_wait(self):
        seen, by_name = self.outage_of_ten_minutes(lambda connection, unit: connection.run(unit))
        self.assertEqual(seconds_told(by_name["Waiting"]), [0, 10, 60, 360])
        self.assertIn(f"{THREADS} threads wait for it. Start the server", seen[-2].getMessage())
        self.assertRegex(seen[-1].getMessage(), r"and 6\d\d\.\d seconds")
        self.assertEqual(
            collections.Counter(record.event_name for record in seen),
            {"ConnectionLost": 1, "RunAgain": 1, "Waiting": 4, "Reconnected": 1},
        )
        for name in ("ConnectionLost", "RunAgain", "Reconnected"):
            self.assertEqual(len(by_name[name]), THREADS)
        self.assertGreater(len(by_name["ConnectionAttemptFailed"]), 10 * THREADS)

    def again_and_again(self, connection, unit):
        @retry_on_disconnect(timeout=None, min_interval=10, max_interval=10)
        def nightly_sums():
            with connection.transaction():
                unit()

        nightly_sums()

    def give_up(self, **policy):
        self.policy = RetryPolicy(**policy)
        seen, by_name = self.outage_of_ten_minutes(self.again_and_again)
        told = collections.Counter(record.event_name for record in seen)
        self.assertLessEqual(max(told.values()), 4, told)
        self.assertGreater(len(by_name["GaveUp"]), 5 * THREADS)
        self.assertIn("; it was away for ", seen[-1].getMessage())

    def test_threads_that_give_up_and_begin_again(self):
        self.give_up(timeout=60.0, maximum=20.0)

    def test_threads_that_fail_at_once_and_come_again(self):
        self.give_up(attempts=1)


class ShortOutageTests(ThreadsTestCase):
    def test_it_is_told_once(self):
        with self.assertLogs("zreconnect", logging.DEBUG) as logs:
            threads = self.start(lambda connection, unit: connection.run(unit))
            wait_until(lambda: "No connection to" in "".join(logs.output))
            wait_until(lambda: self.outage.waiting == THREADS)
            self.forward.accept()
            for thread in threads:
                thread.join()
        seen, by_name = self.read(logs)
        told = collections.Counter(record.event_name for record in seen)
        self.assertEqual((told["ConnectionLost"], told["RunAgain"]), (1, 1))
        for name in ("ConnectionLost", "RunAgain", "Reconnected"):
            self.assertEqual(len(by_name[name]), THREADS)
        attempts = by_name["ConnectionAttemptFailed"]
        self.assertEqual({record.levelno for record in attempts}, {logging.DEBUG})

    def test_a_commit_of_the_programs_own_that_is_lost_is_an_error_with_its_evidence(self):
        connection = self.connect()
        connection.begin()
        connection.execute("CREATE TABLE own ()")
        self.forward.cut("to_client", 0)
        with (
            self.assertLogs("zreconnect", logging.ERROR) as logs,
            self.assertRaises(CommitOutcomeUnknown),
        ):
            connection.execute("COMMIT")
        (record,) = logs.records
        self.assertIn("pg_xact_status", record.evidence)
        self.assertIn(str(record.xid), record.evidence)

    def test_a_signals_handler_that_raises_in_the_middle_of_it(self):
        def handler(*_):
            raise LookupError("time is up")

        self.addCleanup(signal.signal, signal.SIGUSR1, signal.signal(signal.SIGUSR1, handler))
        connection = self.connect()
        connection.begin()
        connection.rollback()
        self.lose()
        with self.assertLogs("zreconnect") as logs:
            clock = mock.Mock(wraps=time)
            clock.sleep = lambda seconds: signal.raise_signal(signal.SIGUSR1)
            with mock.patch.object(session, "time", clock), self.assertRaises(LookupError):
                connection.begin()
            self.assertEqual(connection.work.link.server.outage.waiting, 0)
            self.forward.accept()
            connection.begin()
        self.assertIn("Connected again", logs.output[-1])

    def test_that_a_server_is_back_is_told_by_whoever_has_the_first_session(self):
        gave_up, other = self.connect(), self.connect()
        self.forward.refuse()
        with policy_of(gave_up, timeout=0), self.assertRaises(ReconnectTimeout):
            gave_up.begin()
        self.forward.accept()
        with self.assertLogs("zreconnect") as logs:
            other.begin()
        (line,) = logs.output
        self.assertIn(f"Connected again to {other.server} after 1 attempt", line)

    def test_a_traceback_has_frames_of_this_package_only(self):
        connection = self.connect()
        self.forward.refuse()
        with policy_of(connection, timeout=0), self.assertRaises(ReconnectTimeout) as gave_up:
            connection.begin()
        frames = traceback.extract_tb(gave_up.exception.__traceback__)
        for frame in frames:
            self.assertTrue(Path(frame.filename).is_relative_to(PACKAGE), frame)
        self.assertLess(len(frames), 12)
