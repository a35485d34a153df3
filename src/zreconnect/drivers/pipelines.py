"""What a signal's handler raises at the end of a pipeline of psycopg 3's is raised.

``executemany()`` has a pipeline of its own. If the end of one is interrupted, psycopg raises that
it cannot leave pipeline mode, in place of the interrupt.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

import psycopg


def pass_on_interrupts(raw: Any) -> None:
    """Have the pipelines of a raw connection do so."""
    raw.__class__ = _passing_on(raw.__class__)


@functools.cache
def _passing_on(connection_class: type[Any]) -> type[Any]:

    class PassingOn(connection_class):
        def pipeline(self) -> Any:
            return _block(self, super().pipeline())

        def _pipeline_nolock(self) -> Any:
            return _block(self, super()._pipeline_nolock())

    PassingOn.__name__ = connection_class.__name__
    PassingOn.__qualname__ = connection_class.__qualname__
    PassingOn.__module__ = connection_class.__module__
    return PassingOn


@contextlib.contextmanager
def _block(raw: Any, block: Any) -> Iterator[Any]:
    handled = sys.exc_info()[1]
    try:
        with block as pipeline:
            yield pipeline
    except psycopg.OperationalError as error:
        behind = error.__context__
        is_left = not raw.pgconn.pipeline_status or raw.closed
        if is_left or behind is handled or isinstance(behind, (psycopg.Error, type(None))):
            raise
        raise behind from None
