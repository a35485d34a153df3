"""Two networks with a cable between them, for root: the servers are in one, the test in the other.

They are network namespaces without names: each lasts as long as a process or a file refers to it,
so that nothing stays behind however the tests end. Packets are swallowed where they arrive, by
iptables, for an error at their sender's would be no silence.
"""

import contextlib
import importlib.util
import os
import subprocess
import threading
import unittest
from pathlib import Path

from zreconnect.testing import EmbeddedMariaDB, EmbeddedPostgres
from zreconnect.testing.embedded import find_program
from zreconnect.tests import namespaces
from zreconnect.tests.base import REQUIRED

# Of addresses that are for documentation, and in use nowhere.
SERVERS_ADDRESS, CLIENTS_ADDRESS = "192.0.2.1", "192.0.2.2"
PROGRAMS = ("ip", "iptables", "nsenter")
CABLE = "cable"


def needs_networks(test_case):
    """A decorator: give the tests `NETWORK_LAYER`, or skip them without root or the programs,
    unless root must have them."""
    missing = [name for name in PROGRAMS if find_program(name) is None]
    if os.getuid() != 0:
        return unittest.skip("only root can make network namespaces")(test_case)
    if missing and not REQUIRED:
        return unittest.skip(f"{' and '.join(missing)} is not installed: make services")(test_case)
    test_case.layer = NETWORK_LAYER
    return test_case


class Network:
    """A network namespace with an interface of its own, and one end of a cable."""

    def __init__(self, address):
        self.address = address
        # Not of this thread, which stays where it is.
        thread = threading.Thread(target=self._leave_others)
        thread.start()
        thread.join()
        self.run("ip", "link", "set", "lo", "up")

    def _leave_others(self):
        namespaces.leave_others(namespaces.NETWORK)
        self._file = os.open("/proc/thread-self/ns/net", os.O_RDONLY)

    @property
    def path(self):
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @contextlib.contextmanager
    def entered(self):
        """The thread is in it, and so are the threads and processes that it starts."""
        with open("/proc/thread-self/ns/net") as before:
            namespaces.enter(self._file, namespaces.NETWORK)
            try:
                yield
            finally:
                namespaces.enter(before.fileno(), namespaces.NETWORK)

    def run(self, *command):
        """Run a program in it."""
        subprocess.run(["nsenter", f"--net={self.path}", *command], check=True)

    def filter(self, *rule):
        """Have iptables treat so what comes over the cable."""
        self.run("iptables", "--wait", "--append", "INPUT", "--in-interface", CABLE, *rule)

    def plug(self):
        self.run("ip", "link", "set", CABLE, "up")

    def unplug(self):
        self.run("ip", "link", "set", CABLE, "down")

    def close(self):
        os.close(self._file)


class Networks:
    """Two that a cable connects: those of the servers, and of their clients."""

    def __init__(self):
        self.servers, self.clients = Network(SERVERS_ADDRESS), Network(CLIENTS_ADDRESS)
        with self.clients.entered():
            here = str(threading.get_native_id())
            peer = ("peer", "name", CABLE, "netns", here)
            self.servers.run("ip", "link", "add", CABLE, "type", "veth", *peer)
        for network in (self.servers, self.clients):
            network.run("ip", "address", "add", f"{network.address}/24", "dev", CABLE)
            network.plug()

    def swallow(self, direction):
        """Have no packet arrive in a direction: "to_server", "to_client" or "both"."""
        if direction != "to_client":
            self.servers.filter("--jump", "DROP")
        if direction != "to_server":
            self.clients.filter("--jump", "DROP")

    def lose(self, part):
        """Have such a part of the packets not arrive, in both directions, at random."""
        chance = ("--match", "statistic", "--mode", "random", "--probability", str(part))
        for network in (self.servers, self.clients):
            network.filter(*chance, "--jump", "DROP")

    def heal(self):
        for network in (self.servers, self.clients):
            network.run("iptables", "--wait", "--flush", "INPUT")
            network.plug()

    def close(self):
        self.servers.close()
        self.clients.close()


class _InNetwork:
    """A server in the servers' network, which is asked from inside by whoever looks at it."""

    host = SERVERS_ADDRESS

    def __init__(self, network):
        super().__init__()
        self._network = network

    def _launch(self):
        with self._network.entered():
            super()._launch()

    def _connect(self, dbname, timeout):
        with self._network.entered():
            return super()._connect(dbname, timeout)


class PostgresInNetwork(_InNetwork, EmbeddedPostgres):
    def _make_data(self, password_file):
        super()._make_data(password_file)
        with Path(self._data, "pg_hba.conf").open("a") as rules:
            rules.write("host all all samenet scram-sha-256\n")


class MariaDBInNetwork(_InNetwork, EmbeddedMariaDB):
    def start(self):
        super().start()
        self.query(
            f"CREATE OR REPLACE USER {self.user}@'{CLIENTS_ADDRESS}'"
            f" IDENTIFIED BY '{self.password}'"
        )
        self.query(f"GRANT ALL ON *.* TO {self.user}@'{CLIENTS_ADDRESS}'")


class NetworkLayer:
    """Has the networks, and in that of the servers a PostgreSQL and, if installed, a MariaDB."""

    __name__ = "NetworkLayer"
    __bases__ = ()

    def setUp(self):
        self._stack = contextlib.ExitStack()
        self.networks = Networks()
        self._stack.callback(self.networks.close)
        self.postgres = self._started(PostgresInNetwork(self.networks.servers))
        self.servers = {"psycopg2": self.postgres, "psycopg": self.postgres}
        if EmbeddedMariaDB.installed() or REQUIRED:
            self.mariadb = self._started(MariaDBInNetwork(self.networks.servers))
            self.servers["pymysql"] = self.mariadb
            if importlib.util.find_spec("MySQLdb") or REQUIRED:
                self.servers["mysqlclient"] = self.mariadb

    def _started(self, server):
        self._stack.callback(server.stop)
        server.start()
        return server

    def tearDown(self):
        self._stack.close()

    def testTearDown(self):
        self.networks.heal()


NETWORK_LAYER = NetworkLayer()
