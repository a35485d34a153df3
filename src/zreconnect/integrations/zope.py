"""What Zope's two publishers answer when the database cannot be reached: 503, and come again.

It is configured by ``<include package="zreconnect" />``.
"""

from __future__ import annotations

from typing import Any

#: Seconds after which a client may come again.
RETRY_AFTER = 5
MESSAGE = "The database is not available at the moment. Please try again in a few seconds.\n"


class DatabaseUnavailableView:
    """The exception view for `IDatabaseUnavailable`: 503 Service Unavailable, with Retry-After.

    Zope calls it when the request is not, or no longer, run again. To answer with a page of its
    own, an application registers a view with the name ``index.html`` for `IDatabaseUnavailable`
    and IBrowserRequest, or a layer; it comes before this one.
    """

    def __init__(self, error: BaseException, request: Any) -> None:
        self.request = request

    def __call__(self) -> str:
        response = self.request.response
        response.setStatus(503)
        response.setHeader("Retry-After", str(RETRY_AFTER))
        response.setHeader("Content-Type", "text/plain; charset=utf-8")
        return MESSAGE
