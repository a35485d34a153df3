"""Have the peers' environment, and measure in it: ``python -m benchmarks`` and its arguments."""

from __future__ import annotations

import os
import sys

from suites import environments
from suites.sources import NotToBeHad

from benchmarks.report import DIRECTORY


def main() -> None:
    try:
        python = environments.python_with((), ("benchmarks",), DIRECTORY / "environment")
    except NotToBeHad as error:
        sys.exit(f"bench: the peers are not to be had here: {error}")
    os.execv(python, [str(python), "-m", "benchmarks.running", *sys.argv[1:]])


if __name__ == "__main__":
    main()
