"""A batch job: record Python files and what they define, each file exactly once."""

import ast
import os
import warnings
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path

from zreconnect import Ledger, ReconnectingCursor, initZopeless

# MySQL's keys are of limited length.
TABLES = (
    "CREATE TABLE IF NOT EXISTS file (path varchar(700) PRIMARY KEY, error text)",
    "CREATE TABLE IF NOT EXISTS definition (path text, name text, kind text, line integer)",
)
# Leaves a file alone that had been recorded already.
INSERT = "INSERT INTO file VALUES ({0}, {0}) ON CONFLICT DO NOTHING"
MYSQL_INSERT = "INSERT INTO file VALUES ({0}, {0}) ON DUPLICATE KEY UPDATE path = path"
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Rows of one statement. Databases limit the number of parameters.
PAGE = 1000
Parsed = tuple[str | None, list[tuple[str, str, int]]]


def import_files(dsn: str, directory: Path, names: Iterable[str], driver: str | None = None) -> int:
    """Record the named files of a directory; return how many had been recorded already."""
    ztm = initZopeless(dsn, implicitBegin=False, timeout=60, driver=driver, witness=Ledger())
    run = partial(ztm.run, attempts=10)
    insert = MYSQL_INSERT if dsn.startswith("mysql:") else INSERT
    mark = "?" if dsn.startswith("sqlite:") else "%s"
    known = 0
    try:
        for table in TABLES:
            run(partial(ztm.cursor().execute, table))
        for name in names:
            parsed = parse(directory / name)
            known += not run(partial(record, ztm.cursor(), name, parsed, insert, mark))
    finally:
        ztm.uninstall()
    return known


def parse(path: Path) -> Parsed:
    """Return why a file cannot be parsed, or None, and name, kind and line of its definitions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = ast.walk(ast.parse(path.read_bytes()))
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {error}", []
    found = [node for node in nodes if isinstance(node, DEFINITIONS)]
    return None, [(node.name, type(node).__name__, node.lineno) for node in found]


def record(cursor: ReconnectingCursor, name: str, parsed: Parsed, insert: str, mark: str) -> bool:
    """Record a file in the current transaction; return False if it had been recorded already.

    mark: how the driver wants parameters marked.
    """
    path = os.fsencode(name).decode(errors="backslashreplace")
    error, definitions = parsed
    cursor.execute(insert.format(mark), (path, error))
    if cursor.rowcount == 0:
        return False
    rows = [(path, *definition) for definition in definitions]
    insert_definitions(cursor, rows, mark)
    return True


def insert_definitions(
    cursor: ReconnectingCursor, rows: list[tuple[str, str, str, int]], mark: str
) -> None:
    """Insert the rows, with as few statements as any driver can."""
    for start in range(0, len(rows), PAGE):
        page = rows[start : start + PAGE]
        places = ", ".join([f"({mark}, {mark}, {mark}, {mark})"] * len(page))
        cursor.execute(f"INSERT INTO definition VALUES {places}", list(chain.from_iterable(page)))
