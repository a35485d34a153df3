"""Transactions for programs outside Zope: batch jobs, cron scripts, daemons."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import transaction
from transaction.interfaces import AlreadyInTransaction

from zreconnect import events
from zreconnect.connection import ReconnectingConnection
from zreconnect.cursor import ReconnectingCursor
from zreconnect.descriptor import ConnectionDescriptor
from zreconnect.documented import implements
from zreconnect.exceptions import ConflictingTransactionManagerError, one_line
from zreconnect.interfaces import IZopelessTransactionManager
from zreconnect.options import Witness
from zreconnect.policy import RetryPolicy
from zreconnect.retry import run_unit_of_work
from zreconnect.states import State

Result = TypeVar("Result")

#: The entry points by which a mapper's integration makes connections for its classes. The name is
#: that of the mapper's base class; what it leads to is called with the manager.
CLASS_CONNECTIONS = "zreconnect.class_connections"

# A synchronizer of the transaction that is begun under it may call `initZopeless` as well.
_lock = threading.RLock()
_installed: ZopelessTransactionManager | None = None


@implements(IZopelessTransactionManager)
class ZopelessTransactionManager:
    """See `IZopelessTransactionManager`; made and installed by `initZopeless`."""

    def __init__(
        self,
        dsn: str,
        sqlClass: type | None = None,
        implicitBegin: bool | None = None,
        timeout: float | None = None,
        isolation: int | str | None = None,
        driver: str | None = None,
        witness: Witness | str | None = "xid",
        on_connect: Callable[[Any], object] | None = None,
        response_timeout: float | None = None,
        two_phase: bool = False,
        pooled: bool | None = None,
    ) -> None:
        if implicitBegin not in (None, True, False):
            raise TypeError(f"implicitBegin must be True, False or None, not {implicitBegin!r}")
        if sqlClass is not None and not isinstance(sqlClass, type):
            raise TypeError(f"sqlClass must be a class, not {sqlClass!r}")
        self.implicitBegin = implicitBegin
        self.sqlClass = sqlClass
        options: dict[str, Any] = {
            "driver": driver,
            "witness": witness,
            "on_connect": on_connect,
            "response_timeout": response_timeout,
            "two_phase": two_phase,
            "pooled": pooled,
        }
        self._settings = (dsn, sqlClass, implicitBegin, timeout, isolation, options)
        #: Whose transactions its transactions are.
        self.transaction_manager = transaction.manager
        #: Where each thread has its connection from.
        self.descriptor = ConnectionDescriptor(
            dsn,
            policy=RetryPolicy(timeout=timeout),
            transaction_manager=self.transaction_manager,
            implicit_begin=implicitBegin is not False,
            **options,
        )
        if isolation is not None:
            self.descriptor.set_isolation_level(isolation)

    def begin(self) -> None:
        self._check_idle()
        connection = self.descriptor.connection()
        self.transaction_manager.begin()
        try:
            connection.begin()
        except BaseException as error:
            self._abort_after(error, self.transaction_manager.abort)
            raise

    def commit(self) -> None:
        self._check_installed()
        self._end(self.transaction_manager.commit)

    def abort(self) -> None:
        self._check_installed()
        self._end(self.transaction_manager.abort)
        self.connection().guard.tell()

    def run(
        self,
        function: Callable[..., Result],
        *args: Any,
        attempts: int = 3,
        timeout: float | None = None,
        **keywords: Any,
    ) -> Result:
        guard = self.connection().guard
        work = guard.work

        def begin() -> None:
            self.begin()
            work.told_by_call = work.number

        result = run_unit_of_work(
            functools.partial(function, *args, **keywords),
            guard=guard,
            check_idle=self._check_idle,
            begin=begin,
            commit=self.commit,
            abort_after=lambda error: self._abort_after(error, self.abort),
            attempts=attempts,
            timeout=timeout,
        )
        return [result, *work.own.telling()][0]  # type: ignore[return-value]

    def _abort_after(self, error: BaseException, abort: Callable[[], object]) -> None:
        """Abort because of ``error``, which is to be raised afterwards."""
        try:
            self.descriptor.connection().guard.roll_back_after(error, abort)
        except Exception as problem:
            # That of another data manager's, or of an abort that is too late.
            if not isinstance(error, (TimeoutError, KeyboardInterrupt, SystemExit)):
                raise
            events.logger.error(
                "The transaction could not be aborted: %s",
                one_line(problem),
                extra={"server": self.descriptor.connection().server},
            )

    def _check_idle(self) -> None:
        self._check_installed()
        if self.descriptor.connection().work.state is not State.IDLE:
            raise AlreadyInTransaction("begin() inside a transaction: commit() or abort() it first")

    def connection(self) -> ReconnectingConnection:
        self._check_installed()
        return self.descriptor.connection()

    def cursor(
        self, name: str | None = None, cursor_factory: Any = None, **options: Any
    ) -> ReconnectingCursor:
        return self.connection().cursor(name, cursor_factory, **options)

    def set_isolation_level(self, level: int | str | None) -> None:
        self._check_installed()
        self.descriptor.set_isolation_level(level)

    def uninstall(self) -> None:
        global _installed
        self._check_installed()
        with _lock:
            _installed = None
        try:
            self.transaction_manager.abort()
        finally:
            self.descriptor.close()
            if self.sqlClass is not None:
                del self.sqlClass._connection  # type: ignore[attr-defined]
                for name, value in self._replaced.items():
                    setattr(self.sqlClass, name, value)

    def _install(self) -> None:
        global _installed
        if self.sqlClass is not None:
            # What the class had itself comes back with uninstall().
            self._replaced = {k: v for k, v in vars(self.sqlClass).items() if k == "_connection"}
            self.sqlClass._connection = self._class_connection(self.sqlClass)  # type: ignore[attr-defined]
        _installed = self
        self._begin_implicitly()

    def _class_connection(self, sql_class: type) -> Any:
        from importlib.metadata import entry_points

        bases = {f"{base.__module__}.{base.__qualname__}" for base in sql_class.__mro__}
        for entry_point in entry_points(group=CLASS_CONNECTIONS):
            if entry_point.name in bases:
                return entry_point.load()(self)
        return self.descriptor

    def _check_installed(self) -> None:
        if _installed is not self:
            raise RuntimeError(
                "This ZopelessTransactionManager is not installed (any more): call initZopeless()"
            )

    def _end(self, end: Callable[[], object]) -> None:
        if self.implicitBegin is False:
            # The last that is done: an interrupt after it would hide that it was done.
            end()
        else:
            end()
            self._begin_implicitly()

    def _begin_implicitly(self) -> None:
        # The database learns of it with the first statement, so that an idle job has no
        # transaction open that a restart could end.
        if self.implicitBegin is not False:
            self.transaction_manager.begin()


def initZopeless(
    dsn: str,
    sqlClass: type | None = None,
    implicitBegin: bool | None = None,
    timeout: float | None = None,
    isolation: int | str | None = None,
    driver: str | None = None,
    witness: Witness | str | None = "xid",
    on_connect: Callable[[Any], object] | None = None,
    response_timeout: float | None = None,
    two_phase: bool = False,
    pooled: bool | None = None,
) -> ZopelessTransactionManager:
    """Install the process's `ZopelessTransactionManager` and return it.

    The server is first contacted when the first transaction begins.

    dsn, driver, witness, on_connect, response_timeout, two_phase, pooled: as for `connect`.
    sqlClass: a class that gets the `ConnectionDescriptor` as ``_connection``; if it is one of
    SQLObject's, it gets a connection of SQLObject's that uses that.
    implicitBegin: False leaves it to ``begin()`` to begin transactions. None and True begin one
    after each commit and abort; they are deprecated, which None tells with a
    PendingDeprecationWarning and True with a DeprecationWarning.
    timeout: seconds for which connecting is tried when a transaction begins; None waits for ever.
    isolation: the isolation level, as SQL spells it or as the driver's constant.

    Installing the same settings again warns and returns the manager that is installed. Raises
    `ConflictingTransactionManagerError` if one with other settings is installed, and TypeError or
    ValueError, naming the argument, for one that makes no sense; then nothing is installed.
    """
    manager = ZopelessTransactionManager(
        dsn,
        sqlClass,
        implicitBegin,
        timeout,
        isolation,
        driver,
        witness,
        on_connect,
        response_timeout,
        two_phase,
        pooled,
    )
    with _lock:
        if _installed is not None:
            return _same_settings(_installed, manager)
        manager._install()
    _warn_of_implicit_begin(implicitBegin)
    return manager


def isZopeless() -> bool:
    """Whether a `ZopelessTransactionManager` is installed."""
    return _installed is not None


def _same_settings(
    installed: ZopelessTransactionManager, wanted: ZopelessTransactionManager
) -> ZopelessTransactionManager:
    if installed._settings != wanted._settings:
        raise ConflictingTransactionManagerError(
            "initZopeless() was called before with other settings: uninstall() the manager that "
            "it returned, or use that one"
        )
    warnings.warn(
        "initZopeless() was called before with the same settings; the installed manager is used",
        UserWarning,
        stacklevel=3,
    )
    return installed


def _warn_of_implicit_begin(implicitBegin: bool | None) -> None:
    if implicitBegin is False:
        return
    warnings.warn(
        f"implicitBegin={implicitBegin} begins a transaction after each commit and abort; pass "
        "implicitBegin=False and call begin()",
        DeprecationWarning if implicitBegin else PendingDeprecationWarning,
        stacklevel=3,
    )


def _renew_lock() -> None:
    """In a forked child: another thread of the parent's may have had it."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)
