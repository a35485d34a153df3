"""What every stack promises, as tests of its example application."""

import contextlib
import errno
import hashlib
import http.client
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

import psycopg2

from zreconnect.integrations.wsgi import EXPLANATION
from zreconnect.tests.base import PATIENCE, wait_until

WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"


def multipart(content):
    """A form with the content in the file "file", and its content type."""
    disposition = b'Content-Disposition: form-data; name="file"; filename="file"'
    form = b"--part\r\n" + disposition + b"\r\n\r\n" + content + b"\r\n--part--\r\n"
    return form, "multipart/form-data; boundary=part"


class StackTests:
    """A mixin for `WebTestCase`.

    stack: a name in `STACKS`.
    attempts: how often its example runs a request in all.
    """

    def with_views(self):
        """A `Stack` that is the example with views, or the like, which lose their connection."""
        raise NotImplementedError

    def start_views(self, timeout=None, **options):
        """What `with_views` returns, given the ``options``, answering in one thread."""
        self.gate = os.path.join(self.temporary_directory(), "gate")
        os.mkfifo(self.gate)
        return self.start(self.with_views(**options), timeout, threads=1, GATE=self.gate)

    def temporary_directory(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        return holder.name

    @contextlib.contextmanager
    def writes_wait(self):
        """Inside the block whoever writes into the guest book waits."""
        with contextlib.closing(psycopg2.connect(self.server.dsn())) as locker:
            locker.cursor().execute("LOCK TABLE guest IN SHARE MODE")
            yield

    def end_waiting_session(self):
        wait_until(lambda: self.query(WAITING))
        ((pid,),) = self.query(WAITING)
        self.server.terminate_backend(pid)
        wait_until(lambda: pid not in self.sessions())

    def assert_unavailable(self, response):
        self.assertEqual(
            (response.status, response.body.encode()), (503, EXPLANATION), response.body
        )
        self.assertEqual(response.headers["Retry-After"], "5")
        self.assertTrue(response.headers["Content-Type"].startswith("text/plain"))
        for part in ("postgres", self.server.password, str(self.forward.port)):
            self.assertNotIn(part, str(response.headers) + response.body)

    def assert_serves(self, example):
        """It reads what is there, and writes."""
        before = self.guests()
        self.assertEqual(example.get().body, f"{len(before)} guests\n")
        self.assertEqual(example.post(name="Last").status, 200)
        self.assertEqual(self.guests(), sorted([*before, "Last"]))

    # The example

    def test_guest_book(self):
        example = self.start(self.stack)
        self.assertEqual(example.get()[::2], (200, "0 guests\n"))
        self.assertEqual(example.post(name="Bob")[::2], (200, "Welcome, Bob\n"))
        self.assertEqual(example.post(name="Ann")[::2], (200, "Welcome, Ann\n"))
        self.assertEqual(example.get("/all")[::2], (200, "Ann\nBob\n"))

    def test_restart_between_requests(self):
        example = self.start(self.stack, threads=1)
        self.assertEqual(example.post(name="Ann").status, 200)
        self.server.restart()
        self.assertEqual(example.post(name="Bob").status, 200)
        self.server.restart()
        self.assertEqual(example.get("/all").body, "Ann\nBob\n")

    def test_request_runs_again_until_it_is_done(self):
        example = self.start(self.stack)
        with ThreadPoolExecutor() as executor:
            with self.writes_wait():
                answer = executor.submit(example.post, name="Ann")
                for _ in range(self.attempts - 1):
                    self.end_waiting_session()
                wait_until(lambda: self.query(WAITING))
            self.assertEqual(answer.result(PATIENCE)[::2], (200, "Welcome, Ann\n"))
        self.assertEqual(self.guests(), ["Ann"])

    def test_unavailable_when_retries_are_used_up(self):
        example = self.start(self.stack, threads=1)
        with ThreadPoolExecutor() as executor, self.writes_wait():
            answer = executor.submit(example.post, name="Ann")
            for _ in range(self.attempts):
                self.end_waiting_session()
            self.assert_unavailable(answer.result(PATIENCE))
        self.assertEqual(self.guests(), [])
        self.assert_serves(example)

    def test_unavailable_while_the_server_is_down(self):
        for timeout in (None, 2):
            with self.subTest(timeout=timeout):
                example = self.start(self.stack, timeout, threads=1)
                self.assertEqual(example.get().status, 200)
                self.server.shut_down()
                self.assert_unavailable(example.get())
                self.assert_unavailable(example.post(name="Ann"))
                self.server.start()
                self.assert_serves(example)
                self.query("DELETE FROM guest")

    def check_head(self):
        example = self.start(self.stack, threads=1)
        self.server.shut_down()
        head = example.request("HEAD", "/")
        self.assertEqual((head.status, head.headers["Retry-After"]), (503, "5"))

    def test_waits_for_the_server(self):
        example = self.start(self.stack, PATIENCE, threads=1)
        self.server.shut_down()
        tried = self.forward.count().connections
        with ThreadPoolExecutor() as executor:
            answer = executor.submit(example.post, name="Ann")
            wait_until(lambda: self.forward.count().connections > tried + 1)
            self.server.start()
            self.assertEqual(answer.result(PATIENCE)[::2], (200, "Welcome, Ann\n"))
        self.assertEqual(self.guests(), ["Ann"])

    # Views that lose their connection

    def check_second_attempt(self, view):
        example = self.start_views()
        self.assertEqual(example.get(f"/{view}")[::2], (200, "attempt 2"))
        self.assertEqual(example.get("/Attempts").body, "2")
        self.assertEqual(self.guests(), ["attempt 2"])
        self.assert_serves(example)

    def test_lost_once(self):
        self.check_second_attempt("LosesOnce")

    def test_error_swallowed(self):
        self.check_second_attempt("Swallows")

    def test_no_connection_swallowed(self):
        for timeout in (None, 2):
            with self.subTest(timeout=timeout):
                example = self.start_views(timeout)
                self.forward.refuse()
                self.assert_unavailable(example.get("/SwallowsEverything"))
                self.forward.accept()
                self.assertEqual(example.get("/Attempts").body, str(self.attempts))
                self.assertEqual(example.get("/SwallowsEverything").body, "fine")
                self.assertEqual(self.guests(), [f"attempt {self.attempts + 1}"])
                self.assert_serves(example)
                self.query("DELETE FROM guest")

    def test_lost_in_a_savepoint(self):
        self.check_second_attempt("RollsBackToSavepoint")

    def test_lost_in_del(self):
        self.check_second_attempt("LosesInDel")

    def test_serialization_failure_in_commit(self):
        self.check_second_attempt("Conflicts")

    def test_deadlock(self):
        self.check_second_attempt("Deadlocks")

    def test_lost_always(self):
        example = self.start_views()
        self.assert_unavailable(example.get("/LosesAlways"))
        self.assertEqual(example.get("/Attempts").body, str(self.attempts))
        self.assertEqual(self.guests(), [])
        self.assert_serves(example)

    def test_lost_while_streaming(self):
        example = self.start_views()
        with self.assertRaises(http.client.IncompleteRead) as caught:
            example.get("/Streams")
        self.assertEqual(caught.exception.partial, b"streamed ")
        self.assertEqual(example.get("/Attempts").body, "1")
        self.assertEqual(self.guests(), ["attempt 1"])
        self.assert_serves(example)

    def test_body_is_whole_in_each_attempt(self):
        example = self.start_views()
        for content in (b"some text", b"", os.urandom(3_000_000)):
            for is_chunked in (False, True):
                with self.subTest(size=len(content), is_chunked=is_chunked):
                    self.check_body(example, "File", *multipart(content), content, is_chunked)
                    json = "application/json"
                    self.check_body(example, "Body", content, json, content, is_chunked)
        self.assertEqual(example.get("/Attempts").body, str(3 * 2 * 2 * 2))

    def check_body(self, example, kind, body, content_type, content, is_chunked):
        headers = {"Content-Type": content_type}
        if not is_chunked:
            headers["Content-Length"] = str(len(body))
        pieces = iter([body[start : start + 100_000] for start in range(0, len(body), 100_000)])
        answer = example.request("POST", f"/Receives{kind}", pieces, headers)
        self.assertEqual((answer.status, answer.body), (200, "received"))
        self.assertEqual(self.guests(), [hashlib.sha256(content).hexdigest()])
        self.query("DELETE FROM guest")

    def test_unknown_outcome(self):
        example = self.start_views()
        with self.view_at_gate(example) as answer:
            before = self.forward.count()
        self.assertEqual(answer.result(PATIENCE).status, 200)
        # The last byte of the answer to a commit; when it comes, the commit has been done.
        last = (self.forward.count() - before).bytes_to_client - 1
        with self.view_at_gate(example) as answer:
            cut = self.forward.cut("to_client", last, then=self.forward.refuse)
        self.assertEqual(answer.result(PATIENCE)[::2], (500, "Please look whether it is there"))
        self.assertTrue(cut.wait(PATIENCE))
        self.forward.accept()
        self.assertEqual(example.get("/Attempts").body, "2")
        self.assertEqual(self.guests(), ["attempt 1", "attempt 2"])
        self.assert_serves(example)

    @contextlib.contextmanager
    def view_at_gate(self, example):
        """The future answer of a view that waits with its commit until the end of the block."""
        with ThreadPoolExecutor() as executor:
            answer = executor.submit(example.get, "/WaitsAtGate")
            gate = None

            def view_has_arrived():
                nonlocal gate
                try:
                    gate = os.open(self.gate, os.O_WRONLY | os.O_NONBLOCK)
                except OSError as error:
                    if error.errno != errno.ENXIO or answer.done():
                        raise
                return gate is not None

            wait_until(view_has_arrived)
            try:
                yield answer
            finally:
                os.close(gate)
