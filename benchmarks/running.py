"""Measure the parts, and write results, table and plots, in the peers' environment."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import signal
import sys
import time

from benchmarks import measurements, report
from benchmarks.part import Options, Part


def described() -> list[Part]:
    """All parts, in the order of the tables."""
    modules = [
        importlib.import_module(f"{measurements.__name__}.{info.name}")
        for info in pkgutil.iter_modules(measurements.__path__)
    ]
    return sorted((module.PART for module in modules), key=lambda part: part.order)


def chosen(names: list[str]) -> list[Part]:
    """The parts of these names; everything for no name."""
    everything = {part.name: part for part in described()}
    if unknown := sorted(set(names) - set(everything)):
        sys.exit(f"bench: there is no {', '.join(unknown)}. There are: {' '.join(everything)}")
    return [part for name, part in everything.items() if not names or name in names]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=measurements.__doc__)
    parser.add_argument("names", nargs="*", metavar="PART", help="all parts, if there is none")
    parser.add_argument("--rounds", type=int, default=Options.rounds, metavar="N")
    parser.add_argument(
        "--peers", default="", metavar="NAME,NAME", help="only these, and what they stand beside"
    )
    parser.add_argument("--long", action="store_true", help="long outages, too: hours")
    arguments = parser.parse_args()
    # As Ctrl-C does: what was started ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: terminated"))
    peers = tuple(filter(None, arguments.peers.split(",")))
    options = Options(rounds=arguments.rounds, is_long=arguments.long, peers=peers)
    for part in chosen(arguments.names):
        started = time.monotonic()
        print(f"{part.name}: measuring", flush=True)
        report.keep(part, part.measure(options), options, time.monotonic() - started)
        print(f"{part.name}: {time.monotonic() - started:.0f} seconds", flush=True)
    text = report.write(described())
    print(text)
    print(f"The table, the JSON and the plots are in {os.path.relpath(report.DIRECTORY)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
