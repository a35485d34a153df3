"""In a worker's process: transactions as a program makes them that is to survive an outage."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.peers import Address, Peer, Statement

WORK = [Statement("SELECT 1", has_rows=True)]
#: So many errors one after the other are taken for a mistake in the benchmark.
MOST_ERRORS = 100_000


@dataclass(frozen=True)
class Success:
    """at: the time.monotonic() at which the transaction was made, which is the same clock in all
    processes of Linux. seconds: that it has taken, errors included. errors: their classes."""

    at: float
    seconds: float
    errors: tuple[str, ...]


def success(peer: Peer, address: Address, pause: float = 0.0) -> Success:
    """Make a transaction, until there is one.

    pause: the mean of the seconds after an error.

    Raises the last error after `MOST_ERRORS`.
    """
    work, started, errors = peer.prepared(WORK), time.monotonic(), []
    while True:
        try:
            if errors:
                peer.mend(address)
            peer.refresh()
            peer.transaction(work)
        except Exception as error:
            errors.append(type(error).__name__)
            if len(errors) == MOST_ERRORS:
                raise
        else:
            now = time.monotonic()
            return Success(now, now - started, tuple(errors))
        if pause:
            time.sleep(pause * random.uniform(0.5, 1.5))


def quartiles(values: list[float]) -> Any:
    """The lower quartile, the median, and the upper one."""
    values = sorted(values)
    last = len(values) - 1
    return values[round(last / 4)], values[round(last / 2)], values[round(last * 3 / 4)]
