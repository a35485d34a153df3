"""``zreconnect recover``: end what two-phase commits of dead processes have left prepared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from zreconnect.cli.arguments import DONE, NOT_SO, add_parser, seconds
from zreconnect.cli.errors import CommandError
from zreconnect.cli.output import Output
from zreconnect.cli.servers import server_for
from zreconnect.drivers.postgresql import PostgresqlDriver
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
EXAMPLES = (
    "zreconnect recover postgresql://db.example.org/work postgresql://db.example.org/archive",
    "zreconnect recover --settle postgresql://db.example.org/work",
)


def add_command(commands: Any) -> None:
    """Add the command to the argparse subparsers."""
    parser = add_parser(
        commands,
        "recover",
        run,
        help="show and settle what two-phase commits have left prepared",
        description=DESCRIPTION,
        examples=EXAMPLES,
        not_so="something is left prepared",
    )
    parser.add_argument("dsns", metavar="DSN", nargs="+", help="a database that took part")
    parser.add_argument(
        "--settle", action="store_true", help="commit or roll back what is found, as shown"
    )
    parser.add_argument(
        "--older-than",
        metavar="SECONDS",
        type=seconds,
        default=DEFAULT_AGE,
        help="leave alone what was prepared more recently, because its process may be about to "
        "commit it (default: %(default)g)",
    )


def run(options: argparse.Namespace, output: Output) -> int:
    """Show what is left prepared, settle it if that is wanted, and return the exit status.

    Raises `CommandError` if a database cannot be asked.
    """
    found = _recover(options, settle=False)
    for each in found:
        _show(each, output)
    output.result(prepared=[asdict(each) for each in found])
    if not found:
        output.line("Nothing is left prepared.")
        return DONE
    if not options.settle:
        output.line("Nothing was changed. To commit or roll back as shown, add --settle.")
        return NOT_SO
    results = _recover(options, settle=True)
    output.result(prepared=[asdict(each) for each in results])
    return _report(results, output)


def _recover(options: argparse.Namespace, settle: bool) -> list[PreparedTransaction]:
    servers = [server_for(dsn) for dsn in options.dsns]
    for server in servers:
        if not isinstance(server.driver, PostgresqlDriver):
            raise CommandError(
                f"{server.address} is not PostgreSQL: nothing is left prepared there"
            )
    errors = tuple({server.driver.module.Error for server in servers})
    try:
        return recover(*options.dsns, older_than=options.older_than, settle=settle)
    except ValueError as error:
        raise CommandError(f"argument DSN: {error}") from None
    except (*errors, TimeoutError) as error:
        raise CommandError(f"cannot ask a database: {one_line(error)}") from error


def _show(prepared: PreparedTransaction, output: Output) -> None:
    output.line(prepared.gid)
    output.line(f"    in {prepared.server}, database {prepared.database}")
    output.line(f"    prepared {prepared.prepared:%Y-%m-%d %H:%M:%S %z} by {prepared.owner}")
    output.line(f"    {prepared.decision}: {prepared.reason}")


def _report(results: Sequence[PreparedTransaction], output: Output) -> int:
    for each in results:
        done = "done" if each.settled else f"NOT done, {each.reason}"
        output.line(f"{each.gid}: {each.decision} {done}")
    left = sum(not each.settled for each in results)
    output.line(f"{len(results) - left} settled, {left} left")
    return NOT_SO if left else DONE
