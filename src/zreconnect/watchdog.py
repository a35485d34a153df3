"""Notices servers that went silent: one thread of the process, which costs the others nothing.

Neither libpq nor TCP notices a peer that stopped without a word, as after a pulled cable or a lost
route. Whoever sends a request notes in the session's `Watch` how long it waits for the answer, and
takes that note away afterwards: two attributes, no lock, no clock, no system call. The watchdog
looks at the notes from time to time, and shuts down the socket of a request whose time is up, upon
which the driver raises the error of a lost connection.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
import weakref

logger = logging.getLogger("zreconnect")

# An answer may be overdue by that many seconds before it is noticed.
INTERVAL = 0.25


class Watch:
    """What one session waits for.

    limit: the seconds that the present request may wait for its answer; None if there is no
    request, or if it may wait for ever.
    requests: a number that changes with each request.
    """

    __slots__ = ("__weakref__", "_address", "_lock", "_poll", "_socket", "limit", "requests")

    def __init__(self, fileno: int | None, address: str) -> None:
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._address = address
        self.limit: float | None = None
        self.requests = 0
        if fileno is not None:
            # A copy of the descriptor: the driver's own number may belong to another file by the
            # time that the watchdog uses it.
            self._socket = socket.socket(fileno=os.dup(fileno))
            self._poll = select.poll()
            self._poll.register(self._socket, select.POLLIN)
            _start_watching(self)

    def awaiting(self, limit: float | None) -> Watch:
        """A context manager for one request, whose answer may take ``limit`` seconds."""
        self.requests += 1
        self.limit = limit
        return self

    def __enter__(self) -> None:
        """The request is noted already."""

    def __exit__(self, *error: object) -> None:
        self.limit = None

    def is_quiet(self) -> bool:
        """Whether nothing has arrived since the last answer, as the end of the session would.

        No round trip, and no system call but poll(). Silence is no proof that the session lives.
        """
        return self._socket is not None and not self._poll.poll(0)

    def cut(self, limit: float) -> None:
        with self._lock:
            if self._socket is None:
                return
            logger.warning(
                "No answer from %s within %.1f seconds: the connection is cut",
                self._address,
                limit,
            )
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def __del__(self) -> None:
        # Without the lock: nobody else knows the object any more.
        if self._socket is not None:
            self._socket.close()


#: For a connection that has no session.
NO_WATCH = Watch(None, "")

_lock = threading.Lock()
_watches: weakref.WeakSet[Watch] = weakref.WeakSet()
_thread: threading.Thread | None = None


def _start_watching(watch: Watch) -> None:
    global _thread
    with _lock:
        _watches.add(watch)
        if _thread is None:
            _thread = threading.Thread(target=_watch_all, name="zreconnect watchdog", daemon=True)
            _thread.start()


def _watch_all() -> None:
    global _thread
    waiting: dict[Watch, tuple[int, float]] = {}
    while True:
        time.sleep(INTERVAL)
        with _lock:
            watches = list(_watches)
            if not watches:
                _thread = None
                return
        waiting = {watch: seen for watch in watches if (seen := _look_at(watch, waiting))}
        # No reference may outlast a session that is forgotten.
        del watches


def _look_at(watch: Watch, waiting: dict[Watch, tuple[int, float]]) -> tuple[int, float] | None:
    """The request that is waited for and when it was first seen; cuts it off if it is overdue."""
    limit, request, now = watch.limit, watch.requests, time.monotonic()
    if limit is None:
        return None
    seen = waiting.get(watch)
    if seen is None or seen[0] != request:
        seen = request, now
    if now - seen[1] >= limit:
        watch.cut(limit)
    return seen


def _start_anew() -> None:
    """In a forked child: the thread is the parent's, and so are the sessions."""
    global _lock, _thread
    _lock = threading.Lock()
    _thread = None
    _watches.clear()


os.register_at_fork(after_in_child=_start_anew)
