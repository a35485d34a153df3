"""A real PgBouncer for tests, before a PostgreSQL server for tests."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Any

from zreconnect.testing.embedded import (
    START_TIMEOUT,
    EmbeddedServerError,
    find_program,
    program_path,
)
from zreconnect.testing.postgres import EmbeddedPostgres, PostgresProtocol

_PROGRAM = "pgbouncer"
POOL_MODES = ("session", "transaction", "statement")
# The manual shows it.
_CONFIGURATION = resources.files("zreconnect.testing") / "configurations" / "pgbouncer.ini"


class EmbeddedPgBouncerError(EmbeddedServerError):
    """PgBouncer does not start or does not end; the message quotes the end of its log."""


class EmbeddedPgBouncer(PostgresProtocol):
    """A PgBouncer of one's own before a running EmbeddedPostgres, from Debian's package pgbouncer
    or its like.

    See `EmbeddedServer`. Its clients are the server's superuser, with the same password, and
    reach all databases of the server. What kills or shuts it down leaves the server alone.

    server: the server, which is to be running whenever PgBouncer is started.
    pool_mode: how long a client keeps a server process: "session", "transaction" or "statement".
    settings: parameters of the section [pgbouncer] of its configuration file, besides those that
    the manual shows, or in their place.

    Raises ValueError if there is no such ``pool_mode``.
    """

    error = EmbeddedPgBouncerError
    # It keeps nothing that could be lost. The others wait, in one version or the other, until
    # clients have gone; and SIGQUIT, which does not, is ignored in what a shell has started by "&".
    _shutdown_signal = signal.SIGKILL

    def __init__(
        self,
        server: EmbeddedPostgres,
        pool_mode: str = "transaction",
        settings: Mapping[str, object] | None = None,
    ) -> None:
        if pool_mode not in POOL_MODES:
            raise ValueError(f"pool_mode must be one of {', '.join(POOL_MODES)}, not {pool_mode!r}")
        super().__init__(settings=settings)
        self.server = server
        self.pool_mode = pool_mode

    @staticmethod
    def installed() -> bool:
        """Whether the program is there."""
        return find_program(_PROGRAM) is not None

    def show(self, what: str) -> list[dict[str, Any]]:
        """What SHOW answers at PgBouncer's console, such as "pools" or "servers": a dictionary for
        each row. Raises psycopg2's errors."""
        return self.command(f"SHOW {what}")

    def command(self, statement: str) -> list[dict[str, Any]]:
        """Have PgBouncer execute a command of its console, such as "PAUSE" or "KILL postgres".

        Returns a dictionary for each row of the answer. Raises psycopg2's errors.
        """
        with (
            closing(self._connect("pgbouncer", START_TIMEOUT)) as console,
            console.cursor() as cursor,
        ):
            cursor.execute(statement)
            names = [column.name for column in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor] if names else []

    def _find_programs(self) -> None:
        if not self.installed():
            raise FileNotFoundError(
                "EmbeddedPgBouncer needs pgbouncer: install it, on Debian and Ubuntu the package "
                "pgbouncer (make services does it)"
            )

    def _initialise(self, base: Path) -> None:
        self.password = self.server.password
        # Its processes are known by their working directory.
        self._make_directory(self._data)
        self._users = self._secret_file("users", f'"{self.user}" "{self.password}"\n')
        self._configuration = self._secret_file("pgbouncer.ini", "")

    def _launch(self) -> None:
        settings = {
            **self.settings,
            "pool_mode": self.pool_mode,
            "listen_addr": self.host,
            "listen_port": self.port,
            "unix_socket_dir": self._temporary,
            "auth_file": self._users,
            "admin_users": self.user,
        }
        lines = [
            # Another section [pgbouncer] would begin with PgBouncer's own values again.
            _CONFIGURATION.read_text(encoding="utf-8"),
            *(f"{name} = {value}" for name, value in settings.items()),
            "[databases]",
            f"* = host={self.server.host} port={self.server.port}",
        ]
        self._configuration.write_text("\n".join(lines) + "\n")
        super()._launch()

    def _command(self) -> list[str]:
        return [program_path(_PROGRAM), str(self._configuration)]
