"""Reading 100,000 rows, in all ways that there are."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.part import Goal, Options, Outcome, Part, Plot, Table
from benchmarks.peers import LIMIT, PEERS, Peer, chosen
from benchmarks.rounds import Burst, Measured, burst, interleaved, ratio, speed, thrift
from benchmarks.server import postgres, through_socket
from benchmarks.svg import Bar, bars
from benchmarks.workers import workers

ROWS = 100_000
#: Of a fetchmany().
SOME = 1000
QUERY = "SELECT id, name, price FROM item"
COPY = "COPY item TO STDOUT"
READERS = (
    *("psycopg2", "psycopg", "connect-psycopg2-xid", "connect-psycopg-xid"),
    *("zopeless-xid", "adapter-xid", "psycopg_pool-check"),
    *("sqlalchemy", "sqlalchemy-pre_ping", "sqlalchemy-zreconnect", "django", "django-zreconnect"),
)
#: The ones that may take at most so many times the time of what they are beside.
MOST = {
    "connect-psycopg2-xid": 1.05,
    "connect-psycopg-xid": 1.05,
    "zopeless-xid": 1.05,
    "sqlalchemy-zreconnect": 1.05,
    "django-zreconnect": 1.05,
}


def by_iteration(cursor: Any) -> int:
    number = 0
    for _ in cursor:
        number += 1
    return number


def by_fetchone(cursor: Any) -> int:
    number = 0
    while cursor.fetchone() is not None:
        number += 1
    return number


def by_fetchmany(cursor: Any) -> int:
    number = 0
    while rows := cursor.fetchmany(SOME):
        number += len(rows)
    return number


def by_fetchall(cursor: Any) -> int:
    return len(cursor.fetchall())


def with_cursor(peer: Peer, fetch: Callable[[Any], int], is_named: bool = False) -> None:
    with peer.reading(QUERY, is_named) as cursor:
        number = fetch(cursor)
    assert number == ROWS, number


def with_copy(peer: Any) -> None:
    cursor = peer.cursor()
    if hasattr(cursor, "copy_expert"):
        file = io.BytesIO()
        cursor.copy_expert(COPY, file)
        size = file.tell()
    else:
        with cursor.copy(COPY) as copy:
            size = sum(map(len, copy))
    assert size > ROWS, size
    cursor.close()
    peer.commit()


WAYS: Mapping[str, Callable[[Any], None]] = {
    "iteration": partial(with_cursor, fetch=by_iteration),
    "fetchone": partial(with_cursor, fetch=by_fetchone),
    "fetchmany": partial(with_cursor, fetch=by_fetchmany),
    "fetchall": partial(with_cursor, fetch=by_fetchall),
    "named cursor": partial(with_cursor, fetch=by_iteration, is_named=True),
    "COPY": with_copy,
}


def read(peer: Peer, way: str) -> Burst:
    """In a worker's process: read all rows, once."""
    return burst(1, partial(WAYS[way], peer))


def can(name: str, way: str) -> bool:
    """COPY is the drivers'; a pool lends them, and mappers have no way to it of their own."""
    return (
        way != "COPY"
        or name.startswith(("psycopg2", "connect", "zopeless", "adapter"))
        or (name == "psycopg")
    )


def measure(options: Options) -> Outcome:
    described = chosen(options.peers, READERS)
    measured: dict[str, Measured] = {}
    with postgres() as server:
        server.query("CREATE TABLE item (id int, name text, price int)")
        server.query(
            "INSERT INTO item SELECT id, 'item ' || id, id FROM generate_series(1, %s) id", ROWS
        )
        server.query("VACUUM ANALYZE")
        with workers(described, lambda _: through_socket(server)) as running:
            for way in WAYS:
                names = [each.name for each in described if can(each.name, way)]
                for name in names:
                    running[name].call(read, way)
                measured[way] = interleaved(
                    options.rounds, names, lambda name, way=way: running[name].call(read, way)
                )
    data = {
        way: {name: [asdict(each) for each in bursts] for name, bursts in found.items()}
        for way, found in measured.items()
    }
    names = [each.name for each in described]
    return Outcome(
        data, [*_tables(measured, names)], [*_plots(measured, names)], [*goals(measured)]
    )


def _tables(measured: Mapping[str, Measured], names: list[str]) -> Iterator[Table]:
    for what, how in (("Speed", speed), ("Thrift, in CPU time", thrift)):
        rows = []
        for name in names:
            beside = PEERS[name].beside
            title = PEERS[name].title
            row = [title if beside == name else f"{title} / {PEERS[beside].title}"]
            for found in measured.values():
                row.append(str(how(found, name, beside)) if name in found else "")
            rows.append(row)
        yield Table(f"{what}, what it is beside = 1", ["", *measured], rows)


def _plots(measured: Mapping[str, Measured], names: list[str]) -> Iterator[Plot]:
    rows = []
    for name in names:
        found = speed(measured["iteration"], name, LIMIT)
        series = 0 if PEERS[name].is_ours else 1
        rows.append(Bar(PEERS[name].title, found.median, found.lower, found.upper, series))
    unit = "rows a second, bare psycopg2 = 1; median and quartiles"
    title = f"Reading {ROWS:,} rows by iteration"
    yield Plot("reading", bars(title, unit, rows, one=1.0))


def goals(measured: Mapping[str, Measured]) -> Iterator[Goal]:
    found = measured["iteration"]
    for name, most in MOST.items():
        beside = PEERS[name].beside
        text = f"Iteration by {PEERS[name].title} takes at most {most:g} of the time of {beside}"
        if name not in found:
            yield Goal(text, "", None)
            continue
        taken = ratio([each.wall for each in found[name]], [each.wall for each in found[beside]])
        yield Goal(text, str(taken), taken.median <= most)


PART = Part("reading", f"Reading {ROWS:,} rows, through a unix socket", 2, measure)
