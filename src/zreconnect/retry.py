"""Run a unit of work again: the one place that decides on it."""

from __future__ import annotations

import functools
import inspect
import os
import random
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from zope.interface import alsoProvides

from zreconnect import commits, engines, events
from zreconnect.exceptions import (
    CommitOutcomeUnknown,
    DisconnectedConnectionError,
    DisconnectionError,
    ReconnectTimeout,
)
from zreconnect.interfaces import IRetryOnDisconnect
from zreconnect.policy import check_attempts, check_number
from zreconnect.server import servers

if TYPE_CHECKING:
    from zreconnect.guard import Guard

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# The call of a decorated function that the code that asks is part of. What is started within has a
# copy of it, also when it has ended, as the tasks of asyncio have.
_present: ContextVar[_Call[Any] | None] = ContextVar("zreconnect_call", default=None)
# Two units of work that met in a deadlock would meet again if they did not wait for times of
# their own, in seconds. After a disconnect it is begin() that waits.
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 1.0


def run_unit_of_work(
    function: Callable[[], Result],
    *,
    guard: Guard,
    check_idle: Callable[[], object],
    begin: Callable[[], object],
    commit: Callable[[], object],
    abort_after: Callable[[BaseException], object],
    attempts: int,
    timeout: float | None = None,
) -> Result:
    """Begin, call ``function``, commit; abort and do it all again after an error that allows it.

    guard: that of the connection. What has been committed within, also through another connection,
    or by a process that was forked within, is not run again.
    check_idle: raises what refuses to begin, and leaves what is under way alone.
    abort_after: called with the error, to abort because of it; what it raises takes its place.
    attempts, timeout: see `check_patience`.

    Returns what ``function`` returned. Raises what `check_patience` and `check_function` raise,
    else what the last attempt raised.
    """
    check_patience(attempts, timeout)
    check_function(function)

    process = os.getpid()
    is_final = False

    def unit_of_work() -> Result:
        nonlocal is_final
        check_idle()
        engines.watch_commits()
        with commits.watched() as committed:
            try:
                begin()
                result = function()
                commit()
            except BaseException as error:
                abort_after(error)
                is_final = committed.sent > 0
                raise
        return result

    started, attempt, limit = time.monotonic(), 0, FIRST_PAUSE
    while True:
        attempt += 1
        try:
            return unit_of_work()
        except BaseException as error:
            if os.getpid() != process or not guard.may_run_again(error):
                raise
            seconds = time.monotonic() - started
            if is_final:
                reason = "something of it is committed, or may be"
                give_up(name_of(function), attempt, seconds, error, reason)
                raise
            if attempt >= attempts and seconds >= (timeout or 0):
                give_up(name_of(function), attempt, seconds, error, "its attempts are over")
                raise
            pause = random.uniform(0.0, limit)
            again = run_again(name_of(function), attempt, seconds, pause, error)
        events.announce(again)
        time.sleep(pause)
        limit = min(2 * limit, LONGEST_PAUSE)


def name_of(function: Callable[..., object]) -> str:
    """A function's module and name, for who reads a log."""
    while isinstance(function, functools.partial):
        function = function.func
    return f"{function.__module__}.{getattr(function, '__qualname__', repr(function))}"


def run_again(
    function: str, runs: int, seconds: float, pause: float, error: BaseException
) -> events.RunAgain:
    """The event. For the arguments see `IRunAgain`."""
    is_news = _is_news(events.RunAgain, function)
    return events.RunAgain(function, runs, seconds, pause, error, is_news=is_news)


def give_up(function: str, runs: int, seconds: float, error: BaseException, reason: str) -> None:
    """Tell, also in the error, that a function is not run again. For the arguments see
    `IGaveUpRunning`."""
    is_news = _is_news(events.GaveUpRunning, function, reason)
    gave_up = events.GaveUpRunning(function, runs, seconds, error, reason, is_news=is_news)
    events.announce(gave_up)
    # Python 3.10 has no notes, but the log tells it too.
    if hasattr(error, "add_note"):  # pragma: no branch
        error.add_note(str(gave_up))


def _is_news(*what: object) -> bool:
    """Whether that is to be told. When a server goes away, each thread loses what it has under way,
    and each request of a site."""
    return all(server.outage.is_news(what) for server in servers())


def check_patience(attempts: int, timeout: float | None) -> None:
    """Raise TypeError or ValueError, naming the argument, for a patience that makes no sense.

    attempts: how often a unit of work is tried at least, if each error allows that it is run again.
    timeout: seconds for which it is run again in any case, however many attempts that takes; None
    for as long as the attempts take.
    """
    check_attempts(attempts)
    if timeout is not None:
        check_number("timeout", timeout, at_least=0)


def check_function(function: Any) -> None:
    """Raise TypeError unless ``function`` can be called, and has run when it returns."""
    if not callable(function):
        raise TypeError(f"A function is to be run, not {function!r}")
    if (
        inspect.isgeneratorfunction(function)
        or inspect.iscoroutinefunction(function)
        or inspect.isasyncgenfunction(function)
    ):
        raise TypeError(f"{function!r} cannot be run: it returns before it has done its work")


def retry_on_disconnect(
    *,
    timeout: float | None = 60.0,
    min_interval: float = 0.1,
    max_interval: float = 1.0,
    increment: float = 0.1,
    idempotent: bool = False,
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """A decorator that runs a function again after a disconnect; see `IRetryOnDisconnect`.

    It is for whole functions of a database API, which begin and commit transactions of their own,
    and leave none open when they raise. ::

        @retry_on_disconnect(timeout=30)
        def rename(old, new):
            with connection.transaction() as cursor:
                cursor.execute("UPDATE tree SET name = %s WHERE name = %s", (new, old))

    timeout: seconds for which the function is run again, and at whose end for the last time; None
    runs it for ever. What the function itself waits for, such as a connection, the connection's
    policy limits.
    min_interval: seconds between the first run and the second.
    max_interval: upper limit of every interval, in seconds.
    increment: seconds by which each interval is longer than the one before.
    idempotent: whether running the function twice does no harm. Only then is it run again when a
    transaction of the same call may have been committed.

    Raises TypeError or ValueError, naming the argument, for one that makes no sense, and TypeError
    for what is no function, or a generator or coroutine function, which has not run yet when it
    returns.
    """
    if timeout is not None:
        check_number("timeout", timeout, at_least=0)
    check_number("min_interval", min_interval, at_least=0)
    check_number("max_interval", max_interval, at_least=min_interval)
    check_number("increment", increment, at_least=0)
    if not isinstance(idempotent, bool):
        raise TypeError(f"idempotent must be True or False, not {idempotent!r}")

    def interval(runs: int) -> float:
        return min(min_interval + increment * (runs - 1), max_interval)

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        check_function(function)
        name = name_of(function)

        @functools.wraps(function)
        def run(*args: Parameters.args, **keywords: Parameters.kwargs) -> Result:
            outer = _present.get()
            if outer is not None and outer.is_running:
                # A call of another decorated function, which runs this again when it is run again.
                return function(*args, **keywords)
            call = _Call(lambda: function(*args, **keywords), name, timeout, idempotent)
            return call.run(interval)

        alsoProvides(run, IRetryOnDisconnect)
        return run

    return decorate


class _Call(Generic[Result]):
    """One call of a decorated function, which runs it as often as need be."""

    def __init__(
        self,
        function: Callable[[], Result],
        name: str,
        timeout: float | None,
        idempotent: bool,
    ) -> None:
        self._function = function
        self._name = name
        self._timeout = timeout
        self._idempotent = idempotent
        self.is_running = False
        # Of the present run.
        self._commits = commits.Commits()
        self._watches_engines = False

    def run(self, interval: Callable[[int], float]) -> Result:
        """Raises what the last run raised. interval: the seconds after so many runs."""
        started, runs = time.monotonic(), 0
        while True:
            runs += 1
            try:
                return self._run_once()
            except BaseException as error:
                if not self._is_lost(error):
                    raise
                seconds = time.monotonic() - started
                reason = self._why_not_again(error, seconds)
                if reason is not None:
                    give_up(self._name, runs, seconds, error, reason)
                    raise
                pause = self._pause(interval(runs), seconds)
                events.announce(run_again(self._name, runs, seconds, pause, error))
            time.sleep(pause)

    def _run_once(self) -> Result:
        self._watches_engines = engines.watch_commits()
        token, self.is_running = _present.set(self), True
        try:
            with commits.watched() as self._commits:
                return self._function()
        finally:
            self.is_running = False
            _present.reset(token)

    def _why_not_again(self, error: BaseException, seconds: float) -> str | None:
        if not self._idempotent and self._may_have_committed(error):
            return "it may have committed something, and is not idempotent"
        if self._timeout is not None and seconds >= self._timeout:
            return "the time is up"
        return None

    def _is_lost(self, error: BaseException) -> bool:
        error = engines.unwrapped(error)
        if isinstance(error, DisconnectionError):
            # A connection that was doomed before waits for a rollback that the function leaves to
            # somebody else. One that is lost in this run is known, whoever has caught the error.
            original = error.getOriginalException()
            is_late = original is not None and original[0] is DisconnectedConnectionError
            return not is_late or self._commits.lost > 0
        return isinstance(error, (CommitOutcomeUnknown, ReconnectTimeout)) or engines.is_lost(error)

    def _may_have_committed(self, error: BaseException) -> bool:
        if isinstance(error, CommitOutcomeUnknown) or self._commits.sent > 0:
            return True
        # SQLAlchemy was imported in this very run.
        return not self._watches_engines and engines.is_lost(error)

    def _pause(self, interval: float, seconds: float) -> float:
        if self._timeout is None:
            return interval
        # The last run begins when the time is up and not somewhere before it.
        return min(interval, max(0.0, self._timeout - seconds))
