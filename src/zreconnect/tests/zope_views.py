"""Views that lose their database connection in all the places where a request can.

`zope_views.zcml` adds them to a copy of an example application. They write ``attempt N`` into the
guest book, where N counts how often the publisher called the view.
"""

import contextlib
import os
from collections import Counter

import transaction
from zope.component import getUtility
from zope.interface import implementer
from zope.publisher.browser import BrowserView
from zope.publisher.http import DirectResult
from ZPublisher.Iterators import IUnboundStreamIterator

from zreconnect import DisconnectionError
from zreconnect.interfaces import IZopeDatabaseAdapter

attempts = Counter()


def new_cursor():
    return getUtility(IZopeDatabaseAdapter, "guestbook")().cursor()


def write(cursor, name):
    cursor.execute("INSERT INTO guest VALUES (%s)", [name])


def lose_connection(cursor):
    cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")


class Attempts(BrowserView):
    """How often the publisher has called the other views."""

    def __call__(self):
        self.request.response.setHeader("Content-Type", "text/plain")
        return str(attempts.total())


class AttemptView(BrowserView):
    def __call__(self):
        self.request.response.setHeader("Content-Type", "text/plain")
        attempts[type(self).__name__] += 1
        attempt = attempts[type(self).__name__]
        cursor = new_cursor()
        write(cursor, f"attempt {attempt}")
        return self.work(cursor, attempt) or f"attempt {attempt}"


class LosesOnce(AttemptView):
    def work(self, cursor, attempt):
        if attempt == 1:
            lose_connection(cursor)


class LosesAlways(AttemptView):
    def work(self, cursor, attempt):
        lose_connection(cursor)


class Swallows(AttemptView):
    """Returns normally after the loss."""

    def work(self, cursor, attempt):
        if attempt == 1:
            with contextlib.suppress(DisconnectionError):
                lose_connection(cursor)


class SwallowsEverything(AttemptView):
    """Returns normally, even if there was no connection."""

    def __call__(self):
        with contextlib.suppress(Exception):
            super().__call__()
        return "fine"

    def work(self, cursor, attempt):
        """It has written, and that is all."""


class RollsBackToSavepoint(AttemptView):
    """Takes the loss for an error that a savepoint helps against."""

    def work(self, cursor, attempt):
        savepoint = transaction.savepoint()
        if attempt == 1:
            try:
                lose_connection(cursor)
            except DisconnectionError:
                savepoint.rollback()


class LosesInDel(AttemptView):
    """The loss meets code whose errors Python ignores."""

    def work(self, cursor, attempt):
        if attempt == 1:
            Finalized(cursor)


class Finalized:
    def __init__(self, cursor):
        self.cursor = cursor

    def __del__(self):
        lose_connection(self.cursor)


class Streams(AttemptView):
    """The transaction is committed before the response is sent, which uses the database again."""

    def work(self, cursor, attempt):
        if hasattr(self.request.response, "setBody"):
            return Stream(self.chunks())
        return DirectResult(self.chunks())

    def chunks(self):
        yield b"streamed "
        cursor = new_cursor()
        write(cursor, "streamed")
        lose_connection(cursor)


class StreamsWithoutLoss(Streams):
    def chunks(self):
        yield b"streamed "
        write(new_cursor(), "streamed")
        yield b"all"


@implementer(IUnboundStreamIterator)
class Stream:
    """What ZPublisher streams."""

    def __init__(self, chunks):
        self.chunks = chunks

    def __iter__(self):
        return self.chunks

    def __next__(self):
        return next(self.chunks)


class WaitsAtGate(AttemptView):
    """Goes on, to the commit, when the test has opened and closed the pipe."""

    def work(self, cursor, attempt):
        with open(os.environ["GATE"]) as gate:
            gate.read()


class Unavailable(BrowserView):
    """The application's own page for `IDatabaseUnavailable`."""

    def __call__(self):
        self.request.response.setStatus(503)
        self.request.response.setHeader("Content-Type", "text/plain")
        return "Closed at the moment"


class UnknownOutcome(BrowserView):
    """The application's own page for `CommitOutcomeUnknown`."""

    def __call__(self):
        self.request.response.setStatus(500)
        self.request.response.setHeader("Content-Type", "text/plain")
        return "Please look whether it is there"
