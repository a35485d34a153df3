"""Web requests under zope.publisher, with zope.app.publication and zope.app.wsgi."""

from zreconnect.tests.web import WebTestCase
from zreconnect.tests.zope_tests import ZopeTests


class ZopePublisherTests(ZopeTests, WebTestCase):
    stack = "zope_publisher"
    site = "site.zcml"
    five_retries = (
        "wsgi.py",
        "from zope.publisher.http import HTTPRequest; HTTPRequest.retry_max_count = 5\n",
    )
