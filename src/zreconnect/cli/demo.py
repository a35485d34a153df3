"""``zreconnect demo``: a batch job imports a source tree while its database is interrupted."""

from __future__ import annotations

import argparse
import logging
import os
import random
import secrets
import shlex
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psycopg2
import zope.event

from zreconnect.cli.arguments import (
    DONE,
    NOT_SO,
    add_parser,
    directory,
    natural_number,
    new_file,
)
from zreconnect.cli.comparison import Comparison, compare
from zreconnect.cli.display import Display
from zreconnect.cli.errors import CommandError
from zreconnect.cli.file import FileTarget
from zreconnect.cli.interruptions import Interrupter, Interruption, make_plan
from zreconnect.cli.job import import_files
from zreconnect.cli.output import Output
from zreconnect.cli.picture import Picture
from zreconnect.cli.target import Target, target_for
from zreconnect.cli.ways import RESTART, ways_to_interrupt
from zreconnect.drivers.base import DRIVERS
from zreconnect.events import ConnectionLost
from zreconnect.exceptions import CommitOutcomeUnknown, ReconnectTimeout, one_line
from zreconnect.interfaces import ACTIVE, IDLE
from zreconnect.testing import EmbeddedPostgres, EmbeddedPostgresError

DEFAULT_INTERRUPTIONS = 24
LARGEST_RANDOM_SEED = 999999
# Of the picture.
TITLE = "A batch job goes through a restart of its database"
# The tests are more than half of the standard library; with them the import takes over a minute
# on a slow machine.
NOT_IN_DEFAULT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

DESCRIPTION = """\
Import a source tree into a database by a batch job: each .py file is a work item, parsed while
the database is not in use and recorded, with its definitions, in one transaction. Meanwhile
the server is restarted and killed, and the job's connection is cut, silenced and delayed, at
random moments. At the end the tree is compared with the tables.

The seconds until the job worked again are counted from the end of an interruption (of one that
does not last: from the moment it was ordered) to the next commit, the parsing of the item
included.
"""
EXAMPLES = (
    "zreconnect demo",
    "zreconnect demo --interruptions 100 --seed 7 ~/src/project",
    "zreconnect demo --dsn mysql://me@127.0.0.1/test --verbose",
    "zreconnect demo --record restart.svg",
)


def add_command(commands: Any) -> None:
    """Add the command to the argparse subparsers."""
    parser = add_parser(
        commands,
        "demo",
        run,
        help="import a source tree into a database that is interrupted meanwhile",
        description=DESCRIPTION,
        examples=EXAMPLES,
        not_so="a file is lost, or recorded twice",
        cleans_up=True,
    )
    parser.add_argument(
        "directory",
        metavar="DIRECTORY",
        nargs="?",
        type=directory,
        help="the source tree; by default Python's own standard library without its tests",
    )
    parser.add_argument(
        "--interruptions",
        metavar="N",
        type=natural_number,
        help=f"how often to interrupt the database (default: {DEFAULT_INTERRUPTIONS})",
    )
    parser.add_argument(
        "--seed",
        metavar="S",
        type=natural_number,
        help="repeats the interruptions of an earlier run, which has printed its seed",
    )
    parser.add_argument(
        "--dsn",
        help="use this database, through TCP, and not a server that is started for the purpose; "
        "it is not restarted or killed, only its line is interrupted and the job's sessions are "
        "terminated; the tables are in a schema of their own. sqlite:///PATH makes a file beside "
        "that one, which others lock meanwhile",
    )
    parser.add_argument(
        "--driver",
        choices=sorted(DRIVERS),
        help="the database module of the job (default: the one for the DSN)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the tables, and say where they are"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="show what zreconnect logs meanwhile"
    )
    parser.add_argument(
        "--record",
        metavar="FILE",
        type=new_file,
        help="make a picture (SVG) of what is shown, with what zreconnect logs; unless "
        "--interruptions says otherwise, of one restart",
    )


def run(options: argparse.Namespace, output: Output) -> int:
    """Give the demonstration and return its exit status.

    Raises `CommandError` if it cannot be given.
    """
    directory = options.directory or Path(sysconfig.get_paths()["stdlib"])
    names = python_files(directory, () if options.directory else NOT_IN_DEFAULT)
    if not names:
        raise CommandError(f"there are no .py files in {directory}")
    # Not with all arguments: a DSN may have a password.
    shown = options.directory or "", "--record", options.record and options.record.name
    picture = Picture(" ".join(["zreconnect demo", *map(str, filter(None, shown))]))
    output.listeners.append(picture.add)
    try:
        comparison = _demonstrate(options, directory, names, Display(output))
    except (EmbeddedPostgresError, psycopg2.Error) as error:
        raise CommandError(str(error)) from error
    if options.record is not None:
        exactly = "each exactly once" if comparison.is_exact else "not each exactly once"
        told = f"{comparison.recorded} of {comparison.found} files were recorded, {exactly}"
        picture.write(options.record, TITLE, f"A terminal shows a batch job: {told}.")
        output.line(f"The picture is {options.record}")
    output.result(lost_paths=comparison.lost, doubled_paths=comparison.twice)
    return DONE if comparison.is_exact else NOT_SO


def _demonstrate(
    options: argparse.Namespace, directory: Path, names: Sequence[str], display: Display
) -> Comparison:
    started = time.monotonic()
    seed = random.randrange(LARGEST_RANDOM_SEED) if options.seed is None else options.seed
    number, is_shown = options.interruptions, options.verbose or options.record is not None
    if number is None:
        number = DEFAULT_INTERRUPTIONS if options.record is None else 1
    with _database(options, display) as (target, server), _logging(display, is_shown):
        display.line(
            f"Importing the {len(names)} .py files of {directory} into {target.address}, "
            f"with {number} interruption{'' if number == 1 else 's'}, --seed {seed}"
        )
        stopping = threading.Event()
        ways = ways_to_interrupt(target, server, stopping)
        is_picture = options.record is not None and options.interruptions is None
        kinds = [RESTART] if is_picture and RESTART in ways else list(ways)
        plan = make_plan(kinds, number, len(names), seed)
        interrupter = Interrupter(
            plan,
            ways,
            target.count_requests,
            lambda each: display.line(f"  item {each.item + 1} of {len(names)}: {each.kind}"),
            stopping,
        )
        with _losses() as losses, _keyboard() as is_interrupted:
            known = _import(target, directory, names, interrupter, display, is_interrupted)
        display.line("Comparing the tree with the tables")
        comparison = compare(directory, names, target.direct_dsn)
        _report(display, comparison, known, losses, plan, interrupter)
        display.line(f"{time.monotonic() - started:.0f} seconds in all")
    return comparison


def python_files(directory: Path, skipped: Collection[str] = ()) -> list[str]:
    """Return the names of all .py files in a directory and below it, relative to it, in order.

    skipped: the names of directories to leave out.
    """
    found = []
    for parent, directories, files in os.walk(directory):
        directories[:] = [each for each in directories if each not in skipped]
        paths = (Path(parent, each) for each in files if each.endswith(".py"))
        found += [path.relative_to(directory).as_posix() for path in paths if path.is_file()]
    return sorted(found)


def _import(
    target: Target | FileTarget,
    directory: Path,
    names: Sequence[str],
    interrupter: Interrupter,
    display: Display,
    is_interrupted: Callable[[], bool],
) -> int:
    """Run the job among the interruptions; return how many items the unique key recognised.

    If the job fails that is shown, and the comparison then tells how far it came.
    """
    with display.progress("Recording", len(names)) as advance, interrupter:

        def items() -> Iterator[str]:
            for name in interrupter.items(names):
                if is_interrupted():
                    raise KeyboardInterrupt
                yield name
                advance()

        try:
            driver = target.driver
            return import_files(target.forwarded_dsn, directory, items(), driver.name)
        except (driver.module.Error, ReconnectTimeout, CommitOutcomeUnknown) as error:
            if interrupter.error:
                raise interrupter.error from None
            display.line(f"The job failed: {type(error).__name__}: {one_line(error)}")
            return 0


def _report(
    display: Display,
    comparison: Comparison,
    known: int,
    losses: Counter[str],
    plan: Sequence[Interruption],
    interrupter: Interrupter,
) -> None:
    display.interruptions(Counter(each.kind for each in plan), interrupter.recoveries())
    display.figures(
        {
            "connection lost between transactions": losses[IDLE],
            "connection lost inside a transaction": losses[ACTIVE],
            "commits recognised by the unique key": known,
            "definitions recorded": comparison.definitions,
            "files found": comparison.found,
            "recorded": comparison.recorded,
            "lost": len(comparison.lost),
            "recorded twice": len(comparison.twice),
        }
    )
    display.paths("Lost", comparison.lost)
    display.paths("Recorded twice", comparison.twice)


@contextmanager
def _database(
    options: argparse.Namespace, display: Display
) -> Iterator[tuple[Target | FileTarget, EmbeddedPostgres | None]]:
    """The database to import into, and its server if it is one of our own."""
    if options.dsn is not None:
        with target_for(options.dsn, options.keep, options.driver) as target:
            try:
                yield target, None
            except target.errors as error:
                raise CommandError(str(error)) from error
            finally:
                if options.keep:
                    display.line(f"Kept: {target.place}")
        return
    directory = None
    if options.keep:
        directory = Path(tempfile.gettempdir(), f"zreconnect-demo-{secrets.token_hex(4)}")
    with (
        EmbeddedPostgres(directory) as server,
        target_for(server.dsn(), keep=True, driver_named=options.driver) as target,
    ):
        assert isinstance(target, Target)
        try:
            yield target, server
            if directory is not None and sys.stdin.isatty() and sys.stdout.isatty():
                display.line(f"To look at the tables: psql {shlex.quote(target.direct_dsn)}")
                input("Enter ends the server. ")
        finally:
            if directory is not None:
                display.line(
                    f"Kept: the schema {target.schema} in the server's directory {directory}; "
                    f"zreconnect.testing.EmbeddedPostgres({str(directory)!r}).start() starts it"
                )


@contextmanager
def _logging(display: Display, verbose: bool) -> Iterator[None]:
    """Print what the library logs if that is wanted, and keep it from the terminal if not."""
    # The second is transaction's, which logs what interrupts an abort.
    loggers = [logging.getLogger(name) for name in ("zreconnect", "txn")]
    handler = display.log_handler() if verbose else logging.NullHandler()
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


@contextmanager
def _losses() -> Iterator[Counter[str]]:
    """Count the connections that are lost during the block, by the state they are in."""
    losses: Counter[str] = Counter()

    def count(event: object) -> None:
        if isinstance(event, ConnectionLost):
            losses[event.state] += 1

    zope.event.subscribers.append(count)
    try:
        yield losses
    finally:
        zope.event.subscribers.remove(count)


@contextmanager
def _keyboard() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether there was an interrupt from the keyboard in the block.

    Its KeyboardInterrupt may be lost: psycopg2 ignores what is raised while it decodes a notice of
    the server's, and Python what is raised while it finalises an object.
    """
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)

    # It is ignored in what a shell starts in the background, and only the main thread gets it.
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
