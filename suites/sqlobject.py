"""SQLObject's suite, on the connection that `initZopeless` gives a class."""

from __future__ import annotations

from suites.sources import Sdist
from suites.suite import Servers, Suite

VERSION = "3.14.0"


def arguments(servers: Servers) -> list[str]:
    url = servers.postgres.fresh_database().replace("postgresql:", "postgres:", 1)
    return ["-D", f"{url}?driver=psycopg2"]


SUITES = (
    Suite(
        name="sqlobject",
        title=f"SQLObject {VERSION}",
        source=Sdist("SQLObject", VERSION),
        requirements=(f"SQLObject=={VERSION}",),
        extras=("sqlobject",),
        postgres={},
        tests=("sqlobject/tests",),
        arguments=arguments,
        through="sqlobject",
    ),
)
