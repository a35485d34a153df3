"""Storm's suite, with the scheme of its own PostgreSQL backend registered anew."""

from suites.sources import Sdist
from suites.suite import Servers, Suite, with_unittest

VERSION = "1.3"


def variables(servers: Servers) -> dict[str, str]:
    uri = servers.postgres.fresh_database().replace("postgresql:", "postgres:", 1)
    return {"STORM_POSTGRES_URI": uri}


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
        tests=("storm.tests.find_tests",),
        command=with_unittest,
        variables=variables,
        through="storm",
    ),
)
