"""The compliance suite of DB-API 2.0, on every driver."""

from suites.sources import Sdist
from suites.suite import Servers, Suite, with_unittest

VERSION = "1.15.0"
POSTGRESQL, MYSQL = ("psycopg2", "psycopg"), ("pymysql", "mysqlclient")


def on(driver: str) -> Suite:
    def variables(servers: Servers) -> dict[str, str]:
        server = servers.postgres or servers.mariadb
        dsn = "sqlite:///compliance.db" if server is None else server.fresh_database()
        return {"SUITE_DRIVER": driver, "SUITE_DSN": dsn}

    return Suite(
        name=f"dbapi-{driver}",
        title=f"DB-API compliance {VERSION}, {driver}",
        source=Sdist("dbapi-compliance", VERSION),
        requirements=(),
        extras=("mysql", "psycopg", "pymysql"),
        postgres={} if driver in POSTGRESQL else None,
        mariadb={} if driver in MYSQL else None,
        tests=("suites.through.dbapi_tests.ComplianceTests",),
        command=with_unittest,
        variables=variables,
        through="dbapi",
    )


SUITES = tuple(map(on, (*POSTGRESQL, *MYSQL, "sqlite")))
