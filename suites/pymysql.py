"""PyMySQL's suite, on MariaDB.

Its source distributions have had no tests since 1.0. So the present PyMySQL has to do with those of
the last version before, of which a few want what it no longer has.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from suites.sources import Sdist
from suites.suite import Servers, Suite

VERSION, VERSION_OF_TESTS = "1.2.4", "0.10.1"
DATABASES = "ZRECONNECT_SUITES_DATABASES"
# What the tests import of that version, and where they look for databases.
COMPATIBLE = """
CPYTHON, PY2, text_type, long_type = True, False, str, int


def int2byte(number):
    return bytes([number])
"""
REPLACED = {
    "pymysql.tests": "pymysql_tests",
    "pymysql._compat": "pymysql_tests.compatible",
    "from pymysql import util": "from pymysql_tests import compatible as util",
    "from .._compat": "from pymysql_tests.compatible",
    "os.path.exists(fname)": "True",
    "with open(fname) as f": "if True",
    "json.load(f)": f'json.loads(os.environ["{DATABASES}"])',
}


@dataclass(frozen=True)
class Tests:
    """The tests of a version, for whatever version is installed."""

    sdist: Sdist

    def fetch(self, directory: Path) -> Path:
        """The directory with them, in ``directory``."""
        target = directory / f"pymysql-tests-{self.sdist.version}"
        if not target.exists():
            source = self.sdist.fetch(directory)
            fresh = directory / f"{target.name}.fresh"
            shutil.rmtree(fresh, ignore_errors=True)
            tests = fresh / "pymysql_tests"
            shutil.copytree(source / "pymysql/tests", tests)
            for path in tests.rglob("*.py"):
                path.write_text(_replaced(path.read_text(encoding="utf-8")), encoding="utf-8")
            (tests / "compatible.py").write_text(COMPATIBLE)
            fresh.rename(target)
        return target


def _replaced(text: str) -> str:
    for before, after in REPLACED.items():
        text = text.replace(before, after)
    return text


def variables(servers: Servers) -> dict[str, str]:
    server = servers.mariadb
    databases = []
    for number in (1, 2):
        server.query(f"CREATE OR REPLACE DATABASE test{number}")
        databases.append(
            {
                "host": server.host,
                "port": server.port,
                "user": server.user,
                # By the names that the tests look for.
                "passwd": server.password,
                "db": f"test{number}",
                **({"use_unicode": True, "local_infile": True} if number == 1 else {}),
            }
        )
    return {DATABASES: json.dumps(databases)}


SUITES = (
    Suite(
        name="pymysql",
        title=f"PyMySQL {VERSION}, MariaDB",
        source=Tests(Sdist("PyMySQL", VERSION_OF_TESTS)),
        requirements=(),
        extras=("pymysql",),
        mariadb={"local_infile": "ON"},
        tests=("pymysql_tests",),
        variables=variables,
        through="pymysql",
        not_counted={
            "*::TestAuthentication::test_plugin": "looks at a private attribute of the connection",
        },
    ),
)
