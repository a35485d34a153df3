"""The sweeps of `test_exactly_once` through PgBouncer, with the ledger: nothing unknown, lost or
doubled.

The line is cut between the program and PgBouncer, which goes on, and gives the server process of a
lost transaction to others, or ends it. A crash is that of the server. But for COMMIT there are few
cuts, unless ZRECONNECT_SWEEP=full is in the environment.
"""

import unittest

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
        """Those that are in a transaction: all others wait for their next client."""
        rows = self.look(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND xact_start IS NOT NULL AND pid <> pg_backend_pid()"
        )
        return [pid for (pid,) in rows]


class PooledSweepTestCase(FullSweepTestCase):
    lane = PooledLane
    witness = Ledger()
    steps = STEPS

    @property
    def name(self):
        return f"{self.driver}, ledger"

    def test_bytes_of_a_commit(self):
        self.sweep(COMMIT)


TRANSACTION_POOL = sweep_layer("transaction")
SESSION_POOL = sweep_layer("session")


@on_pgbouncer(TRANSACTION_POOL)
class Psycopg2TransactionPoolTests(PooledSweepTestCase, unittest.TestCase):
    driver = "psycopg2"


@on_pgbouncer(TRANSACTION_POOL)
class PsycopgTransactionPoolTests(PooledSweepTestCase, unittest.TestCase):
    driver = "psycopg"
    begins_with_statement = True


@on_pgbouncer(SESSION_POOL)
class Psycopg2SessionPoolTests(PooledSweepTestCase, unittest.TestCase):
    driver = "psycopg2"


@on_pgbouncer(SESSION_POOL)
class PsycopgSessionPoolTests(PooledSweepTestCase, unittest.TestCase):
    driver = "psycopg"
    begins_with_statement = True
