"""SQLAlchemy's suite, as far as it uses a database, on registered engines."""

from collections.abc import Sequence

from suites.sources import Sdist
from suites.suite import Servers, Suite

VERSION = "2.0.58"
DIALECT = (
    "test/dialect/test_suite.py",
    "test/dialect/postgresql",
    "test/engine/test_execute.py",
    "test/engine/test_reconnect.py",
    "test/engine/test_transaction.py",
)
MOCKED = dict.fromkeys(
    (
        "*::DialectEventTest::test_connect_do_connect",
        "*::DialectEventTest::test_connect_do_connect_no_cargs_cparams_leak_nullpool",
        "*::DialectEventTest::test_connect_replace_params",
    ),
    "a mock of the driver's connection",
)


def variables(servers: Servers) -> dict[str, str]:
    # Or the tests would use the source's modules, without what is compiled of them.
    return {"PYTHONNOUSERSITE": "1"}


def on(driver: str, name: str, title: str, tests: Sequence[str]) -> Suite:
    def arguments(servers: Servers) -> list[str]:
        server = servers.postgres
        server.create_database("test")
        server.query("ALTER DATABASE test SET default_text_search_config = 'pg_catalog.english'")
        for schema in ("test_schema", "test_schema_2"):
            server.query(f"CREATE SCHEMA {schema}", dbname="test")
        # Tests replace capital letters in the URL, also in the password.
        server.query("CREATE ROLE scott SUPERUSER LOGIN PASSWORD 'tiger'")
        address = f"{server.host}:{server.port}"
        return ["--dburi", f"postgresql+{driver}://scott:tiger@{address}/test"]

    return Suite(
        name=f"sqlalchemy-{name}",
        title=f"SQLAlchemy {VERSION}, {title}",
        source=Sdist("SQLAlchemy", VERSION),
        requirements=(f"SQLAlchemy=={VERSION}",),
        extras=("psycopg", "sqlalchemy"),
        postgres={"max_prepared_transactions": 10},
        tests=tests,
        arguments=arguments,
        variables=variables,
        through="sqlalchemy_engines",
        not_counted=MOCKED if tests is DIALECT else {},
    )


SUITES = (
    on("psycopg2", "psycopg2", "psycopg2", DIALECT),
    on("psycopg", "psycopg", "psycopg", DIALECT),
    on("psycopg2", "orm", "psycopg2, ORM", ("test/orm",)),
)
