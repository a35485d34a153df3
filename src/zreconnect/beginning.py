"""How a transaction begins: in the present session, along with its first statement, or in the next.

Nothing here handles an error: `zreconnect.guard` does.
"""

from __future__ import annotations

import math
import os
import time
from functools import partial
from typing import Any

from zreconnect.policy import RetryPolicy
from zreconnect.session import NO_SESSION
from zreconnect.states import Event, Request, State
from zreconnect.work import Work

# For so many seconds after an answer the end of a session is taken to show on its socket. That of
# one which has been idle for longer may have been silent; BEGIN by itself finds that out.
SURE_OF_SESSION = 5.0


def begin(work: Work, explicit: bool, policy: RetryPolicy, statement: Any = None) -> bool:
    """Begin a transaction in the present session. Whether there was one.

    explicit: whether ``begin()`` was called, and not a statement. statement: the latter.
    """
    _begin_another(work, explicit, statement)
    session = work.link.session
    if session is NO_SESSION:
        return False
    session.watch.reset()
    with session.watch.awaiting(limit_of_begin(work, policy)):
        _send_begin(work, session.raw)
    if "target_session_attrs" in work.link.server.parameters:
        work.link.server.check(session.raw)
    work.note(Event.BEGUN)
    if work.patience.is_shared:
        work.patience.has_begun()
    if work.link.changes:
        work.link.tell_changes()
    return True


def begin_in_new_session(work: Work, policy: RetryPolicy) -> None:
    """Begin it in the next session."""

    def first(raw: Any) -> None:
        work.link.record_session(raw)
        _send_begin(work, raw)

    work.open(first, policy, work.check_open)
    work.note(Event.BEGUN)
    if work.state is State.CLOSED:
        work.ask(Request.BEGIN)
    if work.patience.is_shared:
        work.patience.has_begun()


def may_begin_along(work: Work) -> bool:
    """Whether a statement begins a transaction, and BEGIN may travel along with it."""
    link, session = work.link, work.link.session
    return (
        work.state is State.IDLE
        and session.process == os.getpid()
        and work.implicit_begin
        and (work.block or not link.settings.autocommit)
        # Else BEGIN by itself finds out whether the session has ended, or was closed by hand.
        and time.monotonic() - link.heard < SURE_OF_SESSION
        and session.watch.is_quiet()
        and not session.raw.closed
        and not (
            "target_session_attrs" in link.server.parameters
            and link.server.is_missed_by(session.raw)
        )
        # The answer to BEGIN tells whether a standby still is one.
        and not (link.is_on_standby and link.needs_writes())
        and (link.driver.answers_begin or not link.observer.needs_row)
        and not link.observer.is_elsewhere
    )


def begin_along(
    work: Work, raw_cursor: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[bool, BaseException | None]:
    """Begin a transaction along with its first statement, in one round trip.

    arguments, options: those of the cursor's ``execute()``. Returns whether there is a transaction
    now, if not, the statement has not been executed; and what the statement has raised.
    """
    _begin_another(work, explicit=False)
    link, session = work.link, work.link.session
    session.watch.reset()
    driver, limit = link.driver, link.options.response_timeout
    rider = link.observer.rider(session.raw, link.settings, along=True)
    send = partial(
        driver.begin_with, session.raw, raw_cursor, link.settings, rider, arguments, options
    )
    if driver.answers_begin:
        wait = session.watch.awaiting(limit_of_begin(work, work.patience.begins(work.waited)))

        def answered(row: Any) -> None:
            # At once: it may be all that is heard of the transaction.
            link.observer.began(row)
            wait.renew(limit)

        with wait:
            begun = send(answered)
    else:
        begun = send() if limit is None else session.watch.call(limit, send)
    if begun is None:
        work.note(Event.NOT_BEGUN)
        return False, None
    try:
        if not driver.answers_begin:
            link.observer.began(begun[0])
        if "target_session_attrs" in link.server.parameters:
            link.server.check(session.raw)
        work.note(Event.BEGUN)
        if work.patience.is_shared:
            work.patience.has_begun()
        return True, begun[1]
    finally:
        # The traceback of its error refers to this frame.
        del begun


def limit_of_begin(work: Work, policy: RetryPolicy) -> float:
    """The seconds that the answer to BEGIN may take in a session that there is."""
    return min(policy.longest_begin, work.link.options.response_timeout or math.inf)


def _begin_another(work: Work, explicit: bool, statement: Any = None) -> None:
    link = work.link
    work.is_explicit = explicit
    link.observer.waits = statement is not None and link.driver.sets_modes(statement)
    link.reads_only = False
    work.number += 1
    work.has_only_read = False
    work.savepoints.clear()
    work.own.forget()
    link.was_ended = False
    work.note(Event.BEGIN_LEAVES)


def _send_begin(work: Work, raw: Any) -> None:
    link = work.link
    driver, observer, settings = link.driver, link.observer, link.settings
    observer.began(driver.begin(raw, settings, observer.rider(raw, settings)))
    if link.is_elsewhere(raw):
        # What was a standby takes writes, unwitnessed.
        observer.rollback(raw)
        link.record_session(raw)
        observer.began(driver.begin(raw, settings, observer.rider(raw, settings)))
