"""``zreconnect ledger``: make the table of a `Ledger` for roles that may not create one."""

from __future__ import annotations

import argparse
from typing import Any

from zreconnect.cli.arguments import DONE, add_parser
from zreconnect.cli.errors import CommandError
from zreconnect.cli.output import Output
from zreconnect.cli.servers import server_for
from zreconnect.drivers.base import Condition
from zreconnect.exceptions import one_line
from zreconnect.ledger import Ledger, make_ledger
from zreconnect.server import Server

CONNECT_TIMEOUT = 10.0

DESCRIPTION = """\
Make the table in which connections with witness=Ledger(...) record their transactions, and
let every role use it. A table that exists is kept.
"""
EXAMPLES = (
    "zreconnect ledger postgresql://owner@db.example.org/work",
    "zreconnect ledger --table jobs.commits mysql://owner@db.example.org/work",
)


def add_command(commands: Any) -> None:
    """Add the command to the argparse subparsers."""
    parser = add_parser(
        commands,
        "ledger",
        run,
        help="make the ledger of commits in a database",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    parser.add_argument(
        "dsn", metavar="DSN", help="the database, and a role that may create tables"
    )
    parser.add_argument(
        "--table",
        metavar="NAME",
        default=Ledger().table,
        help="the table's name, with or without a schema (default: %(default)s)",
    )


def run(options: argparse.Namespace, output: Output) -> int:
    """Make the ledger and return the exit status.

    Raises `CommandError` if that is not possible.
    """
    try:
        table = Ledger(options.table).table
    except ValueError as error:
        raise CommandError(f"argument --table: {error}") from None
    server = server_for(options.dsn)
    if not server.driver.has_sessions:
        raise CommandError(f"{server.address} needs no ledger: it has no answers that can be lost")
    try:
        existed = _make(server, table)
    except (server.driver.module.Error, TimeoutError) as error:
        # The cause, because the error itself advises to run this command.
        problem = one_line(error.__cause__ or error)
        raise CommandError(f"cannot make {table} in {server.address}: {problem}") from error
    output.line(f"{table} {'exists' if existed else 'was made'} in {server.address}")
    output.line(f"SELECT, INSERT, UPDATE and DELETE on {table} were granted to PUBLIC")
    output.result(server=server.address, table=table, existed=existed)
    return DONE


def _make(server: Server, table: str) -> bool:
    """Make the table, or let everybody use it that is there, which is what is returned."""
    driver = server.driver
    raw = server.connect_once(CONNECT_TIMEOUT)
    try:
        exists = _exists(driver, raw, table)
        make_ledger(driver, raw, table)
        driver.query(raw, f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO PUBLIC")
        return exists
    finally:
        driver.close(raw)


def _exists(driver: Any, raw: Any, table: str) -> bool:
    try:
        driver.query(raw, f"SELECT 1 FROM {table} WHERE 1 = 0")
    except driver.module.Error as error:
        if driver.condition(error) is not Condition.UNDEFINED_TABLE:
            raise
        return False
    return True
