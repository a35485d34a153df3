"""How often many threads, and many processes, knock at a server that is away."""

from __future__ import annotations

import itertools
import os
import pickle
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.measurements.witnesses import cpu_seconds
from benchmarks.part import Goal, Options, Outcome, Part, Plot, Table
from benchmarks.peers import PEERS, Address, Peer
from benchmarks.server import postgres, through_tcp
from benchmarks.svg import Axis, lines
from benchmarks.waiting import Success, success
from benchmarks.workers import Worker
from zreconnect.testing import PortForward

THREADS = 1, 20, 200
PROCESSES = 50
#: Seconds before the outage, of it, and after it.
BEFORE, AWAY, AFTER = 2, 12, 3
#: So many seconds after its beginning the loss of the sessions itself is over.
LOST = 3
MOST_CONNECTIONS = 900
OURS, POLLING, POOL = "zreconnect", "psycopg2, each second", "psycopg_pool of one"
#: The peer's name, and whether the threads share it.
KINDS = {
    OURS: ("connect-psycopg2-xid", False),
    POLLING: ("psycopg2", False),
    POOL: ("psycopg_pool", True),
}


class Herd:
    """In a worker's process: the threads, each with a peer of its own, or with the worker's."""

    def __init__(self, peers: Sequence[Peer], address: Address) -> None:
        self._peers, self._address = peers, address

    def made(self) -> list[Success]:
        """A transaction of each at the same time, asked again each second."""
        found: list[Success] = []
        threads = [
            threading.Thread(
                target=lambda peer=peer: found.append(success(peer, self._address, 1.0))
            )
            for peer in self._peers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


_herd: Herd


def gather(peer: Peer, name: str, address: Address, threads: int, is_shared: bool) -> None:
    """In a worker's process: have the threads' peers, each connected."""
    global _herd
    own = 0 if is_shared else threads - 1
    others = [PEERS[name].make(address) for _ in range(own)]
    _herd = Herd([peer] * (threads - own) + others, address)
    _herd.made()


def wait(peer: Peer) -> list[Success]:
    """In a worker's process: `Herd.made`."""
    return _herd.made()


def fork(peer: Peer, name: str, address: Address, processes: int) -> None:
    """In a worker's process: have so many others, each with a peer that is connected."""
    for _ in range(processes):
        ours, theirs = socket.socketpair()
        if os.fork():
            theirs.close()
            _children.append(ours)
            continue
        # So that the end of the worker is noticed.
        for inherited in (ours, *_children):
            inherited.close()
        other = PEERS[name].make(address)
        while True:
            made = success(other, address, 1.0)
            theirs.sendall(pickle.dumps(made).ljust(MESSAGE))
            if not theirs.recv(1):
                os._exit(0)
    _received()


def wait_in_children(peer: Peer) -> list[Success]:
    """In a worker's process: have each of the others make a transaction."""
    for child in _children:
        child.sendall(b"!")
    return _received()


def _received() -> list[Success]:
    return [pickle.loads(child.recv(MESSAGE, socket.MSG_WAITALL)) for child in _children]


MESSAGE = 65536
_children: list[socket.socket] = []


@dataclass(frozen=True)
class Seen:
    """connections: in each second of `BEFORE`, `AWAY` and `AFTER`. waited: seconds from the
    server's return until each had its transaction. cpu: the part of a CPU that a worker used when
    the loss itself was over; of a worker with others, its own."""

    kind: str
    clients: str
    connections: list[int]
    waited: list[float]
    cpu: float

    @property
    def during(self) -> float:
        """Attempts a second, when the loss itself is over."""
        return sum(self.connections[BEFORE + LOST : BEFORE + AWAY]) / (AWAY - LOST)

    @property
    def most(self) -> int:
        return max(self.connections[: BEFORE + AWAY])

    @property
    def after(self) -> int:
        return max(self.connections[BEFORE + AWAY :])


@dataclass(frozen=True)
class Group:
    """A worker and those that it stands for, and the forwarder that counts their attempts."""

    kind: str
    clients: str
    forward: PortForward
    worker: Worker


@contextmanager
def group(
    kind: str, clients: str, server: Any, gate: PortForward, gathered: Any
) -> Iterator[Group]:
    name, is_shared = KINDS[kind]
    with ExitStack() as stack:
        forward = stack.enter_context(PortForward(gate.host, gate.port))
        address = through_tcp(server, forward.port)
        worker = Worker(name, address)
        stack.callback(worker.close)
        gathered(worker, name, address, is_shared)
        yield Group(kind, clients, forward, worker)


def outage(gate: PortForward, groups: Sequence[Group], asked: Any) -> list[Seen]:
    """Have one; what was seen of each group, which is asked for transactions by ``asked``."""
    counts: list[list[int]] = [[each.forward.count().connections] for each in groups]
    started = time.monotonic()

    def count_each_second(seconds: int) -> None:
        for _ in range(seconds):
            time.sleep(max(0.0, started + len(counts[0]) - time.monotonic()))
            for found, each in zip(counts, groups, strict=True):
                found.append(each.forward.count().connections)

    count_each_second(BEFORE)
    gate.refuse()
    gate.drop()
    for each in groups:
        each.worker.ask(asked)
    count_each_second(LOST)
    used = [-cpu_seconds(each.worker.pid) for each in groups]
    count_each_second(AWAY - LOST)
    used = [
        before + cpu_seconds(each.worker.pid) for before, each in zip(used, groups, strict=True)
    ]
    back = time.monotonic()
    gate.accept()
    count_each_second(AFTER)
    return [
        Seen(
            each.kind,
            each.clients,
            [after - before for before, after in itertools.pairwise(found)],
            sorted(made.at - back for made in each.worker.answer()),
            cpu / (AWAY - LOST),
        )
        for each, found, cpu in zip(groups, counts, used, strict=True)
    ]


def _with_threads(threads: int) -> Any:
    def gathered(worker: Worker, name: str, address: Address, is_shared: bool) -> None:
        worker.call(gather, name, address, threads, is_shared)

    return gathered


def _with_processes(worker: Worker, name: str, address: Address, is_shared: bool) -> None:
    worker.call(fork, name, address, PROCESSES)


def measure(options: Options) -> Outcome:
    seen: list[Seen] = []
    with (
        postgres(max_connections=MOST_CONNECTIONS) as server,
        PortForward(server.host, server.port) as gate,
    ):
        make = partial(group, server=server, gate=gate)
        for threads in THREADS:
            with ExitStack() as stack:
                groups = [
                    stack.enter_context(
                        make(kind, f"{threads} threads", gathered=_with_threads(threads))
                    )
                    for kind in KINDS
                ]
                seen += outage(gate, groups, wait)
        with ExitStack() as stack:
            groups = [
                stack.enter_context(make(kind, f"{PROCESSES} processes", gathered=_with_processes))
                for kind in (OURS, POLLING)
            ]
            seen += outage(gate, groups, wait_in_children)
    return Outcome([asdict(each) for each in seen], [_table(seen)], [_plot(seen)], [*_goals(seen)])


def _table(seen: Sequence[Seen]) -> Table:
    rows = [
        [
            each.kind,
            each.clients,
            f"{max(each.connections[:BEFORE])}",
            f"{each.most}",
            f"{each.during:.1f}",
            f"{each.after}",
            f"{each.waited[len(each.waited) // 2]:.2f} s",
            f"{each.waited[-1]:.2f} s",
            f"{100 * each.cpu:.1f} %",
        ]
        for each in seen
    ]
    columns = (
        *("", "waiting", "before", "at most while away", "while away", "at most after"),
        *("half are back", "all are", "CPU of a process"),
    )
    return Table("Attempts to connect, each second", columns, rows)


def _plot(seen: Sequence[Seen]) -> Plot:
    most = f"{THREADS[-1]} threads"
    series = {
        each.kind: list(enumerate(map(float, each.connections), 1))
        for each in seen
        if each.clients == most
    }
    axes = Axis("second"), Axis("attempts a second", is_logarithmic=True)
    return Plot("herd", lines(f"{most} that wait for a server", *axes, series))


def _goals(seen: Sequence[Seen]) -> Iterator[Goal]:
    found: Mapping[tuple[str, str], Seen] = {(each.kind, each.clients): each for each in seen}
    threads = [found[OURS, f"{number} threads"] for number in THREADS]
    # Two, because a pause is half a second at least.
    yield Goal(
        "Herd: one process, one knock at the door: two attempts a second, of any number of threads",
        ", ".join(f"{each.clients}: {each.during:.1f}/s" for each in threads),
        all(each.during <= 2.05 for each in threads),
    )
    yield Goal(
        f"Herd: {threads[-1].clients} that wait take under 1 % of a CPU",
        f"{100 * threads[-1].cpu:.2f} %",
        threads[-1].cpu < 0.01,
    )
    processes = f"{PROCESSES} processes"
    ours, theirs = found[OURS, processes], found[POLLING, processes]
    yield Goal(
        "Herd: of many processes, at most twice the attempts of polling each second",
        f"{ours.during:.0f}/s beside {theirs.during:.0f}/s",
        ours.during <= 2 * theirs.during,
    )


PART = Part("herd", "Many that wait for a server", 5, measure)
