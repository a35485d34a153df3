"""Django's backend for PostgreSQL, with a `ReconnectingConnection` in the driver's place.

Django looks for ``DatabaseWrapper`` in the module ``base`` of what a database's ``ENGINE`` names.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from zreconnect import hosts
from zreconnect.connection import ReconnectingConnection
from zreconnect.drivers.base import load_driver
from zreconnect.drivers.conninfo import connect_keywords, known
from zreconnect.exceptions import DisconnectionError
from zreconnect.integrations import needs
from zreconnect.interfaces import DOOMED
from zreconnect.server import Server, shared_server
from zreconnect.states import State
from zreconnect.witness import Outcome

with needs(__name__, "zreconnect[django]"):
    from django.conf import settings
    from django.core.exceptions import ImproperlyConfigured
    from django.db.backends.base.operations import BaseDatabaseOperations
    from django.db.backends.postgresql import base
    from django.db.utils import DatabaseErrorWrapper, Error, OperationalError
    from django.utils.functional import cached_property

#: Those of a database's OPTIONS that are for `ReconnectingConnection`.
OPTIONS = ("policy", "witness", "response_timeout", "pooled")


class DjangoDisconnectionError(DisconnectionError, OperationalError):
    """A `DisconnectionError` that Django takes for an error of its own.

    So ``atomic()`` rolls back after it as after any other, and does not replace it with the next.
    """


class ErrorWrapper(DatabaseErrorWrapper):
    """Turns the driver's errors into Django's, and a `DisconnectionError` into one that is both."""

    def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, DisconnectionError):
            raise DjangoDisconnectionError(str(error), error.getOriginalException()).with_traceback(
                traceback
            ) from error
        super().__exit__(error_type, error, traceback)


class DjangoConnection(ReconnectingConnection):
    """One whose program learns of a commit when ``atomic()`` ends, and not before."""

    __slots__ = ()

    def commit(self) -> None:
        self._commit()

    def tell(self) -> None:
        """The program learns what became of its last commit."""
        _ = [*self.work.own.telling()]

    def leave_untold(self) -> None:
        """Have ``rollback()`` tell that the last transaction is committed."""
        self.work.own.leave_untold(Outcome.COMMITTED)


class DatabaseOperations(base.DatabaseOperations):
    def last_executed_query(self, cursor: Any, sql: str, params: Any) -> str:
        try:
            query: str = super().last_executed_query(cursor, sql, params)
        except Exception:
            # It has lost its session, and that error counts.
            query = BaseDatabaseOperations.last_executed_query(self, cursor, sql, params)
        return query


def _by_value(value: Any) -> Any:
    """What stands for a value of the settings in a dictionary's key."""
    return value if isinstance(value, (str, int)) else id(value)


class DatabaseWrapper(base.DatabaseWrapper):
    """One thread's connection to a database, as Django has it.

    ``OPTIONS`` can have what `OPTIONS` names, as for `connect`, and no pool: then
    ImproperlyConfigured is raised.
    """

    ops_class = DatabaseOperations
    # Whether the transaction is that of an atomic(), and not of a program that commits by itself.
    _is_atomics = False
    # What commits, or has committed, until there is another transaction; and the number of what was
    # handled then.
    _committing: DjangoConnection | None = None
    _handled = 0

    @property
    def pool(self) -> None:
        if self.settings_dict["OPTIONS"].get("pool"):
            raise ImproperlyConfigured(
                "zreconnect.integrations.django keeps one connection for each thread: take the "
                "pool out of OPTIONS"
            )

    def get_new_connection(self, conn_params: dict[str, Any]) -> DjangoConnection:
        ours = {name: conn_params.pop(name) for name in OPTIONS if name in conn_params}
        driver = load_driver(base.Database.__name__)
        # All threads have the same, and it is there for the next connection, too.
        values = {name: _by_value(value) for name, value in conn_params.items()}
        level = self.settings_dict["OPTIONS"].get("isolation_level")
        key = driver.name, "django", _by_value(level), *sorted(values.items())
        server = self._server = shared_server(key, partial(self._make_server, driver, conn_params))
        set_up = partial(self._set_up_session, driver=driver, pooled=ours.get("pooled"))
        connection = DjangoConnection(server, on_connect=set_up, **ours)
        connection.cursor_factory = conn_params["cursor_factory"]
        self._level = None
        # One that there is not Django refuses when it connects.
        with contextlib.suppress(ValueError):
            self._level = driver.isolation_level(level)
        # As Django has it when it has connected.
        levels = base.IsolationLevel
        self.isolation_level = levels(self._level or levels.READ_COMMITTED)
        return connection

    def _make_server(self, driver: Any, conn_params: dict[str, Any]) -> Server:
        # Of its own, so that it has no thread's connection. It sets up each one of the driver's.
        opener: Any = super(DatabaseWrapper, type(self)(self.settings_dict, self.alias))

        def open_session(place: Mapping[str, Any], timeout: float) -> Any:
            return opener.get_new_connection(connect_keywords(place, timeout))

        connect = hosts.Places(driver, conn_params, open_session).connect
        return Server(driver, connect, known(conn_params))

    def _set_up_session(self, raw: Any, driver: Any, pooled: bool | None) -> None:
        if base.is_psycopg3 and not self.features.uses_server_side_binding:
            # Its server-side cursors bind by themselves.
            raw.server_cursor_factory = base.ServerSideCursor
        # Django does it for the first, not knowing of the others.
        with raw.cursor() as cursor:
            cursor.execute(self.ops.set_time_zone_sql(), [self.timezone_name])
            if role := self.settings_dict["OPTIONS"].get("assume_role"):
                driver.pooling.check_set_up(raw, pooled, "assume_role")
                cursor.execute("SELECT set_config('role', %s, false)", [role])

    @cached_property  # type: ignore[untyped-decorator]
    def wrap_database_errors(self) -> ErrorWrapper:
        return ErrorWrapper(self)

    def set_autocommit(self, autocommit: bool, **options: Any) -> None:
        # Django would not commit what comes next if it took the mode for another than it is.
        met = sys.exc_info()[1]
        if not autocommit:
            # Only atomic() gives Django's option.
            self._is_atomics = bool(options)
            self._tell()
        try:
            super().set_autocommit(autocommit, **options)
            # Else an interrupt, that has come after the commit, is on its way to the program.
            if id(met) == self._handled:
                self._tell()
        except BaseException as error:
            is_djangos = isinstance(error, Error)
            if self.autocommit == autocommit or (is_djangos and met is None):
                raise
            self.close()
            # In atomic(), an interrupt has kept the transaction from being ended, and is to pass.
            if not (is_djangos and autocommit):
                raise

    def _set_autocommit(self, autocommit: bool) -> None:
        if self._level is None:
            super()._set_autocommit(autocommit)
            return
        # As with Django's own backend it is that of transactions only. For autocommit mode it would
        # be SET each time, and behind a pooler for others.
        level = "DEFAULT" if autocommit else self._level
        with self.wrap_database_errors:
            self.connection.set_session(isolation_level=level, autocommit=autocommit)

    # atomic() calls it by way of commit(). It rolls back after Django's errors, but not after
    # CommitOutcomeUnknown, and would then replace that by the error of a connection that waits for
    # a rollback. There is no public name in between.
    def _commit(self) -> None:
        self._committing, self._handled = self.connection, id(sys.exc_info()[1])
        try:
            super()._commit()
            if not self._is_atomics:
                self._tell()
        except BaseException as error:
            # Else the next commit would have called what was to follow upon this one.
            self.run_on_commit: list[Any] = []
            self.connection.rollback_after(error)
            raise

    def _tell(self) -> None:
        committing, self._committing = self._committing, None
        if committing is not None:
            committing.tell()

    def run_and_clear_commit_hooks(self) -> None:
        committing = self._committing
        try:
            super().run_and_clear_commit_hooks()
        except BaseException:
            # A hook may have had transactions of its own.
            self._committing = committing
            if committing is not None:
                committing.leave_untold()
            raise

    def _rollback(self) -> None:
        # It may be closed by now, because of an interrupt, or by a hook.
        if self._committing is not None:
            self._committing.guard.tell()
        super()._rollback()

    # Where an error was caught inside, and the savepoint could not be gone back to, atomic() rolls
    # back in silence and returns. After a loss it is to commit, which raises the loss; unless the
    # program has asked for the rollback.
    @property
    def needs_rollback(self) -> bool:
        return self._needs_rollback and (self._is_rollback_wanted or not self._is_doomed())

    @needs_rollback.setter
    def needs_rollback(self, value: bool) -> None:
        self._needs_rollback, self._is_rollback_wanted = value, False

    def set_rollback(self, rollback: bool) -> None:
        super().set_rollback(rollback)
        self._is_rollback_wanted = rollback

    def _is_doomed(self) -> bool:
        return self.connection is not None and self.connection.state == DOOMED

    def is_usable(self) -> bool:
        """Whether a statement can be executed, or only after a rollback or never again. Whether
        there is a session shows when a transaction begins."""
        if self.connection is None:
            return False
        work = self.connection.work
        raw = work.link.session.raw
        if raw is None or raw.closed:
            return work.state is State.IDLE
        if work.link.driver.in_failed_transaction(raw):
            return False
        return work.state in (State.IDLE, State.ACTIVE)

    def close_if_unusable_or_obsolete(self) -> None:
        # Django asks only after an error of its own kind. Here it costs no query to ask.
        if not self.is_usable():
            self.errors_occurred = True
        super().close_if_unusable_or_obsolete()

    def create_cursor(self, name: str | None = None) -> Any:
        if name is None:
            return super().create_cursor()
        # Django makes psycopg's server-side ones by itself, past us.
        connection = self.connection
        cursor = connection.cursor(name, scrollable=False, withhold=connection.autocommit)
        if base.is_psycopg3:
            loader = connection.adapters.get_loader(base.TIMESTAMPTZ_OID, base.Format.TEXT)
            if loader.timezone != self.timezone:
                base.register_tzloader(self.timezone, cursor)
        else:
            cursor.tzinfo_factory = self.tzinfo_factory if settings.USE_TZ else None
        return cursor
