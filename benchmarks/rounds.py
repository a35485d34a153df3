"""Measuring in turns, and what is made of it: medians of ratios, with quartiles."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ratio:
    """The median of ratios, and their quartiles."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lower:.2f}-{self.upper:.2f})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Of what was measured in the same rounds."""
    ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, lower, upper)


def interleaved(
    rounds: int, names: Iterable[str], measure: Callable[[str], T]
) -> Mapping[str, list[T]]:
    """What was measured of each, a value for each round; in every round in another order."""
    measured: dict[str, list[T]] = {name: [] for name in names}
    order = list(measured)
    chance = random.Random(len(order))
    for _ in range(rounds):
        chance.shuffle(order)
        for name in order:
            measured[name].append(measure(name))
    return measured


@dataclass(frozen=True)
class Burst:
    """Seconds that a transaction took, of some that were made one after the other.

    wall: of the quickest one, by the clock, since a machine that does something else meanwhile
    delays the others. cpu: of the process's CPU, for each of them, so with what is done now and
    then.
    """

    wall: float
    cpu: float


def burst(number: int, function: Callable[[], object]) -> Burst:
    """Call the function so many times."""
    clock = time.perf_counter
    times = []
    cpu = time.process_time()
    for _ in range(number):
        started = clock()
        function()
        times.append(clock() - started)
    return Burst(min(times), (time.process_time() - cpu) / number)


#: The rounds of each peer, by name.
Measured = Mapping[str, list[Burst]]


def speed(measured: Measured, name: str, beside: str) -> Ratio:
    """How many times as fast it is as another one, by the clock."""
    return ratio([each.wall for each in measured[beside]], [each.wall for each in measured[name]])


def thrift(measured: Measured, name: str, beside: str) -> Ratio:
    """How many times less CPU time its process takes than another one's."""
    return ratio([each.cpu for each in measured[beside]], [each.cpu for each in measured[name]])
