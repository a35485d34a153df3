"""Transactions of one SELECT, one INSERT, and ten statements, over lines of all kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.part import Goal, Options, Outcome, Part, Plot, Table
from benchmarks.peers import LIMIT, PEERS, Address, Described, Peer, Statement, chosen
from benchmarks.rounds import Burst, Measured, burst, interleaved, speed, thrift
from benchmarks.server import Line, postgres, through_socket, through_tcp
from benchmarks.svg import Bar, bars
from benchmarks.workers import Worker, workers

READ = Statement("SELECT name, price FROM item WHERE id = %s", (4711,), True)
WRITE = Statement("INSERT INTO line (item, amount) VALUES (%s, %s)", (4711, 3))
CHANGE = Statement("UPDATE item SET price = price + %s WHERE id = %s", (1, 42))
WORKLOADS: Mapping[str, Sequence[Statement]] = {
    "SELECT": [READ],
    "INSERT": [WRITE],
    "ten": [READ, READ, WRITE, READ, CHANGE, READ, READ, WRITE, READ, CHANGE],
}
#: Seconds of a round trip.
LATENCIES = {"0.5 ms": 0.0005, "2 ms": 0.002}
LINES = ("socket", "TCP", *LATENCIES)
ITEMS = 10_000
#: So many transactions are made before any is measured: drivers prepare what comes often.
WARM_UP = 12


def make_tables(server: Any) -> None:
    server.query("CREATE TABLE item (id int PRIMARY KEY, name text, price int)")
    server.query(
        "INSERT INTO item SELECT id, 'item ' || id, id FROM generate_series(1, %s) id", ITEMS
    )
    server.query("CREATE TABLE line (id serial PRIMARY KEY, item int, amount int)")
    server.query("VACUUM ANALYZE")


def transactions(peer: Peer, workload: str, number: int) -> Burst:
    """In a worker's process: make so many transactions."""
    statements = peer.prepared(WORKLOADS[workload])
    return burst(number, partial(peer.transaction, statements))


@contextmanager
def line_to(server: Any, line: str) -> Iterator[tuple[Callable[[Described], Address], float]]:
    """What gives a peer its address on this line, and the seconds of a round trip, if known."""
    if line == "socket":
        yield (lambda described: through_socket(server)), 0.0
    elif line == "TCP":
        yield (lambda described: through_tcp(server)), 0.0
    else:
        with Line(server, LATENCIES[line]) as latent:
            yield (lambda described: latent.address()), latent.round_trip


def measure_workload(
    running: Mapping[str, Worker], workload: str, options: Options
) -> Measured:
    """The rounds of each peer. All make as many transactions as bare psycopg2 does in its time."""
    for worker in running.values():
        worker.call(transactions, workload, WARM_UP)
    seconds = min(running[LIMIT].call(transactions, workload, WARM_UP).wall for _ in range(3))
    number = max(3, round(options.seconds / seconds))
    return interleaved(
        options.rounds, running, lambda name: running[name].call(transactions, workload, number)
    )


def measure(options: Options) -> Outcome:
    described = chosen(options.peers)
    cells: dict[tuple[str, str], Measured] = {}
    round_trips = {}
    with postgres() as server:
        make_tables(server)
        for line in LINES:
            with (
                line_to(server, line) as (address, round_trips[line]),
                workers(described, address) as running,
            ):
                for workload in WORKLOADS:
                    cells[line, workload] = measure_workload(running, workload, options)
                    server.query("TRUNCATE line")
            print(f"transactions: {line} is measured", flush=True)
    return Outcome(
        _data(cells, round_trips),
        [table for line in LINES for table in _tables(line, round_trips[line], described, cells)],
        [plot for line in LINES for plot in _plots(line, described, cells)],
        goals(cells, {each.name for each in described}),
    )


def _data(cells: Mapping[tuple[str, str], Measured], round_trips: Mapping[str, float]) -> Any:
    return {
        line: {
            "round trip in seconds": round_trips[line],
            "transactions": {
                workload: {
                    name: [asdict(each) for each in bursts]
                    for name, bursts in cells[line, workload].items()
                }
                for workload in WORKLOADS
            },
        }
        for line in LINES
    }


def _tables(
    line: str,
    round_trip: float,
    described: Sequence[Described],
    cells: Mapping[tuple[str, str], Measured],
) -> Iterator[Table]:
    on = f"{line} (round trip: {round_trip * 1000:.2f} ms)" if round_trip else line
    columns = ("", *(f"{workload}: {what}" for workload in WORKLOADS for what in ("wall", "CPU")))
    for title, beside in [
        (f"Speed on {on}, bare psycopg2 = 1", lambda each: LIMIT),
        (f"Speed on {on}, what it is beside = 1", lambda each: each.beside),
    ]:
        rows = []
        for each in described:
            other = beside(each)
            name = each.title
            if other != LIMIT:
                name = f"{name} / {PEERS[other].title}"
            row = [name]
            for workload in WORKLOADS:
                measured = cells[line, workload]
                row += [
                    str(how(measured, each.name, other))
                    for how in (speed, thrift)
                ]
            rows.append(row)
        yield Table(title, columns, rows)


def _plots(
    line: str, described: Sequence[Described], cells: Mapping[tuple[str, str], Measured]
) -> Iterator[Plot]:
    for workload in WORKLOADS:
        rows = []
        for each in described:
            found = speed(cells[line, workload], each.name, LIMIT)
            series = 0 if each.is_ours else 1
            rows.append(Bar(each.title, found.median, found.lower, found.upper, series))
        title = f"Transactions of {workload} on {line}"
        name = f"transactions-{line}-{workload}".replace(" ", "").replace(".", "")
        unit = "transactions a second, bare psycopg2 = 1; median and quartiles"
        yield Plot(name, bars(title, unit, rows, one=1.0))


def goals(cells: Mapping[tuple[str, str], Measured], names: set[str]) -> list[Goal]:
    """What zreconnect is to reach."""
    found = []

    def goal(line: str, workload: str, name: str, beside: str, least: float) -> None:
        text = (
            f"{workload} on {line}: {PEERS[name].title} is at least {least:g} times as fast as"
            f" {PEERS[beside].title}"
        )
        if {name, beside} <= names:
            reached = speed(cells[line, workload], name, beside)
            found.append(Goal(text, str(reached), reached.median >= least))
        else:
            found.append(Goal(text, "", None))

    for workload, witness, least in [
        ("SELECT", "xid", 1.35),
        ("SELECT", "ledger", 1.35),
        ("INSERT", "ledger", 1.35),
        ("INSERT", "xid", 1.0),
        ("ten", "xid", 1.0),
        ("ten", "ledger", 1.0),
    ]:
        goal("0.5 ms", workload, f"connect-psycopg2-{witness}", "psycopg2", least)
    for workload, witness in [("SELECT", "xid"), ("SELECT", "ledger"), ("INSERT", "ledger")]:
        goal("0.5 ms", workload, f"connect-psycopg-{witness}", "psycopg", 1.4)
    for name in ("connect-psycopg2-xid", "connect-psycopg-xid", "zopeless-xid", "adapter-xid"):
        goal("socket", "SELECT", name, "psycopg2", 0.95)
    for line in LINES:
        for workload in WORKLOADS:
            goal(line, workload, "sqlalchemy-zreconnect", "sqlalchemy-pre_ping", 1.0)
            goal(line, workload, "zope.sqlalchemy-zreconnect", "zope.sqlalchemy", 0.9)
    found += _ahead(cells, names)
    return found


#: Of zreconnect's ways, the one that is asked for where no framework is in between.
AHEAD = {"psycopg2": "connect-psycopg2-xid", "psycopg": "connect-psycopg-xid"}


def _ahead(cells: Mapping[tuple[str, str], Measured], names: set[str]) -> list[Goal]:
    """Whether ``connect`` is ahead of every peer that reconnects, by the clock and in CPU time."""
    others = [name for name in PEERS if PEERS[name].reconnects and not PEERS[name].is_ours]
    found = []
    for name in AHEAD.values():
        for what, how in (("by the clock", speed), ("in CPU time", thrift)):
            text = f"{PEERS[name].title} is ahead of every peer that reconnects, {what}"
            if not {name, *others} <= names:
                found.append(Goal(text, "", None))
                continue
            behind = [
                f"{workload} on {line}: {PEERS[other].title} {reached}"
                for (line, workload), measured in cells.items()
                for other in others
                if (reached := how(measured, name, other)).median < 1
            ]
            found.append(Goal(text, "; ".join(behind) or "in all rows", not behind))
    return found


PART = Part(
    "transactions", "Transactions of one statement and of ten, on lines of all kinds", 1, measure
)
