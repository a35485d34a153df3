"""What differs between databases for Z SQL Methods: types of columns, dates, quoting, catalogs."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from typing import Any

from zreconnect.drivers.base import load_driver
from zreconnect.integrations import needs

with needs(__name__, "zreconnect[zsql]"):
    from DateTime import DateTime
    from DateTime.interfaces import DateTimeError
    from DocumentTemplate.DT_Var import sql_quote

# The numbers that Products.ZPsycopgDA has for isolation levels, which are psycopg2's.
LEVELS = {1: "READ COMMITTED", 2: "REPEATABLE READ", 3: "SERIALIZABLE", 4: "READ UNCOMMITTED"}
# The letters that Zope has for types of columns, by a type's number in pg_type. They are those of
# Products.ZPsycopgDA, to which an integer is a number like others; but for 1184, timestamptz, which
# it takes for text.
POSTGRESQL_LETTERS = {
    **dict.fromkeys((16, 20, 21, 23, 700, 701, 1700), "n"),
    **dict.fromkeys((1082, 1083, 1114, 1184, 1266), "d"),
    26: "i",
}
# By FIELD_TYPE, which both modules have. They are those of Products.ZMySQLDA.
MYSQL_LETTERS = {
    **dict.fromkeys((1, 2, 3, 9, 13), "i"),
    8: "l",
    **dict.fromkeys((0, 4, 5, 246), "n"),
    **dict.fromkeys((7, 10, 12), "d"),
}

Row = Sequence[Any]


class PostgreSQL:
    """PostgreSQL, through psycopg2 or psycopg.

    driver_name: that of zreconnect's driver.
    """

    letters = POSTGRESQL_LETTERS
    #: That of all other types.
    other = "s"
    tables = (
        "SELECT c.relname, CASE WHEN c.relkind IN ('v', 'm') THEN 'VIEW' ELSE 'TABLE' END,"
        " pg_get_userbyid(c.relowner) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.relkind IN ('r', 'p', 'f', 'v', 'm') AND n.nspname !~ '^pg_'"
        " AND n.nspname <> 'information_schema' ORDER BY c.relname"
    )
    columns = (
        "SELECT column_name, data_type, udt_name, is_nullable FROM information_schema.columns"
        " WHERE table_name = %s ORDER BY ordinal_position"
    )

    def __init__(self, driver_name: str) -> None:
        self._driver = load_driver(driver_name)

    def quote(self, value: str | bytes) -> str:
        """A text as it stands in a statement, whatever standard_conforming_strings says."""
        text: str = sql_quote(value)
        if "\\" in text:
            escaped = text.replace("\\", "\\\\")
            return f" E'{escaped}'"
        return f"'{text}'"

    def set_up(self, raw: Any, level: int, zdatetime: bool) -> None:
        """Prepare a new session. level: a key of `LEVELS`. zdatetime: whether dates are Zope's."""
        raw.isolation_level = self._driver.isolation_level(LEVELS[level])
        if not zdatetime:
            return
        if self._driver.name == "psycopg":
            self._load_dates(raw)
            return
        from psycopg2.extensions import new_type, register_type

        register_type(new_type((1114, 1184), "ZDATETIME", _cast(zope_datetime)), raw)
        register_type(new_type((1082,), "ZDATE", _cast(zope_datetime)), raw)
        register_type(new_type((1083,), "ZTIME", _cast(zope_time)), raw)

    def _load_dates(self, raw: Any) -> None:
        from psycopg.adapt import Loader

        class DateTimeLoader(Loader):
            def load(self, data: Any) -> Any:
                return zope_datetime(bytes(data).decode())

        class TimeLoader(Loader):
            def load(self, data: Any) -> Any:
                return zope_time(bytes(data).decode())

        for oid in (1082, 1114, 1184):
            raw.adapters.register_loader(oid, DateTimeLoader)
        raw.adapters.register_loader(1083, TimeLoader)

    def converter(self, letters: Sequence[str]) -> Callable[[Row], Row] | None:
        """What makes of a row what Zope is to have; the session does."""
        return None


class MySQL:
    """MySQL and MariaDB, through mysqlclient or PyMySQL."""

    letters = MYSQL_LETTERS
    other = "t"
    tables = (
        "SELECT table_name, CASE table_type WHEN 'VIEW' THEN 'VIEW' ELSE 'TABLE' END, ''"
        " FROM information_schema.tables WHERE table_schema = DATABASE() ORDER BY table_name"
    )
    columns = (
        "SELECT column_name, column_type, data_type, is_nullable FROM information_schema.columns"
        " WHERE table_schema = DATABASE() AND table_name = %s ORDER BY ordinal_position"
    )

    def quote(self, value: str | bytes) -> str:
        """A text as it stands in a statement, whatever sql_mode says of backslashes."""
        text = value.decode() if isinstance(value, bytes) else value
        if "\\" in text:
            return f"_utf8mb4 x'{text.encode().hex()}'"
        doubled = text.replace("'", "''")
        return f"'{doubled}'"

    def set_up(self, raw: Any, level: int, zdatetime: bool) -> None:
        """As `PostgreSQL.set_up`; see `converter` for dates."""
        cursor = raw.cursor()
        cursor.execute(f"SET SESSION TRANSACTION ISOLATION LEVEL {LEVELS[level]}")
        cursor.close()

    def converter(self, letters: Sequence[str]) -> Callable[[Row], Row] | None:
        """What makes of a row one with Zope's dates; None if it has none."""
        if "d" not in letters:
            return None
        return lambda row: tuple(map(_zope_date_of, row))


Database = PostgreSQL | MySQL


def database_of(driver_name: str) -> Database:
    """What the driver's database is like. Raises ValueError for one that is not supported."""
    if driver_name in ("psycopg", "psycopg2"):
        return PostgreSQL(driver_name)
    if driver_name in ("mysqlclient", "pymysql"):
        return MySQL()
    raise ValueError(f"Z SQL Methods need PostgreSQL or MySQL, not the driver {driver_name!r}")


def zope_datetime(iso: str) -> Any:
    """A Zope DateTime; what has none, such as infinity, as the server writes it."""
    try:
        return DateTime(iso)
    except DateTimeError:
        return iso


def zope_time(iso: str) -> Any:
    """A Zope DateTime of that time of today."""
    return zope_datetime(f"{time.strftime('%Y-%m-%d')} {iso[:8]}")


def _zope_date_of(value: Any) -> Any:
    return zope_datetime(str(value)) if isinstance(value, datetime.date) else value


def _cast(convert: Callable[[str], Any]) -> Callable[[Any, Any], Any]:
    return lambda iso, cursor: None if iso is None else convert(iso)
