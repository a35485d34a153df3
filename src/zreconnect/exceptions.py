"""What zreconnect raises, and who may run the work again.

=====================================  =========================  =================================
error                                  happened                   run again?
=====================================  =========================  =================================
`DisconnectionError`                   nothing was committed      yes: publishers, `run` and
                                                                  ``transaction.manager.run`` do
`ReconnectTimeout`                     no transaction began       the caller decides
`CommitOutcomeUnknown`                 perhaps committed          only after looking
`PartlyCommitted`                      committed in some          no: a person decides
                                       databases, not in others
the driver's, after a deadlock or a    nothing was committed      yes, the same ones: it is a
serialization failure                                             ``TransientError``, too
`ConflictingTransactionManagerError`   a mistake in the program   no
=====================================  =========================  =================================
"""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

from transaction.interfaces import TransientError
from zope.interface import alsoProvides
from zope.publisher.interfaces import Retry

from zreconnect.advice import advice
from zreconnect.documented import implements
from zreconnect.interfaces import IDatabaseUnavailable, IDisconnectionError

ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None]

# PEP 249, "Exceptions": a connection has them as attributes.
DBAPI_EXCEPTIONS = {
    "Warning",
    "Error",
    "InterfaceError",
    "DatabaseError",
    "DataError",
    "OperationalError",
    "IntegrityError",
    "InternalError",
    "ProgrammingError",
    "NotSupportedError",
}


def one_line(error: BaseException) -> str:
    """The error's message on one line, as log files and other messages want it."""
    return " ".join(str(error).split())


def attempts_made(number: int) -> str:
    """For a message: that so many attempts were made."""
    return "1 attempt" if number == 1 else f"{number} attempts"


def make_transient(error: BaseException) -> None:
    """Make a driver's error a `transaction.interfaces.TransientError` as well.

    Publishers, unlike ``transaction.manager.run``, do not ask data managers what may run again. It
    stays the same object: what a driver has put into an error, such as psycopg2's ``diag``, cannot
    be given to another one.
    """
    if not isinstance(error, TransientError):
        error_type: Any = type(error)
        error.__class__ = _transient(error_type)


@functools.cache
def _transient(error_type: Any) -> Any:
    def __reduce__(error: BaseException) -> tuple[Any, ...]:
        # Other processes import the driver's.
        return error_type, *error_type.__reduce__(error)[1:]

    names = {name: getattr(error_type, name) for name in ("__doc__", "__module__", "__qualname__")}
    bases = (error_type, TransientError)
    return type(error_type.__name__, bases, {**names, "__reduce__": __reduce__})


class DisconnectedConnectionError(Exception):
    """A request was made on a connection that waits for ``rollback()`` after a disconnect."""


@implements(IDisconnectionError)
class DisconnectionError(Retry, TransientError):
    """The connection was lost, nothing was committed, and the unit of work may run again.

    What is raised is a subclass that is also the driver's own ``OperationalError``.

    message: what happened, to which server, and what to do.
    original: the ``sys.exc_info()`` triple of the driver's error; None after unpickling, since
    a traceback does not travel between processes.
    """

    def __init__(self, message: str, original: ExceptionInfo | None = None) -> None:
        super().__init__(original)
        self.args = (message,)
        if original is not None:
            # zope.publisher has this one shown, in the end, and not the Retry.
            alsoProvides(original[1], IDatabaseUnavailable)

    def getOriginalException(self) -> ExceptionInfo | None:
        original: ExceptionInfo | None = super().getOriginalException()
        return original

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args


@implements(IDatabaseUnavailable)
class ReconnectTimeout(Exception):
    """The policy's patience ended before there was a transaction: nothing was begun.

    server: the server's address without password.
    attempts: how often connecting was tried.
    seconds: how long.
    last_error: what the last attempt raised.
    """

    def __init__(
        self, server: str, attempts: int, seconds: float, last_error: BaseException
    ) -> None:
        super().__init__(server, attempts, seconds, last_error)
        self.server = server
        self.attempts = attempts
        self.seconds = seconds
        self.last_error = last_error

    def __str__(self) -> str:
        return (
            f"No connection to {self.server} after {attempts_made(self.attempts)} in "
            f"{self.seconds:.1f} seconds; no transaction was begun. {advice(self.last_error)}, or "
            f"begin again later. The last error was: {one_line(self.last_error)}"
        )


class CommitOutcomeUnknown(Exception):
    """The connection was lost while a commit was under way: the work may be committed or not.

    In autocommit mode every statement is a commit. No retry loop runs the work again after this
    error, because that could do it twice. Do not swallow it in work that ``transaction``'s or a
    publisher's loop runs: those do not know what was committed within, and may run it again after
    a later error.

    server: the server's address without password.
    request: what was under way.
    evidence: what a person needs to find the outcome out by hand, as far as it is known.
    outcome: "unknown"; or "committed", if ``rollback()`` has found that of a COMMIT that was
    interrupted.
    """

    def __init__(
        self, server: str, request: str = "COMMIT", evidence: str = "", outcome: str = "unknown"
    ) -> None:
        super().__init__(server, request, evidence, outcome)
        self.server = server
        self.request = request
        # What is known needs none, and what it would name may change.
        self.evidence = "" if outcome == "committed" else evidence
        self.outcome = outcome

    def __str__(self) -> str:
        if self.outcome == "committed":
            return (
                f"{self.request} to {self.server} was interrupted, and had committed its work: it "
                "cannot be rolled back, and must not be done again."
            )
        return (
            f"The connection to {self.server} was lost while {self.request} was under way. Its "
            "work may be committed or not: look for it in the database before you do it again. "
            + self.evidence
        ).rstrip()


class PartlyCommitted(CommitOutcomeUnknown):
    """One transaction of several databases is committed in some of them, or may be, and not in all.

    committed, not_committed, unknown: the servers' addresses, without passwords: where it is
    committed, where it is not, and where that could not be found out.
    reason: what was met by the one that failed.
    """

    def __init__(
        self,
        committed: tuple[str, ...],
        not_committed: tuple[str, ...],
        unknown: tuple[str, ...],
        reason: str,
    ) -> None:
        super().__init__(", ".join((*committed, *unknown, *not_committed)))
        self.args = (committed, not_committed, unknown, reason)
        self.committed = committed
        self.not_committed = not_committed
        self.unknown = unknown
        self.reason = reason

    def __str__(self) -> str:
        parts = [
            ("committed in", self.committed),
            ("not committed in", self.not_committed),
            ("perhaps committed in", self.unknown),
        ]
        told = ", ".join(f"{what} {' and '.join(where)}" for what, where in parts if where)
        return (
            f"The transaction is {told}. Do what is missing by hand, or take back what is there: "
            "run again, the work would be done twice. With two_phase=True it is all or nothing. "
            f"The reason was: {self.reason}"
        )


class ConflictingTransactionManagerError(Exception):
    """`initZopeless` was called with other settings than those of the installed manager."""
