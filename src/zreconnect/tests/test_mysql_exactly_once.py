"""The sweeps of `test_exactly_once` on MariaDB, with the ledger: nothing unknown, lost or doubled.

A crash is that of the server: its process is killed, and started again, which takes a second. So
there are fewer cuts, unless ZRECONNECT_SWEEP=full is in the environment.
"""

import unittest

import pymysql

from zreconnect import Ledger
from zreconnect.testing.layers import MariaDBLayer, PortForwardLayer
from zreconnect.tests.base import needs_mysqlclient, on_mariadb
from zreconnect.tests.test_exactly_once import (
    AFTER_LOST_ANSWER,
    AFTER_LOST_COMMIT,
    COMMIT,
    TRANSACTION,
    FullSweepTestCase,
    Lane,
    SweepLayer,
)

STEPS = {
    (TRANSACTION, False): 6,
    (TRANSACTION, True): 90,
    (COMMIT, True): 24,
    (AFTER_LOST_ANSWER, False): 48,
    (AFTER_LOST_COMMIT, False): 48,
}
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
        return self.sessions_besides(self.connection.driver_connection.thread_id())

    def sessions_besides(self, mine):
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


class MysqlSweepTestCase(FullSweepTestCase):
    witness = Ledger()
    steps = STEPS

    @property
    def name(self):
        return self.lane.driver

    @property
    def driver(self):
        return self.lane.driver


@on_mariadb(MARIADB_SWEEP_LAYER)
class PymysqlSweepTests(MysqlSweepTestCase, unittest.TestCase):
    lane = PymysqlLane


@on_mariadb(MARIADB_SWEEP_LAYER)
@needs_mysqlclient
class MysqlclientSweepTests(MysqlSweepTestCase, unittest.TestCase):
    lane = MysqlclientLane
