"""The database, as a utility to register."""

import os

from zreconnect import Ledger, ReconnectingDatabaseAdapter

timeout = os.environ.get("DATABASE_TIMEOUT")
guestbook = ReconnectingDatabaseAdapter(
    os.environ["DATABASE_URL"],
    # Seconds that a request waits for the database; None is to fail at once when it is away.
    timeout=float(timeout) if timeout else None,
    # Knows what became of a COMMIT after a crash of the server as well.
    witness=Ledger(),
)
