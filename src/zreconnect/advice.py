"""What a person can do about a server that lets nobody in."""

from __future__ import annotations

import re

# What libpq, PostgreSQL, PgBouncer, the client libraries of MySQL, SQLite, and Python's socket and
# threading modules say. A message may be translated, or of a version to come; then the last advice
# stands.
_ADVICE = (
    (
        r"translate host name|name or service not known|name resolution|nodename nor servname"
        r"|getaddrinfo|unknown mysql server host|unknown server host",
        "Check the name of the host, and whether the name server knows it",
    ),
    (
        r"too many clients|too many connections|connection slots are reserved"
        r"|no more connections allowed|max_client_conn|max_user_connections",
        "End connections that nobody uses, or have the server allow more",
    ),
    (
        r"start new thread|too many open files",
        "Have the process use fewer threads and files, or raise its limits",
    ),
    (r"is locked", "End the transaction of the other program that has it"),
    (
        r"not currently accepting|\" is disabled",
        "Have it let connections in again, which somebody has forbidden",
    ),
    (
        r"starting up|shutting down|recovery|not yet accepting|not accepting"
        r"|server login has been failing"
        r"|takes no writes|read-only|hot standby|prepared node|no space left",
        "See the server's log if it does not come by itself",
    ),
    (
        r"timed? ?out|no answer|no route to host|unreachable",
        "See whether the machine is up, and whether the network lets it be reached",
    ),
    (
        r"closed the connection|connection reset|lost connection|\bSSL\b",
        "See the server's log, and that of a pooler or proxy in between",
    ),
)
_USUAL = "Start the server"


def advice(error: BaseException) -> str:
    """What to do about an attempt to connect that failed with ``error``, as half a sentence."""
    message = str(error)
    for pattern, what in _ADVICE:
        if re.search(pattern, message, re.IGNORECASE):
            return what
    return _USUAL
