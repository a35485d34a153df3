"""Compare a source tree with the tables that the job recorded it in."""

from __future__ import annotations

import ast
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zreconnect.drivers.base import load_driver
from zreconnect.dsn import driver_name

CONNECT_TIMEOUT = 10.0

#: A row of ``file``, as (path,), or of ``definition``, as (path, name, kind, line).
Row = tuple[Any, ...]


@dataclass(frozen=True)
class Comparison:
    """What a tree and the tables have in common, and what not; paths in order.

    found: the number of files in the tree.
    recorded: how many of them are in the tables with all their definitions.
    lost: the files of which a row is missing.
    twice: the files of which there is a row too many, those included that are not in the tree.
    definitions: the number of definitions in the tables.
    """

    found: int
    recorded: int
    lost: list[str]
    twice: list[str]
    definitions: int

    @property
    def is_exact(self) -> bool:
        """Whether nothing is lost and nothing is there twice."""
        return not self.lost and not self.twice


def compare(directory: Path, names: Iterable[str], dsn: str) -> Comparison:
    """Compare the named files of a directory with the tables that ``dsn`` leads to.

    The files are parsed anew and the rows read through a plain connection of the
    database's module. Raises its errors.
    """
    names = list(names)
    expected = Counter(row for name in names for row in _rows_of_file(directory, name))
    present = Counter(_rows_of_tables(dsn))
    lost = {row[0] for row in expected - present}
    return Comparison(
        found=len(names),
        recorded=len(names) - len(lost),
        lost=sorted(lost),
        twice=sorted({row[0] for row in present - expected}),
        definitions=sum(count for row, count in present.items() if len(row) > 1),
    )


def _rows_of_file(directory: Path, name: str) -> Iterator[Row]:
    path = os.fsencode(name).decode(errors="backslashreplace")
    yield (path,)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse((directory / name).read_bytes())
    except Exception:
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield path, node.name, type(node).__name__, node.lineno


def _rows_of_tables(dsn: str) -> list[Row]:
    driver = load_driver(driver_name(dsn))
    with (
        closing(driver.connect(driver.parse(dsn), CONNECT_TIMEOUT)) as connection,
        closing(connection.cursor()) as cursor,
    ):
        cursor.execute("SELECT path FROM file")
        files = cursor.fetchall()
        cursor.execute("SELECT path, name, kind, line FROM definition")
        return [*files, *cursor.fetchall()]
