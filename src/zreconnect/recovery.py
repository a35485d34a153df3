"""What a dead process has left prepared: which of it is to be committed, and which rolled back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime

from zreconnect.branch import CLUSTER, PREFIX, Branch, decided, end_branch, is_prepared
from zreconnect.drivers.base import Condition
from zreconnect.exceptions import one_line
from zreconnect.policy import check_number
from zreconnect.server import server_from_dsn
from zreconnect.witness import Outcome

# For each of the connections that recover() makes, in seconds.
CONNECT_TIMEOUT = 10.0
DECISIONS = {
    Outcome.COMMITTED: "commit",
    Outcome.ABORTED: "rollback",
    Outcome.UNKNOWN: "undecidable",
}


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
            to_be_rolled_back = {
                each.gid for each in results if each.decision == "rollback" and not settle
            }
            outcome, reason = _decide(prepared.gid, database, databases, to_be_rolled_back)
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
        self.raw = server.connect_once(CONNECT_TIMEOUT)
        stack.callback(self.driver.close, self.raw)
        if not self.driver.takes_writes(self.raw):
            raise self.driver.module.OperationalError(
                f"{self.address} is a standby, which does not tell what is prepared: give the "
                "primary's DSN, or all servers and target_session_attrs=read-write"
            )
        ((self.system_identifier, self.timeline),) = self.driver.query(self.raw, CLUSTER)
        ((self.name,),) = self.driver.query(self.raw, "SELECT current_database()")

    def went_back(self, branch: Branch) -> bool:
        """Whether what was committed last may be lost, since that branch was prepared here."""
        return bool(self.timeline != branch.timeline)

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
            end_branch(self.driver, self.raw, prepared.gid, outcome)
        except self.driver.module.Error as error:
            if self.driver.condition(error) is Condition.UNDEFINED_OBJECT:
                return []
            return [replace(prepared, reason=f"{prepared.reason}, but: {one_line(error)}")]
        return [replace(prepared, settled=True)]


def _decides(gid: str) -> bool:
    branch = Branch.from_gid(gid)
    return branch is not None and branch.number == 0


def _decide(
    gid: str,
    database: _Database,
    databases: Sequence[_Database],
    to_be_rolled_back: Collection[str],
) -> tuple[Outcome, str]:
    """What is to become of a prepared transaction, and why. database: the one where it is."""
    branch = Branch.from_gid(gid)
    if branch is None:
        return Outcome.UNKNOWN, "another version of zreconnect has named it"
    if branch.number == 0 and not database.went_back(branch):
        return Outcome.ABORTED, "it is the deciding branch, and was not committed"
    if branch.number == 0:
        return Outcome.UNKNOWN, (
            "it is the deciding branch, and was not committed as far as its cluster knows, which "
            f"goes on in timeline {database.timeline} since a failover or a restore. It may have "
            f"been in timeline {branch.timeline}: look whether the other databases have the "
            "transaction's work, and end it by hand as they have it"
        )
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
    if is_prepared(cluster.driver, cluster.raw, branch.deciding.gid):
        if branch.deciding.gid in to_be_rolled_back:
            return Outcome.ABORTED, f"{there} was not committed, and is rolled back first"
        return Outcome.UNKNOWN, (
            f"{there} is still prepared: end that first, give its DSN, too, or wait until it is "
            "old enough"
        )
    outcome = decided(cluster.driver, cluster.raw, branch)
    return outcome, {
        Outcome.COMMITTED: f"{there} was committed",
        Outcome.ABORTED: f"{there} was not committed"
        + (", or a failover has lost it" if cluster.went_back(branch) else ""),
        Outcome.UNKNOWN: f"{there} has no certain outcome: it is too long ago, or its cluster has "
        "failed over or been restored since; look there for the work of the transaction",
    }[outcome]
