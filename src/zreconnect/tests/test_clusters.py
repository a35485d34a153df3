"""A real cluster fails over while clients write: nothing is lost, nothing is done twice.

The primary is killed; with ZRECONNECT_SWEEP=full in the environment it also hands over, is frozen,
and is cut off from everybody. benchmarks/failover.py does more of that, and measures.
"""

from __future__ import annotations

import re
import threading
import unittest
from unittest import mock

import zreconnect
from zreconnect import CommitOutcomeUnknown, DisconnectionError, Ledger, RetryPolicy
from zreconnect.events import HistoryChanged
from zreconnect.testing import EmbeddedPatroni, EmbeddedPatroniError, _guardian
from zreconnect.testing.layers import HAProxyLayer, PatroniLayer
from zreconnect.testing.patroni import CONFIGURATIONS
from zreconnect.tests.base import PATIENCE, LineTestCase, on_cluster, wait_until
from zreconnect.tests.test_embedded_haproxy import left_by
from zreconnect.tests.test_exactly_once import FULL
from zreconnect.tests.test_manual import DIRECTORY

LAYER = HAProxyLayer(PatroniLayer(), "HAProxyBeforePatroniLayer")
HOLDER = """
import sys
from zreconnect.testing import EmbeddedPatroni
cluster = EmbeddedPatroni()
member = cluster.members[0]
cluster.etcd.start()
member.start()
cluster.primary()
print(cluster.etcd._temporary, member._temporary, flush=True)
sys.stdin.read()
"""
# Seconds of silence after which a client leaves its session.
RESPONSE_TIMEOUT = 3.0
INSERT = "INSERT INTO item VALUES (%s)"


class Client:
    """Writes one row after the other, and keeps what it was told of each."""

    def __init__(self, name, dsn, driver, witness):
        self._name = name
        self._connection = zreconnect.connect(
            *(dsn, driver),
            policy=RetryPolicy(timeout=PATIENCE, maximum=0.2),
            witness=witness,
            response_timeout=RESPONSE_TIMEOUT,
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write_rows)
        self.acknowledged, self.unknown, self.errors = [], [], []
        self._thread.start()

    def end(self):
        self._stop.set()
        self._thread.join()
        self._connection.close()

    def _write_rows(self):
        number = 0
        while not self._stop.is_set():
            number += 1
            row = f"{self._name} {number}"
            try:
                self._connection.run(self._insert, row, attempts=10)
                self.acknowledged.append(row)
            except CommitOutcomeUnknown:
                self.unknown.append(row)
            except Exception as error:
                self.errors.append(error)
                return

    def _insert(self, row):
        self._connection.execute(INSERT, (row,)).close()


@on_cluster(LAYER)
class ClusterTests(LineTestCase):
    def setUp(self):
        self.balancer = self.layer.server
        self.cluster = self.balancer.server

    def query(self, statement, *parameters):
        return self.cluster.query(statement, *parameters)

    def clients(self):
        """One for each way to the cluster, driver and witness; all have written something."""
        self.query("DROP TABLE IF EXISTS item")
        # Without a unique constraint, so that a row that is written twice is there twice.
        self.query("CREATE TABLE item (name text)")
        clients = []
        for way, dsn in (("direct", self.cluster.dsn()), ("HAProxy", self.balancer.dsn())):
            for driver in ("psycopg2", "psycopg"):
                for witness in (Ledger(), "xid"):
                    name = f"{way} {driver} {witness}"
                    clients.append(Client(name, dsn, driver, witness))
                    self.addCleanup(clients[-1].end)
        self.wait_for_rows(clients)
        return clients

    def wait_for_rows(self, clients):
        """Until each of them has written some more."""
        counts = [len(client.acknowledged) for client in clients]
        wait_until(
            lambda: (
                any(client.errors for client in clients)
                or all(
                    len(client.acknowledged) > count
                    for client, count in zip(clients, counts, strict=True)
                )
            )
        )

    def assert_exactly_once(self, clients):
        for client in clients:
            client.end()
            self.assertEqual(client.errors, [])
        rows = [row for (row,) in self.query("SELECT name FROM item")]
        self.assertEqual(len(rows), len(set(rows)))
        acknowledged = {row for client in clients for row in client.acknowledged}
        unknown = {row for client in clients for row in client.unknown}
        self.assertEqual(acknowledged - set(rows), set())
        self.assertEqual(set(rows) - acknowledged - unknown, set())
        self.assertEqual([row for row in unknown if "Ledger" in row], [])

    def fails_over(self, fail):
        clients = self.clients()
        primary = self.cluster.primary()
        fail(primary)
        wait_until(lambda: self.cluster.primary() is not primary)
        self.wait_for_rows(clients)
        # The one that was the primary comes back, and follows.
        self.cluster.ensure_running()
        self.wait_for_rows(clients)
        self.assert_exactly_once(clients)

    def test_the_primary_is_killed(self):
        self.fails_over(lambda primary: primary.kill_all())

    @unittest.skipUnless(FULL, "ZRECONNECT_SWEEP=full")
    def test_the_primary_hands_over(self):
        self.fails_over(lambda primary: self.cluster.switch_over())

    @unittest.skipUnless(FULL, "ZRECONNECT_SWEEP=full")
    def test_the_primary_is_frozen(self):
        self.fails_over(lambda primary: primary.freeze())

    @unittest.skipUnless(FULL, "ZRECONNECT_SWEEP=full")
    def test_the_primary_is_cut_off(self):
        self.fails_over(lambda primary: primary.partition())

    def test_what_an_asynchronous_cluster_has_lost_is_told(self):
        self.query("DROP TABLE IF EXISTS item")
        self.query("CREATE TABLE item (name text)")
        self.cluster.set_synchronous(False)
        self.addCleanup(self.cluster.set_synchronous, True)
        self.addCleanup(self.cluster.ensure_running)
        connections = self.connections_past_lines()
        for name, connection in connections.items():
            connection.run(connection.execute, INSERT, (f"before, {name}",))
        primary = self.cluster.primary()
        self.wait_for_standbys(primary)
        primary.lines[0].silence("to_client")
        for name, connection in connections.items():
            if name.startswith("lost"):
                connection.run(connection.execute, INSERT, (f"after, {name}",))
            connection.execute(INSERT, (f"again, {name}",))
        primary.kill_all()
        # What the standbys have not got, they do not get any more.
        primary.lines[0].drop()
        primary.lines[0].resume()
        for name, connection in connections.items():
            with self.subTest(name), self.events() as events, self.assertLogs("zreconnect") as log:
                self.assertRaises(DisconnectionError, connection.commit)
                connection.rollback()
                connection.run(connection.execute, INSERT, (f"again, {name}",))
                (change,) = (each for each in events if isinstance(each, HistoryChanged))
                self.assertIs(change.is_missing, name.startswith("lost"))
                told = [line for line in log.output if "Acknowledged work is missing" in line]
                self.assertEqual(len(told), change.is_missing)
        rows = sorted(row for (row,) in self.query("SELECT name FROM item"))
        self.assertEqual(
            rows, sorted(f"{w}, {n}" for w in ("before", "again") for n in connections)
        )

    def connections_past_lines(self):
        """Connections by name, directly to the members: the standbys use the lines, too."""
        ports = ",".join(str(member.port) for member in self.cluster.members)
        dsn = (
            f"host=127.0.0.1,127.0.0.1,127.0.0.1 port={ports} user=postgres dbname=postgres"
            f" password={self.cluster.password} target_session_attrs=read-write"
        )
        connections = {}
        for what in ("kept", "lost"):
            for driver in ("psycopg2", "psycopg"):
                connection = zreconnect.connect(dsn, driver, witness=Ledger())
                self.addCleanup(connection.close)
                connections[f"{what}, {driver}"] = connection
        return connections

    def wait_for_standbys(self, primary):
        """Until they have all that is committed."""
        wait_until(
            lambda: (
                primary.query(
                    "SELECT bool_and(replay_lsn >= pg_current_wal_lsn()) FROM pg_stat_replication"
                )
                == [(True,)]
            )
        )

    def test_haproxy_leads_to_the_primary(self):
        self.assertEqual(self.balancer.query("SELECT pg_is_in_recovery()"), [(False,)])
        up = [name for name, status in self.balancer.servers().items() if status == "UP"]
        self.assertEqual(up, [self.cluster.primary().name])

    def test_the_cluster_is_whole(self):
        rows = self.query("SELECT sync_state FROM pg_stat_replication ORDER BY 1")
        self.assertEqual(rows, [("async",), ("sync",)])
        primary = self.cluster.primary()
        self.assertTrue(primary.is_primary())
        self.assertEqual(len([each for each in self.cluster.members if each.is_primary()]), 1)

    def test_nothing_is_left_when_the_process_is_killed(self):
        for directory in left_by(HOLDER):
            wait_until(lambda directory=directory: not directory.exists())
            self.assertEqual(_guardian.processes_in(directory / "data"), [])

    def test_what_patroni_does_not_understand_is_told(self):
        cluster = EmbeddedPatroni({"bootstrap": {"initdb": ["nonsense"]}})
        with self.assertRaisesRegex(EmbeddedPatroniError, "has ended: .'one'.") as told:
            cluster.start()
        self.assertIn("Failed to bootstrap cluster", str(told.exception))
        for part in (cluster.etcd, cluster.members[0]):
            self.assertFalse(part._temporary.exists())

    def test_says_what_to_install(self):
        cluster = EmbeddedPatroni()
        with (
            mock.patch("zreconnect.testing.embedded.shutil.which", return_value=None),
            self.assertRaisesRegex(
                FileNotFoundError, "packages patroni, python3-etcd and etcd-server"
            ),
        ):
            self.assertFalse(EmbeddedPatroni.installed())
            cluster.start()


class ManualTests(unittest.TestCase):
    def test_the_manual_has_the_configurations_that_the_tests_use(self):
        manual = (DIRECTORY / "clusters.rst").read_text(encoding="utf-8")
        blocks = re.findall(r"::\n\n((?:    .*\n|\n)+)", manual)
        shown = [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() for block in blocks]
        for configuration in CONFIGURATIONS.iterdir():
            with self.subTest(configuration.name):
                self.assertIn(configuration.read_text(encoding="utf-8").strip(), shown)
