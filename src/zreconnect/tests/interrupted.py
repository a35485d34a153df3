"""For tests of interrupts: programs, their calls, and the databases as somebody else sees them."""

import contextlib
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import psycopg2
import pymysql
import transaction

import zreconnect
from zreconnect import (
    CommitOutcomeUnknown,
    ConnectionDescriptor,
    ReconnectTimeout,
    RetryPolicy,
    initZopeless,
)
from zreconnect.testing import PortForward

POLICY = RetryPolicy(timeout=5, initial=0.01, maximum=0.05)
ERRORS = psycopg2.Error, psycopg.Error, pymysql.Error
# For a server that does not come back.
BRIEF_POLICY = RetryPolicy(timeout=0.02, initial=0.01, maximum=0.01)


# The databases, as somebody else sees them


class Database:
    """The table ``unit``, with a number for each trial; and what is under way."""

    def __init__(self, dsn, observer):
        self.dsn = dsn
        self._observer = observer
        self.ask("DROP TABLE IF EXISTS unit")
        self.ask("CREATE TABLE unit (trial integer, name varchar(20))")
        self.ask("CREATE INDEX unit_trial ON unit (trial)")

    def ask(self, statement):
        with closing(self._observer.cursor()) as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def units(self, trial):
        return sorted(n for (n,) in self.ask(f"SELECT name FROM unit WHERE trial = {trial}"))

    def all_units(self):
        found = {}
        for trial, name in self.ask("SELECT trial, name FROM unit ORDER BY trial, name"):
            found.setdefault(trial, []).append(name)
        return found

    def close(self):
        self.tidy_up()
        self._observer.close()

    def under_way(self):
        """What keeps the database from being at rest."""
        raise NotImplementedError

    def tidy_up(self):
        """End what a trial that failed has left."""


class Postgres(Database):
    def __init__(self, server):
        observer = psycopg2.connect(server.dsn())
        observer.autocommit = True
        super().__init__(server.dsn(), observer)
        self.server = server

    def under_way(self):
        return self.ask(
            "SELECT state, query FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND xact_start IS NOT NULL AND pid <> pg_backend_pid()"
            " UNION ALL SELECT 'prepared', gid FROM pg_prepared_xacts"
        )

    def tidy_up(self):
        self.ask(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        for (gid,) in self.ask("SELECT gid FROM pg_prepared_xacts"):
            self.ask(f"ROLLBACK PREPARED '{gid}'")


class MariaDB(Database):
    def __init__(self, server):
        observer = pymysql.connect(
            host=server.host,
            port=server.port,
            user=server.user,
            password=server.password,
            database="test",
            autocommit=True,
        )
        super().__init__(server.dsn(), observer)
        self.server = server

    def under_way(self):
        # Unlike information_schema.innodb_trx it is never one that was asked for before.
        ((_, _, status),) = self.ask("SHOW ENGINE INNODB STATUS")
        return re.findall(r"^---TRANSACTION \d+, ACTIVE.*", status, re.MULTILINE)

    def tidy_up(self):
        for (session,) in self.ask(
            "SELECT id FROM information_schema.processlist WHERE id <> CONNECTION_ID()"
            " AND command NOT IN ('Daemon', 'Binlog Dump')"
        ):
            with contextlib.suppress(pymysql.Error):
                self.ask(f"KILL CONNECTION {session}")


class Sqlite(Database):
    def __init__(self, directory):
        path = Path(directory, "job.db")
        super().__init__(f"sqlite:///{path}", sqlite3.connect(path, isolation_level=None))
        self.ask("PRAGMA synchronous = OFF")
        self.ask("PRAGMA busy_timeout = 0")

    def under_way(self):
        try:
            self.ask("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            return [str(error)]
        self.ask("ROLLBACK")
        return []


# The programs


class Program:
    """What uses a connection: ``trial`` is the number of its present unit of work."""

    two_phase = False
    # How many rows a unit of work has: one for each connection.
    rows = 1

    def __init__(self, database, driver, witness):
        self.database = database
        self.driver = driver
        self.witness = witness
        self.trial = 0
        self.open()

    def open(self):
        self.connection = self._connect(self.witness)

    def _connect(self, witness):
        return zreconnect.connect(
            self.database.dsn, driver=self.driver, policy=POLICY, witness=witness
        )

    def execute(self, statement):
        cursor = self.connection.cursor()
        cursor.execute(statement)
        return cursor

    def insert(self, name="unit"):
        return self.execute(f"INSERT INTO unit VALUES ({self.trial}, '{name}')").rowcount

    def begin(self):
        self.connection.begin()

    def commit(self):
        self.connection.commit()

    def undo(self):
        if self.connection is not None:
            self.connection.rollback()

    def state(self):
        return "idle" if self.connection is None else self.connection.state

    def work(self, name):
        """A whole unit of work."""
        if self.connection is None:
            self.open()
        self.begin()
        self.insert(name)
        self.commit()

    def work_on_another(self):
        """The same, on a new connection, as "new"."""
        with closing(self._connect(None)) as connection, connection.transaction() as cursor:
            cursor.execute(f"INSERT INTO unit VALUES ({self.trial}, 'new')")

    def close(self):
        if self.connection is not None:
            self.connection.close()


class ManagedProgram(Program):
    """Its connection is part of a transaction manager's transaction."""

    def open(self):
        self.descriptor = self._descriptor()

    def _descriptor(self):
        return ConnectionDescriptor(
            self.database.dsn,
            driver=self.driver,
            policy=POLICY,
            witness=self.witness,
            two_phase=self.two_phase,
        )

    @property
    def connection(self):
        return self.descriptor.connection()

    def begin(self):
        transaction.begin()

    def commit(self):
        transaction.commit()

    def undo(self):
        transaction.abort()

    def close(self):
        transaction.abort()
        self.descriptor.close()


class ZopelessProgram(ManagedProgram):
    def open(self):
        self.manager = initZopeless(
            self.database.dsn,
            driver=self.driver,
            timeout=5,
            implicitBegin=False,
            witness=self.witness,
        )

    @property
    def connection(self):
        return self.manager.connection()

    def begin(self):
        self.manager.begin()

    def commit(self):
        self.manager.commit()

    def undo(self):
        self.manager.abort()

    def close(self):
        self.manager.uninstall()


class Refusal(Exception):
    """Another data manager's vote."""


class Refuser:
    """The data manager that votes last, and refuses."""

    transaction_manager = transaction.manager

    def sortKey(self):
        return "~~"

    def tpc_vote(self, transaction):
        raise Refusal

    def abort(self, transaction):
        pass

    tpc_begin = commit = tpc_finish = tpc_abort = abort


class TwoPhaseProgram(ManagedProgram):
    """Two connections are part of the transaction."""

    two_phase = True
    rows = 2

    def open(self):
        super().open()
        self.second = self._descriptor()

    def insert(self, name="unit"):
        cursor = self.second.connection().cursor()
        cursor.execute(f"INSERT INTO unit VALUES ({self.trial}, '{name}')")
        super().insert(name)

    def state(self):
        states = {super().state(), self.second.connection().state}
        return " and ".join(sorted(states))

    def commit_in_vain(self):
        try:
            transaction.commit()
        except Refusal:
            return "refused"

    def close(self):
        super().close()
        self.second.close()


class DoubtingProgram(Program):
    """Its server has committed, and cannot be reached any more until the rollback."""

    def __init__(self, database, driver, witness):
        self.forward = PortForward(database.server.host, database.server.port)
        self.forward.start()
        super().__init__(database, driver, witness)

    def _connect(self, witness):
        return zreconnect.connect(
            self.database.server.dsn(host="127.0.0.1", port=self.forward.port),
            driver=self.driver,
            policy=POLICY,
            witness=witness,
        )

    def begin_in_vain(self):
        self.begin()
        self.insert()
        self.connection.work.patience.policy = BRIEF_POLICY
        self.forward.cut_at_commit(then=self.forward.refuse)

    def commit_in_doubt(self):
        try:
            self.commit()
        except CommitOutcomeUnknown as unknown:
            if isinstance(unknown.__cause__, (ReconnectTimeout, *ERRORS)):
                return "unknown"
            # An interrupt's.
            raise

    def undo(self):
        try:
            super().undo()
        finally:
            self.connection.work.patience.policy = POLICY
            self.forward.cancel_cut()
            self.forward.accept()

    def close(self):
        super().close()
        self.forward.stop()


# The calls that are interrupted


@dataclass(frozen=True)
class Call:
    """call: what is interrupted, after ``before``, which is not.

    commits: whether a commit is part of it.
    closes: whether the connection is closed.
    """

    name: str
    call: Callable[[Any], Any]
    before: Callable[[Any], Any] = lambda program: None
    commits: bool = False
    closes: bool = False


def in_new_connection(program):
    program.connection.close()
    program.connection = None


def connect(program):
    program.open()
    program.begin()
    return program.state()


def begin(program):
    program.begin()
    return program.state()


def select(program):
    program.cursor = program.execute("SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3")


def fetch(program):
    cursor = program.cursor
    return [cursor.fetchone(), *cursor.fetchmany(1), *cursor, *cursor.fetchall()]


def begin_and_insert(program):
    program.begin()
    program.insert()


def insert_in_vain(program):
    program.insert()
    transaction.get().join(Refuser())


def insert_in_blocks(program):
    with program.connection.transaction():
        with program.connection.transaction():
            program.insert()
        with program.connection.transaction(force_rollback=True):
            program.insert("never")


CONNECT = Call("connect", connect, in_new_connection)
BEGIN = Call("begin", begin)
FIRST_STATEMENT = Call("first statement", Program.insert)
STATEMENT = Call("statement", lambda program: program.insert(), lambda program: program.insert())
FETCH = Call("fetch", fetch, select)
COMMIT = Call("commit", lambda program: program.commit(), lambda program: program.insert(), True)
ROLLBACK = Call("rollback", lambda program: program.undo(), lambda program: program.insert())
RUN = Call("run", lambda program: program.connection.run(program.insert), commits=True)
BLOCKS = Call("blocks", insert_in_blocks, commits=True)
CLOSE = Call("close", lambda program: program.connection.close(), Program.insert, closes=True)
CLOSE_IDLE = Call("close, idle", lambda program: program.connection.close(), closes=True)
TRANSACTION_COMMIT = Call("transaction.commit", COMMIT.call, COMMIT.before, True)
TRANSACTION_ABORT = Call("transaction.abort", ROLLBACK.call, ROLLBACK.before)
ZOPELESS_BEGIN = Call("ztm.begin", begin)
ZOPELESS_COMMIT = Call("ztm.commit", COMMIT.call, begin_and_insert, True)
ZOPELESS_ABORT = Call("ztm.abort", ROLLBACK.call, begin_and_insert)
ZOPELESS_RUN = Call("ztm.run", lambda program: program.manager.run(program.insert), commits=True)
PREPARE_AND_FINISH = Call("prepare and finish", COMMIT.call, COMMIT.before, True)
PREPARE_AND_ABORT = Call("prepare and abort", TwoPhaseProgram.commit_in_vain, insert_in_vain)
COMMIT_IN_DOUBT = Call(
    "commit in doubt",
    lambda program: program.commit_in_doubt(),
    lambda program: program.begin_in_vain(),
    commits=True,
)
CALLS = (
    *(CONNECT, BEGIN, FIRST_STATEMENT, STATEMENT, FETCH, COMMIT, ROLLBACK, RUN, BLOCKS),
    *(CLOSE, CLOSE_IDLE),
)
