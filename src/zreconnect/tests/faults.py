"""Faults of a server and of the lines to it, for what must survive them.

Each fault is a function of the server, one of the lines, and a random.Random; what it takes down is
up again when it returns.
"""

from __future__ import annotations

import contextlib
import time
from typing import NamedTuple

OUTAGE = (0.1, 1.0)
# A short transaction is about this many bytes in each direction.
BYTES_OF_A_TRANSACTION = 600


def fast_restart(server, line, choice):
    server.restart()


def immediate_stop(server, line, choice, outage=OUTAGE):
    server.stop_immediately()
    time.sleep(choice.uniform(*outage))
    server.start()


def kill_of_all(server, line, choice, outage=OUTAGE):
    server.kill_all()
    time.sleep(choice.uniform(*outage))
    server.start()


def kill_of_a_backend(server, line, choice):
    to_a_backend(server, choice, server.kill_backend)
    server.wait_until_ready()


def terminated_backend(server, line, choice):
    to_a_backend(server, choice, server.terminate_backend)


def suspended_backend(server, line, choice):
    """Its client, cut off from it, goes on while it may still have a COMMIT to read."""
    pid = to_a_backend(server, choice, server.suspend_backend)
    time.sleep(choice.uniform(*OUTAGE) / 4)
    line.drop()
    time.sleep(choice.uniform(*OUTAGE))
    with contextlib.suppress(ValueError):
        server.resume_backend(pid)


def drop_by_fin(server, line, choice):
    line.drop()


def drop_by_rst(server, line, choice):
    line.drop(reset=True)


def refusal(server, line, choice):
    line.refuse()
    line.drop()
    time.sleep(choice.uniform(*OUTAGE))
    line.accept()


def silence_and_drop(server, line, choice):
    line.silence(choice.choice(["to_server", "to_client", "both"]))
    time.sleep(choice.uniform(*OUTAGE))
    line.drop(reset=choice.random() < 0.5)
    line.resume()


def silence(server, line, choice):
    line.silence(choice.choice(["to_server", "to_client", "both"]))
    time.sleep(choice.uniform(*OUTAGE))
    line.resume()


def delay(server, line, choice):
    line.delay(choice.uniform(0.001, 0.05))
    time.sleep(choice.uniform(*OUTAGE))
    line.delay(0)


def cut_at_a_byte(server, line, choice, within=BYTES_OF_A_TRANSACTION, then=None):
    direction = choice.choice(["to_server", "to_client"])
    after = choice.randrange(within)
    cut = line.cut(direction, after, reset=choice.random() < 0.5, then=then)
    if not cut.wait(OUTAGE[1]):
        line.cancel_cut()


def cut_and_kill(server, line, choice):
    """The server crashes before the cut shows."""
    cut_at_a_byte(
        *(server, line, choice), then=lambda: to_a_backend(server, choice, server.kill_backend)
    )
    server.wait_until_ready()


def to_a_backend(server, choice, action):
    """Call ``action`` with the process id of a session, and return it."""
    while True:
        for pid in choice.sample(pids := server.backend_pids(), len(pids)):
            # It may have ended since.
            with contextlib.suppress(ValueError):
                action(pid)
                return pid


class Happened(NamedTuple):
    """A fault, when it began, and how long it lasted."""

    name: str
    moment: float
    seconds: float


def make_faults(kinds, pause, seconds, server, lines, choice):
    """Let faults happen for that long; returns what `Happened`.

    pause: the shortest and the longest one between two faults, in seconds.
    """
    happened = []
    deadline = time.monotonic() + seconds
    while True:
        # Each kind once before one comes again.
        for fault in choice.sample(kinds, len(kinds)):
            time.sleep(max(0.0, min(choice.uniform(*pause), deadline - time.monotonic())))
            moment = time.monotonic()
            if moment >= deadline:
                return happened
            fault(server, choice.choice(lines), choice)
            happened.append(Happened(fault.__name__, moment, time.monotonic() - moment))
