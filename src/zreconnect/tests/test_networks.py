"""A network that swallows packets, loses some, or has its cable pulled: real ones, as root."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

from zreconnect import (
    FAIL_FAST,
    PERSIST,
    CommitOutcomeUnknown,
    DisconnectionError,
    Ledger,
    ReconnectTimeout,
    RetryPolicy,
    connect,
)
from zreconnect.events import ConnectionLost
from zreconnect.testing import PortForward
from zreconnect.tests.base import PATIENCE, LineTestCase, wait_until
from zreconnect.tests.networks import needs_networks

# In seconds. The longest limit that nobody has set is ten; TCP takes a minute, and two to connect.
LONGEST_CALL = 25
SHORT = RetryPolicy(timeout=2)
DIRECTIONS = ("both", "to_server", "to_client")
FOR_EVER = "begin by default"


class Calls:
    """Functions that are called in threads of their own. Each has a name.

    Each is called with a function ``pause``, which returns when all have called theirs, and the
    network has failed.
    """

    def __init__(self, functions):
        self._paused = threading.Semaphore(0)
        self._goes_on = threading.Event()
        self._threads = ThreadPoolExecutor(len(functions))
        self.futures = {
            name: self._threads.submit(function, self._pause)
            for name, function in functions.items()
        }

    def _pause(self):
        self._paused.release()
        self._goes_on.wait(PATIENCE)

    def go_on(self, fail):
        """When all have paused, let the network fail, and then go on."""
        for _ in self.futures:
            assert self._paused.acquire(timeout=PATIENCE)
        fail()
        self._goes_on.set()

    def end(self):
        """By name: what each has returned, or raised, in time."""
        wait(self.futures.values(), LONGEST_CALL)
        late = [name for name, future in self.futures.items() if not future.done()]
        assert not late, late
        return {
            name: future.exception() or future.result() for name, future in self.futures.items()
        }

    def stop(self):
        self._goes_on.set()
        self._threads.shutdown()


class NetworkTestCase(LineTestCase):
    def setUp(self):
        self.networks, self.servers = self.layer.networks, self.layer.servers
        self.enterContext(self.networks.clients.entered())
        self.addCleanup(self.networks.heal)
        for server in set(self.servers.values()):
            server.query("DROP TABLE IF EXISTS item")
            engine = "" if server is self.layer.postgres else " ENGINE=InnoDB"
            server.query(f"CREATE TABLE item (number int PRIMARY KEY, count int){engine}")
        self._numbers = itertools.count()

    def start(self, functions):
        calls = Calls(functions)
        self.addCleanup(calls.stop)
        return calls

    def connect(self, driver, dsn=None, **keywords):
        keywords = {"witness": Ledger(), "response_timeout": 1, **keywords}
        connection = connect(dsn or self.servers[driver].dsn(), driver, **keywords)
        self.addCleanup(connection.close)
        return connection

    def used(self, driver, **keywords):
        """A connection that has a session."""
        connection = self.connect(driver, **keywords)
        connection.run(ask, connection)
        return connection

    def inside(self, driver, **keywords):
        """One that is inside a transaction, and has written."""
        connection, number = self.used(driver, **keywords), self.item(driver)
        connection.begin()
        write(connection, number)
        return connection

    def is_postgresql(self, driver):
        return self.servers[driver] is self.layer.postgres

    def item(self, driver):
        """The number of a new row."""
        number = next(self._numbers)
        self.servers[driver].query(f"INSERT INTO item VALUES ({number}, 0)")
        return number

    def count(self, driver, number):
        ((count,),) = self.servers[driver].query(f"SELECT count FROM item WHERE number = {number}")
        return count

    def unit(self, driver, number, request, pause, **keywords):
        """Run a unit of work that locks a row, and then meets the network's failure; the runs."""
        connection = self.connect(driver, **keywords)
        runs = []

        def work():
            runs.append(None)
            write(connection, number)
            if len(runs) == 1:
                pause()
                request(connection)

        connection.run(work, timeout=PATIENCE)
        return len(runs)


def ask(connection):
    connection.execute("SELECT 1")


def write(connection, number):
    connection.execute("UPDATE item SET count = count + 1 WHERE number = %s", (number,))


def begin(connection):
    connection.begin()


def commit(connection):
    connection.commit()


def rollback(connection):
    connection.rollback()


def close(connection):
    connection.close()


def begin_commit(connection):
    """Nothing is requested before COMMIT."""


@needs_networks
class PartitionTests(NetworkTestCase):
    def autocommitting(self, driver):
        connection = self.used(driver, policy=SHORT)
        connection.autocommit = True
        ask(connection)
        return connection

    def calls(self, driver):
        """By name: what comes before the failure, the request after it, and its error."""
        used, inside, new = (
            partial(function, driver, policy=SHORT)
            for function in (self.used, self.inside, self.connect)
        )
        fast = partial(self.connect, driver, policy=FAIL_FAST)
        # On MySQL BEGIN goes by itself.
        not_begun = DisconnectionError if self.is_postgresql(driver) else ReconnectTimeout
        return {
            "begin": (used, begin, ReconnectTimeout),
            "a first statement": (used, ask, not_begun),
            "a statement": (inside, ask, DisconnectionError),
            "commit": (inside, commit, CommitOutcomeUnknown),
            "rollback": (inside, rollback, None),
            "close": (used, close, None),
            "close inside": (inside, close, None),
            "autocommit": (partial(self.autocommitting, driver), ask, CommitOutcomeUnknown),
            "connecting": (new, begin, ReconnectTimeout),
            "connecting, failing fast": (fast, begin, DisconnectionError),
        }

    def calls_without_limit(self, driver):
        """As `calls`, where the program has set no limit: ten seconds for each answer."""
        used, inside = (
            partial(function, driver, response_timeout=None, policy=PERSIST)
            for function in (self.used, self.inside)
        )
        return {"rollback by default": (inside, rollback, None), FOR_EVER: (used, begin, None)}

    def start_all(self, calls_of):
        """Start the calls of all drivers; what they are to raise, by name."""

        def function(pause, before, request):
            connection = before()
            pause()
            request(connection)

        functions, expected = {}, {}
        for driver in self.servers:
            for name, (before, request, error) in calls_of(driver).items():
                functions[driver, name] = partial(function, before=before, request=request)
                expected[driver, name] = error
        return self.start(functions), expected

    def assert_ends(self, calls, expected):
        for name, outcome in calls.end().items():
            with self.subTest(name):
                self.assertIsInstance(outcome, expected[name] or type(None))
                if isinstance(outcome, ReconnectTimeout):
                    self.assertRegex(
                        str(outcome), r"No connection to \S+@192\.0\.2\.1:\d+/\S+ after \d"
                    )

    def test_no_call_outlasts_its_deadline(self):
        for direction in ("to_server", "to_client"):
            with self.subTest(direction):
                calls, expected = self.start_all(self.calls)
                calls.go_on(partial(self.networks.swallow, direction))
                self.assert_ends(calls, expected)
                self.networks.heal()

    def test_who_waits_for_ever_gets_through_when_the_network_is_back(self):
        calls, expected = self.start_all(
            lambda driver: self.calls(driver) | self.calls_without_limit(driver)
        )
        calls.go_on(partial(self.networks.swallow, "both"))
        for_ever = [calls.futures[driver, FOR_EVER] for driver in self.servers]
        wait(set(calls.futures.values()).difference(for_ever), LONGEST_CALL)
        self.assertFalse(any(future.done() for future in for_ever))
        self.networks.heal()
        self.assert_ends(calls, expected)

    def test_what_is_half_open_is_fenced_when_the_network_is_back(self):
        for direction in DIRECTIONS:
            with self.subTest(direction), self.events() as seen:
                items = {
                    (driver, witness, request): self.item(driver)
                    for driver in self.servers
                    for witness in (Ledger(), *["xid"] * self.is_postgresql(driver))
                    for request in (ask, begin_commit)
                }
                calls = self.start(
                    {
                        name: partial(self.unit, name[0], number, name[2], witness=name[1])
                        for name, number in items.items()
                    }
                )
                calls.go_on(partial(self.networks.swallow, direction))
                wait_until(
                    lambda seen=seen, items=items: number_of(ConnectionLost, seen) == len(items)
                )
                self.networks.heal()
                runs = calls.end()
                for name, number in items.items():
                    with self.subTest(name):
                        self.assertEqual(self.count(name[0], number), 1)
                        self.assertIn(runs[name], (1, 2))

    def test_a_pulled_cable(self):
        networks = self.networks
        for network, impatient in (
            (networks.clients, RetryPolicy(timeout=5)),
            (networks.servers, SHORT),
        ):
            with self.subTest(network.address):
                items = {driver: self.item(driver) for driver in self.servers}

                def first(pause, make, driver, policy):
                    connection = make(driver, policy=policy)
                    pause()
                    connection.begin()

                functions = {
                    (driver, policy, make): partial(first, make=make, driver=driver, policy=policy)
                    for driver in self.servers
                    for policy in (PERSIST, impatient)
                    for make in (self.used, self.connect)
                }
                functions |= {
                    (driver, None): partial(self.unit, driver, number, ask)
                    for driver, number in items.items()
                }
                calls = self.start(functions)
                calls.go_on(network.unplug)
                wait([calls.futures[name] for name in functions if name[1] is impatient])
                network.plug()
                for name, outcome in calls.end().items():
                    with self.subTest(name):
                        if name[1] is impatient:
                            self.assertIsInstance(outcome, ReconnectTimeout)
                        elif name[1] is PERSIST:
                            self.assertIsNone(outcome)
                        else:
                            self.assertEqual(outcome, 2)
                            self.assertEqual(self.count(name[0], items[name[0]]), 1)

    def test_a_line_that_loses_packets_and_is_slow(self):
        items = {driver: self.item(driver) for driver in self.servers}

        def work(pause, driver):
            server = self.servers[driver]
            forward = PortForward(server.host, server.port)
            forward.start()
            self.addCleanup(forward.stop)
            forward.delay(0.02)
            dsn = server.dsn(host=forward.host, port=forward.port)
            connection = self.connect(driver, dsn, response_timeout=10)
            connection.run(ask, connection)
            pause()
            for _ in range(10):
                connection.run(write, connection, items[driver])

        calls = self.start({driver: partial(work, driver=driver) for driver in items})
        calls.go_on(partial(self.networks.lose, 0.1))
        wait(calls.futures.values(), PATIENCE)
        self.networks.heal()
        self.assertEqual(set(calls.end().values()), {None})
        for driver, number in items.items():
            self.assertEqual(self.count(driver, number), 10)


def number_of(kind, seen):
    return sum(isinstance(event, kind) for event in seen)
