"""A TCP forwarder on 127.0.0.1 that fails on request and counts what passes through it."""

from __future__ import annotations

import enum
import errno
import fcntl
import math
import os
import selectors
import socket
import struct
import termios
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import astuple, dataclass
from typing import Any, Literal, TypeVar, get_args

from zreconnect.testing._ports import LOCALHOST, bind

Direction = Literal["to_server", "to_client"]
Result = TypeVar("Result")

_DIRECTIONS: dict[str, frozenset[str]] = {
    "to_server": frozenset({"to_server"}),
    "to_client": frozenset({"to_client"}),
    "both": frozenset({"to_server", "to_client"}),
}
_CHUNK = 65536
_HELD_BYTES_LIMIT = 1 << 20
_PIECES_PER_SECOND = 20
_COMMAND_TIMEOUT = 30.0
_LINGER_RESET = struct.pack("ii", 1, 0)
_DELIVERY_TIMEOUT = 5.0
_DELIVERY_POLL_INTERVAL = 0.0005
_TCP_CLOSE = 7

_SSL_REQUEST = 80877103
_GSSENC_REQUEST = 80877104
_LONGEST_STARTUP_PACKET = 10000


@dataclass(frozen=True)
class Count:
    """What has passed through a PortForward, over all its connections.

    Bytes and messages count at the moment they are sent on, so those that are held back do not
    count yet, and whatever a client has received is counted. A round trip is a turn of a
    connection's direction from client-to-server to server-to-client. Messages are whole messages
    of PostgreSQL's protocol in clear text, the one-byte answer to a request for encryption
    included; other protocols and encrypted connections count none.

    Subtract an earlier count to get what has happened since.
    """

    connections: int = 0
    bytes_to_server: int = 0
    bytes_to_client: int = 0
    messages_to_server: int = 0
    messages_to_client: int = 0
    round_trips: int = 0

    def __sub__(self, earlier: Count) -> Count:
        return Count(
            *(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True))
        )


class Cut:
    """A cut that `PortForward.cut()` has prepared."""

    def __init__(
        self, direction: str, after: int, reset: bool, then: Callable[[], object] | None
    ) -> None:
        self._direction = direction
        self._remaining = after
        self._reset = reset
        self._then = then
        self._due = False
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

    def _clip(self, direction: Direction, chunk: bytes) -> bytes:
        """Return what may still pass of the bytes that are about to."""
        if direction != self._direction:
            return chunk
        passing = chunk[: self._remaining]
        self._remaining -= len(passing)
        self._due = not self._remaining
        return passing


class PortForward:
    """Forwards TCP connections from a port of 127.0.0.1 to a server, and fails on request.

    `target_host` and `target_port` say where the server listens; the host is resolved by
    `start()`, an IPv4 address is preferred. Use it as a context manager, or call `start()` and
    `stop()`. All methods can be called from any thread. What they ask for is done when they
    return, after everything that had reached the forwarder by then was forwarded.

    A client that connects while the target does not accept connections is accepted here and then
    reset, since TCP cannot take back an accepted connection; `refuse()` refuses as a server that
    is down does.

    After `os.fork()` the child's copies of the sockets are closed, the parent's are untouched.
    """

    host = LOCALHOST

    def __init__(self, target_host: str, target_port: int) -> None:
        self.target_host = target_host
        self.target_port = target_port
        #: The port to connect to: 0 before the first `start()`, then the same for ever.
        self.port = 0
        self._tally: Counter[str] = Counter()
        self._thread: threading.Thread | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self._connections: set[_Connection] = set()
        self._listener: socket.socket | None = None
        self._cut: Cut | None = None

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.host}:{self.port}"
            f" to {self.target_host}:{self.target_port}>"
        )

    def __enter__(self) -> PortForward:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen and forward, with neither silence, delay, throttle nor cut.

        Raises RuntimeError if it has been started already, OSError if the target's name does not
        resolve, or if somebody else took the port after `stop()`.
        """
        if self._thread is not None:
            raise RuntimeError(f"{self!r} has been started already")
        self._target = _resolve(self.target_host, self.target_port)
        self._reservation = bind(self.port)
        self.port = self._reservation.getsockname()[1]
        self._silent: frozenset[str] = frozenset()
        self._delay = 0.0
        self._rate = math.inf
        # When the next byte of a direction may pass, because of the rate.
        self._free_at = dict.fromkeys(get_args(Direction), 0.0)
        self._cut = None
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        self._listen()
        self._thread = threading.Thread(target=self._loop, name=repr(self), daemon=True)
        self._thread.start()
        _started.add(self)

    def stop(self) -> None:
        """End all connections with FIN and stop listening. Does nothing if it is not running.

        A pending cut is cancelled. Raises RuntimeError if `then` of a cut calls it.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"{self!r} cannot be stopped by what it calls itself")
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._ask(self._leave_loop)
        thread.join()
        _started.discard(self)
        for each in (self._selector, self._wake_reader, self._wake_writer, self._reservation):
            each.close()

    def count(self) -> Count:
        """Return what has passed so far, since the object was made."""
        if self._thread is None:
            return Count(**self._tally)
        return self._call(lambda: Count(**self._tally))

    def drop(self, reset: bool = False) -> int:
        """End all present connections, to the client and to the server, with FIN.

        With `reset`, end them with RST. What was held back is lost. Returns how many connections
        there were; their sockets are closed by then. Raises RuntimeError if it is not running.
        """
        return self._call(lambda: self._drop(reset))

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

        `then` runs in the forwarder's thread. It may block, and everybody waits with it: nothing
        is forwarded, and methods called from other threads return after it, or raise TimeoutError
        after 30 seconds. It may call all methods but `stop()`, so `refuse()`, or `cut()` for the
        next one. What it raises does not keep the connections from being ended; `Cut.wait()`
        raises it.

        Returns an object to wait for the cut with. Raises ValueError for another direction, if
        `after` is not an integer of at least 0, or if `then` cannot be called; RuntimeError if
        another cut is pending, or if it is not running.
        """
        if direction not in get_args(Direction):
            raise ValueError(
                f"direction must be one of {list(get_args(Direction))}, not {direction!r}"
            )
        if not isinstance(after, int) or after < 0:
            raise ValueError(f"after must be a number of bytes, not {after!r}")
        if then is not None and not callable(then):
            raise ValueError(f"then must be callable, not {then!r}")
        cut = Cut(direction, after, reset, then)

        def prepare() -> None:
            if self._cut is not None:
                raise RuntimeError(f"{self!r} has a cut pending already")
            self._cut = cut

        self._call(prepare)
        return cut

    def cancel_cut(self) -> bool:
        """Forget the cut that has not happened yet, and return whether there was one.

        Raises RuntimeError if it is not running.
        """
        return self._call(self._cancel_cut)

    def refuse(self) -> None:
        """Refuse new connections until `accept()`; present ones live on.

        Raises RuntimeError if it is not running.
        """
        self._call(self._close_listener)

    def accept(self) -> None:
        """Accept new connections again, on the same port.

        Raises RuntimeError if it is not running.
        """
        self._call(self._listen)

    def silence(self, direction: str = "both") -> None:
        """Hold back what is sent in a direction, the ends of connections included.

        `direction` is "to_server", "to_client" or "both"; a direction that is silent already
        remains so. New connections are accepted, and are silent too. Raises ValueError for
        another direction, RuntimeError if it is not running.
        """
        if direction not in _DIRECTIONS:
            raise ValueError(f"direction must be one of {list(_DIRECTIONS)}, not {direction!r}")

        def hold_back() -> None:
            self._silent |= _DIRECTIONS[direction]

        self._call(hold_back)

    def resume(self) -> None:
        """End the silence: deliver what was held back, and go on.

        Raises RuntimeError if it is not running.
        """

        def release() -> None:
            self._silent = frozenset()

        self._call(release)

    def delay(self, seconds: float) -> None:
        """Forward everything that many seconds after it came, in the same order; 0 ends that.

        It applies to what is held at that moment, too. Connecting itself is not delayed. Raises
        ValueError if `seconds` is negative, RuntimeError if it is not running.
        """
        if not seconds >= 0:
            raise ValueError(f"seconds must not be negative, but is {seconds!r}")

        def set_delay() -> None:
            self._delay = seconds

        self._call(set_delay)

    def throttle(self, bytes_per_second: float | None) -> None:
        """Forward no more than that, in each direction, over all connections; None ends that.

        It passes in pieces of a twentieth of a second. A sender soon has to wait, because little is
        held here: the receive buffers of the kernel become small, too, and stay so until their
        connections end. Raises ValueError if the rate is not positive, RuntimeError if it is not
        running.
        """
        if bytes_per_second is not None and not bytes_per_second > 0:
            raise ValueError(f"bytes_per_second must be positive, but is {bytes_per_second!r}")

        def set_rate() -> None:
            self._rate = bytes_per_second or math.inf
            self._free_at = dict.fromkeys(self._free_at, 0.0)
            for connection in self._connections:
                self._limit_buffers(connection)

        self._call(set_rate)

    def _call(self, function: Callable[[], Result]) -> Result:
        if self._thread is None:
            raise RuntimeError(f"{self!r} is not running")
        return self._ask(function)

    def _ask(self, function: Callable[[], Result]) -> Result:
        """Have the loop's thread, the only one that touches connections, call the function."""
        if threading.current_thread() is self._thread:
            return function()
        future: Future[Result] = Future()

        def command() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._commands.append(command)
        self._wake_writer.send(b"\0")
        return future.result(_COMMAND_TIMEOUT)

    # What follows runs in the loop's thread.

    def _loop(self) -> None:
        while not self._stopping:
            woken = False
            for key, _events in self._selector.select(self._seconds_to_next_release()):
                if key.fileobj is self._wake_reader:
                    woken = True
                elif key.fileobj is self._listener:
                    self._accept_pending()
                else:
                    self._receive(key.data, key.fileobj)
            for connection in list(self._connections):
                self._advance(connection)
            if self._cut is not None and self._cut._due:
                self._perform(self._cut)
            if woken:
                # One for each round, so that whatever happened before a command was given is
                # seen by the round that executes it.
                self._wake_reader.recv(1)
                self._commands.popleft()()

    def _perform(self, cut: Cut) -> None:
        self._cut = None
        if cut._reset or cut._then is not None:
            self._deliver()
        error: BaseException | None = None
        try:
            if cut._then is not None:
                cut._then()
        except BaseException as raised:
            error = raised
        if not cut._reset:
            # Closed at once, a socket would answer what it still receives with RST, and with
            # that forget what it has not delivered.
            self._deliver(_End.FIN)
        self._drop(cut._reset)
        if error is not None:
            cut._outcome.set_exception(error)
        else:
            cut._outcome.set_result(None)

    def _deliver(self, ending: _End | None = None) -> None:
        """Send what has passed, and the end if there is one, until it is all acknowledged."""
        deadline = time.monotonic() + _DELIVERY_TIMEOUT
        undelivered = [
            (connection, flow)
            for connection in self._connections
            if connection.connected
            for flow in connection.flows
        ]
        for _connection, flow in undelivered:
            flow.ending = flow.ending or ending
        while undelivered and time.monotonic() < deadline:
            for connection, flow in undelivered:
                self._send(connection, flow)
            undelivered = [
                (connection, flow)
                for connection, flow in undelivered
                if flow.outgoing or _unacknowledged(flow.destination)
            ]
            if undelivered:
                time.sleep(_DELIVERY_POLL_INTERVAL)

    def _cancel_cut(self) -> bool:
        cut, self._cut = self._cut, None
        return cut is not None and cut._outcome.cancel()

    def _leave_loop(self) -> None:
        self._cancel_cut()
        self._drop(reset=False)
        self._close_listener()
        self._stopping = True

    def _listen(self) -> None:
        if self._listener is None:
            listener = bind(self.port)
            listener.setblocking(False)
            listener.listen()
            self._selector.register(listener, selectors.EVENT_READ)
            self._listener = listener

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _accept_pending(self) -> None:
        assert self._listener is not None
        while True:
            try:
                client, _address = self._listener.accept()
            except OSError:
                return
            self._tally["connections"] += 1
            family, address = self._target
            connection = _Connection(client, socket.socket(family, socket.SOCK_STREAM))
            self._limit_buffers(connection)
            self._connections.add(connection)
            if connection.server.connect_ex(address) in (0, errno.EINPROGRESS):
                self._selector.register(connection.server, selectors.EVENT_WRITE, connection)
            else:
                self._close(connection, reset=True)

    def _receive(self, connection: _Connection, ready: Any) -> None:
        if connection not in self._connections:
            return
        if not connection.connected:
            connection.connected = not connection.server.getsockopt(
                socket.SOL_SOCKET, socket.SO_ERROR
            )
            if not connection.connected:
                self._close(connection, reset=True)
            return
        flow = connection.flow_from(ready)
        if not flow.reading:
            return
        chunk: bytes | _End
        try:
            chunk = flow.source.recv(self._chunk())
        except BlockingIOError:
            return
        except OSError:
            chunk = _End.RESET
        if not chunk:
            chunk = _End.RESET if connection.opposite(flow).broken else _End.FIN
        flow.hold(chunk)

    def _limit_buffers(self, connection: _Connection) -> None:
        if self._rate < math.inf:
            for each in (connection.client, connection.server):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _CHUNK)

    def _chunk(self) -> int:
        """How many bytes are received at a time."""
        return max(1, int(min(_CHUNK, self._rate / _PIECES_PER_SECOND)))

    def _due(self, flow: _Flow) -> float:
        """When what a flow holds may pass."""
        return max(flow.held[0][0] + self._delay, self._free_at[flow.direction])

    def _seconds_to_next_release(self) -> float | None:
        times = [
            self._due(flow)
            for connection in self._connections
            for flow in connection.flows
            if flow.held and connection.connected and flow.direction not in self._silent
        ]
        if not times:
            return None
        return max(0.0, min(times) - time.monotonic())

    def _advance(self, connection: _Connection) -> None:
        """Send what is due, close what has ended, and see to be told when there is more to do."""
        if not connection.connected:
            return
        for flow in connection.flows:
            self._release(connection, flow)
            self._send(connection, flow)
        if any(flow.ending is _End.RESET for flow in connection.flows):
            self._close(connection, reset=True)
        elif all(flow.finished for flow in connection.flows):
            self._close(connection, reset=False)
        else:
            self._watch(connection)

    def _release(self, connection: _Connection, flow: _Flow) -> None:
        if flow.direction in self._silent:
            return
        now = time.monotonic()
        while flow.held and self._due(flow) <= now:
            if self._cut is not None and self._cut._due:
                return
            _arrival, chunk = flow.held.popleft()
            if isinstance(chunk, _End):
                flow.ending = chunk
            else:
                self._free_at[flow.direction] = now + len(chunk) / self._rate
                self._pass_on(connection, flow, chunk)

    def _pass_on(self, connection: _Connection, flow: _Flow, chunk: bytes) -> None:
        """Count the bytes and have them sent: all bytes of all connections go through here."""
        if self._cut is not None:
            chunk = self._cut._clip(flow.direction, chunk)
        if not chunk:
            return
        if flow.direction == "to_client" and connection.direction == "to_server":
            self._tally["round_trips"] += 1
        connection.direction = flow.direction
        self._tally["bytes_" + flow.direction] += len(chunk)
        self._tally["messages_" + flow.direction] += connection.framing.feed(flow.direction, chunk)
        flow.outgoing += chunk

    def _send(self, connection: _Connection, flow: _Flow) -> None:
        try:
            while flow.outgoing:
                del flow.outgoing[: flow.destination.send(flow.outgoing)]
            if flow.ending is _End.FIN and not flow.finished:
                flow.finished = True
                flow.destination.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return
        except OSError:
            # What the destination sent before it went away comes first, then its end.
            flow.outgoing.clear()
            if not flow.broken:
                flow.broken = True
                opposite = connection.opposite(flow)
                if not opposite.reading:
                    opposite.hold(_End.RESET)

    def _watch(self, connection: _Connection) -> None:
        limit = _HELD_BYTES_LIMIT if self._rate == math.inf else self._chunk()
        for flow in connection.flows:
            events = 0
            if flow.reading and flow.size() < limit:
                events |= selectors.EVENT_READ
            if connection.opposite(flow).outgoing:
                events |= selectors.EVENT_WRITE
            known = self._selector.get_map().get(flow.source)
            if known is None and events:
                self._selector.register(flow.source, events, connection)
            elif known is not None and not events:
                self._selector.unregister(flow.source)
            elif known is not None and known.events != events:
                self._selector.modify(flow.source, events, connection)

    def _drop(self, reset: bool) -> int:
        connections = list(self._connections)
        for connection in connections:
            self._close(connection, reset)
        return len(connections)

    def _close(self, connection: _Connection, reset: bool) -> None:
        self._connections.discard(connection)
        for each in (connection.client, connection.server):
            if each in self._selector.get_map():
                self._selector.unregister(each)
            if reset:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            else:
                _finish(each)
            each.close()


class _End(enum.Enum):
    """How the sender ended its side of a connection."""

    FIN = "FIN"
    RESET = "RST"


class _Flow:
    """One direction of one connection: what came from the source and is not yet sent on."""

    def __init__(
        self, direction: Direction, source: socket.socket, destination: socket.socket
    ) -> None:
        self.direction = direction
        self.source = source
        self.destination = destination
        self.held: deque[tuple[float, bytes | _End]] = deque()
        self.outgoing = bytearray()
        self.reading = True
        self.ending: _End | None = None
        self.finished = False
        self.broken = False

    def hold(self, chunk: bytes | _End) -> None:
        if isinstance(chunk, _End):
            self.reading = False
        self.held.append((time.monotonic(), chunk))

    def size(self) -> int:
        held = sum(len(chunk) for _arrival, chunk in self.held if isinstance(chunk, bytes))
        return held + len(self.outgoing)


class _Connection:
    """A client's connection and the one to the server that it is forwarded to."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        for each in (client, server):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connected = False
        self.to_server = _Flow("to_server", client, server)
        self.to_client = _Flow("to_client", server, client)
        self.flows = (self.to_server, self.to_client)
        self.direction: Direction | None = None
        self.framing = _Framing()

    def flow_from(self, source: socket.socket) -> _Flow:
        return self.to_server if source is self.client else self.to_client

    def opposite(self, flow: _Flow) -> _Flow:
        return self.to_client if flow is self.to_server else self.to_server


class _Stream:
    """How far the messages of one direction have been read."""

    def __init__(self, header_size: int) -> None:
        self.header_size = header_size
        self.header = b""
        self.remaining = 0


class _Framing:
    """Finds where PostgreSQL's messages end, in both directions of one connection.

    A client first sends packets of a length and a code. When these request encryption they are
    answered by a single byte. All else has a type byte and a length.
    """

    _STARTUP = 8
    _MESSAGE = 5
    _ANSWER = 1

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {
            "to_server": _Stream(self._STARTUP),
            "to_client": _Stream(self._MESSAGE),
        }
        self._readable = True

    def feed(self, direction: Direction, data: bytes) -> int:
        """Return how many messages of the direction end in these bytes, which come next in it."""
        stream = self._streams[direction]
        ended = 0
        rest = memoryview(data)
        while rest and self._readable:
            if stream.remaining:
                body = rest[: stream.remaining]
                rest = rest[len(body) :]
                stream.remaining -= len(body)
            else:
                part = rest[: stream.header_size - len(stream.header)]
                rest = rest[len(part) :]
                stream.header += part
                if len(stream.header) < stream.header_size or not self._read_header(stream):
                    continue
                stream.header = b""
            if not stream.remaining:
                ended += 1
        return ended

    def _read_header(self, stream: _Stream) -> bool:
        """Learn from a complete header what follows it; return False if it is not one yet."""
        if stream.header_size == self._ANSWER:
            stream.header_size = self._MESSAGE
            self._readable = stream.header in (b"N", b"E")
            # An old server answers with an error message instead.
            return stream.header == b"N"
        if stream.header_size == self._STARTUP:
            length, code = struct.unpack("!ii", stream.header)
            stream.remaining = length - self._STARTUP
            self._readable = 0 <= stream.remaining <= _LONGEST_STARTUP_PACKET
            if code in (_SSL_REQUEST, _GSSENC_REQUEST):
                self._streams["to_client"].header_size = self._ANSWER
            else:
                stream.header_size = self._MESSAGE
        else:
            _kind, length = struct.unpack("!ci", stream.header)
            stream.remaining = length - 4
            self._readable = stream.remaining >= 0
        return self._readable


def _resolve(host: str, port: int) -> tuple[int, Any]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _type, _protocol, _name, address = min(
        found, key=lambda each: each[0] != socket.AF_INET
    )
    return family, address


def _unacknowledged(connected: socket.socket) -> int:
    """Return how many bytes the peer's kernel has not acknowledged, 0 if it never will."""
    state = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    if state == _TCP_CLOSE:
        return 0
    (size,) = struct.unpack("i", fcntl.ioctl(connected, termios.TIOCOUTQ, bytes(4)))
    return int(size)


def _finish(connected: socket.socket) -> None:
    """Send FIN, and read what came meanwhile: closing a socket with unread bytes sends RST."""
    try:
        connected.shutdown(socket.SHUT_WR)
        for _chunk in range(_HELD_BYTES_LIMIT // _CHUNK):
            if not connected.recv(_CHUNK):
                return
    except OSError:
        return


_started: weakref.WeakSet[PortForward] = weakref.WeakSet()


def _close_copies_in_child() -> None:
    """A copy that is open in a forked child would keep the connections from being ended."""
    for forward in list(_started):
        forward._thread = None
        forward._selector.close()
        copies = [forward._wake_reader, forward._wake_writer, forward._reservation]
        if forward._listener is not None:
            copies.append(forward._listener)
        for connection in forward._connections:
            copies += [connection.client, connection.server]
        for each in copies:
            each.close()
    _started.clear()


os.register_at_fork(after_in_child=_close_copies_in_child)
