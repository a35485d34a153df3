"""MySQL and MariaDB through PyMySQL."""

from __future__ import annotations

import configparser
import copy
import functools
import math
import os
import socket
import ssl
import struct
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

import pymysql
from pymysql import connections, cursors
from pymysql.charset import charset_by_name
from pymysql.constants import CLIENT, SERVER_STATUS

from zreconnect.documented import implements
from zreconnect.drivers.base import AT_HAND, addresses, named_as, reads_as
from zreconnect.drivers.mysql import (
    CHARSET,
    CR_SERVER_HANDSHAKE_ERR,
    REQUIRED,
    MysqlDisconnectionError,
    MysqlDriver,
)
from zreconnect.interfaces import IDriver

# Where the errors of a socket come from. Others are a signal handler's.
SOCKETS = frozenset({"eventlet", "gevent", "pymysql", "socket", "ssl"})
# What it raises when it reads what is no server's first word.
NONSENSE = pymysql.InternalError, LookupError, UnicodeDecodeError, struct.error
# What its class raises for an option that it refuses, or for a file that an option names.
REFUSALS = configparser.Error, LookupError, OSError, TypeError, ValueError, pymysql.Error
# Without a place for certificates, PyMySQL reads all of the system's for each connection, which
# takes 28 ms of a CPU, and looks at none of them.
ANY_CERTIFICATE = {"verify_mode": False, "check_hostname": False, "capath": os.devnull}
TLS: Mapping[str, Mapping[str, Any]] = {
    "DISABLED": {"ssl_disabled": True},
    "PREFERRED": {},
    "REQUIRED": {"ssl": ANY_CERTIFICATE},
    "VERIFY_CA": {"ssl_verify_cert": True},
    "VERIFY_IDENTITY": {"ssl_verify_cert": True, "ssl_verify_identity": True},
}
_FILES = ("ssl_ca", "ssl_cert", "ssl_key")
# Without any of these, PyMySQL prefers TLS, and takes any certificate.
TLS_KEYWORDS = frozenset(
    {
        *_FILES,
        "read_default_file",
        "read_default_group",
        *(keyword for keywords in TLS.values() for keyword in keywords),
    }
)


class PymysqlDisconnectionError(MysqlDisconnectionError, pymysql.OperationalError):
    """A `DisconnectionError` for code that was written against PyMySQL."""


@implements(IDriver)
class PymysqlDriver(MysqlDriver):
    """The `IDriver` for PyMySQL."""

    name = "pymysql"
    module = pymysql
    disconnection_error = PymysqlDisconnectionError
    connection_class = connections.Connection
    plain_cursor = cursors.Cursor
    server_side_cursor = cursors.SSCursor
    refused_methods = frozenset({"query", "next_result", "connect"})

    def parse(self, dsn: str) -> dict[str, str]:
        parameters = super().parse(dsn)
        try:
            self._make(parameters, 1.0)
        except pymysql.ProgrammingError as error:
            raise ValueError(f"dsn: {error}") from None
        return parameters

    def places(self, parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        found = [] if "unix_socket" in parameters else addresses(parameters)
        return found if len(found) > 1 else [parameters]

    def rows_at_hand(self, raw_cursor: Any) -> int:
        return AT_HAND if reads_as(raw_cursor.__class__, cursors.Cursor) else 1

    def connect(self, parameters: Mapping[str, str], timeout: float) -> Any:
        # Its connect_timeout does not hold for a server that accepts and says nothing.
        raw = self._make({**parameters, "read_timeout": str(math.ceil(timeout))}, timeout)
        try:
            if "hostaddr" in parameters:
                # The host's name stays what the certificate has to be for.
                raw.connect(_socket(parameters["hostaddr"], raw.port, raw.connect_timeout))
            else:
                raw.connect()
        except NONSENSE as error:
            raise pymysql.OperationalError(
                CR_SERVER_HANDSHAKE_ERR,
                f"Who answers at {self.address(parameters)} is no server of MySQL's or MariaDB's: "
                f"see whether the DSN has the right host and port. PyMySQL says: {error}",
            ) from error
        raw._read_timeout = (
            int(parameters["read_timeout"]) if "read_timeout" in parameters else None
        )
        return raw

    def prepare(self, raw: Any) -> None:
        super().prepare(raw)
        raw.__class__ = _passing_on(raw.__class__)
        # ping(reconnect=True) calls it in the middle of a transaction, too.
        raw.connect = _refuse_to_connect

    def _make(self, parameters: Mapping[str, str], timeout: float) -> Any:
        """A connection that is not connected yet. Raises ProgrammingError for a mistake."""
        if charset_by_name(parameters.get("charset", CHARSET)) is None:
            raise pymysql.ProgrammingError("PyMySQL does not know the charset")
        keywords = self.connect_keywords(parameters, timeout)
        prefers_tls = connections.SSL_ENABLED and not TLS_KEYWORDS & keywords.keys()
        if prefers_tls:
            keywords["ssl_disabled"] = True
        try:
            raw = pymysql.connect(**keywords, defer_connect=True)
            if prefers_tls:
                raw.ssl, raw.ctx = True, raw._create_ssl_ctx(ANY_CERTIFICATE)
        except REFUSALS as error:
            # It has read certificates and the configuration file, which its message may quote.
            reason = getattr(error, "strerror", None) or "see its documentation"
            raise pymysql.ProgrammingError(
                f"PyMySQL refuses an option, with {type(error).__name__}: {reason}"
            ) from None
        return raw

    def close(self, raw: Any) -> None:
        super().close(raw)
        result = getattr(raw, "_result", None)
        if result is not None and result.unbuffered_active:
            # Else it would want to read its rest when it is deleted, and then, to whom reads it,
            # seem to be at its end.
            result.unbuffered_active = False
            result._read_rowdata_packet_unbuffered = _refuse_to_read

    def is_inside_own(self, raw: Any, text: str) -> bool:
        return bool(raw.server_status & SERVER_STATUS.SERVER_STATUS_IN_TRANS)

    def is_at_rest(self, raw: Any) -> bool:
        # The rows of a server-side cursor are read one by one.
        return super().is_at_rest(raw) and not getattr(raw._result, "unbuffered_active", False)

    def tls_keywords(self, parameters: Mapping[str, str]) -> dict[str, Any]:
        mode = parameters.get("ssl_mode", "PREFERRED")
        files = {name: parameters[name] for name in _FILES if name in parameters}
        # PyMySQL adds to a dictionary what its configuration file has.
        return {**copy.deepcopy(TLS[mode]), **files}

    def encrypted(self, raw: Any, parameters: Mapping[str, str]) -> Mapping[str, str] | None:
        if not isinstance(raw._sock, ssl.SSLSocket):
            return None
        # It has set this itself if TLS was asked for, be it in its configuration file.
        return parameters if raw.client_flag & CLIENT.SSL else {**parameters, **REQUIRED}

    def parameters(self, raw: Any) -> dict[str, str]:
        # It has encoded what it sends to log in.
        found = {"user": raw.user, "host": raw.host, "port": str(raw.port), "dbname": raw.db}
        return {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in found.items()
            if value
        }

    def fileno(self, raw: Any) -> int:
        # There is no other way to it.
        if raw._sock is None:
            raise pymysql.InterfaceError("The connection is closed")
        number: int = raw._sock.fileno()
        return number


def _refuse_to_read() -> NoReturn:
    raise pymysql.InterfaceError("The connection was closed before all rows were read")


def _refuse_to_connect(sock: Any = None) -> NoReturn:
    raise pymysql.NotSupportedError(
        "connect() would replace the session behind its transaction's back, without on_connect. A "
        "session that is lost is replaced when the next transaction begins"
    )


def _socket(address: str, port: int, timeout: float) -> socket.socket:
    """A socket as PyMySQL makes it."""
    connected = socket.create_connection((address, port), timeout)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


@functools.cache
def _passing_on(connection_class: type[Any]) -> type[Any]:
    """A subclass that raises what a signal's handler has raised while it reads or writes.

    PyMySQL takes each OSError, and so a TimeoutError, for the loss of the connection.
    """

    class PassingOn(connection_class):
        def _read_bytes(self, number: int) -> Any:
            try:
                return super()._read_bytes(number)
            except pymysql.OperationalError as error:
                _pass_on_what_is_behind(error)
                raise

        def _write_bytes(self, data: Any) -> None:
            try:
                super()._write_bytes(data)
            except pymysql.OperationalError as error:
                _pass_on_what_is_behind(error)
                raise

    return named_as(connection_class, PassingOn)


def _pass_on_what_is_behind(error: BaseException) -> None:
    """Raise what a signal's handler has raised, if that is what the error was made from."""
    behind = error.__context__
    if isinstance(behind, OSError):
        packages = [
            str(frame.f_globals.get("__name__")).partition(".")[0]
            for frame, _ in traceback.walk_tb(behind.__traceback__)
        ]
        # What the program handles already, when it makes the request, has not come from PyMySQL.
        if packages[:1] == ["pymysql"] and packages[-1] not in SOCKETS:
            raise behind


driver = PymysqlDriver()
