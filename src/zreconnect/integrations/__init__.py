"""The parts for frameworks and mappers. None is imported before its framework is there."""

from __future__ import annotations

from collections.abc import Container, Iterator
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
            f'pip install "{requirement}"',
            name=error.name,
        ) from error


def check_scheme(scheme: str, others: Container[str], mapper: str) -> None:
    """Raise TypeError or ValueError unless ``scheme`` can be that of a mapper's URIs.

    others: the schemes of its other databases. mapper: its name.
    """
    if not isinstance(scheme, str):
        raise TypeError(f"scheme must be a string, not {scheme!r}")
    if not scheme or ":" in scheme:
        raise ValueError(f"scheme must be what stands before the colon of a URI, not {scheme!r}")
    if scheme in others:
        raise ValueError(
            f"scheme must not be {scheme!r}, which is another database of {mapper}'s: only "
            "PostgreSQL is supported"
        )
