"""MySQL and MariaDB through mysqlclient, whose module is MySQLdb."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import MySQLdb
from MySQLdb import connections, cursors

from zreconnect.documented import implements
from zreconnect.drivers.base import AT_HAND, addresses, reads_as
from zreconnect.drivers.greenlets import tell_if_it_blocks
from zreconnect.drivers.mysql import (
    CR_SSL_CONNECTION_ERROR,
    REQUIRED,
    MysqlDisconnectionError,
    MysqlDriver,
)
from zreconnect.interfaces import IDriver

# The option of a DSN, and the key that mysqlclient has for it.
TLS_FILES = {"ssl_ca": "ca", "ssl_cert": "cert", "ssl_key": "key"}

# What to do under gevent.
GREENLETS = "Use PyMySQL (mysql+pymysql://), which waits as gevent does."


class MysqlclientDisconnectionError(MysqlDisconnectionError, MySQLdb.OperationalError):
    """A `DisconnectionError` for code that was written against mysqlclient."""


@implements(IDriver)
class MysqlclientDriver(MysqlDriver):
    """The `IDriver` for mysqlclient."""

    name = "mysqlclient"
    module = MySQLdb
    disconnection_error = MysqlclientDisconnectionError
    connection_class = connections.Connection
    plain_cursor = cursors.Cursor
    server_side_cursor = cursors.SSCursor
    refused_methods = frozenset(
        {
            *("query", "send_query", "read_query_result", "next_result"),
            *("store_result", "use_result", "discard_result"),
            *("change_user", "set_server_option"),
        }
    )

    def prepare(self, raw: Any) -> None:
        super().prepare(raw)
        tell_if_it_blocks("mysqlclient", GREENLETS)

    def rows_at_hand(self, raw_cursor: Any) -> int:
        return AT_HAND if reads_as(raw_cursor.__class__, cursors.Cursor) else 1

    def connect(self, parameters: Mapping[str, str], timeout: float) -> Any:
        # The library gives each address of a name the whole time. "localhost" is no name for it.
        is_name = parameters.get("host") != "localhost" and "unix_socket" not in parameters
        places = len(addresses(parameters)) if is_name else 1
        raw = super().connect(parameters, timeout / max(1, places))
        # MariaDB's client library takes this for a wish.
        if parameters.get("ssl_mode") == "REQUIRED" and not self._uses_tls(raw):
            self.close(raw)
            raise MySQLdb.OperationalError(
                CR_SSL_CONNECTION_ERROR, "TLS is required, but the server does not use it"
            )
        return raw

    def _uses_tls(self, raw: Any) -> bool:
        ((_, cipher),) = self.query(raw, "SHOW STATUS LIKE 'Ssl_cipher'")
        return bool(cipher)

    def encrypted(self, raw: Any, parameters: Mapping[str, str]) -> Mapping[str, str] | None:
        mode = parameters.get("ssl_mode", "PREFERRED")
        if mode != "PREFERRED":
            return None if mode == "DISABLED" else parameters
        return {**parameters, **REQUIRED} if self._uses_tls(raw) else None

    def tls_keywords(self, parameters: Mapping[str, str]) -> dict[str, Any]:
        files = {key: parameters[name] for name, key in TLS_FILES.items() if name in parameters}
        keywords: dict[str, Any] = {"ssl": files} if files else {}
        if "ssl_mode" in parameters:
            keywords["ssl_mode"] = parameters["ssl_mode"]
        # PyMySQL's default, too: several statements in one string are for who asks for them.
        return {"multi_statements": False, **keywords}

    def parameters(self, raw: Any) -> dict[str, str]:
        found = {"user": raw.user, "host": raw.host, "port": raw.port, "dbname": raw.database}
        return {name: str(value) for name, value in found.items() if value}

    def fileno(self, raw: Any) -> int:
        number: int = raw.fileno()
        return number


driver = MysqlclientDriver()
