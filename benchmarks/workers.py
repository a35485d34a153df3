"""A process for each peer, so that each has its own modules, threads, memory, and CPU time."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.peers import PEERS, Address, Described, Peer

#: Seconds that a process may take to end by itself.
PATIENCE = 10.0


class WorkerFailed(Exception):
    """What was raised in the process, as text."""


class Worker:
    """A process that has made a peer, and calls functions with it.

    name: of the peer, in `PEERS`. address: to connect to. options: for the peer's class.
    """

    def __init__(self, name: str, address: Address, **options: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(name, address, options, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function, of a module, returns there, called with the peer and the arguments.

        Raises WorkerFailed for what it raises, or if the process has ended.
        """
        self.ask(function, *arguments)
        return self.answer()

    def ask(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have the function called; `answer` waits for its end."""
        self._pipe.send((function, arguments))

    def answer(self) -> Any:
        """What the function that was asked for has returned. Raises as `call` does."""
        try:
            succeeded, result = self._pipe.recv()
        except EOFError:
            raise WorkerFailed(f"{self.name}: the process has ended") from None
        if not succeeded:
            raise WorkerFailed(f"{self.name}: {result}")
        return result

    def close(self) -> None:
        self._pipe.close()
        self._process.join(PATIENCE)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()


@contextmanager
def workers(
    described: Sequence[Described], address: Callable[[Described], Address]
) -> Iterator[dict[str, Worker]]:
    """A worker for each of the peers, by name; they end with the block."""
    with ExitStack() as stack:
        started = {}
        for each in described:
            worker = started[each.name] = Worker(each.name, address(each))
            stack.callback(worker.close)
        yield started


def _serve(name: str, address: Address, options: dict[str, Any], pipe: Connection) -> None:
    # Ctrl-C reaches the whole group; the main process ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Losses are logged, but not on the terminal.
    logging.getLogger().addHandler(logging.NullHandler())
    peer: Peer | None = None
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, ConnectionResetError):
            break
        try:
            if peer is None:
                peer = PEERS[name].make(address, **options)
            answer = True, function(peer, *arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send(answer)
    if peer is not None:
        peer.close()
