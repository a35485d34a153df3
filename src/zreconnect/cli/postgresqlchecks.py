"""What an examination looks at in PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zreconnect.branch import PREFIX
from zreconnect.cli.findings import Check, Findings, Patient, error, note, ok, warning
from zreconnect.cli.linechecks import (
    LONGEST_SILENCE,
    check_connect_timeout,
    check_hosts,
    check_keepalive,
    check_tls,
    is_nearly_all,
    room_for_connections,
)
from zreconnect.drivers.base import SessionSettings
from zreconnect.drivers.postgresql import AS_WHO_LOGGED_IN, READING
from zreconnect.marks import HISTORY

# In seconds: a transaction that pauses for so long need not be a mistake.
USUAL_PAUSE = 60.0
# What is prepared for longer, or in a transaction without doing anything, was forgotten.
FORGOTTEN = 60.0
FORGOTTEN_IDLE = 10 * 60.0
# In days: who changes passwords wants to know before.
EXPIRES_SOON = 14
SECONDS = {"ms": 0.001, "s": 1.0, "min": 60.0}
TLS_MODES: Mapping[str, object] = {
    "required": ("require", "verify-ca", "verify-full"),
    "verified": ("verify-full",),
    "best": "sslmode=verify-full, with sslrootcert",
}
# A replica's state is for pg_monitor and its like; others see that there is one.
REPLICAS = "SELECT application_name, sync_state FROM pg_stat_replication"


@dataclass(frozen=True)
class Settings:
    """The server's settings as they are for the role in the database."""

    values: Mapping[str, tuple[str, str | None]]

    def text(self, name: str) -> str:
        """Its value; empty if this version has no such setting."""
        return self.values.get(name, ("", None))[0]

    def number(self, name: str) -> float:
        """Its value as a number, of seconds if it is a time; 0 if there is none."""
        text, unit = self.values.get(name, ("0", None))
        return float(text) * SECONDS.get(unit or "", 1.0)


def settings_of(patient: Patient) -> Settings:
    """All of them."""
    rows = patient.query("SELECT name, setting, unit FROM pg_settings")
    return Settings({name: (value, unit) for name, value, unit in rows})


def describe(patient: Patient) -> str:
    """What kind of server it is."""
    return f"PostgreSQL {patient.value('SHOW server_version')}"


def check_encryption(patient: Patient) -> Findings:
    """TLS."""
    mode = patient.parameters.get("sslmode", "prefer")
    return check_tls(patient, patient.driver.uses_tls(patient.raw), mode, TLS_MODES)


def check_role(patient: Patient) -> Findings:
    """Whether a later session will be let in as this one was."""
    ((name, is_super, days),) = patient.query(
        # PostgreSQL before 17 has no difference to infinity.
        "SELECT rolname, rolsuper,"
        " (extract(epoch FROM rolvaliduntil) - extract(epoch FROM now()))::float / 86400"
        " FROM pg_roles WHERE rolname = session_user"
    )
    if days is not None and days < EXPIRES_SOON:
        when = "has expired" if days < 0 else f"expires in {days:.0f} days"
        yield warning(
            "role",
            f"The password of {name} {when}: who connects again after that is refused",
            f"ALTER ROLE {name} VALID UNTIL ...",
        )
    if is_super:
        yield note(
            "role",
            f"{name} is a superuser. A mistake of the program's, or of who breaks into it, can do "
            "anything, and nobody else may end its sessions",
            "Give the program a role of its own",
        )
    else:
        yield ok("role", f"{name} is no superuser")


def check_writes(patient: Patient) -> Findings:
    """Whether what was asked for can be written to."""
    settings, driver = settings_of(patient), patient.driver
    target = patient.parameters.get("target_session_attrs", "any")
    if not driver.takes_writes(patient.raw):
        if target not in READING:
            yield warning(
                "writes",
                "The server is a standby, where nothing can be written, and no ledger be kept",
                "Name the primary, or all servers and target_session_attrs=read-write",
            )
        return
    if settings.text("default_transaction_read_only") == "on":
        yield warning(
            "writes",
            "default_transaction_read_only is on: transactions are refused to write, and the "
            "ledger cannot be written",
            "ALTER ROLE ... SET default_transaction_read_only = off, or readonly=False",
        )
    else:
        yield ok("writes", "The server takes writes")


def check_pooler(patient: Patient) -> Findings:
    """Whether there is one in between, and what it cannot do."""
    driver, raw = patient.driver, patient.raw
    if not driver.pooling.is_in_between(raw):
        yield ok("pooler", "There is none in between")
        return
    try:
        driver.begin(raw, SessionSettings(pooled=True))
        driver.rollback(raw)
    except driver.module.Error as refusal:
        yield error(
            "pooler",
            f"A pooler is in between that takes no transactions: {refusal}".strip(),
            "Set its pool_mode to transaction or session",
        )
        return
    yield note(
        "pooler",
        "A pooler is in between: each transaction may be in another server process. zreconnect "
        "asks where each is. LISTEN, cursors WITH HOLD and a session's settings are not possible",
        "If it keeps a server process for each connection (pool_mode=session), say pooled=False",
    )
    if patient.parameters.get("options"):
        yield warning(
            "pooler",
            "The DSN has options, which a pooler does not give to the server's processes",
            "Use ALTER ROLE ... SET, or ALTER DATABASE ... SET",
        )


def check_timeouts(patient: Patient) -> Findings:
    """When the server ends a session or a statement by itself."""
    settings = settings_of(patient)
    idle = settings.number("idle_in_transaction_session_timeout")
    name = "idle_in_transaction_session_timeout"
    if not idle:
        yield note(
            name,
            "It is off: a program that hangs in a transaction, or a machine that is gone, keeps "
            "its locks until somebody ends the session",
            f"ALTER ROLE ... SET {name} = '15min', or as long as your longest pause in a "
            "transaction",
        )
    elif idle < USUAL_PAUSE:
        yield warning(
            name,
            f"A transaction that pauses for {idle:g} seconds is lost, also if the program computes",
            f"ALTER ROLE ... SET {name} = '15min', or do no work between the statements",
        )
    else:
        yield ok(name, f"A transaction that pauses for {idle:g} seconds is ended")
    for name, what in (
        ("statement_timeout", "a statement that takes"),
        ("lock_timeout", "a statement that waits for a lock for"),
        ("transaction_timeout", "a transaction that takes"),
    ):
        if limit := settings.number(name):
            yield note(
                name,
                f"The server ends {what} longer than {limit:g} seconds, with an error that nothing "
                "runs again",
            )
    if limit := settings.number("idle_session_timeout"):
        yield ok(
            "idle_session_timeout",
            f"A session that rests for {limit:g} seconds is ended, which costs nothing: the next "
            "transaction reconnects",
        )


def check_orphans(patient: Patient) -> Findings:
    """How long the server itself keeps the session of a client that is gone."""
    settings = settings_of(patient)
    name = "tcp_keepalives_idle"
    silence = settings.number(name) + settings.number("tcp_keepalives_interval") * settings.number(
        "tcp_keepalives_count"
    )
    if silence > LONGEST_SILENCE:
        yield note(
            name,
            f"The server notices after {silence:.0f} seconds that a client's machine is gone, and "
            "keeps its locks as long. zreconnect ends the sessions that it has lost itself, when "
            "it comes back",
            "In postgresql.conf: tcp_keepalives_idle = 30, tcp_keepalives_interval = 10, "
            "tcp_keepalives_count = 3",
        )
    elif silence:
        yield ok(name, f"The server notices after {silence:.0f} seconds that a client is gone")
    rows = patient.query(
        f"{AS_WHO_LOGGED_IN}SELECT pid, extract(epoch FROM clock_timestamp() - state_change)::float"
        " FROM pg_stat_activity WHERE usename = session_user AND state LIKE 'idle in transaction%%'"
        " AND state_change < clock_timestamp() - make_interval(secs => %s) ORDER BY 2 DESC",
        FORGOTTEN_IDLE,
    )
    if rows:
        yield warning(
            "orphans",
            f"{len(rows)} sessions of this role have been in a transaction without doing anything, "
            f"for {rows[0][1]:.0f} seconds or less; they keep their locks",
            f"See whose they are; SELECT pg_terminate_backend({rows[0][0]}) ends one",
        )


def check_fencing(patient: Patient) -> Findings:
    """Whether the role may end the orphan of a lost session."""
    ((may_end, may_see),) = patient.query(
        "SELECT bool_and(has_function_privilege(session_user, pg_proc.oid, 'EXECUTE')),"
        " has_table_privilege(session_user, 'pg_catalog.pg_stat_activity', 'SELECT')"
        " FROM pg_proc WHERE proname = 'pg_terminate_backend'"
        " AND pronamespace = 'pg_catalog'::regnamespace"
    )
    if may_end and may_see:
        yield ok("fencing", "The role may end its own sessions that were lost")
        return
    missing = (
        "SELECT ON pg_stat_activity" if not may_see else "EXECUTE ON FUNCTION pg_terminate_backend"
    )
    yield warning(
        "fencing",
        "The role may not end its own sessions that were lost: the next one waits until the server "
        "notices, and outcomes of commits can stay unknown",
        f"GRANT {missing} TO the role",
    )


def check_monitoring(patient: Patient) -> Findings:
    """Whether the role sees who is in the way."""
    if not patient.value("SELECT pg_has_role(session_user, 'pg_read_all_stats', 'USAGE')"):
        yield note(
            "monitoring",
            "The role sees of others' sessions and of replication only that they are there",
            "For who looks for the reason of a wait: GRANT pg_read_all_stats TO the role",
        )


def check_xid_witness(patient: Patient) -> Findings:
    """Whether witness="xid" can prove that a commit was done."""
    driver, raw = patient.driver, patient.raw
    if not driver.has_transaction_ids(raw):
        yield warning(
            "xid witness",
            "This version cannot tell what became of a transaction: a COMMIT whose answer is lost "
            'stays unknown with witness="xid"',
            "Use witness=Ledger(), or PostgreSQL 13 or newer",
        )
        return
    try:
        patient.query(f"SELECT {HISTORY}")
    except driver.module.ProgrammingError as refusal:
        yield warning(
            "xid witness",
            "The role may not ask for the server's history, without which a transaction's id "
            f"proves no commit: {str(refusal).splitlines()[0]}",
            "Grant EXECUTE on that function to the role, or use witness=Ledger()",
        )
        return
    yield ok("xid witness", "A COMMIT whose answer is lost can be looked up")


def check_ledger(patient: Patient) -> Findings:
    """Whether there is one, and the role can use it."""
    name = patient.driver.full_name(patient.raw, patient.table)
    make = f"zreconnect ledger --table {patient.table} DSN"
    if name is None:
        may_make = patient.value("SELECT has_schema_privilege(current_schema(), 'CREATE')")
        first = "it is made when it is first needed" if may_make else "the role may make none"
        yield note(
            "ledger",
            f"There is no {patient.table}; with witness=Ledger(), {first}",
            "" if may_make else f"If the program has witness=Ledger(): {make}",
        )
        return
    ((owner, is_lasting, rights),) = patient.query(
        "SELECT pg_get_userbyid(relowner), relpersistence = 'p', has_table_privilege(oid, 'SELECT')"
        " AND has_table_privilege(oid, 'INSERT') AND has_table_privilege(oid, 'UPDATE')"
        " AND has_table_privilege(oid, 'DELETE') FROM pg_class WHERE oid = %s::regclass",
        name,
    )
    if not is_lasting:
        yield error(
            "ledger",
            f"{name} is unlogged or temporary: after a crash it is empty, and outcomes would be "
            "taken for aborted that were committed",
            f"ALTER TABLE {name} SET LOGGED",
        )
    elif not rights:
        yield error(
            "ledger",
            f"The role may not use {name}, which belongs to {owner}",
            f"Have {owner} run: {make}",
        )
    else:
        yield ok("ledger", f"{name} belongs to {owner}, and the role may use it")


def check_durability(patient: Patient) -> Findings:
    """Whether what was acknowledged survives a crash."""
    settings = settings_of(patient)
    off = [
        name
        for name in ("fsync", "full_page_writes", "synchronous_commit")
        if settings.text(name) == "off"
    ]
    for name in off:
        yield warning(
            "durability",
            f"{name} is off: what a COMMIT has acknowledged can be lost in a crash",
            f"{name} = on, unless the data can be made anew",
        )
    if not off:
        yield ok("durability", "A crash of the server loses nothing that was acknowledged")
    if settings.text("restart_after_crash") == "off":
        yield note(
            "durability",
            "restart_after_crash is off: when one of its processes crashes, the server stays down "
            "until somebody starts it, as a cluster's manager does",
        )


def check_replication(patient: Patient) -> Findings:
    """Whether a failover loses what was acknowledged, or a commit waits for a standby."""
    settings = settings_of(patient)
    replicas = patient.query(REPLICAS)
    names = settings.text("synchronous_standby_names")
    if not names:
        if replicas:
            yield note(
                "replication",
                f"Standbys follow ({len(replicas)}) without being waited for: what was "
                "acknowledged last can be missing after a failover",
                "If it must not: synchronous_standby_names, or Patroni's synchronous_mode; and "
                "witness=Ledger()",
            )
        return
    states = {state for _, state in replicas}
    if not replicas or (states <= {"async", "potential"}):
        yield error(
            "replication",
            f"synchronous_standby_names is {names!r}, and no synchronous standby is connected: "
            "each COMMIT waits until one comes",
            "Start the standby, or have the server not wait for it",
        )
    elif not patient.value("SELECT pg_has_role(session_user, 'pg_read_all_stats', 'USAGE')"):
        yield note(
            "replication",
            f"COMMIT waits for {names}; the role may not see whether they are there",
            "GRANT pg_read_all_stats TO the role",
        )
    else:
        yield ok("replication", f"COMMIT waits for a standby ({names}), and one is there")


def check_prepared(patient: Patient) -> Findings:
    """What two-phase commits have left, and whether there is room for more."""
    rows = patient.query(
        "SELECT gid, database, owner,"
        " extract(epoch FROM clock_timestamp() - prepared)::float AS age FROM pg_prepared_xacts"
    )
    for gid, database, owner, age in rows:
        if age >= FORGOTTEN:
            what = f"{gid} was prepared {age:.0f} seconds ago in the database {database} by {owner}"
            yield warning(
                "prepared transactions",
                f"{what}, and not ended since: it keeps its locks, and VACUUM from its work",
                "zreconnect recover DSN DSN, with the DSNs of all databases that took part"
                if gid.startswith(PREFIX)
                else f"Find out whose it is; ROLLBACK PREPARED or COMMIT PREPARED '{gid}' ends it",
            )
    limit = int(settings_of(patient).number("max_prepared_transactions"))
    if not limit:
        yield note(
            "prepared transactions",
            "max_prepared_transactions is 0: two_phase=True is not possible",
            "If transactions span databases: max_prepared_transactions = max_connections",
        )
    elif is_nearly_all(len(rows), limit):
        yield warning(
            "prepared transactions",
            f"{len(rows)} of {limit} prepared transactions are there, so the next may be refused",
            "End those that were left over, or raise max_prepared_transactions",
        )
    else:
        yield ok("prepared transactions", f"{len(rows)} of {limit} are there")


def check_connections(patient: Patient) -> Findings:
    """Whether there is room for one that comes back."""
    settings = settings_of(patient)
    used = int(
        patient.value("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'")
    )
    limit = int(
        settings.number("max_connections")
        - settings.number("superuser_reserved_connections")
        - settings.number("reserved_connections")
    )
    remedy = "End connections that nobody uses, raise max_connections, or put a pooler in between"
    yield room_for_connections(used, limit, remedy)


CHECKS: tuple[Check, ...] = (
    check_hosts,
    check_encryption,
    check_keepalive,
    check_connect_timeout,
    check_pooler,
    check_role,
    check_writes,
    check_timeouts,
    check_orphans,
    check_fencing,
    check_monitoring,
    check_xid_witness,
    check_ledger,
    check_durability,
    check_replication,
    check_prepared,
    check_connections,
)
