"""A table as the witness: each transaction leaves its number there, along with its work."""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from zreconnect.documented import implements
from zreconnect.drivers.base import Condition, Evidence, SessionSettings
from zreconnect.history import Change, History
from zreconnect.interfaces import IObserver, IWitness, Meaning
from zreconnect.witness import Outcome, SessionObserver

# How long a row of the ledger is kept that nobody has used.
KEPT_DAYS = 30
# For so many seconds after its last use none is removed, whatever the two clocks are like.
KEPT_FOR_CERTAIN = (KEPT_DAYS - 1) * 24 * 60 * 60.0


@implements(IWitness)
class Ledger:
    """Keeps a row for each connection, which each transaction updates along with its work.

    That rides on BEGIN and costs no round trip. It decides in every case in which the
    database can be reached again: after crashes and failovers too, but for those of MariaDB and
    MySQL to a replica, where a transaction that is not there may be on its way.

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
class LedgerObserver(SessionObserver):
    """Knows a connection's row in the ledger, and the number of its last transaction there."""

    def __init__(self, driver: Any, table: str) -> None:
        super().__init__(driver)
        self._table = table
        self._id = str(uuid.uuid4())
        self._number = 0
        # Whether the row is there.
        self._has_row = False
        # In which one the last transaction has written itself down, and whether that was there.
        self._entered: str | None = None
        self._had_row = False
        # The row to which a person was led.
        self._left: str | None = None
        # When what was acknowledged last had begun, and in which row it is.
        self._used = 0.0
        self._acknowledged_in = ""

    def record_session(self, raw: Any, settings: SessionSettings) -> Change | None:
        session, before = self._identify(raw, settings), self.history
        if session.is_standby:
            return None
        evidence = session.history.difference(before) if session.history else ""
        change = Change(evidence) if evidence else None
        if not self._driver.begins_read_only(raw, settings):
            change = self._change(evidence, self._open_row(raw))
        # Last: what keeps us from coming here has the next session compared with the same.
        self.history = session.history or before
        return change

    def _change(self, evidence: str, number: int | None) -> Change | None:
        """What became of what was acknowledged, if anything did.

        evidence: what shows that the history is another one, if it is. number: that in the row;
        None if there is no row, and not above 0 if there was none in an attempt before.
        """
        acknowledged, found = self._acknowledged, number or 0
        is_missing: bool | None = None
        if acknowledged is not None and found > 0:
            is_missing = found < acknowledged
        elif acknowledged is not None and evidence:
            # Unless it was removed because it was old.
            is_missing = time.monotonic() - self._used < KEPT_FOR_CERTAIN or None
        if is_missing or found <= 0:
            self._acknowledged = None
        if is_missing is None or not (evidence or is_missing):
            return Change(evidence) if evidence else None
        there = f"{self._table} has number {found}" if found > 0 else f"{self._table} has none"
        known = f"of this connection's transactions number {acknowledged} was acknowledged, {there}"
        return Change("; ".join(filter(None, (evidence, known))), is_missing)

    def rider(self, raw: Any, settings: SessionSettings, along: bool = False) -> str:
        self._note_begin(raw, settings, along)
        self._entered = None
        if self.waits:
            return ""
        if self._is_to_enter():
            return self._enter()
        return f"SELECT concat_ws(' ', {self._place})" if self.needs_row else ""

    def commit(self, raw: Any) -> None:
        self.may_have_committed = False
        is_to_enter = self.waits and self._is_to_enter() and not self.is_replaced
        if (
            is_to_enter
            and not self._driver.in_failed_transaction(raw)
            and self._driver.query(raw, "SHOW transaction_read_only") == [("off",)]
        ):
            self._driver.query(raw, self._enter())
        self.may_have_committed = self.may_have_written
        self._driver.commit(raw)
        self._is_under_way = False
        self.acknowledged()

    def acknowledged(self) -> None:
        if self._entered is not None and not self.is_replaced:
            # Where it was the first in another history, it has written over what was there.
            self._acknowledged = None if self.is_elsewhere else self._number
            self._acknowledged_in, self._used = self._entered, self._sent
            self._has_row = self._has_row or self._entered == self._id

    def _is_to_enter(self) -> bool:
        """Whether the transaction is for the ledger. Where there was a standby, there is no row."""
        assert self._session is not None
        return self.may_have_written and not self._session.is_standby

    def _enter(self) -> str:
        """What writes the transaction down."""
        if self._id == self._left:
            self._id, self._has_row = str(uuid.uuid4()), False
        self._entered, self._had_row = self._id, self._has_row
        self._number += 1
        update = f"number = {self._number}, used = now()"
        if self.needs_row:
            update += f" RETURNING concat_ws(' ', {self._place})"
        return self._upsert(self._id, self._number, update)

    def outcome(self, raw: Any) -> Outcome:
        if self._entered is None or self.is_replaced:
            return Outcome.UNKNOWN
        driver, before = self._driver, None
        number: int | None = -self._number
        try:
            with self._transaction(raw):
                before = driver.limit_lock_waits(raw, self._patience_left())
                # The transaction has the row locked until it has ended, whichever way, and also if
                # nobody else can see it yet. This COMMIT is as durable as that one would have been.
                driver.query(raw, self._upsert(self._entered, -self._number, "used = now()"))
                ((number,),) = driver.query(
                    raw, f"SELECT number FROM {self._table} WHERE id = %s", (self._entered,)
                )
        except driver.module.Error as error:
            condition = driver.condition(error)
            if condition is Condition.LOCK_NOT_AVAILABLE:
                number = None
            elif condition is not Condition.UNDEFINED_TABLE or not self._goes_on(raw, False):
                raise
        if before is not None:
            driver.limit_lock_waits(raw, before)
        if number == self._number:
            self.acknowledged()
            return Outcome.COMMITTED
        has_row = number != -self._number
        is_aborted = number is not None and self._goes_on(raw, has_row)
        return Outcome.ABORTED if is_aborted else Outcome.UNKNOWN

    def _goes_on(self, raw: Any, has_row: bool) -> bool:
        """Whether the server's history goes on, for good, without what is not in the row.

        What a former primary, even one that lives on, commits after a standby's promotion never
        gets there. Between two systems it may be on its way.

        has_row: whether there is a row. If not, somebody may have removed it, unless the server
        goes on from before it was made, or it was for the transaction to make it.
        """
        assert self._session is not None
        before = self._session.history
        is_certain = has_row or not self._had_row
        if before is None:
            return is_certain
        now: History = self._driver.identify(raw).history or before
        return now.is_of_system(before) and (is_certain or now.has_forked(before))

    def describe(self) -> str:
        session, row = self._describe_session(), self._entered
        if row is None:
            return (
                f"{session} It is not in the ledger: it was read-only, or a statement has ended it "
                "before commit() could write it there."
            )
        question = f"SELECT number FROM {self._table} WHERE id = '{row}' gives {self._number}"
        if self.is_replaced:
            return (
                f"{session} A statement of the program's has ended it, or may have: what came "
                f"before that was committed if {question}; what came after it is not in the ledger."
            )
        return (
            f"{session} Its row in the ledger is {row}: it was committed if {question}; no row, or "
            "a negative number, says nothing."
        )

    def leave_evidence(self) -> str:
        self._left = self._entered or self._left
        return self.describe()

    def close(self, raw: Any) -> None:
        if self._id != self._left:
            self._driver.query(raw, f"DELETE FROM {self._table} WHERE id = %s", (self._id,))

    def _evidence(self, raw: Any, began: float) -> Evidence:
        evidence, writer = Evidence(began, self._marks), self._driver.ledger_writer
        if writer is None or self._entered is None or self._marks:
            return evidence
        # Without the row, or the right to read it, there is no evidence in it.
        with contextlib.suppress(self._driver.module.ProgrammingError), self._transaction(raw):
            for (xid,) in self._driver.query(
                raw, f"SELECT {writer} FROM {self._table} WHERE id = %s", (self._entered,)
            ):
                return replace(evidence, xid=xid)
        return evidence

    def _upsert(self, row: str, number: int, update: str) -> str:
        """Insert a row of the connection's with that number or, if it is there, do the update."""
        return (
            f"INSERT INTO {self._table} (id, number) VALUES ('{row}', {number})"
            f" {self._driver.ledger_conflict} {update}"
        )

    @contextlib.contextmanager
    def _transaction(self, raw: Any) -> Iterator[None]:
        """One in which others' changes of the ledger are no conflict, whatever is usual for the
        session."""
        driver = self._driver
        level = driver.isolation_level(driver.ledger_isolation or "DEFAULT")
        try:
            driver.begin(raw, SessionSettings(isolation_level=level))
            yield
            driver.commit(raw)
        except driver.module.Error as error:
            if driver.meaning(error, raw) is not Meaning.DISCONNECT:
                driver.rollback(raw)
            raise

    def _open_row(self, raw: Any) -> int | None:
        """Have a row for the connection; returns the number in the row in which a transaction was
        acknowledged last, or in the one that it had, if any."""
        self._resolve_name(raw)
        try:
            return self._insert_row(raw)
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
            return self._insert_row(raw)

    def _resolve_name(self, raw: Any) -> None:
        """Settle which table it is, once: what the session looks for by a name may change."""
        if self._own_table is None:
            self._own_table = self._driver.full_name(raw, self._table)
            self._table = self._own_table or self._table

    def _insert_row(self, raw: Any) -> int | None:
        """Insert the connection's row, unless it is there from an earlier session, free, and not
        left, and remove those that nobody has used for long."""
        query, table, row = self._driver.query, self._table, self._id
        unused = f"used < now() - INTERVAL '{KEPT_DAYS}' DAY"
        with self._transaction(raw):
            mine = f"SELECT number FROM {table} WHERE id = %s"
            numbers = []
            if row != self._left:
                numbers = query(raw, f"{mine} {self._driver.ledger_free}", (row,))
            if not numbers:
                # Whoever has it locked, for as long as he likes, has that one to himself.
                row = str(uuid.uuid4())
                query(raw, f"INSERT INTO {table} (id) VALUES (%s)", (row,))
            if self._acknowledged is not None and self._acknowledged_in != row:
                numbers = query(raw, mine, (self._acknowledged_in,))
            # A connection may be waiting for its server, to look up its outcome here.
            rows = query(raw, f"SELECT id FROM {table} WHERE {unused}")
        self._id, self._has_row = row, True
        # By their ids: MySQL's DELETE waits for the locks of those it passes by.
        for (identifier,) in rows:
            query(raw, f"DELETE FROM {table} WHERE id = %s AND {unused}", (str(identifier),))
        return int(numbers[0][0]) if numbers else None


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
