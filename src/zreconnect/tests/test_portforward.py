"""PortForward, before a TCP server that echoes and before PostgreSQL."""

import contextlib
import os
import resource
import select
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import unittest
from collections import Counter, deque
from unittest import mock

import psycopg2

from zreconnect.testing import Count, PortForward
from zreconnect.testing._forwarder import _Reading
from zreconnect.testing.layers import PORT_FORWARD_LAYER
from zreconnect.tests.base import ContextTestCase

TIMEOUT = 20.0


def wait_for(condition):
    """Wait until the condition holds, and return its value."""
    deadline = time.monotonic() + TIMEOUT
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError("the condition does not come to hold")
        time.sleep(0.005)
    return value


def state_of(pid):
    """Return what the kernel calls the state of the process, such as "Z"; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return None


class EchoServer(socketserver.ThreadingTCPServer):
    """Sends back what it receives, keeps its connections' sockets, and records how they ended."""

    allow_reuse_address = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), EchoHandler)
        self.port = self.server_address[1]
        self.connections = []
        self.received = bytearray()
        self.ends = []

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *_exception):
        self.shutdown()
        self.thread.join()
        self.server_close()


class EchoHandler(socketserver.BaseRequestHandler):
    def handle(self):
        self.server.connections.append(self.request)
        try:
            while chunk := self.request.recv(65536):
                self.server.received += chunk
                self.request.sendall(chunk)
            self.server.ends.append("FIN")
        except OSError as error:
            self.server.ends.append(type(error).__name__)


def reset(connected):
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connected.close()


def receive(connected, size):
    received = b""
    while len(received) < size:
        chunk = connected.recv(size - len(received))
        if not chunk:
            break
        received += chunk
    return received


def receive_all(connected):
    """Receive until the end, and return the bytes and how it ended."""
    received = b""
    try:
        while chunk := connected.recv(65536):
            received += chunk
    except ConnectionResetError:
        return received, "RST"
    return received, "FIN"


def readable(connected):
    return bool(select.select([connected], [], [], 0)[0])


class EchoTests(ContextTestCase):
    def setUp(self):
        self.server = self.enterContext(EchoServer())
        self.forward = self.enterContext(PortForward("127.0.0.1", self.server.port))

    def connect(self):
        address = (self.forward.host, self.forward.port)
        return self.enterContext(socket.create_connection(address, TIMEOUT))

    def exchange(self, client, sent=b"ping"):
        client.sendall(sent)
        self.assertEqual(receive(client, len(sent)), sent)

    def connected(self):
        client = self.connect()
        self.exchange(client)
        return client

    def connected_by_hand(self):
        """Return a forwarder and both ends of its connection; no thread uses the server's."""
        listener = self.enterContext(socket.create_server(("127.0.0.1", 0)))
        forward = self.enterContext(PortForward(*listener.getsockname()))
        address = (forward.host, forward.port)
        client = self.enterContext(socket.create_connection(address, TIMEOUT))
        accepted, _address = listener.accept()
        return forward, client, self.enterContext(accepted)


class ForwardingTests(EchoTests):
    def test_bytes_arrive_unchanged_in_both_directions(self):
        client = self.connect()
        sent = os.urandom(5_000_000)
        sender = threading.Thread(target=client.sendall, args=(sent,))
        sender.start()
        received = receive(client, len(sent))
        sender.join()
        self.assertEqual(received, sent)
        self.assertEqual(bytes(self.server.received), sent)

    def test_a_client_that_does_not_read_loses_nothing(self):
        client = self.connect()
        client.settimeout(0.2)
        sent = 0
        with contextlib.suppress(socket.timeout):
            while True:
                sent += client.send(b"x" * 65536)
        client.settimeout(TIMEOUT)
        self.assertEqual(len(receive(client, sent)), sent)

    def test_half_closed_connection_still_delivers_the_answer(self):
        client = self.connected()
        client.sendall(b"last")
        client.shutdown(socket.SHUT_WR)
        self.assertEqual(receive(client, 100), b"last")
        wait_for(lambda: self.server.ends == ["FIN"])

    def test_closing_by_the_client_reaches_the_server(self):
        self.connected().close()
        wait_for(lambda: self.server.ends == ["FIN"])
        wait_for(lambda: self.forward.drop() == 0)

    def test_reset_by_the_client_reaches_the_server(self):
        reset(self.connected())
        wait_for(lambda: self.server.ends == ["ConnectionResetError"])

    def test_closing_by_the_server_reaches_the_client(self):
        client = self.connected()
        self.server.connections[0].shutdown(socket.SHUT_RDWR)
        self.assertEqual(client.recv(1), b"")

    def test_reset_by_the_server_reaches_the_client(self):
        _forward, client, accepted = self.connected_by_hand()
        accepted.sendall(b"farewell")
        # The kernel may throw away what is not read when the reset arrives.
        self.assertEqual(receive(client, 8), b"farewell")
        reset(accepted)
        self.assertRaises(ConnectionResetError, client.recv, 1)

    def test_sending_to_a_server_that_has_closed_resets_the_client(self):
        _forward, client, accepted = self.connected_by_hand()
        accepted.sendall(b"farewell")
        accepted.close()
        self.assertEqual(receive(client, 100), b"farewell")

        def is_reset():
            try:
                client.sendall(b"x")
            except OSError:
                return True
            return False

        wait_for(is_reset)

    def test_client_of_a_server_that_is_down_is_reset(self):
        with contextlib.closing(socket.socket()) as closed:
            closed.bind(("127.0.0.1", 0))
            forward = self.enterContext(PortForward("127.0.0.1", closed.getsockname()[1]))
            client = self.enterContext(socket.create_connection(("127.0.0.1", forward.port)))
            self.assertRaises(ConnectionResetError, client.recv, 1)
            self.assertEqual(forward.drop(), 0)

    def test_target_by_name(self):
        forward = self.enterContext(PortForward("localhost", self.server.port))
        client = self.enterContext(socket.create_connection(("127.0.0.1", forward.port)))
        self.exchange(client)


class StartAndStopTests(EchoTests):
    def test_port_is_the_same_after_a_restart(self):
        client = self.connected()
        port = self.forward.port
        self.forward.stop()
        self.assertEqual(client.recv(1), b"")
        self.assertRaises(ConnectionRefusedError, self.connect)
        self.forward.start()
        self.assertEqual(self.forward.port, port)
        self.connected()

    def test_restart_ends_silence_delay_throttle_and_refusal(self):
        self.forward.silence()
        self.forward.delay(3600)
        self.forward.throttle(0.001)
        self.forward.refuse()
        self.forward.stop()
        self.forward.start()
        self.connected()

    def test_stop_without_start_does_nothing(self):
        forward = PortForward("127.0.0.1", self.server.port)
        forward.stop()
        self.assertEqual(forward.port, 0)
        self.assertEqual(forward.count(), Count())

    def test_start_twice_is_refused(self):
        self.assertRaisesRegex(RuntimeError, "started already", self.forward.start)
        self.connected()

    def test_failing_needs_a_started_forwarder(self):
        self.forward.stop()
        for method in (self.forward.drop, self.forward.refuse, self.forward.silence):
            self.assertRaisesRegex(RuntimeError, "not running", method)

    def test_threads_and_sockets_end_with_it(self):
        before = os.listdir("/proc/self/fd")
        threads = threading.active_count()
        with PortForward("127.0.0.1", self.server.port) as forward:
            forward.refuse()
        self.assertEqual(len(os.listdir("/proc/self/fd")), len(before))
        self.assertEqual(threading.active_count(), threads)

    def test_a_forked_child_keeps_nothing_open(self):
        client = self.connected()
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        try:
            self.exchange(client)
            self.assertEqual(self.forward.drop(reset=True), 1)
            self.assertRaises(ConnectionResetError, client.recv, 1)
            self.forward.refuse()
            self.assertRaises(ConnectionRefusedError, self.connect)
        finally:
            os.close(writer)
            os.close(reader)
            os.waitpid(child, 0)

    def test_a_forked_child_may_stop_its_copy(self):
        client = self.connected()
        child = os.fork()
        if not child:
            self.forward.stop()
            os._exit(0)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.exchange(client)

    def test_its_process_ends_with_it(self):
        pid = self.forward._process.pid
        self.forward.stop()
        self.assertRaises(ProcessLookupError, os.kill, pid, 0)

    def test_its_process_ends_with_the_program_however_that_ends(self):
        program = (
            # What is started in the background of a shell ignores SIGINT. A single wait would hear
            # nothing of one that comes between Python's look at signals and its begin.
            "import select, signal, sys; from zreconnect.testing import PortForward;"
            "signal.signal(signal.SIGINT, signal.default_int_handler);"
            "forward = PortForward('127.0.0.1', int(sys.argv[1])); forward.start();"
            "print(forward._process.pid, flush=True)\n"
            "while not select.select([sys.stdin], [], [], 0.01)[0]: pass"
        )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            with subprocess.Popen(
                [sys.executable, "-c", program, str(self.server.port)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            ) as running:
                pid = int(running.stdout.readline())
                running.send_signal(number)
            # Others' children become init's, which may take its time to bury them.
            wait_for(lambda pid=pid: state_of(pid) in ("Z", None))

    def test_it_outlives_a_lack_of_file_descriptors(self):
        process = self.forward._process.pid

        def limit(number):
            _soft, hard = resource.prlimit(process, resource.RLIMIT_NOFILE)
            resource.prlimit(process, resource.RLIMIT_NOFILE, (number, hard))

        first = self.connected()
        _soft, before = resource.prlimit(process, resource.RLIMIT_NOFILE)
        # It has some that it was started with, whose numbers leave gaps.
        used = set(map(int, os.listdir(f"/proc/{process}/fd")))
        free = [number for number in range(len(used) + 2) if number not in used]
        # For one more connection there is one too few; for the next, none.
        for left, end in ((1, "RST"), (0, None)):
            with self.subTest(left):
                limit(free[left])
                try:
                    client = self.connect()
                    received = None if end is None else receive_all(client)
                except ConnectionResetError:
                    received = b"", "RST"
                self.assertEqual(received, end and (b"", end))
                self.exchange(first)
                self.assertGreater(self.forward.count().connections, 0)
        # Who has waited is let in when there are some.
        client.sendall(b"b")
        limit(before)
        self.assertEqual(receive(client, 1), b"b")

    def test_its_process_has_as_many_file_descriptors_as_it_may(self):
        soft, hard = resource.prlimit(self.forward._process.pid, resource.RLIMIT_NOFILE)
        self.assertEqual(soft, hard)

    def test_who_asks_is_told_when_its_process_has_died(self):
        self.forward._process.kill()
        self.forward._process.wait()
        self.assertRaisesRegex(RuntimeError, "its process has ended", self.forward.drop)
        self.assertRaisesRegex(RuntimeError, "its process has ended", self.forward.stop)
        self.forward.start()
        self.connected()

    def test_a_signal_handler_may_ask_whoever_is_interrupted(self):
        handled = []
        handler = signal.signal(signal.SIGALRM, lambda *_: handled.append(self.forward.count()))
        self.addCleanup(signal.signal, signal.SIGALRM, handler)
        for number in range(1, 101):
            signal.setitimer(signal.ITIMER_REAL, 0.0001)
            wait_for(lambda number=number: self.forward.drop() == 0 and len(handled) == number)


class DropTests(EchoTests):
    def test_drop_ends_both_sides_with_fin(self):
        clients = [self.connected(), self.connected()]
        self.assertEqual(self.forward.drop(), 2)
        for client in clients:
            self.assertEqual(client.recv(1), b"")
        wait_for(lambda: self.server.ends == ["FIN", "FIN"])
        self.assertEqual(self.forward.drop(), 0)

    def test_drop_with_unread_bytes_ends_with_fin_too(self):
        client = self.connected()
        self.forward.silence("to_server")
        # More than the forwarder takes up, so that some of it remains in its socket's buffer.
        client.settimeout(0.2)
        with contextlib.suppress(socket.timeout):
            while True:
                client.send(b"x" * 65536)
        client.settimeout(TIMEOUT)
        client.shutdown(socket.SHUT_WR)
        self.forward.drop()
        self.assertEqual(client.recv(1), b"")

    def test_drop_with_reset(self):
        client = self.connected()
        self.assertEqual(self.forward.drop(reset=True), 1)
        self.assertRaises(ConnectionResetError, client.recv, 1)
        wait_for(lambda: self.server.ends == ["ConnectionResetError"])

    def test_drop_includes_a_connection_just_made(self):
        for _ in range(50):
            client = self.connect()
            self.assertEqual(self.forward.drop(reset=True), 1)
            self.assertRaises(ConnectionResetError, client.recv, 1)

    def test_new_connections_work_after_drop(self):
        self.connected()
        self.forward.drop()
        self.connected()

    def test_drop_loses_what_was_held_back(self):
        client = self.connected()
        self.forward.silence("to_server")
        client.sendall(b"lost")
        self.forward.drop()
        self.forward.resume()
        self.connected()
        self.assertNotIn(b"lost", self.server.received)


class CutTests(EchoTests):
    ends_by = ((False, "FIN"), (True, "RST"))

    def cut_in_passing(self, client, direction, after, reset):
        """Send eight bytes, have them cut, and return what the server and the client received."""
        before = len(self.server.received)
        cut = self.forward.cut(direction, after, reset=reset)
        client.sendall(b"12345678")
        received = receive_all(client)
        self.assertTrue(cut.wait(TIMEOUT))
        wait_for(lambda: len(self.server.ends) == self.forward.count().connections)
        return bytes(self.server.received[before:]), received

    def test_to_server_exactly_so_many_bytes_arrive(self):
        for with_reset, end in self.ends_by:
            for after in range(9):
                count = self.forward.count()
                at_server, at_client = self.cut_in_passing(
                    self.connect(), "to_server", after, with_reset
                )
                self.assertEqual(at_server, b"12345678"[:after])
                self.assertEqual(at_client, (b"", end))
                expected = Count(connections=1, bytes_to_server=after)
                self.assertEqual(self.forward.count() - count, expected)

    def test_to_client_exactly_so_many_bytes_arrive(self):
        for with_reset, end in self.ends_by:
            for after in range(9):
                at_server, at_client = self.cut_in_passing(
                    self.connect(), "to_client", after, with_reset
                )
                self.assertEqual(at_server, b"12345678")
                self.assertEqual(at_client, (b"12345678"[:after], end))

    def test_both_sides_are_ended_alike(self):
        for with_reset, seen in ((False, "FIN"), (True, "ConnectionResetError")):
            self.server.ends.clear()
            self.connected()
            cut = self.forward.cut("to_server", 0, reset=with_reset)
            self.connect().sendall(b"x")
            self.assertTrue(cut.wait(TIMEOUT))
            wait_for(lambda seen=seen: self.server.ends == [seen, seen])

    def test_it_happens_once(self):
        client = self.connected()
        cut = self.forward.cut("to_server", 4)
        self.assertFalse(cut.happened)
        client.sendall(b"1234")
        self.assertEqual(receive_all(client), (b"", "FIN"))
        self.assertTrue(cut.wait(TIMEOUT))
        self.assertTrue(cut.happened)
        self.assertFalse(self.forward.cancel_cut())
        client = self.connected()
        self.exchange(client, b"1234" * 10)

    def test_bytes_count_from_the_call_on_and_over_all_connections(self):
        first, second = self.connected(), self.connected()
        cut = self.forward.cut("to_client", 6)
        self.exchange(first, b"12")
        self.exchange(second, b"34")
        third = self.connect()
        self.exchange(third, b"5")
        self.assertFalse(cut.happened)
        third.sendall(b"6789")
        self.assertEqual(receive_all(third), (b"6", "FIN"))
        self.assertEqual(receive_all(first), (b"", "FIN"))
        self.assertEqual(receive_all(second), (b"", "FIN"))

    def test_large_amounts_are_delivered_to_slow_receivers(self):
        sent = os.urandom(5_000_000)
        for with_reset, end in self.ends_by:
            client = self.connect()
            cut = self.forward.cut("to_client", 3_000_001, reset=with_reset)
            sender = threading.Thread(target=self.send_in_vain, args=(client, sent))
            sender.start()
            received = b""
            # Until the rest fits into the client's buffer, the forwarder waits for the client.
            while not cut.happened and len(received) < 3_000_001:
                received += client.recv(20_000)
            rest, how = receive_all(client)
            sender.join()
            self.assertEqual((received + rest, how), (sent[:3_000_001], end))

    def send_in_vain(self, client, data):
        with contextlib.suppress(ConnectionError):
            client.sendall(data)

    def cut_with_a_full_line(self):
        """Return the ends of a connection, and a cut that has to wait for the server to read."""
        forward, client, accepted = self.connected_by_hand()
        client.setblocking(False)
        passed = deque([-1, 0], maxlen=20)
        # Each count gives the forwarder the time to pass on what there is room for.
        while len(set(passed)) > 1:
            with contextlib.suppress(BlockingIOError):
                while True:
                    client.send(bytes(65536))
            passed.append(forward.count().bytes_to_server)
        client.settimeout(TIMEOUT)
        cut = forward.cut("to_client", 1, reset=True)
        accepted.sendall(b"12")
        self.assertEqual(client.recv(1), b"1")
        return client, accepted, cut, passed[-1]

    def test_a_receiver_that_does_not_read_is_cut_off_in_the_end(self):
        with mock.patch("zreconnect.testing.portforward._DELIVERY_TIMEOUT", 0.05):
            client, accepted, cut, passed = self.cut_with_a_full_line()
            self.assertTrue(cut.wait(TIMEOUT))
        self.assertEqual(receive_all(client), (b"", "RST"))
        received, end = receive_all(accepted)
        self.assertEqual(end, "RST")
        self.assertLess(len(received), passed)

    def test_a_receiver_that_goes_away_is_not_waited_for(self):
        with mock.patch("zreconnect.testing.portforward._DELIVERY_TIMEOUT", 2 * TIMEOUT):
            client, accepted, cut, _passed = self.cut_with_a_full_line()
            self.assertFalse(cut.happened)
            reset(accepted)
            self.assertTrue(cut.wait(TIMEOUT))
        self.assertEqual(receive_all(client), (b"", "RST"))

    def test_nothing_passes_in_the_other_direction_either(self):
        forward, client, accepted = self.connected_by_hand()
        forward.silence()
        client.sendall(b"1234")
        accepted.sendall(b"abcd")
        cut = forward.cut("to_server", 2)
        forward.resume()
        self.assertTrue(cut.wait(TIMEOUT))
        self.assertEqual(receive_all(accepted), (b"12", "FIN"))
        self.assertEqual(receive_all(client), (b"", "FIN"))
        self.assertEqual(forward.count(), Count(connections=1, bytes_to_server=2))

    def test_what_is_held_back_has_not_passed(self):
        client = self.connected()
        self.forward.silence("to_server")
        cut = self.forward.cut("to_server", 2)
        client.sendall(b"1234")
        self.forward.count()
        self.assertFalse(cut.happened)
        self.forward.resume()
        self.assertTrue(cut.wait(TIMEOUT))
        wait_for(lambda: self.server.ends == ["FIN"])
        self.assertEqual(bytes(self.server.received), b"ping12")

    def test_drop_leaves_it_pending(self):
        cut = self.forward.cut("to_server", 5)
        self.connected()
        self.forward.drop()
        self.connect().sendall(b"x")
        self.assertTrue(cut.wait(TIMEOUT))

    def test_then_comes_after_delivery_and_before_the_end(self):
        for with_reset, end in self.ends_by:
            self.server.received.clear()
            self.server.ends.clear()
            client = self.connect()
            seen = []

            def look(client=client, seen=seen):
                wait_for(lambda: self.server.received == b"123")
                seen.append((self.server.ends[:], readable(client)))

            cut = self.forward.cut("to_server", 3, reset=with_reset, then=look)
            client.sendall(b"1234")
            self.assertTrue(cut.wait(TIMEOUT))
            self.assertEqual(seen, [([], False)])
            self.assertEqual(receive_all(client), (b"", end))
            wait_for(lambda: self.server.ends)

    def test_then_may_block(self):
        client = self.connected()
        entered, leave = threading.Event(), threading.Event()
        self.addCleanup(leave.set)

        def block():
            entered.set()
            leave.wait(TIMEOUT)

        cut = self.forward.cut("to_server", 1, then=block)
        client.sendall(b"x")
        self.assertTrue(entered.wait(TIMEOUT))
        late = self.connect()
        late.sendall(b"late")
        self.assertFalse(cut.wait(0.05))
        self.assertFalse(readable(client))
        leave.set()
        self.assertTrue(cut.wait(TIMEOUT))
        self.assertEqual(receive_all(client), (b"", "FIN"))
        self.assertEqual(receive(late, 4), b"late")

    def test_then_may_ask_the_forwarder(self):
        client = self.connected()
        counts, cuts = [], []

        def ask():
            counts.append(self.forward.count())
            cuts.append(self.forward.cut("to_client", 2))
            self.forward.refuse()

        before = self.forward.count()
        cut = self.forward.cut("to_server", 3, then=ask)
        client.sendall(b"1234")
        self.assertTrue(cut.wait(TIMEOUT))
        self.assertEqual([count - before for count in counts], [Count(bytes_to_server=3)])
        self.assertRaises(ConnectionRefusedError, self.connect)
        self.forward.accept()
        client = self.connect()
        client.sendall(b"1234")
        self.assertEqual(receive_all(client), (b"12", "FIN"))
        self.assertTrue(cuts[0].wait(TIMEOUT))

    def test_wait_raises_what_then_raised(self):
        client = self.connected()
        for then, error in ((lambda: 1 / 0, ZeroDivisionError), (self.forward.stop, RuntimeError)):
            cut = self.forward.cut("to_server", 1, then=then)
            client.sendall(b"x")
            self.assertEqual(receive_all(client), (b"", "FIN"))
            self.assertRaises(error, cut.wait, TIMEOUT)
            self.assertTrue(cut.happened)
            client = self.connected()

    def test_cancelled_cuts_never_happen(self):
        client = self.connected()
        cut = self.forward.cut("to_server", 3)
        self.exchange(client, b"12")
        self.assertTrue(self.forward.cancel_cut())
        self.assertFalse(self.forward.cancel_cut())
        self.exchange(client, b"34")
        self.assertFalse(cut.wait(TIMEOUT))
        self.assertFalse(cut.happened)
        self.forward.cut("to_server", 1)
        client.sendall(b"x")
        self.assertEqual(receive_all(client), (b"", "FIN"))

    def test_who_waits_learns_of_the_end_of_waiting(self):
        for cancel in (self.forward.cancel_cut, self.forward.stop):
            cut = self.forward.cut("to_server", 1)
            answers = []
            waiting = threading.Thread(
                target=lambda cut=cut, answers=answers: answers.append(cut.wait(2 * TIMEOUT))
            )
            waiting.start()
            cancel()
            waiting.join(TIMEOUT)
            self.assertEqual(answers, [False])
        self.forward.start()
        self.connected()

    def test_one_at_a_time(self):
        cut = self.forward.cut("to_server", 1)
        self.assertRaisesRegex(RuntimeError, "pending already", self.forward.cut, "to_client", 1)
        self.connect().sendall(b"x")
        self.assertTrue(cut.wait(TIMEOUT))

    def test_bad_arguments(self):
        for arguments, message in (
            (("both", 1), "^direction must be one of .*to_server.*to_client.* not 'both'$"),
            (("to_server", -1), "^after must be a number of bytes, not -1$"),
            (("to_server", 1.5), "^after must be a number of bytes, not 1.5$"),
            (("to_server", 1, False, "later"), "^then must be callable, not 'later'$"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                self.forward.cut(*arguments)
        self.assertFalse(self.forward.cancel_cut())
        self.forward.stop()
        self.assertRaisesRegex(RuntimeError, "not running", self.forward.cut, "to_server", 1)


class RefuseTests(EchoTests):
    def test_new_connections_are_refused_and_present_ones_live(self):
        client = self.connected()
        self.forward.refuse()
        self.assertRaises(ConnectionRefusedError, self.connect)
        self.exchange(client)

    def test_a_thousand_attempts_never_reach_anybody(self):
        # The port is one that the kernel could give to the client's own end.
        self.forward.refuse()
        for _ in range(1000):
            self.assertRaises(ConnectionRefusedError, self.connect)

    def test_accept_uses_the_same_port(self):
        self.connected()
        self.forward.refuse()
        self.forward.refuse()
        self.forward.accept()
        self.forward.accept()
        self.connected()


class SilenceTests(EchoTests):
    def test_silence_to_the_server(self):
        client = self.connected()
        self.forward.silence("to_server")
        client.sendall(b"held")
        self.server.connections[0].sendall(b"news")
        self.assertEqual(receive(client, 4), b"news")
        self.assertEqual(bytes(self.server.received), b"ping")
        self.forward.resume()
        self.assertEqual(receive(client, 4), b"held")

    def test_silence_to_the_client(self):
        client = self.connected()
        self.forward.silence("to_client")
        client.sendall(b"asked")
        wait_for(lambda: bytes(self.server.received) == b"pingasked")
        self.forward.count()
        self.assertFalse(readable(client))
        self.forward.resume()
        self.assertEqual(receive(client, 5), b"asked")

    def test_directions_add_up_to_both(self):
        client = self.connected()
        self.forward.silence("to_client")
        self.forward.silence("to_server")
        before = self.forward.count()
        client.sendall(b"held")
        self.server.connections[0].sendall(b"news")
        self.forward.count()
        self.assertFalse(readable(client))
        self.assertEqual(self.forward.count() - before, Count())
        self.forward.resume()
        self.assertEqual(receive(client, 8), b"newsheld")

    def test_silent_host_accepts_new_connections(self):
        self.forward.silence()
        client = self.connect()
        client.sendall(b"hello")
        wait_for(lambda: len(self.server.connections) == 1)
        self.assertFalse(readable(client))
        self.assertEqual(self.server.received, b"")
        self.forward.resume()
        self.assertEqual(receive(client, 5), b"hello")

    def test_end_of_a_connection_is_held_back(self):
        for end, seen in ((socket.socket.close, "FIN"), (reset, "ConnectionResetError")):
            client = self.connected()
            self.forward.silence("to_server")
            end(client)
            self.forward.count()
            self.assertEqual(self.server.ends, [])
            self.forward.resume()
            wait_for(lambda seen=seen: self.server.ends == [seen])
            self.server.ends.clear()

    def test_bytes_held_back_come_before_the_end(self):
        client = self.connected()
        self.forward.silence("to_server")
        client.sendall(b"end")
        client.shutdown(socket.SHUT_WR)
        self.forward.resume()
        self.assertEqual(receive(client, 100), b"end")

    def test_the_loop_sleeps_in_silence(self):
        client = self.connected()
        self.forward.silence()
        client.sendall(b"held")
        client.close()
        self.forward.count()
        status = f"/proc/{self.forward._process.pid}/status"

        def wake_ups():
            with open(status) as lines:
                return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

        direct = self.enterContext(socket.create_connection(("127.0.0.1", self.server.port)))
        wait_for(lambda: wake_ups() == (time.sleep(0.1), wake_ups())[1])
        before = wake_ups()
        for _ in range(200):
            self.exchange(direct)
        self.assertLessEqual(wake_ups() - before, 2)

    def test_unknown_direction(self):
        with self.assertRaisesRegex(ValueError, "^direction must be one of .* not 'sideways'"):
            self.forward.silence("sideways")
        self.connected()


class DelayTests(EchoTests):
    def test_everything_comes_later_in_the_same_order(self):
        client = self.connected()
        self.forward.delay(0.05)
        for number in range(20):
            client.sendall(b"%02d" % number)
        self.assertEqual(receive(client, 40), b"".join(b"%02d" % number for number in range(20)))

    def test_zero_ends_it_and_releases_what_is_held(self):
        client = self.connected()
        self.forward.delay(3600)
        client.sendall(b"late")
        self.forward.count()
        self.assertEqual(bytes(self.server.received), b"ping")
        self.forward.delay(0)
        self.assertEqual(receive(client, 4), b"late")

    def test_bad_delay(self):
        for seconds in (-1, float("nan")):
            with self.assertRaisesRegex(ValueError, "^seconds must not be negative"):
                self.forward.delay(seconds)
        self.connected()


class ThrottleTests(EchoTests):
    def test_what_is_above_the_rate_passes_later(self):
        client = self.connected()
        before = self.forward.count()
        self.forward.throttle(0.001)
        client.sendall(b"slow")
        self.assertEqual(receive(client, 1), b"s")
        passed = self.forward.count() - before
        self.assertEqual((passed.bytes_to_server, passed.bytes_to_client), (1, 1))
        self.forward.throttle(None)
        self.assertEqual(receive(client, 3), b"low")

    def test_the_sender_has_to_wait(self):
        client = self.connected()
        self.forward.throttle(100_000)
        for sender in (client, self.connected()):
            sender.setblocking(False)
            sent = 0
            with contextlib.suppress(BlockingIOError):
                while sent < 32 << 20:
                    sent += sender.send(bytes(1 << 20))
            self.assertLess(sent, 32 << 20)

    def test_nothing_is_lost_nor_out_of_order(self):
        client = self.connected()
        self.forward.throttle(10_000_000)
        sent = os.urandom(1 << 20)
        sender = threading.Thread(target=client.sendall, args=(sent,))
        sender.start()
        self.assertEqual(receive(client, len(sent)), sent)
        sender.join()

    def test_bad_rate(self):
        for rate in (0, -1, float("nan")):
            with self.assertRaisesRegex(ValueError, "^bytes_per_second must be positive"):
                self.forward.throttle(rate)
        self.connected()


class CountTests(EchoTests):
    def test_bytes_connections_and_round_trips(self):
        client = self.connect()
        for _ in range(3):
            self.exchange(client, b"12345")
        expected = Count(connections=1, bytes_to_server=15, bytes_to_client=15, round_trips=3)
        self.assertEqual(self.forward.count(), expected)

    def test_difference(self):
        client = self.connected()
        before = self.forward.count()
        self.exchange(client, b"12")
        expected = Count(bytes_to_server=2, bytes_to_client=2, round_trips=1)
        self.assertEqual(self.forward.count() - before, expected)

    def test_count_outlives_stop(self):
        self.connected()
        self.forward.stop()
        self.assertEqual(self.forward.count().round_trips, 1)

    def test_two_connections_turn_independently(self):
        first, second = self.connected(), self.connected()
        before = self.forward.count()
        self.forward.silence("to_client")
        first.sendall(b"1")
        second.sendall(b"2")
        wait_for(lambda: len(self.server.received) == 10)
        self.forward.resume()
        receive(first, 1), receive(second, 1)
        self.assertEqual((self.forward.count() - before).round_trips, 2)


def typed(kind, body=b""):
    return kind + struct.pack("!i", len(body) + 4) + body


def startup(code, body=b""):
    return struct.pack("!ii", len(body) + 8, code) + body


SSL_REQUEST = startup(80877103)
GSSENC_REQUEST = startup(80877104)
STARTUP = startup(3 << 16, b"user\0me\0\0")


class FramingTests(unittest.TestCase):
    def check(self, conversation, to_server, to_client):
        """Check the numbers of messages, however the bytes of each turn are cut into chunks."""
        for size in (1, 2, 3, 5, 7, 100000):
            reading = _Reading()
            ended = Counter()
            for direction, data in conversation:
                for start in range(0, len(data), size):
                    ended += reading.feed(direction, data[start : start + size])
            messages = (ended["messages_to_server"], ended["messages_to_client"])
            self.assertEqual(messages, (to_server, to_client), size)

    def test_typed_messages(self):
        query = typed(b"Q", b"SELECT 1\0")
        answer = typed(b"T", b"x" * 300) + typed(b"D", b"y" * 11) + typed(b"C") + typed(b"Z", b"I")
        self.check([("to_server", STARTUP), ("to_client", typed(b"R", b"\0" * 4))], 1, 1)
        self.check([("to_server", STARTUP + query + query), ("to_client", answer * 2)], 3, 8)

    def test_refused_encryption(self):
        conversation = [
            ("to_server", GSSENC_REQUEST),
            ("to_client", b"N"),
            ("to_server", SSL_REQUEST),
            ("to_client", b"N"),
            ("to_server", STARTUP),
            ("to_client", typed(b"R", b"\0" * 4)),
        ]
        self.check(conversation, 3, 3)

    def passed(self, conversation):
        """What passes of commits and results."""
        reading, ended = _Reading(), Counter()
        for direction, data in conversation:
            ended += reading.feed(direction, data)
        return ended["commits"], ended["results"]

    def test_commits_and_results(self):
        def after(*tags, status=b"I"):
            answers = b"".join(typed(b"C", tag + b"\0") for tag in tags)
            return self.passed(
                [("to_server", STARTUP), ("to_client", answers + typed(b"Z", status))]
            )

        self.assertEqual(after(b"BEGIN", b"INSERT 0 1", b"COMMIT"), (1, 1))
        self.assertEqual(after(b"COMMIT PREPARED"), (1, 0))
        self.assertEqual(after(b"INSERT 0 1"), (1, 1))
        self.assertEqual(after(b"INSERT 0 1", status=b"T"), (0, 1))
        self.assertEqual(after(b"SELECT 1"), (0, 1))
        self.assertEqual(after(b"SET"), (0, 0))
        self.assertEqual(after(b"ROLLBACK"), (0, 0))

    def test_what_failed_is_no_commit(self):
        failed = typed(b"C", b"UPDATE 1\0") + typed(b"E", b"sorry\0") + typed(b"Z", b"I")
        self.assertEqual(self.passed([("to_server", STARTUP), ("to_client", failed)]), (0, 1))

    def test_encryption_refused_by_an_error_message(self):
        conversation = [("to_server", SSL_REQUEST), ("to_client", typed(b"E", b"sorry\0"))]
        self.check(conversation, 1, 1)

    def test_nothing_counts_once_encrypted(self):
        conversation = [
            ("to_server", SSL_REQUEST),
            ("to_client", b"S"),
            ("to_server", typed(b"Q")),
            ("to_client", typed(b"Z")),
        ]
        self.check(conversation, 1, 0)

    def test_cancel_request(self):
        self.check([("to_server", startup(80877102, b"\0" * 8))], 1, 0)

    def test_other_protocols_count_nothing(self):
        conversation = [
            ("to_server", b"GET / HTTP/1.0\r\n\r\n"),
            ("to_client", b"HTTP/1.0 200 OK\r\n"),
        ]
        self.check(conversation, 0, 0)


class PostgresTests(unittest.TestCase):
    layer = PORT_FORWARD_LAYER

    def setUp(self):
        self.forward = self.layer.forward

    def connect(self, **keywords):
        connection = psycopg2.connect(self.layer.dsn(), **keywords)
        self.addCleanup(connection.close)
        return connection

    def test_transaction_of_one_statement_takes_three_round_trips(self):
        connection = self.connect()
        for _ in range(3):
            before = self.forward.count()
            connection.cursor().execute("SELECT 1")
            connection.commit()
            passed = self.forward.count() - before
            self.assertEqual(passed.round_trips, 3)
            # BEGIN, SELECT, COMMIT; their C and Z, and the SELECT's T and D.
            self.assertEqual((passed.messages_to_server, passed.messages_to_client), (3, 8))
            self.assertEqual(passed.connections, 0)

    def test_a_commit_whose_answer_is_lost(self):
        connection = self.connect()
        connection.cursor().execute("CREATE TABLE IF NOT EXISTS lost_answer (number int)")
        connection.commit()
        connection.cursor().execute("INSERT INTO lost_answer VALUES (1)")
        before, cut = self.forward.count(), self.forward.cut_at_commit()
        # Whatever is not the answer to a COMMIT passes.
        connection.cursor().execute("SELECT 1")
        self.assertFalse(cut.happened)
        with self.assertRaises(psycopg2.OperationalError):
            connection.commit()
        self.assertTrue(cut.wait(TIMEOUT))
        self.assertEqual((self.forward.count() - before).commits, 0)
        rows = self.layer.server.query("SELECT count(*) FROM lost_answer")
        self.layer.server.query("DROP TABLE lost_answer")
        self.assertEqual(rows, [(1,)])

    def test_the_server_knows_its_sessions_by_the_ports(self):
        connection = self.connect()
        ((port,),) = self.layer.server.query(
            "SELECT client_port FROM pg_stat_activity WHERE pid = %s", connection.info.backend_pid
        )
        self.assertEqual(self.forward.server_ports(), [port])

    def test_large_results_count_each_row(self):
        connection = self.connect()
        connection.autocommit = True
        before = self.forward.count()
        connection.cursor().execute("SELECT repeat('x', 1000) FROM generate_series(1, 5000)")
        passed = self.forward.count() - before
        self.assertEqual(passed.round_trips, 1)
        self.assertEqual(passed.messages_to_client, 1 + 5000 + 1 + 1)
        self.assertGreater(passed.bytes_to_client, 5_000_000)

    def test_copy_counts_each_message_to_the_server(self):
        connection = self.connect()
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("CREATE TEMPORARY TABLE line (content text)")
        before = self.forward.count()
        with open("/dev/null") as nothing:
            cursor.copy_expert("COPY line FROM STDIN", nothing)
        # COPY and CopyDone; CopyInResponse, CommandComplete, ReadyForQuery.
        passed = self.forward.count() - before
        self.assertEqual((passed.messages_to_server, passed.messages_to_client), (2, 3))

    def test_connecting_with_and_without_request_for_encryption(self):
        before = self.forward.count()
        self.connect(sslmode="disable", gssencmode="disable")
        between = self.forward.count()
        self.connect(sslmode="prefer", gssencmode="disable")
        plain, asking = between - before, self.forward.count() - between
        self.assertEqual(asking.messages_to_server, plain.messages_to_server + 1)
        self.assertEqual(asking.messages_to_client, plain.messages_to_client + 1)
        self.assertEqual(asking.round_trips, plain.round_trips + 1)

    def test_an_idle_connection_costs_nothing(self):
        self.connect()
        before = self.forward.count()
        self.layer.server.query("SELECT pg_sleep(0.1)")
        self.assertEqual(self.forward.count() - before, Count())

    def test_drop_is_noticed_by_client_and_server(self):
        for with_reset in (False, True):
            connection = self.connect()
            pid = connection.info.backend_pid
            self.assertEqual(self.forward.drop(reset=with_reset), 1)
            with self.assertRaises(psycopg2.OperationalError):
                connection.cursor().execute("SELECT 1")
            self.assertEqual(connection.closed, 2)
            wait_for(lambda pid=pid: pid not in self.layer.server.backend_pids())

    def test_refusal_reads_as_a_server_that_is_down(self):
        self.forward.refuse()
        with self.assertRaisesRegex(psycopg2.OperationalError, "Connection refused"):
            self.connect()
        self.forward.accept()
        self.connect()

    def test_silent_host_ends_by_the_connect_timeout(self):
        self.forward.silence()
        with self.assertRaisesRegex(psycopg2.OperationalError, "timeout expired"):
            self.connect(connect_timeout=2)

    def test_a_call_that_stops_all_threads_is_forwarded(self):
        connection = self.connect()
        outcomes = []

        def sleep():
            with self.assertRaises(psycopg2.Error) as caught:
                connection.cursor().execute("SELECT pg_sleep(60)")
            outcomes.append(type(caught.exception))

        thread = threading.Thread(target=sleep)
        thread.start()
        asleep = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        wait_for(lambda: self.layer.server.query(asleep))
        connection.cancel()
        thread.join(TIMEOUT)
        self.assertEqual(outcomes, [psycopg2.errors.QueryCanceled])

    def test_answer_held_back_arrives(self):
        connection = self.connect()
        answers = []
        self.forward.silence("to_client")

        def ask():
            with connection.cursor() as cursor:
                cursor.execute("SELECT 42")
                answers.extend(cursor.fetchone())

        thread = threading.Thread(target=ask)
        thread.start()
        pid = connection.info.backend_pid
        state = "SELECT state = 'idle in transaction' FROM pg_stat_activity WHERE pid = %s"
        wait_for(lambda: self.layer.server.query(state, pid) == [(True,)])
        self.assertEqual(answers, [])
        self.forward.resume()
        thread.join(TIMEOUT)
        self.assertEqual(answers, [42])


class CutPostgresTests(unittest.TestCase):
    """Transactions of one INSERT, cut at every byte."""

    layer = PORT_FORWARD_LAYER

    def setUp(self):
        self.forward = self.layer.forward
        self.server = self.layer.server
        self.dsn = self.layer.dsn()
        self.server.query("CREATE TABLE applied (number integer)")
        self.addCleanup(self.server.query, "DROP TABLE applied")
        # All are of the same length in the protocol.
        self.numbers = iter(range(1000, 10000))

    def connect(self):
        connection = psycopg2.connect(self.dsn, connect_timeout=int(TIMEOUT))
        self.addCleanup(connection.close)
        return connection

    def insert(self, connection, number):
        connection.cursor().execute("INSERT INTO applied VALUES (%s)", (number,))

    def is_applied(self, number):
        return self.server.query("SELECT 1 FROM applied WHERE number = %s", number) == [(1,)]

    def measured(self):
        """Return what a transaction passes in all, and what before its COMMIT."""
        connection = self.connect()
        start = self.forward.count()
        self.insert(connection, next(self.numbers))
        before_commit = self.forward.count() - start
        connection.commit()
        whole = self.forward.count() - start
        connection.close()
        return whole, before_commit

    def cut(self, direction, after, reset):
        """Cut a transaction, and return its number and whether the client saw it succeed."""
        number = next(self.numbers)
        connection = self.connect()
        before = self.forward.count()
        cut = self.forward.cut(direction, after, reset=reset)
        try:
            self.insert(connection, number)
            connection.commit()
            succeeded = True
        except psycopg2.OperationalError:
            succeeded = False
        self.assertTrue(cut.wait(TIMEOUT))
        passed = self.forward.count() - before
        self.assertEqual(getattr(passed, f"bytes_{direction}"), after)
        self.assertEqual(self.forward.drop(), 0)
        connection.close()
        return number, succeeded

    def sweep(self, direction, reset, size, applied_from):
        """Cut at each of the direction's bytes; what is applied is known from there on."""
        numbers = []
        for after in range(size + 1):
            number, succeeded = self.cut(direction, after, reset)
            self.assertEqual(succeeded, direction == "to_client" and after == size)
            numbers.append(number)
        # Each has got what it will ever get, and has ended when it has done that.
        wait_for(lambda: self.server.backend_pids() == [])
        applied = "SELECT number FROM applied WHERE number = ANY(%s) ORDER BY number"
        expected = [(number,) for number in numbers[applied_from:]]
        self.assertEqual(self.server.query(applied, numbers), expected)

    def test_every_byte_to_the_server(self):
        whole, _before_commit = self.measured()
        for with_reset in (False, True):
            size = whole.bytes_to_server
            self.sweep("to_server", with_reset, size, applied_from=size)

    def test_every_byte_to_the_client(self):
        whole, before_commit = self.measured()
        for with_reset in (False, True):
            applied_from = before_commit.bytes_to_client + 1
            self.sweep("to_client", with_reset, whole.bytes_to_client, applied_from)

    def test_backend_killed_before_the_end_of_the_connection(self):
        for with_reset in (False, True):
            whole, before_commit = self.measured()
            for after, applied in (
                (before_commit.bytes_to_client, False),
                (whole.bytes_to_client - 1, True),
            ):
                connection = self.connect()
                pid = connection.info.backend_pid
                number = next(self.numbers)
                cut = self.forward.cut(
                    "to_client",
                    after,
                    reset=with_reset,
                    then=lambda pid=pid: self.server.kill_backend(pid),
                )
                with self.assertRaises(psycopg2.OperationalError):
                    self.insert(connection, number)
                    connection.commit()
                self.assertTrue(cut.wait(TIMEOUT))
                self.server.wait_until_ready()
                self.assertEqual(self.is_applied(number), applied)


class LayerTests(unittest.TestCase):
    """Each leaves the line in disorder and needs it in order, so that any order tests it."""

    layer = PORT_FORWARD_LAYER

    def setUp(self):
        self.assertEqual(self.layer.forward.drop(), 0)
        self.connection = psycopg2.connect(self.layer.dsn(), connect_timeout=int(TIMEOUT))
        self.connection.cursor().execute("SELECT 1")
        self.addCleanup(self.connection.close)

    def test_left_refusing(self):
        self.layer.forward.refuse()

    def test_left_silent(self):
        self.layer.forward.silence()

    def test_left_with_a_cut_pending(self):
        self.layer.forward.cut("to_server", 1)

    def test_left_slow(self):
        self.layer.forward.delay(3600)

    def test_left_throttled(self):
        self.layer.forward.throttle(0.001)

    def test_left_with_the_server_down(self):
        self.layer.server.shut_down()

    def test_left_with_the_server_killed(self):
        self.layer.server.kill_all()

    def test_left_with_the_server_recovering(self):
        self.layer.server.kill_backend(self.connection.info.backend_pid)

    def test_left_with_everything_suspended(self):
        for pid in self.layer.server.backend_pids():
            self.layer.server.suspend_backend(pid)
