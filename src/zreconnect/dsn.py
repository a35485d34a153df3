"""Data source names: which driver they ask for, and how to show them without a password."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from urllib.parse import quote, unquote

from zreconnect.drivers.base import registered_names

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
DRIVERS = {
    "postgresql": "psycopg2",
    "postgres": "psycopg2",
    "dbi": "psycopg2",
    "sqlite": "sqlite",
    "mysql": "mysqlclient",
}
FORMS = (
    "postgresql://user:password@host:port/dbname, dbi://user:password@host:port/dbname "
    "or 'host=... dbname=... user=...'"
)


def driver_name(dsn: str) -> str:
    """The name of the driver that ``dsn`` asks for; a registered one has its scheme as its name.

    Raises TypeError if it is no string, ValueError if it is empty or its scheme is unknown.
    """
    if not isinstance(dsn, str):
        raise TypeError(f"dsn must be a string, not {type(dsn).__name__}")
    if not dsn.strip():
        raise ValueError(f"dsn is empty; it has the form {FORMS}")
    scheme = SCHEME.match(dsn)
    if scheme is None:
        return "psycopg2"
    name = scheme.group(1).lower()
    if name == "mysql" and importlib.util.find_spec("MySQLdb") is None:
        return "pymysql"
    if name in DRIVERS:
        return DRIVERS[name]
    registered = registered_names()
    if name in registered:
        return name
    known = ", ".join(sorted({*DRIVERS, *registered}))
    raise ValueError(f"dsn has the unknown scheme {scheme.group(1)!r}; known are {known}")


def parse_dbi(dsn: str) -> dict[str, str]:
    """The parts of Zope's ``dbi://[user:password@host:port/]dbname[;name=value...]``.

    ``dbi://user:password/dbname`` leaves out the host, as zope.rdb allowed.
    Raises ValueError if there is no database name or a parameter has no value.
    """
    location, *options = dsn.partition("://")[2].split(";")
    login, _, dbname = location.rpartition("/")
    user, _, address = login.rpartition("@") if "@" in login else (login, "", "")
    parameters = dict(option.partition("=")[::2] for option in options if option)
    if not dbname or not all(parameters.values()):
        raise ValueError(f"dsn is no dbi:// name of the form {FORMS}")
    parts = {"dbname": dbname}
    parts["user"], _, parts["password"] = user.partition(":")
    parts["host"], _, parts["port"] = address.partition(":")
    return {name: unquote(part) for name, part in {**parts, **parameters}.items() if part}


def redacted(parameters: Mapping[str, str], scheme: str = "postgresql") -> str:
    """The server's address for people: user, host, port and database, no password."""
    user = quote(parameters["user"]) + "@" if parameters.get("user") else ""
    host = parameters.get("host") or parameters.get("hostaddr") or ""
    port = ":" + parameters["port"] if parameters.get("port") else ""
    dbname = quote(parameters.get("dbname") or "")
    return f"{scheme}://{user}{quote(host, safe='/,:')}{port}/{dbname}"
