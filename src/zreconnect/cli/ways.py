"""The ways to interrupt a job: on its line, by SQL, and on the server."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from zreconnect.cli.file import FileTarget
from zreconnect.cli.interruptions import POLL_INTERVAL, Way
from zreconnect.cli.target import Target
from zreconnect.testing import EmbeddedPostgres, PortForward

# What each message takes during a delay, in seconds.
DELAY = 0.05
# How long the job's session is looked for, which may have ended just before, in seconds.
SESSION_TIMEOUT = 1.0
RESTART = "fast restart"


def ways_to_interrupt(
    target: Target | FileTarget, server: EmbeddedPostgres | None, stopping: threading.Event
) -> dict[str, Way]:
    """Return all ways that there are, by the name of their kind.

    server: the target's server, if it may be restarted and killed.
    stopping: ends what lasts.

    Raises the target's ``errors`` if it cannot be reached.
    """
    if isinstance(target, FileTarget):
        return target.ways(stopping)
    ways = _ways_on_line(target.forward, stopping)
    if target.may_terminate():
        ways[target.terminates_by] = lambda seconds: target.terminate(_session(target, stopping))
    if server is not None:
        ways |= _ways_on_server(server, target, stopping)
    return ways


def _ways_on_line(forward: PortForward, stopping: threading.Event) -> dict[str, Way]:
    def refuse(seconds: float) -> None:
        forward.refuse()
        forward.drop()
        stopping.wait(seconds)
        forward.accept()

    def silence(direction: str, seconds: float) -> None:
        forward.silence(direction)
        stopping.wait(seconds)
        forward.drop()
        forward.resume()

    def delay(seconds: float) -> None:
        forward.delay(DELAY)
        stopping.wait(seconds)
        forward.delay(0)

    return {
        "drop with FIN": lambda seconds: forward.drop(),
        "drop with RST": lambda seconds: forward.drop(reset=True),
        "drop and refuse": refuse,
        "silence to the server, drop": lambda seconds: silence("to_server", seconds),
        "silence to the client, drop": lambda seconds: silence("to_client", seconds),
        "delay": delay,
    }


def _ways_on_server(
    server: EmbeddedPostgres, target: Target, stopping: threading.Event
) -> dict[str, Way]:
    def stop_immediately(seconds: float) -> None:
        server.stop_immediately()
        server.start()

    def kill_one(seconds: float) -> None:
        try:
            server.kill_backend(_session(target, stopping))
        except ValueError:
            # There is none, or it has just ended. Any process of the server will do.
            server.kill_backend(target.process("backend_type = 'walwriter'"))
        server.wait_until_ready()

    def kill_all(seconds: float) -> None:
        server.kill_all()
        server.start()

    def suspend(seconds: float) -> None:
        process_id = _session(target, stopping)
        with suppress(ValueError):
            server.suspend_backend(process_id)
            stopping.wait(seconds)
            server.resume_backend(process_id)

    return {
        RESTART: lambda seconds: server.restart(),
        "immediate stop, start": stop_immediately,
        "SIGKILL of one process": kill_one,
        "SIGKILL of all, start": kill_all,
        "suspended session": suspend,
    }


def _session(target: Target, stopping: threading.Event) -> int:
    """The process id of the job's session, 0 if it has none now and soon."""
    deadline = time.monotonic() + SESSION_TIMEOUT
    while not stopping.is_set() and time.monotonic() < deadline:
        process_id = target.session()
        if process_id:
            return process_id
        stopping.wait(POLL_INTERVAL)
    return 0
