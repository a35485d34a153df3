"""The tables of states.py, as tables and as a picture: ``.. states:: picture`` and its like."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterable
from html import escape
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from zreconnect import states
from zreconnect.states import Answer, Event, Keeping, Moment, Request, State, Then, Verdict

# The centres of what connection.state shows.
PLACES = {"prepared": (380, 40), "idle": (110, 190), "active": (650, 190), "doomed": (380, 430)}
# Arrows by where they begin and end, with where their labels do, and on which side of the label.
ARROWS = {
    ("idle", "active"): ("M165 178 H595", (380, 168), "middle"),
    ("active", "idle"): ("M595 204 H165", (380, 224), "middle"),
    ("active", "prepared"): ("M640 168 Q600 60 436 42", (590, 76), "start"),
    ("prepared", "idle"): ("M324 42 Q160 60 120 168", (170, 76), "end"),
    ("active", "doomed"): ("M650 212 Q640 400 436 428", (625, 360), "start"),
    ("idle", "doomed"): ("M104 212 Q110 420 324 434", (120, 372), "end"),
    ("doomed", "idle"): ("M350 408 Q200 340 128 212", (262, 296), "start"),
}
# Where these lead is the same in every state, or nearly, and told in words.
EVERYWHERE = {Event.CLOSED, Event.FORKED}


def picture() -> list[nodes.Node]:
    """What ``connection.state`` shows, and what leads from one to the other, as SVG.

    Raises KeyError if the tables have a transition that there is no arrow for.
    """
    labels: dict[tuple[str, str], list[str]] = {}
    for event, cells in states.NEXT.items():
        for before, after in cells.items():
            if before.shown != after.shown and event not in EVERYWHERE:
                names = labels.setdefault((before.shown, after.shown), [])
                if event.name not in names:
                    names.append(event.name)
    parts = []
    for pair, names in labels.items():
        path, (x, y), anchor = ARROWS[pair]
        parts.append(f'<path d="{path}" marker-end="url(#end)"/>')
        lines = wrapped(names, 3 if anchor == "middle" else 1)
        for number, line in enumerate(lines):
            parts.append(
                f'<text x="{x}" y="{y + 15 * number}" text-anchor="{anchor}">{escape(line)}</text>'
            )
    for shown, (x, y) in PLACES.items():
        parts.append(f'<rect x="{x - 55}" y="{y - 22}" width="110" height="44" rx="22"/>')
        parts.append(f'<text class="state" x="{x}" y="{y + 6}" text-anchor="middle">{shown}</text>')
    told = "; ".join(
        f"from {before} to {after} by {', '.join(names)}"
        for (before, after), names in labels.items()
    )
    svg = (
        '<div class="state-picture" tabindex="0"><svg viewBox="-60 0 870 470" role="img" '
        'aria-labelledby="states-told">'
        f'<title id="states-told">{escape(told)}</title><defs><marker id="end" viewBox="0 0 8 8" '
        'refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 Z"/></marker></defs>{"".join(parts)}</svg></div>'
    )
    return [nodes.raw("", svg, format="html")]


def wrapped(names: list[str], count: int) -> list[str]:
    return [", ".join(names[i : i + count]) for i in range(0, len(names), count)]


def requests() -> list[nodes.Node]:
    """What becomes of each request in each state."""
    rows = [
        [state.name, *(states.REQUESTS[state][request].name for request in Request)]
        for state in State
    ]
    return [table(["", *names(Request)], rows), legend(Answer), legend(Request)]


def events() -> list[nodes.Node]:
    """Where each event leads."""
    rows = []
    for event, cells in states.NEXT.items():
        leads = [
            f"{before.name} → {after.name}" for before, after in cells.items() if before != after
        ]
        rows.append([event.name, str(event.value), ", ".join(leads) or "nowhere"])
    return [table(["event", "what it is", "leads from one state to the other"], rows)]


def errors() -> list[nodes.Node]:
    """What an error leads to, by what was under way and by what it means."""
    rows = []
    for moment, cells in states.CONSEQUENCES.items():
        told = []
        for verdict in Verdict:
            event, keeping, then = cells[verdict]
            told.append(" ".join(filter(None, (event and event.name, keeping.name, then.name))))
        rows.append([moment.name, *told])
    return [
        table(["", *names(Verdict)], rows),
        *(legend(each) for each in (Moment, Verdict, Keeping, Then)),
    ]


def shown() -> list[nodes.Node]:
    """The states, with what ``connection.state`` says."""
    rows = [[state.name, state.shown, meaning(state)] for state in State]
    return [table(["state", "shown as", "what is known"], rows)]


def names(constants: type[enum.Enum]) -> list[str]:
    return [constant.name for constant in constants]


def meaning(constant: Any) -> str:
    value = constant.value
    return str(value[1] if isinstance(value, tuple) else value)


def legend(constants: type[enum.Enum]) -> nodes.Node:
    """The names with what they mean, under what their class is."""
    heading = nodes.paragraph(
        "", (inspect.getdoc(constants) or "").splitlines()[0].replace("`", "")
    )
    rows = [[constant.name, meaning(constant)] for constant in constants]
    block = nodes.container(classes=["legend"])
    block += [heading, table([], rows)]
    return block


def table(heading: list[str], rows: Iterable[list[str]]) -> nodes.table:
    rows = list(rows)
    width = len(rows[0])
    group = nodes.tgroup(cols=width)
    group += [nodes.colspec(colwidth=1) for _ in range(width)]
    if heading:
        group += nodes.thead("", row(heading))
    group += nodes.tbody("", *(row(cells) for cells in rows))
    return nodes.table("", group, classes=["states"])


def row(cells: list[str]) -> nodes.row:
    return nodes.row(
        "", *(nodes.entry("", nodes.paragraph("", cell), classes=[slug(cell)]) for cell in cells)
    )


def slug(cell: str) -> str:
    return f"cell-{cell.lower()}" if cell.isidentifier() else "cell"


KINDS: dict[str, Callable[[], list[nodes.Node]]] = {
    function.__name__: function for function in (picture, shown, requests, events, errors)
}


class StatesDirective(SphinxDirective):
    """One of the tables, or the picture."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        kind = directives.choice(self.arguments[0], tuple(KINDS))
        self.env.note_dependency(str(inspect.getsourcefile(states)))
        return KINDS[kind]()


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("states", StatesDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
