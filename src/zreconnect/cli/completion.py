"""``zreconnect completion``: what a shell needs to complete the command's arguments."""

from __future__ import annotations

import argparse
from typing import Any

from zreconnect.cli.arguments import add_parser
from zreconnect.cli.output import Output

SHELLS = ("bash", "zsh", "tcsh")
DESCRIPTION = """\
Print a script with which a shell completes commands, options, and the names of files. It needs
shtab, which the extra "cli" installs.
"""
EXAMPLES = (
    'eval "$(zreconnect completion bash)"',
    "zreconnect completion zsh > ~/.zfunc/_zreconnect",
)


def add_command(commands: Any) -> None:
    """Add the command to the argparse subparsers."""
    parser = add_parser(
        commands,
        "completion",
        run,
        help="print what a shell needs to complete arguments",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


def run(options: argparse.Namespace, output: Output) -> int:
    """Print the script."""
    import shtab

    # Only here, because that module needs this one.
    from zreconnect.cli.commands import make_parser

    parser, commands = make_parser()
    files = {"FILE": shtab.FILE, "DIRECTORY": shtab.DIRECTORY}
    for action in (action for each in commands.values() for action in each.actions):
        if action.metavar in files:
            action.complete = files[action.metavar]  # type: ignore[attr-defined]
    script = shtab.complete(parser, options.shell)
    output.line(script)
    output.result(script=script)
    return 0
