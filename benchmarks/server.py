"""The server, and the lines to it."""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.peers import Address
from zreconnect.testing import EmbeddedPostgres, PortForward

#: The disk is left out: it would hide what is compared, and it varies. So is what the server does
#: by itself now and then.
SETTINGS = {
    "max_connections": 300,
    "fsync": "off",
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "8GB",
    "shared_buffers": "128MB",
}
ROUND_TRIPS = 300
#: How often the delay of a line is adjusted.
ADJUSTMENTS = 4


@contextmanager
def postgres(**settings: Any) -> Iterator[EmbeddedPostgres]:
    """A server of one's own, with these settings beside `SETTINGS`."""
    with EmbeddedPostgres(settings={**SETTINGS, **settings}) as server:
        yield server


def through_socket(server: EmbeddedPostgres) -> Address:
    """The server's address, through its unix socket."""
    ((directory,),) = server.query("SHOW unix_socket_directories")
    return Address(directory, server.port, server.user, server.password, "postgres")


def through_tcp(server: EmbeddedPostgres, port: int | None = None) -> Address:
    """The server's address, through TCP; another port is that of a PortForward."""
    return Address(server.host, port or server.port, server.user, server.password, "postgres")


class Line:
    """A line to the server with latency, for as many as want one: each has a forwarder of its own.

    What is sent arrives after half of the round trip, whatever else is on its way.

    round_trip: the seconds that it is to take.
    """

    def __init__(self, server: EmbeddedPostgres, round_trip: float) -> None:
        self._server = server
        self._stack = ExitStack()
        #: The forwarders, by name.
        self.forwards: dict[str, PortForward] = {}
        #: Seconds that each direction is delayed, and that a round trip was measured to take.
        self.delay, self.round_trip = _adjusted(round_trip)

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def address(self, name: str) -> Address:
        """The address of one more forwarder, under a new name."""
        forward = self.forwards[name] = PortForward(self._server.host, self._server.port)
        self._stack.enter_context(forward)
        forward.delay(self.delay)
        return through_tcp(self._server, forward.port)


def _adjusted(wanted: float) -> tuple[float, float]:
    """The delay with which a round trip takes as long as is wanted, and how long it then takes.

    The forwarder itself takes some time, too.
    """
    with (
        _echo() as port,
        PortForward("127.0.0.1", port) as forward,
        socket.create_connection((forward.host, forward.port)) as client,
    ):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        delay = 0.0
        measured = _round_trip(client)
        for _ in range(ADJUSTMENTS):
            delay = max(0.0, delay + (wanted - measured) / 2)
            forward.delay(delay)
            measured = _round_trip(client)
    return delay, measured


def _round_trip(client: socket.socket) -> float:
    seconds = []
    for _ in range(ROUND_TRIPS):
        started = time.perf_counter()
        client.sendall(b"ping")
        client.recv(16)
        seconds.append(time.perf_counter() - started)
    # That of the quicker ones, as in a burst.
    return statistics.quantiles(seconds, n=10)[0]


@contextmanager
def _echo() -> Iterator[int]:
    """The port of somebody who sends everything back."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_send_back, args=(theirs,), daemon=True)
    process.start()
    try:
        yield pipe.recv()
    finally:
        process.terminate()
        process.join()


def _send_back(pipe: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        connected, _ = listener.accept()
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while chunk := connected.recv(65536):
            connected.sendall(chunk)
