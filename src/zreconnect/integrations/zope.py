"""What Zope's two publishers answer when the database cannot be reached: 503, and come again.

And what ``ZPublisher`` needs to run a request again.

It is configured by ``<include package="zreconnect" />``.
"""

from __future__ import annotations

import io
from typing import Any

from zreconnect.integrations.wsgi import EXPLANATION, RETRY_AFTER, KeptOpen, whole_body
from zreconnect.interfaces import IDatabaseUnavailable


class DatabaseUnavailableView:
    """The exception view for `IDatabaseUnavailable`: 503 Service Unavailable, with Retry-After.

    Zope calls it when the request is not, or no longer, run again. To answer with a page of its
    own, an application registers a view with the name ``index.html`` for `IDatabaseUnavailable`
    and IBrowserRequest, or a layer; it comes before this one.
    """

    def __init__(self, error: BaseException, request: Any) -> None:
        self.request = request

    def __call__(self) -> bytes:
        response = self.request.response
        response.setStatus(503)
        response.setHeader("Retry-After", str(RETRY_AFTER))
        response.setHeader("Content-Type", "text/plain; charset=utf-8")
        return b"" if self.request.method == "HEAD" else EXPLANATION


def keep_body(event: Any) -> None:
    """Have ZPublisher's request read its body from a file that can be rewound; for `IPubStart`.

    ZPublisher rewinds what the server has given it. Not every server's input can be, and none that
    a view has closed.
    """
    request = event.request
    seekable = getattr(request.stdin, "seekable", None)
    if seekable is None or not seekable():
        request.stdin = whole_body(request.environ) or io.BytesIO()
    request.stdin = KeptOpen(request.stdin)
    request.environ["wsgi.input"] = request.stdin


def retry_at_once(event: Any) -> None:
    """Have ZPublisher run a request again at once that has lost its database; for `IPubFailure`.

    ZPublisher sleeps before a retry, for up to one, two and then four seconds. That parts requests
    that conflict with each other, but here it only makes the client wait: how long a request waits
    for its database is for the adapter to say.
    """
    if event.retry and IDatabaseUnavailable.providedBy(event.exc_info[1]):
        # What ZPublisher calls to sleep; the next attempt has a request of its own.
        event.request.delay_retry = _no_delay


def _no_delay() -> None:
    """The request need not wait."""
