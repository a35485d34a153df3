"""Requests that lose their database connection in all the places where a request can.

`LOSSES` is shared by the modules that add it to the example applications of stacks without
publisher; for those with one `zope_views` has views of the same names. Each function is the work
of a request after it has written into the guest book, so `loses_once` that of ``GET /LosesOnce``.
It is called with

cursor: the request's own.
attempt: how often the request has been run, with this time.
manager: the transaction manager of the request.

What it returns, unless it is None, is the response: bytes, or an iterator of them.
"""

import contextlib
import hashlib
import os
from collections import Counter

from zreconnect import DisconnectionError

attempts = Counter()


def lose_connection(cursor):
    cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")


def loses_once(cursor, attempt, manager):
    if attempt == 1:
        lose_connection(cursor)


def loses_always(cursor, attempt, manager):
    lose_connection(cursor)


def swallows(cursor, attempt, manager):
    """Returns normally after the loss."""
    if attempt == 1:
        with contextlib.suppress(DisconnectionError):
            lose_connection(cursor)


def swallows_everything(cursor, attempt, manager):
    """Returns normally, even if there was no connection to write with."""
    return b"fine"


def rolls_back_to_savepoint(cursor, attempt, manager):
    """Takes the loss for an error that a savepoint helps against."""
    savepoint = manager.savepoint()
    if attempt == 1:
        try:
            lose_connection(cursor)
        except DisconnectionError:
            savepoint.rollback()


def swallows_in_savepoint(cursor, attempt, manager):
    """Goes on after a savepoint that could not be set."""
    if attempt == 1:
        with contextlib.suppress(DisconnectionError):
            lose_connection(cursor)
        with contextlib.suppress(DisconnectionError):
            manager.savepoint()


def loses_in_del(cursor, attempt, manager):
    """The loss meets code whose errors Python ignores."""
    if attempt == 1:
        Finalized(cursor)


class Finalized:
    def __init__(self, cursor):
        self.cursor = cursor

    def __del__(self):
        lose_connection(self.cursor)


def conflicts(cursor, attempt, manager):
    """Loses nothing, but a serialization failure in COMMIT, once."""
    if attempt == 1:
        cursor.execute(
            "CREATE FUNCTION pg_temp.conflict() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE SQLSTATE '40001'; END $$;"
            "CREATE CONSTRAINT TRIGGER conflict AFTER INSERT ON guest INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION pg_temp.conflict();"
            "INSERT INTO guest VALUES ('refused')"
        )


def deadlocks(cursor, attempt, manager):
    """Loses nothing, but meets an error after which the server wants the work run again, once."""
    if attempt == 1:
        cursor.execute("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$")


def streams(cursor, attempt, manager):
    """The response uses the database, too."""

    def chunks():
        yield b"streamed "
        if attempt == 1:
            lose_connection(cursor)
        yield b"to the end"

    return chunks()


def waits_at_gate(cursor, attempt, manager):
    """Goes on, to the commit, when the test has opened and closed the pipe."""
    with open(os.environ["GATE"]) as gate:
        gate.read()


def forgets_transaction(cursor, attempt, manager):
    """The response begins a transaction and does not end it."""

    def chunks():
        manager.begin()
        cursor.execute("INSERT INTO guest VALUES ('forgotten')")
        yield b"forgotten"

    return chunks()


def receive(kind, body, cursor):
    """The work of a request with a body, half of which is read when its first attempt is lost.

    That attempt closes it where it can, as a ``with`` block of the view would."""
    attempts[kind] += 1
    digest = hashlib.sha256(body.read(5))
    cursor.execute("SELECT 1")
    if attempts[kind] % 2:
        getattr(body, "close", list)()
        lose_connection(cursor)
    digest.update(body.read())
    cursor.execute("INSERT INTO guest VALUES (%s)", (digest.hexdigest(),))
    return b"received"


LOSSES = {
    function.__name__.title().replace("_", ""): function
    for function in (
        loses_once,
        loses_always,
        swallows,
        swallows_everything,
        rolls_back_to_savepoint,
        swallows_in_savepoint,
        loses_in_del,
        conflicts,
        deadlocks,
        streams,
        waits_at_gate,
        forgets_transaction,
    )
}


def run_loss(name, cursor, manager):
    """Write into the guest book, run the work, and return the response."""
    attempts[name] += 1
    attempt = attempts[name]
    swallowed = (Exception,) if name == "SwallowsEverything" else ()
    with contextlib.suppress(*swallowed):
        cursor.execute("INSERT INTO guest VALUES (%s)", (f"attempt {attempt}",))
    response = LOSSES[name](cursor, attempt, manager)
    return f"attempt {attempt}".encode() if response is None else response
