"""The parts for frameworks and mappers. None is imported before its framework is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(part: str, requirement: str) -> Iterator[None]:
    """For a block that imports what a part needs. What is missing is named with what installs it.

    part: the name of the module. requirement: as ``pip install`` takes it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{part} needs the module {error.name}, which is not installed: "
            f"pip install {requirement}",
            name=error.name,
        ) from error
