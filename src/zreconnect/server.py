"""One database server as the threads of this process see it: its address and its door.

As long as the server is not known to be up, the threads share one connection attempt at a time:
whoever comes while an attempt is under way waits for its outcome. A failure is everybody's; after
a success each connects for itself. An attempt without an outcome ends at its deadline for all of
them, and then one of them makes the next one. It may last longer than the one who makes it waits,
so that a server that takes its time to let somebody in is found.

The door has no lock, which an interrupt could leave locked. Each step that has to be whole is one
call of a built-in method: neither another thread nor the handler of a signal comes in between.
Which attempt follows upon another one is decided by a dict's setdefault(), who gets a connection
by that of a SimpleQueue.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from zreconnect import dsn as dsn_module
from zreconnect import hosts
from zreconnect.answers import Answers
from zreconnect.drivers.base import load_driver
from zreconnect.exceptions import one_line
from zreconnect.interfaces import Meaning
from zreconnect.knocking import Knocking
from zreconnect.outage import Outage
from zreconnect.threads import start_thread

# Who has waited for another thread's attempt in vain, and has less than that many seconds left,
# makes none. It is as long as the pauses of threads that come back at about the same time: the
# next one of these has time for an attempt that is worth it.
SHORTEST_ATTEMPT = 0.5
# An attempt whose thread has not begun within so many seconds is taken for one that nobody makes:
# an interrupt has kept its maker from starting it.
TIME_TO_BEGIN = 0.5
# The only RuntimeError of starting a thread that passes. A signal's handler may raise others.
NO_THREAD = "can't start new thread"
# What mentions it may be why there is no encryption any more.
ENCRYPTION = re.compile("SSL|TLS")
NOT_WHAT_IT_WAS = (
    "TLS connection required: the sessions before with this server were encrypted, and nobody is "
    "to get by without, neither a server that has lost its certificate nor somebody in between. If "
    "the server is to be without TLS from now on, say so (sslmode=disable, ssl_mode=DISABLED) and "
    "start the program again; to have TLS from the first session on, ask for it "
    "(sslmode=require, ssl_mode=REQUIRED)"
)


class AttemptFailed(Exception):
    """An attempt to connect failed with ``error``, and a later one may succeed."""

    def __init__(self, error: BaseException, is_anothers: bool = False) -> None:
        super().__init__(error)
        self.error = error
        #: Whether it was not this thread's, which has paused meanwhile.
        self.is_anothers = is_anothers


OpenSession = Callable[[float, hosts.Pauses], Any]
# A connection, or the error that there is none; for those who share an attempt, only the latter.
Outcome = tuple[Any, BaseException | None]


class _Attempt:
    """One attempt to connect, and those who wait for its outcome.

    deadline: when it is over, if it has no outcome before. So nobody depends on its thread, which
    may hang or may never have been started. pauses: see `hosts.connect`.
    """

    def __init__(self, deadline: float, pauses: hosts.Pauses = hosts.default_pauses) -> None:
        self.deadline = deadline
        self.pauses = pauses
        self._has_begun = self._has_ended = False
        self._answer: Answers[Outcome | None] = Answers()
        self._answers_to_others: list[Answers[Outcome | None]] = []
        # Held while its maker waits.
        self._presence = threading.Lock()
        self._presence.acquire()
        self._next: dict[None, _Attempt] = {}

    def begin(self) -> None:
        """For its thread."""
        self._has_begun = True

    def is_over(self) -> bool:
        return self._has_ended or time.monotonic() >= self.deadline

    def followed_by(self, candidate: _Attempt) -> _Attempt:
        """The attempt after this one: the first candidate."""
        return self._next.setdefault(None, candidate)

    def outcome(self, until: float) -> Outcome | None:
        """For its maker: what has come of it by then."""
        return self._answer.get(until)

    def shared_outcome(self, until: float) -> Outcome | None:
        """For the others: what has come of it by the deadline or until then."""
        answers: Answers[Outcome | None] = Answers()
        self._answers_to_others.append(answers)
        # In this order; `end` has the other one.
        if self._has_ended:
            return None
        until = min(until, self.deadline)
        if not self._has_begun:
            outcome = answers.get(min(until, time.monotonic() + TIME_TO_BEGIN))
            if outcome is not None:
                return outcome
            if not self._has_begun:
                self._has_ended = True
        return None if self._has_ended else answers.get(until)

    def end(self, outcome: Outcome | None) -> None:
        """Give the outcome, or that there is none, to all who wait for it."""
        self._has_ended = True
        self._answer.put(outcome)
        shared = outcome and (None, outcome[1])
        for answers in self._answers_to_others.copy():
            answers.put(shared)
        self._answers_to_others.clear()

    def leave(self) -> None:
        """For its maker: no longer wait for the outcome."""
        self._presence.release()

    def is_taken(self) -> bool:
        """After the end: whether its maker has taken the outcome; nobody can take it any more."""
        # Until the deadline, because an interrupt may have kept the maker from leaving.
        self._presence.acquire(timeout=max(0.0, self.deadline - time.monotonic()))
        return self._answer.get(-math.inf) is None


class Server:
    """Where to connect to.

    driver: an `IDriver`.
    open_session: called with a timeout in seconds, and what tells the seconds between two rounds of
    asking several places; returns the module's new connection.
    parameters: the connection parameters as far as they are known, for address and errors.
    opening: returns another ``open_session`` for other parameters; None if they are not ours.
    """

    def __init__(
        self,
        driver: Any,
        open_session: OpenSession,
        parameters: Mapping[str, str],
        opening: Callable[[Mapping[str, str]], OpenSession] | None = None,
    ) -> None:
        self.driver = driver
        self._open_session = open_session
        self._opening = opening
        self._was_encrypted = False
        #: Those of the connection, as far as they are known: a factory's after the first session.
        self.parameters = parameters
        self._address: str | None = None
        #: What is known of its being away.
        self.outage = Outage()
        self.reopen_door()

    @property
    def address(self) -> str:
        if not self.parameters:
            return "the server of a connection_factory"
        if self._address is None:
            self._address = self.driver.address(self.parameters)
        return self._address

    def connect(
        self,
        timeout: float,
        lasting: float = 0.0,
        pauses: hosts.Pauses = hosts.default_pauses,
    ) -> Any:
        """A new raw connection, within ``timeout`` seconds. One that comes later is closed.

        lasting: how many seconds an attempt may take at least, for others and for what is known.
        pauses: see `hosts.connect`.

        Raises `AttemptFailed` if there is none and a later attempt may succeed; what the attempt
        raised if it is refused for good.
        """
        now = time.monotonic()
        deadline = now + timeout
        mine = _Attempt(max(deadline, now + lasting), pauses)
        while (attempt := self._join_attempt(mine)) is not mine:
            outcome = attempt.shared_outcome(deadline)
            if outcome is None:
                if deadline - time.monotonic() < SHORTEST_ATTEMPT:
                    raise _no_answer(timeout)
            elif outcome[1] is not None:
                self._fail(outcome[1])
        return self._make_attempt(mine, timeout, deadline)

    def leave_to_another(
        self, pause: float, patience: float, longest: float, is_counted: bool = False
    ) -> None:
        """Wait as long as another thread knocks: see `Knocking`. Raises `AttemptFailed` for it."""
        error = self._knocking.leave_to_another(pause, patience, longest, is_counted)
        if error is not None:
            raise AttemptFailed(error, is_anothers=True) from error

    def knocks_again(self, pause: float) -> None:
        """Tell other threads that this one does so after so many seconds: see `Knocking`."""
        self._knocking.knocks_again(pause)

    def leaves(self) -> None:
        """Tell them that it does so no more."""
        self._knocking.leaves()

    def connect_once(self, timeout: float) -> Any:
        """As `connect`, for who makes but one attempt: raises what that has raised."""
        try:
            return self.connect(timeout)
        except AttemptFailed as failure:
            raise failure.error from None

    def passes(self, error: BaseException) -> bool:
        """Whether connecting may succeed later although it failed with this error."""
        return (
            is_missing_thread(error)
            or self.driver.connect_meaning(error, self.parameters) is Meaning.DISCONNECT
        )

    def is_missed_by(self, raw: Any) -> bool:
        """Whether the session is with a server of another kind than the one asked for."""
        missed: bool = self.driver.misses_target(raw, self.parameters)
        return missed

    def check(self, raw: Any) -> None:
        """Raise the driver's OperationalError if that is so."""
        if self.driver.misses_target(raw, self.parameters):
            raise self.driver.module.OperationalError(
                "the server is no longer what target_session_attrs asks for"
            )

    def lost(self, opened: float) -> bool:
        """A session has ended that was opened then: the server may be down for everybody. Whether
        that is news."""
        self._is_up = False
        return self.outage.lost(opened)

    def reopen_door(self) -> None:
        """Forget attempts under way, which in a forked child nobody will finish."""
        self.outage.renew()
        self._is_up = False
        self._knocking = Knocking()
        # One that is over: the next one follows upon it.
        self._latest = _Attempt(-math.inf)

    def _join_attempt(self, mine: _Attempt) -> _Attempt:
        """The attempt to wait for; ``mine`` if that is to be made."""
        if self._is_up:
            return mine
        attempt = self._latest
        while attempt is not mine and attempt.is_over():
            attempt = attempt.followed_by(mine)
        # Only a short cut: from an older one, too, the way leads here.
        self._latest = attempt
        return attempt

    def _make_attempt(self, attempt: _Attempt, timeout: float, deadline: float) -> Any:
        try:
            self._start(attempt)
            outcome = attempt.outcome(deadline)
        finally:
            attempt.leave()
        if outcome is None:
            self._is_up = False
            raise _no_answer(timeout)
        raw, error = outcome
        if error is not None:
            self._fail(error)
        return raw

    def _start(self, attempt: _Attempt) -> None:
        # A thread of its own, because nothing else bounds what connecting may wait for: name
        # resolution, several addresses, TLS, a connection factory of the user's.
        thread = threading.Thread(
            target=self._connect_in_thread,
            args=(attempt,),
            name="zreconnect connection attempt",
            daemon=True,
        )
        try:
            start_thread(thread)
        except RuntimeError as error:
            if not is_missing_thread(error):
                raise
            attempt.end(None)
            raise AttemptFailed(error) from error

    def _connect_in_thread(self, attempt: _Attempt) -> None:
        attempt.begin()
        try:
            # Never 0, which means for ever to libpq.
            timeout = max(SHORTEST_ATTEMPT, attempt.deadline - time.monotonic())
            raw = self._open(timeout, attempt.pauses)
        except BaseException as error:
            self._note(attempt, error)
            attempt.end((None, error))
            attempt.is_taken()
        else:
            self._note(attempt, None)
            attempt.end((raw, None))
            if not attempt.is_taken():
                self.driver.close(raw)
                self.outage.seen()

    def _open(self, timeout: float, pauses: hosts.Pauses) -> Any:
        """A raw connection, prepared, and no less protected than those before."""
        try:
            raw = self._open_session(timeout, pauses)
        except self.driver.module.Error as error:
            if self._was_encrypted and ENCRYPTION.search(str(error)) and not self.passes(error):
                error.args = (*error.args[:-1], f"{one_line(error)}. {NOT_WHAT_IT_WAS}")
            raise
        self.driver.prepare(raw)
        self.parameters = self.parameters or self.driver.parameters(raw)
        demanded = self.driver.encrypted(raw, self.parameters)
        if demanded is None and self._was_encrypted and self._opening is None:
            self.driver.close(raw)
            raise self.driver.module.OperationalError(NOT_WHAT_IT_WAS)
        if demanded is not None and not self._was_encrypted:
            # The module refuses what is not encrypted before it logs in.
            self._open_session = self._opening(demanded) if self._opening else self._open_session
            self._was_encrypted = True
        return raw

    def _note(self, attempt: _Attempt, error: BaseException | None) -> None:
        # What an attempt that was given up has met is old news.
        if attempt.is_over():
            return
        self._is_up = error is None
        # Asked here, once: many threads may share it, as often as one of them knocks.
        if error is not None and self.passes(error):
            self._knocking.failed(error)
        else:
            self._knocking.ended()

    def _fail(self, error: BaseException) -> NoReturn:
        if self.passes(error):
            raise AttemptFailed(error) from error
        raise error


def is_missing_thread(error: BaseException) -> bool:
    """Whether the process is at its limit of threads, which passes."""
    return isinstance(error, RuntimeError) and str(error) == NO_THREAD


def _no_answer(timeout: float) -> AttemptFailed:
    return AttemptFailed(TimeoutError(f"no answer within {timeout:.1f} seconds"))


# A signal's handler may connect, too, while its thread has the lock.
_lock = threading.RLock()
_servers: weakref.WeakValueDictionary[tuple[Any, ...], Server] = weakref.WeakValueDictionary()


def server_from_dsn(dsn: str, driver_name: str | None = None) -> Server:
    """The server that ``dsn`` names; the same object for the same parameters.

    Raises TypeError or ValueError for a DSN or driver that makes no sense.
    """
    driver = load_driver(dsn_module.driver_name(dsn, driver_name))
    parameters = driver.parse(dsn)
    # Not the DSN: what it means can depend on where the program is.
    key = (driver.name, tuple(sorted(parameters.items())))

    def opening(parameters: Mapping[str, str]) -> OpenSession:
        return hosts.Places(driver, parameters, driver.connect).connect

    return shared_server(key, lambda: Server(driver, opening(parameters), parameters, opening))


def server_from_factory(connection_factory: Callable[[], Any], driver_name: str) -> Server:
    """The server that ``connection_factory`` connects to.

    Raises TypeError if it cannot be called, ValueError for an unknown driver.
    """
    if not callable(connection_factory):
        raise TypeError(f"connection_factory must be callable, not {connection_factory!r}")
    driver = load_driver(driver_name)
    # The server keeps the factory alive, so its id() is not given to another one meanwhile.
    key = (driver.name, id(connection_factory))
    return shared_server(
        key, lambda: Server(driver, lambda timeout, pauses: connection_factory(), {})
    )


def shared_server(key: tuple[Any, ...], make: Callable[[], Server]) -> Server:
    """The server that goes by ``key``, as long as somebody has it; else what ``make`` returns."""
    # It stays locked for nobody: CPython runs no signal's handler between acquiring a lock of its
    # own and entering the block.
    with _lock:
        server = _servers.get(key)
        if server is None:
            server = _servers[key] = make()
        return server


def servers() -> list[Server]:
    """Those that the process has connections to, or had lately."""
    with _lock:
        return list(_servers.values())


def _reopen_doors() -> None:
    global _lock
    _lock = threading.RLock()
    for server in list(_servers.values()):
        server.reopen_door()


os.register_at_fork(after_in_child=_reopen_doors)
