"""A connection's sessions, one after the other, and what each of them gets from the one before."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from zreconnect import commits, events
from zreconnect.drivers.base import SessionSettings
from zreconnect.history import Change
from zreconnect.options import Options
from zreconnect.policy import LONGEST_ATTEMPT, RetryPolicy
from zreconnect.server import AttemptFailed, Server
from zreconnect.session import NO_SESSION, Session, open_session, tell_if_cut

#: What costs nothing to have twice: as many as psycopg2 fetches at once from a server-side cursor.
FEW_ROWS = 2000
TAKES_NO_WRITES = "the server takes no writes: it is a standby, or read-only"

Use = Callable[[Any], object]
Check = Callable[[], object]


class Link:
    """What leads from a connection to its server.

    server: where the sessions are. options: those of the connection.
    session: the present one, or `NO_SESSION`.
    settings: what the user has set, and each later session gets, too. replaced: what the driver
    has replaced for that in the present session.
    is_on_standby: whether the server was a standby when the observer recorded the session.
    is_behind_pooler: whether the present session has shown that there is a pooler in between.
    was_ended: whether a statement of the program's has ended the transaction, as COMMIT does.
    heard: the monotonic time at which the server has last said that a transaction has ended.
    observer: the `IObserver` of the present session and, if that is lost, of its last transaction;
    another one in another process.
    readers: refer to the cursors that have rows which would be lost with the session.
    keepers: the cursors that have kept them, or have fetched some that they have not given yet.
    changes: of the server's history, that are to be told.
    reads_only: whether a statement of the program's has made the transaction a read-only one,
    behind a pooler.
    """

    def __init__(self, server: Server, options: Options) -> None:
        self.server = server
        self.driver = server.driver
        self.options = options
        self.session: Session = NO_SESSION
        self.settings = self._no_settings()
        self.replaced: dict[str, Any] = {}
        self.observer = options.observer(self.driver)
        # The one that was opened last, prepared or not: what an interrupt has left of it is ended.
        self._opened: Session = NO_SESSION
        # What the driver has kept of the last raw connection.
        self._kept: Any = None
        self._had_session = False
        self.is_on_standby = self.is_behind_pooler = False
        self.was_ended = False
        self.readers: set[weakref.ref[Any]] = set()
        self.heard = -math.inf
        self.keepers: weakref.WeakSet[Any] = weakref.WeakSet()
        # Whether a server has refused a write since.
        self._was_refused = False
        self.changes: list[Change] = []
        self.reads_only = False

    def fork(self) -> Link:
        """For another connection with the same settings."""
        raw = self.session.raw
        forked = Link(self.server, self.options)
        forked.settings = replace(self.settings)
        forked._kept = self._kept if raw is None else self.driver.keep(raw)
        return forked

    def leave_to_parent(self) -> None:
        """Let go of the session, if it is the parent process's and this was not noticed before."""
        if self.session is not NO_SESSION and self.session.process != os.getpid():
            self.renew_observer()

    def needs_writes(self) -> bool:
        """Whether a server that takes no writes is of no use."""
        return self.settings.readonly is not True

    def check_statement(self, statement: Any, options: dict[str, Any]) -> None:
        """Behind a pooler, before a statement of a cursor with these options.

        Raises the driver's ProgrammingError for one that is not possible there.
        """
        self.driver.pooling.check_statement(statement, options)
        if self.driver.sets_modes(statement) and self.driver.pooling.is_read_only(statement):
            self.reads_only = True

    def is_refused(self, error: BaseException, raw: Any) -> bool:
        """Whether ``error`` says that the server takes no writes, and it is asked to."""
        if self.settings.pooled:
            is_primary = self.observer.takes_writes or self.reads_only
        else:
            is_primary = self.is_behind_pooler and not self.is_on_standby
        # Then it is the program that has begun a read-only transaction.
        return not is_primary and self._is_from_standby(error, raw)

    def _is_from_standby(self, error: BaseException, raw: Any) -> bool:
        # One that is promoted says so at once, and refuses on in a transaction that began before.
        is_old_news = self.is_behind_pooler or self.is_on_standby
        return self.needs_writes() and bool(
            self.driver.is_refused_by_standby(error, raw, is_old_news)
        )

    def is_elsewhere(self, raw: Any) -> bool:
        """Whether a transaction that has begun shows that the server is another one than that which
        was recorded, or what was a standby is none any more."""
        if not self.settings.pooled:
            return self.is_on_standby and not self.driver.is_standby(raw)
        moved = self.observer.is_elsewhere
        return bool(moved or (self.is_on_standby and self.observer.takes_writes))

    def statement_ends(self) -> None:
        """A statement of the program's ends the transaction, or has ended it, as COMMIT does."""
        self.was_ended = self.observer.is_replaced = True
        commits.note()

    def has_committed(self) -> bool:
        """Whether a statement of the last transaction may have committed it."""
        return self.was_ended or bool(self.driver.has_committed(self.session.raw))

    def note_committed(self) -> None:
        """Note what the session knows of that, before it ends or another transaction begins."""
        self.was_ended = self.observer.is_replaced = self.has_committed()

    def answer_limit(self) -> float:
        """The seconds that the answer may take to a request that must not wait for ever."""
        return self.options.response_timeout or LONGEST_ATTEMPT

    def open(self, first_use: Use, policy: RetryPolicy, check: Check) -> None:
        """Open the next session; ``first_use`` of its raw connection is part of an attempt.

        check: called before each attempt; raises what makes it unnecessary.

        If a server has refused a write, this one has to take writes.

        Raises what `open_session` raises.
        """
        # Whoever gives up may read where nobody can write.
        was_refused, self._was_refused = self._was_refused, False

        def prepare(session: Session) -> None:
            raw = session.raw
            self._opened, before = session, self._opened
            if before is not NO_SESSION:
                before.end()
            try:
                was_shared = self._kept is not None and self.settings.pooled
                self._find_pooler(raw)
                if self._kept is not None:
                    self.driver.inherit(raw, self._kept)
                if self.settings.pooled and not was_shared:
                    self.driver.pooling.share(raw)
                if self.options.on_connect is not None:
                    self.options.on_connect(raw)
                self.replaced = {}
                self.driver.restore(raw, self.settings, self.replaced)
                # Until the orphan of the session before has ended, it can commit late, and holds
                # locks.
                self.observer.fence(raw)
                if was_refused and self.needs_writes():
                    self.check_takes_writes(raw)
                first_use(raw)
            except self.driver.module.Error as error:
                if self._is_from_standby(error, raw):
                    raise AttemptFailed(error) from error
                raise

        def adopt(session: Session) -> bool:
            had_session, self._had_session = self._had_session, True
            self.session = session
            return had_session

        open_session(self.server, policy, check, prepare, adopt)
        self.tell_changes()

    def check_takes_writes(self, raw: Any) -> None:
        """Have an attempt fail if the server takes no writes. What is missing on a standby proves
        nothing, and what is there may not be the last of it."""
        if not self.driver.takes_writes(raw):
            raise AttemptFailed(self.driver.module.OperationalError(TAKES_NO_WRITES))

    def record_session(self, raw: Any) -> None:
        """Have the observer know a new session. Raises the driver's errors."""
        change = self.observer.record_session(raw, self.settings)
        if change is not None:
            self.changes.append(change)
        if self.is_behind_pooler:
            self.is_on_standby = not self.driver.takes_writes(raw)
        else:
            self.is_on_standby = self.driver.is_standby(raw)

    def _no_settings(self) -> SessionSettings:
        return SessionSettings(pooled=bool(self.options.pooled))

    def _find_pooler(self, raw: Any) -> None:
        """Note whether others may have the session as well."""
        pooling = self.driver.pooling
        if pooling is None:
            return
        self.is_behind_pooler = pooling.is_in_between(raw)
        if self.options.pooled is None:
            self.settings.pooled = self.is_behind_pooler
        if self.settings.pooled:
            self.is_behind_pooler = True

    def tell_changes(self) -> None:
        """Announce what the sessions have shown of the server's history."""
        while self.changes:
            change = self.changes.pop(0)
            address = self.server.address
            events.announce(events.HistoryChanged(address, change.evidence, change.is_missing))

    def keep_rows(self, at_most: float = math.inf) -> None:
        """Have rows kept that would be lost with the session, of each cursor unless it has more."""
        for reader in self.readers.copy():
            cursor = reader()
            if cursor is None or cursor.keep_rows(at_most):
                # Last: what an interrupt has left out is kept by the next who tries.
                self.readers.discard(reader)

    def keep_rows_before_request(self, is_inside: bool) -> None:
        """Before a request that may find the session lost. is_inside: it is in a transaction."""
        are_few = is_inside and self.session.watch.is_quiet()
        # If they are many, what has arrived on the line has to tell of a loss of both.
        self.keep_rows(FEW_ROWS if are_few else math.inf)

    def _keep(self) -> None:
        """Keep what would be lost with the present session, if there is one."""
        self.keep_rows()
        for keeper in tuple(self.keepers):
            keeper.leave_session()
        self.keepers.clear()
        session = self.session
        if session is not NO_SESSION:
            self.note_committed()
            self._kept = self.driver.keep(session.raw)

    def end(self) -> None:
        """End the present session, if there is one."""
        self._keep()
        if self._opened is not NO_SESSION:
            self._opened.end()
            # Last: what an interrupt keeps from being ended is ended by the next who tries.
            self.session = self._opened = NO_SESSION

    def lost(self, error: BaseException, state: str) -> None:
        """End the present session, which is lost, and tell. state: the connection's."""
        session = self.session
        self._was_refused = self._was_refused or self.is_refused(error, self.session.raw)
        self.end()
        is_news = self.server.lost(session.opened)
        tell_if_cut(self.server, session.watch)
        events.announce(events.ConnectionLost(self.server.address, error, state, is_news=is_news))

    def close(self) -> None:
        """End the present session, in which nothing is under way, for good."""
        # A forked child has lost all threads but one, and what they held, before anything is told.
        self.leave_to_parent()
        session = self.session
        if session.raw is not None:
            try:
                with session.watch.awaiting(self.answer_limit()):
                    self.observer.close(session.raw)
            except self.driver.module.Error as error:
                events.logger.debug(
                    "The session had ended before it was closed: %s",
                    error,
                    extra={"server": self.server.address},
                )
        self.end()

    def reset(self) -> None:
        """End the present session, and forget what the user has set."""
        self.settings = self._no_settings()
        self.end()
        self._kept = None

    def renew_observer(self) -> None:
        """End the present session; what is known of it and its transactions is for others."""
        observer = self.options.observer(self.driver)
        self._keep()
        # In one step: no session is there without who knows it, nor this one with who knows it not.
        self.session, self.observer = NO_SESSION, observer
        self.end()

    def replace_observer(self) -> None:
        """As `renew_observer`, for the same process: it knows which history the server's was."""
        history = self.observer.history
        self.renew_observer()
        self.observer.history = history
