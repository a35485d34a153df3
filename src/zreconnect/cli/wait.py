"""``zreconnect wait``: return when a transaction can begin."""

from __future__ import annotations

import argparse
import re
from contextlib import closing
from typing import Any

import zope.event

from zreconnect.advice import advice
from zreconnect.cli.arguments import DONE, NOT_SO, add_parser, seconds
from zreconnect.cli.errors import CommandError
from zreconnect.cli.output import Output
from zreconnect.cli.servers import remedy, server_for
from zreconnect.connection import connect
from zreconnect.events import ConnectionAttemptFailed
from zreconnect.exceptions import ReconnectTimeout, attempts_made, one_line
from zreconnect.policy import RetryPolicy

# What differs from attempt to attempt and is no other cause.
TIMES = re.compile(r"\d+(?:\.\d+)? seconds")

DESCRIPTION = """\
Wait until a transaction can begin: the server lets the role into the database, and is of the kind
that the DSN asks for (target_session_attrs). Why it cannot yet is told on the standard error, once
for each change of cause.

What passes is waited for, as connections of zreconnect do: a server that is not there, starts, is
full, or is a standby where a primary is asked for. What waiting does not change is told at once,
with exit status 2: a refused password, a database that does not exist, a mistake in the DSN.
"""
EXAMPLES = (
    "zreconnect wait postgresql://work@db/work",
    "zreconnect wait --timeout 60 mysql://work@db/work && exec my-job",
)


def add_command(commands: Any) -> None:
    """Add the command to the argparse subparsers."""
    parser = add_parser(
        commands,
        "wait",
        run,
        help="wait until a transaction can begin",
        description=DESCRIPTION,
        examples=EXAMPLES,
        not_so="no transaction could begin in time",
    )
    parser.add_argument("dsn", metavar="DSN", help="the database, as programs name it")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        help="give up after so many; 0 tries once (default: wait for ever)",
    )


def run(options: argparse.Namespace, output: Output) -> int:
    """Wait, and return the exit status.

    Raises `CommandError` for what waiting does not change.
    """
    server = server_for(options.dsn)
    causes = _Causes(output)
    output.result(server=server.address, causes=causes.told)
    zope.event.subscribers.append(causes)
    policy = RetryPolicy(timeout=options.timeout)
    try:
        with closing(connect(options.dsn, policy=policy, witness=None)) as connection:
            connection.begin()
            connection.rollback()
    except ReconnectTimeout as error:
        output.note(f"zreconnect wait: {error}")
        output.result(attempts=error.attempts, seconds=error.seconds)
        return NOT_SO
    except server.driver.module.Error as error:
        raise CommandError(f"{server.address}: {one_line(error)}. {remedy(error)}") from error
    finally:
        zope.event.subscribers.remove(causes)
    attempts = causes.attempts + 1
    output.line(
        f"{server.address}: a transaction can begin, after {attempts_made(attempts)} and "
        f"{causes.seconds:.1f} seconds"
    )
    output.result(attempts=attempts, seconds=causes.seconds)
    return DONE


class _Causes:
    """A subscriber to zreconnect's events: tells why there is no transaction yet.

    told: what was told. attempts, seconds: how often, and for how long, it was tried in vain.
    """

    def __init__(self, output: Output) -> None:
        self.told: list[dict[str, object]] = []
        self.attempts, self.seconds = 0, 0.0
        self._output = output
        self._cause = ""

    def __call__(self, event: object) -> None:
        if not isinstance(event, ConnectionAttemptFailed):
            return
        self.attempts, self.seconds = event.attempt, event.seconds
        message = one_line(event.error)
        cause = TIMES.sub("", message)
        if cause == self._cause:
            return
        self._cause = cause
        what = advice(event.error)
        self.told.append(
            {
                "attempts": event.attempt,
                "seconds": event.seconds,
                "error": message,
                "advice": what,
            }
        )
        self._output.note(
            f"{event.server}: not yet, after {attempts_made(event.attempt)} and "
            f"{event.seconds:.1f} seconds: {message}. {what}"
        )
