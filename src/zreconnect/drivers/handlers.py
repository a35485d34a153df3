"""What psycopg 3 calls with notices and notifications, and is to call in the next session, too.

Only what was added by way of the reconnecting connection: ``on_connect`` adds its own to each
session.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ADDING = ("add_notice_handler", "add_notify_handler")
REMOVING = {"remove_notice_handler": ADDING[0], "remove_notify_handler": ADDING[1]}
METHODS = frozenset({*ADDING, *REMOVING})


def start(raw: Any, handlers: list[tuple[str, Any]]) -> None:
    """Add the handlers of an earlier raw connection's to a new one: none, if that is the first."""
    raw.zreconnect_handlers = list(handlers)
    for method, callback in handlers:
        getattr(raw, method)(callback)


def noting(raw: Any, name: str) -> Callable[[Any], None]:
    """One of `METHODS` of a raw connection, which notes what is added and removed."""

    def call(callback: Any) -> None:
        getattr(raw, name)(callback)
        handler = REMOVING.get(name, name), callback
        if name in ADDING:
            raw.zreconnect_handlers.append(handler)
        elif handler in raw.zreconnect_handlers:
            raw.zreconnect_handlers.remove(handler)

    return call
