"""What is to be said of a suite."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PYTEST = "pytest==9.2.0"


@dataclass(frozen=True)
class Servers:
    """Those that are running for one run of a suite: None for one that it does not want."""

    postgres: Any = None
    mariadb: Any = None


def _nothing(servers: Servers) -> dict[str, str]:
    return {}


def _no_arguments(servers: Servers) -> list[str]:
    return []


@dataclass(frozen=True)
class Suite:
    """One row of the table.

    name: of its results, and what ``SUITES`` can choose, beside its module's name.
    title: in the table, with its version.
    source: where its tests come from, such as an `Sdist`.
    requirements: what is installed for it, each with its version; zreconnect itself comes with
    ``extras``.
    postgres, mariadb: the settings of an embedded server that it wants; None for no server.
    through: the module of ``suites.through`` that puts zreconnect into the driver's place.
    tests: what to run: pytest's arguments, or names that unittest can load, with ``command`` set to
    `with_unittest`.
    arguments, variables: more arguments, and environment variables, given the servers.
    folder: where in the source it runs.
    not_counted: why tests are not counted, by pattern of their names, in which ``*`` is anything:
    those that look at a C type or at a mock, and nothing else.
    patience: seconds without the end of a test after which the suite hangs.
    """

    name: str
    title: str
    source: Any
    requirements: Sequence[str]
    through: str
    tests: Sequence[str]
    extras: Sequence[str] = ()
    postgres: Mapping[str, object] | None = None
    mariadb: Mapping[str, object] | None = None
    arguments: Callable[[Servers], Sequence[str]] = _no_arguments
    variables: Callable[[Servers], Mapping[str, str]] = _nothing
    command: Callable[[Suite, str | None], list[str]] = field(default_factory=lambda: with_pytest)
    folder: str = "."
    not_counted: Mapping[str, str] = field(default_factory=dict)
    patience: float = 300.0

    def reason_not_to_count(self, test: str) -> str | None:
        """Why this test is not counted; None if it is."""
        for pattern, reason in self.not_counted.items():
            if matches(pattern, test):
                return reason
        return None


def matches(pattern: str, test: str) -> bool:
    """Whether a test's name is of this pattern. Only ``*`` means more than itself."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), test, re.DOTALL) is not None


def with_pytest(suite: Suite, through: str | None) -> list[str]:
    """The arguments for Python that run the suite with pytest."""
    plugins = ["suites.recording", *([through] if through else [])]
    options = [option for plugin in plugins for option in ("-p", plugin)]
    return ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *options, *suite.tests]


def with_unittest(suite: Suite, through: str | None) -> list[str]:
    """The arguments for Python that run the suite with unittest."""
    return ["-m", "suites.recording", *(["--through", through] if through else []), *suite.tests]
