"""The ``zreconnect`` command: each subcommand is a module of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, which ``zreconnect --help`` explains."""
    try:
        # Here, where Ctrl-C has no traceback.
        from zreconnect.cli.commands import run

        return run(arguments)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
