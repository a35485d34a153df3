"""Web requests under Zope, which has ZPublisher."""

from zreconnect.tests.web import WebTestCase
from zreconnect.tests.zope_tests import ZopeTests


class ZPublisherTests(ZopeTests, WebTestCase):
    stack = "zope"
    site = "etc/site.zcml"
