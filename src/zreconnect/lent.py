"""Objects of the program's that a driver uses while the server waits: files and iterators.

The time that they take is not the server's silence. And what they raise comes out as it is, where
psycopg2 has the server answer an error in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

from zreconnect.link import Link


class Lent:
    """One of them.

    link: that of the connection which uses it. wrapped: the program's object.
    """

    def __init__(self, link: Link, wrapped: Any) -> None:
        self._link = link
        self._wrapped = wrapped
        self._error: BaseException | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # psycopg2 asks whether a file is one of text.
        return self._wrapped.__class__

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._wrapped, name)
        if name not in ("read", "write"):
            return value
        calls = self._calls(value)
        next(calls)
        return calls.send

    def _calls(self, function: Callable[[Any], Any]) -> Generator[Any, Any, None]:
        """Calls of it, each with what is sent.

        The frame of a generator is there before an interrupt comes, which a function would meet
        ahead of its first line.
        """
        result, pause = None, object()
        try:
            while True:
                argument = yield result
                # As `Watch.pausing`, which takes four calls more: COPY writes each row by itself.
                watch = self._link.session.watch
                watch.pauses.add(pause)
                try:
                    result = function(argument)
                finally:
                    watch.paused.add(pause)
                    watch.pauses.discard(pause)
        except GeneratorExit:
            raise
        except BaseException as error:
            self._error = error
            raise

    def __iter__(self) -> Lent:
        return self

    def __next__(self) -> Any:
        with self._link.session.watch.pausing():
            return next(self._wrapped)

    def __enter__(self) -> Lent:
        """For the request that uses a file."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        own, self._error = self._error, None
        try:
            if own is not None and error is not None and own is not error:
                raise own from error
        finally:
            # Their tracebacks refer to this frame, and to the object.
            del own, error, traceback


def lend_items(link: Link, value: Any) -> Any:
    """The value, or what stands for it if it makes its items meanwhile."""
    is_made_meanwhile = isinstance(value, Iterable) and not isinstance(value, (list, tuple))
    return Lent(link, iter(value)) if is_made_meanwhile else value
