"""A fleet of clients that wait for one server, simulated: how hard they knock, how soon all are in.

Time is virtual, in steps of a millisecond, and the random numbers are seeded. Each client is a
process that has lost its server and tries until it is let in; all of them at the same moment, or
within some seconds. The pauses are drawn one by one: ours by `RetryPolicy.pause` itself.

The server is away for a while. Then it lets in so many clients a second, one after the other; as
many as it lets in within a tenth of a second may stand in the queue. Who comes when that is full is
refused, or hears nothing: then TCP knocks again after 1, 3 and 7 seconds, as long as the attempt
lasts.
"""

from __future__ import annotations

import array
import multiprocessing
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.part import Goal, Options, Outcome, Part, Plot, Table
from benchmarks.svg import Axis, lines
from zreconnect import PERSIST

STEPS = 1000  # in a second
QUEUE = 0.1  # seconds
AGAIN = (1.0, 3.0, 7.0)
LONGEST_ATTEMPT = 10.0
SEED = 2
#: After so many times the seconds that the server needs, who is still waiting is counted as such.
LONGEST = 2.5
PROCESSES = 2


@dataclass(frozen=True)
class Schedule:
    """pause: the seconds after attempt number so, so many seconds after the first one began.
    limit: the seconds after which an attempt without answer has failed, likewise."""

    pause: Callable[[int, float], float]
    limit: Callable[[float], float] = lambda elapsed: LONGEST_ATTEMPT


def _pool(attempt: int, elapsed: float) -> float:
    """psycopg_pool 3.3: a second, give or take a tenth, then twice as long each time; the last
    attempt is 300 seconds after the first. Here the tenth is drawn anew for each pause, which
    spreads the clients more than it does."""
    pause = random.uniform(0.9, 1.1) * 2.0 ** (attempt - 1)
    return min(pause, 300.0 - elapsed) if elapsed < 300.0 else 1.0


OURS, POLLING = "zreconnect", "every second, jittered"
SCHEDULES: Mapping[str, Schedule] = {
    OURS: Schedule(PERSIST.pause, PERSIST.attempt_limit),
    POLLING: Schedule(lambda attempt, elapsed: random.uniform(0.5, 1.5)),
    "every second": Schedule(lambda attempt, elapsed: 1.0),
    "exponential, no jitter": Schedule(lambda attempt, elapsed: min(60.0, 2.0 ** (attempt - 1))),
    "psycopg_pool": Schedule(_pool),
}


@dataclass(frozen=True)
class Scenario:
    """clients: how many. away: the seconds until the server is back. rate: the clients a second
    that it lets in then. within: the seconds in which the clients begin to knock. is_silent:
    whether who is not let in is not told."""

    clients: int
    away: float
    rate: int
    within: float = 0.0
    is_silent: bool = False

    @property
    def needs(self) -> float:
        """The seconds that the server needs to let in all of them."""
        return self.clients / self.rate

    def __str__(self) -> str:
        began = f"within {self.within:g} s" if self.within else "all at once"
        return (
            f"{self.clients:,} clients, {began}; away {self.away:g} s"
            f"{', silent' if self.is_silent else ''}; then {self.rate:,}/s, all in {self.needs:g} s"
        )


SCENARIOS = (
    Scenario(10_000, 1, 5_000),
    Scenario(10_000, 10, 500),
    Scenario(10_000, 60, 2_000, within=10),
    Scenario(10_000, 60, 500, is_silent=True),
    Scenario(1_000_000, 5, 100_000),
)


@dataclass(frozen=True)
class Run:
    """What became of a fleet.

    a_second: the attempts that were begun in each second from the loss on. served: when each
    client was let in, in seconds after the server's return, sorted.
    """

    a_second: list[int]
    served: array.array[float]

    def part_served(self, share: float, clients: int) -> float | None:
        """The seconds after which so many were in; None if that was not waited for."""
        number = max(1, round(share * clients))
        return self.served[number - 1] if number <= len(self.served) else None


class Fleet:
    def __init__(self, schedule: Schedule, scenario: Scenario) -> None:
        self._pause, self._limit = schedule.pause, schedule.limit
        self._scenario = scenario
        #: When the server has let in everybody who stands in the queue.
        self._free = scenario.away
        self._attempts = array.array("H", bytes(2 * scenario.clients))
        #: Of the present attempt: how often TCP has knocked, when it began and when it will end.
        self._knocks = array.array("B", bytes(scenario.clients))
        self._began_attempt: dict[int, tuple[float, float]] = {}
        self._steps: dict[int, list[int]] = {}
        self._began = array.array("d")
        for client in range(scenario.clients):
            self._began.append(random.uniform(0.0, scenario.within))
            self._at(self._began[client], client)
        self._run = Run([], array.array("d"))

    def run(self) -> Run:
        scenario = self._scenario
        for step in range(int((scenario.away + LONGEST * scenario.needs) * STEPS)):
            due = self._steps.pop(step, None)
            if due is not None:
                self._knock(due, step / STEPS)
        return self._run

    def _knock(self, due: list[int], now: float) -> None:
        a_second, served = self._run.a_second, self._run.served
        away, each = self._scenario.away, 1.0 / self._scenario.rate
        attempts, knocks, began = self._attempts, self._knocks, self._began
        while len(a_second) <= now:
            a_second.append(0)
        for client in due:
            if not knocks[client]:
                a_second[int(now)] += 1
                attempts[client] += 1
            if now >= away and self._free - now < QUEUE:
                self._free = max(self._free, now) + each
                served.append(self._free - away)
            elif self._scenario.is_silent and self._knocks_again(client, now):
                pass
            else:
                pause = self._pause(attempts[client], now - began[client])
                self._at(now + pause, client)

    def _knocks_again(self, client: int, now: float) -> bool:
        """Whether the attempt goes on; else it has ended."""
        knocks = self._knocks[client]
        if not knocks:
            limit = self._limit(now - self._began[client])
            self._began_attempt[client] = now, now + limit
        began, end = self._began_attempt[client]
        if now >= end:
            self._knocks[client] = 0
            return False
        again = began + AGAIN[knocks] if knocks < len(AGAIN) else end
        self._knocks[client] += 1
        self._at(min(again, end), client)
        return True

    def _at(self, when: float, client: int) -> None:
        step = int(when * STEPS) + 1
        due = self._steps.get(step)
        if due is None:
            self._steps[step] = [client]
        else:
            due.append(client)


def simulated(scenario: Scenario, name: str) -> Run:
    """What becomes of the fleet with the schedule of that name."""
    random.seed(SEED)
    return Fleet(SCHEDULES[name], scenario).run()


def busiest(run: Run, polling: Run) -> float:
    """The most attempts in a second, beside the most of polling."""
    return max(run.a_second) / max(polling.a_second)


def measure(options: Options) -> Outcome:
    jobs = [(scenario, name) for scenario in reversed(SCENARIOS) for name in SCHEDULES]
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        results = pool.starmap(simulated, jobs, chunksize=1)
    runs = dict(zip(jobs, results, strict=True))
    return Outcome(
        [_data(scenario, runs) for scenario in SCENARIOS],
        [_table(scenario, runs) for scenario in SCENARIOS],
        [*_plots(runs)],
        [*_goals(runs)],
    )


Runs = Mapping[tuple[Scenario, str], Run]


def _data(scenario: Scenario, runs: Runs) -> Any:
    return {
        "scenario": str(scenario),
        "attempts a second": {name: runs[scenario, name].a_second for name in SCHEDULES},
        "seconds until a share is in": {
            name: {
                share: runs[scenario, name].part_served(share, scenario.clients)
                for share in (0.5, 0.99, 1.0)
            }
            for name in SCHEDULES
        },
    }


def _table(scenario: Scenario, runs: Runs) -> Table:
    columns = ("", "attempts", "most a second", "beside polling", "50 % in", "99 % in", "all in")
    rows = []
    for name in SCHEDULES:
        run = runs[scenario, name]
        rows.append(
            [
                name,
                f"{sum(run.a_second):,}",
                f"{max(run.a_second):,}",
                f"{busiest(run, runs[scenario, POLLING]):.2f}",
                *(_seconds(run.part_served(share, scenario.clients)) for share in (0.5, 0.99, 1)),
            ]
        )
    return Table(str(scenario), columns, rows)


def _seconds(seconds: float | None) -> str:
    return f"more than {LONGEST:g} x" if seconds is None else f"{seconds:.1f} s"


def _plots(runs: Runs) -> Iterator[Plot]:
    for scenario in (SCENARIOS[1], SCENARIOS[-1]):
        series = {
            name: list(enumerate(map(float, runs[scenario, name].a_second), 1))
            for name in SCHEDULES
        }
        axes = Axis("second after the loss"), Axis("attempts a second", is_logarithmic=True)
        yield Plot(f"fleet-{scenario.clients}", lines(str(scenario), *axes, series))


def _goals(runs: Runs) -> Iterable[Goal]:
    worst = partial(max, key=lambda found: found[0])
    ratio, scenario = worst(
        (busiest(runs[each, OURS], runs[each, POLLING]), each) for each in SCENARIOS
    )
    yield Goal(
        "Fleets: never more than twice the attempts a second of jittered polling",
        f"{ratio:.2f} ({scenario})",
        ratio <= 2.0,
    )
    times, scenario = worst(
        ((runs[each, OURS].part_served(1.0, each.clients) or float("inf")) / each.needs, each)
        for each in SCENARIOS
    )
    yield Goal(
        "Fleets: all are in within twice the time that the server needs",
        f"{times:.2f} ({scenario})",
        times <= 2.0,
    )


PART = Part("fleet", "Fleets of clients that wait for a server, simulated", 6, measure)
