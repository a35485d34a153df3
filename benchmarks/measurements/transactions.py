"""Transactions of one SELECT, one INSERT, and ten statements, over lines of all kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.part import Goal, Options, Outcome, Part, Plot, Table
from benchmarks.peers import LIMIT, PEERS, Address, Described, Peer, Statement, chosen
from benchmarks.rounds import Burst, Measured, Ratio, burst, interleaved, speed, thrift
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
#: In so many transactions the round trips are counted.
COUNTED = 10
#: A turn has at least so many transactions, however long they take.
FEWEST = 6
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
def line_to(server: Any, kind: str) -> Iterator[tuple[Callable[[Described], Address], Line | None]]:
    """What gives a peer its address on a line of this kind, and the line if it has latency."""
    if kind == "socket":
        yield (lambda described: through_socket(server)), None
    elif kind == "TCP":
        yield (lambda described: through_tcp(server)), None
    else:
        with Line(server, LATENCIES[kind]) as line:
            yield (lambda described: line.address(described.name)), line


def round_trips(line: Line, worker: Worker, workload: str) -> float:
    """Of one transaction, on the wire."""
    forward = line.forwards[worker.name]
    # After a pause BEGIN goes by itself.
    worker.call(transactions, workload, 1)
    before = forward.count()
    worker.call(transactions, workload, COUNTED)
    return (forward.count() - before).round_trips / COUNTED


def measure_workload(running: Mapping[str, Worker], workload: str, options: Options) -> Measured:
    """The rounds of each peer. All make as many transactions as bare psycopg2 does in its time."""
    for worker in running.values():
        worker.call(transactions, workload, WARM_UP)
    seconds = min(running[LIMIT].call(transactions, workload, WARM_UP).wall for _ in range(3))
    number = max(FEWEST, round(options.seconds / seconds))
    return interleaved(
        options.rounds, running, lambda name: running[name].call(transactions, workload, number)
    )


def measure(options: Options) -> Outcome:
    described = chosen(options.peers)
    cells: dict[tuple[str, str], Measured] = {}
    seconds: dict[str, float] = {}
    counts: dict[str, dict[str, float]] = {}
    with postgres() as server:
        make_tables(server)
        for kind in LINES:
            with line_to(server, kind) as (address, line), workers(described, address) as running:
                for workload in WORKLOADS:
                    cells[kind, workload] = measure_workload(running, workload, options)
                    if line is not None:
                        seconds[kind] = line.round_trip
                        counts[workload] = {
                            name: round_trips(line, worker, workload)
                            for name, worker in running.items()
                        }
                    server.query("TRUNCATE line")
            print(f"transactions: {kind} is measured", flush=True)
    return Outcome(
        _data(cells, seconds, counts),
        [_in_short(cells, counts, described), *_tables(cells, seconds, described)],
        [plot for kind in LINES for plot in _plots(kind, described, cells)],
        goals(cells, {each.name for each in described}),
    )


def _data(
    cells: Mapping[tuple[str, str], Measured],
    seconds: Mapping[str, float],
    counts: Mapping[str, Mapping[str, float]],
) -> Any:
    return {
        "seconds of a round trip": seconds,
        "round trips of a transaction": counts,
        "transactions": {
            kind: {
                workload: {
                    name: [asdict(each) for each in bursts]
                    for name, bursts in cells[kind, workload].items()
                }
                for workload in WORKLOADS
            }
            for kind in LINES
        },
    }


#: What the manual has of the tables: columns, with the line and the workload.
IN_SHORT = {
    "SELECT, socket": ("socket", "SELECT", speed),
    "CPU": ("socket", "SELECT", thrift),
    "SELECT, 0.5 ms": ("0.5 ms", "SELECT", speed),
    "INSERT, 0.5 ms": ("0.5 ms", "INSERT", speed),
    "ten, 0.5 ms": ("0.5 ms", "ten", speed),
}


def _in_short(
    cells: Mapping[tuple[str, str], Measured],
    counts: Mapping[str, Mapping[str, float]],
    described: Sequence[Described],
) -> Table:
    rows = []
    for each in described:
        trips = [f"{counts[workload][each.name]:g}" for workload in WORKLOADS]
        ratios = [
            f"{how(cells[kind, workload], each.name, LIMIT).median:.2f}"
            for kind, workload, how in IN_SHORT.values()
        ]
        rows.append([each.title, " / ".join(trips), *ratios])
    columns = ("", "round trips", *IN_SHORT)
    return Table("Round trips of a SELECT / an INSERT / ten; bare psycopg2 = 1", columns, rows)


def _tables(
    cells: Mapping[tuple[str, str], Measured],
    seconds: Mapping[str, float],
    described: Sequence[Described],
) -> Iterator[Table]:
    columns = ("", *(f"{workload}: {what}" for workload in WORKLOADS for what in ("wall", "CPU")))
    for kind in LINES:
        on = (
            f"{kind}, where a round trip takes {seconds[kind] * 1000:.2f} ms"
            if kind in seconds
            else kind
        )
        for title, beside in [
            ("bare psycopg2 = 1", lambda each: LIMIT),
            ("what it is beside = 1", lambda each: each.beside),
        ]:
            rows = []
            for each in described:
                other = beside(each)
                row = [each.title if other == LIMIT else f"{each.title} / {PEERS[other].title}"]
                for workload in WORKLOADS:
                    measured = cells[kind, workload]
                    row += [str(how(measured, each.name, other)) for how in (speed, thrift)]
                rows.append(row)
            yield Table(f"Speed on {on}; {title}", columns, rows)


def _plots(
    kind: str, described: Sequence[Described], cells: Mapping[tuple[str, str], Measured]
) -> Iterator[Plot]:
    for workload in WORKLOADS:
        rows = []
        for each in described:
            found = speed(cells[kind, workload], each.name, LIMIT)
            series = 0 if each.is_ours else 1
            rows.append(Bar(each.title, found.median, found.lower, found.upper, series))
        title = f"Transactions of {workload} on {kind}"
        name = f"transactions-{kind}-{workload}".replace(" ", "").replace(".", "")
        unit = "transactions a second, bare psycopg2 = 1; median and quartiles"
        yield Plot(name, bars(title, unit, rows, one=1.0))


def goals(cells: Mapping[tuple[str, str], Measured], names: set[str]) -> list[Goal]:
    """What zreconnect is to reach."""
    rows = [
        *(
            (workload, f"connect-psycopg2-{witness}", "psycopg2", least)
            for workload, witness, least in ON_PSYCOPG2
        ),
        *(
            (workload, f"connect-psycopg-{witness}", "psycopg", 1.4)
            for workload, witness in ON_PSYCOPG
        ),
    ]
    found = [
        _goal(names, cells, "0.5 ms", workload, name, beside, least)
        for workload, name, beside, least in rows
    ]
    found += [
        _goal(names, cells, "socket", "SELECT", name, "psycopg2", 0.95)
        for name in ("connect-psycopg2-xid", "connect-psycopg-xid", "zopeless-xid", "adapter-xid")
    ]
    found.append(
        _everywhere(names, cells, "sqlalchemy-zreconnect", ["sqlalchemy-pre_ping"], speed, 1)
    )
    found.append(
        _everywhere(names, cells, "zope.sqlalchemy-zreconnect", ["zope.sqlalchemy"], speed, 0.9)
    )
    others = [name for name in PEERS if PEERS[name].reconnects and not PEERS[name].is_ours]
    found += [
        _everywhere(names, cells, name, others, how, 1)
        for name in ("connect-psycopg2-xid", "connect-psycopg-xid")
        for how in (speed, thrift)
    ]
    return found


#: At a latency of 0.5 ms: the workload, the witness, and how many times as fast as the driver.
ON_PSYCOPG2 = (
    ("SELECT", "xid", 1.35),
    ("SELECT", "ledger", 1.35),
    ("INSERT", "ledger", 1.35),
    ("INSERT", "xid", 1.0),
    ("ten", "xid", 1.0),
    ("ten", "ledger", 1.0),
)
ON_PSYCOPG = (("SELECT", "xid"), ("SELECT", "ledger"), ("INSERT", "ledger"))


def _goal(
    names: set[str],
    cells: Mapping[tuple[str, str], Measured],
    kind: str,
    workload: str,
    name: str,
    beside: str,
    least: float,
) -> Goal:
    text = f"{workload} on {kind}: {PEERS[name].title} at least {least:g} of {PEERS[beside].title}"
    if not {name, beside} <= names:
        return Goal(text, "", None)
    reached = speed(cells[kind, workload], name, beside)
    return Goal(text, str(reached), reached.median >= least)


def _everywhere(
    names: set[str],
    cells: Mapping[tuple[str, str], Measured],
    name: str,
    others: Sequence[str],
    how: Callable[[Measured, str, str], Ratio],
    least: float,
) -> Goal:
    """On all lines, with all workloads, beside each of the others."""
    what = {speed: "by the clock", thrift: "in CPU time"}[how]
    besides = ", ".join(PEERS[other].title for other in others)
    text = f"{PEERS[name].title}, {what}, in all rows at least {least:g} of {besides}"
    if not {name, *others} <= names:
        return Goal(text, "", None)
    reached = [
        (how(measured, name, other), f"{workload} on {kind} beside {PEERS[other].title}")
        for (kind, workload), measured in cells.items()
        for other in others
    ]
    worst, where = min(reached, key=lambda row: row[0].median)
    missed = sum(ratio.median < least for ratio, _ in reached)
    found = f"{worst}: {where}"
    if missed:
        found = f"missed in {missed} of {len(reached)}; {found}"
    return Goal(text, found, not missed)


PART = Part(
    "transactions", "Transactions of one statement and of ten, on lines of all kinds", 1, measure
)
