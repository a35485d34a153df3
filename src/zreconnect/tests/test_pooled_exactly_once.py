"""The sweeps of `test_exactly_once` through PgBouncer: nothing lost or doubled, and with the ledger
nothing unknown; and ten innocent clients beside it lose nothing.

The line is cut between the program and PgBouncer, which goes on, and gives the server process of a
lost transaction to others, or ends it: to one of the innocent, most often, before it is asked what
became of the transaction. A crash is that of the server, and ends the innocents' sessions, too, so
that there are none. But for COMMIT there are few cuts, unless ZRECONNECT_SWEEP=full is in the
environment.
"""

import threading
import unittest
from contextlib import ExitStack, closing

import psycopg2

from zreconnect import Ledger
from zreconnect.testing.layers import PgBouncerLayer, PortForwardLayer, PostgresLayer
from zreconnect.tests.base import on_pgbouncer
from zreconnect.tests.test_exactly_once import (
    AFTER_LOST_ANSWER,
    AFTER_LOST_COMMIT,
    COMMIT,
    NOBODY,
    SETTINGS,
    TRANSACTION,
    FullSweepTestCase,
    Lane,
    SweepLayer,
    SweepTestCase,
)

STEPS = {
    (TRANSACTION, False): 24,
    # Every byte, by FIN and by RST in turn.
    (COMMIT, False): 2,
    (TRANSACTION, True): 180,
    (COMMIT, True): 24,
    (AFTER_LOST_ANSWER, False): 384,
    (AFTER_LOST_COMMIT, False): 384,
}
XID_STEPS = {**STEPS, (COMMIT, False): 8}
SERVERS = [PostgresLayer(f"PooledSweep{n}Layer", SETTINGS) for n in (1, 2)]


def sweep_layer(pool_mode):
    name = f"{pool_mode.capitalize()}PoolSweep"
    poolers = [
        # Checking a password by SCRAM takes half the time of connecting.
        PgBouncerLayer(server, pool_mode, f"{name}{n}PgBouncerLayer", {"auth_type": "md5"})
        for n, server in enumerate(SERVERS, 1)
    ]
    lines = [
        PortForwardLayer(pooler, f"{name}{n}ForwardLayer") for n, pooler in enumerate(poolers, 1)
    ]
    layer = SweepLayer(*lines)
    layer.__name__ = f"{name}Layer"
    return layer


class Innocents:
    """Clients of a pool who do nothing but their work; none of their transactions may be ended.

    pooler: an `EmbeddedPgBouncer`, or what has its `dsn()` and `server`.
    """

    name = "innocent"
    number = 10
    # Seconds in the midst of a transaction, and from one to the next.
    inside, between = 0.03, 0.07

    def __init__(self, pooler):
        self.pooler = pooler
        self.has_own_process = getattr(pooler, "pool_mode", "session") == "session"
        self.stopped = threading.Event()
        self.errors = []
        self.counts = [0] * self.number

    def __enter__(self):
        query = self.pooler.server.query
        query("DROP TABLE IF EXISTS innocent")
        query("CREATE TABLE innocent (client int PRIMARY KEY, times int) WITH (fillfactor = 50)")
        query("INSERT INTO innocent SELECT n, 0 FROM generate_series(0, %s) n", self.number - 1)
        self.threads = [
            threading.Thread(target=self.work, args=(client,)) for client in range(self.number)
        ]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.stopped.set()
        for thread in self.threads:
            thread.join()
        if self.errors:
            raise AssertionError(f"what innocent clients met: {self.errors}")
        rows = self.pooler.server.query("SELECT times FROM innocent ORDER BY client")
        if [times for (times,) in rows] != self.counts or not all(self.counts):
            raise AssertionError(f"innocent clients have committed {self.counts}, there is {rows}")

    def work(self, client):
        try:
            while not self.stopped.is_set():
                self.connected(client)
        except Exception as error:
            self.errors.append(error)

    def connected(self, client):
        with closing(psycopg2.connect(self.pooler.dsn(), application_name=self.name)) as connection:
            while not self.stopped.wait(self.between):
                with connection, connection.cursor() as cursor:
                    cursor.execute(
                        "UPDATE innocent SET times = times + 1 WHERE client = %s RETURNING times",
                        (client,),
                    )
                    (times,) = cursor.fetchone()
                    self.stopped.wait(self.inside)
                    cursor.execute("SELECT times FROM innocent WHERE client = %s", (client,))
                    assert cursor.fetchone() == (times,)
                self.counts[client] += 1
                if self.has_own_process:
                    # It is others' only when that ends.
                    break


class PooledLane(Lane):
    def __init__(self, line, *args):
        super().__init__(line, *args)
        self.server = line.server.server

    def crash(self, raw):
        # What the program's connection calls its server process is a number of PgBouncer's.
        def crash():
            for pid in self.sessions_besides(NOBODY):
                self.server.kill_backend(pid)

        return crash

    def sessions_besides(self, mine):
        """Those that are in a transaction, but for the innocents': all others wait for their next
        client."""
        rows = self.look(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND xact_start IS NOT NULL AND pid <> pg_backend_pid() AND application_name <> %s",
            Innocents.name,
        )
        return [pid for (pid,) in rows]


class PooledSweepTestCase(SweepTestCase):
    lane = PooledLane
    steps = STEPS

    @property
    def name(self):
        kind = "ledger" if isinstance(self.witness, Ledger) else self.witness
        return f"{self.driver}, {kind}"

    def sweep(self, part, crash=False):
        with ExitStack() as stack:
            for line in () if crash else self.layer.lines:
                stack.enter_context(Innocents(line.server))
            super().sweep(part, crash)

    def test_bytes_of_a_commit(self):
        self.sweep(COMMIT)


class LedgerTestCase(PooledSweepTestCase, FullSweepTestCase):
    witness = Ledger()


class XidTestCase(PooledSweepTestCase):
    witness = "xid"
    steps = XID_STEPS


TRANSACTION_POOL = sweep_layer("transaction")
SESSION_POOL = sweep_layer("session")


@on_pgbouncer(TRANSACTION_POOL)
class Psycopg2TransactionPoolTests(LedgerTestCase, unittest.TestCase):
    driver = "psycopg2"


@on_pgbouncer(TRANSACTION_POOL)
class PsycopgTransactionPoolTests(LedgerTestCase, unittest.TestCase):
    driver = "psycopg"
    begins_with_statement = True


@on_pgbouncer(TRANSACTION_POOL)
class Psycopg2TransactionPoolXidTests(XidTestCase, unittest.TestCase):
    driver = "psycopg2"


@on_pgbouncer(TRANSACTION_POOL)
class PsycopgTransactionPoolXidTests(XidTestCase, unittest.TestCase):
    driver = "psycopg"
    begins_with_statement = True


@on_pgbouncer(SESSION_POOL)
class Psycopg2SessionPoolTests(LedgerTestCase, unittest.TestCase):
    driver = "psycopg2"


@on_pgbouncer(SESSION_POOL)
class PsycopgSessionPoolTests(LedgerTestCase, unittest.TestCase):
    driver = "psycopg"
    begins_with_statement = True
