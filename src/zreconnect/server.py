"""One database server as the threads of this process see it: its address and its door.

As long as the server is not known to be up, the threads share one connection attempt at a time:
whoever comes while an attempt is under way waits for its outcome. A failure is everybody's; after
a success each connects for itself.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from zreconnect import dsn as dsn_module
from zreconnect.drivers.base import Meaning, load_driver

Attempt = concurrent.futures.Future[Any]


class Server:
    """Where to connect to.

    driver: an `IDriver`.
    open_session: called with a timeout in seconds; returns the module's new connection.
    parameters: the connection parameters as far as they are known, for address and errors.
    """

    def __init__(
        self, driver: Any, open_session: Callable[[float], Any], parameters: Mapping[str, str]
    ) -> None:
        self.driver = driver
        self._open_session = open_session
        self._parameters = parameters
        #: How often some thread has got a connection.
        self.times_reached = 0
        self.reopen_door()

    @property
    def address(self) -> str:
        if not self._parameters:
            return "the server of a connection_factory"
        address: str = self.driver.address(self._parameters)
        return address

    def connect(self, timeout: float) -> Any:
        """A new raw connection, within ``timeout`` seconds, or what the attempt raised.

        Raises TimeoutError after ``timeout``. A connection that comes later is closed.
        """
        deadline = time.monotonic() + timeout
        while True:
            attempt, is_mine = self._join_attempt(timeout)
            try:
                self._wait(attempt, deadline, timeout)
            except BaseException:
                if is_mine:
                    attempt.add_done_callback(self._close_late)
                raise
            if is_mine:
                return attempt.result()

    def passes(self, error: BaseException) -> bool:
        """Whether connecting may succeed later although it failed with this error."""
        return self.driver.connect_meaning(error, self._parameters) is Meaning.DISCONNECT

    def is_missed_by(self, raw: Any) -> bool:
        """Whether the session is with a server of another kind than the one asked for."""
        missed: bool = self.driver.misses_target(raw, self._parameters)
        return missed

    def lost(self) -> None:
        """A session has ended: the server may be down for everybody."""
        with self._lock:
            self._is_up = False

    def reopen_door(self) -> None:
        """Forget attempts under way, which in a forked child nobody will finish."""
        self._lock = threading.Lock()
        self._is_up = False
        self._shared_attempt: Attempt | None = None

    def _join_attempt(self, timeout: float) -> tuple[Attempt, bool]:
        with self._lock:
            if self._shared_attempt is not None:
                return self._shared_attempt, False
            attempt = Attempt()
            if not self._is_up:
                self._shared_attempt = attempt
        # A thread of its own, because nothing else bounds what connecting may wait for: name
        # resolution, several addresses, TLS, a connection factory of the user's.
        threading.Thread(
            target=self._make_attempt,
            args=(attempt, timeout),
            name="zreconnect connection attempt",
            daemon=True,
        ).start()
        return attempt, True

    def _make_attempt(self, attempt: Attempt, timeout: float) -> None:
        try:
            raw = self._open_session(timeout)
            self.driver.prepare(raw)
        except BaseException as error:
            self._end_attempt(attempt, is_up=False)
            attempt.set_exception(error)
        else:
            self._parameters = self._parameters or self.driver.parameters(raw)
            self._end_attempt(attempt, is_up=True)
            attempt.set_result(raw)

    def _end_attempt(self, attempt: Attempt, is_up: bool) -> None:
        with self._lock:
            self._is_up = is_up
            self.times_reached += is_up
            if self._shared_attempt is attempt:
                self._shared_attempt = None

    def _wait(self, attempt: Attempt, deadline: float, timeout: float) -> None:
        done, _ = concurrent.futures.wait([attempt], max(0.0, deadline - time.monotonic()))
        if not done:
            self.lost()
            raise TimeoutError(f"no answer within {timeout:.1f} seconds")
        attempt.result()

    def _close_late(self, attempt: Attempt) -> None:
        if attempt.exception() is None:
            self.driver.close(attempt.result())


_lock = threading.Lock()
_servers: weakref.WeakValueDictionary[tuple[str, Any], Server] = weakref.WeakValueDictionary()


def server_from_dsn(dsn: str, driver_name: str | None = None) -> Server:
    """The server that ``dsn`` names; the same object for the same parameters.

    Raises TypeError or ValueError for a DSN or driver that makes no sense.
    """
    driver = load_driver(driver_name or dsn_module.driver_name(dsn))
    parameters = driver.parse(dsn)
    # Not the DSN: what it means can depend on where the program is.
    key = (driver.name, tuple(sorted(parameters.items())))
    return _shared(key, driver, partial(driver.connect, parameters), parameters)


def server_from_factory(connection_factory: Callable[[], Any], driver_name: str) -> Server:
    """The server that ``connection_factory`` connects to.

    Raises TypeError if it cannot be called, ValueError for an unknown driver.
    """
    if not callable(connection_factory):
        raise TypeError(f"connection_factory must be callable, not {connection_factory!r}")
    driver = load_driver(driver_name)
    # The server keeps the factory alive, so its id() is not given to another one meanwhile.
    key = (driver.name, id(connection_factory))
    return _shared(key, driver, lambda timeout: connection_factory(), {})


def _shared(
    key: tuple[str, Any],
    driver: Any,
    open_session: Callable[[float], Any],
    parameters: Mapping[str, str],
) -> Server:
    with _lock:
        server = _servers.get(key)
        if server is None:
            server = _servers[key] = Server(driver, open_session, parameters)
        return server


def _reopen_doors() -> None:
    global _lock
    _lock = threading.Lock()
    for server in list(_servers.values()):
        server.reopen_door()


os.register_at_fork(after_in_child=_reopen_doors)
