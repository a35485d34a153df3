"""``zreconnect drill``: does a program survive what can happen to its database?"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from zreconnect.cli.arguments import CANNOT, DONE, NOT_SO, add_parser, natural_number, new_file
from zreconnect.cli.drill.database import MARIADB, POSTGRESQL, Database, open_database
from zreconnect.cli.drill.faults import KINDS, PLACES, ways
from zreconnect.cli.drill.program import Program
from zreconnect.cli.drill.report import write_report
from zreconnect.cli.drill.result import Result, conclusion, line_for
from zreconnect.cli.drill.schedule import make_plan
from zreconnect.cli.drill.trial import DEADLY, Interruption, Trial
from zreconnect.cli.errors import CommandError
from zreconnect.cli.output import Output
from zreconnect.exceptions import one_line

PLACEHOLDER = "{dsn}"
LARGEST_RANDOM_SEED = 999999
# More than the 30 seconds of a program that connects again at growing pauses.
DEFAULT_PATIENCE = 40.0

EXAMPLES = (
    "zreconnect drill -- python job.py {dsn}",
    "zreconnect drill --server mariadb --report drill.html -- ./job",
    "zreconnect drill --faults server,lost-commit --seconds 120 --seed 7 -- ./job",
    "zreconnect drill -- sh -c 'psql -f tables.sql && exec python job.py'",
    'zreconnect drill --dsn postgresql://me@localhost/work --check "$(cat doubled.sql)" -- ./job',
)
DESCRIPTION = """\
Find out whether a program, any program, survives what can happen to its database. COMMAND is
started with a database to work in, and interrupted in every way that there is, one after the
other; after each it is told whether the program ended, hung, or worked again, and after how long.
A program that has not survived is started again for the next.

The database is that of a new PostgreSQL server, empty but for what COMMAND makes in it, or the one
that --dsn names. COMMAND finds it in the environment: PGHOST, PGPORT, PGUSER, PGPASSWORD and
PGDATABASE (for MySQL and MariaDB MYSQL_HOST, MYSQL_PORT, MYSQL_USER, MYSQL_PASSWORD and
MYSQL_DATABASE) and, as a URL, DATABASE_URL; and {dsn} in its arguments is replaced by that URL.
COMMAND need not use zreconnect, nor Python. It is ended with the drill; it may end before.

Whether a program works is seen on its line: by the COMMITs that the server has answered, by the
answers to statements where there are no COMMITs, and on an encrypted line by the transactions that
the server has ended. The seconds are counted from the end of a fault, when the server can be
reached again, to the first of them.
"""


def add_command(commands: Any) -> None:
    """Add the command to the argparse subparsers."""
    parser = add_parser(
        commands,
        "drill",
        run,
        help="find out whether a program survives what can happen to its database",
        description=DESCRIPTION + _faults(),
        examples=EXAMPLES,
        not_so="the program ended or hung, or the check found something",
        cleans_up=True,
    )
    parser.usage = "zreconnect drill [options] -- COMMAND ..."
    parser.add_argument(
        "program", metavar="COMMAND", nargs=argparse.REMAINDER, help="the program to be tried"
    )
    parser.add_argument(
        "--faults",
        metavar="NAMES",
        type=_kinds,
        default=list(KINDS),
        help="which faults happen, separated by commas (default: all that can)",
    )
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=_positive,
        help="how long faults go on happening (default: until each has happened once)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=natural_number,
        help="repeats the order, the lengths and the distances of the faults of an earlier drill, "
        "which has printed its seed",
    )
    parser.add_argument(
        "--patience",
        metavar="S",
        type=_positive,
        default=DEFAULT_PATIENCE,
        help="after how many seconds without a transaction a program hangs (default: %(default)g)",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="stop at the first fault that the program does not survive",
    )
    parser.add_argument(
        "--server",
        choices=(POSTGRESQL, MARIADB),
        default=POSTGRESQL,
        help="which server is started (default: %(default)s)",
    )
    parser.add_argument(
        "--dsn",
        help="use this database, through TCP, and not a server that is started for the purpose; "
        "it is not restarted or killed, only the program's line is cut and its sessions are "
        "terminated",
    )
    parser.add_argument(
        "--really", action="store_true", help="also if the server of --dsn is not on this machine"
    )
    parser.add_argument(
        "--check",
        metavar="SQL",
        help="a query that returns one row for each thing that is wrong, such as what is there "
        "twice or not at all, and none if all is well. It is executed before the first fault, "
        "after each, and when the program has ended; only what is there at the end and was not "
        "there before counts",
    )
    parser.add_argument(
        "--report", metavar="FILE", type=new_file, help="write a report, one HTML file"
    )


def _faults() -> str:
    """What --faults takes, for the help."""
    lines = ["", "Faults; --faults also takes line, session and server, for all of a place:"]
    for place in PLACES:
        lines.append(f"  {place}")
        lines += [
            f"    {name:<15}{kind.description}"
            for name, kind in KINDS.items()
            if kind.place == place
        ]
    return "\n".join(lines)


def run(options: argparse.Namespace, output: Output) -> int:
    """Hold the drill and return its exit status.

    Raises `CommandError` if it cannot be held.
    """
    arguments = options.program[options.program[:1] == ["--"] :]
    if not arguments:
        raise CommandError("there is no COMMAND: zreconnect drill [options] -- COMMAND ...")
    with (
        _ended_by_signals(),
        open_database(options.dsn, options.server, options.really) as database,
    ):
        try:
            result = _hold(options, arguments, database, output)
        except database.errors as error:
            raise CommandError(f"cannot ask {database.address}: {one_line(error)}") from error
    for line in conclusion(result):
        output.line(line)
    survived = result.trial.survived
    style = "bold green" if survived else "bold red"
    output.line(result.verdict, style if result.trial.tried else "bold")
    output.result(**result.as_dict())
    if options.report is not None:
        try:
            write_report(options.report, result)
        except OSError as error:
            raise CommandError(f"argument --report: {error}") from error
        output.line(f"The report is in {options.report}")
    if not result.trial.tried:
        return CANNOT
    return DONE if survived else NOT_SO


def _hold(
    options: argparse.Namespace, arguments: Sequence[str], database: Database, output: Output
) -> Result:
    stopping = threading.Event()
    possible = ways(database, stopping)
    kinds = [kind for kind in possible if kind in options.faults]
    if not kinds:
        raise CommandError(
            f"none of these faults can happen in {database.address}; those that can are "
            f"{', '.join(possible)}"
        )
    seed = random.randrange(LARGEST_RANDOM_SEED) if options.seed is None else options.seed
    output.line(f"{shlex.join(arguments)}")
    output.line(f"with {database.version}, {database.address}, --seed {seed}")
    led = [each.replace(PLACEHOLDER, database.dsn()) for each in arguments]
    environment = database.environment()

    def tell(interruption: Interruption) -> None:
        for line in line_for(interruption):
            output.line(line, "red" if interruption.outcome in DEADLY else "")

    def is_enough(seconds: float, faults: int) -> bool:
        if options.seconds is not None:
            return bool(seconds >= options.seconds)
        return faults >= len(kinds)

    trial = Trial(
        database,
        lambda: Program(led, environment, database.password),
        possible,
        options.patience,
        options.once,
        options.check,
        tell,
    )
    trial.run(make_plan(kinds, seed), is_enough)
    return Result(trial, arguments, database.version, database.address, seed, kinds)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Leave nothing behind either when the drill is ended by a signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {
        each: signal.signal(each, end)
        for each in (signal.SIGTERM, signal.SIGHUP)
        # As nohup has it.
        if signal.getsignal(each) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kinds(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in KINDS and name not in PLACES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"there is no fault {', '.join(unknown) or text!r}; there are {', '.join(PLACES)}, and "
            f"{', '.join(KINDS)}"
        )
    return [kind for kind in KINDS if kind in names or KINDS[kind].place in names]


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"it must be a number of seconds above 0, not {text!r}")
    return number
