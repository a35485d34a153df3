"""What commands print: text for people, in colours where a terminal can show them, or JSON."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Where there is no progress bar, every so many parts of the whole are worth a line.
PROGRESS_LINES = 10
# How wide a text is that is not for a terminal.
PLAIN_WIDTH = 100
# What https://no-color.org asks for.
NO_COLOR = "NO_COLOR"
DUMB = ("", "dumb", "unknown")


class OutputClosed(Exception):
    """Whoever read the output has closed it, as ``head`` does when it has enough."""


class OutputFailed(OutputClosed):
    """The output cannot be written, as to a full disk."""


class Output:
    """One command's output.

    A terminal gets styles and a progress bar, through rich if that is installed. Anything else gets
    plain lines, and so does a dumb terminal. Each line is written at once.

    as_json: whether a single JSON object is wanted, made of what `result` is given, and no text.

    What writes raises `OutputClosed` if nobody reads it any more.
    """

    def __init__(self, as_json: bool = False) -> None:
        self._as_json = as_json
        self._console = None if as_json else _console()
        self._result: dict[str, Any] = {}
        #: Called with each line for people, whether it is printed or not.
        self.listeners: list[Callable[[str], object]] = []

    @property
    def width(self) -> int:
        """How many characters fit on a line."""
        return shutil.get_terminal_size((PLAIN_WIDTH, 0)).columns

    def line(self, text: str = "", style: str = "") -> None:
        """Print a line for people, above the progress bar. style: as rich has it, like "red"."""
        for listener in self.listeners:
            listener(text)
        self._show(text, style)

    def _show(self, text: str, style: str = "") -> None:
        if self._as_json:
            return
        if self._console is None:
            _write(text)
        else:
            style = "" if os.environ.get(NO_COLOR) else style
            self._console.print(text, style=style, markup=False, soft_wrap=True)

    def paragraph(self, text: str, indent: int = 0, style: str = "") -> None:
        """Print a text for people on as many lines as it takes."""
        margin = " " * indent
        width = max(20, self.width - 1)
        for line in textwrap.wrap(
            text, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
        ):
            self.line(line, style)

    def table(self, rows: Sequence[Sequence[object]], heading: Sequence[str] = ()) -> None:
        """Print a table for people. Numbers, and what else is not in the first column, are to the
        right."""
        texts = [tuple(map(str, row)) for row in ([heading] if heading else []) + list(rows)]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        self.line()
        for number, row in enumerate(texts):
            first, *others = (
                f"{cell:>{width}}" if column else f"{cell:{width}}"
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            self.line("  ".join(["", first, *others]), "bold" if heading and not number else "")
        self.line()

    def note(self, text: str) -> None:
        """Print a line for people to the standard error, also if JSON is wanted: what happens
        meanwhile, or why there is no result."""
        with contextlib.suppress(OSError):
            print(f"{text}\n", end="", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """Show progress in the block; gives a function to call after each of ``total`` items."""
        if self._console is None:
            yield self._progress_lines(description, total)
            return
        from rich import progress

        columns = (
            progress.TextColumn(description),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
        )
        with progress.Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda: bar.advance(task)

    def _progress_lines(self, description: str, total: int) -> Callable[[], None]:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if done * PROGRESS_LINES // total > (done - 1) * PROGRESS_LINES // total:
                self._show(f"{description}: {done} of {total}")

        return advance

    def result(self, **fields: object) -> None:
        """Have these in the JSON object: lists, dictionaries, texts, numbers; others as texts."""
        self._result.update(fields)

    def finish(self, command: str, status: int) -> None:
        """Print the JSON object if it is wanted."""
        if self._as_json:
            fields = {"command": command, "status": status, **self._result}
            indent = 2 if sys.stdout.isatty() else None
            _write(json.dumps(fields, indent=indent, default=str))


def _console() -> Any:
    """rich's console, if there is a terminal that can do what it does, and rich."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "") in DUMB:
        return None
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    return Console(highlight=False, emoji=False, no_color=bool(os.environ.get(NO_COLOR)))


def _write(text: str) -> None:
    try:
        # At once, so that the line of another thread does not come between.
        print(f"{text}\n", end="", flush=True)
    except BrokenPipeError:
        raise OutputClosed from None
    except OSError as error:
        raise OutputFailed(str(error)) from error
