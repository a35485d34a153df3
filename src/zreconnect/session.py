"""One raw connection of one process, and opening it for as long and as often as a policy says."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from zreconnect import events
from zreconnect.exceptions import ReconnectTimeout, one_line
from zreconnect.interfaces import Meaning
from zreconnect.policy import LARGEST_PART, RetryPolicy
from zreconnect.server import AttemptFailed, Server, is_missing_thread
from zreconnect.watchdog import NO_WATCH, Watch


@dataclass(frozen=True, slots=True)
class Session:
    """A raw connection with its watch. It is at rest, or it is ended: nobody repairs one.

    driver: the `IDriver`. raw: the driver's connection, or None if there is no session.
    process: the one that opened it. in_transaction: see `IDriver.transaction_flag`.
    opened: when, on the monotonic clock.
    """

    driver: Any
    raw: Any
    watch: Watch
    process: int
    in_transaction: Callable[[], object] = bool
    opened: float = field(default_factory=time.monotonic)

    def end(self) -> None:
        """Close it, or leave it alone if it is the parent process's. Can be called again."""
        if self.process != os.getpid():
            self.watch.close()
            self.driver.abandon(self.raw)
            return
        try:
            self.driver.close(self.raw)
        finally:
            # PyMySQL's connection that was interrupted takes itself for closed, and is not.
            self.watch.hang_up()

    def __del__(self, suppress: Any = contextlib.suppress) -> None:
        # An interrupt can have come before anybody knew of it. What SQLite has locked stays locked
        # until it is closed. At the interpreter's end, the names of this module may be None.
        with suppress(AttributeError):
            if self.raw is not None and self.process == os.getpid():
                self.end()


#: Stands where there is none.
NO_SESSION = Session(None, None, NO_WATCH, 0)


def open_session(
    server: Server,
    policy: RetryPolicy,
    check: Callable[[], object],
    prepare: Callable[[Session], None],
    adopt: Callable[[Session], bool],
) -> None:
    """Open a session with ``server``.

    check: called before each attempt; what it raises ends them.
    prepare: called with the session; a disconnect in it makes the attempt a failed one.
    adopt: called with the session that is prepared; whether there was one before, so that this one
    is announced.

    Raises `ReconnectTimeout` when the policy's patience ends, or `DisconnectionError` if the policy
    fails fast; what ``check`` or ``prepare`` raised; the driver's error if connecting is refused
    for good.
    """
    started = time.monotonic()
    with server.outage.awaited():
        try:
            session, attempts = _opened(server, policy, started, check, prepare)
        except BaseException:
            # At once, or others would wait in vain for the attempt that was its next.
            server.leaves()
            raise
    away = server.outage.reached()
    is_news = away is not None
    # In this order: a subscriber may use the connection.
    if adopt(session) or attempts > 1 or is_news:
        seconds = time.monotonic() - started
        events.announce(
            events.Reconnected(server.address, attempts, seconds, away or 0.0, is_news=is_news)
        )


def _opened(
    server: Server,
    policy: RetryPolicy,
    started: float,
    check: Callable[[], object],
    prepare: Callable[[Session], None],
) -> tuple[Session, int]:
    """The session, and in which attempt it was opened."""
    attempts = 0
    elapsed = pause = 0.0
    while True:
        check()
        attempts += 1
        try:
            return _attempt(server, policy, elapsed, pause, prepare), attempts
        except AttemptFailed as failure:
            error, is_anothers = failure.error, failure.is_anothers
        elapsed = time.monotonic() - started
        if policy.is_over(attempts, elapsed):
            _give_up(server, policy, attempts, elapsed, error)
        pause = policy.pause(attempts, elapsed)
        events.announce(
            events.ConnectionAttemptFailed(server.address, attempts, elapsed, pause, error)
        )
        if not is_anothers:
            server.knocks_again(pause)
        # Who leaves the door to another thread pauses there, where that one's success ends it.
        _wait(server, 0.0 if is_anothers else pause, error)
        elapsed = time.monotonic() - started


def _wait(server: Server, seconds: float, error: BaseException) -> None:
    """Wait for so long, and say so when it is time to."""
    outage = server.outage
    while True:
        # Another thread may have reached it meanwhile.
        away = outage.seconds
        if away is not None and outage.is_news(events.Waiting):
            events.announce(events.Waiting(server.address, away, outage.waiting, error))
        # Meanwhile it may have become time to.
        part = min(seconds, max(0.0, outage.until_told()))
        time.sleep(part)
        seconds -= part
        if seconds <= 0:
            return


def _attempt(
    server: Server,
    policy: RetryPolicy,
    elapsed: float,
    pause: float,
    prepare: Callable[[Session], None],
) -> Session:
    """A session that is prepared, and the server knows what came of it."""
    began = time.monotonic()
    try:
        longest, is_counted = policy.maximum * LARGEST_PART, policy.attempts is not None
        server.leave_to_another(pause, policy.left(elapsed), longest, is_counted)
        elapsed += time.monotonic() - began
        timeout, pauses = policy.attempt_limit(elapsed), partial(policy.pause, elapsed=elapsed)
        raw = server.connect(timeout, policy.lasting_attempt(), pauses)
        return _prepared(server, raw, max(timeout, policy.least_attempt()), prepare)
    except AttemptFailed:
        server.outage.missed(began)
        raise


def _prepared(
    server: Server, raw: Any, timeout: float, prepare: Callable[[Session], None]
) -> Session:
    watch = NO_WATCH
    try:
        watch = Watch(server.driver.fileno(raw), server.address)
        in_transaction = server.driver.transaction_flag(raw)
        session = Session(server.driver, raw, watch, os.getpid(), in_transaction)
        with watch.within(timeout):
            prepare(session)
        return session
    except BaseException as error:
        # Asked before the connection is closed, for its state is what decides.
        passes = is_missing_thread(error) or (
            isinstance(error, server.driver.module.Error)
            and server.driver.meaning(error, raw) is Meaning.DISCONNECT
        )
        Session(server.driver, raw, watch, os.getpid()).end()
        tell_if_cut(server, watch)
        if passes:
            raise AttemptFailed(error) from error
        raise


def tell_if_cut(server: Server, watch: Watch) -> None:
    """Log it if the watchdog has cut the session off, which it does not do itself."""
    if watch.cut_after is not None:
        is_news = server.outage.is_news(Watch)
        events.logger.log(
            logging.WARNING if is_news else logging.DEBUG,
            "No answer from %s within %.1f seconds: the connection is cut",
            watch.address,
            watch.cut_after,
            extra={"server": watch.address, "seconds": watch.cut_after},
        )


def _give_up(
    server: Server, policy: RetryPolicy, attempts: int, seconds: float, error: BaseException
) -> NoReturn:
    # Of many that do not wait, or not for long, each gives up by itself.
    is_news, away = server.outage.is_news(events.GaveUp), server.outage.seconds or 0.0
    events.announce(events.GaveUp(server.address, attempts, seconds, error, away, is_news=is_news))
    if not policy.fails_fast:
        raise ReconnectTimeout(server.address, attempts, seconds, error) from error
    raise server.driver.disconnection_error(
        f"No connection to {server.address}, and no transaction was begun. Run the work again "
        f"when the server is back. The driver said: {one_line(error)}",
        (type(error), error, error.__traceback__),
    ) from error
