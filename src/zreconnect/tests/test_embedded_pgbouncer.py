"""EmbeddedPgBouncer: pools, is killed and restarted; and nothing of it is left behind."""

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

from zreconnect.testing import EmbeddedPgBouncer, EmbeddedPgBouncerError, _guardian
from zreconnect.testing.layers import POSTGRES_LAYER, PgBouncerLayer
from zreconnect.tests.base import on_pgbouncer, wait_until

LAYER = PgBouncerLayer(POSTGRES_LAYER, "transaction", "EmbeddedPgBouncerLayer")
HOLDER = """
import sys
from zreconnect.testing import EmbeddedPgBouncer, EmbeddedPostgres
with EmbeddedPostgres() as server:
    pooler = EmbeddedPgBouncer(server)
    pooler.start()
    print(pooler._temporary, flush=True)
    sys.stdin.read()
"""


def backend_pid(connection):
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        return cursor.fetchone()[0]


@on_pgbouncer(LAYER)
class EmbeddedPgBouncerTests(unittest.TestCase):
    def setUp(self):
        self.pooler = self.layer.server
        self.server = self.pooler.server

    def connect(self, pooler=None):
        connection = psycopg2.connect((pooler or self.pooler).dsn())
        self.addCleanup(connection.close)
        return connection

    def test_transactions_share_a_server_process(self):
        first, second = self.connect(), self.connect()
        self.assertEqual(backend_pid(first), backend_pid(second))

    def test_sessions_do_not(self):
        with EmbeddedPgBouncer(self.server, "session") as pooler:
            first, second = self.connect(pooler), self.connect(pooler)
            self.assertNotEqual(backend_pid(first), backend_pid(second))

    def test_an_unknown_pool_mode(self):
        with self.assertRaisesRegex(ValueError, "pool_mode must be one of session, .*'request'"):
            EmbeddedPgBouncer(self.server, "request")

    def test_all_databases_are_reached(self):
        dsn = self.pooler.fresh_database()
        self.assertRegex(dsn, rf"^postgresql://postgres:\S+@127\.0\.0\.1:{self.pooler.port}/test_")
        with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT current_database()")
            self.assertEqual(cursor.fetchone(), (dsn.rpartition("/")[2],))

    def test_nobody_gets_in_without_the_password(self):
        with (
            mock.patch.object(self.pooler, "password", "wrong"),
            self.assertRaisesRegex(psycopg2.OperationalError, "authentication failed"),
        ):
            self.pooler.query("SELECT 1")

    def test_the_console(self):
        self.assertEqual(self.pooler.query("SELECT 1"), [(1,)])
        (pool,) = [pool for pool in self.pooler.show("pools") if pool["database"] == "postgres"]
        self.assertEqual(pool["pool_mode"], "transaction")

    def test_settings(self):
        with EmbeddedPgBouncer(self.server, settings={"max_client_conn": 7}) as pooler:
            values = {each["key"]: each["value"] for each in pooler.show("config")}
            self.assertEqual(values["max_client_conn"], "7")
            # As the manual has it.
            self.assertEqual((values["tcp_keepidle"], values["server_login_retry"]), ("30", "0.1"))
            pooler.shut_down()
            pooler.settings["no_such_parameter"] = 1
            with self.assertRaisesRegex(EmbeddedPgBouncerError, "no_such_parameter"):
                pooler.start()

    def test_a_restart_keeps_the_port_and_ends_clients(self):
        connection, port = self.connect(), self.pooler.port
        self.pooler.restart()
        self.assertEqual(self.pooler.port, port)
        with self.assertRaises(psycopg2.OperationalError), connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        self.assertEqual(self.pooler.query("SELECT 1"), [(1,)])

    def test_it_is_killed_and_the_server_is_not(self):
        self.pooler.kill_all()
        self.assertFalse(self.pooler.running)
        self.assertEqual(self.server.query("SELECT 1"), [(1,)])
        self.pooler.start()
        self.assertEqual(self.pooler.query("SELECT 1"), [(1,)])

    def test_a_server_that_was_restarted_is_found_again(self):
        self.assertEqual(self.pooler.query("SELECT 1"), [(1,)])
        self.server.restart()
        self.pooler.wait_until_ready()
        self.assertEqual(self.pooler.query("SELECT 1"), [(1,)])

    def test_nothing_is_left_when_the_process_is_killed(self):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        with holder:
            directory = Path(holder.stdout.readline().strip())
            self.assertNotEqual(_guardian.processes_in(directory / "data"), [])
            holder.send_signal(signal.SIGKILL)
        wait_until(lambda: not directory.exists())
        self.assertEqual(_guardian.processes_in(directory / "data"), [])

    def test_says_what_to_install(self):
        pooler = EmbeddedPgBouncer(self.server)
        with (
            mock.patch("zreconnect.testing.embedded.shutil.which", return_value=None),
            self.assertRaisesRegex(FileNotFoundError, "package pgbouncer"),
        ):
            self.assertFalse(EmbeddedPgBouncer.installed())
            pooler.start()
        self.assertFalse(pooler._temporary.exists())
