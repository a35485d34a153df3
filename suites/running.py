"""One run of a suite: its servers, its process, and the end of both."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from suites.environments import ROOT
from suites.recording import FILE, STARTED, Record
from suites.suite import Servers, Suite
from zreconnect.testing import EmbeddedMariaDB, EmbeddedPostgres

#: Seconds between two looks at what has been recorded, and between two lines of progress.
LOOK, TELL = 0.2, 30.0


def run(
    suite: Suite,
    through: bool,
    python: Path,
    source: Path,
    results: Path,
    path: Sequence[str] = (),
) -> Record:
    """Run the suite, bare or through zreconnect, on servers of its own, and return the outcomes.

    python, source: what runs it, and where. results: a directory for what it records and prints.
    path: of the modules that ``python`` does not find by itself.

    What hangs is killed, and told: the rest of its tests have no outcome then.
    """
    side = "through" if through else "bare"
    results.mkdir(parents=True, exist_ok=True)
    record = Record(results / f"{side}.jsonl")
    record.path.write_text("")
    temporary = results / f"{side}.tmp"
    with servers_of(suite) as servers, made_for_now(temporary):
        module = f"suites.through.{suite.through}" if through else None
        command = [str(python), *suite.command(suite, module), *suite.arguments(servers)]
        environment = {
            **_without_settings_of_servers(os.environ),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *path]),
            FILE: str(record.path),
            "TMPDIR": str(temporary),
            **suite.variables(servers),
        }
        with (results / f"{side}.log").open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=source / suite.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                with ended(process):
                    _watch(process, record, f"{suite.name}, {side}", suite.patience)
            except BaseException:
                # A part of them is nothing to compare with.
                record.path.unlink()
                raise
    return record


@contextmanager
def servers_of(suite: Suite) -> Iterator[Servers]:
    """The servers that the suite wants, running."""
    with ExitStack() as stack:
        servers: dict[str, Any] = {}
        if suite.postgres is not None:
            postgres = EmbeddedPostgres(settings=suite.postgres)
            servers["postgres"] = stack.enter_context(postgres)
        if suite.mariadb is not None:
            servers["mariadb"] = stack.enter_context(EmbeddedMariaDB(settings=suite.mariadb))
        yield Servers(**servers)


@contextmanager
def made_for_now(directory: Path) -> Iterator[None]:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave neither the process nor any of its children, whatever happens."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _watch(process: subprocess.Popen[bytes], record: Record, name: str, patience: float) -> None:
    size, heard = 0, time.monotonic()
    told = heard
    while process.poll() is None:
        time.sleep(LOOK)
        now = time.monotonic()
        if record.path.stat().st_size != size:
            size, heard = record.path.stat().st_size, now
        if now > told + TELL:
            told = now
            print(f"{name}: {_ended(record)} tests so far", flush=True)
        if now > heard + patience:
            unended = [
                test for test, (outcome, _) in record.outcomes().items() if outcome == STARTED
            ]
            where = ", ".join(unended) or "before or after its tests"
            print(f"{name}: hangs, nothing for {patience:g} seconds: {where}", flush=True)
            return
    print(f"{name}: {_ended(record)} tests", flush=True)


def _ended(record: Record) -> int:
    return sum(outcome != STARTED for outcome, _ in record.outcomes().values())


def _without_settings_of_servers(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what would lead a driver to a server of the user's."""
    prefixes = ("PG", "MYSQL", "MARIADB", "DJANGO_", "PYTHON", "PYTEST_", "STORM_", "TEST_")
    return {name: value for name, value in environment.items() if not name.startswith(prefixes)}
