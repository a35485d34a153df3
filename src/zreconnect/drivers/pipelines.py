"""What is raised at the end of a pipeline of psycopg 3's: what was raised there first.

If the end of one is interrupted, or meets the loss of the session, psycopg raises that it cannot
leave pipeline mode, in place of that. ``executemany()`` has a pipeline of its own.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import psycopg

from zreconnect.drivers.base import named_as


def pass_on_first_errors(raw: Any) -> None:
    """Have the pipelines of a raw connection raise that."""
    raw.__class__ = _passing_on(raw.__class__)


@functools.cache
def _passing_on(connection_class: type[Any]) -> type[Any]:

    class PassingOn(connection_class):
        def pipeline(self) -> Any:
            return _block(self, super().pipeline())

        def _pipeline_nolock(self) -> Any:
            return _block(self, super()._pipeline_nolock())

    return named_as(connection_class, PassingOn)


@contextlib.contextmanager
def _block(raw: Any, block: Any) -> Iterator[Any]:
    handled = sys.exc_info()[1]
    try:
        with block as pipeline:
            yield pipeline
    except psycopg.OperationalError as error:
        behind = error.__context__
        if not raw.pgconn.pipeline_status or behind is None or behind is handled:
            raise
        raise behind from None
