"""A replica of MariaDB's takes the place of the primary: with what it has received, or without."""

import contextlib

import zope.event

from zreconnect import CommitOutcomeUnknown, Ledger, ReconnectingConnection
from zreconnect.events import CommitLookedUp, ConnectionAttemptFailed, HistoryChanged
from zreconnect.testing import EmbeddedMariaDB
from zreconnect.testing.layers import MariaDBLayer, PortForwardLayer
from zreconnect.tests.base import LineTestCase, needs_mysqlclient, on_mariadb, wait_until

SETTINGS = {"log_bin": "binlog", "server_id": 1}
LAYER = PortForwardLayer(
    MariaDBLayer("MariaDBPrimaryLayer", SETTINGS), "MariaDBPrimaryForwardLayer"
)


class ReplicaTests:
    def setUp(self):
        self.primary, self.forward = self.layer.server, self.layer.forward
        self.addCleanup(self.forward.accept)
        self.replica = EmbeddedMariaDB(settings={**SETTINGS, "server_id": 2})
        self.addCleanup(self.replica.stop)
        self.replica.start()
        self.primary.query("RESET MASTER")
        self.replica.query(
            f"CHANGE MASTER TO MASTER_HOST = '{self.primary.host}', MASTER_USER = 'root',"
            f" MASTER_PORT = {self.primary.port}, MASTER_PASSWORD = '{self.primary.password}',"
            " MASTER_SSL = 0, MASTER_USE_GTID = slave_pos"
        )
        self.replica.query("START SLAVE")
        self.primary.query("CREATE OR REPLACE TABLE test.item (name text)")
        self.primary.query("DROP TABLE IF EXISTS test.zreconnect_ledger")

    def connect(self):
        """Two connections, which find the primary first. One has been in use."""
        connections = [
            ReconnectingConnection(self.open, driver=self.driver, witness=Ledger())
            for _ in range(2)
        ]
        self.module = connections[0].work.link.driver.module
        for connection in connections:
            self.addCleanup(connection.close)
        self.insert(connections[0])
        return connections

    def open(self):
        for server, port in ((self.primary, self.forward.port), (self.replica, self.replica.port)):
            with contextlib.suppress(self.module.OperationalError):
                return self.module.connect(
                    host=server.host,
                    port=port,
                    user="root",
                    password=server.password,
                    database="test",
                )
        raise self.module.OperationalError(2003, "neither of them answers")

    def insert(self, connection):
        connection.run(lambda: connection.cursor().execute("INSERT INTO item VALUES ('one')"))

    def catch_up(self):
        """Wait until the replica has all that is committed by now."""
        ((position,),) = self.primary.query("SELECT @@gtid_binlog_pos")
        self.assertEqual(self.replica.query(f"SELECT MASTER_GTID_WAIT('{position}', 60)"), [(0,)])

    def lose_the_primary(self):
        self.forward.refuse()
        self.forward.drop()

    def told(self, connection):
        with self.events() as events:
            self.insert(connection)
        return [event for event in events if isinstance(event, HistoryChanged)]

    def test_what_is_missing_is_told(self):
        old, new = self.connect()
        self.catch_up()
        self.replica.query("STOP SLAVE")
        for connection in (old, new):
            self.insert(connection)
        self.lose_the_primary()
        for connection, there in ((old, "number 1"), (new, "none")):
            with self.subTest(there):
                (change,) = self.told(connection)
                self.assertTrue(change.is_missing)
                self.assertIn("server_id 1, and is server_id 2 now", change.evidence)
                self.assertIn(f"has {there}", change.evidence)
                self.assertEqual(self.told(connection), [])

    def test_a_replica_that_has_everything(self):
        connections = self.connect()
        self.insert(connections[1])
        self.catch_up()
        self.lose_the_primary()
        for connection in connections:
            (change,) = self.told(connection)
            self.assertIs(change.is_missing, False)

    def test_what_has_come_over_is_committed(self):
        self.commit(self.catch_up)

    def test_what_has_not_may_be_on_its_way(self):
        with self.assertRaises(CommitOutcomeUnknown):
            self.commit(lambda: None, is_cut_off=True)

    def commit(self, meanwhile, is_cut_off=False):
        """COMMIT loses its answer, and the replica takes no writes when it is met.

        meanwhile: called when it is executed. is_cut_off: whether the replica gets nothing of it.
        """
        connection = self.connect()[0]
        self.catch_up()
        self.replica.query("SET GLOBAL read_only = 1")
        if is_cut_off:
            self.replica.query("STOP SLAVE")
        met = []

        def promote(event):
            if isinstance(event, ConnectionAttemptFailed) and "takes no writes" in str(event):
                met.append(event)
                self.replica.query("SET GLOBAL read_only = 0")

        def lose():
            wait_until(lambda: self.primary.query("SELECT count(*) FROM test.item") == [(2,)])
            meanwhile()
            self.forward.refuse()

        connection.begin()
        connection.cursor().execute("INSERT INTO item VALUES ('two')")
        self.forward.cut("to_client", 0, then=lose)
        zope.event.subscribers.append(promote)
        try:
            with self.events() as events:
                connection.commit()
        finally:
            zope.event.subscribers.remove(promote)
            self.assertEqual(len(met), 1)
            self.assertTrue(any(isinstance(event, CommitLookedUp) for event in events))


@on_mariadb(LAYER)
class PymysqlTests(ReplicaTests, LineTestCase):
    driver = "pymysql"


@on_mariadb(LAYER)
@needs_mysqlclient
class MysqlclientTests(ReplicaTests, LineTestCase):
    driver = "mysqlclient"
