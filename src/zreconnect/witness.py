"""Did that commit happen? What is recorded before COMMIT, and asked when its answer is lost.

A witness is chosen for a connection and knows how to ask. Its observer belongs to one connection
and knows what to ask for: it learns of each new session and each transaction, and a later session
asks it for the outcome of the last transaction of a lost one.

Before an outcome is believed, the server process of the lost session is ended if it still exists:
until then it could commit late.
"""

from __future__ import annotations

import enum
import re
import time
import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from zreconnect.documented import documented_by, implements
from zreconnect.drivers.base import Condition, ServerSession, SessionSettings
from zreconnect.interfaces import IObserver, IWitness

# How long an orphaned server process that was told to end, or may not be told to, is waited for.
PATIENCE_WITH_ORPHANS = 10.0
POLL_INTERVAL = 0.01
# How long a row of the ledger is kept that nobody has used.
KEPT_DAYS = 30
# Goes along with COMMIT, and fails if the transaction has an id, which it gets when it first
# writes. So a COMMIT that the server has executed had nothing to commit. If it fails, the savepoint
# lets the transaction go on.
NOTHING_WRITTEN = (
    "SAVEPOINT zreconnect_commit;"
    "SELECT ('written by ' || pg_current_xact_id_if_assigned()::text)::integer"
)
GO_ON = "ROLLBACK TO SAVEPOINT zreconnect_commit;"
ASSIGNED_ID = "SELECT pg_current_xact_id_if_assigned()"


class Outcome(enum.Enum):
    """What became of a transaction whose COMMIT had no answer."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class History:
    """What stays the same as long as a transaction id means the same transaction.

    A crash of the server may hand out ids again whose WAL was not flushed; it resets the
    statistics. A failover goes on in another timeline, a restored backup may be another system.
    """

    system_identifier: Any
    timeline: str
    stats_reset: Any


@implements(IWitness)
class XidWitness:
    """Records the transaction id, and asks the server what became of it.

    Needs no table. It proves a commit unless the server crashed or failed over since; then the
    outcome is unknown. That it was not committed, it proves always.

    at_commit: False asks for the id along with BEGIN, which costs no round trip, but uses up an id
    for each transaction that may write. True asks just before COMMIT, and only a transaction that
    has written; that costs it one round trip, and the others none. For web sites, where most
    transactions only read.

    Raises TypeError if ``at_commit`` is not a truth value.
    """

    def __init__(self, at_commit: bool = False) -> None:
        if not isinstance(at_commit, bool):
            raise TypeError(f"at_commit must be True or False, not {at_commit!r}")
        self.at_commit = at_commit

    def __repr__(self) -> str:
        return f"XidWitness(at_commit={self.at_commit})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, XidWitness) and self.at_commit == other.at_commit

    def __hash__(self) -> int:
        return hash(self.at_commit)

    def observer(self, driver: Any) -> XidObserver:
        return XidAtCommitObserver(driver) if self.at_commit else XidObserver(driver)


@implements(IWitness)
class Ledger:
    """Keeps a row for each connection, which each transaction updates along with its work.

    The update rides on BEGIN and costs no round trip. It decides in every case in which the
    database can be reached again: after crashes and failovers too.

    table: the table's name, with or without a schema. It is made on first use by those who may.

    Raises ValueError if ``table`` is no plain name.
    """

    def __init__(self, table: str = "zreconnect_ledger") -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)?", table):
            raise ValueError(f"table must be a name or schema.name, not {table!r}")
        self.table = table

    def __repr__(self) -> str:
        return f"Ledger(table={self.table!r})"

    def observer(self, driver: Any) -> LedgerObserver:
        return LedgerObserver(driver, self.table)


@implements(IObserver)
class NoObserver:
    """For a connection without a witness: it knows nothing of any transaction."""

    watches_statements = False

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        # Without a server no answer is lost: a connection that was closed has not committed.
        self.may_have_written = driver.has_sessions

    def record_session(self, raw: Any, settings: SessionSettings) -> None:
        """Nothing is recorded."""

    def rider(self, raw: Any, settings: SessionSettings) -> str:
        return ""

    def began(self, row: Any) -> bool:
        return True

    def executed(self, raw_cursor: Any) -> None:
        """Nothing is recorded."""

    def commit(self, raw: Any) -> None:
        self._driver.commit(raw)

    def has_written(self, raw: Any) -> bool:
        has_written: bool = self._driver.has_written(raw)
        return has_written

    def fence(self, raw: Any) -> None:
        """The lost session is not known."""

    def outcome(self, raw: Any) -> Outcome:
        return Outcome.UNKNOWN

    def describe(self) -> str:
        return "The connection has no witness."

    def close(self, raw: Any) -> None:
        """Nothing is to be taken away."""


@documented_by(IObserver)
class _SessionObserver(NoObserver):
    """What the witnesses have in common: which session, and which transaction."""

    # In which what is written is not the program's.
    _own_table: str | None = None

    def __init__(self, driver: Any) -> None:
        super().__init__(driver)
        self._session: ServerSession | None = None
        self._xid: int | None = None
        self.may_have_written = False

    def has_written(self, raw: Any) -> bool:
        has_written: bool = self._driver.has_written(raw, self._own_table)
        return has_written and self.may_have_written

    def fence(self, raw: Any) -> None:
        if self._session is None:
            return
        deadline = time.monotonic() + PATIENCE_WITH_ORPHANS
        while (
            self._driver.end_session(raw, self._session, self._xid) and time.monotonic() < deadline
        ):
            time.sleep(POLL_INTERVAL)

    def _can_write(self, raw: Any, settings: SessionSettings) -> bool:
        assert self._session is not None
        return not (self._session.is_standby or self._driver.begins_read_only(raw, settings))

    def _describe_session(self) -> str:
        assert self._session is not None
        lost = datetime.now(timezone.utc).isoformat(sep=" ", timespec="seconds")
        return (
            f"It was lost at {lost}, in the server process {self._session.pid} that had started "
            f"at {self._session.start}."
        )

    def _identify(self, raw: Any) -> ServerSession:
        session: ServerSession = self._driver.identify(raw)
        self._session = session
        self._xid = None
        return session


@implements(IObserver)
class XidObserver(_SessionObserver):
    """Knows the id of a connection's last transaction, and the history that the id belongs to."""

    _history: History | None = None
    _knows_status = False

    def record_session(self, raw: Any, settings: SessionSettings) -> None:
        session = self._identify(raw)
        self._knows_status = self._driver.has_transaction_ids(raw)
        self._history = None
        if self._knows_status and not session.is_standby:
            self._history = self._present_history(raw)

    def rider(self, raw: Any, settings: SessionSettings) -> str:
        self.may_have_written = self._can_write(raw, settings)
        # An id is given to every transaction that asks, and there are but 2**31 before a vacuum.
        return "SELECT pg_current_xact_id()" if self.may_have_written and self._knows_status else ""

    def began(self, row: Any) -> bool:
        self._xid = None if row is None else int(row[0])
        return True

    def outcome(self, raw: Any) -> Outcome:
        if self._xid is None:
            return Outcome.UNKNOWN
        history = self._present_history(raw)
        if not self._is_same_system(history):
            return Outcome.UNKNOWN
        return outcome_by_id(self._driver, raw, self._xid, believe=history == self._history)

    def _is_same_system(self, history: History | None) -> bool:
        return (
            history is not None
            and self._history is not None
            and history.system_identifier == self._history.system_identifier
        )

    def describe(self) -> str:
        if self._xid is None:
            return f"{self._describe_session()} It had no transaction id."
        return (
            f"{self._describe_session()} Its transaction id was {self._xid}. Ask with "
            f"SELECT pg_xact_status('{self._xid}'), which is only right if the server did not "
            "crash or fail over since."
        )

    def _present_history(self, raw: Any) -> History | None:
        try:
            ((system_identifier, timeline, stats_reset),) = self._driver.query(
                raw,
                "SELECT system_identifier, substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8),"
                " stats_reset FROM pg_control_system(), pg_stat_bgwriter",
            )
        except self._driver.module.ProgrammingError:
            # Somebody took the right to ask away.
            return None
        return History(system_identifier, timeline, stats_reset)


@implements(IObserver)
class XidAtCommitObserver(XidObserver):
    """Asks for the id just before COMMIT, and only a transaction that has written."""

    watches_statements = True

    def __init__(self, driver: Any) -> None:
        super().__init__(driver)
        self._has_written = False
        self._reads_write = False

    def rider(self, raw: Any, settings: SessionSettings) -> str:
        self._has_written = False
        self.may_have_written = self._can_write(raw, settings)
        return ""

    def executed(self, raw_cursor: Any) -> None:
        if not self._driver.looks_like_reading(raw_cursor):
            self._has_written = True

    def commit(self, raw: Any) -> None:
        if (
            not self.may_have_written
            or not self._knows_status
            or self._driver.in_failed_transaction(raw)
        ):
            self._driver.commit(raw)
            return
        # As long as no COMMIT is sent that has something to commit, losing the session rolls back.
        self.may_have_written = False
        if self._has_written or self._reads_write:
            self._commit_with_id(raw, ASSIGNED_ID)
            return
        try:
            self._driver.commit(raw, NOTHING_WRITTEN)
        except self._driver.module.DataError:
            # A SELECT that calls a function or locks rows. The server logs the error, so that this
            # connection does not try again.
            self._reads_write = True
            self._commit_with_id(raw, GO_ON + ASSIGNED_ID)

    def _commit_with_id(self, raw: Any, question: str) -> None:
        ((xid,),) = self._driver.query(raw, question)
        if xid is not None:
            self._xid = int(xid)
            self.may_have_written = True
        self._driver.commit(raw)


@implements(IObserver)
class LedgerObserver(_SessionObserver):
    """Knows a connection's row in the ledger, and the number of its last transaction there."""

    def __init__(self, driver: Any, table: str) -> None:
        super().__init__(driver)
        self._table = table
        self._id = str(uuid.uuid4())
        self._number = 0

    def record_session(self, raw: Any, settings: SessionSettings) -> None:
        self._identify(raw)
        if self._can_write(raw, settings):
            self._open_row(raw)

    def rider(self, raw: Any, settings: SessionSettings) -> str:
        self.may_have_written = self._can_write(raw, settings)
        if not self.may_have_written:
            return ""
        self._number += 1
        return (
            f"UPDATE {self._table} SET number = {self._number}, used = now()"
            f" WHERE id = '{self._id}'{self._driver.ledger_answer}"
        )

    def began(self, row: Any) -> bool:
        self._xid = int(row[0]) if row is not None and self._driver.ledger_answer else None
        return row is not None or not self.may_have_written

    def outcome(self, raw: Any) -> Outcome:
        # The transaction has the row locked until it has ended, whichever way.
        limit = self._driver.limit_lock_waits(raw, PATIENCE_WITH_ORPHANS)
        try:
            rows = self._driver.query(
                raw, f"SELECT number FROM {self._table} WHERE id = %s FOR UPDATE", (self._id,)
            )
        except self._driver.module.Error as error:
            if self._driver.condition(error) is not Condition.LOCK_NOT_AVAILABLE:
                raise
            rows = []
        self._driver.limit_lock_waits(raw, limit)
        if not rows:
            return Outcome.UNKNOWN
        return Outcome.COMMITTED if rows[0][0] == self._number else Outcome.ABORTED

    def describe(self) -> str:
        return (
            f"{self._describe_session()} Its row in the ledger is {self._id}: it was committed if "
            f"SELECT number FROM {self._table} WHERE id = '{self._id}' gives {self._number}."
        )

    def close(self, raw: Any) -> None:
        self._driver.query(raw, f"DELETE FROM {self._table} WHERE id = %s", (self._id,))

    def _open_row(self, raw: Any) -> None:
        self._resolve_name(raw)
        try:
            self._insert_row(raw)
        except self._driver.module.Error as error:
            condition = self._driver.condition(error)
            if condition is Condition.READ_ONLY_TRANSACTION:
                raise self._driver.module.ProgrammingError(
                    "The ledger cannot be written, because default_transaction_read_only is on: "
                    "set readonly on the connection, or use another witness"
                ) from error
            if condition is not Condition.UNDEFINED_TABLE:
                raise
            make_ledger(self._driver, raw, self._table)
            self._resolve_name(raw)
            self._insert_row(raw)
        # A connection may be waiting for its server, to look up its outcome here.
        # The rows are looked for first: MySQL's DELETE waits for the locks of those it passes by.
        unused = f"used < now() - INTERVAL '{KEPT_DAYS}' DAY"
        for (identifier,) in self._driver.query(
            raw, f"SELECT id FROM {self._table} WHERE {unused}"
        ):
            self._driver.query(
                raw,
                f"DELETE FROM {self._table} WHERE id = %s AND {unused}",
                (str(identifier),),
            )

    def _resolve_name(self, raw: Any) -> None:
        """Settle which table it is, once: what the session looks for by a name may change."""
        if self._own_table is None:
            self._own_table = self._driver.full_name(raw, self._table)
            self._table = self._own_table or self._table

    def _insert_row(self, raw: Any) -> None:
        """Insert the connection's row, unless it is there from an earlier session."""
        table, parameters = self._table, (self._id,)
        if not self._driver.query(raw, f"SELECT 1 FROM {table} WHERE id = %s", parameters):
            self._driver.query(raw, f"INSERT INTO {table} (id) VALUES (%s)", parameters)


def outcome_by_id(driver: Any, raw: Any, xid: int, believe: bool) -> Outcome:
    """What the server has on record for a transaction id.

    believe: whether the id still means the same transaction, so that "committed" is a proof.
    """
    try:
        ((status,),) = driver.query(raw, "SELECT pg_xact_status(%s::text::xid8)", (xid,))
    except driver.module.DataError:
        # "transaction ID is in the future": the server has lost it, in a crash or a failover.
        return Outcome.ABORTED
    if status == "aborted":
        return Outcome.ABORTED
    return Outcome.COMMITTED if status == "committed" and believe else Outcome.UNKNOWN


def make_ledger(driver: Any, raw: Any, table: str) -> None:
    """Make the table of a `Ledger`, unless it exists.

    raw: a raw connection in autocommit mode. Raises the driver's ProgrammingError without the
    right to create tables.
    """
    statement = driver.ledger_table.format(table=table)
    try:
        driver.query(raw, statement)
    except driver.module.Error as error:
        condition = driver.condition(error)
        if condition is Condition.INSUFFICIENT_PRIVILEGE:
            raise driver.module.ProgrammingError(
                f"There is no ledger {table}, and this role may not create it. Have somebody who "
                f"may run: zreconnect ledger --table {table} DSN"
            ) from error
        if condition is not Condition.ALREADY_EXISTS:
            raise
        # Another session makes it at this moment, and IF NOT EXISTS is no lock.
        driver.query(raw, statement)
