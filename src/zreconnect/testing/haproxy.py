"""A real HAProxy for tests, before a PostgreSQL server or a cluster for tests."""

from __future__ import annotations

import csv
import signal
import socket
from pathlib import Path

from zreconnect.testing.embedded import (
    START_TIMEOUT,
    EmbeddedServerError,
    find_program,
    program_path,
)
from zreconnect.testing.patroni import CONFIGURATIONS, EmbeddedPatroni
from zreconnect.testing.postgres import EmbeddedPostgres, PostgresProtocol

_PROGRAM = "haproxy"
_BEFORE_ONE_SERVER = """\
defaults
    mode tcp
    timeout connect 1s
    timeout client 1d
    timeout server 1d

listen server
    bind "${LISTEN}"
    server one "${ONE}"
"""


# What tells how it is, beside what it does.
_STATISTICS = """\
global
    stats socket "${STATISTICS}"
"""


class EmbeddedHAProxyError(EmbeddedServerError):
    """HAProxy does not start or does not end; the message quotes the end of its log."""


class EmbeddedHAProxy(PostgresProtocol):
    """An HAProxy of one's own, from Debian's package haproxy or its like.

    See `EmbeddedServer`. Its clients are the server's superuser, with the same password, and reach
    all databases of the server. What kills or shuts it down leaves the server alone.

    server: a running EmbeddedPostgres, or a running EmbeddedPatroni: then it leads to the primary,
    with the configuration that the manual shows.
    """

    error = EmbeddedHAProxyError
    # It keeps nothing that could be lost, and does not end by SIGQUIT.
    _end_signal = signal.SIGKILL
    _environment_prefixes = ("PG", "HAPROXY")

    def __init__(self, server: EmbeddedPostgres | EmbeddedPatroni) -> None:
        super().__init__()
        self.server = server

    @staticmethod
    def installed() -> bool:
        """Whether the program is there."""
        return find_program(_PROGRAM) is not None

    def servers(self) -> dict[str, str]:
        """The servers by name, and what HAProxy takes each for: "UP", "DOWN", "UP 1/2" for one
        that has failed a check, "no check". Raises OSError if HAProxy does not answer."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(START_TIMEOUT)
            client.connect(str(self._statistics))
            client.sendall(b"show stat\n")
            with client.makefile(encoding="ascii", newline="") as answer:
                rows = list(csv.DictReader(answer))
        return {row["svname"]: row["status"] for row in rows if row["type"] == "2"}

    def _refusal(self, timeout: float) -> Exception | None:
        refusal = super()._refusal(timeout)
        if refusal is not None:
            return refusal
        # It takes each for up until it has checked it.
        up = [name for name, status in self.servers().items() if status != "DOWN"]
        return None if len(up) == 1 else EmbeddedHAProxyError(f"it takes {up} for the primary")

    def _find_programs(self) -> None:
        if not self.installed():
            raise FileNotFoundError(
                "EmbeddedHAProxy needs haproxy: install it, on Debian and Ubuntu the package "
                "haproxy (make services does it)"
            )

    def _initialise(self, base: Path) -> None:
        self.password = self.server.password
        # Its process is known by its working directory.
        self._make_directory(self._data)
        self._variables = {"LISTEN": f"{self.host}:{self.port}"}
        if isinstance(self.server, EmbeddedPatroni):
            text = (CONFIGURATIONS / "haproxy.cfg").read_text(encoding="utf-8")
            for member in self.server.members:
                line, rest, _ = member.lines
                self._variables[member.name.upper()] = f"{line.host}:{line.port}"
                self._variables[f"{member.name.upper()}_REST"] = str(rest.port)
        else:
            text = _BEFORE_ONE_SERVER
            self._variables["ONE"] = f"{self.server.host}:{self.server.port}"
        self._statistics = self._temporary / "statistics"
        self._variables["STATISTICS"] = str(self._statistics)
        self._configurations = [
            self._secret_file("haproxy.cfg", text),
            self._secret_file("statistics.cfg", _STATISTICS),
        ]

    def _command(self) -> list[str]:
        # In the foreground, as one process.
        return [program_path(_PROGRAM), "-db", "--", *map(str, self._configurations)]
