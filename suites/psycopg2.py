"""psycopg2's suite, whose ``connect()`` gives connections that reconnect."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from suites.sources import Sdist
from suites.suite import Servers, Suite, with_unittest

VERSION = "2.9.13"
MODULES = """
async bugX000 bug_gc cancel connection copy cursor dates errcodes errors extras_dictcursor
fast_executemany green ipaddress lobject module notify psycopg2_dbapi20 quote replication sql
transaction types_basic types_extras with
"""
REGISTER = "register_type(type, connection or cursor), or what calls it"
ENCRYPT = "encrypt_password(scope=connection)"
ADAPT = "adapter.prepare(connection)"
QUOTE = "quote_ident(name, connection or cursor)"
CASTER = "a caster of C code, called with the cursor"
COMPOSED = "as_string(connection or cursor)"
# What in psycopg2's C code wants an object of its own class. `call_driver` gives it one.
C_TYPES = {
    "bug_gc.StolenReferenceTestCase.*": REGISTER,
    "connection.ConnectionTests.test_cursor_factory_none": "type(cursor)",
    "connection.ConnectionTests.test_encoding_name": REGISTER,
    "connection.TestEncryptPassword.test_encrypt_bad_libpq_10": ENCRYPT,
    "connection.TestEncryptPassword.test_encrypt_password_post_9_6": ENCRYPT,
    "connection.TestEncryptPassword.test_encrypt_scram": ENCRYPT,
    "connection.TestEncryptPassword.test_encrypt_server": ENCRYPT,
    # It also expects set_client_encoding() to roll back, as two others do, which are counted.
    "copy.CopyTests.test_copy_expert_textiobase": REGISTER,
    "cursor.CursorTests.test_cast_specificity": REGISTER,
    "dates.DatetimeTests.test_interval_overflow": CASTER,
    "dates.DatetimeTests.test_parse_datetime_timezone": CASTER,
    "dates.DatetimeTests.test_parse_time_timezone": CASTER,
    "dates.DatetimeTests.test_redshift_day": CASTER,
    "fast_executemany.*.test_unicode": REGISTER,
    "fast_executemany.TestExecuteValues.test_composed": COMPOSED,
    "ipaddress.NetworkingTestCase.*": REGISTER,
    "quote.QuotingTestCase.test_bytes": REGISTER,
    "quote.QuotingTestCase.test_unicode": REGISTER,
    "quote.TestQuotedIdentifier.test_identifier": QUOTE,
    "quote.TestQuotedIdentifier.test_unicode_ident": QUOTE,
    "quote.TestQuotedString.test_encoding_from_conn": ADAPT,
    "quote.TestStringAdapter.test_adapt_bytes": ADAPT,
    "quote.TestStringAdapter.test_connection_wins_anyway": ADAPT,
    "sql.ComposedTest.test_join": COMPOSED,
    "sql.ComposedTest.test_sum*": COMPOSED,
    "sql.IdentifierTests.test_as_str": COMPOSED,
    "sql.LiteralTests.test_must_be_adaptable": COMPOSED,
    "sql.LiteralTests.test_repr": COMPOSED,
    "sql.SQLTests.test_join": COMPOSED,
    "sql.SqlFormatTests.test_braces_escape": COMPOSED,
    "sql.SqlFormatTests.test_compose_literal": COMPOSED,
    "sql.SqlFormatTests.test_dict": COMPOSED,
    "sql.SqlFormatTests.test_must_be_adaptable": COMPOSED,
    "sql.SqlFormatTests.test_percent_escape": COMPOSED,
    "sql.SqlFormatTests.test_pos*": COMPOSED,
    "types_basic.TypesBasicTests.testBytesArray": REGISTER,
    "types_basic.TypesBasicTests.testGenericArrayNull": REGISTER,
    "types_basic.TypesBasicTests.testUnicodeArray": REGISTER,
    "types_extras.AdaptTypeTestCase.test_cast_composite": REGISTER,
    "types_extras.AdaptTypeTestCase.test_cast_nested": REGISTER,
    "types_extras.AdaptTypeTestCase.test_composite_*": REGISTER,
    "types_extras.AdaptTypeTestCase.test_empty_string": CASTER,
    "types_extras.AdaptTypeTestCase.test_from_tables": REGISTER,
    "types_extras.AdaptTypeTestCase.test_non_dbapi_connection": REGISTER,
    "types_extras.AdaptTypeTestCase.test_register_on_*": REGISTER,
    "types_extras.AdaptTypeTestCase.test_subclass": REGISTER,
    "types_extras.AdaptTypeTestCase.test_wrong_schema": REGISTER,
    "types_extras.HstoreTestCase.test_adapt_9": ADAPT,
    "types_extras.HstoreTestCase.test_array_cast": REGISTER,
    "types_extras.HstoreTestCase.test_non_dbapi_connection": REGISTER,
    "types_extras.HstoreTestCase.test_register_conn": REGISTER,
    "types_extras.HstoreTestCase.test_register_curs": REGISTER,
    "types_extras.HstoreTestCase.test_roundtrip*": REGISTER,
    "types_extras.JsonTestCase.test_loads": REGISTER,
    "types_extras.JsonTestCase.test_no_array_oid": REGISTER,
    "types_extras.JsonTestCase.test_null": REGISTER,
    "types_extras.Json*TestCase.test_register_default": REGISTER,
    "types_extras.Json*TestCase.test_register_on_*": REGISTER,
    "types_extras.JsonbTestCase.test_loads": REGISTER,
    "types_extras.RangeCasterTestCase.test_rang_weird_name": REGISTER,
    "types_extras.RangeCasterTestCase.test_range_escaping": REGISTER,
    "types_extras.RangeCasterTestCase.test_register_range_adapter": REGISTER,
    "types_extras.RangeCasterTestCase.test_schema_range": REGISTER,
    "types_extras.TypesExtrasTests.test_inet_conform": ADAPT,
}
MOCKS = {
    "connection.TestConnectionInfo.*": "makes a connection whose constructor does nothing",
    "module.ConnectTestCase.*": "replaces psycopg2's connect() and looks at its arguments",
}


def variables(servers: Servers) -> dict[str, str]:
    url = urlsplit(servers.postgres.fresh_database())
    dbname = url.path.removeprefix("/")
    servers.postgres.query("CREATE EXTENSION hstore", dbname=dbname)
    return {
        "PSYCOPG2_TESTDB": dbname,
        "PSYCOPG2_TESTDB_HOST": str(url.hostname),
        "PSYCOPG2_TESTDB_PORT": str(url.port),
        "PSYCOPG2_TESTDB_USER": unquote(url.username or ""),
        "PSYCOPG2_TESTDB_PASSWORD": unquote(url.password or ""),
    }


SUITES = (
    Suite(
        name="psycopg2",
        title=f"psycopg2 {VERSION}",
        source=Sdist("psycopg2", VERSION),
        requirements=(),
        extras=(),
        postgres={"max_prepared_transactions": 20},
        tests=tuple(f"tests.test_{name}" for name in MODULES.split()),
        command=with_unittest,
        variables=variables,
        through="psycopg2",
        not_counted={f"tests.test_{test}": reason for test, reason in (C_TYPES | MOCKS).items()},
    ),
)
