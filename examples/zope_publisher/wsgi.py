"""The application for waitress-serve."""

import os

from zope.app.wsgi import getWSGIApplication


def make_application():
    # Read by site.zcml; empty means to fail at once when the database is away.
    os.environ.setdefault("DATABASE_TIMEOUT", "")
    return getWSGIApplication("zope.conf")
