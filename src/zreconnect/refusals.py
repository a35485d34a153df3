"""What a request is answered that must not be done now: the errors of `Answer`."""

from __future__ import annotations

from typing import Any

from zreconnect.exceptions import (
    CommitOutcomeUnknown,
    DisconnectedConnectionError,
    make_transient,
)
from zreconnect.states import Answer

# The names of the driver's errors, and what they say.
_DRIVERS = {
    Answer.INSIDE: (
        "ProgrammingError",
        "{what} inside a transaction: commit() or rollback() first",
    ),
    Answer.OVER: (
        "InternalError",
        "The transaction ended on {server} with an error or a statement before, and what follows "
        "would not be a part of it. Roll back (or abort) before the connection is used again.",
    ),
    Answer.CONFLICT: (
        "InternalError",
        "The transaction ended on {server} with the conflict before, its savepoints with it, and "
        "nothing of it is committed. Roll back (or abort) and run the whole work again.",
    ),
    Answer.OPEN: (
        "ProgrammingError",
        "A block of transaction() inside has not ended, such as that of a generator which is not "
        "exhausted, or it could not be undone. Nothing is committed before, and no block around it "
        "ends: end it, or roll back.",
    ),
    Answer.PREPARED: (
        "ProgrammingError",
        "The connection's transaction is prepared: its transaction manager is about to commit or "
        "abort it, or else tpc_commit() or tpc_rollback() does, and the connection can be used "
        "afterwards",
    ),
    Answer.CLOSED: ("InterfaceError", "The connection is closed"),
}
REFUSED = frozenset({*_DRIVERS, Answer.LOST, Answer.UNKNOWN})


def refusal(answer: Answer, driver: Any, server: str, what: str = "") -> Exception:
    """What a refused request is answered.

    server: the server's address. what: the request's name.
    """
    if answer is Answer.UNKNOWN:
        return CommitOutcomeUnknown(
            server, evidence="Roll back (or abort) before the connection is used again."
        )
    if answer is Answer.LOST:
        original = DisconnectedConnectionError("Already disconnected")
        lost: Exception = driver.disconnection_error(
            f"Already disconnected from {server}, and nothing of the transaction is committed. "
            "Roll back (or abort) before the connection is used again.",
            (DisconnectedConnectionError, original, None),
        )
        return lost
    name, message = _DRIVERS[answer]
    error: Exception = getattr(driver.module, name)(message.format(what=what, server=server))
    if answer is Answer.CONFLICT:
        make_transient(error)
    return error
