"""The compliance tests for DB-API 2.0, for the driver that an environment variable names.

They are those that psycopg2 has; this runs in the directory with them.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from typing import Any

import dbapi20

#: The name of the driver as zreconnect has it, and the keywords of its ``connect()`` as JSON; empty
#: for SQLite.
DRIVER, KEYWORDS = "ZRECONNECT_SUITES_DRIVER", "ZRECONNECT_SUITES_KEYWORDS"
MODULES = {"sqlite": "sqlite3", "mysqlclient": "MySQLdb"}


def module() -> Any:
    """The driver's module."""
    name = os.environ[DRIVER]
    return importlib.import_module(MODULES.get(name, name))


class ComplianceTests(dbapi20.DatabaseAPI20Test):
    driver = module()
    connect_kw_args = json.loads(os.environ[KEYWORDS]) or {
        "database": os.path.join(tempfile.mkdtemp(), "compliance.db"),
        "check_same_thread": False,
    }
    # What every one of the servers has.
    lower_func = "lower"
