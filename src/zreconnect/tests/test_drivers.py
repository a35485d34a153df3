"""Finding a driver by its name: zreconnect's own, and those of other distributions."""

import importlib.metadata
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import zreconnect
from zreconnect.drivers import base
from zreconnect.drivers.base import BaseDriver, SessionSettings, load_driver
from zreconnect.drivers.postgresql import PostgresqlDriver
from zreconnect.integrations.pyramid import keep_body

MODULE = """
from zreconnect.drivers.sqlite import SqliteDriver

class AcmeDriver(SqliteDriver):
    name = "acme"

driver = AcmeDriver()
no_driver = object()
"""


class DriverTests(unittest.TestCase):
    """``self.directory`` is a place where Python finds what is installed."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        # In front, and found anew: the path caches what was in a directory.
        patch = mock.patch.object(sys, "path", [directory.name, *sys.path])
        patch.start()
        self.addCleanup(patch.stop)
        importlib.invalidate_caches()
        for name in ("zreconnect_acme", "acme_of_ours"):
            self.addCleanup(sys.modules.pop, name, None)

    def install(self, entry_points):
        """What an installer leaves behind of a distribution with these entry points."""
        (self.directory / "zreconnect_acme.py").write_text(MODULE)
        info = self.directory / "zreconnect_acme-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zreconnect-acme\n")
        (info / "entry_points.txt").write_text("[zreconnect.drivers]\n" + entry_points)
        importlib.invalidate_caches()

    def test_a_registered_driver_is_found_by_name_and_by_scheme(self):
        self.install("acme = zreconnect_acme:driver\n")
        self.assertEqual(load_driver("acme").name, "acme")
        connection = zreconnect.connect("ACME:////tmp/acme.db")
        self.assertIs(connection.work.link.driver, load_driver("acme"))
        connection = zreconnect.ReconnectingConnection(lambda: None, driver="acme")
        self.assertIs(connection.work.link.driver, load_driver("acme"))

    def test_a_registered_driver_does_not_replace_one_of_ours(self):
        self.install("sqlite = zreconnect_acme:driver\n")
        self.assertEqual(load_driver("sqlite").name, "sqlite")
        self.assertEqual(zreconnect.connect("sqlite://").work.link.driver.name, "sqlite")

    def test_what_is_registered_must_be_a_driver(self):
        self.install("acme = zreconnect_acme:no_driver\n")
        with self.assertRaisesRegex(TypeError, "'acme' is registered as zreconnect_acme:no_driver"):
            load_driver("acme")

    def test_an_unknown_driver(self):
        self.install("acme = zreconnect_acme:driver\n")
        with self.assertRaisesRegex(
            ValueError, "driver 'oracle' is unknown; known are acme, .*psycopg2, .*sqlite"
        ):
            load_driver("oracle")
        with self.assertRaisesRegex(
            ValueError, "scheme 'oracle'; known are acme, .*postgresql, .*sqlite"
        ):
            zreconnect.connect("oracle://server/db")

    def test_a_missing_database_module(self):
        (self.directory / "acme_of_ours.py").write_text("import acme_database\n")
        with (
            mock.patch.dict(base.DRIVERS, {"acme": "acme_of_ours"}),
            mock.patch.dict(base.EXTRAS, {"acme_database": "acme-extra"}),
            self.assertRaisesRegex(
                ImportError,
                "driver 'acme' needs the module acme_database, which is not installed: "
                r'pip install "zreconnect\[acme-extra\]"',
            ),
        ):
            load_driver("acme")

    def test_another_missing_module_is_a_mistake(self):
        (self.directory / "acme_of_ours.py").write_text("import acme_misspelt\n")
        with (
            mock.patch.dict(base.DRIVERS, {"acme": "acme_of_ours"}),
            self.assertRaises(ModuleNotFoundError),
        ):
            load_driver("acme")


class BodyTests(unittest.TestCase):
    def test_a_request_that_runs_once_keeps_nothing(self):
        environ = {}
        keep_body(environ)
        self.assertEqual(environ, {})


class BaseDriverTests(unittest.TestCase):
    def test_what_a_driver_need_not_say(self):
        driver = BaseDriver()
        error = ValueError("x")
        for each in (driver, PostgresqlDriver()):
            self.assertIsNone(each.keep(None))
            self.assertIsNone(each.autocommit_mode("SET autocommit = 1"))
        self.assertTrue(driver.has_sessions)
        self.assertFalse(driver.supports_two_phase)
        self.assertIsNone(driver.pooling)
        self.assertFalse(driver.is_transient(error))
        self.assertFalse(driver.is_refused_by_standby(error, None))
        self.assertTrue(driver.takes_writes(None))
        self.assertFalse(driver.is_standby(None))
        self.assertTrue(driver.transaction_flag(None)())
        self.assertTrue(driver.begins_read_only(None, SessionSettings(readonly=True)))
