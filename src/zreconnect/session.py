"""Opens a server session, for as long and as often as a policy says."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NoReturn

import tenacity

from zreconnect import events
from zreconnect.drivers.base import Meaning
from zreconnect.exceptions import ReconnectTimeout, one_line
from zreconnect.policy import RetryPolicy
from zreconnect.server import Server


class _AttemptFailed(Exception):
    """An attempt to connect failed with ``error``, and another one may succeed."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def open_session(
    server: Server, policy: RetryPolicy, prepare: Callable[[Any, float], None], again: bool
) -> Any:
    """A raw connection to ``server`` that has been prepared.

    prepare: called with the raw connection and the seconds that each of its requests may take; a
    disconnect in it makes the attempt a failed one.
    again: whether there was a session before, so that this one is announced.

    Raises `ReconnectTimeout` when the policy's patience ends, or `DisconnectionError` if the policy
    fails fast; what ``prepare`` raised; the driver's error if connecting is refused for good.
    """
    started = time.monotonic()
    attempts = 0

    def announce_failure(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        failure = state.outcome.exception()
        assert isinstance(failure, _AttemptFailed)
        events.announce(
            events.ConnectionAttemptFailed(
                server.address,
                state.attempt_number,
                time.monotonic() - started,
                state.next_action.sleep,
                failure.error,
            )
        )

    try:
        for attempt in policy.retrying(_AttemptFailed, announce_failure):
            with attempt:
                attempts = attempt.retry_state.attempt_number
                timeout = policy.longest_attempt(time.monotonic() - started)
                raw = _attempt(server, timeout, prepare)
    except _AttemptFailed as failure:
        _give_up(server, policy, attempts, time.monotonic() - started, failure.error)
    if again or attempts > 1:
        events.announce(events.Reconnected(server.address, attempts, time.monotonic() - started))
    return raw


def _attempt(server: Server, timeout: float, prepare: Callable[[Any, float], None]) -> Any:
    try:
        raw = server.connect(timeout)
    except Exception as error:
        if server.passes(error):
            raise _AttemptFailed(error) from error
        raise
    try:
        prepare(raw, timeout)
    except BaseException as error:
        # Asked before the connection is closed, for its state is what decides.
        is_lost = (
            isinstance(error, server.driver.module.Error)
            and server.driver.meaning(error, raw) is Meaning.DISCONNECT
        )
        server.driver.close(raw)
        if is_lost:
            raise _AttemptFailed(error) from error
        raise
    return raw


def _give_up(
    server: Server, policy: RetryPolicy, attempts: int, seconds: float, error: BaseException
) -> NoReturn:
    events.announce(events.GaveUp(server.address, attempts, seconds, error))
    if not policy.fails_fast:
        raise ReconnectTimeout(server.address, attempts, seconds, error) from error
    raise server.driver.disconnection_error(
        f"No connection to {server.address}, and no transaction was begun. Run the work again "
        f"when the server is back. The driver said: {one_line(error)}",
        (type(error), error, error.__traceback__),
    ) from error
