"""From the outcomes of both runs to a row of the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from suites.recording import PASSED, STARTED
from suites.suite import Suite, matches

Outcomes = Mapping[str, tuple[str, str]]
#: Of the tests that pass bare and are counted, the percentage that must pass through.
ENOUGH = 99.0
HEADINGS = ("Suite", "pass bare", "not counted", "of the rest through", "%")


@dataclass(frozen=True)
class Row:
    """What came of one suite. ``through`` is of those that ``bare`` has without ``not_counted``."""

    title: str
    bare: int
    not_counted: int
    through: int

    @property
    def percentage(self) -> float:
        """Rounded down, so that what is below the limit does not look as if it were not."""
        counted = self.bare - self.not_counted
        return int(1000 * self.through / counted) / 10 if counted else 0.0

    @property
    def is_enough(self) -> bool:
        """Nothing passing at all is not."""
        return 100 * self.through >= ENOUGH * (self.bare - self.not_counted) > 0

    def cells(self) -> tuple[str, ...]:
        counts = (self.bare, self.not_counted, self.through)
        return self.title, *map(str, counts), f"{self.percentage:.1f}"


def count(suite: Suite, bare: Outcomes, through: Outcomes) -> tuple[Row, dict[str, str]]:
    """The suite's row, and of each counted test that differs what it raised."""
    passing = [test for test, (outcome, _) in bare.items() if outcome == PASSED]
    counted = [test for test in passing if suite.reason_not_to_count(test) is None]
    differences = {}
    for test in counted:
        outcome, error = through.get(test, ("not run", ""))
        if outcome != PASSED:
            differences[test] = error or ("did not end" if outcome == STARTED else outcome)
    row = Row(
        suite.title, len(passing), len(passing) - len(counted), len(counted) - len(differences)
    )
    return row, differences


def needless(suite: Suite, bare: Outcomes, through: Outcomes) -> list[str]:
    """The patterns that nothing which passes bare has, or only what passes through as well."""
    different = [
        test
        for test, (outcome, _) in bare.items()
        if outcome == PASSED and through.get(test, ("",))[0] != PASSED
    ]
    return [
        pattern
        for pattern in suite.not_counted
        if not any(matches(pattern, test) for test in different)
    ]


def write_row(row: Row, path: Path) -> None:
    path.write_text(json.dumps(asdict(row)) + "\n", encoding="utf-8")


def read_row(path: Path) -> Row:
    return Row(**json.loads(path.read_text(encoding="utf-8")))


def table(rows: list[Row]) -> str:
    """A simple table of reStructuredText's."""
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    border = "  ".join("=" * width for width in widths)

    def text(cells: tuple[str, ...]) -> str:
        first, *numbers = cells
        padded = [first.ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        return "  ".join(padded)

    return "\n".join([border, text(HEADINGS), border, *map(text, lines[1:]), border, ""])
