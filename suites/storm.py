"""Storm's suite as far as it uses PostgreSQL, whose backend is registered anew."""

from suites.sources import Sdist
from suites.suite import Servers, Suite, with_unittest

VERSION = "1.3"
# Those that use PostgreSQL.
TESTS = (
    "storm.tests.databases.postgres",
    "storm.tests.store.postgres",
    "storm.tests.tracer",
    "storm.tests.zope.zstorm",
)


def variables(servers: Servers) -> dict[str, str]:
    uri = servers.postgres.fresh_database().replace("postgresql:", "postgres:", 1)
    return {"STORM_POSTGRES_URI": uri, "STORM_POSTGRES_HOST_URI": uri}


SUITES = (
    Suite(
        name="storm",
        title=f"Storm {VERSION}",
        source=Sdist("storm", VERSION),
        requirements=(
            f"storm=={VERSION}",
            "fixtures==4.3.2",
            "testresources==2.1.2",
            "timeline==0.0.7",
        ),
        extras=("storm", "embedded"),
        postgres={"max_prepared_transactions": 20},
        tests=TESTS,
        command=with_unittest,
        variables=variables,
        through="storm",
        not_counted={
            "*.test_rollback_swallows_InterfaceError": "a mock of the connection",
            "*.test_is_disconnection_error_with_*": "a mock of an error: made by hand",
        },
    ),
)
