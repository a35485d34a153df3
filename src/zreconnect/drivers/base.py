"""What all drivers share: their vocabulary, and finding one by name."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from importlib import import_module
from typing import Any

DRIVERS = {"psycopg2": "zreconnect.drivers.psycopg2"}


class Meaning(enum.Enum):
    """What an error says about the connection and the unit of work."""

    DISCONNECT = "the server session has ended, or there was none"
    TRANSIENT = "the session lives, and the same work may succeed when it is run again"
    PERMANENT = "connecting is refused, and will be again"
    USER = "the statement is wrong, or the data"


class Condition(enum.Enum):
    """What some errors of zreconnect's own statements say."""

    UNDEFINED_TABLE = "there is no such table"
    INSUFFICIENT_PRIVILEGE = "the role may not do that"
    ALREADY_EXISTS = "somebody else has made it"
    LOCK_NOT_AVAILABLE = "a lock was not given in time"
    READ_ONLY_TRANSACTION = "the transaction may not write"


@dataclass(frozen=True)
class ServerSession:
    """One session as its server knows it.

    pid: the server's number for it, which may be given again when it has ended.
    start: what tells it from the others of that number.
    is_standby: whether the server takes no writes.
    """

    pid: int
    start: Any
    is_standby: bool = False


@dataclass
class SessionSettings:
    """What the user set on a connection, and what its next session gets again.

    None leaves a setting as the server has it.
    """

    autocommit: bool = False
    isolation_level: int | None = None
    readonly: bool | None = None
    deferrable: bool | None = None
    client_encoding: str | None = None
    cursor_factory: Any = None


def load_driver(name: str) -> Any:
    """The `IDriver` of that name. Raises ValueError for an unknown one."""
    if name not in DRIVERS:
        raise ValueError(f"driver {name!r} is unknown; known are {', '.join(sorted(DRIVERS))}")
    return import_module(DRIVERS[name]).driver
