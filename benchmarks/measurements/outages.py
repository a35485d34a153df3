"""Back after an outage: from the moment the server accepts connections to the first transaction.

The server itself stays up. What goes away is a forwarder in front of it, so that the moment of its
return is known. What a client asks of the server in between is refused, and counted.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.measurements.witnesses import cpu_seconds
from benchmarks.part import Goal, Options, Outcome, Part, Plot, Table
from benchmarks.peers import Address
from benchmarks.server import postgres, through_tcp
from benchmarks.svg import Bar, bars
from benchmarks.waiting import success
from benchmarks.workers import Worker
from zreconnect import RetryPolicy
from zreconnect.testing import PortForward

#: Processes of each contestant, which wait at the same time.
EACH = 2
#: The seconds of the outages, and how many there are of each kind; the second number is for --long.
OUTAGES = {1.0: (5, 10), 10.0: (5, 10), 60.0: (0, 10)}
#: Seconds. How an outage ends must not depend on what contestants do once a second.
RANDOM = 1.0


@dataclass(frozen=True)
class Contestant:
    """peer: its name. pause: the mean of the seconds after which a program asks again when it has
    got an error. options: for the peer's class."""

    title: str
    peer: str
    pause: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    is_ours: bool = False


def _ours(title: str, peer: str, **options: Any) -> Contestant:
    return Contestant(f"zreconnect {title}", peer, options=options, is_ours=True)


QUICK = _ours("connect, maximum=0.1", "connect-psycopg2-xid", policy=RetryPolicy(maximum=0.1))
DEFAULT = _ours("connect", "connect-psycopg2-xid")
EVERY_SECOND = ", asked again each second"
CONTESTANTS = (
    DEFAULT,
    QUICK,
    _ours("connect on psycopg", "connect-psycopg-xid"),
    _ours("initZopeless", "zopeless-xid"),
    _ours("under SQLAlchemy", "sqlalchemy-zreconnect"),
    Contestant("psycopg_pool", "psycopg_pool"),
    Contestant(f"psycopg2{EVERY_SECOND}", "psycopg2"),
    Contestant("psycopg2, asked again each 0.05 s", "psycopg2", 0.05),
    Contestant(f"SQLAlchemy, pre-ping{EVERY_SECOND}", "sqlalchemy-pre_ping"),
    Contestant(f"oslo.db{EVERY_SECOND}", "oslo.db"),
    Contestant(f"Storm{EVERY_SECOND}", "storm"),
    Contestant(
        f"Django, health checks{EVERY_SECOND}", "django", options={"CONN_HEALTH_CHECKS": True}
    ),
)


@dataclass
class Waits:
    """Of one contestant in the outages of one length, a value for each process and outage.

    seconds: from the server's return. errors: that the program saw. attempts: connections that
    were tried in the outage, each second. cpu: the part of the outage that the process computed.
    """

    seconds: list[float] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    attempts: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Waiting:
    """A contestant's processes, and the forwarder that counts what they try."""

    contestant: Contestant
    forward: PortForward
    address: Address
    workers: Sequence[Worker]


@contextmanager
def waiting(
    contestants: Sequence[Contestant], server: Any, gate: PortForward
) -> Iterator[list[Waiting]]:
    with ExitStack() as stack:
        found = []
        for each in contestants:
            forward = stack.enter_context(PortForward(gate.host, gate.port))
            address = through_tcp(server, forward.port)
            running = [Worker(each.peer, address, **each.options) for _ in range(EACH)]
            for worker in running:
                stack.callback(worker.close)
            found.append(Waiting(each, forward, address, running))
        yield found


def outage(
    gate: PortForward, waiting: Sequence[Waiting], seconds: float, found: Mapping[str, Waits]
) -> None:
    """Have one, and add what came of it."""
    for each in waiting:
        for worker in each.workers:
            worker.call(success, each.address, 0.1)
    gate.refuse()
    gate.drop()
    before = {}
    for each in waiting:
        before[each.contestant.title] = each.forward.count().connections
        for worker in each.workers:
            worker.ask(success, each.address, each.contestant.pause)
    used = {worker.pid: -cpu_seconds(worker.pid) for each in waiting for worker in each.workers}
    seconds += random.uniform(0.0, RANDOM)
    time.sleep(seconds)
    for pid in used:
        used[pid] += cpu_seconds(pid)
    counts = {each.contestant.title: each.forward.count().connections for each in waiting}
    back = time.monotonic()
    gate.accept()
    for each in waiting:
        title = each.contestant.title
        waits = found[title]
        waits.attempts.append((counts[title] - before[title]) / len(each.workers) / seconds)
        for worker in each.workers:
            made = worker.answer()
            waits.seconds.append(made.at - back)
            waits.errors.append(len(made.errors))
            waits.cpu.append(used[worker.pid] / seconds)


def measure(options: Options) -> Outcome:
    found: dict[float, dict[str, Waits]] = {}
    with (
        postgres() as server,
        PortForward(server.host, server.port) as gate,
        waiting(CONTESTANTS, server, gate) as processes,
    ):
        for seconds, numbers in OUTAGES.items():
            number = min(numbers[options.is_long], options.rounds)
            if number:
                found[seconds] = {each.title: Waits() for each in CONTESTANTS}
                for _ in range(number):
                    outage(gate, processes, seconds, found[seconds])
                print(f"outages: of {seconds:g} seconds are measured", flush=True)
    return Outcome(
        {
            f"{seconds:g} s": {title: asdict(each) for title, each in waits.items()}
            for seconds, waits in found.items()
        },
        [_table(seconds, waits) for seconds, waits in found.items()],
        [_plot(seconds, waits) for seconds, waits in found.items()],
        [*_goals(found)],
    )


def p99(values: Sequence[float]) -> float:
    """Of fewer than a hundred values, the largest."""
    return sorted(values)[max(0, -(-99 * len(values) // 100) - 1)]


def _table(seconds: float, found: Mapping[str, Waits]) -> Table:
    rows = [
        [
            title,
            f"{statistics.median(waits.seconds):.3f} s",
            f"{p99(waits.seconds):.3f} s",
            f"{statistics.median(waits.errors):g}",
            f"{statistics.median(waits.attempts):.2f}",
            f"{100 * statistics.median(waits.cpu):.2f} %",
        ]
        for title, waits in found.items()
    ]
    number = len(found[DEFAULT.title].seconds)
    return Table(
        f"After {seconds:g} seconds without server, {number} times each",
        ("", "median", "p99", "errors", "attempts/s of a process", "CPU meanwhile"),
        rows,
    )


def _plot(seconds: float, found: Mapping[str, Waits]) -> Plot:
    rows = [
        Bar(
            each.title,
            statistics.median(found[each.title].seconds),
            min(found[each.title].seconds),
            max(found[each.title].seconds),
            0 if each.is_ours else 1,
        )
        for each in CONTESTANTS
    ]
    unit = "seconds from the server's return to the first transaction; median and extremes"
    return Plot(f"outages-{seconds:g}", bars(f"Back after {seconds:g} seconds", unit, rows))


def _goals(found: Mapping[float, Mapping[str, Waits]]) -> Iterator[Goal]:
    for what, limit, contestants in [
        (
            "with the defaults",
            1.0,
            [each for each in CONTESTANTS if each.is_ours and each is not QUICK],
        ),
        ("with maximum=0.1", 0.1, [QUICK]),
    ]:
        longest = max(
            (p99(waits[each.title].seconds), each.title, seconds)
            for seconds, waits in found.items()
            for each in contestants
        )
        yield Goal(
            f"Back after an outage, {what}: p99 within {limit:g} s",
            f"{longest[0]:.3f} s ({longest[1]}, {longest[2]:g} s)",
            longest[0] <= limit,
        )
    peers = [each.title for each in CONTESTANTS if not each.is_ours]
    for seconds, waits in found.items():
        fastest = min(peers, key=lambda title: p99(waits[title].seconds))
        most = max(statistics.median(waits[each.title].attempts) for each in (DEFAULT, QUICK))
        theirs = statistics.median(waits[fastest].attempts)
        yield Goal(
            f"{seconds:g} s: fewer attempts of a waiting process than of the fastest peer",
            f"{most:.2f}/s; {fastest}: {theirs:.2f}/s",
            most < theirs,
        )
    used, quick = (
        max(statistics.median(waits[each.title].cpu) for waits in found.values())
        for each in (DEFAULT, QUICK)
    )
    yield Goal(
        "Waiting takes under 1 % of a CPU",
        f"{100 * used:.2f} %; {QUICK.title}: {100 * quick:.2f} %",
        used < 0.01,
    )


PART = Part("outages", "Back after an outage", 4, measure)
