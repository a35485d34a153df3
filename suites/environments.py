"""The environment that a suite, or the benchmarks, run in: one of its own, made once."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from suites.sources import NotToBeHad
from suites.suite import PYTEST, Suite

ROOT = Path(__file__).resolve().parents[1]
BUILDOUT = ROOT / "buildout.cfg"
SETUP = ROOT / "setup.py"


def python_for(suite: Suite, directory: Path) -> Path:
    """The Python of the suite's environment in ``directory``, which is made if need be.

    Raises NotToBeHad for what cannot be installed.
    """
    return python_with({PYTEST, *suite.requirements}, suite.extras, directory)


def python_with(requirements: Iterable[str], extras: Sequence[str], directory: Path) -> Path:
    """The Python of an environment with these and zreconnect, in ``directory``, made if need be.

    Raises NotToBeHad for what cannot be installed.
    """
    wanted = sorted(requirements)
    itself = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    pins = constraints(wanted)
    content = "\n".join([sys.version, itself, *wanted, *pins, SETUP.read_text(encoding="utf-8")])
    made_of = directory / "made-of"
    if not made_of.exists() or made_of.read_text() != content:
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        constraint = directory / "constraints.txt"
        constraint.write_text("\n".join(pins) + "\n")
        command = [str(directory / "bin/python"), "-m", "pip", "install", "--quiet"]
        command += ["--constraint", str(constraint), *wanted, "--editable", itself]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NotToBeHad(f"{' '.join(command)}:\n{done.stderr}")
        made_of.write_text(content)
    return directory / "bin/python"


def constraints(wanted: list[str]) -> list[str]:
    """The versions that zreconnect is tested with, without those that the suite has of its own."""
    own = {project(requirement) for requirement in wanted}
    versions = BUILDOUT.read_text(encoding="utf-8").partition("[versions]")[2]
    pins = re.findall(r"^([\w.-]+) = (\S+)$", versions, re.MULTILINE)
    return [f"{name}=={version}" for name, version in pins if project(name) not in own]


def project(requirement: str) -> str:
    """The normalized name of the project that a requirement is of."""
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name.group()).lower()
