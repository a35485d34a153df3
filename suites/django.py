"""Django's suite: the labels that concern databases, and zreconnect's backend."""

from __future__ import annotations

from suites.sources import Sdist
from suites.suite import Servers, Suite

VERSION = "5.2.19"
REQUIREMENTS = ("psycopg-pool==3.3.3", "PyYAML==6.0.4", "tzdata==2026.6")
LABELS = (
    *("aggregation", "annotations", "backends", "basic", "bulk_create", "constraints", "custom_pk"),
    *("datatypes", "db_functions", "delete", "expressions", "force_insert_update", "get_or_create"),
    *("inspectdb", "introspection", "lookup", "many_to_many", "migrations", "model_fields"),
    *("multiple_database", "postgres_tests", "queries", "raw_query", "schema", "select_for_update"),
    *("test_utils", "transaction_hooks", "transactions"),
)


def command(suite: Suite, through: str | None) -> list[str]:
    settings = through or "suites.through.django_settings"
    return ["runtests.py", f"--settings={settings}", "--parallel=1", "--noinput", *suite.tests]


def on(driver: str) -> Suite:
    def variables(servers: Servers) -> dict[str, str]:
        server = servers.postgres
        # The embedded server is built without ICU. Only the name matters.
        server.query('CREATE COLLATION "sv-x-icu" FROM "C"', dbname="template1")
        return {
            "SUITE_DRIVER": driver,
            "SUITE_HOST": server.host,
            "SUITE_PORT": str(server.port),
            "SUITE_USER": server.user,
            "SUITE_PASSWORD": server.password,
        }

    return Suite(
        name=f"django-{driver}",
        title=f"Django {VERSION}, {driver}",
        source=Sdist("Django", VERSION),
        requirements=(f"Django=={VERSION}", *REQUIREMENTS),
        extras=("psycopg",),
        postgres={},
        tests=LABELS,
        variables=variables,
        command=command,
        folder="tests",
        through="django",
    )


SUITES = (on("psycopg"), on("psycopg2"))
