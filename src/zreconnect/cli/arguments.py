"""What the commands' arguments and helps have in common."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from zreconnect.cli.output import Output

# The exit statuses of all commands. 128 and the number of the signal, as shells have it.
DONE = 0
NOT_SO = 1
CANNOT = 2
INTERRUPTED = 130
CLOSED = 141

# In a URL, up to the last @, because it need not be written as it should be; and as key=value.
_PASSWORDS = (
    (re.compile(r"(://[^\s/:@]*):\S*@"), r"\1:***@"),
    (re.compile(r"(?i)(password\s*=\s*)(?:'(?:\\.|[^'\\])*'|[^\s&]*)"), r"\1***"),
)

#: Does what a command is for, and returns its exit status.
Run = Callable[[argparse.Namespace, Output], int]


class Parser(argparse.ArgumentParser):
    """One whose help begins with examples.

    examples: command lines.
    """

    def __init__(self, *, examples: Sequence[str] = (), **keywords: Any) -> None:
        #: What `add_argument` has made.
        self.actions: list[argparse.Action] = []
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **keywords)
        self._examples = examples

    def add_argument(self, *arguments: Any, **keywords: Any) -> argparse.Action:
        """As argparse has it."""
        self.actions.append(super().add_argument(*arguments, **keywords))
        return self.actions[-1]

    def format_help(self) -> str:
        """The examples, and what argparse makes."""
        examples = "".join(f"  {example}\n" for example in self._examples)
        return f"examples:\n{examples}\n{super().format_help()}"

    def error(self, message: str) -> NoReturn:
        """As argparse has it, whose message quotes the arguments: a DSN without its password."""
        for pattern, instead in _PASSWORDS:
            message = pattern.sub(instead, message)
        super().error(message)

    def print_help(self, file: Any = None) -> None:
        """Print it; raises BrokenPipeError, of which argparse says nothing, if nobody reads."""
        print(self.format_help(), end="", file=file, flush=True)


def add_parser(
    commands: Any,
    name: str,
    run: Run,
    *,
    help: str,
    description: str,
    examples: Sequence[str],
    not_so: str = "",
    cleans_up: bool = False,
) -> Parser:
    """Add a command to argparse's subparsers, and return its parser, which has ``--json``.

    examples: how it is called, for the beginning of its help.
    not_so: what its exit status 1 says, if there is one.
    cleans_up: whether Ctrl-C is to raise KeyboardInterrupt in ``run``, which is called in the main
    thread then. Else it is called in another one, and is left alone by Ctrl-C: drivers wait for an
    answer without asking whether somebody has pressed it.
    """
    no = f"1 if {not_so}, " if not_so else ""
    parser: Parser = commands.add_parser(
        name,
        help=help,
        description=description,
        examples=examples,
        epilog=f"exit status: 0 if all is well, {no}2 if it cannot be done, 130 after Ctrl-C",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object in place of text"
    )
    parser.set_defaults(command=name, run=run, cleans_up=cleans_up, not_so=not_so)
    return parser


def exit_statuses(commands: Mapping[str, Parser]) -> str:
    """The table of the exit statuses of all commands, whose parsers these are by their names."""
    rows = [(DONE, "", "it is done, and all is well")]
    for name, parser in commands.items():
        if not_so := parser.get_default("not_so"):
            rows.append((NOT_SO, name, not_so))
    rows += [
        (CANNOT, "", "it cannot be done: a wrong argument, a server that refuses, what is missing"),
        (INTERRUPTED, "", "Ctrl-C"),
        (CLOSED, "", "whoever read the output has closed it, as head does"),
    ]
    width = max(len(name) for _, name, _ in rows)
    lines = [f"  {status:>3}  {name:{width}}  {meaning}".rstrip() for status, name, meaning in rows]
    return "exit status:\n" + "\n".join(lines)


def seconds(text: str) -> float:
    """An argument's type: a number of seconds."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"it must be a number of at least 0, not {text!r}")
    return number


def natural_number(text: str) -> int:
    """An argument's type: a whole number, or 0."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"it must be a whole number of at least 0, not {text!r}")
    return number


def directory(text: str) -> Path:
    """An argument's type: a directory that exists."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {text!r}")
    return path


def new_file(text: str) -> Path:
    """An argument's type: a file to be written, in a directory that exists."""
    path = Path(text)
    written = path if path.exists() else path.parent
    if path.is_dir() or not path.parent.is_dir() or not os.access(written, os.W_OK):
        raise argparse.ArgumentTypeError(f"no file can be written to {text!r}")
    return path
