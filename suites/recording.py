"""Writes down each test's outcome as soon as there is one: a plugin for pytest, and a program that
runs tests of unittest's.

It runs in the suites' own environments, and imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: The environment variable with the path of the file.
FILE = "ZRECONNECT_SUITES_OUTCOMES"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
STARTED = "started"
_ORDER = (STARTED, PASSED, SKIPPED, FAILED)


class Record:
    """The outcomes in a file, one JSON array in a line: the outcome, the test's name, the error.

    A test that is met twice has failed if it failed once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, outcome: str, test: str, error: str = "") -> None:
        # Opened each time, for tests may close all files or run in a forked process.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([outcome, test, error]) + "\n")

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                # The last line is incomplete if the process was killed.
                if line.endswith("\n"):
                    outcome, test, error = json.loads(line)
                    yield outcome, test, error

    def outcomes(self) -> dict[str, tuple[str, str]]:
        """Each test's outcome and error. "started" is what a test has that did not end."""
        found: dict[str, tuple[str, str]] = {}
        for outcome, test, error in self:
            if test not in found or _ORDER.index(outcome) > _ORDER.index(found[test][0]):
                found[test] = outcome, error
        return found


def the_record() -> Record:
    return Record(Path(os.environ[FILE]))


# The plugin for pytest

_reports: list[Any] = []


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _reports.clear()
    the_record().add(STARTED, nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    _reports.append(report)


def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    the_record().add(*_summary(nodeid))


def _summary(nodeid: str) -> tuple[str, str, str]:
    for report in _reports:
        if report.failed:
            return FAILED, nodeid, str(report.longrepr)
    if any(report.skipped for report in _reports):
        return SKIPPED, nodeid, ""
    return PASSED, nodeid, ""


# The runner for unittest


class RecordingResult(unittest.TextTestResult):
    """Of each test that ends, the outcome."""

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self._outcome, self._error = PASSED, ""
        the_record().add(STARTED, test.id())

    def stopTest(self, test: Any) -> None:
        super().stopTest(test)
        the_record().add(self._outcome, test.id(), self._error)

    def _note(self, outcome: str, error: str = "") -> None:
        # A class or module that cannot be set up has no test that was started.
        if getattr(self, "_outcome", None) != FAILED:
            self._outcome, self._error = outcome, error

    def addError(self, test: Any, error: Any) -> None:
        super().addError(test, error)
        self._note(FAILED, self.errors[-1][1])

    def addFailure(self, test: Any, error: Any) -> None:
        super().addFailure(test, error)
        self._note(FAILED, self.failures[-1][1])

    def addSubTest(self, test: Any, subtest: Any, error: Any) -> None:
        super().addSubTest(test, subtest, error)
        if error is not None:
            self._note(FAILED, str(error[1]))

    def addUnexpectedSuccess(self, test: Any) -> None:
        super().addUnexpectedSuccess(test)
        self._note(FAILED, "unexpected success")

    def addExpectedFailure(self, test: Any, error: Any) -> None:
        super().addExpectedFailure(test, error)
        self._note(SKIPPED)

    def addSkip(self, test: Any, reason: str) -> None:
        super().addSkip(test, reason)
        self._note(SKIPPED)
        # Storm's tests of what is not supported tell nothing after this.
        the_record().add(SKIPPED, test.id())


def main() -> None:
    parser = argparse.ArgumentParser(description="Run tests and record their outcomes.")
    parser.add_argument("--through", help="a module to import first")
    parser.add_argument("names", nargs="+", help="what unittest can load")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if options.through:
            module = importlib.import_module(options.through)
            if hasattr(module, "through"):
                stack.enter_context(module.through())
        tests = unittest.defaultTestLoader.loadTestsFromNames(options.names)
        unittest.TextTestRunner(resultclass=RecordingResult, verbosity=0).run(tests)


if __name__ == "__main__":
    main()
