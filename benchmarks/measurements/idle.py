"""The first transaction after a time in which nobody asked anything, and the server restarted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from benchmarks.part import Goal, Options, Outcome, Part, Table
from benchmarks.peers import PEERS, chosen
from benchmarks.server import postgres, through_tcp
from benchmarks.waiting import Success, quartiles, success
from benchmarks.workers import Worker
from zreconnect.testing import PortForward

MILLISECONDS = 1e3
NAMES = tuple(name for name in PEERS if not name.endswith(("-ledger", "-none")))
#: Peers in another way: the peer's name, and the options of its class.
OTHERS = {"Django, health checks": ("django", {"CONN_HEALTH_CHECKS": True})}


@dataclass(frozen=True)
class First:
    """connections: those that were made for it."""

    success: Success
    connections: int


def measure(options: Options) -> Outcome:
    described = chosen(options.peers, NAMES)
    titles = {each.name: each.title for each in described}
    titles |= {} if options.peers else {title: title for title in OTHERS}
    found: dict[str, list[First]] = {name: [] for name in titles}
    with postgres() as server, PortForward(server.host, server.port) as forward:
        address = through_tcp(server, forward.port)
        with ExitStack() as stack:
            running = {}
            for name in titles:
                peer, keywords = OTHERS.get(name, (name, {}))
                running[name] = Worker(peer, address, **keywords)
                stack.callback(running[name].close)
            for _ in range(options.rounds):
                # With its errors, it leaves no peer without a connection.
                for worker in running.values():
                    worker.call(success, address)
                server.restart()
                order = list(running)
                random.shuffle(order)
                for name in order:
                    before = forward.count()
                    made = running[name].call(success, address)
                    connections = (forward.count() - before).connections
                    found[name].append(First(made, connections))
    return Outcome(
        {name: [asdict(each) for each in firsts] for name, firsts in found.items()},
        [_table(found, titles)],
        goals=[_goal(found)],
    )


def _table(found: Mapping[str, list[First]], titles: Mapping[str, str]) -> Table:
    rows = []
    for name, firsts in found.items():
        lower, median, upper = quartiles([each.success.seconds * MILLISECONDS for each in firsts])
        errors = Counter(error for each in firsts for error in each.success.errors)
        each = ", ".join(f"{error} {count / len(firsts):.3g}" for error, count in errors.items())
        rows.append(
            [
                titles[name],
                each or "none",
                f"{max(each.connections for each in firsts)}",
                f"{median:.1f} ({lower:.1f}-{upper:.1f})",
            ]
        )
    columns = ("", "errors that the program sees, each time", "connections, at most", "ms")
    return Table("Until the first transaction is made, asked again at once", columns, rows)


def _is_ours(name: str) -> bool:
    return name in PEERS and PEERS[name].is_ours


def _goal(found: Mapping[str, list[First]]) -> Goal:
    ours = {name: firsts for name, firsts in found.items() if _is_ours(name)}
    failed = [
        PEERS[name].title
        for name, firsts in ours.items()
        if any(each.success.errors or each.connections != 1 for each in firsts)
    ]
    text = "The first transaction after a restart: no error, one connection"
    return Goal(text, ", ".join(failed) or "for each of zreconnect's", not failed)


PART = Part("idle", "The first transaction after the server restarted", 3, measure)
