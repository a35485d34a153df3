"""What the servers for tests have in common: directories, ports, a process, and its end."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from zreconnect.testing import _guardian
from zreconnect.testing._ports import LOCALHOST, bind

if TYPE_CHECKING:
    from typing_extensions import Self

_SERVER_USER_FOR_ROOT = "nobody"
START_TIMEOUT = 60.0
SHUTDOWN_TIMEOUT = 60.0
_LOG_LINES_IN_ERRORS = 20
# Debian keeps servers where an ordinary user's PATH does not lead.
_PLACES = "/usr/local/sbin:/usr/sbin:/usr/local/bin:/usr/bin"


def find_program(name: str) -> str | None:
    """Return the path of an installed program, None if there is none of that name."""
    return shutil.which(name) or shutil.which(name, path=_PLACES)


def program_path(name: str) -> str:
    """Return the path of a program that is known to be installed."""
    found = find_program(name)
    assert found is not None
    return found


class EmbeddedServerError(RuntimeError):
    """The server does not start or does not end; the message quotes the end of its log."""


class EmbeddedProgram:
    """A server of one's own, with its data in a temporary directory.

    It listens on a free port of 127.0.0.1, the same through all restarts. Its data are in a
    temporary directory and removed by `stop()`, unless `directory` names one to keep them in: it is
    made if need be, and what an earlier server left in it is used again.

    Use it as a context manager, or call `start()` and `stop()`. When the process ends without
    having called `stop()`, however that happens, a process in the background ends the server and
    removes what is temporary. Root's servers run as the user nobody, who must be able to reach
    `directory`. After `os.fork()` the server remains the parent's: in the child `stop()` does
    nothing.
    """

    host = LOCALHOST
    #: What `start()` and the others raise.
    error: type[EmbeddedServerError] = EmbeddedServerError
    # Asks the server for an orderly shutdown.
    _shutdown_signal = signal.SIGTERM
    # Ends it at once. SIGQUIT makes PostgreSQL shut down immediately and MariaDB in order.
    _end_signal = signal.SIGQUIT
    # The prefix of the environment variables that would change what the server does.
    _environment_prefixes: tuple[str, ...]

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.directory = None if directory is None else Path(directory).absolute()
        self.settings = dict(settings or {})
        #: The port it listens on: 0 before the first `start()`.
        self.port = 0
        # What its environment has in addition, known when it is initialised.
        self._variables: dict[str, str] = {}
        self._reservations: list[socket.socket] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._guardian: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.host}:{self.port}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the server has been started and its main process has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server, the first time or after it was shut down or crashed, and wait for it.

        Raises RuntimeError if it is running, FileNotFoundError or ModuleNotFoundError if its
        programs are not installed, EmbeddedServerError if it does not start.
        """
        if self.running:
            raise RuntimeError(f"{self!r} is running already")
        if self._guardian is not None:
            # A process that outlived its parent would keep the next one from starting.
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
            for reservation in self._reservations:
                reservation.close()
            self._reservations.clear()
            os.write(self._pipe, b"\n")
            os.close(self._pipe)
            guardian.wait()
            if self._process is not None:
                self._process.wait()
                self._process = None

    def shut_down(self) -> None:
        """Shut the server down: sessions are ended, transactions rolled back.

        `start()` brings it up again. Suspended processes are resumed, for it waits for them.
        Raises RuntimeError if it is not running, EmbeddedServerError if it does not end.
        """
        self._end(self._shutdown_signal)

    def restart(self) -> None:
        """Shut the server down and start it again.

        Raises RuntimeError if it is not running, EmbeddedServerError if it does not end or start.
        """
        self.shut_down()
        self.start()

    def kill_all(self) -> None:
        """SIGKILL all processes of the server: `start()` recovers from that crash.

        Raises RuntimeError if it is not running.
        """
        process = self._running_process()
        _guardian.kill_all_in(self._data)
        process.wait()

    def ensure_running(self) -> None:
        """Resume what is suspended, start the server if it is down, and wait until it is ready.

        Raises what `start()` and `wait_until_ready()` raise.
        """
        if self.running:
            _guardian.send_signal(_guardian.processes_in(self._data), signal.SIGCONT)
            self.wait_until_ready()
        else:
            self.start()

    def wait_until_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Wait until the server accepts connections.

        Raises RuntimeError if it has not been started, EmbeddedServerError if it ends, or has
        accepted none after `timeout` seconds.
        """
        if self._process is None:
            raise RuntimeError(f"{self!r} has not been started")
        deadline = time.monotonic() + timeout
        while (error := self._refusal(timeout)) is not None:
            if self._process.poll() is not None:
                raise self._error("the server has ended") from error
            if time.monotonic() > deadline:
                raise self._error(f"no connection within {timeout} seconds: {error}") from error
            time.sleep(_guardian.POLL_INTERVAL)

    def log(self) -> str:
        """Return the server's log. Raises FileNotFoundError if it has been removed."""
        return self._log.read_text(errors="replace")

    # What differs between the programs

    def _refusal(self, timeout: float) -> Exception | None:
        """Why it is not ready, None if it is; the answer may take so many seconds."""
        raise NotImplementedError

    def _find_programs(self) -> None:
        """Find the server's programs. Raises an error that says what to install."""
        raise NotImplementedError

    def _command(self) -> list[str]:
        """What starts the server in the foreground."""
        raise NotImplementedError

    # What they share

    def _prepare(self) -> None:
        """Make the directories, with the guardian at work before the first of them is made."""
        self._account = _server_account()
        self._temporary = Path(tempfile.gettempdir(), f"zreconnect-{secrets.token_hex(8)}")
        base = self.directory or self._temporary
        self._log = base / "log"
        self._data = base.resolve() / "data"
        if _guardian.processes_in(self._data):
            raise self.error(f"directory {base} is in use by another server")
        self.port = self._reserved_port()
        self._start_guardian()
        self._make_directory(self._temporary)
        self._make_directory(base)
        self._find_programs()
        self._initialise(base)

    def _reserved_port(self) -> int:
        """A port that nobody else is given until the end."""
        reservation = bind()
        self._reservations.append(reservation)
        port: int = reservation.getsockname()[1]
        return port

    def _start_guardian(self) -> None:
        reader, self._pipe = os.pipe()
        self._guardian = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", _guardian.__file__),
                *(self._temporary, self._data, str(int(self._end_signal))),
            ],
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

    def _initialise(self, base: Path) -> None:
        """Have what the server works in; `base` has what is to be kept."""
        self._make_directory(self._data)

    def _secret_file(self, name: str, content: str) -> Path:
        """A temporary file that only the server's user can read."""
        path = self._temporary / name
        path.touch(mode=0o600)
        path.write_text(content)
        self._give(path)
        return path

    def _run(self, *command: str | Path) -> str:
        """Run one of the database's programs as the server's user, and return its output.

        Raises EmbeddedServerError with its output if it fails, PermissionError if the user
        cannot run it.
        """
        directory = self._data if self._data.is_dir() else "/"
        process: subprocess.CompletedProcess[str] = subprocess.run(
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
            raise self.error(f"{name} failed with {process.returncode}: {process.stdout}")
        return process.stdout

    def _identity(self) -> dict[str, Any]:
        """Return the arguments for subprocess that say as whom, and in what environment, to run."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith((*self._environment_prefixes, "LC_", "LANG"))
        }
        identity: dict[str, Any] = {"env": {**environment, "LC_ALL": "C", **self._variables}}
        if self._account is not None:
            identity.update(user=self._account.pw_uid, group=self._account.pw_gid, extra_groups=[])
        return identity

    def _launch(self) -> None:
        self._spawn()
        self.wait_until_ready()

    def _spawn(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._data,
                # An interrupt from the keyboard is for the tests alone.
                start_new_session=True,
                **self._identity(),
            )

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"{self!r} is not running")
        return self._process

    def _end(self, signal_number: int) -> None:
        process = self._running_process()
        process.send_signal(signal_number)
        _guardian.send_signal(_guardian.processes_in(self._data), signal.SIGCONT)
        try:
            process.wait(SHUTDOWN_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise self._error("the server does not end") from error
        _guardian.wait_until_empty(self._data, SHUTDOWN_TIMEOUT)

    def _error(self, problem: str) -> EmbeddedServerError:
        tail = "\n".join(self.log().splitlines()[-_LOG_LINES_IN_ERRORS:])
        return self.error(f"{problem}; the end of its log is:\n{tail}")


class EmbeddedServer(EmbeddedProgram):
    """A database server of one's own, or what leads to one.

    See `EmbeddedProgram`. It listens on a socket in a temporary directory, too.
    """

    #: The name of the superuser.
    user: str
    # The database that is there from the start.
    _dbname: str
    _scheme: str
    # What has a database dropped that somebody uses.
    _ending_sessions = ""

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(directory, settings)
        #: The superuser's password, known after the first `start()`.
        self.password = ""

    def dsn(
        self,
        user: str | None = None,
        dbname: str | None = None,
        host: str | None = None,
        port: int | None = None,
    ) -> str:
        """Return the URL to connect with, by default as superuser to the first database.

        The password in it is the superuser's; give it to other users as well. `host` and `port`
        replace the server's own, to connect through a PortForward.
        """
        return (
            f"{self._scheme}://{quote(user or self.user, safe='')}:{self.password}"
            f"@{host or self.host}:{port or self.port}/{quote(dbname or self._dbname, safe='')}"
        )

    def query(
        self, statement: str, *parameters: object, dbname: str | None = None
    ) -> list[tuple[Any, ...]]:
        """Execute a statement as superuser on a connection of its own, in autocommit mode.

        Returns the rows, none for a statement without result. Raises the database module's errors.
        """
        with (
            closing(self._connect(dbname or self._dbname, START_TIMEOUT)) as connection,
            closing(connection.cursor()) as cursor,
        ):
            cursor.execute(statement, parameters or None)
            return list(cursor.fetchall()) if cursor.description else []

    def create_database(self, name: str) -> None:
        """Create an empty database. Raises the module's errors, so if there is one of this name."""
        self.query(f"CREATE DATABASE {self._quoted(name)}")

    def drop_database(self, name: str) -> None:
        """Remove a database, and end its sessions. Raises the module's errors, so if there is none
        of this name."""
        self.query(f"DROP DATABASE {self._quoted(name)}{self._ending_sessions}")

    def fresh_database(self) -> str:
        """Create an empty database with a name of its own, and return the URL to connect to it."""
        name = f"test_{secrets.token_hex(8)}"
        self.create_database(name)
        return self.dsn(dbname=name)

    # What differs between the databases

    @staticmethod
    def _module() -> Any:
        """The DB-API module to connect with."""
        raise NotImplementedError

    def _connect(self, dbname: str, timeout: float) -> Any:
        """A connection of the superuser's, in autocommit mode."""
        raise NotImplementedError

    def _quoted(self, name: str) -> str:
        """A name as it stands in a statement."""
        raise NotImplementedError

    def _make_data(self, password_file: Path) -> None:
        """Fill the data directory; the superuser's password is to be that in the file."""
        raise NotImplementedError

    def _refusal(self, timeout: float) -> Exception | None:
        try:
            self._connect(self._dbname, timeout).close()
        except self._module().OperationalError as error:
            refusal: Exception = error
            return refusal
        return None

    def _initialise(self, base: Path) -> None:
        """Have a data directory in `base`, with the password that was chosen when it was made."""
        password_file = base / "password"
        if not password_file.exists():
            self.password = self.password or secrets.token_urlsafe(16)
            self._make_directory(self._data)
            chosen = self._secret_file("chosen-password", self.password)
            self._make_data(chosen)
            # On another file system it is not renamed but copied, with its permissions.
            shutil.move(chosen, password_file)
        self.password = password_file.read_text()


def _server_account() -> pwd.struct_passwd | None:
    """Return the account to run the server as, None for the present one: it refuses root."""
    return pwd.getpwnam(_SERVER_USER_FOR_ROOT) if os.geteuid() == 0 else None


_started: weakref.WeakSet[EmbeddedProgram] = weakref.WeakSet()


def _disown_in_child() -> None:
    """Leave the server to the parent; the pipe must end with it, not with a forked child."""
    for server in list(_started):
        os.close(server._pipe)
        for reservation in server._reservations:
            reservation.close()
        for process in (server._guardian, server._process):
            if process is not None:
                # Otherwise it complains, when it is deleted, that nobody waited for its end.
                process.returncode = 0
        server._guardian = None
        server._process = None
    _started.clear()


os.register_at_fork(after_in_child=_disown_in_child)
