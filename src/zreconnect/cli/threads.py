"""What is not to keep Ctrl-C waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

Result = TypeVar("Result")


def in_another_thread(function: Callable[[], Result]) -> Result:
    """What it returns or raises. It is left alone if somebody interrupts this thread.

    So a driver may wait for an answer, which does not ask whether somebody has pressed Ctrl-C.
    """
    outcomes: SimpleQueue[Result | BaseException] = SimpleQueue()

    def call() -> None:
        try:
            outcomes.put(function())
        except BaseException as error:
            outcomes.put(error)

    threading.Thread(target=call, name="zreconnect command", daemon=True).start()
    outcome = outcomes.get()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
