"""Starting a thread, in which an interrupt may come."""

from __future__ import annotations

import sys
import threading


def start_thread(thread: threading.Thread) -> None:
    """Start it. Raises what a signal's handler has raised meanwhile; RuntimeError if the process is
    at its limit of threads.

    ``Thread.start()`` raises a KeyError or a RuntimeError of its own in the place of the former,
    when it wants to forget a thread that runs already, or to release what it has released.
    """
    handled = sys.exc_info()[1]
    try:
        thread.start()
    except (KeyError, RuntimeError) as error:
        behind = error.__context__
        if behind is None or behind is handled:
            raise
        raise behind from behind.__cause__
