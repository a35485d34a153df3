"""Run suites and print the table: ``python -m suites [NAME ...] [--through-only]``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import signal
import sys

import suites
from suites import counting, environments, running
from suites.recording import STARTED, Record
from suites.sources import NotGiven, NotToBeHad
from suites.suite import Suite

DIRECTORY = environments.ROOT / ".suites"
RESULTS = DIRECTORY / "results"


def described() -> dict[str, tuple[Suite, ...]]:
    """The suites of each module that has some."""
    modules = {
        info.name: importlib.import_module(f"suites.{info.name}")
        for info in pkgutil.iter_modules(suites.__path__)
        if not info.ispkg and info.name != "__main__"
    }
    return {name: module.SUITES for name, module in modules.items() if hasattr(module, "SUITES")}


def chosen(names: list[str]) -> list[tuple[str, Suite]]:
    """What has one of the names, or is in a module that has; everything for no name."""
    everything = [(module, suite) for module, some in described().items() for suite in some]
    known = sorted({name for module, suite in everything for name in (module, suite.name)})
    unknown = sorted(set(names) - set(known))
    if unknown:
        sys.exit(f"suites: there is no {', '.join(unknown)}. There are: {' '.join(known)}")
    return [
        (module, suite)
        for module, suite in everything
        if not names or {module, suite.name} & set(names)
    ]


def measure(module: str, suite: Suite, through_only: bool) -> counting.Row:
    """Run one suite both ways; its row is printed, and written beside what differs."""
    results = RESULTS / suite.name
    print(f"{suite.name}: fetching and installing", flush=True)
    source = suite.source.fetch(DIRECTORY / "sources")
    python = environments.python_for(suite, DIRECTORY / "environments" / module)
    bare = Record(results / "bare.jsonl")
    if not (through_only and bare.path.exists()):
        bare = running.run(suite, False, python, source, results)
    if unended := [test for test, (outcome, _) in bare.outcomes().items() if outcome == STARTED]:
        bare.path.unlink()
        raise NotToBeHad(f"bare, it did not get past {', '.join(unended)}")
    through = running.run(suite, True, python, source, results)
    outcomes = bare.outcomes(), through.outcomes()
    row, differences = counting.count(suite, *outcomes)
    counting.write_row(row, results / "row.json")
    path = results / "differences.txt"
    path.write_text(
        "".join(f"{test}\n    {last_line(differences[test])}\n" for test in differences)
    )
    for pattern in counting.needless(suite, *outcomes):
        print(f"{suite.name}: does not need to be left out: {pattern}")
    print(counting.table([row]))
    if differences:
        print(f"{suite.name}: what differs is in {path}; its errors are in {results}/through.log")
    return row


def last_line(error: str) -> str:
    return (error.strip().splitlines() or [""])[-1][:200]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m suites", description=suites.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a suite or a module")
    parser.add_argument(
        "--through-only", action="store_true", help="take the last bare run, if there is one"
    )
    options = parser.parse_args()
    # As Ctrl-C does: what was started ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("suites: terminated"))
    rows, missing = [], []
    for module, suite in chosen(options.names):
        try:
            rows.append(measure(module, suite, options.through_only))
        except NotToBeHad as error:
            if options.names or not isinstance(error, NotGiven):
                missing.append(suite.name)
            print(f"{suite.name}: not to be had here: {error}", flush=True)
    print(counting.table(rows))
    write_table()
    if missing:
        print(f"Not run: {', '.join(missing)}")
    failed = [row.title for row in rows if not row.is_enough]
    if failed:
        print(f"Below {counting.ENOUGH:g} %: {', '.join(failed)}")
    return 1 if failed or missing else 0


def write_table() -> None:
    """The table of all suites that were ever run here, as the manual has it."""
    paths = [RESULTS / suite.name / "row.json" for _, suite in chosen([])]
    rows = [counting.read_row(path) for path in paths if path.exists()]
    (DIRECTORY / "table.rst").write_text(counting.table(rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
