"""What a part of the benchmarks is, and what it has to tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Options:
    """How much is to be measured.

    rounds: how often each thing is measured, in turns with all others.
    seconds: that one peer's turn takes, about.
    is_long: whether also what takes longer than anybody waits for.
    peers: the names of those that take part; all for none.
    """

    rounds: int = 9
    seconds: float = 0.04
    is_long: bool = False
    peers: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    """Of text: what is in a cell is shown as it is."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """An SVG, under a file's name without its suffix."""

    name: str
    svg: str


@dataclass(frozen=True)
class Goal:
    """What is to be reached, and what was. `is_met` is None if it was not measured."""

    text: str
    measured: str
    is_met: bool | None


@dataclass(frozen=True)
class Outcome:
    """What a part has measured. ``data`` is for the JSON: everything the rest was made from."""

    data: Any
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    goals: Sequence[Goal] = ()


@dataclass(frozen=True)
class Part:
    """What `make bench` can do by itself.

    name: what ``BENCH`` chooses, and the name of its results.
    title: of its tables.
    order: where it stands among the others.
    """

    name: str
    title: str
    order: int
    measure: Callable[[Options], Outcome] = field(repr=False)
