"""The WSGI middleware, alone and beside the packages that it is for."""

import io
import sys
import unittest
from wsgiref.headers import Headers
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import repoze.retry
import repoze.tm
import transaction
from transaction.interfaces import TransientError

from zreconnect import CommitOutcomeUnknown, DisconnectionError, ReconnectTimeout
from zreconnect.exceptions import DisconnectedConnectionError
from zreconnect.integrations.wsgi import (
    EXPLANATION,
    KeptOpen,
    ServiceUnavailable,
    WholeResponse,
    make_service_unavailable,
    make_whole_response,
    whole_body,
)

LOST = DisconnectionError("The connection to postgresql://joe@example.org:5432/books was lost")
OK = "200 OK"
UNAVAILABLE = "503 Service Unavailable"
TEXT = [("Content-Type", "text/plain")]
REFUSAL = "AppMustCallStartResponseBeforeReturning"


class Chunks:
    """A response that raises the errors among its chunks, and notes that it was closed."""

    closed = 0

    def __init__(self, *chunks):
        self.chunks = iter(chunks)

    def __iter__(self):
        return self

    def __next__(self):
        chunk = next(self.chunks)
        if isinstance(chunk, Exception):
            raise chunk
        return chunk

    def close(self):
        self.closed += 1


def responding(response):
    def application(environ, start_response):
        start_response(OK, TEXT)
        return response

    return application


def failing(error):
    def application(environ, start_response):
        raise error

    return application


class Input:
    """A server's input: it is read once, cannot be rewound, and must not be read past its end."""

    def __init__(self, content, is_terminated=False):
        self.content = io.BytesIO(content)
        self.left = len(content) + is_terminated
        self.largest = 0

    def read(self, size):
        assert 0 <= size <= self.left or self.left, "read past its end"
        self.largest = max(self.largest, size)
        chunk = self.content.read(size)
        self.left -= max(1, len(chunk))
        return chunk


def chunked(content):
    """The environment of a request whose length only its end tells."""
    return {"wsgi.input": Input(content, is_terminated=True), "wsgi.input_terminated": True}


class Answer:
    """What a server gets from an application, and does with it as PEP 3333 has it."""

    def __init__(self, application, method="GET", **environ):
        environ = {"REQUEST_METHOD": method, "QUERY_STRING": "", **environ}
        setup_testing_defaults(environ)
        self.status = None
        self.body = b""
        response = application(environ, self.start_response)
        try:
            for chunk in response:
                self.write(chunk)
        finally:
            if hasattr(response, "close"):
                response.close()

    def start_response(self, status, headers, exc_info=None):
        assert self.status is None or exc_info, "the response was started already"
        if exc_info and self.body:
            raise exc_info[1]
        self.status, self.headers = status, Headers(list(headers))
        return self.write

    def write(self, chunk):
        assert self.status is not None, "the response was not started"
        self.body += chunk


class ServiceUnavailableTests(unittest.TestCase):
    def answer(self, application, method="GET"):
        return Answer(validator(ServiceUnavailable(validator(application))), method)

    def assert_unavailable(self, answer):
        self.assertEqual((answer.status, answer.body), (UNAVAILABLE, EXPLANATION))
        self.assertEqual(answer.headers["Retry-After"], "5")
        self.assertEqual(answer.headers["Content-Length"], str(len(EXPLANATION)))
        self.assertEqual(answer.headers["Content-Type"], "text/plain; charset=utf-8")

    def test_response_without_error(self):
        chunks = Chunks(b"one ", b"two")
        answer = self.answer(responding(chunks))
        self.assertEqual((answer.status, answer.body), (OK, b"one two"))
        self.assertEqual(chunks.closed, 1)

    def test_error_of_the_application(self):
        original = DisconnectedConnectionError("Already disconnected")
        doomed = DisconnectionError("doomed", (type(original), original, None))
        timeout = ReconnectTimeout("server", 3, 5.0, OSError())
        for error in (LOST, timeout, doomed, original):
            with self.subTest(error=error):
                self.assert_unavailable(self.answer(failing(error)))

    def test_error_after_the_application_has_started_the_response(self):
        def application(environ, start_response):
            start_response(OK, TEXT)
            raise LOST

        self.assert_unavailable(self.answer(application))

    def test_error_of_the_response_before_its_first_byte(self):
        for chunks in (Chunks(LOST), Chunks(b"", LOST)):
            self.assert_unavailable(self.answer(responding(chunks)))
            self.assertEqual(chunks.closed, 1)

    def test_error_of_a_generator_that_has_started_nothing(self):
        def application(environ, start_response):
            if environ:
                raise LOST
            yield b""

        self.assert_unavailable(self.answer(application))

    def test_error_of_a_response_that_was_sent_in_part(self):
        chunks = Chunks(b"one ", LOST)
        with self.assertRaises(DisconnectionError) as raised:
            self.answer(responding(chunks))
        self.assertIs(raised.exception, LOST)
        self.assertEqual(chunks.closed, 1)

    def test_error_after_the_application_has_written(self):
        def application(environ, start_response):
            start_response(OK, TEXT)(b"one ")
            raise LOST

        with self.assertRaises(DisconnectionError):
            self.answer(application)

    def test_other_errors_pass(self):
        for error in (ValueError("other"), CommitOutcomeUnknown("server"), TransientError()):
            for application in (failing(error), responding(Chunks(error))):
                with self.subTest(error=error), self.assertRaises(type(error)) as raised:
                    self.answer(application)
                self.assertIs(raised.exception, error)

    def test_nothing_but_the_head_is_sent_to_who_asks_for_that(self):
        answer = self.answer(failing(LOST), "HEAD")
        self.assertEqual((answer.status, answer.body), (UNAVAILABLE, b""))
        self.assertEqual(answer.headers["Retry-After"], "5")

    def test_response_that_is_never_asked_for_is_closed(self):
        chunks = Chunks(b"one")
        ServiceUnavailable(responding(chunks))({}, lambda *arguments: None).close()
        self.assertEqual(chunks.closed, 1)

    def test_body_with_a_length_is_left_to_the_application(self):
        environ = {"wsgi.input": Input(b"body"), "CONTENT_LENGTH": "4"}
        bodies = []

        def application(environ, start_response):
            bodies.append(environ["wsgi.input"])
            return responding([b"read"])(environ, start_response)

        self.assertEqual(Answer(ServiceUnavailable(application), "POST", **environ).body, b"read")
        self.assertEqual(bodies, [environ["wsgi.input"]])

    def test_time_after_which_to_try_again(self):
        answer = Answer(ServiceUnavailable(failing(LOST), retry_after=59.5))
        self.assertEqual(answer.headers["Retry-After"], "60")
        answer = Answer(make_service_unavailable(failing(LOST), {}, retry_after="7"))
        self.assertEqual(answer.headers["Retry-After"], "7")
        answer = Answer(make_service_unavailable(failing(LOST), {}))
        self.assertEqual(answer.headers["Retry-After"], "5")

    def test_time_that_makes_no_sense(self):
        for error, retry_after in ((ValueError, -1), (TypeError, "5")):
            with self.subTest(retry_after), self.assertRaisesRegex(error, "retry_after"):
                ServiceUnavailable(failing(LOST), retry_after)


class WholeResponseTests(unittest.TestCase):
    def answer(self, application):
        return Answer(validator(WholeResponse(validator(application))))

    def test_response(self):
        chunks = Chunks(b"one ", b"two")
        answer = self.answer(responding(chunks))
        self.assertEqual((answer.status, answer.body), (OK, b"one two"))
        self.assertEqual(answer.headers["Content-Type"], "text/plain")
        self.assertEqual(chunks.closed, 1)

    def test_response_that_cannot_be_closed(self):
        answer = Answer(WholeResponse(responding([b"one", b"two"])))
        self.assertEqual((answer.status, answer.body), (OK, b"onetwo"))

    def test_what_is_written_comes_first(self):
        def application(environ, start_response):
            start_response(OK, TEXT)(b"one ")
            return [b"two"]

        self.assertEqual(self.answer(application).body, b"one two")

    def test_error_page_in_place_of_a_started_response(self):
        def application(environ, start_response):
            start_response(OK, TEXT)
            try:
                raise ValueError
            except ValueError:
                start_response("500 Internal Server Error", TEXT, sys.exc_info())
            return [b"Sorry"]

        answer = self.answer(application)
        self.assertEqual((answer.status, answer.body), ("500 Internal Server Error", b"Sorry"))

    def test_error_comes_before_anything_is_started(self):
        started = []
        chunks = Chunks(b"one ", LOST)
        with self.assertRaises(DisconnectionError):
            WholeResponse(responding(chunks))({"wsgi.input": io.BytesIO()}, started.append)
        self.assertEqual((started, chunks.closed), ([], 1))


class WholeBodyTests(unittest.TestCase):
    def test_body_with_a_length(self):
        for size in (1, 70_000, 2_000_000):
            content = b"x" * size
            source = Input(content)
            body = whole_body({"wsgi.input": source, "CONTENT_LENGTH": str(size)})
            for _ in range(2):
                self.assertEqual(body.read(), content)
                body.seek(0)
            self.assertLessEqual(source.largest, 1 << 16)

    def test_nothing_is_read_past_the_length(self):
        body = whole_body({"wsgi.input": io.BytesIO(b"first second"), "CONTENT_LENGTH": "5"})
        self.assertEqual(body.read(), b"first")

    def test_body_without_a_length(self):
        self.assertEqual(whole_body(chunked(b"x" * 200_000)).read(), b"x" * 200_000)

    def test_no_body(self):
        for environ in ({}, {"CONTENT_LENGTH": ""}, {"CONTENT_LENGTH": "0"}):
            # Nobody would end what is read.
            self.assertIsNone(whole_body({"wsgi.input": Input(b""), **environ}))
        self.assertIsNone(whole_body(chunked(b"")))


class KeptOpenTests(unittest.TestCase):
    def test_who_closes_it_closes_nothing(self):
        body = KeptOpen(io.BytesIO(b"one\ntwo\n"))
        for _ in range(2):
            with body as file:
                self.assertEqual(list(file), [b"one\n", b"two\n"])
            body.seek(0)
            self.assertEqual(io.TextIOWrapper(body).read(), "one\ntwo\n")
            body.close()
            body.seek(0)


class RepozeTests(unittest.TestCase):
    """Why repoze.retry needs `WholeResponse` before repoze.tm2."""

    def setUp(self):
        self.addCleanup(transaction.abort)
        self.calls = 0

    def application(self, environ, start_response):
        self.calls += 1
        start_response(OK, TEXT)
        if self.calls == 1:
            raise LOST
        return [b"done"]

    @unittest.skipUnless(hasattr(repoze.retry, REFUSAL), "repoze.retry refuses it since 2.2")
    def test_repoze_retry_refuses_what_repoze_tm2_returns(self):
        with self.assertRaises(getattr(repoze.retry, REFUSAL)):
            Answer(repoze.retry.Retry(repoze.tm.TM(self.application), tries=3))
        self.assertEqual(self.calls, 0)

    def test_whole_response_in_between(self):
        pipeline = make_whole_response(repoze.tm.TM(self.application), {})
        answer = Answer(repoze.retry.Retry(pipeline, tries=3))
        self.assertEqual((answer.status, answer.body), (OK, b"done"))
        self.assertEqual(self.calls, 2)

    def test_error_of_the_commit_is_retried(self):
        def application(environ, start_response):
            self.calls += 1
            start_response(OK, TEXT)
            if self.calls == 1:
                transaction.get().addBeforeCommitHook(fail)
            return [b"done"]

        def fail():
            raise LOST

        pipeline = WholeResponse(repoze.tm.TM(application))
        answer = Answer(repoze.retry.Retry(pipeline, tries=3))
        self.assertEqual((answer.status, answer.body), (OK, b"done"))
        self.assertEqual(self.calls, 2)

    def test_body_in_each_attempt(self):
        """repoze.retry takes a body without length for empty."""
        bodies = []

        def application(environ, start_response):
            bodies.append(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            # As WebOb and others keep what they have made of it.
            self.assertEqual(environ.setdefault("test.attempt", len(bodies)), len(bodies))
            return self.application(environ, start_response)

        retry = repoze.retry.Retry(WholeResponse(repoze.tm.TM(application)), tries=3)
        answer = Answer(ServiceUnavailable(retry), "POST", **chunked(b"x" * 200_000))
        self.assertEqual((answer.status, answer.body), (OK, b"done"))
        self.assertEqual(bodies, [b"x" * 200_000] * 2)
