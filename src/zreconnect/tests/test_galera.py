"""A Galera cluster: a node that refuses, is lost, or has another opinion at COMMIT."""

import contextlib
import threading

import zope.event

from zreconnect import DisconnectionError, Ledger, ReconnectingConnection
from zreconnect.events import CommitLookedUp, ConnectionAttemptFailed, HistoryChanged
from zreconnect.testing import PortForward
from zreconnect.testing.layers import GaleraLayer
from zreconnect.tests.base import LineTestCase, needs_mysqlclient, on_galera, wait_until

LAYER = GaleraLayer()


class GaleraTests:
    def setUp(self):
        self.cluster = self.layer.server
        self.one, self.two = self.cluster.nodes
        self.forward = PortForward(self.one.host, self.one.port)
        self.forward.start()
        self.addCleanup(self.forward.stop)
        self.cluster.query("CREATE OR REPLACE TABLE test.item (name varchar(9), number int)")
        self.cluster.query("INSERT INTO test.item VALUES ('counter', 0)")
        self.cluster.query("DROP TABLE IF EXISTS test.zreconnect_ledger")

    def connect(self, *ports):
        """A connection to the first of the ports of nodes where there is one."""
        ports = ports or (self.forward.port, self.two.port)

        def open_first():
            for port in ports:
                with contextlib.suppress(self.module.OperationalError):
                    return self.open(port)
            raise self.module.OperationalError(2003, "none of them answers")

        connection = ReconnectingConnection(open_first, driver=self.driver, witness=Ledger())
        self.module = connection.work.link.driver.module
        self.addCleanup(connection.close)
        return connection

    def open(self, port):
        return self.module.connect(
            host=self.one.host,
            port=port,
            user=self.one.user,
            password=self.cluster.password,
            database="test",
        )

    def insert(self, connection):
        connection.cursor().execute("INSERT INTO item VALUES ('one', 1)")

    def rows(self):
        return self.cluster.query("SELECT count(*) FROM test.item WHERE name = 'one'")

    @contextlib.contextmanager
    def healed_when_refused(self, heal):
        """Calls heal() once, when a node has refused for the first time."""
        met = []

        def subscriber(event):
            if isinstance(event, ConnectionAttemptFailed) and not met:
                met.append(event)
                heal()

        zope.event.subscribers.append(subscriber)
        try:
            yield met
        finally:
            zope.event.subscribers.remove(subscriber)

    def test_a_node_without_a_majority_is_waited_for(self):
        connection = self.connect(self.one.port)
        connection.run(self.insert, connection)
        connection.begin()
        self.insert(connection)
        self.two.suspend()
        wait_until(lambda: not self.one.is_ready())
        with self.assertRaises(DisconnectionError):
            self.insert(connection)
        connection.rollback()
        with self.healed_when_refused(self.two.resume) as met:
            connection.run(self.insert, connection)
        self.assertIn("WSREP", str(met[0]))
        self.assertEqual(self.rows(), [(2,)])

    def test_another_node_knows_what_became_of_a_commit(self):
        for direction, outcome in (("to_client", "committed"), ("to_server", "aborted")):
            with self.subTest(outcome):
                self.forward.accept()
                connection = self.connect()
                connection.run(self.insert, connection)
                connection.begin()
                self.insert(connection)
                self.forward.cut(direction, 0, then=self.forward.refuse)
                with self.events() as events, contextlib.suppress(DisconnectionError):
                    connection.commit()
                (told,) = [each for each in events if isinstance(each, CommitLookedUp)]
                self.assertEqual(told.outcome, outcome)
                # To the cluster it is one history.
                self.assertFalse([each for each in events if isinstance(each, HistoryChanged)])
                connection.rollback()
        self.assertEqual(self.rows(), [(3,)])

    def test_a_frozen_node_is_left_for_the_other(self):
        connection = self.connect()
        connection.run(self.insert, connection)
        connection.begin()
        self.insert(connection)
        self.one.suspend()
        wait_until(self.two.is_ready)
        self.forward.refuse()
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            connection.commit()
        connection.rollback()
        connection.run(self.insert, connection)
        self.assertEqual(self.rows(), [(2,)])

    def test_two_nodes_take_the_same_row(self):
        """Who commits second has 1213 at COMMIT, and runs again."""
        here, there = self.connect(self.one.port), self.connect(self.two.port)
        meet = threading.Barrier(2)
        runs = []

        def add(connection):
            cursor = connection.cursor()
            cursor.execute("UPDATE item SET number = number + 1 WHERE name = 'counter'")
            runs.append(connection)
            if len(runs) <= 2:
                meet.wait(60)

        threads = [
            threading.Thread(target=connection.run, args=(add, connection))
            for connection in (here, there)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertGreater(len(runs), 2)
        rows = self.cluster.query("SELECT number FROM test.item WHERE name = 'counter'")
        self.assertEqual(rows, [(2,)])


@on_galera(LAYER)
class PymysqlTests(GaleraTests, LineTestCase):
    driver = "pymysql"


@on_galera(LAYER)
@needs_mysqlclient
class MysqlclientTests(GaleraTests, LineTestCase):
    driver = "mysqlclient"
