"""The compliance tests for DB-API 2.0, with each driver."""

from __future__ import annotations

import json

from suites.sources import Sdist
from suites.suite import Servers, Suite, with_unittest

# Whose copy of them it is.
PSYCOPG2 = "2.9.13"


def on(driver: str, server: str | None = None, extra: str | None = None) -> Suite:
    def variables(servers: Servers) -> dict[str, str]:
        keywords = {}
        if server is not None:
            running = getattr(servers, server)
            database = running.fresh_database().rpartition("/")[2]
            keywords = {"host": running.host, "port": running.port, "user": running.user}
            keywords |= {"password": running.password}
            keywords["dbname" if server == "postgres" else "database"] = database
        return {
            "ZRECONNECT_SUITES_DRIVER": driver,
            "ZRECONNECT_SUITES_KEYWORDS": json.dumps(keywords),
        }

    return Suite(
        name=f"dbapi-{driver}",
        title=f"DB-API compliance, {driver}",
        source=Sdist("psycopg2", PSYCOPG2),
        folder="tests",
        requirements=(),
        extras=("pymysql", "mysql", "psycopg"),
        postgres={} if server == "postgres" else None,
        mariadb={} if server == "mariadb" else None,
        tests=("suites.compliance",),
        command=with_unittest,
        variables=variables,
        through="compliance",
    )


SUITES = (
    on("psycopg2", "postgres"),
    on("psycopg", "postgres"),
    on("pymysql", "mariadb"),
    on("mysqlclient", "mariadb"),
    on("sqlite"),
)
