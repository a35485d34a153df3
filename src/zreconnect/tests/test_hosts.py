"""A server with several places to be at: which one gives the connection, and what is raised."""

import sqlite3
import threading
import unittest
from unittest import mock

from zreconnect import hosts, server
from zreconnect.drivers.sqlite import SqliteDriver
from zreconnect.tests.base import PATIENCE, wait_until
from zreconnect.tests.test_server import Hanging, connection

# Seconds. Some of what is waited for in vain takes a part of it.
TIMEOUT = 3.0
LOCKED = sqlite3.OperationalError("database is locked")
REFUSED = sqlite3.OperationalError("unable to open database file")


class Driver(SqliteDriver):
    """Its parameters are the places."""

    def places(self, parameters):
        return parameters if isinstance(parameters, list) else [parameters]


def failing(error):
    return mock.Mock(side_effect=error)


def open_place(place, timeout):
    return place()


def names(*places):
    """What stands for them from one attempt to the next."""
    return {hash(repr(place)) for place in places}


def at_once(rounds):
    """The pause between two rounds."""
    return 0.0


class HostsTests(unittest.TestCase):
    def setUp(self):
        self.threads_before = set(threading.enumerate())

    def connect(self, *places, timeout=PATIENCE, **more):
        raw = hosts.connect(Driver(), list(places), timeout, open_place, **more)
        self.addCleanup(raw.close)
        return raw

    def fails(self, *places, timeout=PATIENCE, **more):
        with self.assertRaises(sqlite3.OperationalError) as failed:
            self.connect(*places, timeout=timeout, **more)
        return failed.exception

    def hanging(self):
        hanging = Hanging()
        self.addCleanup(hanging.end)
        return hanging

    def test_one_is_tried_in_the_same_thread(self):
        seen = []
        self.connect(lambda: seen.append(threading.current_thread()) or connection())
        self.assertEqual(seen, [threading.current_thread()])

    def test_the_first_that_gives_a_connection(self):
        second, third = mock.Mock(side_effect=connection), mock.Mock(side_effect=connection)
        self.connect(failing(LOCKED), second, third)
        self.assertEqual((second.called, third.called), (True, False))

    def test_a_silent_one_keeps_no_other_from_being_tried(self):
        silent, late, second = self.hanging(), connection(), connection()
        self.assertIs(self.connect(silent, lambda: second, timeout=TIMEOUT), second)
        silent.end(lambda: late)
        wait_until(lambda: late.is_closed)
        self.assertFalse(second.is_closed)

    def test_two_that_are_late(self):
        failing_late, silent, late, raw = self.hanging(), self.hanging(), connection(), connection()
        self.assertIs(self.connect(failing_late, silent, lambda: raw, timeout=TIMEOUT), raw)
        attempts = [each for each in threading.enumerate() if each not in self.threads_before]
        failing_late.end(failing(LOCKED))
        wait_until(lambda: sum(attempt.is_alive() for attempt in attempts) == 1)
        silent.end(lambda: late)
        wait_until(lambda: late.is_closed)

    def test_a_slow_one_is_not_given_up_for_the_next(self):
        slow, raw = self.hanging(), connection()

        def end_slow():
            slow.end(lambda: raw)
            raise LOCKED

        self.assertIs(self.connect(slow, end_slow, timeout=TIMEOUT), raw)

    def test_a_silent_one_that_fails_while_the_next_is_tried(self):
        silent, raw = self.hanging(), connection()

        def second():
            silent.end(failing(LOCKED))
            threading.Event().wait(0.1)
            return raw

        self.assertIs(self.connect(silent, second, timeout=TIMEOUT), raw)

    def test_places_in_places(self):
        raw = connection()
        self.assertIs(
            self.connect([self.hanging(), failing(LOCKED)], lambda: raw, timeout=TIMEOUT), raw
        )
        self.assertIs(
            self.connect(failing(LOCKED), [self.hanging(), lambda: raw], timeout=TIMEOUT), raw
        )

    def test_all_places_in_a_place_are_tried_before_the_next(self):
        last, raw = mock.Mock(side_effect=connection), connection()
        places = [failing(LOCKED), self.hanging(), lambda: raw]
        self.assertIs(self.connect(places, last, timeout=2 * TIMEOUT), raw)
        self.assertFalse(last.called)

    def test_all_fail(self):
        other = sqlite3.OperationalError("database table is locked\n")
        error = self.fails(failing(LOCKED), failing(other))
        self.assertEqual(str(error), "database is locked\ndatabase table is locked")

    def test_all_are_silent(self):
        with self.assertRaisesRegex(TimeoutError, "no answer within 0.1 seconds"):
            self.connect(self.hanging(), self.hanging(), timeout=0.1)

    def test_one_fails_and_one_is_silent(self):
        error = self.fails(self.hanging(), failing(LOCKED), timeout=0.1)
        self.assertEqual(str(error), "database is locked")

    def test_a_refusal_is_raised_if_no_other_gives_a_connection(self):
        raw = connection()
        self.assertIs(self.connect(failing(REFUSED), lambda: raw), raw)
        self.assertIs(self.fails(failing(REFUSED), failing(LOCKED)), REFUSED)
        # All have had their share of the time.
        self.assertIs(self.fails(self.hanging(), failing(REFUSED), timeout=TIMEOUT), REFUSED)
        self.assertIs(self.fails(failing(REFUSED), self.hanging(), timeout=TIMEOUT), REFUSED)

    def test_who_has_failed_is_asked_again_while_another_is_silent(self):
        raw, silent = connection(), self.hanging()
        standby = mock.Mock(side_effect=[LOCKED, LOCKED, raw])
        self.assertIs(self.connect(silent, standby, pauses=at_once, silent=names(silent)), raw)
        self.assertEqual(standby.call_count, 3)

    def test_it_is_not_if_it_refuses_for_good(self):
        refusing, silent = mock.Mock(side_effect=[LOCKED, REFUSED]), self.hanging()
        error = self.fails(silent, refusing, pauses=at_once, silent=names(silent))
        self.assertIs(error, REFUSED)

    def test_nor_if_the_silent_one_has_failed_as_well(self):
        silent, standby = self.hanging(), failing(LOCKED)

        def pause(rounds):
            silent.end(failing(LOCKED))
            return PATIENCE

        self.fails(silent, standby, pauses=pause, silent=names(silent))
        self.assertEqual(standby.call_count, 1)

    def test_a_silent_one_that_answers_between_two_rounds(self):
        silent, raw = self.hanging(), connection()

        def pause(rounds):
            silent.end(lambda: raw)
            return PATIENCE

        self.assertIs(
            self.connect(silent, failing(LOCKED), pauses=pause, silent=names(silent)), raw
        )

    def test_who_was_silent_is_asked_last_until_it_has_answered(self):
        raws = [connection() for _ in range(4)]
        hanging, second = self.hanging(), mock.Mock(side_effect=[raws[0], raws[1], LOCKED])
        first = mock.Mock(side_effect=hanging)
        places = hosts.Places(Driver(), [first, second], open_place)
        self.assertIs(places.connect(TIMEOUT, at_once), raws[0])
        self.assertIs(places.connect(TIMEOUT, at_once), raws[1])
        self.assertEqual((first.call_count, second.call_count), (1, 2))
        first.side_effect = [raws[2], raws[3]]
        self.assertIs(places.connect(TIMEOUT, at_once), raws[2])
        self.assertIs(places.connect(TIMEOUT, at_once), raws[3])
        self.assertEqual((first.call_count, second.call_count), (3, 3))
        for raw in raws:
            raw.close()

    def test_in_whatever_order_they_are(self):
        raws = [connection() for _ in range(2)]
        first, second = mock.Mock(side_effect=self.hanging()), mock.Mock(side_effect=raws)
        both = [first, second]
        places = hosts.Places(Driver(), both, open_place)
        for raw in raws:
            self.assertIs(places.connect(TIMEOUT, at_once), raw)
            raw.close()
            both.reverse()
        self.assertEqual((first.call_count, second.call_count), (1, 2))

    def test_it_is_not_waited_for_before_the_others_are_asked_again(self):
        raw = connection()
        standby = mock.Mock(side_effect=[LOCKED, raw])
        places = self.hanging(), standby
        silent = names(places[0])
        self.assertIs(self.connect(*places, timeout=1e6, pauses=at_once, silent=silent), raw)
        self.assertEqual(silent, names(places[0]))

    def test_without_threads_it_is_a_failure_that_passes(self):
        error = RuntimeError(server.NO_THREAD)
        with (
            mock.patch("threading.Thread.start", side_effect=error),
            self.assertRaises(RuntimeError) as raised,
        ):
            self.connect(connection, connection)
        self.assertIs(raised.exception, error)
        some = server.server_from_factory(connection, "sqlite")
        self.assertTrue(some.passes(error))
        self.assertFalse(some.passes(RuntimeError("another")))
