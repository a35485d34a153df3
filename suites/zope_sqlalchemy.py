"""zope.sqlalchemy's suite, on a registered engine."""

from suites.sources import Sdist
from suites.suite import Servers, Suite, with_unittest

VERSION = "4.1"


def on(driver: str) -> Suite:
    def variables(servers: Servers) -> dict[str, str]:
        url = servers.postgres.fresh_database()
        return {"TEST_DSN": url.replace("postgresql:", f"postgresql+{driver}:", 1)}

    return Suite(
        name=f"zope_sqlalchemy-{driver}",
        title=f"zope.sqlalchemy {VERSION}, {driver}",
        source=Sdist("zope.sqlalchemy", VERSION),
        requirements=(f"zope.sqlalchemy=={VERSION}", "zope.testing==6.2"),
        extras=("psycopg", "sqlalchemy"),
        postgres={},
        tests=("zope.sqlalchemy.tests.test_suite",),
        command=with_unittest,
        variables=variables,
        through="sqlalchemy_engines",
    )


SUITES = (on("psycopg2"), on("psycopg"))
