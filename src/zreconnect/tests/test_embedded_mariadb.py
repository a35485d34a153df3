"""EmbeddedMariaDB: restarted, crashed and silenced; and nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from zreconnect.testing import EmbeddedMariaDB, EmbeddedMariaDBError, _guardian
from zreconnect.tests.base import on_mariadb, wait_until

HOLDER = """
import sys
from zreconnect.testing import EmbeddedMariaDB
server = EmbeddedMariaDB()
server.start()
print(server._temporary, flush=True)
sys.stdin.read()
"""


@on_mariadb()
class EmbeddedMariaDBTests(unittest.TestCase):
    def setUp(self):
        self.server = self.layer.server

    def connect(self):
        connection = self.server._connect("test", 10)
        self.addCleanup(connection.close)
        return connection

    def test_queries(self):
        self.assertEqual(self.server.query("SELECT %s + 1", 2), [(3,)])
        self.assertEqual(self.server.query("DO 1"), [])

    def test_nobody_gets_in_without_the_password(self):
        # Nobody gets in as the role PUBLIC, which `zreconnect ledger` grants rights to.
        rows = self.server.query("SELECT User, Host FROM mysql.user WHERE is_role = 'N'")
        self.assertCountEqual(rows, [("mariadb.sys", "localhost"), ("root", "127.0.0.1")])
        with (
            mock.patch.object(self.server, "password", "wrong"),
            self.assertRaisesRegex(self.server._module().OperationalError, "Access denied"),
        ):
            self.server.query("SELECT 1")

    def test_without_its_module(self):
        with (
            mock.patch.dict(sys.modules, pymysql=None),
            self.assertRaisesRegex(ModuleNotFoundError, r"zreconnect\[pymysql\]"),
        ):
            self.server.query("SELECT 1")

    def test_databases_of_their_own(self):
        dsn = self.server.fresh_database()
        self.assertRegex(dsn, rf"^mysql://root:\S+@127\.0\.0\.1:{self.server.port}/test_")
        self.server.create_database("odd ` name")
        self.addCleanup(self.server.query, "DROP DATABASE `odd `` name`")
        self.assertEqual(
            self.server.query("SELECT DATABASE()", dbname="odd ` name"), [("odd ` name",)]
        )

    def test_a_restart_keeps_data_and_port(self):
        self.server.query("CREATE OR REPLACE TABLE kept (number int)")
        self.server.query("INSERT INTO kept VALUES (1)")
        port = self.server.port
        self.server.restart()
        self.assertEqual(self.server.port, port)
        self.assertEqual(self.server.query("SELECT number FROM kept"), [(1,)])

    def test_what_was_committed_survives_sigkill(self):
        self.server.query("CREATE OR REPLACE TABLE kept (number int)")
        self.server.query("INSERT INTO kept VALUES (1)")
        self.server.kill_all()
        self.assertFalse(self.server.running)
        self.server.start()
        self.assertEqual(self.server.query("SELECT number FROM kept"), [(1,)])

    def test_sessions_are_listed_and_killed(self):
        connection = self.connect()
        self.assertIn(connection.thread_id(), self.server.session_ids())
        self.server.kill_session(connection.thread_id())
        wait_until(lambda: connection.thread_id() not in self.server.session_ids())
        with self.assertRaises(self.server._module().OperationalError):
            connection.cursor().execute("SELECT 1")

    def test_a_suspended_server_is_silent_and_goes_on(self):
        self.server.suspend()
        with self.assertRaisesRegex(EmbeddedMariaDBError, "no connection within 0 seconds"):
            self.server.wait_until_ready(0)
        self.server.resume()
        self.assertEqual(self.server.query("SELECT 1"), [(1,)])

    def test_a_suspended_server_is_resumed_to_be_shut_down(self):
        self.server.suspend()
        self.server.shut_down()
        self.assertFalse(self.server.running)

    def test_settings(self):
        with EmbeddedMariaDB(settings={"innodb_rollback_on_timeout": "ON"}) as server:
            self.assertEqual(server.query("SELECT @@innodb_rollback_on_timeout"), [(1,)])
            server.shut_down()
            server.settings["no_such_option"] = 1
            with self.assertRaisesRegex(EmbeddedMariaDBError, "no_such_option|no-such-option"):
                server.start()

    def test_a_directory_is_kept_and_used_again(self):
        with tempfile.TemporaryDirectory() as parent:
            Path(parent).chmod(0o755)
            directory = Path(parent, "kept")
            with EmbeddedMariaDB(directory) as server:
                server.query("CREATE TABLE kept (number int)")
                password = server.password
            with EmbeddedMariaDB(directory) as server:
                self.assertEqual(server.password, password)
                self.assertEqual(server.query("SELECT number FROM kept"), [])

    def test_temporary_tables_of_other_servers_are_left_alone(self):
        with (
            tempfile.TemporaryDirectory() as parent,
            mock.patch.dict(os.environ, TMPDIR=parent),
        ):
            Path(parent).chmod(0o777)
            table = Path(parent, "#sql-temptable-1-1-1.MAD")
            table.touch(0o666)
            with EmbeddedMariaDB():
                self.assertTrue(table.exists())

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


class WithoutProgramsTests(unittest.TestCase):
    def test_each_program_is_needed(self):
        programs = {"mariadbd", "mariadb-install-db", "my_print_defaults"}
        for program in sorted(programs):
            found = dict.fromkeys(programs - {program}, "/usr/bin/true")
            with (
                self.subTest(missing=program),
                mock.patch(
                    "zreconnect.testing.embedded.shutil.which",
                    side_effect=lambda name, path=None, found=found: found.get(name),
                ),
            ):
                self.assertFalse(EmbeddedMariaDB.installed())

    def test_says_what_to_install(self):
        server = EmbeddedMariaDB()
        with (
            mock.patch("zreconnect.testing.embedded.shutil.which", return_value=None),
            self.assertRaisesRegex(FileNotFoundError, "mariadb-server-core"),
        ):
            self.assertFalse(EmbeddedMariaDB.installed())
            server.start()
        self.assertFalse(server._temporary.exists())
