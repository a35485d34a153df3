"""psycopg's suite, as far as it is synchronous and asks a server."""

from collections.abc import Sequence

from suites.sources import Checkout
from suites.suite import Servers, Suite

VERSION = "3.3.9"
# Of other parts of psycopg, and what is slow, or depends on the time that something takes.
OTHERS = ("tests/pool", "tests/crdb", "tests/pq", "tests/scripts", "tests/test_typing.py")


def arguments(servers: Servers) -> Sequence[str]:
    return (
        f"--test-dsn={servers.postgres.fresh_database()}",
        "--impl=binary",
        "--ignore-glob=*_async*",
        *(f"--ignore={path}" for path in OTHERS),
        *("-m", "not slow and not timing and not subprocess and not mypy and not refcount"),
        *("-k", "not asyncio and not AsyncConnection and not AsyncCursor"),
    )


SUITES = (
    Suite(
        name="psycopg",
        title=f"psycopg {VERSION}",
        # Its distributions have no tests.
        source=Checkout(
            "PSYCOPG_SOURCE", VERSION, f"psycopg's repository with {VERSION} checked out"
        ),
        requirements=(
            f"psycopg[binary]=={VERSION}",
            "anyio==4.16.0",
            "pproxy==2.7.9",
        ),
        extras=("psycopg",),
        postgres={"max_prepared_transactions": 10},
        tests=("tests",),
        arguments=arguments,
        through="psycopg_connections",
        not_counted={
            "*test_connection.py::test_connect_args*": "a mock of the connection attempt",
            "*test_connection.py::test_connect_badargs*": "a mock of the connection attempt",
            "*test_cursor_common.py::test_init*": "it asks for psycopg's own class",
            "*test_cursor_common.py::test_typeinfo*": "it asks for psycopg's own class",
            "*test_cursor_server.py::test_init*": "it asks for psycopg's own class",
            "*test_typeinfo.py::*": "it asks for psycopg's own class",
        },
    ),
)
