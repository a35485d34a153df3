"""Starting a thread, in which an interrupt comes."""

import sys
import threading
import unittest
from unittest import mock

from zreconnect.tests.base import PATIENCE
from zreconnect.threads import start_thread


class Alarm(Exception):
    """What a signal's handler raises."""


class StartTests(unittest.TestCase):
    def setUp(self):
        self.has_run = threading.Event()
        self.thread = threading.Thread(target=self.has_run.set, daemon=True)

    def test_it_runs(self):
        start_thread(self.thread)
        self.assertTrue(self.has_run.wait(PATIENCE))

    def test_an_interrupt_when_it_runs_already(self):
        alarm = Alarm()

        def start_and_interrupt(*arguments, **keywords):
            start(*arguments, **keywords)
            self.assertTrue(self.has_run.wait(PATIENCE))
            raise alarm

        name = "_start_joinable_thread" if sys.version_info >= (3, 13) else "_start_new_thread"
        start = getattr(threading, name)
        with mock.patch.object(threading, name, start_and_interrupt):
            with self.assertRaises(Alarm) as raised:
                start_thread(self.thread)
            self.assertIs(raised.exception, alarm)
            self.setUp()
            with self.assertRaises(Alarm) as raised:
                try:
                    raise LookupError
                except LookupError:
                    start_thread(self.thread)
            self.assertIs(raised.exception, alarm)

    def test_without_threads(self):
        error = RuntimeError("can't start new thread")
        with (
            mock.patch.object(threading.Thread, "start", side_effect=error),
            self.assertRaises(RuntimeError) as raised,
        ):
            try:
                raise LookupError
            except LookupError:
                start_thread(self.thread)
        self.assertIs(raised.exception, error)
