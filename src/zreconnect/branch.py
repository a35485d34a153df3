"""A connection's part in a two-phase commit, as its server knows it: its name, and its SQL.

The name of every branch says where the deciding branch is and which transaction id it has. So when
a process has died, the deciding branch's server can tell what becomes of the others.

PREPARE TRANSACTION writes the transaction's WAL to disk. From then on no crash makes the server
give its id to another transaction, so ``pg_xact_status`` can be believed as long as the server
goes on in the same timeline.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from zreconnect.witness import CONFIRM, Outcome, outcome_by_id

PREFIX = "zreconnect:"
GID = re.compile(
    PREFIX + r"([0-9a-f]{32}):([0-9]+):(-?[0-9]+):([0-9A-F]{8}):([0-9]+):([A-Za-z0-9_]*)"
)
CLUSTER = (
    "SELECT system_identifier, substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) AS timeline"
    " FROM pg_control_system()"
)
PLACE = f"(SELECT concat_ws(' ', system_identifier, timeline) FROM ({CLUSTER}) AS cluster)"


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


def is_prepared(driver: Any, raw: Any, gid: str, xid: int | None = None) -> bool:
    """Whether that name is prepared. xid: the id of the only transaction that is meant by it."""
    # A column of type xid has the lower half of its 64 bits.
    low = None if xid is None else str(xid % 2**32)
    return bool(
        driver.query(
            raw,
            "SELECT gid FROM pg_prepared_xacts"
            " WHERE gid = %s AND transaction::text = coalesce(%s, transaction::text)",
            (gid, low),
        )
    )


def decided(driver: Any, raw: Any, branch: Branch) -> Outcome:
    """What became of a deciding branch that is not prepared any more.

    raw: a session in its cluster. ``branch`` is any of the transaction's.
    """
    ((system_identifier, timeline),) = driver.query(raw, CLUSTER)
    if system_identifier != branch.system_identifier:
        return Outcome.UNKNOWN
    # In another timeline the id may be that of another transaction.
    believe = timeline == branch.timeline
    place = f"{system_identifier} {timeline}"
    outcome = outcome_by_id(driver, raw, branch.xid, believe, PLACE, place)
    if outcome is Outcome.COMMITTED:
        driver.query(raw, CONFIRM)
    return outcome


def end_branch(driver: Any, raw: Any, gid: str, outcome: Outcome) -> None:
    verb = "COMMIT" if outcome is Outcome.COMMITTED else "ROLLBACK"
    quoted = gid.replace("'", "''")
    driver.query(raw, f"{verb} PREPARED '{quoted}'")
