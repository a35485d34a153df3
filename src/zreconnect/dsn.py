"""Data source names: which driver they ask for, and how to show them without a password."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, quote, unquote, urlencode

from zreconnect.drivers.base import DRIVERS, registered_names

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+._-]*):")
# What SQLAlchemy takes for a host with a port where there is one host only.
_HOST_AND_PORT = re.compile(r"[A-Za-z0-9.-]*:\d*")
# Which drivers a scheme may mean; the first one is taken.
_POSTGRESQL = ("psycopg2", "psycopg")
_MYSQL = ("mysqlclient", "pymysql")
SCHEMES = {
    "dbi": _POSTGRESQL,
    "mariadb": _MYSQL,
    "mysql": _MYSQL,
    "postgres": _POSTGRESQL,
    "postgresql": _POSTGRESQL,
    "sqlite": ("sqlite",),
    # As SQLAlchemy has them.
    "mariadb+mysqldb": ("mysqlclient",),
    "mariadb+pymysql": ("pymysql",),
    "mysql+mysqldb": ("mysqlclient",),
    "mysql+pymysql": ("pymysql",),
    "postgresql+psycopg": ("psycopg",),
    "postgresql+psycopg2": ("psycopg2",),
    "sqlite+pysqlite": ("sqlite",),
}
FORMS = (
    "postgresql://user:password@host:port/dbname, dbi://user:password@host:port/dbname "
    "or 'host=... dbname=... user=...'"
)


def driver_name(dsn: str, asked: str | None = None) -> str:
    """The name of the driver for ``dsn``; a registered one has its scheme as its name.

    asked: the driver that the program has asked for, if it has.

    Raises TypeError if it is no string, ValueError if it is empty, its scheme is unknown, or asks
    for another driver than the program.
    """
    if not isinstance(dsn, str):
        raise TypeError(f"dsn must be a string, not {type(dsn).__name__}")
    if not dsn.strip():
        raise ValueError(f"dsn is empty; it has the form {FORMS}")
    scheme = SCHEME.match(dsn)
    if scheme is None:
        return asked or "psycopg2"
    name = scheme.group(1).lower()
    drivers = SCHEMES.get(name)
    if drivers is None:
        return _registered_name(name, asked)
    if asked is None:
        has_first = drivers != _MYSQL or importlib.util.find_spec("MySQLdb") is not None
        return drivers[0 if has_first else 1]
    # A driver that is registered may be for any server.
    if asked not in drivers and (asked in DRIVERS or "+" in name):
        raise ValueError(
            f"driver {asked!r} contradicts the dsn, whose scheme {scheme.group(1)!r} asks for "
            f"{' or '.join(drivers)}: leave one of them out"
        )
    return asked


def _registered_name(scheme: str, asked: str | None) -> str:
    """The driver for a scheme that is none of zreconnect's."""
    registered = registered_names()
    if asked is not None and asked not in DRIVERS:
        return asked
    if asked is None and scheme in registered:
        return scheme
    known = ", ".join(sorted({*SCHEMES, *registered}))
    raise ValueError(f"dsn has the unknown scheme {scheme!r}; known are {known}")


def plain(dsn: str) -> str:
    """The DSN as database modules read it: without the name of a driver in its scheme, with ``%20``
    where SQLAlchemy's options have ``+``, and with a list for several hosts, as libpq has it, where
    SQLAlchemy has ``?host=a:5432&host=b``."""
    scheme = SCHEME.match(dsn)
    if scheme is None or "+" not in scheme.group(1):
        return dsn
    dsn = scheme.group(1).partition("+")[0].lower() + dsn[scheme.end(1) :]
    location, question_mark, query = dsn.partition("?")
    options = parse_qsl(query, keep_blank_values=True)
    hosts = [value for name, value in options if name == "host"]
    if len(hosts) > 1 or any(map(_HOST_AND_PORT.fullmatch, hosts)):
        split = [host.partition(":") for host in hosts]
        options = [option for option in options if option[0] != "host"]
        options.append(("host", ",".join(host for host, _, _ in split)))
        if "port" not in dict(options):
            options.append(("port", ",".join(port for _, _, port in split)))
    return location + question_mark + urlencode(options, quote_via=quote)


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
