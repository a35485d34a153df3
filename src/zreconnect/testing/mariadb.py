"""A real MariaDB server for tests, that can be restarted, crashed and silenced."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zreconnect.testing.embedded import (
    EmbeddedServer,
    EmbeddedServerError,
    find_program,
    program_path,
)

# The second one runs the third, which Debian has in another package.
_PROGRAMS = ("mariadbd", "mariadb-install-db", "my_print_defaults")
_SMALL_LOG = "--innodb-log-file-size=8M"
_DEFAULT_SETTINGS: Mapping[str, object] = {
    "innodb_buffer_pool_size": "16M",
    "max_connections": 100,
    # MariaDB 11.4 makes a certificate by itself, and nobody could cut a line at COMMIT.
    "ssl": "OFF",
}


class EmbeddedMariaDBError(EmbeddedServerError):
    """The server does not start or does not end; the message quotes the end of its log."""


class EmbeddedMariaDB(EmbeddedServer):
    """A MariaDB server of one's own, from Debian's packages mariadb-server-core and
    mariadb-client-core or their like.

    See `EmbeddedServer`. `settings` are options of mariadbd, with underscores; it has TLS if they
    name a certificate. Sessions are threads of one process: it is the whole server that is
    suspended. Connecting to it needs PyMySQL.
    """

    user = "root"
    error = EmbeddedMariaDBError
    _dbname = "test"
    _scheme = "mysql"
    _shutdown_signal = signal.SIGTERM
    _environment_prefixes = ("MYSQL", "MARIADB")

    @staticmethod
    def installed() -> bool:
        """Whether the programs are there."""
        return all(find_program(name) for name in _PROGRAMS)

    def kill_session(self, session: int) -> None:
        """End one session as KILL does, without waiting for its end.

        session: its CONNECTION_ID(). Raises PyMySQL's OperationalError if there is none.
        """
        self.query(f"KILL CONNECTION {int(session)}")

    def suspend(self) -> None:
        """Stop the server until `resume()`: its sessions go silent, their locks stay.

        Raises RuntimeError if it is not running.
        """
        process = self._running_process()
        process.send_signal(signal.SIGSTOP)
        # Until all of its threads have stopped.
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)

    def resume(self) -> None:
        """Let a suspended server continue. Raises RuntimeError if it is not running."""
        self._running_process().send_signal(signal.SIGCONT)

    def session_ids(self) -> list[int]:
        """Return the ids of the clients' sessions, without the one that asks for them."""
        rows = self.query(
            "SELECT id FROM information_schema.processlist WHERE id <> CONNECTION_ID()"
            " AND command NOT IN ('Daemon', 'Binlog Dump') ORDER BY id"
        )
        return [session for (session,) in rows]

    @staticmethod
    def _module() -> Any:
        try:
            import pymysql
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'EmbeddedMariaDB needs PyMySQL: pip install "zreconnect[pymysql]"', name="pymysql"
            ) from error
        return pymysql

    def _connect(self, dbname: str, timeout: float) -> Any:
        return self._module().connect(
            host=self.host,
            port=self.port,
            user=self.user,
            password=self.password,
            database=dbname,
            autocommit=True,
            # Else it reads all certificates of the system, for each connection.
            ssl_disabled="require_secure_transport" not in self.settings,
            connect_timeout=max(2, timeout),
            # A suspended server accepts connections and says nothing.
            read_timeout=max(2, timeout),
        )

    def _quoted(self, name: str) -> str:
        return "`{}`".format(name.replace("`", "``"))

    def _find_programs(self) -> None:
        missing = [name for name in _PROGRAMS if not find_program(name)]
        if missing:
            raise FileNotFoundError(
                f"EmbeddedMariaDB needs {' and '.join(missing)}: install MariaDB's server, on "
                "Debian and Ubuntu the packages mariadb-server-core and mariadb-client-core (make "
                "services does it)"
            )

    def _make_data(self, password_file: Path) -> None:
        # The programs' own way to set a password needs a running server. A password has no quotes.
        accounts = self._secret_file(
            "accounts.sql",
            "FLUSH PRIVILEGES;\n"
            f"CREATE OR REPLACE USER {self.user}@'{self.host}' IDENTIFIED BY '{self.password}';\n"
            f"GRANT ALL ON *.* TO {self.user}@'{self.host}' WITH GRANT OPTION;\n"
            "DELETE FROM mysql.global_priv"
            f" WHERE User <> 'mariadb.sys' AND Host <> '{self.host}';\n"
            f"CREATE DATABASE {self._dbname};\n",
        )
        self._run(
            *(program_path("mariadb-install-db"), "--no-defaults", f"--datadir={self._data}"),
            *("--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"),
            *(f"--extra-file={accounts}", _SMALL_LOG, self._tmpdir),
        )
        accounts.unlink()

    @property
    def _tmpdir(self) -> str:
        # A server that starts removes the temporary tables that it finds, those of others too.
        return f"--tmpdir={self._temporary}"

    def _command(self) -> list[str]:
        settings = {
            **_DEFAULT_SETTINGS,
            **self.settings,
            "bind_address": self.host,
            "port": self.port,
            "socket": self._temporary / "socket",
            "pid_file": self._temporary / "pid",
        }
        command = [program_path("mariadbd"), "--no-defaults", f"--datadir={self._data}"]
        command += ["--skip-name-resolve", _SMALL_LOG, self._tmpdir]
        return command + [f"--{name}={value}" for name, value in settings.items()]
