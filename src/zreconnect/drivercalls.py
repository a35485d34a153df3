"""Functions of a driver's that want its own connection or cursor, and not what stands for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from zreconnect.cursor import ReconnectingCursor
from zreconnect.documented import documented_by
from zreconnect.interfaces import IReconnectingConnection
from zreconnect.proxies import LargeObject
from zreconnect.session import NO_SESSION
from zreconnect.states import Moment, Request, State
from zreconnect.tpc import TwoPhaseCalls

Result = TypeVar("Result")


@documented_by(IReconnectingConnection)
class DriverCalls(TwoPhaseCalls):
    """The part of a `ReconnectingConnection` that hands the driver's own objects out."""

    __slots__ = ()

    @property
    def driver_connection(self) -> Any:
        raw = self.raw_connection
        self.work.link.observer.handed_out()
        return raw

    @property
    def raw_connection(self) -> Any:
        """The `driver_connection`, for whoever does not hand it to the program."""
        if self.work.state is State.PREPARED:
            self.work.ask(Request.LOOK)
        return self.raw_in_session()

    def raw_in_session(self) -> Any:
        """The raw connection, for an attribute of it, in a prepared transaction too."""
        if self.work.state is State.CLOSED:
            self.work.ask(Request.LOOK)
        if self.work.link.session is NO_SESSION:
            with self.guard.in_turn():
                self.work.need_session()
        return self.work.link.session.raw

    def lobject(self, *args: Any, **keywords: Any) -> Any:
        """A large object, as the driver has it; it lives as long as the transaction."""
        with self.guard.in_turn():
            self.guard.need_transaction()
            with self.guard.asking():
                raw = self.work.link.session.raw
                self.work.link.driver.own_transaction(raw)
                return LargeObject(self.guard, raw.lobject(*args, **keywords))

    def call_driver(
        self, function: Callable[..., Result], *args: Any, **keywords: Any
    ) -> Result | Any:
        work, guard, link = self.work, self.guard, self.work.link
        with guard.in_turn():
            guard.need_transaction()
            session = link.session
            handed: list[tuple[Any, Any]] = []

            def own(value: Any) -> Any:
                # By its own type: a cursor says that it is of the class that was asked for.
                if value is self:
                    raw = session.raw
                elif issubclass(type(value), ReconnectingCursor) and value.connection is self:
                    raw = value.raw_in_session()
                else:
                    return value
                handed.append((raw, value))
                return raw

            args = tuple(map(own, args))
            keywords = {name: own(value) for name, value in keywords.items()}
            raw_cursor = next((raw for raw, ours in handed if ours is not self), None)
            link.driver.hand_out(session.raw)
            moment = Moment.AUTOCOMMIT if work.state is State.IDLE else Moment.STATEMENT
            try:
                with guard.asking(moment, raw_cursor):
                    result = function(*args, **keywords)
            finally:
                for _, ours in handed:
                    if ours is not self:
                        ours.has_executed()
                if link.observer.watches_statements:
                    link.observer.executed(None)
            if work.state is State.ACTIVE and not session.in_transaction():
                link.statement_ends()
            return next((ours for raw, ours in handed if raw is result), result)
