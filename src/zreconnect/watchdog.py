"""Notices servers that went silent: one thread of the process, which costs the others nothing.

Neither libpq nor TCP notices a peer that stopped without a word, as after a pulled cable or a lost
route. Whoever sends a request notes in the session's `Watch` how long it waits for the answer, and
takes that note away afterwards: no lock, no clock, no system call. The watchdog looks at the notes
from time to time, and shuts down the socket of a request whose time is up, upon which the driver
raises the error of a lost connection. It tells nobody: whoever gets that error finds
`Watch.cut_after`.

What is counted is silence. Linux tells how many bytes have come on a TCP connection, and how many
that were sent the other side has acknowledged; while these numbers grow, as those of an upload over
a slow line do, no wait grows. Where nobody tells, as for other sockets, all the time counts.

There is no lock in this module. One could be held by a thread that a fork leaves behind, or by
one that an interrupt has torn out of it. Instead, each step that has to be whole is one method of
a built-in set or list: neither another thread nor the handler of a signal comes in between.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from zreconnect.threads import start_thread

# An answer may be overdue by that many seconds before it is noticed.
INTERVAL = 0.25
# Where Linux has tcpi_bytes_acked and tcpi_bytes_received in its struct tcp_info, since 4.1.
COUNTS = slice(120, 136)


class Wait:
    """A request's wait for its answer: a context manager, which `Watch.awaiting` makes."""

    # No __init__(), which would be one more call for each request.
    __slots__ = ("limit", "since", "waits")

    waits: set[Wait]
    limit: float
    #: Since when the server has been silent, as far as the watchdog has seen; None before it has
    #: looked.
    since: float | None
    #: Whether only silence counts, and not all the time.
    is_of_silence = True

    def __enter__(self) -> None:
        self.waits.add(self)

    def __exit__(self, *error: object) -> None:
        self.waits.discard(self)

    def renew(self, limit: float | None) -> None:
        """From now on the answer may take so many seconds; None sets no limit."""
        if limit is None:
            self.waits.discard(self)
        else:
            self.limit = limit
            self.since = None


class _Deadline(Wait):
    __slots__ = ()

    is_of_silence = False


class Pause:
    """While it lasts the server owes nothing: a context manager, which `Watch.pausing` makes."""

    __slots__ = ("_watch",)

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __enter__(self) -> None:
        self._watch.pauses.add(self)

    def __exit__(self, *error: object) -> None:
        self._watch.paused.add(self)
        self._watch.pauses.discard(self)


class Watch:
    """What one session waits for.

    fileno: the number of the session's socket, of which the watch has a copy; None for no socket.
    address: that of the server, for who reports a cut.

    Raises RuntimeError if there is no watchdog and its thread cannot be started.
    """

    __slots__ = (
        "__weakref__",
        "_counts",
        "_poll",
        "_socket",
        "_waits",
        "address",
        "cut_after",
        "paused",
        "pauses",
    )

    def __init__(self, fileno: int | None, address: str) -> None:
        self.address = address
        #: After how many seconds without an answer the watchdog has cut the session off; None if
        #: it has not.
        self.cut_after: float | None = None
        self._waits: set[Wait] = set()
        #: What the program itself does inside a request at present, and what of that has ended
        #: since the watchdog looked last.
        self.pauses: set[object] = set()
        self.paused: set[object] = set()
        # What has come and gone, when the watchdog looked last.
        self._counts = b""
        # One socket or none. Who takes it out closes it, so that nobody shuts down a number that
        # belongs to another file by then.
        self._socket: list[socket.socket] = []
        if fileno is not None:
            # A copy of the descriptor, because the driver's own may be closed at any time.
            self._socket.append(socket.socket(fileno=os.dup(fileno)))
            self._poll = select.poll()
            self._poll.register(self._socket[0], select.POLLIN)
            try:
                _start_watching(self)
            except BaseException:
                self.close()
                raise

    def awaiting(self, limit: float | None) -> Wait:
        """A context manager for one request, in which the server may be silent for ``limit``
        seconds.

        The time begins when the watchdog sees the wait, and anew whenever it sees that something
        has come, or that something which was sent has arrived. Of several waits, nested or not, the
        first whose time is up cuts the session off; None sets no limit.
        """
        if limit is None:
            return _FOR_EVER
        wait = Wait()
        wait.waits = self._waits
        wait.limit = limit
        wait.since = None
        return wait

    def call(self, limit: float, function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """What ``function`` returns, with `awaiting` around it."""
        with self.awaiting(limit):
            return function(*args, **keywords)

    def within(self, limit: float) -> Wait:
        """As `awaiting`, for what may take ``limit`` seconds whatever comes meanwhile."""
        deadline = _Deadline()
        deadline.waits = self._waits
        deadline.limit = limit
        deadline.since = None
        return deadline

    def pausing(self) -> Pause:
        """A context manager for what the program itself does inside a request.

        The time of the waits begins anew at its end.
        """
        return Pause(self)

    def reset(self) -> None:
        """Forget all waits and pauses, among them what an interrupt has left."""
        self._waits.clear()
        self.pauses.clear()
        self.paused.clear()

    def is_quiet(self) -> bool:
        """Whether nothing has arrived since the last answer, as the end of the session would.

        No round trip, and no system call but poll(). Silence is no proof that the session lives.
        """
        return bool(self._socket) and not self._poll.poll(0)

    def look(self) -> None:
        """For the watchdog: cut the session off if an answer is overdue."""
        waits = self._waits.copy()
        if not waits:
            return
        has_paused = bool(self.paused)
        if has_paused:
            self.paused.clear()
        # After that: the time begins anew at the end of the last pause, or later.
        now = time.monotonic()
        is_silent = not self._has_moved() and not self.pauses
        overdue = []
        for wait in waits:
            if wait.since is None or has_paused or (wait.is_of_silence and not is_silent):
                wait.since = now
            if now - wait.since >= wait.limit:
                overdue.append(wait.limit)
        if overdue:
            self.cut(min(overdue))

    def _has_moved(self) -> bool:
        """Whether anything has come, or has arrived that was sent, since this was asked last."""
        before = self._counts
        for each in self._socket.copy():
            self._counts = _counts(each)
        return self._counts != before

    def cut(self, limit: float) -> None:
        """Cut the session off, whose answer has taken more than ``limit`` seconds."""
        # First, so that whoever gets the error finds it.
        self.cut_after = limit if self._socket else self.cut_after
        self.hang_up()

    def hang_up(self) -> None:
        """End the session, in all processes that have it. Never waits."""
        for each in self._take_socket():
            with each, contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the socket; the session itself stays as it is. Never waits."""
        for each in self._take_socket():
            each.close()

    def _take_socket(self) -> list[socket.socket]:
        try:
            return [self._socket.pop()]
        except IndexError:
            return []

    def __del__(self, suppress: Any = contextlib.suppress) -> None:
        # An interrupt may have ended __init__() before there was a socket. At the interpreter's
        # end, the names of this module may be None.
        with suppress(AttributeError):
            self.close()


# It is noted where nobody looks.
_FOR_EVER = Wait()
_FOR_EVER.waits = set()
_FOR_EVER.limit = math.inf
_FOR_EVER.since = None


def _counts(of: socket.socket) -> bytes:
    """How many bytes have been acknowledged and received; nothing where nobody tells."""
    if sys.platform != "linux":
        return b""
    try:
        return of.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, COUNTS.stop)[COUNTS]
    except OSError:
        # Not TCP, or closed meanwhile.
        return b""


#: For a connection that has no session.
NO_WATCH = Watch(None, "")

# Not a WeakSet, whose methods are no single steps.
_watches: set[weakref.ref[Watch]] = set()
# The one that is in office; another one ends when it sees that.
_watchdog: threading.Thread | None = None


def _start_watching(watch: Watch) -> None:
    _watches.add(weakref.ref(watch, _watches.discard))
    # In this order; a watchdog resigns in the other one.
    if _watchdog is None:
        start_thread(threading.Thread(target=_watch_all, name="zreconnect watchdog", daemon=True))


def _watch_all() -> None:
    global _watchdog
    # By itself: who has started it may have been interrupted.
    myself = _watchdog = threading.current_thread()
    while _watchdog is myself:
        time.sleep(INTERVAL)
        if not _watches:
            _watchdog = None
            # Who came before that relies on this one, and who comes after it starts another one.
            if _watches:  # pragma: no cover
                _watchdog = myself
            continue
        _look_at_all()


def _look_at_all() -> None:
    # A function of its own: no reference may outlast a session that is forgotten.
    for reference in _watches.copy():
        watch = reference()
        if watch is not None:
            # Whatever is wrong with one session, the others keep their time limits.
            with contextlib.suppress(Exception):
                watch.look()


def _start_anew() -> None:
    """In a forked child: the thread is the parent's, and so are the sessions."""
    global _watches, _watchdog
    _watches = set()
    _watchdog = None


os.register_at_fork(after_in_child=_start_anew)
