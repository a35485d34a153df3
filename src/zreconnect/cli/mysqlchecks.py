"""What an examination looks at in MySQL and MariaDB."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from zreconnect.cli.findings import Check, Findings, Patient, error, note, ok, warning
from zreconnect.cli.linechecks import (
    check_connect_timeout,
    check_hosts,
    check_keepalive,
    check_tls,
    room_for_connections,
)
from zreconnect.drivers.base import Condition, SessionSettings
from zreconnect.exceptions import one_line

# In seconds: a transaction that pauses for so long need not be a mistake.
USUAL_PAUSE = 60.0
# In bytes.
SMALL_PACKET = 4 * 1024 * 1024
# How many tables are named.
NAMED_TABLES = 5
TLS_MODES: Mapping[str, object] = {
    "required": ("REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY"),
    "verified": ("VERIFY_IDENTITY",),
    "best": "ssl_mode=VERIFY_IDENTITY, with ssl_ca",
}
ON = ("ON", "1")


def variables_of(patient: Patient) -> dict[str, str]:
    """The server's variables as they are for the session."""
    return dict(patient.query("SHOW VARIABLES"))


def describe(patient: Patient) -> str:
    """What kind of server it is."""
    version = patient.value("SELECT VERSION()")
    return version if "MariaDB" in version else f"MySQL {version}"


def check_encryption(patient: Patient) -> Findings:
    """TLS."""
    ((_, cipher),) = patient.query("SHOW STATUS LIKE 'Ssl_cipher'")
    mode = patient.parameters.get("ssl_mode", "PREFERRED")
    return check_tls(patient, bool(cipher), mode, TLS_MODES)


def check_writes(patient: Patient) -> Findings:
    """Whether the server takes writes."""
    if patient.driver.takes_writes(patient.raw):
        yield ok("writes", "The server takes writes")
    else:
        yield warning(
            "writes",
            "The server is read-only, as a replica is: it refuses to write, and keeps no ledger",
            "Name the server that takes writes",
        )


def check_timeouts(patient: Patient) -> Findings:
    """When the server ends a session or a statement by itself."""
    variables = variables_of(patient)
    limits = {
        name: float(variables.get(name) or 0)
        for name in ("wait_timeout", "idle_transaction_timeout", "idle_write_transaction_timeout")
    }
    short = {name: limit for name, limit in limits.items() if 0 < limit < USUAL_PAUSE}
    for name, limit in short.items():
        yield warning(
            name,
            f"A transaction that pauses for {limit:g} seconds is lost, also if the program works",
            f"Raise {name}, or do no work between the statements of a transaction",
        )
    if not short:
        yield note(
            "wait_timeout",
            "A client that is gone without a word keeps its locks for "
            f"{min(filter(None, limits.values())):g} seconds. zreconnect ends the sessions that it "
            "has lost itself, when it comes back",
        )
    seconds = float(variables.get("max_statement_time") or 0)
    milliseconds = float(variables.get("max_execution_time") or 0)
    if limit := seconds or milliseconds / 1000:
        yield note(
            "max_statement_time",
            f"The server ends a statement that takes longer than {limit:g} seconds, with an error "
            "that nothing runs again",
        )
    if (variables.get("innodb_rollback_on_timeout") or "OFF") not in ON:
        yield ok(
            "innodb_lock_wait_timeout",
            f"Who waits for a lock for {variables.get('innodb_lock_wait_timeout')} seconds gets an "
            "error, of which zreconnect knows what the server has rolled back",
        )


def check_fencing(patient: Patient) -> Findings:
    """Whether the orphan of a lost session can be told from others, and ended."""
    if patient.driver.identify(patient.raw).start is None:
        yield warning(
            "fencing",
            "The server gives no named locks, by which zreconnect knows its own lost session: that "
            "one is waited for until the server notices",
            "Set a short wait_timeout, and allow GET_LOCK() (wsrep_mode, pxc_strict_mode)",
        )
        return
    # Everybody may end sessions of his own account.
    yield ok("fencing", "The role may end its own sessions that were lost")


def check_ledger(patient: Patient) -> Findings:
    """Whether there is one, and the role can use it. What is tried is rolled back."""
    driver, raw, table = patient.driver, patient.raw, patient.table
    make = f"zreconnect ledger --table {table} DSN"
    identifier = str(uuid.uuid4())
    try:
        driver.begin(raw, SessionSettings())
        try:
            patient.query(f"INSERT INTO {table} (id) VALUES (%s)", identifier)
            patient.query(f"UPDATE {table} SET number = 1, used = now() WHERE id = %s", identifier)
            patient.query(f"SELECT number FROM {table} WHERE id = %s FOR UPDATE", identifier)
            patient.query(f"DELETE FROM {table} WHERE id = %s", identifier)
        finally:
            driver.rollback(raw)
    except driver.module.Error as refusal:
        condition = driver.condition(refusal)
        if condition is Condition.UNDEFINED_TABLE:
            yield note(
                "ledger",
                f"There is no {table}. Without one, a COMMIT whose answer is lost stays unknown: "
                "transactions have no ids that could be looked up",
                f"Use witness=Ledger(); if the role may not make tables: {make}",
            )
        elif condition is Condition.INSUFFICIENT_PRIVILEGE:
            yield error(
                "ledger",
                f"The role may not use {table}: {one_line(refusal)}",
                f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO the role",
            )
        else:
            raise
        return
    database, _, name = f"{table}".rpartition(".")
    ((engine,),) = patient.query(
        "SELECT engine FROM information_schema.tables"
        " WHERE table_schema = coalesce(%s, DATABASE()) AND table_name = %s",
        database or None,
        name,
    )
    if str(engine).lower() == "innodb":
        yield ok("ledger", f"{table} is there, and the role may use it")
    else:
        yield error(
            "ledger",
            f"{table} is a table of {engine}, which does not take part in transactions: outcomes "
            "would be taken for committed that were not",
            f"ALTER TABLE {table} ENGINE=InnoDB",
        )


def check_engines(patient: Patient) -> Findings:
    """Whether all tables take part in transactions."""
    names = [
        name
        for (name,) in patient.query(
            "SELECT table_name FROM information_schema.tables JOIN information_schema.engines"
            " ON tables.engine = engines.engine WHERE table_schema = DATABASE()"
            " AND table_type = 'BASE TABLE' AND transactions = 'NO' ORDER BY table_name"
        )
    ]
    if names:
        more = f" and {len(names) - NAMED_TABLES} more" if len(names) > NAMED_TABLES else ""
        yield warning(
            "engines",
            f"{', '.join(names[:NAMED_TABLES])}{more}: what is written there is not rolled back "
            "when a transaction is lost, and is there twice when that is run again",
            "ALTER TABLE ... ENGINE=InnoDB",
        )
    else:
        yield ok("engines", "All tables of the database take part in transactions")


def check_durability(patient: Patient) -> Findings:
    """Whether what was acknowledged survives a crash."""
    variables = variables_of(patient)
    problems = []
    if variables.get("innodb_flush_log_at_trx_commit") not in ("1", "3"):
        problems.append(("innodb_flush_log_at_trx_commit", "what a COMMIT has acknowledged"))
    if variables.get("log_bin") in ON and variables.get("sync_binlog") == "0":
        problems.append(("sync_binlog", "what replicas have got, or the other way round,"))
    for name, what in problems:
        yield warning(
            "durability",
            f"{name} is {variables.get(name)}: {what} can be lost in a crash",
            f"{name} = 1, unless the data can be made anew",
        )
    if not problems:
        yield ok("durability", "A crash of the server loses nothing that was acknowledged")


def check_packets(patient: Patient) -> Findings:
    """How long a statement may be."""
    limit = int(variables_of(patient)["max_allowed_packet"])
    if limit < SMALL_PACKET:
        yield note(
            "max_allowed_packet",
            f"A statement of more than {limit:,} bytes is refused",
            "Raise max_allowed_packet if rows can be large",
        )


def check_cluster(patient: Patient) -> Findings:
    """Whether a node of Galera's answers queries, and whether replicas can lag behind."""
    variables = variables_of(patient)
    if variables.get("wsrep_on") not in ON:
        if variables.get("log_bin") in ON:
            yield note(
                "replication",
                "Replicas follow without being waited for, if there are any: what was acknowledged "
                "last can be missing after a failover, or arrive after it",
                "If it must not: Galera or group replication",
            )
        return
    status = dict(patient.query("SHOW STATUS LIKE 'wsrep_%'"))
    if status.get("wsrep_ready") in ON and status.get("wsrep_cluster_status") == "Primary":
        yield ok("cluster", f"{status.get('wsrep_cluster_size')} nodes have the majority")
    else:
        yield error(
            "cluster",
            "The node is not in the primary component, and refuses queries",
            "See whether the other nodes are up, and reach this one",
        )


def check_prepared(patient: Patient) -> Findings:
    """What two-phase commits of other programs have left; zreconnect makes none here."""
    rows = patient.query("XA RECOVER")
    if rows:
        yield warning(
            "prepared transactions",
            f"{len(rows)} transactions are prepared, and keep their locks until somebody ends them",
            "If nobody is about to: XA RECOVER shows them, XA ROLLBACK or XA COMMIT ends one",
        )
    else:
        yield ok("prepared transactions", "There are none")


def check_connections(patient: Patient) -> Findings:
    """Whether there is room for one that comes back."""
    ((_, used),) = patient.query("SHOW GLOBAL STATUS LIKE 'Threads_connected'")
    limit = int(variables_of(patient)["max_connections"])
    remedy = "End connections that nobody uses, or raise max_connections"
    yield room_for_connections(int(used), limit, remedy)


CHECKS: tuple[Check, ...] = (
    check_hosts,
    check_encryption,
    check_keepalive,
    check_connect_timeout,
    check_writes,
    check_timeouts,
    check_fencing,
    check_ledger,
    check_engines,
    check_durability,
    check_packets,
    check_cluster,
    check_prepared,
    check_connections,
)
