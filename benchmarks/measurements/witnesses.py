"""What xid, ledger and none cost, on the client and on the server."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.measurements.transactions import WARM_UP, WORKLOADS, make_tables
from benchmarks.part import Options, Outcome, Part, Plot, Table
from benchmarks.peers import PEERS, WITNESSES, Peer, chosen
from benchmarks.rounds import burst, interleaved
from benchmarks.server import postgres, through_socket
from benchmarks.svg import Bar, bars
from benchmarks.workers import Worker, workers

KEEPERS = (
    "psycopg2",
    *(f"connect-psycopg2-{witness}" for witness in reversed(WITNESSES)),
    "psycopg",
    *(f"connect-psycopg-{witness}" for witness in reversed(WITNESSES)),
)
CHOSEN = ("SELECT", "INSERT")
MICROSECONDS = 1e6


@dataclass(frozen=True)
class Cost:
    """Of a transaction: seconds by the clock, of the client's CPU and of the server process's, and
    bytes of write-ahead log."""

    wall: float
    client: float
    server: float
    log: float


def backend(peer: Any) -> int:
    """In a worker's process: the process id of the session's server process."""
    cursor = peer.cursor()
    cursor.execute("SELECT pg_backend_pid()")
    (pid,) = cursor.fetchone()
    cursor.close()
    peer.commit()
    return int(pid)


def make(peer: Peer, workload: str, number: int) -> tuple[float, float]:
    """In a worker's process: make so many transactions; what one took, by the clock and of CPU."""
    made = burst(number, partial(peer.transaction, peer.prepared(WORKLOADS[workload])))
    return made.wall, made.cpu


def cpu_seconds(pid: int) -> float:
    """What a process of this machine has used, of Linux: the clock that CLOCK_GETTIME(2) has for
    each process, since the figures in /proc are of hundredths of a second."""
    return time.clock_gettime((~pid << 3) | 2)


def cost(server: Any, worker: Worker, pid: int, workload: str, number: int) -> Cost:
    """Of a transaction, when so many are made."""
    log, used = _log_position(server), cpu_seconds(pid)
    wall, client = worker.call(make, workload, number)
    used = cpu_seconds(pid) - used
    return Cost(wall, client, used / number, (_log_position(server) - log) / number)


def _log_position(server: Any) -> int:
    ((position,),) = server.query("SELECT pg_current_wal_insert_lsn() - '0/0'")
    return int(position)


def measure(options: Options) -> Outcome:
    described = chosen(options.peers, KEEPERS)
    measured: dict[str, Mapping[str, list[Cost]]] = {}
    with postgres() as server:
        make_tables(server)
        with workers(described, lambda _: through_socket(server)) as running:
            for workload in CHOSEN:
                for worker in running.values():
                    worker.call(make, workload, WARM_UP)
                pids = {name: worker.call(backend) for name, worker in running.items()}
                seconds, _ = running["psycopg2"].call(make, workload, WARM_UP)
                number = max(3, round(options.seconds / seconds))
                measured[workload] = interleaved(
                    options.rounds,
                    running,
                    lambda name, workload=workload, pids=pids, number=number: cost(
                        server, running[name], pids[name], workload, number
                    ),
                )
    data = {
        workload: {name: [asdict(each) for each in costs] for name, costs in found.items()}
        for workload, found in measured.items()
    }
    return Outcome(
        data, [_table(found, workload) for workload, found in measured.items()], [*_plots(measured)]
    )


def _table(found: Mapping[str, list[Cost]], workload: str) -> Table:
    columns = ("", "wall, µs", "client's CPU, µs", "server's CPU, µs", "WAL, bytes")
    rows = []
    for name, costs in found.items():
        cells = [
            *(_quartiles([each.wall * MICROSECONDS for each in costs]),),
            *(_quartiles([each.client * MICROSECONDS for each in costs]),),
            *(_quartiles([each.server * MICROSECONDS for each in costs]),),
            _quartiles([each.log for each in costs]),
        ]
        rows.append([PEERS[name].title, *cells])
    return Table(f"A transaction of one {workload}", columns, rows)


def _quartiles(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.0f}"
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.0f} ({lower:.0f}-{upper:.0f})"


def _plots(measured: Mapping[str, Mapping[str, list[Cost]]]) -> Iterator[Plot]:
    for workload, found in measured.items():
        rows = []
        for name, costs in found.items():
            for series, (whose, values) in enumerate(
                [
                    ("client", [each.client * MICROSECONDS for each in costs]),
                    ("server", [each.server * MICROSECONDS for each in costs]),
                ]
            ):
                median = statistics.median(values)
                rows.append(
                    Bar(f"{PEERS[name].title}: {whose}", median, min(values), max(values), series)
                )
        title = f"CPU time of a transaction of one {workload}"
        yield Plot(f"witnesses-{workload}", bars(title, "µs; median and extremes", rows))


PART = Part("witnesses", "What the witnesses cost, through a unix socket", 7, measure)
