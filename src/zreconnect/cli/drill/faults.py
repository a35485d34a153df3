"""What can happen to a program's database: on the line to it, to its sessions, to its server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from zreconnect.cli.drill.database import Database
from zreconnect.cli.drill.program import POLL_INTERVAL
from zreconnect.cli.drill.schedule import Planned
from zreconnect.testing import Cut, EmbeddedMariaDB, EmbeddedPostgres, PortForward

# What each message takes during a delay, in seconds.
DELAY = 0.05
BYTES_PER_SECOND = 2000.0
# How long a fault waits for what it happens at, such as a COMMIT, in seconds.
OCCASION = 5.0

LINE, SESSION, SERVER = "line", "session", "server"


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    place: where it happens, one of ``line``, ``session`` and ``server``.
    description: what happens, for people.
    """

    place: str
    description: str


KINDS: Mapping[str, Kind] = {
    "close": Kind(LINE, "all connections are closed"),
    "reset": Kind(LINE, "all connections are reset"),
    "cut-request": Kind(LINE, "the line is cut while a request is on its way"),
    "cut-answer": Kind(LINE, "the line is cut while an answer is on its way"),
    "lost-commit": Kind(LINE, "the server commits, and the line is cut before its answer arrives"),
    "refuse": Kind(LINE, "connections are cut, and new ones refused for a while"),
    "silent-request": Kind(LINE, "requests do not arrive for a while, then the line is cut"),
    "silent-answer": Kind(LINE, "answers do not arrive for a while, then the line is cut"),
    "silent": Kind(LINE, "nothing arrives in either direction for a while, then all of it does"),
    "slow": Kind(LINE, "everything takes 50 ms more in each direction for a while"),
    "narrow": Kind(LINE, "2000 bytes a second pass in each direction for a while"),
    "terminate": Kind(SESSION, "the program's sessions are terminated, as administrators do it"),
    "freeze": Kind(SERVER, "what serves the program stops for a while, then goes on"),
    "restart": Kind(SERVER, "the server is shut down in order and started again"),
    "stop": Kind(SERVER, "the server is shut down at once and started again"),
    "crash-session": Kind(SERVER, "the process of one session is killed: the server recovers"),
    "crash": Kind(SERVER, "all of the server is killed, and it is started again"),
}
# Those that no connection is lost by.
HARMLESS = ("silent", "slow", "narrow", "freeze")
PLACES = (LINE, SESSION, SERVER)

#: Has a fault happen; returns False if there was no occasion for it.
Way = Callable[[Planned], "bool | None"]


def ways(database: Database, stopping: threading.Event) -> dict[str, Way]:
    """The ways to have each kind of fault happen that can happen here, in the order of `KINDS`.

    stopping: ends what lasts.
    """
    found = _on_line(database.forward, stopping)
    if database.may_terminate():
        found["terminate"] = lambda planned: _soon(database.terminate_all, stopping) > 0
    if isinstance(database.server, EmbeddedPostgres):
        found |= _on_postgres(database, database.server, stopping)
    elif isinstance(database.server, EmbeddedMariaDB):
        found |= _on_mariadb(database.server, stopping)
    return {kind: found[kind] for kind in KINDS if kind in found}


def _on_line(forward: PortForward, stopping: threading.Event) -> dict[str, Way]:
    def drop(reset: bool) -> Way:
        return lambda planned: _soon(lambda: forward.drop(reset), stopping) > 0

    def cut(direction: str) -> Way:
        return lambda planned: _happened(forward, forward.cut(direction, planned.after), stopping)

    def refuse(planned: Planned) -> None:
        forward.refuse()
        forward.drop()
        stopping.wait(planned.seconds)
        forward.accept()

    def silence(direction: str, then_cut: bool) -> Way:
        def way(planned: Planned) -> None:
            forward.silence(direction)
            stopping.wait(planned.seconds)
            if then_cut:
                forward.drop()
            forward.resume()

        return way

    def slow(planned: Planned) -> None:
        forward.delay(DELAY)
        stopping.wait(planned.seconds)
        forward.delay(0)

    def narrow(planned: Planned) -> None:
        forward.throttle(BYTES_PER_SECOND)
        stopping.wait(planned.seconds)
        forward.throttle(None)

    return {
        "close": drop(reset=False),
        "reset": drop(reset=True),
        "cut-request": cut("to_server"),
        "cut-answer": cut("to_client"),
        "lost-commit": lambda planned: _happened(forward, forward.cut_at_commit(), stopping),
        "refuse": refuse,
        "silent-request": silence("to_server", then_cut=True),
        "silent-answer": silence("to_client", then_cut=True),
        "silent": silence("both", then_cut=False),
        "slow": slow,
        "narrow": narrow,
    }


def _soon(action: Callable[[], int], stopping: threading.Event) -> int:
    """Do it until there was somebody to do it to, and return what that has returned, else 0: a
    program need not have a connection all the time."""
    deadline = time.monotonic() + OCCASION
    while not (done := action()) and time.monotonic() < deadline:
        if stopping.wait(POLL_INTERVAL):
            break
    return done


def _happened(forward: PortForward, cut: Cut, stopping: threading.Event) -> bool:
    """Wait for the cut, and whether it has happened."""
    waited = 0.0
    while not cut.wait(0.1) and waited < OCCASION and not stopping.is_set():
        waited += 0.1
    return cut.happened or not forward.cancel_cut()


def _on_postgres(
    database: Database, server: EmbeddedPostgres, stopping: threading.Event
) -> dict[str, Way]:
    def to_a_session(action: Callable[[int], Any]) -> int:
        """The session that it was done to, 0 if there was none."""
        for pid in database.sessions():
            # It may have ended since.
            with suppress(ValueError):
                action(pid)
                return pid
        return 0

    def freeze(planned: Planned) -> bool:
        pid = _soon(lambda: to_a_session(server.suspend_backend), stopping)
        if not pid:
            return False
        stopping.wait(planned.seconds)
        with suppress(ValueError):
            server.resume_backend(pid)
        return True

    def stop(planned: Planned) -> None:
        server.stop_immediately()
        stopping.wait(planned.seconds)
        server.start()

    def crash_session(planned: Planned) -> bool:
        happened = _soon(lambda: to_a_session(server.kill_backend), stopping) > 0
        server.wait_until_ready()
        return happened

    return {
        "freeze": freeze,
        "restart": lambda planned: server.restart(),
        "stop": stop,
        "crash-session": crash_session,
        "crash": _crash(server, stopping),
    }


def _on_mariadb(server: EmbeddedMariaDB, stopping: threading.Event) -> dict[str, Way]:
    def freeze(planned: Planned) -> None:
        server.suspend()
        stopping.wait(planned.seconds)
        server.resume()

    return {
        "freeze": freeze,
        "restart": lambda planned: server.restart(),
        "crash": _crash(server, stopping),
    }


def _crash(server: EmbeddedPostgres | EmbeddedMariaDB, stopping: threading.Event) -> Way:
    def crash(planned: Planned) -> None:
        server.kill_all()
        stopping.wait(planned.seconds)
        server.start()

    return crash
