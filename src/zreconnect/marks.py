"""What PostgreSQL is asked of a transaction along with BEGIN or COMMIT: where it is, and its id.

Each is one or more expressions for a list in which those that are NULL are left out.
"""

from __future__ import annotations

# What the server knows a transaction by: the process that it is in, and when it began.
MARK = "pg_backend_pid(), extract(epoch FROM now())"
# The values of a `zreconnect.history.History`. A standby has no timeline of its own. To have the
# last one from the view pg_stat_bgwriter takes as long as the rest of a small transaction.
HISTORY = (
    "(pg_control_system()).system_identifier::text, CASE WHEN NOT pg_is_in_recovery()"
    " THEN substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END,"
    " coalesce(extract(epoch FROM pg_stat_get_bgwriter_stat_reset_time())::text, '-')"
)
# The same in one text.
TOLD = f"concat_ws(' ', {HISTORY})"
# Not everything that a transaction does has an id: a notification gets one inside COMMIT, and a
# write to another server none. Who asks gets one that COMMIT then has, too.
# On a standby, and it may be one behind a pooler that has changed servers, there are none.
ID = "CASE WHEN NOT pg_is_in_recovery() THEN pg_current_xact_id() END"
ASSIGNED_ID = "pg_current_xact_id_if_assigned()"
NO_ID = "NULL"


def place(is_pooled: bool, with_history: bool) -> str:
    """What tells where a transaction is.

    is_pooled: whether it may be in any process, and on any server. with_history: whether its
    history may be asked there, too.
    """
    if not is_pooled:
        return MARK
    marks = f"{MARK}, NOT pg_is_in_recovery()"
    if with_history:
        marks += f", CASE WHEN NOT pg_is_in_recovery() THEN {TOLD} END"
    return marks
