"""The server of a command's DSN, and what a person can do about one that refuses."""

from __future__ import annotations

import re

from zreconnect.cli.errors import CommandError
from zreconnect.server import Server, server_from_dsn

# What libpq, PostgreSQL, PgBouncer, MySQL and SQLite say. A message may be translated, or of a
# version to come; then the last remedy stands.
_REMEDIES = (
    (
        r"authentication failed|access denied|no password supplied|empty password",
        "Correct the user or the password: in the DSN, or where the client library looks for it, "
        "as in PGPASSWORD, ~/.pgpass or ~/.my.cnf",
    ),
    (
        r"database .* does not exist|unknown database|no such database",
        "Create the database, or correct its name in the DSN",
    ),
    (
        r"role .* does not exist|no such user|not permitted to log in",
        "Create the role, with the right to log in, or correct its name in the DSN",
    ),
    (
        r"pg_hba\.conf",
        "Have a line in the server's pg_hba.conf let this role into this database from here, or "
        "see whether the lines there ask for TLS",
    ),
    (
        r"permission denied for database",
        "Let the role into the database: GRANT CONNECT ON DATABASE ... TO ...",
    ),
    (
        r"(?:does not|doesn't) support (?:SSL|TLS)",
        "Have the server offer TLS, or do without it (sslmode=disable, ssl_mode=DISABLED) where "
        "the network is safe",
    ),
    (
        r"certificate|SSL|TLS",
        "See whether the certificates are for this host, valid at this time, and signed by whom "
        "the other side trusts (sslrootcert, ssl_ca)",
    ),
    (
        r"unable to open database file",
        "See whether the directory is there, and may be written",
    ),
    (
        r"configuration parameter|invalid value|startup parameter",
        "Correct the options of the DSN",
    ),
)
_USUAL = "Correct what the message names"


def server_for(dsn: str) -> Server:
    """The server that a command's argument DSN names.

    Raises `CommandError` if there can be none.
    """
    try:
        return server_from_dsn(dsn)
    except ValueError as error:
        raise CommandError(f"argument DSN: {error}") from None
    except ImportError as error:
        raise CommandError(str(error)) from error


def remedy(error: BaseException) -> str:
    """What to do about an error of connecting that waiting does not change."""
    message = str(error)
    for pattern, what in _REMEDIES:
        if re.search(pattern, message, re.IGNORECASE):
            return what
    return _USUAL
