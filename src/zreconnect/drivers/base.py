"""What all drivers share: their vocabulary, what most do alike, and finding one by name."""

from __future__ import annotations

import contextlib
import enum
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any, TypeAlias

from zreconnect.documented import documented_by
from zreconnect.history import History
from zreconnect.interfaces import IDriver, Meaning

__all__ = [
    "BaseDriver",
    "Begun",
    "Condition",
    "Evidence",
    "History",
    "Mark",
    "Meaning",
    "ServerSession",
    "SessionSettings",
    "addresses",
    "redirect_to_null",
    "set_own_default",
]

DRIVERS = {
    "mysqlclient": "zreconnect.drivers.mysqlclient",
    "psycopg": "zreconnect.drivers.psycopg",
    "psycopg2": "zreconnect.drivers.psycopg2",
    "pymysql": "zreconnect.drivers.pymysql",
    "sqlite": "zreconnect.drivers.sqlite",
}
#: Which extra of zreconnect installs a database module.
EXTRAS = {"psycopg": "psycopg", "MySQLdb": "mysql", "pymysql": "pymysql"}
#: What to do about a connection of another module, for a driver that refuses it.
OF_ANOTHER_MODULE = "; for a connection of another module pass the name of its driver, driver=..."
#: The entry points by which other distributions make their drivers known.
ENTRY_POINTS = "zreconnect.drivers"


class Condition(enum.Enum):
    """What some errors of zreconnect's own statements say."""

    UNDEFINED_TABLE = "there is no such table"
    INSUFFICIENT_PRIVILEGE = "the role may not do that"
    ALREADY_EXISTS = "somebody else has made it"
    LOCK_NOT_AVAILABLE = "a lock was not given in time"
    READ_ONLY_TRANSACTION = "the transaction may not write"
    #: SQLSTATE 42704, as COMMIT PREPARED tells it of a name that is not prepared.
    UNDEFINED_OBJECT = "there is no such thing"
    #: SQLSTATE 55000, as COMMIT PREPARED tells it of a name that another session is about to end.
    OBJECT_NOT_IN_PREREQUISITE_STATE = "it is not in the state for that"


@dataclass(frozen=True)
class ServerSession:
    """One session as its server knows it.

    pid: the server's number for it, which may be given again when it has ended.
    start: what tells it from the others of that number, for `IDriver.end_session`; of any type, and
    shown to people as it prints. None if there is nothing, so that it cannot be ended.
    is_standby: whether the server takes no writes.
    is_pooled: whether any transaction may be in another one, see `SessionSettings`.
    is_lent: whether a pooler has it, and gives it to others afterwards.
    history: that of the server; None if it is a standby, or does not tell.
    start_is: what ``start`` is, for people.
    """

    pid: int
    start: Any
    is_standby: bool = False
    is_pooled: bool = False
    is_lent: bool = False
    history: History | None = None
    start_is: str = "that had started at"

    def __str__(self) -> str:
        start = "" if self.start is None else f" {self.start_is} {self.start}"
        return f"the server process {self.pid}{start}"


# A transaction as its server knows it: the number of its session, and its start there.
Mark: TypeAlias = tuple[int, str]


@dataclass(frozen=True)
class Evidence:
    """What tells a transaction of ours from all others, as far as it is known.

    began: the monotonic time at which BEGIN had been answered. marks: of a transaction that has
    told it, the number of its session, an integer, and its start there, a string; more than one
    pair if it is not known which of them it was. Only where there are transaction ids:
    ``pg_backend_pid()`` and ``extract(epoch FROM xact_start)::text``.
    xid: the id of whoever has written or locked our row of a ledger last, a string, as the driver's
    ``ledger_writer`` tells it.
    """

    began: float
    marks: tuple[Mark, ...] = ()
    xid: str | None = None


#: How many rows that have arrived an iteration fetches at a time. More gain nothing.
AT_HAND = 100
# The methods that give rows, any of which an iteration may be made of.
WAYS_TO_READ = ("__iter__", "__next__", "fetchone", "fetchmany")


@cache
def reads_as(kind: type[Any], plain: type[Any]) -> bool:
    """Whether a class of cursors gives rows as the module's own class does, from which it is
    derived."""
    return all(getattr(kind, way, None) is getattr(plain, way, None) for way in WAYS_TO_READ)


# A transaction that has begun along with its first statement: what the rider has returned, and what
# the statement has raised, or None.
Begun: TypeAlias = tuple[Any, BaseException | None]


@dataclass
class SessionSettings:
    """What the user set on a connection, and what its next session gets again.

    None leaves a setting as the server has it. isolation_level: what the driver's method of that
    name has returned. pooled: whether each transaction may be in another server process, which
    others have in between: as the program says, or the session has shown.
    """

    autocommit: bool = False
    isolation_level: int | None = None
    readonly: bool | None = None
    deferrable: bool | None = None
    client_encoding: str | None = None
    cursor_factory: Any = None
    pooled: bool = False


def set_own_default(
    name: str, mode: Any, replaced: dict[str, Any], change: Callable[[str, Any], Any]
) -> None:
    """Set a default of the session's own; None for ``mode`` takes back what was set here.

    replaced: what was set here, with the values before. change: called with a name and a value,
    sets it, and returns the value before.
    """
    if mode is not None:
        before = change(name, mode)
        replaced.setdefault(name, before)
    elif name in replaced:
        change(name, replaced[name])
        del replaced[name]


@documented_by(IDriver)
class BaseDriver:
    """What most drivers do alike; those that know better replace it. See `IDriver`.

    It is for a server, whose sessions can be lost, and takes nothing for granted that a module
    would have to tell.
    """

    module: Any
    has_sessions = True
    loses_rows = False
    supports_two_phase = False
    pooling: Any = None
    calls_autocommit = False
    refused_methods: frozenset[str] = frozenset()
    committing_methods: frozenset[str] = frozenset()
    choosing_methods: frozenset[str] = frozenset()
    # Nothing matches it.
    may_chain = re.compile("(?!)").match
    rollback_request: Any = ()
    quote = '"'
    ledger_conflict = "ON CONFLICT (id) DO UPDATE SET"
    ledger_isolation: str | None = None
    ledger_free = ""
    ledger_writer: str | None = None

    def places(self, parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [parameters]

    def encrypted(self, raw: Any, parameters: Mapping[str, str]) -> Mapping[str, str] | None:
        return None

    def keep(self, raw: Any) -> Any:
        return None

    def inherit(self, raw: Any, kept: Any) -> None:
        """Nothing is kept."""

    def hand_out(self, raw: Any) -> None:
        """The transaction's status tells enough afterwards."""

    def begins_read_only(self, raw: Any, settings: SessionSettings) -> bool:
        return bool(settings.readonly)

    def own_transaction(self, raw: Any) -> None:
        """The module works in any transaction."""

    def prepare_transaction(self, raw: Any, gid: str) -> None:
        raise self.module.NotSupportedError("Transactions cannot be prepared")

    def in_failed_transaction(self, raw: Any) -> bool:
        # A failed statement has done nothing, and the transaction goes on.
        return False

    def is_at_rest(self, raw: Any) -> bool:
        # Of a module that does not tell, nothing is certain after an interrupt.
        return False

    def transaction_flag(self, raw: Any) -> Callable[[], object]:
        # Nobody tells.
        return partial(bool, True)

    def attribute(self, raw: Any, name: str) -> Any:
        return getattr(raw, name)

    def autocommit_mode(self, query: Any) -> bool | None:
        return None

    def has_client_encoding(self, raw: Any, encoding: str) -> bool:
        return False

    def check_cursor(self, name: str | None, options: Mapping[str, Any]) -> None:
        """The module says what it refuses when it makes the cursor."""

    def has_committed(self, raw: Any) -> bool:
        return False

    def close(self, raw: Any) -> None:
        with contextlib.suppress(self.module.Error):
            raw.close()

    def is_transient(self, error: BaseException) -> bool:
        return False

    def is_refused_by_standby(
        self, error: BaseException, raw: Any, is_old_news: bool = False
    ) -> bool:
        return False

    def is_standby(self, raw: Any) -> bool:
        return False

    def takes_writes(self, raw: Any) -> bool:
        return True

    def misses_target(self, raw: Any, parameters: Mapping[str, str]) -> bool:
        return False

    def rows_at_hand(self, raw_cursor: Any) -> int:
        return 1

    def sets_modes(self, statement: Any) -> bool:
        return False

    def chains(self, statement: Any) -> bool:
        # `has_committed` tells of it, or nothing that could be lost.
        return False

    def looks_like_reading(self, raw_cursor: Any) -> bool:
        return False

    def has_written(self, raw: Any, but_for: str | None = None) -> bool:
        driver: Any = self
        driver.query(raw, "SELECT 1")
        return True

    def has_transaction_ids(self, raw: Any) -> bool:
        return False


def addresses(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parameters with each address of the host's name as ``hostaddr``; asks name servers.

    Empty if there is no name, or if it is not known, which the database module is to say.
    """
    host = parameters.get("host") or ""
    if not host or host[0] in "/@" or parameters.get("hostaddr"):
        return []
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [
        {**parameters, "hostaddr": address}
        for address in dict.fromkeys(address[0] for *_, address in found)
    ]


# Opened early: a child may have no descriptor left to open it with.
_null = os.open(os.devnull, os.O_RDWR)


def named_as(replaced: type[Any], made: type[Any]) -> type[Any]:
    """The class that was made in the place of another, by whose name it goes."""
    made.__name__ = replaced.__name__
    made.__qualname__ = replaced.__qualname__
    made.__module__ = replaced.__module__
    return made


def redirect_to_null(fileno: int) -> None:
    """Let a forked child's copy of its parent's socket lead to the null device.

    What the module may still write there then reaches nobody, and the parent's session has one
    holder less. Raises OSError if ``fileno`` is no file descriptor.
    """
    os.dup2(_null, fileno, inheritable=False)


def load_driver(name: str) -> Any:
    """The `IDriver` of that name: one of zreconnect's, or one that a distribution has registered.

    Raises ValueError for an unknown one, ImportError if its database module is not installed, and
    TypeError if what is registered is no driver.
    """
    if name in DRIVERS:
        return _import_driver(name)
    try:
        entry_point = _entry_points()[name]
    except KeyError:
        known = ", ".join(sorted({*DRIVERS, *registered_names()}))
        raise ValueError(f"driver {name!r} is unknown; known are {known}") from None
    driver = entry_point.load()
    if not IDriver.providedBy(driver):
        raise TypeError(
            f"driver {name!r} is registered as {entry_point.value}, which is no IDriver"
        )
    return driver


def registered_names() -> set[str]:
    """The names of the drivers that other distributions have registered."""
    return set(_entry_points().names)


def _entry_points() -> Any:
    # It imports more than all that most programs need.
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINTS)


def _import_driver(name: str) -> Any:
    try:
        return import_module(DRIVERS[name]).driver
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name or "")
        if extra is None:
            raise
        raise ImportError(
            f"driver {name!r} needs the module {error.name}, which is not installed: "
            f'pip install "zreconnect[{extra}]"',
            name=error.name,
        ) from error
