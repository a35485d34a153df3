"""``zreconnect recover``: end what two-phase commits of dead processes have left prepared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import psycopg2

from zreconnect.cli.errors import CommandError
from zreconnect.exceptions import one_line
from zreconnect.recovery import PreparedTransaction, recover

DEFAULT_AGE = 60.0

DESCRIPTION = """\
Show what two-phase commits have left prepared in the given databases, because their process
died or could not reach the server again, and what is to be done about it: commit, if the
transaction's deciding branch was committed, else rollback. With --settle, do it.

Give the DSNs of all databases that took part. The role must be the one that prepared the
transactions, or a superuser.
"""
EPILOG = """\
exit status: 0 if nothing is left prepared, 1 if something is, 2 if a database cannot be asked.
"""


def add_command(commands: Any) -> None:
    """Add the command to the argparse subparsers."""
    parser = commands.add_parser(
        "recover",
        help="show and settle what two-phase commits have left prepared",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dsns", metavar="DSN", nargs="+", help="a database that took part")
    parser.add_argument(
        "--settle", action="store_true", help="commit or roll back what is found, as shown"
    )
    parser.add_argument(
        "--older-than",
        metavar="SECONDS",
        type=_seconds,
        default=DEFAULT_AGE,
        help="leave alone what was prepared more recently, because its process may be about to "
        "commit it (default: %(default)g)",
    )
    parser.set_defaults(command="recover", run=run)


def run(options: argparse.Namespace) -> int:
    """Show what is left prepared, settle it if that is wanted, and return the exit status.

    Raises `CommandError` if a database cannot be asked.
    """
    found = _recover(options, settle=False)
    for each in found:
        _show(each)
    if not found:
        print("Nothing is left prepared.")
        return 0
    if not options.settle:
        print("Nothing was changed. To commit or roll back as shown, add --settle.")
        return 1
    return _report(_recover(options, settle=True))


def _recover(options: argparse.Namespace, settle: bool) -> list[PreparedTransaction]:
    try:
        return recover(*options.dsns, older_than=options.older_than, settle=settle)
    except ValueError as error:
        raise CommandError(f"argument DSN: {error}") from None
    except (psycopg2.Error, TimeoutError) as error:
        raise CommandError(f"cannot ask a database: {one_line(error)}") from error


def _show(prepared: PreparedTransaction) -> None:
    print(f"{prepared.gid}")
    print(f"    in {prepared.server}, database {prepared.database}")
    print(f"    prepared {prepared.prepared:%Y-%m-%d %H:%M:%S %z} by {prepared.owner}")
    print(f"    {prepared.decision}: {prepared.reason}")


def _report(results: Sequence[PreparedTransaction]) -> int:
    for each in results:
        done = "done" if each.settled else f"NOT done, {each.reason}"
        print(f"{each.gid}: {each.decision} {done}")
    left = sum(not each.settled for each in results)
    print(f"{len(results) - left} settled, {left} left")
    return 1 if left else 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"it must be a number of at least 0, not {text!r}")
    return seconds
