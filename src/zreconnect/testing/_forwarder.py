"""The process that forwards for a `PortForward`, which runs this file as a program of its own:

    python _forwarder.py RESERVATION LISTENER SOCKET FAMILY ADDRESS

It uses nothing but the standard library. The first three are file descriptors: of a socket that is
bound to the port, of one that listens there, and of one that keeps messages apart and leads to the
test process. ADDRESS is the server's, as JSON.

What comes from the test process are the names of `Forwarder`'s public methods, with a number and
arguments; each is answered with the number and the result. What goes there, too, is that a cut
wants something called, and that it has happened. The end of that socket, which the kernel brings
about however the test process dies, is the end of this one.
"""

from __future__ import annotations

import copy
import enum
import errno
import fcntl
import json
import math
import resource
import select
import selectors
import socket
import struct
import sys
import termios
import time
from collections import Counter, deque
from typing import Any

DIRECTIONS = ("to_server", "to_client")
#: Of one to or from the test process, in bytes.
LONGEST_MESSAGE = 65536

_CHUNK = 65536
_HELD_BYTES_LIMIT = 1 << 20
_PIECES_PER_SECOND = 20
_LINGER_RESET = struct.pack("ii", 1, 0)
_DELIVERY_POLL_INTERVAL = 0.0005
# Of the process, or of the machine, there is none left.
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
# Seconds until a connection is accepted, perhaps, for which there was none.
_PAUSE = 0.01
_TCP_CLOSE = 7

_SSL_REQUEST = 80877103
_GSSENC_REQUEST = 80877104
_LONGEST_STARTUP_PACKET = 10000
# Of a message: a command tag, an answer's numbers, the beginning of a statement.
_LOOKED_AT = 64
# The first words of statements, as PostgreSQL's command tags and MySQL's statements have them.
_CHANGES = {b"INSERT", b"UPDATE", b"DELETE", b"MERGE", b"REPLACE", b"COPY"}
_ABOUT_SESSIONS = {
    *(b"BEGIN", b"START", b"ROLLBACK", b"SAVEPOINT", b"RELEASE", b"SET", b"RESET", b"SHOW"),
    *(b"DISCARD", b"USE", b"LISTEN", b"UNLISTEN", b"PREPARE", b"DEALLOCATE"),
}


class _Cut:
    """A cut that has not happened yet; see `PortForward.cut`."""

    def __init__(
        self,
        number: int,
        direction: str,
        after: int | None,
        reset: bool,
        calls: bool,
        patience: float,
    ) -> None:
        self.number = number
        self.reset = reset
        self.calls = calls
        self.patience = patience
        self.due = False
        self._direction = direction
        self._remaining = after

    def clip(self, direction: str, chunk: bytes, reading: _Reading) -> bytes:
        """Return what may still pass of the bytes that are about to.

        reading: of their connection, so far. It is the answer to a COMMIT that may not pass if
        there is no number of bytes.
        """
        if direction != self._direction:
            return chunk
        if self._remaining is None:
            self.due = "commits" in copy.deepcopy(reading).feed(direction, chunk)
            return b"" if self.due else chunk
        passing = chunk[: self._remaining]
        self._remaining -= len(passing)
        self.due = not self._remaining
        return passing


class Forwarder:
    """What does the work of a `PortForward`, and has its methods.

    reservation, listener: sockets of the port; the second one listens. channel: to the test
    process. target: the server's address family and address.
    """

    def __init__(
        self,
        reservation: socket.socket,
        listener: socket.socket,
        channel: socket.socket,
        target: tuple[int, Any],
    ) -> None:
        self._reservation = reservation
        self._address = reservation.getsockname()
        self._channel = channel
        self._target = target
        self._tally: Counter[str] = Counter()
        self._connections: set[_Connection] = set()
        self._cut: _Cut | None = None
        self._is_calling = False
        # What was asked by others meanwhile.
        self._postponed: deque[bytes] = deque()
        self._silent: frozenset[str] = frozenset()
        self._delay = 0.0
        self._rate = math.inf
        # When the next byte of a direction may pass, because of the rate.
        self._free_at = dict.fromkeys(DIRECTIONS, 0.0)
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ)
        self._listener: socket.socket | None = None
        self._adopt(listener)

    def run(self) -> None:
        """Forward until it is stopped, or the test process is gone."""
        while not self._stopping:
            is_asked = False
            for key in self._ready():
                if key.fileobj is self._channel:
                    is_asked = True
                elif key.fileobj is self._listener:
                    self._accept_pending()
                else:
                    self._receive(key.data, key.fileobj)
            for connection in list(self._connections):
                self._advance(connection)
            if self._cut is not None and self._cut.due:
                self._perform(self._cut)
            if is_asked:
                # One for each round, so that whatever happened before it was asked is seen by the
                # round that does it.
                self._do(self._channel.recv(LONGEST_MESSAGE))

    # What is asked for

    def count(self) -> dict[str, int]:
        return dict(self._tally)

    def server_ports(self) -> list[int]:
        return [each.server.getsockname()[1] for each in self._connections if each.connected]

    def drop(self, reset: bool) -> int:
        connections = list(self._connections)
        for connection in connections:
            self._close(connection, reset)
        return len(connections)

    def cut(self, *arguments: Any) -> bool:
        """Whether there was none."""
        if self._cut is not None:
            return False
        self._cut = _Cut(*arguments)
        return True

    def cancel_cut(self) -> int | None:
        """The number of the cut that does not happen."""
        cut, self._cut = self._cut, None
        return None if cut is None else cut.number

    def refuse(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def accept(self) -> None:
        if self._listener is None:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(self._address)
            listener.listen()
            self._adopt(listener)

    def silence(self, directions: list[str]) -> None:
        self._silent |= set(directions)

    def resume(self) -> None:
        self._silent = frozenset()

    def delay(self, seconds: float) -> None:
        self._delay = seconds

    def throttle(self, bytes_per_second: float | None) -> None:
        self._rate = bytes_per_second or math.inf
        self._free_at = dict.fromkeys(self._free_at, 0.0)
        for connection in self._connections:
            self._limit_buffers(connection)

    def go_on(self) -> None:
        """What a cut has called has returned."""
        self._is_calling = False

    def stop(self) -> int | None:
        """The number of the cut that does not happen any more."""
        self.drop(reset=False)
        self._stopping = True
        return self.cancel_cut()

    def _do(self, message: bytes) -> None:
        if not message:
            self._stopping = True
            return
        number, _is_called, name, arguments = json.loads(message)
        self._tell("answer", number, getattr(self, name)(*arguments))

    def _tell(self, *words: object) -> None:
        self._channel.send(json.dumps(words).encode())

    # Forwarding

    def _perform(self, cut: _Cut) -> None:
        self._cut = None
        if cut.reset or cut.calls:
            self._deliver(cut.patience)
        if cut.calls:
            self._have_called(cut)
        if not cut.reset:
            # Closed at once, a socket would answer what it still receives with RST, and with
            # that forget what it has not delivered.
            self._deliver(cut.patience, _End.FIN)
        self.drop(cut.reset)
        self._tell("happened", cut.number, None)
        while self._postponed:
            self._do(self._postponed.popleft())

    def _have_called(self, cut: _Cut) -> None:
        """Do nothing but what is asked for by what the cut has called, until that returns."""
        self._is_calling = True
        self._tell("call", cut.number, None)
        while self._is_calling and not self._stopping:
            message = self._channel.recv(LONGEST_MESSAGE)
            if message and not json.loads(message)[1]:
                self._postponed.append(message)
            else:
                self._do(message)

    def _deliver(self, patience: float, ending: _End | None = None) -> None:
        """Send what has passed, and the end if there is one, until it is all acknowledged."""
        deadline = time.monotonic() + patience
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

    def _adopt(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._listener = listener

    def _accept_pending(self) -> None:
        assert self._listener is not None
        while True:
            try:
                client, _address = self._listener.accept()
            except OSError as error:
                if error.errno in _NO_DESCRIPTOR:
                    # The client waits until another connection has ended.
                    time.sleep(_PAUSE)
                return
            self._tally["connections"] += 1
            family, address = self._target
            try:
                server = socket.socket(family, socket.SOCK_STREAM)
            except OSError:
                _reset(client)
                continue
            connection = _Connection(client, server)
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

    def _ready(self) -> list[selectors.SelectorKey]:
        """Wait until there is something to read or write, or something may be released."""
        seconds = self._seconds_to_next_release()
        if seconds is not None:
            # A selector rounds the seconds up to milliseconds.
            select.select([self._selector], [], [], seconds)
            seconds = 0
        return [key for key, _events in self._selector.select(seconds)]

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
            if self._cut is not None and self._cut.due:
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
            chunk = self._cut.clip(flow.direction, chunk, connection.reading)
        if not chunk:
            return
        if flow.direction == "to_client" and connection.direction == "to_server":
            self._tally["round_trips"] += 1
        connection.direction = flow.direction
        self._tally["bytes_" + flow.direction] += len(chunk)
        self._tally.update(connection.reading.feed(flow.direction, chunk))
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

    def _close(self, connection: _Connection, reset: bool) -> None:
        self._connections.discard(connection)
        for each in (connection.client, connection.server):
            if each in self._selector.get_map():
                self._selector.unregister(each)
            if reset:
                _reset(each)
            else:
                _finish(each)
                each.close()


class _End(enum.Enum):
    """How the sender ended its side of a connection."""

    FIN = "FIN"
    RESET = "RST"


class _Flow:
    """One direction of one connection: what came from the source and is not yet sent on."""

    def __init__(self, direction: str, source: socket.socket, destination: socket.socket) -> None:
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
        self.direction: str | None = None
        self.reading = _Reading()

    def flow_from(self, source: socket.socket) -> _Flow:
        return self.to_server if source is self.client else self.to_client

    def opposite(self, flow: _Flow) -> _Flow:
        return self.to_client if flow is self.to_server else self.to_server


class _Reading:
    """What the bytes of one connection say, in the protocol of whichever side begins."""

    def __init__(self) -> None:
        self._protocol: _Postgresql | _Mysql | None = None

    def feed(self, direction: str, data: bytes) -> Counter[str]:
        """Return what ends in these bytes, which come next in the direction: see `Count`."""
        if self._protocol is None:
            # MySQL's server speaks first.
            self._protocol = _Postgresql() if direction == "to_server" else _Mysql()
        return self._protocol.feed(direction, data)


class _Stream:
    """How far the messages of one direction have been read."""

    def __init__(self, header_size: int) -> None:
        self.header_size = header_size
        self.header = b""
        self.remaining = 0
        self.kind = b""
        # No more of it than is looked at.
        self.body = b""

    def take_header(self, rest: memoryview) -> memoryview:
        """Take what it lacks of a header; return what follows."""
        part = rest[: self.header_size - len(self.header)]
        self.header += part
        return rest[len(part) :]

    def take_body(self, rest: memoryview) -> memoryview:
        """Take what it lacks of a body; return what follows."""
        part = rest[: self.remaining]
        self.remaining -= len(part)
        self.body += part[: max(0, _LOOKED_AT - len(self.body))]
        return rest[len(part) :]


class _Postgresql:
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
        # Whether a statement has changed something since the server was ready for one.
        self._has_changed = False

    def feed(self, direction: str, data: bytes) -> Counter[str]:
        stream = self._streams[direction]
        ended: Counter[str] = Counter()
        rest = memoryview(data)
        while rest and self._readable:
            if stream.remaining:
                rest = stream.take_body(rest)
            else:
                rest = stream.take_header(rest)
                if len(stream.header) < stream.header_size or not self._read_header(stream):
                    continue
                stream.header = stream.body = b""
            if not stream.remaining:
                ended["messages_" + direction] += 1
                if direction == "to_client":
                    self._answered(stream, ended)
        return ended

    def _answered(self, stream: _Stream, ended: Counter[str]) -> None:
        if stream.kind == b"C":
            word = stream.body.rstrip(b"\0").partition(b" ")[0]
            if word == b"COMMIT":
                ended["commits"] += 1
                self._has_changed = False
            elif word not in _ABOUT_SESSIONS:
                ended["results"] += 1
                self._has_changed |= word in _CHANGES
        elif stream.kind == b"Z":
            # Outside of a transaction, each statement is one.
            if self._has_changed and stream.body == b"I":
                ended["commits"] += 1
            self._has_changed = False
        elif stream.kind == b"E":
            self._has_changed = False

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
            stream.kind, length = struct.unpack("!ci", stream.header)
            stream.remaining = length - 4
            self._readable = stream.remaining >= 0
        return self._readable


class _Mysql:
    """Finds the answers to the statements of MySQL's protocol.

    All packets have a length and a number, which begins anew with each of the client's commands;
    the first packet of the answer is number 1. Compressed and encrypted connections, for which the
    client asks in its first packet, are not read.
    """

    _HEADER = 4
    _QUERY, _EXECUTE = b"\x03", b"\x17"
    _COMPRESS, _SSL, _ZSTD = 1 << 5, 1 << 11, 1 << 26
    _OK, _ERROR = 0x00, 0xFF
    _IN_TRANSACTION = 1

    def __init__(self) -> None:
        self._streams = {direction: _Stream(self._HEADER) for direction in DIRECTIONS}
        self._readable = True
        self._is_greeted = False
        # What is not answered yet: the beginning of a statement.
        self._statement: bytes | None = None
        self._in_transaction = False

    def feed(self, direction: str, data: bytes) -> Counter[str]:
        stream = self._streams[direction]
        ended: Counter[str] = Counter()
        rest = memoryview(data)
        while rest and self._readable:
            if stream.remaining:
                rest = stream.take_body(rest)
            else:
                rest = stream.take_header(rest)
                if len(stream.header) < stream.header_size:
                    continue
                stream.remaining = int.from_bytes(stream.header[:3], "little")
                stream.kind = stream.header[3:]
                stream.header = stream.body = b""
            if stream.remaining:
                continue
            if direction == "to_server":
                self._asked(stream)
            elif stream.kind == b"\1" and self._statement is not None and stream.body:
                statement, self._statement = self._statement, None
                self._answered(statement, stream.body, ended)
        return ended

    def _asked(self, stream: _Stream) -> None:
        if not self._is_greeted:
            self._is_greeted = True
            wanted = int.from_bytes(stream.body[:4], "little")
            self._readable = not wanted & (self._COMPRESS | self._SSL | self._ZSTD)
        elif stream.kind == b"\0":
            command = stream.body[:1]
            is_statement = command in (self._QUERY, self._EXECUTE)
            # A client that can send attributes says first, in two bytes, that there are none.
            text = stream.body[1:].lstrip(b"\0\1 \t\r\n") if command == self._QUERY else b""
            self._statement = text if is_statement else None

    def _answered(self, statement: bytes, body: bytes, ended: Counter[str]) -> None:
        if body[0] == self._ERROR:
            return
        text = statement.upper()
        word = text.split(maxsplit=1)[0].rstrip(b";") if text else b""
        is_commit = word == b"COMMIT"
        if body[0] == self._OK:
            changed, rest = _length_encoded(body[1:])
            _last_id, rest = _length_encoded(rest)
            was_in, self._in_transaction = (
                self._in_transaction,
                bool(int.from_bytes(rest[:2], "little") & self._IN_TRANSACTION),
            )
            # In a compound statement COMMIT is not the first word.
            ends = was_in and b"ROLLBACK" not in text
            is_commit = (is_commit or changed > 0 or ends) and not self._in_transaction
        if is_commit:
            ended["commits"] += 1
        elif word not in _ABOUT_SESSIONS:
            ended["results"] += 1


def _length_encoded(data: bytes) -> tuple[int, bytes]:
    """The integer that MySQL's packet has there, and what follows."""
    size = {0xFC: 2, 0xFD: 3, 0xFE: 8}.get(data[0])
    if size is None:
        return data[0], data[1:]
    return int.from_bytes(data[1 : 1 + size], "little"), data[1 + size :]


def _unacknowledged(connected: socket.socket) -> int:
    """Return how many bytes the peer's kernel has not acknowledged, 0 if it never will."""
    state = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    if state == _TCP_CLOSE:
        return 0
    (size,) = struct.unpack("i", fcntl.ioctl(connected, termios.TIOCOUTQ, bytes(4)))
    return int(size)


def _reset(connected: socket.socket) -> None:
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    connected.close()


def _finish(connected: socket.socket) -> None:
    """Send FIN, and read what came meanwhile: closing a socket with unread bytes sends RST."""
    try:
        connected.shutdown(socket.SHUT_WR)
        for _chunk in range(_HELD_BYTES_LIMIT // _CHUNK):
            if not connected.recv(_CHUNK):
                return
    except OSError:
        return


def main() -> None:
    # Two are needed for each connection, of which the test process has one.
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    *descriptors, family, address = sys.argv[1:]
    reservation, listener, channel = (socket.socket(fileno=int(each)) for each in descriptors)
    target = int(family), tuple(json.loads(address))
    try:
        Forwarder(reservation, listener, channel, target).run()
    except (BrokenPipeError, ConnectionResetError):
        # Of the test process, which is gone; all others are met where they come.
        return


if __name__ == "__main__":
    main()
