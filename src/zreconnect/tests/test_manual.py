"""The manual: every chapter in the directory doctests/ of a checkout is a test.

A chapter has these names, which its first paragraphs explain:

server: the `EmbeddedPostgres` of the layer.
forward: the `PortForward` before it.
dsn: the URL of a fresh, empty database, reached through ``forward``.
"""

import contextlib
import doctest
import logging
import re
import secrets
import textwrap
import unittest
import warnings
from pathlib import Path
from unittest import mock

import psycopg2
import transaction

from zreconnect import zopeless
from zreconnect.testing import EmbeddedMariaDB
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests.base import REQUIRED, with_time_to_connect

LAYER = PortForwardLayer(PostgresLayer("ManualPostgresLayer"), "ManualLayer")
DIRECTORY = Path(__file__).resolve().parents[3] / "doctests"
CONTENTS = DIRECTORY / "README.rst"
README = DIRECTORY.parent / "README.rst"
FIRST_PAGE = DIRECTORY.parent / "docs/index.rst"
CHAPTERS = sorted(set(DIRECTORY.glob("*.rst")) - {CONTENTS})
# A story makes no sense after its first failure, and may wait in vain.
OPTION_FLAGS = (
    doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.REPORT_NDIFF | doctest.FAIL_FAST
)


def set_up(test):
    if Path(test.filename).name == "mysql.rst" and not (EmbeddedMariaDB.installed() or REQUIRED):
        raise unittest.SkipTest("MariaDB's server is not installed: make services")
    database = f"manual_{secrets.token_hex(8)}"
    LAYER.server.create_database(database)
    test.globs.update(server=LAYER.server, forward=LAYER.forward, dsn=LAYER.dsn(dbname=database))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("zope.event.subscribers", []))
        stack.enter_context(quiet_log())
        stack.enter_context(with_time_to_connect)
        stack.enter_context(warnings.catch_warnings())
        # Python 3.12 warns of forks beside the forwarder's thread, which no child needs.
        warnings.filterwarnings("ignore", ".* multi-threaded, use of fork", DeprecationWarning)
        stack.callback(leave_nothing_installed)
        test.cleanup = stack.pop_all()


def tear_down(test):
    test.cleanup.close()


@contextlib.contextmanager
def quiet_log():
    """Keep logging from writing what nobody handles into the test runner's report."""
    logger = logging.getLogger("zreconnect")
    handler = logging.NullHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def leave_nothing_installed():
    # A line that a chapter left silent would hold up the rollback.
    LAYER.forward.drop()
    if zopeless._installed is not None:
        zopeless._installed.uninstall()
    transaction.abort()


class ManualTests(unittest.TestCase):
    def test_the_chapters_are_there(self):
        if not CHAPTERS:
            self.fail(
                f"There is no chapter {DIRECTORY / '*.rst'}: the manual is tested in a checkout, "
                "and an installed zreconnect does not contain it"
            )

    def test_the_contents_name_each_chapter_once(self):
        named = re.findall(r"<(.+?\.rst)>", CONTENTS.read_text(encoding="utf-8"))
        self.assertEqual(sorted(named), [chapter.name for chapter in CHAPTERS])

    def test_chapters_refer_to_chapters(self):
        for chapter in CHAPTERS:
            for name in re.findall(r"``([a-z-]+\.rst)``", chapter.read_text(encoding="utf-8")):
                with self.subTest(chapter.name):
                    self.assertIn(DIRECTORY / name, CHAPTERS)

    def test_chapters_show_all_plots(self):
        shown = {
            DIRECTORY / name
            for chapter in CHAPTERS
            for name in re.findall(r"^\.\. image:: (.+)$", chapter.read_text("utf-8"), re.MULTILINE)
        }
        self.assertEqual(shown, {*DIRECTORY.glob("plots/*")})

    def test_the_site_shows_all_examples(self):
        page = FIRST_PAGE.with_name("examples.rst")
        named = re.findall(r"^\.\. literalinclude:: (.+)$", page.read_text("utf-8"), re.MULTILINE)
        files = {
            path
            for path in (DIRECTORY.parent / "examples").rglob("*.*")
            if path.suffix in {".conf", ".ini", ".py", ".zcml"} and path.name != "__init__.py"
        }
        self.assertEqual({(page.parent / name).resolve() for name in named}, files)


def scripts(path):
    """The programs in Python that a page shows."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?: {3}.*\n|\n)+)", text, re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


class ReadmeTests(unittest.TestCase):
    """What README.rst shows: a script that dies of a restart, and two that do not. And what the
    first page of the site does."""

    layer = LAYER

    def setUp(self):
        self.database = f"readme_{secrets.token_hex(8)}"
        LAYER.server.create_database(self.database)
        LAYER.server.query("CREATE TABLE done (number integer)", dbname=self.database)
        self.addCleanup(leave_nothing_installed)
        quiet = contextlib.ExitStack()
        quiet.enter_context(quiet_log())
        self.addCleanup(quiet.close)
        self.scripts = scripts(README)

    def numbers(self, script):
        """Run it for three numbers, with a restart after the first, and return what it recorded."""
        # It pauses by a name of its own: other threads of the process sleep, too.
        for ours, its in [
            (r"1000", "3"),
            (r"time\.sleep\(.+?\)", "pause()"),
            (r"postgresql:///work", LAYER.dsn(dbname=self.database)),
        ]:
            script, changes = re.subn(ours, its, script)
            self.assertEqual(changes, 1)
        pauses = iter([LAYER.server.restart])
        names = {"pause": lambda: next(pauses, lambda: None)()}
        self.addCleanup(lambda: names["connection"].close() if "connection" in names else None)
        exec(compile(script, str(README), "exec"), names)
        return LAYER.server.query("SELECT number FROM done ORDER BY number", dbname=self.database)

    def test_the_plain_script_dies(self):
        with self.assertRaisesRegex(psycopg2.InterfaceError, "connection already closed") as caught:
            self.numbers(self.scripts[0])
        self.assertIsInstance(caught.exception.__context__, psycopg2.OperationalError)

    def test_with_connect_and_run_it_survives(self):
        self.assertEqual(self.numbers(self.scripts[1]), [(0,), (1,), (2,)])

    def test_with_initZopeless_it_survives(self):
        self.assertEqual(self.numbers(self.scripts[2]), [(0,), (1,), (2,)])

    def test_the_first_page_of_the_site(self):
        (script,) = scripts(FIRST_PAGE)
        script = script.replace("sys.argv[1]", "'postgresql:///work'")
        self.assertEqual(self.numbers(script), [(0,), (1,), (2,)])


def test_suite():
    chapters = doctest.DocFileSuite(
        *map(str, CHAPTERS),
        module_relative=False,
        setUp=set_up,
        tearDown=tear_down,
        optionflags=OPTION_FLAGS,
        encoding="utf-8",
    )
    chapters.layer = LAYER
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    return unittest.TestSuite([load(ManualTests), load(ReadmeTests), chapters])
