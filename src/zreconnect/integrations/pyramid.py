"""Pyramid: 503 Service Unavailable without database, and whole bodies for requests that run again.

``config.include()`` takes this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from zreconnect.exceptions import DisconnectionError, ReconnectTimeout
from zreconnect.integrations import needs
from zreconnect.integrations.wsgi import EXPLANATION, RETRY_AFTER, STATUS, KeptOpen

with needs(__name__, "zreconnect[pyramid]"):
    from pyramid.response import Response
    from pyramid.tweens import EXCVIEW

Handler = Callable[[Any], Any]

# Exception views are for classes, and for interfaces that extend one of Pyramid's.
UNAVAILABLE = (DisconnectionError, ReconnectTimeout)
# In the environment of an attempt: what there was of the body before it.
_BODY = "zreconnect.body"


def includeme(config: Any) -> None:
    """Register `service_unavailable` as the exception view of an unreachable database.

    An application's own exception view for the same error takes its place. pyramid_retry
    discards its response if the request is run again.
    """
    for error in UNAVAILABLE:
        config.add_exception_view(service_unavailable, context=error)
    config.add_tween(
        "zreconnect.integrations.pyramid.tween_factory",
        over=("pyramid_tm.tm_tween_factory", EXCVIEW),
    )
    with contextlib.suppress(ModuleNotFoundError):
        config.add_subscriber(rewind_body, "pyramid_retry.IBeforeRetry")


def keep_body(environ: dict[str, Any]) -> None:
    """Let an attempt do what it likes with the request's body, of which pyramid_retry has made a
    file if there are several."""
    if environ.get("webob.is_body_seekable"):
        names = {"wsgi.input", "CONTENT_LENGTH", "CONTENT_TYPE"} & set(environ)
        environ[_BODY] = {name: environ[name] for name in names}
        environ["wsgi.input"] = KeptOpen(environ["wsgi.input"])


def rewind_body(event: Any) -> None:
    """Have the next attempt find the request's body as this one did; for `IBeforeRetry`.

    pyramid_retry does not rewind the file that it has made. WebOb keeps the form that it has read,
    with the uploaded files where the view has left them, in the environment of all attempts.
    """
    event.environ.update(event.environ.pop(_BODY, {}))
    event.environ.pop("webob._parsed_post_vars", None)
    event.request.make_body_seekable()


def service_unavailable(error: BaseException, request: Any) -> Any:
    """The exception view: 503 Service Unavailable, in plain text."""
    response = Response(EXPLANATION, STATUS, content_type="text/plain", charset="utf-8")
    response.retry_after = RETRY_AFTER
    return response


def tween_factory(handler: Handler, registry: Any) -> Handler:
    """Have the exception view answer what is raised outside of Pyramid's own tween for that, and
    each attempt find the request's body.

    pyramid_tm asks for the user before it calls that tween, and that can ask the database.
    """

    def tween(request: Any) -> Any:
        keep_body(request.environ)
        try:
            return handler(request)
        except UNAVAILABLE:
            return request.invoke_exception_view(reraise=True)

    return tween
