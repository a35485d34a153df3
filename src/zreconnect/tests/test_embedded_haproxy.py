"""EmbeddedHAProxy: leads to a server, is killed and restarted; and nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import unittest
from contextlib import closing
from pathlib import Path
from unittest import mock

import psycopg2

from zreconnect.testing import EmbeddedHAProxy, EmbeddedHAProxyError, _guardian
from zreconnect.testing.layers import POSTGRES_LAYER, HAProxyLayer
from zreconnect.tests.base import on_haproxy, wait_until

LAYER = HAProxyLayer(POSTGRES_LAYER, "EmbeddedHAProxyLayer")
HOLDER = """
import sys
from zreconnect.testing import EmbeddedHAProxy, EmbeddedPostgres
with EmbeddedPostgres() as server:
    balancer = EmbeddedHAProxy(server)
    balancer.start()
    print(balancer._temporary, flush=True)
    sys.stdin.read()
"""


@on_haproxy(LAYER)
class EmbeddedHAProxyTests(unittest.TestCase):
    def setUp(self):
        self.balancer = self.layer.server
        self.server = self.balancer.server

    def connect(self):
        connection = psycopg2.connect(self.balancer.dsn())
        self.addCleanup(connection.close)
        return connection

    def test_it_leads_to_the_server(self):
        self.assertEqual(self.balancer.query("SHOW port"), [(str(self.server.port),)])
        self.assertEqual(self.balancer.servers(), {"one": "no check"})

    def test_all_databases_are_reached(self):
        dsn = self.balancer.fresh_database()
        self.assertRegex(dsn, rf"^postgresql://postgres:\S+@127\.0\.0\.1:{self.balancer.port}/test")
        with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT current_database()")
            self.assertEqual(cursor.fetchone(), (dsn.rpartition("/")[2],))

    def test_a_restart_keeps_the_port_and_ends_clients(self):
        connection, port = self.connect(), self.balancer.port
        self.balancer.restart()
        self.assertEqual(self.balancer.port, port)
        with self.assertRaises(psycopg2.OperationalError), connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        self.assertEqual(self.balancer.query("SELECT 1"), [(1,)])

    def test_it_is_killed_and_the_server_is_not(self):
        self.balancer.kill_all()
        self.assertFalse(self.balancer.running)
        self.assertEqual(self.server.query("SELECT 1"), [(1,)])
        self.balancer.start()
        self.assertEqual(self.balancer.query("SELECT 1"), [(1,)])

    def test_what_it_does_not_understand_is_told(self):
        with (
            mock.patch("zreconnect.testing.haproxy._BEFORE_ONE_SERVER", "nonsense\n"),
            self.assertRaisesRegex(EmbeddedHAProxyError, "nonsense"),
        ):
            EmbeddedHAProxy(self.server).start()

    def test_nothing_is_left_when_the_process_is_killed(self):
        (directory,) = left_by(HOLDER)
        wait_until(lambda: not directory.exists())
        self.assertEqual(_guardian.processes_in(directory / "data"), [])

    def test_says_what_to_install(self):
        balancer = EmbeddedHAProxy(self.server)
        with (
            mock.patch("zreconnect.testing.embedded.shutil.which", return_value=None),
            self.assertRaisesRegex(FileNotFoundError, "package haproxy"),
        ):
            self.assertFalse(EmbeddedHAProxy.installed())
            balancer.start()
        self.assertFalse(balancer._temporary.exists())


def left_by(program):
    """The directories that a program prints, in which servers run, after it was killed."""
    holder = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with holder:
        directories = [Path(name) for name in holder.stdout.readline().split()]
        for directory in directories:
            assert _guardian.processes_in(directory / "data"), directory
        holder.send_signal(signal.SIGKILL)
    return directories
