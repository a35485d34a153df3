"""The manual: every chapter in the directory doctests/ is a test.

A chapter starts with these names, which its first paragraphs explain:

server: the `EmbeddedPostgres` of the layer.
forward: the `PortForward` before it.
dsn: the URL of a fresh, empty database, reached through ``forward``.
"""

import contextlib
import doctest
import logging
import secrets
import unittest
from pathlib import Path

import transaction
import zope.event

from zreconnect import zopeless
from zreconnect.testing.layers import PORT_FORWARD_LAYER

DIRECTORY = Path(__file__).resolve().parents[3] / "doctests"
CHAPTERS = sorted(DIRECTORY.glob("*.rst"))
OPTION_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.REPORT_NDIFF

# Otherwise logging writes what nobody handles to standard error, into the test runner's report.
QUIET = logging.NullHandler()


def set_up(test):
    logging.getLogger("zreconnect").addHandler(QUIET)
    database = f"manual_{secrets.token_hex(8)}"
    PORT_FORWARD_LAYER.server.create_database(database)
    test.globs.update(
        server=PORT_FORWARD_LAYER.server,
        forward=PORT_FORWARD_LAYER.forward,
        dsn=PORT_FORWARD_LAYER.dsn(dbname=database),
    )


def tear_down(test):
    """Leave nothing installed, also if the chapter failed in the middle."""
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(logging.getLogger("zreconnect").removeHandler, QUIET)
        cleanup.callback(zope.event.subscribers.clear)
        cleanup.callback(transaction.abort)
        if zopeless._installed is not None:
            zopeless._installed.uninstall()


class ManualTests(unittest.TestCase):
    def test_the_chapters_are_there(self):
        self.assertTrue(
            CHAPTERS, f"There is no chapter {DIRECTORY}/*.rst: the manual is tested in a checkout"
        )


def test_suite():
    chapters = doctest.DocFileSuite(
        *map(str, CHAPTERS),
        module_relative=False,
        setUp=set_up,
        tearDown=tear_down,
        optionflags=OPTION_FLAGS,
        encoding="utf-8",
    )
    chapters.layer = PORT_FORWARD_LAYER
    return unittest.TestSuite(
        [unittest.defaultTestLoader.loadTestsFromTestCase(ManualTests), chapters]
    )
