"""The parts for frameworks and mappers: what they say if theirs is not installed."""

import os
import subprocess
import sys
import unittest

REQUIREMENTS = {
    "django": ("zreconnect.integrations.django.base", "zreconnect[django]"),
    "opentelemetry": ("zreconnect.integrations.opentelemetry", "zreconnect[opentelemetry]"),
    "prometheus_client": ("zreconnect.integrations.prometheus", "zreconnect[prometheus]"),
    "pyramid": ("zreconnect.integrations.pyramid", "zreconnect[pyramid]"),
    "sqlalchemy": ("zreconnect.integrations.sqlalchemy", "zreconnect[sqlalchemy]"),
    "sqlobject": ("zreconnect.integrations.sqlobject", "zreconnect[sqlobject]"),
    "storm": ("zreconnect.integrations.storm", "zreconnect[storm]"),
    "zope.configuration": ("zreconnect.integrations.zcml", "zreconnect[zope]"),
}
PROGRAM = """
import importlib, sys
framework, part = sys.argv[1:]
sys.modules[framework] = None
try:
    importlib.import_module(part)
except ImportError as error:
    print(error, error.name, sep="|")
"""


class MissingFrameworkTests(unittest.TestCase):
    def test_it_is_named_with_what_installs_it(self):
        for framework, (part, requirement) in REQUIREMENTS.items():
            with self.subTest(framework):
                done = subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", PROGRAM, framework, part],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    capture_output=True,
                    text=True,
                )
                message, _, name = done.stdout.strip().partition("|")
                self.assertTrue(name.startswith(framework), done)
                self.assertEqual(
                    message,
                    f"{part} needs the module {name}, which is not installed: "
                    f'pip install "{requirement}"',
                )
