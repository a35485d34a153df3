"""The cut at every byte of a transaction, on MariaDB, with the ledger: nothing lost, nothing twice.

A crash is that of the server: its process is killed at COMMIT, and started again.
"""

import unittest

import pymysql

from zreconnect import Ledger
from zreconnect.testing.layers import MariaDBLayer, PortForwardLayer
from zreconnect.tests.base import needs_mysqlclient, on_mariadb
from zreconnect.tests.test_exactly_once import (
    COMMIT,
    FULL,
    Lane,
    SweepLayer,
    SweepTestCase,
)

# Starting the server again takes a second.
CRASH_STEP = 1 if FULL else 12
MARIADB_SWEEP_LAYER = SweepLayer(
    *(
        PortForwardLayer(MariaDBLayer(f"MariaDBSweep{n}Layer"), f"MariaDBSweep{n}ForwardLayer")
        for n in (1, 2)
    )
)
MARIADB_SWEEP_LAYER.__name__ = "MariaDBSweepLayer"


class MysqlLane(Lane):
    module = pymysql

    def make_tables(self):
        self.server.query("CREATE TABLE IF NOT EXISTS item (number int) ENGINE=InnoDB")

    def crash(self, raw):
        def kill_and_start():
            self.server.kill_all()
            self.server.start()

        return kill_and_start

    def orphans(self):
        mine = self.connection.driver_connection.thread_id()
        rows = self.look(
            "SELECT id FROM information_schema.processlist"
            " WHERE command NOT IN ('Daemon', 'Binlog Dump') AND id NOT IN (%s, CONNECTION_ID())",
            mine,
        )
        return [number for (number,) in rows]


class PymysqlLane(MysqlLane):
    driver = "pymysql"


class MysqlclientLane(MysqlLane):
    driver = "mysqlclient"


class MysqlSweepTestCase(SweepTestCase):
    witness = Ledger()

    @property
    def name(self):
        return self.lane.driver

    @property
    def driver(self):
        return self.lane.driver

    def test_bytes_of_a_commit_and_a_crash(self):
        self.sweep(COMMIT, crash=True, step=CRASH_STEP)


@on_mariadb(MARIADB_SWEEP_LAYER)
class PymysqlSweepTests(MysqlSweepTestCase, unittest.TestCase):
    lane = PymysqlLane


@on_mariadb(MARIADB_SWEEP_LAYER)
@needs_mysqlclient
class MysqlclientSweepTests(MysqlSweepTestCase, unittest.TestCase):
    lane = MysqlclientLane
