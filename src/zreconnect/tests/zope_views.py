"""Views that lose their database connection in all the places where a request can.

`zope_views.zcml` adds them to a copy of an example application. They write ``attempt N`` into the
guest book, where N counts how often the publisher called the view.
"""

import contextlib
from collections import Counter

import transaction
from zope.component import getUtility
from zope.interface import implementer
from zope.publisher.browser import BrowserView
from zope.publisher.http import DirectResult
from ZPublisher.Iterators import IUnboundStreamIterator

from zreconnect.interfaces import IZopeDatabaseAdapter
from zreconnect.tests import losses

attempts = Counter()


def new_cursor():
    return getUtility(IZopeDatabaseAdapter, "guestbook")().cursor()


def write(cursor, name):
    cursor.execute("INSERT INTO guest VALUES (%s)", [name])


class Attempts(BrowserView):
    """How often the publisher has called the other views."""

    def __call__(self):
        self.request.response.setHeader("Content-Type", "text/plain")
        return str(attempts.total() + losses.attempts.total())


class AttemptView(BrowserView):
    def __call__(self):
        self.request.response.setHeader("Content-Type", "text/plain")
        attempts[type(self).__name__] += 1
        attempt = attempts[type(self).__name__]
        cursor = new_cursor()
        write(cursor, f"attempt {attempt}")
        return self.work(cursor, attempt) or f"attempt {attempt}"

    def work(self, cursor, attempt):
        self.loss(cursor, attempt, transaction.manager)


class LosesOnce(AttemptView):
    loss = staticmethod(losses.loses_once)


class LosesAlways(AttemptView):
    loss = staticmethod(losses.loses_always)


class Swallows(AttemptView):
    loss = staticmethod(losses.swallows)


class SwallowsEverything(AttemptView):
    """Returns normally, even if there was no connection."""

    def __call__(self):
        with contextlib.suppress(Exception):
            super().__call__()
        return "fine"

    def work(self, cursor, attempt):
        """It has written, and that is all."""


class RollsBackToSavepoint(AttemptView):
    loss = staticmethod(losses.rolls_back_to_savepoint)


class LosesInDel(AttemptView):
    loss = staticmethod(losses.loses_in_del)


class Conflicts(AttemptView):
    loss = staticmethod(losses.conflicts)


class Deadlocks(AttemptView):
    loss = staticmethod(losses.deadlocks)


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
        losses.lose_connection(cursor)


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
    loss = staticmethod(losses.waits_at_gate)


class ReceivesFile(BrowserView):
    def __call__(self):
        return losses.receive("file", self.request.form["file"], new_cursor()).decode()


class ReceivesBody(BrowserView):
    def __call__(self):
        if hasattr(self.request, "bodyStream"):
            body = self.request.bodyStream
        else:
            body = self.request["BODYFILE"]
        return losses.receive("body", body, new_cursor()).decode()


class Mistaken(BrowserView):
    def __call__(self):
        raise ZeroDivisionError


class AnyError(BrowserView):
    """The site's page for all exceptions."""

    def __call__(self):
        self.request.response.setStatus(500)
        self.request.response.setHeader("Content-Type", "text/plain")
        return "Sorry"


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
