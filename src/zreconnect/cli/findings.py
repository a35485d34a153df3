"""What an examination finds, and what it has to look at."""

from __future__ import annotations

import enum
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zreconnect.server import Server


class Severity(enum.Enum):
    """How bad it is; the worst first."""

    ERROR = "error"  # Something does not work.
    WARNING = "warning"  # A loss will cost more than it has to: work, or hours.
    NOTE = "note"  # Good to know, and right for some.
    OK = "ok"


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    check: what was looked at, in a word. reason: what it is like, and what that means.
    remedy: what to do; empty if there is nothing to be done.
    """

    check: str
    severity: Severity
    reason: str
    remedy: str = ""


#: Several findings of one check.
Findings = Iterator[Finding]
Check = Callable[["Patient"], Findings]


@dataclass(frozen=True)
class Patient:
    """What is examined.

    server: that of the DSN. raw: a connection of the driver's, outside a transaction. table: the
    name of the ledger.
    """

    server: Server
    raw: Any
    table: str

    @property
    def driver(self) -> Any:
        """The server's driver."""
        return self.server.driver

    def query(self, statement: str, *parameters: object) -> list[Any]:
        """The rows. Raises the driver's errors."""
        rows: list[Any] = self.driver.query(self.raw, statement, parameters or None)
        return rows

    def value(self, statement: str, *parameters: object) -> Any:
        """The only value. Raises the driver's errors."""
        ((value,),) = self.query(statement, *parameters)
        return value

    @cached_property
    def parameters(self) -> dict[str, str]:
        """Those of the connection, also from where the client library has some by itself."""
        return {**self.driver.parameters(self.raw), **self.server.parameters}

    def on_socket(self, look: Callable[[socket.socket], Any]) -> Any:
        """What a function says of the connection's socket."""
        with socket.socket(fileno=os.dup(self.driver.fileno(self.raw))) as copy:
            return look(copy)

    @cached_property
    def is_local(self) -> bool:
        """Whether the line does not leave the machine."""

        def look(line: socket.socket) -> bool:
            if line.family == socket.AF_UNIX:
                return True
            return ipaddress.ip_address(line.getpeername()[0].partition("%")[0]).is_loopback

        return bool(self.on_socket(look))


def ok(check: str, reason: str) -> Finding:
    """There is nothing to be done."""
    return Finding(check, Severity.OK, reason)


def note(check: str, reason: str, remedy: str = "") -> Finding:
    """It is good to know."""
    return Finding(check, Severity.NOTE, reason, remedy)


def warning(check: str, reason: str, remedy: str) -> Finding:
    """A loss will cost more than it has to."""
    return Finding(check, Severity.WARNING, reason, remedy)


def error(check: str, reason: str, remedy: str) -> Finding:
    """Something does not work."""
    return Finding(check, Severity.ERROR, reason, remedy)
