"""Web requests under Zope, which has ZPublisher."""

import io
import sys

import zope.testing.cleanup
from transaction.interfaces import TransientError
from zope.component import subscribers
from zope.configuration import xmlconfig
from ZPublisher.HTTPRequest import WSGIRequest
from ZPublisher.HTTPResponse import WSGIResponse
from ZPublisher.pubevents import PubFailure, PubStart

import zreconnect
from zreconnect import DisconnectionError
from zreconnect.tests.test_wsgi import Input
from zreconnect.tests.web import WebTestCase
from zreconnect.tests.zope_tests import ZopeTests


class ZPublisherTests(ZopeTests, WebTestCase):
    stack = "zope"
    site = "etc/site.zcml"
    five_retries = ("etc/zope.conf", "max-conflict-retries 5\n")

    def new_request(self, stdin, **environ):
        """A request, after the event of its start."""
        zope.testing.cleanup.cleanUp()
        self.addCleanup(zope.testing.cleanup.cleanUp)
        xmlconfig.file("configure.zcml", zreconnect)
        environ = {"SERVER_NAME": "test", "SERVER_PORT": "80", "wsgi.input": stdin, **environ}
        request = WSGIRequest(stdin, environ, WSGIResponse())
        subscribers([PubStart(request)], None)
        return request

    def failed_request(self, error, retry):
        """A request, after the event of its failure."""
        request = self.new_request(io.BytesIO())
        try:
            raise error
        except TransientError:
            event = PubFailure(request, sys.exc_info(), retry)
        subscribers([event], None)
        return request

    def test_no_pause_before_a_retry(self):
        request = self.failed_request(DisconnectionError("lost"), retry=True)
        self.assertNotEqual(request.delay_retry, WSGIRequest.delay_retry)
        request.delay_retry()
        self.assertNotIn("delay_retry", vars(request.retry()))

    def test_pause_after_other_failures(self):
        for error, retry in ((TransientError(), True), (DisconnectionError("lost"), False)):
            with self.subTest(error=error, retry=retry):
                request = self.failed_request(error, retry)
                self.assertNotIn("delay_retry", vars(request))

    def test_body_that_the_server_cannot_rewind(self):
        for content in (b"content", b""):
            request = self.new_request(
                Input(content), REQUEST_METHOD="PUT", CONTENT_LENGTH=str(len(content))
            )
            for _ in range(2):
                request.processInputs()
                self.assertEqual(request.get("BODY"), content)
                self.assertEqual(request["BODYFILE"].read(), content)
                request = request.retry()
                subscribers([PubStart(request)], None)
                self.assertEqual(request.environ["wsgi.input"].read(), content)
                request.stdin.seek(0)

    def test_body_that_the_server_can_rewind_is_left_alone(self):
        body = io.BytesIO(b"content")
        request = self.new_request(body, CONTENT_LENGTH="7")
        request.stdin.seek(2)
        self.assertEqual(body.tell(), 2)
        request.stdin.close()
        self.assertFalse(body.closed)
