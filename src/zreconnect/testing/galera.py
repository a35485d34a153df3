"""A real Galera cluster for tests: MariaDB servers that all take writes."""

from __future__ import annotations

import glob
import secrets
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zreconnect.testing._ports import LOCALHOST
from zreconnect.testing.mariadb import EmbeddedMariaDB, EmbeddedMariaDBError

if TYPE_CHECKING:
    from typing_extensions import Self

_PROVIDERS = "/usr/lib*/galera*/libgalera_smm.so"
_STATE = """# GALERA saved state
version: 2.1
uuid:    {}
seqno:   {}
safe_to_bootstrap: 0
"""
_POLL_INTERVAL = 0.02
#: Seconds that a cluster may take until it is as it should be.
CLUSTER_TIMEOUT = 60.0
# How soon a node is missed. The defaults, for machines far from each other, are 5 and 15 seconds.
_SOON = (
    "evs.keepalive_period=PT0.2S;evs.inactive_check_period=PT0.1S;"
    "evs.suspect_timeout=PT1S;evs.inactive_timeout=PT2S"
)


class EmbeddedGaleraError(EmbeddedMariaDBError):
    """The cluster, or a node of it, does not start or does not end, or does not become whole."""


class GaleraNode(EmbeddedMariaDB):
    """One of the servers of an `EmbeddedGalera`; see `EmbeddedMariaDB`.

    Suspend it, shut it down, restart it. One that is killed cannot come back: it would have to
    fetch everything from the other, which takes programs that are not looked for here.

    password: the superuser's. weight: of its voice in who has a majority.
    """

    error = EmbeddedGaleraError

    def __init__(self, password: str, weight: int) -> None:
        super().__init__()
        self.password = password
        self.weight = weight
        #: The port at which the other nodes reach it.
        self.group_port = 0
        #: The addresses of the nodes that it joins; none make it the first of a cluster.
        self.group = ""
        #: The cluster's identity, and how much it has of it when it comes for the first time.
        self.known: tuple[str, str] | None = None

    def is_ready(self) -> bool:
        """Whether it executes statements: it is one of the cluster's majority."""
        try:
            return self.query("SHOW STATUS LIKE 'wsrep_ready'") == [("wsrep_ready", "ON")]
        except self._module().Error:
            return False

    def _initialise(self, base: Path) -> None:
        super()._initialise(base)
        self.group_port, self._transfer_port = self._reserved_port(), self._reserved_port()
        if self.known:
            state = self._secret_file("grastate.dat", _STATE.format(*self.known))
            shutil.move(state, self._data / state.name)

    def _command(self) -> list[str]:
        listen = f"gmcast.listen_addr=tcp://{self.host}:{self.group_port}"
        transfer = f"ist.recv_addr={self.host}:{self._transfer_port}"
        settings = {
            "binlog_format": "ROW",
            "innodb_autoinc_lock_mode": 2,
            "wsrep_on": "ON",
            "wsrep_provider": _provider(),
            "wsrep_node_address": self.host,
            "wsrep_cluster_address": f"gcomm://{self.group}",
            "wsrep_provider_options": f"{listen};{transfer};pc.weight={self.weight};{_SOON}",
        }
        return super()._command() + [f"--{name}={value}" for name, value in settings.items()]


class EmbeddedGalera:
    """Two MariaDB servers of one's own in a Galera cluster, from Debian's packages
    mariadb-server-core, mariadb-client-core and galera-4 or their like.

    The second one has a majority alone, the first has not. Both listen on free ports of 127.0.0.1,
    with the same accounts. Use it as a context manager, or call `start()` and `stop()`; see
    `EmbeddedServer` for what becomes of it when the process ends.
    """

    user = EmbeddedMariaDB.user

    def __init__(self) -> None:
        #: The superuser's password.
        self.password = secrets.token_urlsafe(16)
        #: The servers.
        self.nodes = [GaleraNode(self.password, weight) for weight in (1, 2)]
        self._started = ExitStack()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @staticmethod
    def installed() -> bool:
        """Whether the programs and the library are there."""
        return EmbeddedMariaDB.installed() and _provider() is not None

    @property
    def host(self) -> str:
        """The address of all nodes."""
        return LOCALHOST

    def start(self) -> None:
        """Start the nodes, one after the other, and wait until the cluster is whole.

        Raises FileNotFoundError if programs or the library are not installed,
        EmbeddedGaleraError if something does not start.
        """
        if not self.installed():
            raise FileNotFoundError(
                "EmbeddedGalera needs MariaDB's server and galera: install them, on Debian and "
                "Ubuntu the packages mariadb-server-core, mariadb-client-core and galera-4 (make "
                "services does it)"
            )
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        first, second = self.nodes
        first.settings["wsrep_new_cluster"] = 1
        self._started.enter_context(first)
        del first.settings["wsrep_new_cluster"]
        status = dict(first.query("SHOW STATUS LIKE 'wsrep_%'"))
        # Both are as empty as servers are at first: nothing is to be transferred but what comes.
        second.known = status["wsrep_cluster_state_uuid"], status["wsrep_last_committed"]
        second.group = f"{first.host}:{first.group_port}"
        self._started.enter_context(second)
        first.group = f"{second.host}:{second.group_port}"
        self.wait_until_whole()

    def stop(self) -> None:
        """End all of it, and remove what was its. Does nothing if it has not been started."""
        self._started.close()

    def query(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Execute a statement on the node that has a majority, as `EmbeddedServer.query()` does."""
        return self.nodes[1].query(statement, *parameters)

    def ensure_running(self) -> None:
        """Undo what was done to the nodes, start what is down, and wait until all is whole."""
        for node in reversed(self.nodes):
            node.ensure_running()
        self.wait_until_whole()

    def wait_until_whole(self, timeout: float = CLUSTER_TIMEOUT) -> None:
        """Wait until both nodes are ready and see each other.

        Raises EmbeddedGaleraError if that takes more than `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not all(node.is_ready() for node in self.nodes) or self.query(
            "SHOW STATUS LIKE 'wsrep_cluster_size'"
        ) != [("wsrep_cluster_size", "2")]:
            if time.monotonic() > deadline:
                raise EmbeddedGaleraError(f"the cluster is not whole within {timeout} seconds")
            time.sleep(_POLL_INTERVAL)


def _provider() -> str | None:
    return next(iter(sorted(glob.glob(_PROVIDERS))), None)
