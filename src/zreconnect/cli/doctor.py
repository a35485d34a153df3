"""``zreconnect doctor``: look at a server, a DSN and a role as an expert would."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from zreconnect.advice import advice
from zreconnect.cli import mysqlchecks, postgresqlchecks
from zreconnect.cli.arguments import DONE, NOT_SO, add_parser
from zreconnect.cli.errors import CommandError
from zreconnect.cli.findings import Check, Finding, Findings, Patient, Severity, error, note, ok
from zreconnect.cli.output import Output
from zreconnect.cli.servers import remedy, server_for
from zreconnect.drivers.mysql import MysqlDriver
from zreconnect.drivers.postgresql import PostgresqlDriver
from zreconnect.exceptions import one_line
from zreconnect.interfaces import Meaning
from zreconnect.ledger import Ledger
from zreconnect.server import Server
from zreconnect.session import Session
from zreconnect.watchdog import Watch

CONNECT_TIMEOUT = 10.0
# For all that is asked, in seconds.
PATIENCE = 60.0
STYLES = {
    Severity.ERROR: "bold red",
    Severity.WARNING: "yellow",
    Severity.NOTE: "cyan",
    Severity.OK: "green",
}
DESCRIPTION = """\
Look at a database, the role and the DSN of a program: whether a lost connection is noticed, a lost
COMMIT can be looked up, what was lost is given free, and what else an expert would see. Nothing is
changed, and no session is ended.

Each finding has a reason and a remedy. An error does not work; with a warning, a loss costs more
than it has to; a note is right for some.
"""
EXAMPLES = (
    "zreconnect doctor postgresql://work@db.example.org/work",
    "zreconnect doctor --json mysql://work@db.example.org/work",
)


def add_command(commands: Any) -> None:
    """Add the command to the argparse subparsers."""
    parser = add_parser(
        commands,
        "doctor",
        run,
        help="look at a server, a DSN and a role as an expert would",
        description=DESCRIPTION,
        examples=EXAMPLES,
        not_so="there is an error or a warning",
    )
    parser.add_argument("dsn", metavar="DSN", help="the database, as the program names it")
    parser.add_argument(
        "--table",
        metavar="NAME",
        default=Ledger().table,
        help="the name of the ledger (default: %(default)s)",
    )


def run(options: argparse.Namespace, output: Output) -> int:
    """Show what is found, and return the exit status.

    Raises `CommandError` if the DSN cannot be used.
    """
    try:
        table = Ledger(options.table).table
    except ValueError as wrong:
        raise CommandError(f"argument --table: {wrong}") from None
    server = server_for(options.dsn)
    kind, findings = examine(server, table)
    findings.sort(key=lambda finding: list(Severity).index(finding.severity))
    _show(server, kind, findings, output)
    output.result(
        server=server.address,
        kind=kind,
        findings=[
            {
                "check": each.check,
                "severity": each.severity.value,
                "reason": each.reason,
                "remedy": each.remedy,
            }
            for each in findings
        ],
    )
    is_bad = any(each.severity in (Severity.ERROR, Severity.WARNING) for each in findings)
    return NOT_SO if is_bad else DONE


def examine(server: Server, table: str) -> tuple[str, list[Finding]]:
    """What kind of server it is, as far as it lets one in, and all that is found."""
    driver = server.driver
    try:
        raw = server.connect_once(CONNECT_TIMEOUT)
    except (driver.module.Error, OSError) as refusal:
        what = advice(refusal) if server.passes(refusal) else remedy(refusal)
        return "", [error("connection", one_line(refusal), what)]
    watch = Watch(driver.fileno(raw) if driver.has_sessions else None, server.address)
    session = Session(driver, raw, watch, os.getpid())
    try:
        with watch.within(PATIENCE):
            return _examine(Patient(server, raw, table))
    finally:
        session.end()


def _examine(patient: Patient) -> tuple[str, list[Finding]]:
    driver = patient.driver
    if isinstance(driver, PostgresqlDriver):
        describe, checks = postgresqlchecks.describe, postgresqlchecks.CHECKS
    elif isinstance(driver, MysqlDriver):
        describe, checks = mysqlchecks.describe, mysqlchecks.CHECKS
    else:
        return driver.name, [ok("connection", "It can be used; no more is known of its kind")]
    findings: list[Finding] = []
    kind = ""
    try:
        kind = describe(patient)
        for check in checks:
            findings += _checked(patient, check)
    except driver.module.Error as loss:
        findings.append(error("connection", f"It was lost: {one_line(loss)}", advice(loss)))
    return kind, findings


def _checked(patient: Patient, check: Check) -> Findings:
    """What a check finds, or why it cannot tell. Raises the driver's errors for a lost session."""
    driver = patient.driver
    try:
        yield from check(patient)
    except driver.module.Error as refusal:
        if driver.meaning(refusal, patient.raw) is Meaning.DISCONNECT:
            raise
        name = check.__name__.removeprefix("check_").replace("_", " ")
        yield note(name, f"The server does not tell: {one_line(refusal)}")


def _show(server: Server, kind: str, findings: Sequence[Finding], output: Output) -> None:
    output.line(f"{server.address}{kind and ': '}{kind}", "bold")
    for each in findings:
        output.line()
        output.line(f"{each.severity.value}: {each.check}", STYLES[each.severity])
        output.paragraph(_sentence(each.reason), indent=4)
        if each.remedy:
            output.paragraph(_sentence(f"Remedy: {each.remedy}"), indent=4)
    numbers = Counter(each.severity for each in findings)
    output.line()
    output.line(", ".join(_counted(each, numbers[each]) for each in Severity if numbers[each]))


def _sentence(text: str) -> str:
    # What a driver says may be one already.
    return text if text.endswith((".", "?")) else f"{text}."


def _counted(severity: Severity, number: int) -> str:
    is_plain = severity is Severity.OK or number == 1
    return f"{number} {severity.value}{'' if is_plain else 's'}"
