"""The settings of a connection's sessions, as the drivers spell them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from zreconnect.documented import documented_by
from zreconnect.guard import Guard
from zreconnect.interfaces import IReconnectingConnection
from zreconnect.session import NO_SESSION
from zreconnect.states import Moment, Request, State
from zreconnect.work import Work

Result = TypeVar("Result")


class DriverAttribute:
    """An attribute of the raw connection that can be set, if the driver's has it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self.__doc__ = (
            f"The ``{name}`` of the driver's connection; it holds for later sessions, too.\n\n"
            "Connects if there is no session. Raises AttributeError if the driver has none."
        )

    def __get__(self, connection: Any, owner: type) -> Any:
        return self if connection is None else getattr(connection.raw_connection, self._name)

    def __set__(self, connection: Any, value: Any) -> None:
        setattr(connection.raw_connection, self._name, value)


class _Switch(int):
    """Whether a connection is in autocommit mode; and what is called to change that, as the modules
    for MySQL have it."""

    def __new__(cls, connection: Any, mode: bool) -> _Switch:
        switch = super().__new__(cls, mode)
        switch._connection = connection
        return switch

    _connection: Any

    def __call__(self, value: bool) -> None:
        # As the modules, it does nothing if there is nothing to change.
        if self._connection.get_autocommit() != bool(value):
            self._connection.autocommit = value

    def __repr__(self) -> str:
        return repr(bool(self))


class DriverContainer(DriverAttribute):
    """One that a program may replace, such as the list of psycopg2's notices; some drivers have a
    method of that name."""

    def __get__(self, connection: Any, owner: type) -> Any:
        if connection is None:
            return self
        # SQLAlchemy looks at the notices after each statement: this takes four calls less.
        value = getattr(connection.work.link.session.raw, self._name, None)
        return value if isinstance(value, list) else connection.__getattr__(self._name)


@documented_by(IReconnectingConnection)
class SettingsOfSessions:
    """The part of a `ReconnectingConnection` that sets up its sessions.

    Each setting holds for the present session and for later ones.
    """

    __slots__ = {
        "guard": "What becomes of errors, a `zreconnect.guard.Guard`.",
        "work": "What is known of the present transaction, a `zreconnect.work.Work`.",
    }

    work: Work
    guard: Guard

    notices = DriverContainer()
    notifies = DriverContainer()

    cursorclass = DriverAttribute()
    text_factory = DriverAttribute()

    @property
    def open(self) -> bool:
        """Whether ``close()`` was not called, as in PyMySQL and mysqlclient. A lost session is
        replaced."""
        return self.work.state is not State.CLOSED

    @property
    def connection(self) -> Any:
        """Itself, as a cursor's is: functions of psycopg2 and psycopg 3 ask for it."""
        return self

    @property
    def autocommit(self) -> Any:
        mode = self.work.link.settings.autocommit
        return _Switch(self, mode) if self.work.link.driver.calls_autocommit else mode

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self.set_session(autocommit=value)

    @property
    def isolation_level(self) -> int | None:
        return self.work.link.settings.isolation_level

    @isolation_level.setter
    def isolation_level(self, level: int | str | None) -> None:
        self._change_settings(isolation_level=self.work.link.driver.isolation_level(level))

    @property
    def readonly(self) -> bool | None:
        return self.work.link.settings.readonly

    @readonly.setter
    def readonly(self, value: bool | str | None) -> None:
        self._change_settings(readonly=_flag("readonly", value))

    # psycopg 3's names.
    read_only = readonly

    def get_autocommit(self) -> bool:
        """``autocommit``, as in PyMySQL and mysqlclient."""
        return self.work.link.settings.autocommit

    def set_autocommit(self, value: bool) -> None:
        """Set ``autocommit``, as in psycopg 3.

        Raises the driver's ProgrammingError inside a transaction.
        """
        self.autocommit = value

    def set_read_only(self, value: bool | None) -> None:
        """Set ``readonly``, as in psycopg 3; None stands for the server's default.

        Raises the driver's ProgrammingError inside a transaction, ValueError for an unknown value.
        """
        self.readonly = value

    def set_deferrable(self, value: bool | None) -> None:
        """Set ``deferrable``, as in psycopg 3; None stands for the server's default.

        Raises the driver's ProgrammingError inside a transaction, ValueError for an unknown value.
        """
        self.deferrable = value

    @property
    def deferrable(self) -> bool | None:
        return self.work.link.settings.deferrable

    @deferrable.setter
    def deferrable(self, value: bool | str | None) -> None:
        self._change_settings(deferrable=_flag("deferrable", value))

    @property
    def cursor_factory(self) -> Any:
        return self.work.link.settings.cursor_factory

    @cursor_factory.setter
    def cursor_factory(self, value: Any) -> None:
        link = self.work.link
        if link.session is not NO_SESSION:
            link.driver.set_cursor_factory(link.session.raw, value)
        link.settings.cursor_factory = value

    def set_session(
        self,
        isolation_level: int | str | None = None,
        readonly: bool | str | None = None,
        deferrable: bool | str | None = None,
        autocommit: bool | None = None,
    ) -> None:
        """Set what is given, as in psycopg2; None leaves a setting as it is.

        Raises the driver's ProgrammingError inside a transaction, ValueError for an unknown value.
        """
        changes: dict[str, Any] = {}
        if isolation_level is not None:
            changes["isolation_level"] = self.work.link.driver.isolation_level(isolation_level)
        if readonly is not None:
            changes["readonly"] = _flag("readonly", readonly)
        if deferrable is not None:
            changes["deferrable"] = _flag("deferrable", deferrable)
        if autocommit is not None:
            changes["autocommit"] = bool(autocommit)
        self._change_settings(**changes)

    def set_isolation_level(self, level: int | str | None) -> None:
        """Set the isolation level, as in psycopg2: 0 is autocommit mode at the server's own level,
        any other one ends it.

        Raises the driver's ProgrammingError inside a transaction, ValueError for an unknown level.
        """
        if level == 0:
            self._change_settings(isolation_level=None, autocommit=True)
        else:
            number = self.work.link.driver.isolation_level(level)
            self._change_settings(isolation_level=number, autocommit=False)

    def set_client_encoding(self, encoding: str) -> None:
        """Set the encoding of this session and of later ones.

        Raises the driver's ProgrammingError inside a transaction, since a rollback would undo it,
        unless that is the session's encoding already, which a driver for PostgreSQL knows.
        """
        work, link = self.work, self.work.link
        with self.guard.in_turn():
            if work.state is not State.ACTIVE or not link.driver.has_client_encoding(
                link.session.raw, encoding
            ):
                work.ask(Request.SETTINGS, "set_client_encoding()")
                self._set_up(lambda raw: link.driver.set_client_encoding(raw, encoding))
            link.settings.client_encoding = encoding

    def choose(self, method: str, inside: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """Call one of the driver's ``choosing_methods``. inside: what does so in a transaction."""
        driver = self.work.link.driver
        with self.guard.in_turn():
            if self.work.state is not State.IDLE:
                return inside(*args, **keywords)
            return self._set_up(lambda raw: driver.attribute(raw, method)(*args, **keywords))

    def _set_up(self, request: Callable[[Any], Result]) -> Result:
        """Have a request set up the session; or the next, if this is lost between transactions."""
        link = self.work.link
        self.guard.need_live_session()
        # Statements of the program's may have begun one.
        is_inside = link.driver.in_transaction(link.session.raw)
        with self.guard.asking(Moment.STATEMENT if is_inside else Moment.OURS):
            return request(link.session.raw)
        self.work.need_session()
        with self.guard.asking():
            return request(link.session.raw)

    def is_begun_by_statement(self) -> bool:
        """Whether a transaction is under way that a statement has begun in autocommit mode, and of
        which nothing is known here."""
        link = self.work.link
        return (
            self.work.is_autocommit()
            and link.session is not NO_SESSION
            and bool(link.driver.in_transaction(link.session.raw))
        )

    def refuse_if_begun_by_statement(self, request: str) -> None:
        """Raise the driver's ProgrammingError if a request is made inside such a transaction."""
        if self.is_begun_by_statement():
            raise self.work.link.driver.module.ProgrammingError(
                f"{request} inside a transaction that a statement has begun in autocommit mode: "
                "end it by a statement, too, or begin it with begin()"
            )

    def ping(self, reconnect: bool = False) -> None:
        """Have a session that lives, as PyMySQL and mysqlclient have it; with all drivers.

        Outside a transaction, a session that is lost is replaced. reconnect: makes no difference.
        Raises `DisconnectionError` if a transaction's is lost, and what connecting raises.
        """
        work = self.work
        with self.guard.in_turn():
            if work.state is State.IDLE:
                self.guard.need_live_session(asks=True)
            else:
                work.ask(Request.LOOK)
                with self.guard.asking():
                    work.link.driver.query(work.link.session.raw, "SELECT 1")

    def reset(self) -> None:
        """Roll back, and forget all settings but those of ``on_connect``; the next transaction
        gets a new session."""
        if not self.work.turn.is_mine():
            self.guard.take_turn()
        try:
            self.guard.roll_back()
            self.work.link.reset()
        finally:
            self.work.give_turn()

    def _change_settings(self, **changes: Any) -> None:
        link = self.work.link
        with self.guard.in_turn():
            self.work.ask(Request.SETTINGS, "Changing the session's settings")
            self.refuse_if_begun_by_statement("Changing the session's settings")
            settings = replace(link.settings, **changes)
            if settings.pooled:
                link.driver.pooling.check_settings(settings)
            link.settings = settings
            if link.session is not NO_SESSION:
                with self.guard.asking(Moment.OURS):
                    link.driver.restore(link.session.raw, link.settings, link.replaced)


def _flag(name: str, value: bool | str | None) -> bool | None:
    if value is None or (isinstance(value, str) and value.upper() == "DEFAULT"):
        return None
    if isinstance(value, str):
        raise ValueError(f"{name} must be a truth value, None or 'DEFAULT', not {value!r}")
    return bool(value)
