"""Two-phase commit: one transaction in several databases, committed in all of them or in none.

Each connection's part in the transaction is a branch. It is prepared when the transaction manager
asks for its vote, and committed when all have agreed. No log of decisions is kept: the branch that
votes first, and so is finished first, is the deciding one, and its COMMIT PREPARED is the decision.
The name of every branch, by which its server knows it, says where the deciding branch is and
which transaction id it has. So when a process has died, the deciding branch's server can tell what
becomes of the others: `recover` asks.

PREPARE TRANSACTION writes the transaction's WAL to disk. From then on no crash makes the server
give its id to another transaction, so ``pg_xact_status`` can be believed as long as the server
goes on in the same timeline.
"""

from __future__ import annotations

import itertools
import re
import time
import uuid
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NoReturn

from transaction.interfaces import ITransaction

from zreconnect import commits, events
from zreconnect.datamanager import ConnectionDataManager
from zreconnect.exceptions import CommitOutcomeUnknown, one_line
from zreconnect.interfaces import ACTIVE, CLOSED, PREPARED
from zreconnect.policy import check_number
from zreconnect.server import server_from_dsn
from zreconnect.witness import PATIENCE_WITH_ORPHANS, POLL_INTERVAL, Outcome, outcome_by_id

PREFIX = "zreconnect:"
GID = re.compile(
    PREFIX + r"([0-9a-f]{32}):([0-9]+):(-?[0-9]+):([0-9A-F]{8}):([0-9]+):([A-Za-z0-9_]*)"
)
# PostgreSQL takes less than 200 characters as a gid.
LONGEST_DATABASE_NAME = 63
# For each of the connections that recover() makes, in seconds.
CONNECT_TIMEOUT = 10.0
CLUSTER = (
    "SELECT system_identifier, substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)"
    " FROM pg_control_system()"
)
DECISIONS = {
    Outcome.COMMITTED: "commit",
    Outcome.ABORTED: "rollback",
    Outcome.UNKNOWN: "undecidable",
}


@dataclass(frozen=True)
class Branch:
    """What the gid of a prepared transaction says.

    global_id: the same for all branches of a transaction.
    number: the branch's place in the order of votes; the deciding one is number 0.
    system_identifier, timeline, xid: the deciding branch's cluster, its timeline, and the id of
    the branch's transaction there.
    database: the deciding branch's database, for people to find it.
    """

    global_id: str
    number: int
    system_identifier: int
    timeline: str
    xid: int
    database: str

    @property
    def gid(self) -> str:
        return (
            f"{PREFIX}{self.global_id}:{self.number}:{self.system_identifier}:{self.timeline}:"
            f"{self.xid}:{self.database}"
        )

    @property
    def deciding(self) -> Branch:
        return replace(self, number=0)

    @classmethod
    def from_gid(cls, gid: str) -> Branch | None:
        """The branch of that gid; None if it is none of ours."""
        match = GID.fullmatch(gid)
        if match is None:
            return None
        global_id, number, system_identifier, timeline, xid, database = match.groups()
        return cls(global_id, int(number), int(system_identifier), timeline, int(xid), database)


class Decision:
    """What the branches of one transaction share.

    outcome: None until COMMIT PREPARED of the deciding branch is about to be sent; UNKNOWN from
    then on, until there is an answer to it.
    """

    def __init__(self, deciding: Branch) -> None:
        self.outcome: Outcome | None = None
        self._deciding = deciding
        self._numbers = itertools.count()

    def next_branch(self) -> Branch:
        return replace(self._deciding, number=next(self._numbers))


class TwoPhaseDataManager(ConnectionDataManager):
    """One connection's branch of a transaction.

    It is prepared in ``tpc_vote``, committed in ``tpc_finish`` and rolled back in ``tpc_abort``,
    each in one statement that is sent again on new sessions, as the policy says, until there is an
    answer. What cannot be ended within the policy's time stays prepared and is left to `recover`.
    """

    def __init__(self, connection: Any, transaction_manager: Any) -> None:
        super().__init__(connection, transaction_manager)
        self._driver = connection._driver
        self._decision: Decision
        # What is prepared, or may be, and has to be ended.
        self._branch: Branch | None = None

    def tpc_vote(self, transaction: ITransaction) -> None:
        """Prepare the transaction.

        Raises `DisconnectionError` if the session is lost and the transaction is not known to be
        prepared, and what the driver raises for a transaction that cannot be.
        """
        connection = self._connection
        connection._check_usable()
        if connection._state != ACTIVE:
            return
        if self._driver.in_failed_transaction(connection._raw):
            connection._commit()  # Raises, and says why.
        with connection._guarded():
            self._decision = self._join_decision(transaction)
        self._branch = self._decision.next_branch()
        try:
            with connection._watch.awaiting(connection._response_timeout):
                self._driver.prepare_transaction(connection._raw, self._branch.gid)
        except self._driver.module.Error as error:
            if not connection._means_disconnect(error):
                self._branch = None
                raise
            self._settle_lost_prepare(error)
        connection._state = PREPARED

    def tpc_finish(self, transaction: ITransaction) -> None:
        """Commit what is prepared.

        Raises `CommitOutcomeUnknown` if it is the deciding branch and the server gives no answer
        within the policy's time, and the driver's OperationalError if somebody has rolled it back.
        """
        if self._branch is not None:
            commits.note()
            self._finish(self._branch)
        super().tpc_finish(transaction)

    def abort(self, transaction: ITransaction) -> None:
        if self._branch is not None:
            self._abort_prepared(self._branch)
        super().abort(transaction)

    def sortKey(self) -> str:
        # Before the data managers that commit in one phase: these commit when they vote.
        return f"zreconnect:{id(self._connection)}"

    def _join_decision(self, transaction: ITransaction) -> Decision:
        """The transaction's decision; the first branch to ask for it is the one that decides."""
        try:
            decision: Decision = transaction.data(Decision)
        except KeyError:
            decision = Decision(self._as_deciding_branch())
            transaction.set_data(Decision, decision)
        return decision

    def _as_deciding_branch(self) -> Branch:
        ((system_identifier, timeline, xid, database),) = self._driver.query(
            self._connection._raw,
            f"SELECT *, pg_current_xact_id()::text, current_database() FROM ({CLUSTER}) AS cluster",
        )
        hint = re.sub(r"[^A-Za-z0-9_]", "_", database)[:LONGEST_DATABASE_NAME]
        return Branch(uuid.uuid4().hex, 0, system_identifier, timeline, int(xid), hint)

    def _settle_lost_prepare(self, error: BaseException) -> None:
        """Return if the transaction is prepared nevertheless."""
        connection = self._connection
        connection._end_session(error)
        connection._doom()
        found = False

        def look_up(raw: Any) -> None:
            nonlocal found
            assert self._branch is not None
            found = _is_prepared(self._driver, raw, self._branch)
            if not found:
                self._branch = None

        try:
            connection._connect(look_up)
        except Exception as problem:
            # Nothing but a COMMIT PREPARED of ours would commit it, so it counts as not prepared.
            events.logger.warning("Whether it is prepared is unknown: %s", one_line(problem))
        # The session is not kept: the observer cannot take it down while the prepared transaction
        # has the ledger's row locked.
        connection._drop_session()
        if not found:
            connection._raise_lost(error, was_active=True)
        self.disconnected = False

    def _finish(self, branch: Branch) -> None:
        if branch.number > 0:
            outcome, problem = self._end_prepared(branch, Outcome.COMMITTED)
            if outcome is Outcome.UNKNOWN:
                self._leave(branch, "although the transaction is committed", problem)
            return
        # Before it is sent, because an interrupt may come at any moment.
        self._decision.outcome = Outcome.UNKNOWN
        outcome, problem = self._end_prepared(branch, Outcome.COMMITTED)
        self._decision.outcome = outcome
        if problem is not None or outcome is not Outcome.COMMITTED:
            events.announce(events.CommitLookedUp(self._connection.server, outcome.value))
        if outcome is Outcome.UNKNOWN:
            self._raise_unknown(branch, problem)
        if outcome is Outcome.ABORTED:
            self._raise_rolled_back(branch)

    def _raise_unknown(self, branch: Branch, problem: BaseException | None) -> NoReturn:
        raise CommitOutcomeUnknown(
            self._connection.server,
            "COMMIT PREPARED",
            f"The deciding branch of its two-phase commit is {branch.gid}. Run zreconnect recover "
            "with the DSNs of all databases that took part: it finds the outcome out, and shows "
            "what is still prepared.",
        ) from problem

    def _raise_rolled_back(self, branch: Branch) -> NoReturn:
        # Not a DisconnectionError: data managers that finished before may have committed.
        raise self._driver.module.OperationalError(
            f"The transaction is not committed: {self._connection.server} has not got what was "
            f"prepared as {branch.gid} any more. Somebody has rolled it back, for example by "
            "zreconnect recover, or a failover has lost it."
        )

    def _abort_prepared(self, branch: Branch) -> None:
        if self._connection._state == ACTIVE:
            # The vote was interrupted, and PREPARE TRANSACTION may have arrived or not.
            self._connection.rollback()
        decided = self._decision.outcome
        if decided is Outcome.COMMITTED:
            # Another data manager has failed since.
            self._finish(branch)
        elif decided is Outcome.UNKNOWN:
            self._leave(branch, "because it is not known whether the transaction is committed")
        else:
            outcome, problem = self._end_prepared(branch, Outcome.ABORTED)
            if outcome is Outcome.UNKNOWN:
                self._leave(branch, "although the transaction is aborted", problem)

    def _end_prepared(
        self, branch: Branch, wanted: Outcome
    ) -> tuple[Outcome, BaseException | None]:
        """Commit or roll back what is prepared, reconnecting if need be.

        Returns what became of it, and the last error that was met.
        """
        connection = self._connection
        outcome = Outcome.UNKNOWN
        problem: BaseException | None = None

        def end(raw: Any) -> None:
            nonlocal outcome
            outcome = self._end_in_session(raw, branch, wanted)
            connection._take_down_session(raw)

        if connection._raw is not None:
            try:
                with connection._watch.awaiting(connection._response_timeout):
                    outcome = self._end_in_session(connection._raw, branch, wanted)
            except self._driver.module.Error as error:
                problem = error
                if connection._means_disconnect(error):
                    connection._end_session(error)
        if connection._raw is None:
            try:
                connection._connect(end)
            except Exception as error:
                problem = error
        if outcome is not Outcome.UNKNOWN:
            self._release()
        return outcome, problem

    def _end_in_session(self, raw: Any, branch: Branch, wanted: Outcome) -> Outcome:
        deadline = time.monotonic() + PATIENCE_WITH_ORPHANS
        while True:
            try:
                _end(self._driver, raw, branch.gid, wanted)
                return wanted
            except self._driver.module.errors.UndefinedObject:
                return self._outcome_without(raw, branch, wanted)
            except self._driver.module.errors.ObjectNotInPrerequisiteState:
                # It is busy: another server process is about to end it.
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_INTERVAL)

    def _outcome_without(self, raw: Any, branch: Branch, wanted: Outcome) -> Outcome:
        """What became of a branch that is not prepared any more."""
        if branch.number > 0 or wanted is Outcome.ABORTED:
            # Whoever has ended it, a lost request of ours or recover(), had but this to do.
            return wanted
        outcome = _decided(self._driver, raw, branch)
        if outcome is Outcome.UNKNOWN:
            # After a failover a ledger knows more. Only this answer of its is final: a transaction
            # that was not to write has no entry.
            observed: Outcome = self._connection._observer.outcome(raw)
            if observed is Outcome.COMMITTED:
                return observed
        return outcome

    def _leave(self, branch: Branch, why: str, problem: BaseException | None = None) -> None:
        """Let go of what stays prepared."""
        connection = self._connection
        error = "" if problem is None else f" The last error was: {one_line(problem)}"
        events.logger.error(
            "%s stays prepared in %s, %s. To end it, run zreconnect recover with the DSNs of all "
            "databases that took part.%s",
            branch.gid,
            connection.server,
            why,
            error,
        )
        # Prepared, it has its ledger's row locked: the connection needs another one.
        connection._drop_session()
        connection._observer = connection._new_observer()
        self._release()

    def _release(self) -> None:
        self._branch = None
        if self._connection._state == CLOSED:
            self._connection._drop_session()
        else:
            self._connection._be_idle()


@dataclass(frozen=True)
class PreparedTransaction:
    """A branch that `recover` has found prepared.

    server: the address of the server and database where it is, without password.
    gid: its name there.
    database: the database's name.
    prepared: when it was prepared.
    owner: the role that prepared it, which may end it, as superusers may.
    decision: "commit", "rollback" or "undecidable".
    reason: why.
    settled: whether it has been ended accordingly.
    """

    server: str
    gid: str
    database: str
    prepared: datetime
    owner: str
    decision: str
    reason: str
    settled: bool


def recover(
    *dsns: str, older_than: float = 60.0, settle: bool = False
) -> list[PreparedTransaction]:
    """Find what two-phase commits have left prepared, and decide for each whether to commit it.

    A branch is committed if its transaction's deciding branch was. If that is still prepared
    itself, nothing was decided, and it is rolled back, before the others.

    dsns: the databases to look into. Give all that took part: only the deciding branch's cluster
    knows the decision.
    older_than: what has been prepared for fewer seconds is left alone, because its process may be
    about to commit it.
    settle: commit or roll back what is found; otherwise nothing is changed.

    Returns what was found, without what somebody else ended meanwhile. Raises TypeError or
    ValueError, naming the argument, for one that makes no sense, and the driver's errors or
    TimeoutError if a database cannot be asked; then nothing is changed.
    """
    if not dsns:
        raise ValueError("dsns must name at least one database")
    check_number("older_than", older_than, at_least=0)
    with ExitStack() as stack:
        databases = [_Database(dsn, stack) for dsn in dict.fromkeys(dsns)]
        found = [
            (database, each) for database in databases for each in database.prepared(older_than)
        ]
        # Deciding branches first: as long as one is prepared, its process can commit it.
        found.sort(key=lambda pair: not _decides(pair[1].gid))
        results: list[PreparedTransaction] = []
        for database, prepared in found:
            to_be_rolled_back = () if settle else {each.gid for each in results}
            outcome, reason = _decide(prepared.gid, databases, to_be_rolled_back)
            result = replace(prepared, decision=DECISIONS[outcome], reason=reason)
            if settle and outcome is not Outcome.UNKNOWN:
                results += database.settle(result, outcome)
            else:
                results.append(result)
    return results


class _Database:
    """A session in one of the databases that `recover` looks into."""

    def __init__(self, dsn: str, stack: ExitStack) -> None:
        server = server_from_dsn(dsn)
        self.driver = server.driver
        self.address = server.address
        self.raw = server.connect(CONNECT_TIMEOUT)
        stack.callback(self.driver.close, self.raw)
        ((self.system_identifier, _),) = self.driver.query(self.raw, CLUSTER)
        ((self.name,),) = self.driver.query(self.raw, "SELECT current_database()")

    def prepared(self, older_than: float) -> list[PreparedTransaction]:
        rows = self.driver.query(
            self.raw,
            "SELECT gid, prepared, owner FROM pg_prepared_xacts"
            " WHERE starts_with(gid, %s) AND database = current_database()"
            " AND prepared <= clock_timestamp() - make_interval(secs => %s) ORDER BY prepared",
            (PREFIX, older_than),
        )
        return [
            PreparedTransaction(self.address, gid, self.name, prepared, owner, "", "", False)
            for gid, prepared, owner in rows
        ]

    def settle(self, prepared: PreparedTransaction, outcome: Outcome) -> list[PreparedTransaction]:
        """End it; returns it as it is then, or nothing if somebody else has ended it."""
        try:
            _end(self.driver, self.raw, prepared.gid, outcome)
        except self.driver.module.errors.UndefinedObject:
            return []
        except self.driver.module.Error as error:
            return [replace(prepared, reason=f"{prepared.reason}, but: {one_line(error)}")]
        return [replace(prepared, settled=True)]


def _decides(gid: str) -> bool:
    branch = Branch.from_gid(gid)
    return branch is not None and branch.number == 0


def _decide(
    gid: str, databases: Sequence[_Database], to_be_rolled_back: Collection[str]
) -> tuple[Outcome, str]:
    """What is to become of a prepared transaction, and why."""
    branch = Branch.from_gid(gid)
    if branch is None:
        return Outcome.UNKNOWN, "another version of zreconnect has named it"
    if branch.number == 0:
        return Outcome.ABORTED, "it is the deciding branch, and was not committed"
    there = f"the deciding branch, in the database {branch.database},"
    cluster = next(
        (each for each in databases if each.system_identifier == branch.system_identifier), None
    )
    if cluster is None:
        return Outcome.UNKNOWN, (
            f"{there} is in a cluster that was not asked, with the system identifier "
            f"{branch.system_identifier}: give its DSN, too"
        )
    # In this order: what is prepared now may be committed in the next moment.
    if _is_prepared(cluster.driver, cluster.raw, branch.deciding):
        if branch.deciding.gid in to_be_rolled_back:
            return Outcome.ABORTED, f"{there} was not committed, and is rolled back first"
        return Outcome.UNKNOWN, (
            f"{there} is still prepared: give its DSN, too, or wait until it is old enough"
        )
    outcome = _decided(cluster.driver, cluster.raw, branch)
    return outcome, {
        Outcome.COMMITTED: f"{there} was committed",
        Outcome.ABORTED: f"{there} was not committed",
        Outcome.UNKNOWN: f"{there} has no certain outcome: it is too long ago, or its cluster has "
        "failed over or been restored since; look there for the work of the transaction",
    }[outcome]


def _is_prepared(driver: Any, raw: Any, branch: Branch) -> bool:
    return bool(
        driver.query(raw, "SELECT gid FROM pg_prepared_xacts WHERE gid = %s", (branch.gid,))
    )


def _decided(driver: Any, raw: Any, branch: Branch) -> Outcome:
    """What became of a deciding branch that is not prepared any more.

    raw: a session in its cluster. ``branch`` is any of the transaction's.
    """
    ((system_identifier, timeline),) = driver.query(raw, CLUSTER)
    if system_identifier != branch.system_identifier:
        return Outcome.UNKNOWN
    # In another timeline the id may be that of another transaction.
    return outcome_by_id(driver, raw, branch.xid, believe=timeline == branch.timeline)


def _end(driver: Any, raw: Any, gid: str, outcome: Outcome) -> None:
    verb = "COMMIT" if outcome is Outcome.COMMITTED else "ROLLBACK"
    driver.query(raw, f"{verb} PREPARED '{gid}'")
