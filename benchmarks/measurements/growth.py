"""What grows with connections, threads, transactions and reconnects; what an import costs."""

from __future__ import annotations

import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.part import Goal, Options, Outcome, Part, Plot, Table
from benchmarks.peers import PEERS, Address, Peer
from benchmarks.rounds import interleaved
from benchmarks.server import postgres, through_socket
from benchmarks.svg import Axis, lines
from benchmarks.waiting import WORK, quartiles, success
from benchmarks.workers import Worker

MEBIBYTE = 2**20
CONNECTIONS = 100
CONNECTING = ("psycopg2", "psycopg", "connect-psycopg2-xid", "connect-psycopg-xid")
#: How many; the second number is for --long.
TRANSACTIONS = 10_000, 1_000_000
RECONNECTS = 200, 10_000
#: After so many, all that is kept for good is there.
WARM_UP = 100
SAMPLES = 20
RECONNECTING = ("connect-psycopg2-xid", "connect-psycopg-xid")
WORKING = (*RECONNECTING, "zopeless-xid", "sqlalchemy-zreconnect")
#: What may be more at the end: of memory, that which an allocator has not given back.
SPARE_MEMORY, SPARE_OBJECTS = 2 * MEBIBYTE, 50

NEEDS = "import transaction, zope.interface, zope.publisher.interfaces"
OURS, CONNECT = "import zreconnect", "from zreconnect import connect"
IMPORTS = {
    OURS: (NEEDS, OURS),
    CONNECT: (NEEDS, CONNECT),
    "what it needs: transaction, zope.interface, zope.publisher": ("pass", NEEDS),
    "import psycopg2": ("pass", "import psycopg2"),
    "import psycopg": ("pass", "import psycopg"),
    "import psycopg_pool": ("pass", "import psycopg_pool"),
    "import sqlalchemy": ("pass", "import sqlalchemy"),
    "import storm.locals": ("pass", "import storm.locals"),
    "import django.db": ("pass", "import django.db"),
}
LONGEST_IMPORT = 0.05
IMPORTING = """
import json, sys, time
{before}
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])
pages, modules, started = resident(), len(sys.modules), time.perf_counter()
{statement}
seconds = time.perf_counter() - started
print(json.dumps([seconds, resident() - pages, len(sys.modules) - modules]))
"""


def resident() -> int:
    """The bytes of this process that are in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def import_costs(statement: str) -> tuple[float, int, int]:
    """Seconds, bytes and modules of an import, in a new process."""
    before, statement = IMPORTS[statement]
    program = IMPORTING.format(before=before, statement=statement)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    seconds, pages, modules = json.loads(done.stdout)
    return seconds, pages * os.sysconf("SC_PAGESIZE"), modules


def connections(peer: Peer, name: str, address: Address, in_threads: bool) -> float:
    """In a worker's process: the bytes of a connection that has made a transaction and is idle."""
    kept: list[Peer] = []
    goes_on, is_ready = threading.Event(), threading.Semaphore(0)

    def make() -> None:
        made = PEERS[name].make(address)
        made.transaction(made.prepared(WORK))
        kept.append(made)
        if in_threads:
            is_ready.release()
            goes_on.wait()

    # What the first one of all brings with it.
    peer.transaction(peer.prepared(WORK))
    before = resident()
    threads = [threading.Thread(target=make) for _ in range(CONNECTIONS if in_threads else 0)]
    for thread in threads:
        thread.start()
        is_ready.acquire()
    for _ in range(0 if in_threads else CONNECTIONS):
        make()
    found = (resident() - before) / CONNECTIONS
    goes_on.set()
    for thread in threads:
        thread.join()
    for made in kept:
        made.close()
    return found


def transactions(peer: Peer, number: int) -> list[tuple[int, int]]:
    """In a worker's process: the bytes after so many transactions, again and again."""
    work, found = peer.prepared(WORK), []
    for done in range(1, number + 1):
        peer.transaction(work)
        if done % (number // SAMPLES) == 0:
            found.append((done, resident()))
    return found


def held() -> dict[str, int]:
    """What this process has of everything that could leak."""
    for thread in threading.enumerate():
        # It ends by itself, a moment after somebody has its connection.
        if thread.name == "zreconnect connection attempt":
            thread.join()
    return {
        "files and sockets": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "bytes": resident(),
        "objects": len(gc.get_objects()),
    }


def reconnects(peer: Any, address: Address, number: int) -> dict[str, int]:
    """In a worker's process: what is more after so many lost sessions."""
    before: dict[str, int] = {}
    for done in range(WARM_UP + number):
        if done == WARM_UP:
            before = held()
        with socket.socket(fileno=os.dup(peer.connection.driver_connection.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)
        if success(peer, address).errors:
            raise AssertionError("the program saw an error")
    return {what: count - before[what] for what, count in held().items()}


def measure(options: Options) -> Outcome:
    imports = interleaved(options.rounds, IMPORTS, import_costs)
    idle: dict[str, dict[str, float]] = {"alone": {}, "each in a thread": {}}
    grown: dict[str, list[tuple[int, int]]] = {}
    leaked: dict[str, dict[str, int]] = {}
    with postgres() as server:
        address = through_socket(server)
        for name in CONNECTING:
            for in_threads, found in enumerate(idle.values()):
                found[name] = _called(name, address, connections, name, address, bool(in_threads))
        for name in RECONNECTING:
            leaked[name] = _called(name, address, reconnects, address, RECONNECTS[options.is_long])
        for name in WORKING:
            grown[name] = _called(name, address, transactions, TRANSACTIONS[options.is_long])
    return Outcome(
        {"imports": imports, "idle": idle, "transactions": grown, "reconnects": leaked},
        [
            _imports(imports),
            Table(
                f"Memory of an idle connection, of {CONNECTIONS}",
                ("", *idle),
                [
                    [
                        PEERS[name].title,
                        *(f"{found[name] / 1024:.0f} KiB" for found in idle.values()),
                    ]
                    for name in CONNECTING
                ],
            ),
            Table(
                f"What is more after {RECONNECTS[options.is_long]:,} reconnects",
                ("", *leaked[RECONNECTING[0]]),
                [[PEERS[name].title, *map(str, found.values())] for name, found in leaked.items()],
            ),
            Table(
                f"Memory in {TRANSACTIONS[options.is_long]:,} transactions",
                ("", f"after {1 / SAMPLES:.0%}", "after half", "at the end"),
                [
                    [
                        PEERS[name].title,
                        *(
                            f"{found[index][1] / MEBIBYTE:.1f} MiB"
                            for index in (0, SAMPLES // 2, -1)
                        ),
                    ]
                    for name, found in grown.items()
                ],
            ),
        ],
        [
            Plot(
                "growth",
                lines(
                    "Memory of a process",
                    Axis("transactions"),
                    Axis("MiB"),
                    {
                        PEERS[name].title: [(done, size / MEBIBYTE) for done, size in found]
                        for name, found in grown.items()
                    },
                ),
            )
        ],
        [*_goals(imports, leaked, grown)],
    )


def _called(name: str, address: Address, function: Any, *arguments: Any) -> Any:
    worker = Worker(name, address)
    try:
        return worker.call(function, *arguments)
    finally:
        worker.close()


def _imports(found: Mapping[str, list[tuple[float, int, int]]]) -> Table:
    rows = []
    for statement, costs in found.items():
        lower, median, upper = quartiles([1000 * seconds for seconds, _, _ in costs])
        size = statistics.median(size for _, size, _ in costs) / MEBIBYTE
        modules = str(costs[0][2])
        rows.append(
            [statement, f"{median:.1f} ({lower:.1f}-{upper:.1f})", f"{size:.1f} MiB", modules]
        )
    return Table(
        "Imports in new processes; zreconnect's after those that it needs",
        ("", "ms", "memory", "modules"),
        rows,
    )


def _goals(
    imports: Mapping[str, list[tuple[float, int, int]]],
    leaked: Mapping[str, Mapping[str, int]],
    grown: Mapping[str, list[tuple[int, int]]],
) -> Iterator[Goal]:
    seconds = {
        statement: statistics.median(seconds for seconds, _, _ in imports[statement])
        for statement in (OURS, CONNECT)
    }
    yield Goal(
        "import zreconnect adds under 50 ms to what it needs",
        ", ".join(f"{statement}: {1000 * took:.1f} ms" for statement, took in seconds.items()),
        seconds[OURS] < LONGEST_IMPORT,
    )
    more = {name: found[-1][1] - found[SAMPLES // 4][1] for name, found in grown.items()}
    name = max(more, key=lambda name: more[name])
    yield Goal(
        "Transactions leave memory flat",
        f"{more[name] / 1024:+.0f} KiB in the last three quarters ({PEERS[name].title})",
        more[name] < SPARE_MEMORY,
    )
    spare = {"objects": SPARE_OBJECTS, "bytes": SPARE_MEMORY}
    kept = [
        f"{count} {what} ({PEERS[name].title})"
        for name, found in leaked.items()
        for what, count in found.items()
        if count > spare.get(what, 0)
    ]
    yield Goal("Reconnects leak nothing", ", ".join(kept) or "nothing", not kept)


PART = Part("growth", "What grows", 8, measure)
