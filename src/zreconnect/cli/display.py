"""What the demonstration prints while it runs, and the tables at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

# Where there is no progress bar, every so many parts of the whole are worth a line.
PROGRESS_LINES = 10
# How many paths are named at the end before the rest is only counted.
NAMED_PATHS = 10


class Display:
    """Prints lines, and a progress bar below them if the output is a terminal."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)

    def line(self, text: str) -> None:
        """Print a line, above the progress bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """Show progress in the block; gives a function to call after each of ``total`` items."""
        if not self._console.is_terminal:
            yield self._progress_lines(description, total)
            return
        columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(description, total=total)
            yield lambda: progress.advance(task)

    def _progress_lines(self, description: str, total: int) -> Callable[[], None]:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if done * PROGRESS_LINES // total > (done - 1) * PROGRESS_LINES // total:
                self.line(f"{description}: {done} of {total}")

        return advance

    def figures(self, figures: Mapping[str, int]) -> None:
        """Print a table of figures by their names."""
        table = Table(box=box.SIMPLE, show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, figure in figures.items():
            table.add_row(name, str(figure))
        self._console.print(table)

    def interruptions(self, times: Mapping[str, int], seconds: Mapping[str, list[float]]) -> None:
        """Print how often each kind of interruption happened, and how soon the job worked again."""
        table = Table(box=box.SIMPLE, show_footer=True)
        everything = [each for kind in seconds.values() for each in kind]
        table.add_column("interruption", "all")
        table.add_column("times", str(sum(times.values())), justify="right")
        table.add_column("median", _in_seconds(everything, median), justify="right")
        table.add_column("largest", _in_seconds(everything, max), justify="right")
        for kind, number in times.items():
            measured = seconds.get(kind, [])
            table.add_row(
                kind, str(number), _in_seconds(measured, median), _in_seconds(measured, max)
            )
        self._console.print(table)
        self.line("  median, largest: seconds until the job worked again")

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
