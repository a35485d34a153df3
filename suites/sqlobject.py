"""SQLObject's suite, with its own transactions and its autocommit."""

from __future__ import annotations

from suites.sources import Sdist
from suites.suite import Servers, Suite

VERSION = "3.14.0"


def suite(driver: str) -> Suite:
    def arguments(servers: Servers) -> list[str]:
        url = servers.postgres.fresh_database().replace("postgresql:", "postgres:", 1)
        return ["-D", f"{url}?driver={driver}"]

    return Suite(
        name=f"sqlobject-{driver}",
        title=f"SQLObject {VERSION}, {driver}",
        source=Sdist("SQLObject", VERSION),
        requirements=(f"SQLObject=={VERSION}",),
        extras=("sqlobject", "psycopg"),
        postgres={},
        tests=("sqlobject/tests",),
        arguments=arguments,
        through="sqlobject",
    )


SUITES = (suite("psycopg2"), suite("psycopg"))
