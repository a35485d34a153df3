"""What the demonstration prints while it runs, and the tables at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from zreconnect.cli.output import Output

# How many paths are named at the end before the rest is only counted.
NAMED_PATHS = 10


class Display:
    """Prints lines and tables, and has the figures in the command's result.

    output: that of the command.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        #: Print a line, above the progress bar.
        self.line = output.line
        #: Show progress in a block.
        self.progress = output.progress

    def figures(self, figures: Mapping[str, int]) -> None:
        """Print a table of figures by their names."""
        self._output.table(list(figures.items()))
        self._output.result(**{name.replace(" ", "_"): figure for name, figure in figures.items()})

    def interruptions(self, times: Mapping[str, int], seconds: Mapping[str, list[float]]) -> None:
        """Print how often each kind of interruption happened, and how soon the job worked again."""
        everything = [each for kind in seconds.values() for each in kind]
        rows = [(kind, number, seconds.get(kind, [])) for kind, number in times.items()]
        rows.append(("all", sum(times.values()), everything))
        self._output.table(
            [
                (kind, number, _in_seconds(measured, median), _in_seconds(measured, max))
                for kind, number, measured in rows
            ],
            heading=("interruption", "times", "median", "largest"),
        )
        self.line("  median, largest: seconds until the job worked again")
        self._output.result(
            interruptions=[
                {"kind": kind, "times": number, "seconds": measured}
                for kind, number, measured in rows[:-1]
            ]
        )

    def paths(self, heading: str, paths: Sequence[str]) -> None:
        """Print some of the paths, if there are any."""
        if paths:
            more = f" and {len(paths) - NAMED_PATHS} more" if len(paths) > NAMED_PATHS else ""
            self.line(f"{heading}: {', '.join(paths[:NAMED_PATHS])}{more}")

    def log_handler(self) -> logging.Handler:
        """Return a handler that prints log lines as `line` does."""
        return _LineHandler(self)


class _LineHandler(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.line(f"    {self.format(record)}")


def _in_seconds(values: Sequence[float], statistic: Callable[[Sequence[float]], float]) -> str:
    return f"{statistic(values):.2f}" if values else "-"
