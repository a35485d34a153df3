"""A TCP forwarder on 127.0.0.1 that fails on request and counts what passes through it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from zreconnect.testing import _forwarder
from zreconnect.testing._forwarder import DIRECTIONS
from zreconnect.testing._ports import LOCALHOST, bind

if TYPE_CHECKING:
    from typing_extensions import Self

_DIRECTIONS = {"to_server": ["to_server"], "to_client": ["to_client"], "both": list(DIRECTIONS)}
_COMMAND_TIMEOUT = 30.0
_DELIVERY_TIMEOUT = 5.0
_ENDED = object()


@dataclass(frozen=True)
class Count:
    """What has passed through a PortForward, over all its connections.

    Bytes and messages count at the moment they are sent on, so those that are held back do not
    count yet, and whatever a client has received is counted. A round trip is a turn of a
    connection's direction from client-to-server to server-to-client. Messages are whole messages
    of PostgreSQL's protocol in clear text, the one-byte answer to a request for encryption
    included; other protocols and encrypted connections count none.

    Commits are answers of success to a COMMIT, and to a statement that changed something outside of
    a transaction; results are those to all other statements but the ones that only concern the
    session or a transaction's beginning and end, such as SET, BEGIN and ROLLBACK. MySQL's are
    counted, too; neither is on encrypted or compressed connections.

    Subtract an earlier count to get what has happened since.
    """

    connections: int = 0
    bytes_to_server: int = 0
    bytes_to_client: int = 0
    messages_to_server: int = 0
    messages_to_client: int = 0
    round_trips: int = 0
    commits: int = 0
    results: int = 0

    def __sub__(self, earlier: Count) -> Count:
        return Count(
            *(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True))
        )


class Cut:
    """A cut that `PortForward.cut()` has prepared."""

    def __init__(self, then: Callable[[], object] | None) -> None:
        self._then = then
        self._error: BaseException | None = None
        self._outcome: Future[None] = Future()

    @property
    def happened(self) -> bool:
        """Whether `then` has returned or raised, and the connections have been ended."""
        return self._outcome.done() and not self._outcome.cancelled()

    def wait(self, timeout: float) -> bool:
        """Wait until the cut has happened, and return whether it has.

        That is False after `timeout` seconds, and as soon as the cut has been cancelled. Raises
        what `then` raised.
        """
        try:
            error = self._outcome.exception(timeout)
        except (CancelledError, FutureTimeoutError):
            return False
        if error is not None:
            raise error
        return True

    def _call(self) -> None:
        assert self._then is not None
        try:
            self._then()
        except BaseException as error:
            self._error = error

    def _has_happened(self) -> None:
        if self._error is not None:
            self._outcome.set_exception(self._error)
        else:
            self._outcome.set_result(None)


class PortForward:
    """Forwards TCP connections from a port of 127.0.0.1 to a server, and fails on request.

    `target_host` and `target_port` say where the server listens; the host is resolved by
    `start()`, an IPv4 address is preferred. Use it as a context manager, or call `start()` and
    `stop()`. All methods can be called from any thread. What they ask for is done when they
    return, after everything that had reached the forwarder by then was forwarded.

    A process of its own forwards, so that it does whatever the program's threads do, also while
    a call such as psycopg2's `cancel()` keeps them all from running. That process ends with the
    program, however the program ends.

    A client that connects while the target does not accept connections is accepted here and then
    reset, since TCP cannot take back an accepted connection; `refuse()` refuses as a server that
    is down does. A client for whom there is no file descriptor left, of which each connection takes
    two, is reset as well, or waits.

    After `os.fork()` it is the parent's alone: in the child it is as if stopped.
    """

    host = LOCALHOST

    def __init__(self, target_host: str, target_port: int) -> None:
        self.target_host = target_host
        self.target_port = target_port
        #: The port to connect to: 0 before the first `start()`, then the same for ever.
        self.port = 0
        # Of the processes that have ended.
        self._tally: Counter[str] = Counter()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._calling: threading.Thread | None = None
        self._numbers = itertools.count()
        # A queue, because an interrupt's handler may ask while another answer is waited for, and
        # whoever it has interrupted holds no lock of a queue.
        self._answers: dict[int, queue.SimpleQueue[Any]] = {}
        self._cuts: dict[int, Cut] = {}

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.host}:{self.port}"
            f" to {self.target_host}:{self.target_port}>"
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen and forward, with neither silence, delay, throttle nor cut.

        Raises RuntimeError if it has been started already, OSError if the target's name does not
        resolve, or if somebody else took the port after `stop()`.
        """
        if self._process is not None:
            raise RuntimeError(f"{self!r} has been started already")
        target = _resolve(self.target_host, self.target_port)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, bind(self.port) as reservation:
                self.port = reservation.getsockname()[1]
                with bind(self.port) as listener:
                    listener.listen()
                    process = _start_process((reservation, listener, theirs), target)
        except BaseException:
            self._channel.close()
            raise
        self._thread = threading.Thread(target=self._receive, name=repr(self), daemon=True)
        self._thread.start()
        self._process = process
        _started.add(self)

    def stop(self) -> None:
        """End all connections with FIN and stop listening. Does nothing if it is not running.

        A pending cut is cancelled. Raises RuntimeError if `then` of a cut calls it.
        """
        if threading.current_thread() is self._calling:
            raise RuntimeError(f"{self!r} cannot be stopped by what it calls itself")
        process, self._process = self._process, None
        if process is None:
            return
        assert self._thread is not None
        try:
            self._tally.update(self._ask("count"))
            self._forget(self._ask("stop"))
        finally:
            _started.discard(self)
            # Ends the thread and the process, if the latter has not ended by itself.
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._channel.close()
            process.wait()

    def count(self) -> Count:
        """Return what has passed so far, since the object was made."""
        present = self._call("count") if self._process is not None else {}
        return Count(**(self._tally + Counter(present)))

    def server_ports(self) -> list[int]:
        """Return the ports from which it is connected to the server at present.

        By them a server tells its sessions: ``client_port`` in PostgreSQL's pg_stat_activity, the
        end of ``host`` in MySQL's process list. Raises RuntimeError if it is not running.
        """
        return [int(port) for port in self._call("server_ports")]

    def drop(self, reset: bool = False) -> int:
        """End all present connections, to the client and to the server, with FIN.

        With `reset`, end them with RST. What was held back is lost. Returns how many connections
        there were; their sockets are closed by then. Raises RuntimeError if it is not running.
        """
        return int(self._call("drop", reset))

    def cut(
        self,
        direction: str,
        after: int,
        reset: bool = False,
        then: Callable[[], object] | None = None,
    ) -> Cut:
        """End all connections once, as soon as `after` more bytes have passed in a direction.

        `direction` is "to_server" or "to_client". The bytes are those of all connections, present
        and new, as `count()` counts them from this call on; bytes held back by `silence()` or
        `delay()` have not passed. With `after` 0 the cut happens when the next byte is about to
        pass, and that byte does not. From the cut on nothing passes in either direction; what is
        held, and the rest of what crossed the boundary, is lost. Then, in this order:

        1. If `then` or a RST is to follow, what has passed is delivered: the receivers' kernels
           have acknowledged it, which takes some 40 ms if they delay it.
        2. `then` is called, without arguments, while the connections are still open.
        3. The connections are ended: with RST if `reset`, else with FIN, and the sockets are
           closed when the FIN, and so all before it, has been acknowledged.
        4. New connections are accepted and forwarded, those made meanwhile included.

        Acknowledged is not read: Linux lets a receiver read what came before a RST, other systems
        may discard it. A receiver that leaves no room for the bytes is waited for no longer than
        5 seconds, before `then` as before the end, and loses them.

        `then` runs in a thread of its own. It may block, and everybody waits with it: nothing
        is forwarded, and methods called from other threads return after it, or raise TimeoutError
        after 30 seconds. It may call all methods but `stop()`, so `refuse()`, or `cut()` for the
        next one. What it raises does not keep the connections from being ended; `Cut.wait()`
        raises it.

        Returns an object to wait for the cut with. Raises ValueError for another direction, if
        `after` is not an integer of at least 0, or if `then` cannot be called; RuntimeError if
        another cut is pending, or if it is not running.
        """
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {list(DIRECTIONS)}, not {direction!r}")
        if not isinstance(after, int) or after < 0:
            raise ValueError(f"after must be a number of bytes, not {after!r}")
        return self._prepare_cut(direction, after, reset, then)

    def cut_at_commit(self, reset: bool = False, then: Callable[[], object] | None = None) -> Cut:
        """End all connections once, in place of passing on the next answer to a COMMIT.

        What the server has committed its client then never hears of; nor of what else came with
        that answer. A change outside of a transaction is a COMMIT, too: see `Count.commits`, also
        for what cannot be read. So is what a new connection does first to have its row in the
        `Ledger`: begin before, or have the pool connect. All else is as `cut()` has it, which
        raises the same.
        """
        return self._prepare_cut("to_client", None, reset, then)

    def _prepare_cut(
        self,
        direction: str,
        after: int | None,
        reset: bool,
        then: Callable[[], object] | None,
    ) -> Cut:
        if then is not None and not callable(then):
            raise ValueError(f"then must be callable, not {then!r}")
        cut, number = Cut(then), next(self._numbers)
        self._cuts[number] = cut
        calls = then is not None
        try:
            is_first = self._call("cut", number, direction, after, reset, calls, _DELIVERY_TIMEOUT)
        except BaseException:
            del self._cuts[number]
            raise
        if not is_first:
            del self._cuts[number]
            raise RuntimeError(f"{self!r} has a cut pending already")
        return cut

    def cancel_cut(self) -> bool:
        """Forget the cut that has not happened yet, and return whether there was one.

        Raises RuntimeError if it is not running.
        """
        return self._forget(self._call("cancel_cut"))

    def refuse(self) -> None:
        """Refuse new connections until `accept()`; present ones live on.

        Raises RuntimeError if it is not running.
        """
        self._call("refuse")

    def accept(self) -> None:
        """Accept new connections again, on the same port.

        Raises RuntimeError if it is not running.
        """
        self._call("accept")

    def silence(self, direction: str = "both") -> None:
        """Hold back what is sent in a direction, the ends of connections included.

        `direction` is "to_server", "to_client" or "both"; a direction that is silent already
        remains so. New connections are accepted, and are silent too. Raises ValueError for
        another direction, RuntimeError if it is not running.
        """
        if direction not in _DIRECTIONS:
            raise ValueError(f"direction must be one of {list(_DIRECTIONS)}, not {direction!r}")
        self._call("silence", _DIRECTIONS[direction])

    def resume(self) -> None:
        """End the silence: deliver what was held back, and go on.

        Raises RuntimeError if it is not running.
        """
        self._call("resume")

    def delay(self, seconds: float) -> None:
        """Forward everything that many seconds after it came, in the same order; 0 ends that.

        It applies to what is held at that moment, too. Connecting itself is not delayed. Raises
        ValueError if `seconds` is negative, RuntimeError if it is not running.
        """
        if not seconds >= 0:
            raise ValueError(f"seconds must not be negative, but is {seconds!r}")
        self._call("delay", seconds)

    def throttle(self, bytes_per_second: float | None) -> None:
        """Forward no more than that, in each direction, over all connections; None ends that.

        It passes in pieces of a twentieth of a second. A sender soon has to wait, because little is
        held here: the receive buffers of the kernel become small, too, and stay so until their
        connections end. Raises ValueError if the rate is not positive, RuntimeError if it is not
        running.
        """
        if bytes_per_second is not None and not bytes_per_second > 0:
            raise ValueError(f"bytes_per_second must be positive, but is {bytes_per_second!r}")
        self._call("throttle", bytes_per_second)

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._process is None:
            raise RuntimeError(f"{self!r} is not running")
        return self._ask(name, *arguments)

    def _ask(self, name: str, *arguments: Any) -> Any:
        """Have the process do what its method of that name does; what that returns."""
        number, is_called = next(self._numbers), threading.current_thread() is self._calling
        answers = self._answers[number] = queue.SimpleQueue()
        try:
            self._channel.send(json.dumps((number, is_called, name, arguments)).encode())
            answer = answers.get(timeout=_COMMAND_TIMEOUT)
        except queue.Empty:
            raise TimeoutError(f"{self!r} has not done it in {_COMMAND_TIMEOUT} seconds") from None
        except OSError as error:
            raise self._has_ended() from error
        finally:
            self._answers.pop(number, None)
        if answer is _ENDED:
            raise self._has_ended()
        return answer

    def _has_ended(self) -> RuntimeError:
        return RuntimeError(f"{self!r} is not running: its process has ended")

    def _forget(self, number: int | None) -> bool:
        """Cancel the cut that does not happen; whether there is one."""
        return number is not None and self._cuts.pop(number)._outcome.cancel()

    # In threads of its own

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while message := self._channel.recv(_forwarder.LONGEST_MESSAGE):
                kind, number, result = json.loads(message)
                if kind == "answer":
                    # Who has asked may have been interrupted.
                    if (answers := self._answers.pop(number, None)) is not None:
                        answers.put(result)
                elif kind == "call":
                    self._calling = threading.Thread(
                        target=self._have_called,
                        args=(self._cuts[number],),
                        name=repr(self),
                        daemon=True,
                    )
                    self._calling.start()
                else:
                    self._cuts.pop(number)._has_happened()
        for answers in list(self._answers.values()):
            answers.put(_ENDED)

    def _have_called(self, cut: Cut) -> None:
        cut._call()
        with contextlib.suppress(RuntimeError):
            self._ask("go_on")


def _resolve(host: str, port: int) -> tuple[int, Any]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _type, _protocol, _name, address = min(
        found, key=lambda each: each[0] != socket.AF_INET
    )
    return family, address


def _start_process(
    sockets: tuple[socket.socket, ...], target: tuple[int, Any]
) -> subprocess.Popen[bytes]:
    descriptors = [each.fileno() for each in sockets]
    family, address = target
    program = [sys.executable, "-I", "-S", _forwarder.__file__]
    return subprocess.Popen(
        [*program, *map(str, descriptors), str(int(family)), json.dumps(address)],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd="/",
        # An interrupt from the keyboard is for the tests alone.
        start_new_session=True,
    )


_started: weakref.WeakSet[PortForward] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """A copy of its end that is open in a forked child would keep the process from ending."""
    for forward in list(_started):
        forward._channel.close()
        if forward._process is not None:
            # So that nobody waits for it.
            forward._process.returncode = 0
        forward._process = forward._thread = None
    _started.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
