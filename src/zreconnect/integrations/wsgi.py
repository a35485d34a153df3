"""WSGI middleware: 503 Service Unavailable without database, and whole responses to retry.

A pipeline of PasteDeploy that uses repoze.retry and repoze.tm2 is, from the outside to the inside::

    pipeline =
        egg:zreconnect#service_unavailable
        egg:repoze.retry#retry
        egg:zreconnect#whole_response
        egg:repoze.tm2#tm
        application
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any

from zreconnect.interfaces import IDatabaseUnavailable
from zreconnect.policy import check_number

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

STATUS = "503 Service Unavailable"
RETRY_AFTER = 5
EXPLANATION = b"The service is not available at the moment. Please try again in a few seconds.\n"
# What is read of a body at a time, and how much of it is kept in memory, in bytes.
_CHUNK = 1 << 16
_IN_MEMORY = 1 << 20


class ServiceUnavailable:
    """Middleware that answers 503 Service Unavailable when the database cannot be reached.

    It belongs outside of everything that runs requests again and that ends transactions. What it
    answers are errors that provide `IDatabaseUnavailable`, raised by the application or by its
    response; others pass. So do all once a part of the response was sent: it breaks off.

    A body whose length only its end tells is read before, and then has a length: repoze.retry would
    take it for empty.

    application: the WSGI application.
    retry_after: the seconds after which the client is told to try again, rounded up.

    Raises TypeError or ValueError if ``retry_after`` is no number of at least 0.
    """

    def __init__(self, application: WSGIApplication, retry_after: float = RETRY_AFTER) -> None:
        check_number("retry_after", retry_after, at_least=0)
        self.application = application
        self.retry_after = retry_after

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        def answer(error: Exception) -> Iterable[bytes]:
            return self._answer(error, environ, start_response)

        if not environ.get("CONTENT_LENGTH"):
            body = whole_body(environ)
            if body is not None:
                environ["CONTENT_LENGTH"] = str(body.seek(0, 2))
                body.seek(0)
                environ["wsgi.input"] = body
        try:
            response = self.application(environ, start_response)
        except Exception as error:
            return answer(error)
        return _Response(response, answer)

    def _answer(
        self, error: Exception, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        if not IDatabaseUnavailable.providedBy(error):
            raise error
        headers = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(EXPLANATION))),
            ("Retry-After", str(math.ceil(self.retry_after))),
        ]
        # Raises the error if the server has sent headers already.
        start_response(STATUS, headers, sys.exc_info())
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [EXPLANATION]


class _Response:
    """The chunks of an application's response, or of the ``answer`` to an error of its iterator."""

    def __init__(
        self, response: Iterable[bytes], answer: Callable[[Exception], Iterable[bytes]]
    ) -> None:
        self._response = response
        self._answer = answer
        self._chunks = iter(response)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            return next(self._chunks)
        except StopIteration:
            raise
        except Exception as error:
            self._chunks = iter(self._answer(error))
            return next(self._chunks)

    def close(self) -> None:
        _close(self._response)


class WholeResponse:
    """Middleware that runs the application to the end of its response before it returns.

    repoze.retry runs a request again if the call of the application raises. repoze.tm2 returns
    from that call before it has called the application in its turn, and commits after the last
    chunk of the response. Between the two, this makes what the application, its response and the
    commit raise an error of the call. The response is held in memory meanwhile.

    repoze.retry rewinds the request's body for the next attempt, and leaves in the environment what
    the application has made of it, such as WebOb's files, read to their end. After an error the
    environment is as it was before. The application cannot close the body.

    application: the WSGI application.
    """

    def __init__(self, application: WSGIApplication) -> None:
        self.application = application

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        before = dict(environ)
        environ["wsgi.input"] = KeptOpen(environ["wsgi.input"])
        try:
            started, chunks = self._run(environ)
        except BaseException:
            environ.clear()
            environ.update(before)
            raise
        start_response(*started)
        return chunks

    def _run(self, environ: WSGIEnvironment) -> tuple[list[Any], list[bytes]]:
        chunks: list[bytes] = []
        started: list[Any] = []

        def take_down(*arguments: Any) -> Callable[[bytes], object]:
            started[:] = arguments
            return chunks.append

        response = self.application(environ, take_down)
        try:
            chunks.extend(response)
        finally:
            _close(response)
        return started, chunks


class _Body(tempfile.SpooledTemporaryFile[bytes]):
    """It is closed with the last reference to it."""

    def __del__(self) -> None:
        self.close()

    def seekable(self) -> bool:
        # Python 3.10 does not say.
        return True


class KeptOpen:
    """A request's body, which a view can close for itself only: the next attempt reads it, too.

    ``with request.body_file:`` closes it, and so does an `io.TextIOWrapper` that is given up.

    file: the body as it is, which this one is in all else.
    """

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._file)

    def __enter__(self) -> KeptOpen:
        return self

    def __exit__(self, *error: object) -> None:
        """It stays open."""

    def close(self) -> None:
        """It stays open."""


def whole_body(environ: WSGIEnvironment) -> IO[bytes] | None:
    """The rest of a request's body as a file, which can be read again; None if there is none.

    It ends where the length says, or where the server does if it tells that it ends the input
    (``wsgi.input_terminated``). A large one is on the disk. Raises what reading it raises.
    """
    length = environ.get("CONTENT_LENGTH")
    left = int(length) if length else math.inf if environ.get("wsgi.input_terminated") else 0
    body = None
    while left and (chunk := environ["wsgi.input"].read(int(min(left, _CHUNK)))):
        body = body or _Body(_IN_MEMORY)
        body.write(chunk)
        left -= len(chunk)
    if body is not None:
        body.seek(0)
    return body


def make_service_unavailable(
    application: WSGIApplication,
    global_config: dict[str, str],
    retry_after: str = str(RETRY_AFTER),
) -> ServiceUnavailable:
    """PasteDeploy's factory of `ServiceUnavailable`, a ``filter_app_factory``."""
    return ServiceUnavailable(application, float(retry_after))


def make_whole_response(
    application: WSGIApplication, global_config: dict[str, str]
) -> WholeResponse:
    """PasteDeploy's factory of `WholeResponse`, a ``filter_app_factory``."""
    return WholeResponse(application)


def _close(response: Any) -> None:
    """As PEP 3333 asks of who has called an application, whatever came of its response."""
    if hasattr(response, "close"):
        response.close()
