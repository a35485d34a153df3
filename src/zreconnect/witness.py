"""Did that commit happen? What is recorded before COMMIT, and asked when its answer is lost.

A witness is chosen for a connection and knows how to ask. Its observer belongs to one connection
and knows what to ask for: it learns of each new session and each transaction, and a later session
asks it for the outcome of the last transaction of a lost one.

Before an outcome is believed, the server process of the lost session is ended if it still exists:
until then it could commit late.
"""

from __future__ import annotations

import enum
import time
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from zreconnect.documented import documented_by, implements
from zreconnect.drivers.base import Evidence, Mark, ServerSession, SessionSettings
from zreconnect.history import Change, History
from zreconnect.interfaces import IObserver, IWitness
from zreconnect.marks import ASSIGNED_ID, ID, MARK, NO_ID, TOLD, place

# How long an orphaned server process that was told to end, or may not be told to, is waited for:
# less than the longest attempt to connect, of which this is a part.
PATIENCE_WITH_ORPHANS = 8.0
POLL_INTERVAL = 0.01
LONGEST_POLL_INTERVAL = 0.5
# What has begun in the session within so many seconds after our BEGIN was sent is taken for ours,
# if that had no answer.
ARRIVAL = 1.0
# Something that COMMIT has to write, so that it waits for synchronous standbys, if there are any.
# All that was committed before is there when it has its answer.
CONFIRM = (
    f"SELECT concat_ws(' ', {MARK}), pg_logical_emit_message(true, 'zreconnect', '')"
    " WHERE current_setting('synchronous_standby_names') <> ''"
)
# Goes along with COMMIT, and fails if the transaction has an id, which it gets when it first
# writes to a table. If it fails, the savepoint lets the transaction go on.
NOTHING_WRITTEN = (
    "SAVEPOINT zreconnect_commit;"
    "SELECT ('written by ' || pg_current_xact_id_if_assigned()::text)::integer"
)
GO_ON = "ROLLBACK TO SAVEPOINT zreconnect_commit;"


class Outcome(enum.Enum):
    """What became of a transaction whose COMMIT had no answer."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"


@implements(IWitness)
class XidWitness:
    """Records the transaction id, and asks the server what became of it.

    Needs no table. It proves a commit unless the server crashed or failed over since; then the
    outcome is unknown. That it was not committed, it proves in nearly all cases: see the manual.

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
        return XidObserver(driver, self.at_commit)


@implements(IObserver)
class NoObserver:
    """For a connection without a witness: it knows nothing of any transaction."""

    watches_statements = False
    waits = False
    needs_row = is_elsewhere = False
    is_replaced = False
    history: History | None = None
    xid: int | None = None

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        # Without a server no answer is lost: a connection that was closed has not committed.
        self.may_have_committed = driver.has_sessions

    @property
    def takes_writes(self) -> bool:
        return False

    def record_session(self, raw: Any, settings: SessionSettings) -> Change | None:
        return None

    def rider(self, raw: Any, settings: SessionSettings, along: bool = False) -> str:
        return ""

    def began(self, row: Any) -> None:
        """Nothing is recorded."""

    def handed_out(self) -> None:
        """Nothing is recorded."""

    def executed(self, raw_cursor: Any) -> None:
        """Nothing is recorded."""

    def commit(self, raw: Any) -> None:
        self._driver.commit(raw)

    def acknowledged(self) -> None:
        """Nothing is recorded."""

    def rollback(self, raw: Any) -> None:
        self._driver.rollback(raw)

    def has_written(self, raw: Any) -> bool:
        return bool(self._driver.has_written(raw))

    def fence(self, raw: Any) -> None:
        """The lost session is not known."""

    def outcome(self, raw: Any) -> Outcome:
        return Outcome.UNKNOWN

    def describe(self) -> str:
        return "The connection has no witness."

    def leave_evidence(self) -> str:
        return self.describe()

    def close(self, raw: Any) -> None:
        """Nothing is to be taken away."""


@documented_by(IObserver)
class SessionObserver(NoObserver):
    """What the witnesses have in common: which session, and whether something is under way."""

    # In which what is written is not the program's.
    _own_table: str | None = None
    # Whether the present transaction's id is asked for just before COMMIT.
    _asks_at_commit = False

    def __init__(self, driver: Any) -> None:
        super().__init__(driver)
        self._session: ServerSession | None = None
        self._is_under_way = False
        self._knows_ids = False
        # Whether a statement of the transaction was watched that may have written something.
        self._has_written = False
        # When BEGIN was sent, and when it was answered.
        self._sent = 0.0
        self._began: float | None = None
        # Those of the transaction, and of those in which it was looked up in vain.
        self._marks: tuple[Mark, ...] = ()
        # Whether the transaction has shown to be on a primary.
        self._is_on_primary = False
        # What is asked of each transaction, see `zreconnect.marks`.
        self._place = MARK
        # Whether a statement of the program's has gone along.
        self._goes_along = False
        # Until when its orphan is waited for.
        self._deadline: float | None = None
        # Whether the program has the raw connection.
        self._is_handed_out = False
        self.may_have_written = self.may_have_committed = False
        # What stands for the last transaction that was acknowledged, if any.
        self._acknowledged: int | None = None

    @property
    def takes_writes(self) -> bool:
        return self._is_under_way and self._is_on_primary

    def began(self, row: Any) -> None:
        self._began = time.monotonic()
        if row is not None:
            pid, start, *more = row[0].split()
            self._marks = ((int(pid), start),)
            self._note_server(*more)

    def _note_server(self, is_on_primary: str, *more: str) -> list[str]:
        """Note where the transaction is; what else was answered is returned."""
        assert self._session is not None
        self._is_on_primary = is_on_primary == "t"
        if self._session.history is None or not self._is_on_primary:
            return list(more)
        history = History(*more[:3])
        self.is_elsewhere = history != self.history
        self._session = replace(self._session, history=history)
        return list(more[3:])

    def handed_out(self) -> None:
        self._is_handed_out = True
        if self.watches_statements:
            self.executed(None)

    def executed(self, raw_cursor: Any) -> None:
        if raw_cursor is None or not self._driver.looks_like_reading(raw_cursor):
            self._has_written = self.may_have_written = True

    def rollback(self, raw: Any) -> None:
        self._driver.rollback(raw)
        self._is_under_way = False

    def has_written(self, raw: Any) -> bool:
        has_written = bool(self._driver.has_written(raw, self._own_table))
        return (has_written and self.may_have_written) or self._has_written

    def fence(self, raw: Any) -> None:
        if not self._is_under_way:
            return
        if self._began is not None:
            evidence = self._evidence(raw, self._began)
        elif self._goes_along:
            # Nothing but the session tells it from others: who has our row locked may be another.
            evidence = Evidence(self._sent + ARRIVAL)
        else:
            return
        pause = POLL_INTERVAL
        deadline = time.monotonic() + self._patience_left()
        while (
            self._driver.end_session(raw, self._session, evidence) and time.monotonic() < deadline
        ):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_INTERVAL)

    def _evidence(self, raw: Any, began: float) -> Evidence:
        """What tells the transaction from those of others."""
        raise NotImplementedError

    def _patience_left(self) -> float:
        """For how many seconds the transaction's end is waited for, if it cannot be brought about.

        All attempts to reach the server share them.
        """
        now = time.monotonic()
        self._deadline = self._deadline or now + PATIENCE_WITH_ORPHANS
        return max(self._deadline - now, POLL_INTERVAL)

    def _note_begin(self, raw: Any, settings: SessionSettings, along: bool) -> None:
        assert self._session is not None
        self._is_under_way = True
        self._sent, self._began = time.monotonic(), None
        self._marks, self._is_on_primary = (), False
        self._goes_along = along
        self._has_written = self.is_replaced = self.may_have_committed = False
        # Behind a pooler another server may have taken the place of a standby.
        self.may_have_written = (
            not self._session.is_standby or self._session.is_pooled
        ) and not self._driver.begins_read_only(raw, settings)
        # A read-only transaction may notify all the same, but on a standby.
        self.watches_statements = self._knows_ids and not (
            self._session.is_standby or (self.may_have_written and not self._asks_at_commit)
        )
        if self._is_handed_out:
            self.handed_out()

    def _describe_session(self) -> str:
        assert self._session is not None
        lost = datetime.now(timezone.utc).isoformat(sep=" ", timespec="seconds")
        return f"It was lost at {lost}, in {self._session}; look when that has ended."

    def _identify(self, raw: Any, settings: SessionSettings) -> ServerSession:
        session: ServerSession = self._driver.identify(raw)
        session = self._session = replace(session, is_pooled=settings.pooled)
        # Behind a pooler only the transaction itself knows which process it is in.
        self.needs_row = settings.pooled
        self._place = place(settings.pooled, with_history=session.history is not None)
        self.is_elsewhere = False
        self._knows_ids = self._driver.has_transaction_ids(raw)
        self._is_under_way = self._is_handed_out = False
        self._deadline = None
        return session


@implements(IObserver)
class XidObserver(SessionObserver):
    """Knows the id of a connection's last transaction, and the history that the id belongs to.

    at_commit: whether it always asks for the id just before COMMIT, and only a transaction that has
    written, or may have. Else it does so where BEGIN cannot tell.
    """

    def __init__(self, driver: Any, at_commit: bool = False) -> None:
        super().__init__(driver)
        self._at_commit = at_commit
        self._reads_write = False
        # What asks for a transaction's place, and its id.
        self._questions: dict[str, str] = {}

    def record_session(self, raw: Any, settings: SessionSettings) -> Change | None:
        now, before = self._identify(raw, settings).history, self.history
        self._questions = {
            xid: f"SELECT concat_ws(' ', {self._place}, {xid})" for xid in (ID, ASSIGNED_ID, NO_ID)
        }
        if now is None:
            return None
        change = self._change(raw, before, now) if before is not None and before != now else None
        self.history = now
        return change

    def _change(self, raw: Any, before: History, now: History) -> Change | None:
        """What became of what was acknowledged, if anything did."""
        evidence, xid, outcome = now.difference(before), self._acknowledged, Outcome.UNKNOWN
        if xid is not None and now.is_of_system(before):
            # That it is committed proves nothing: the id may be another transaction's by now.
            outcome = outcome_by_id(self._driver, raw, xid, False, TOLD, now.told())
        is_missing = outcome is Outcome.ABORTED or None
        if evidence or is_missing:
            self._acknowledged = None
        if is_missing:
            lost = f"transaction {xid} was acknowledged, and is not committed"
            evidence = "; ".join(filter(None, (evidence, lost)))
        return Change(evidence, is_missing) if evidence else None

    def rider(self, raw: Any, settings: SessionSettings, along: bool = False) -> str:
        has_answer = not along or self._driver.answers_begin
        self._asks_at_commit = self._at_commit or self.waits or not has_answer
        self._note_begin(raw, settings, along)
        self.xid = None
        # An id is given to every transaction that asks, and there are but 2**31 before a vacuum.
        if not self._asks_at_commit and self.may_have_written and self._knows_ids:
            return self._questions[ID]
        return self._questions[NO_ID] if self.needs_row and not self.waits else ""

    def began(self, row: Any) -> None:
        self._began = time.monotonic()
        if row is not None:
            pid, start, *xid = row[0].split()
            self._marks = ((int(pid), start),)
            if self.needs_row:
                xid = self._note_server(*xid)
            self.xid = int(xid[0]) if xid else None
            if self._knows_ids and not self._asks_at_commit:
                self.may_have_written = self.xid is not None

    def _evidence(self, raw: Any, began: float) -> Evidence:
        return Evidence(began, self._marks)

    def commit(self, raw: Any) -> None:
        self.may_have_committed = False
        if self._has_written:
            self._commit_with_id(raw, ID)
        elif not (self._asks_at_commit and self.may_have_written and self._knows_ids):
            self.may_have_committed = self.may_have_written
            self._driver.commit(raw)
        elif self._reads_write:
            self._commit_with_id(raw, ASSIGNED_ID)
        else:
            self._commit_unless_written(raw)
        self._is_under_way = False
        if self.xid is not None and not self.is_replaced:
            self._acknowledged = self.xid

    def _commit_with_id(self, raw: Any, xid: str) -> None:
        self.may_have_committed = self._driver.in_failed_transaction(raw)
        if not self.may_have_committed:
            self._ask_id(raw, self._questions[xid])
        self._driver.commit(raw)

    def _commit_unless_written(self, raw: Any) -> None:
        try:
            self._driver.commit(raw, NOTHING_WRITTEN)
        except self._driver.module.DataError:
            # A SELECT that locks rows, or reads from a view that writes. The server logs the error,
            # so that this connection does not try again.
            self._reads_write = True
            self._ask_id(raw, GO_ON + self._questions[ASSIGNED_ID])
            self._driver.commit(raw)

    def acknowledged(self) -> None:
        if self.xid is not None and not self.is_replaced:
            self._acknowledged = self.xid

    def _ask_id(self, raw: Any, question: str) -> None:
        (row,) = self._driver.query(raw, question)
        self.began(row)
        self.may_have_committed = self.xid is not None

    def outcome(self, raw: Any) -> Outcome:
        assert self._session is not None
        before = self._session.history
        if self.xid is None or before is None:
            return Outcome.UNKNOWN
        now: History | None = self._driver.identify(raw).history
        if now is None or not now.is_of_system(before):
            return Outcome.UNKNOWN
        outcome = outcome_by_id(self._driver, raw, self.xid, now == before, TOLD, now.told())
        if outcome is Outcome.COMMITTED:
            self._confirm(raw)
            self._acknowledged = self.xid
        return outcome

    def _confirm(self, raw: Any) -> None:
        """Wait for the standbys that COMMIT waits for, if there are any."""
        row = self._driver.begin(raw, SessionSettings(), CONFIRM)
        if row is not None:
            # If this wait is cut off, the next attempt ends it before it waits itself.
            pid, start = row[0].split()
            self._marks += ((int(pid), start),)
        self._driver.commit(raw)

    def describe(self) -> str:
        if self.xid is None:
            return f"{self._describe_session()} It had no transaction id."
        before = "A statement has ended it, or may have; the id of what came before that"
        return (
            f"{self._describe_session()} {before if self.is_replaced else 'Its transaction id'} "
            f"was {self.xid}. Ask with "
            f"SELECT pg_xact_status('{self.xid}'), which is only right if the server did not "
            "crash or fail over since."
        )


def outcome_by_id(driver: Any, raw: Any, xid: int, believe: bool, place: str, told: str) -> Outcome:
    """What the server has on record for a transaction id.

    believe: whether the id still means the same transaction, so that "committed" is a proof.
    place, told: an expression, and what the server that is meant tells for it. Behind a pooler each
    request may have another.
    """
    status = f"CASE WHEN {place} = %s THEN pg_xact_status(%s::text::xid8) END"
    try:
        ((status,),) = driver.query(raw, f"SELECT {status}", (told, xid))
    except driver.module.DataError:
        # "transaction ID is in the future": the server has lost it, in a crash or a failover.
        return Outcome.ABORTED
    if status == "aborted":
        return Outcome.ABORTED
    return Outcome.COMMITTED if status == "committed" and believe else Outcome.UNKNOWN
