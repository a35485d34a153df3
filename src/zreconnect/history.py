"""Which history a server's sessions belong to, and what another one means for acknowledged work.

A standby that is promoted goes on in another timeline, from the last that it has received; a server
that is restored does so from its backup. What is not a part of that was committed for nothing,
although its COMMIT had an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class History:
    """What stays the same as long as a transaction id means the same transaction.

    A crash of the server may hand out ids again whose WAL was not flushed; it resets the
    statistics. A failover goes on in another timeline, a restored backup may be another system.

    Of a server with transaction ids all three are strings. They are compared with what the server
    itself tells in the query for an outcome, so that each has to be what this gives::

        (pg_control_system()).system_identifier::text
        substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)
        coalesce(extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time())::text, '-')

    In another form, such as a datetime for the last one, they say nothing, and outcomes are
    unknown. Where a server has no timelines or statistics, it is "" and None.
    """

    system_identifier: Any
    timeline: str
    stats_reset: Any

    def told(self) -> str:
        """What the server tells of it in one text."""
        return f"{self.system_identifier} {self.timeline} {self.stats_reset}"

    def is_of_system(self, other: History) -> bool:
        """Whether both are of the same system, which has its transactions from one place."""
        return bool(self.system_identifier == other.system_identifier)

    def has_forked(self, before: History | None) -> bool:
        """Whether it is that of the same system, in another timeline."""
        return before is not None and self.is_of_system(before) and self.timeline != before.timeline

    def difference(self, before: History | None) -> str:
        """What shows that it does not go on where that one was; empty if nothing does."""
        if before is None:
            return ""
        if not self.is_of_system(before):
            return (
                f"its system identifier was {before.system_identifier}, and is "
                f"{self.system_identifier} now"
            )
        if self.has_forked(before):
            return f"its timeline was {before.timeline}, and is {self.timeline} now"
        return ""


@dataclass(frozen=True)
class Change:
    """What a session shows of a history that has changed.

    evidence: what shows it, for people. is_missing: whether something is missing that was
    acknowledged to this connection; None if that is not known.
    """

    evidence: str
    is_missing: bool | None = None
