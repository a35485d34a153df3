"""Web requests under Zope, which has ZPublisher."""

import io
import sys

import zope.testing.cleanup
from transaction.interfaces import TransientError
from zope.component import subscribers
from zope.configuration import xmlconfig
from ZPublisher.HTTPRequest import WSGIRequest
from ZPublisher.HTTPResponse import WSGIResponse
from ZPublisher.pubevents import PubFailure

import zreconnect
from zreconnect import DisconnectionError
from zreconnect.tests.web import WebTestCase
from zreconnect.tests.zope_tests import ZopeTests


class ZPublisherTests(ZopeTests, WebTestCase):
    stack = "zope"
    site = "etc/site.zcml"
    five_retries = ("etc/zope.conf", "max-conflict-retries 5\n")

    def failed_request(self, error, retry):
        """A request, after the event of its failure."""
        zope.testing.cleanup.cleanUp()
        self.addCleanup(zope.testing.cleanup.cleanUp)
        xmlconfig.file("configure.zcml", zreconnect)
        request = WSGIRequest(
            io.BytesIO(), {"SERVER_NAME": "test", "SERVER_PORT": "80"}, WSGIResponse()
        )
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
