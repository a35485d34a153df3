"""The situations in which processes fork and threads end, and forked children for tests."""

import contextlib
import ctypes
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from functools import partial
from typing import Any, NamedTuple

import transaction

from zreconnect import (
    ConnectionDescriptor,
    DisconnectionError,
    Ledger,
    RetryPolicy,
    XidWitness,
)
from zreconnect.tests.base import PATIENCE, wait_until

WITNESSES = (None, "xid", XidWitness(at_commit=True), Ledger())
KEYWORDS = {"policy": RetryPolicy(timeout=PATIENCE)}
# How a child ends, and its exit status then.
ENDINGS = {
    "os._exit": (lambda: os._exit(0), 0),
    "as programs do": (lambda: ctypes.pythonapi.Py_Exit(0), 0),
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
}


def attempt(function, *args):
    """Call it, and return what it raised, or None."""
    try:
        function(*args)
    except BaseException as error:
        return error
    return None


class Child:
    """A forked child that calls ``function(child)`` and ends. What that raises, `join` raises."""

    def __init__(self, test, function, ending="os._exit"):
        end, self._right_status = ENDINGS[ending]
        self._status = None
        self._socket, childs = socket.socketpair()
        # What is in the buffers, a child would write again.
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside the forwarder's thread, which no child needs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            try:
                self._socket.close()
                self._socket = childs
                childs.settimeout(PATIENCE)
                function(self)
                end()
            except BaseException:
                childs.sendall(traceback.format_exc().encode())
            finally:
                os._exit(1)
        childs.close()
        self._socket.settimeout(PATIENCE)
        test.addCleanup(self._end)

    def pause(self):
        """In the child: wait for `go`."""
        self._socket.send(b"\0")
        self._socket.recv(1)

    def wait_for_pause(self):
        if (report := self._socket.recv(1)) != b"\0":
            self.join(report)

    def go(self):
        self._socket.send(b"\0")

    def has_ended(self):
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is not None

    def join(self, report=b""):
        try:
            wait_until(self.has_ended)
            report += self._socket.recv(1 << 16)
        finally:
            self._end()
        if report or self._status != self._right_status:
            raise AssertionError(f"the child: exit {self._status}\n{report.decode()}")

    def _end(self):
        self._socket.close()
        if not self.has_ended():
            os.kill(self._pid, signal.SIGKILL)
            wait_until(self.has_ended)


class Situation(NamedTuple):
    """What a connection is in when the process forks or the thread ends; ``enter(test)`` enters it.

    parents, childs: the states that the two processes see. has_session: whether there is one, which
    the parent keeps. error: the name of what the parent's commit raises then.
    """

    enter: Any
    parents: str = "idle"
    childs: str = "idle"
    has_session: bool = True
    error: str = ""


def enter_block(test, name=None):
    connection = test.connection.__enter__()
    test.commit = partial(connection.__exit__, None, None, None)
    if name is not None:
        test.insert(name)


def iterate(test, **options):
    test.insert("before")
    cursor = test.connection.cursor(**options)
    cursor.execute("SELECT 1 UNION ALL SELECT 2")
    rows = iter(cursor)
    next(rows)
    test.left += [partial(next, rows), cursor.close]


SITUATIONS = {
    "never used": Situation(lambda test: None, has_session=False),
    "idle": Situation(lambda test: test.use()),
    "idle after a loss": Situation(lambda test: (test.doom(), test.abort()), has_session=False),
    "begun": Situation(lambda test: test.connection.begin(), "active", "doomed"),
    "active": Situation(lambda test: test.insert("before"), "active", "doomed"),
    "doomed": Situation(
        lambda test: test.doom(), "doomed", "doomed", has_session=False, error="DisconnectionError"
    ),
    "autocommit": Situation(lambda test: test.use_in_autocommit_mode()),
}
CLOSED = {
    "closed": Situation(
        lambda test: (test.use(), test.connection.close()), "closed", "closed", has_session=False
    )
}
# Only the connection's own methods end these.
BLOCKS = {
    "in an empty block": Situation(enter_block, has_session=False),
    "in a block": Situation(partial(enter_block, name="before"), "active", "doomed"),
}
ITERATORS = {
    "iterator": Situation(iterate),
    "iterator of a cursor on the server": Situation(partial(iterate, name="numbers")),
}
MEETS_ERROR = Situation(lambda test: test.meet_error(), "active", "doomed", error="InternalError")
FAILED = {"failed": MEETS_ERROR}
ENDED = {"ended": MEETS_ERROR}


class SituationTests:
    """Each `case` has a connection, to be brought into one of the situations."""

    def setUp(self):
        super().setUp()
        self.labels = itertools.count(1)
        # Keeps logging from writing what nobody handles into the report.
        handler = logging.NullHandler()
        logging.getLogger().addHandler(handler)
        self.addCleanup(logging.getLogger().removeHandler, handler)

    @contextlib.contextmanager
    def case(self, witness="xid", share=None, **names):
        """A subtest with a connection and rows of its own, that leaves the next one nothing.

        share: "descriptor" or "two_phase", if the connection takes part in `transaction`.
        """
        with self.subTest(driver=self.driver_name, witness=witness, share=share, **names):
            self.label, self.left = f"{next(self.labels)} ", []
            self.commit, self.abort = transaction.commit, transaction.abort
            if share == "descriptor":
                shared = ConnectionDescriptor(
                    self.dsn, self.driver_name, witness=witness, **KEYWORDS
                )
                self.addCleanup(shared.close)
                self.get_connection = shared.connection
            else:
                own = self.connect(witness=witness, two_phase=share == "two_phase", **KEYWORDS)
                self.get_connection = lambda: own
                if share is None:
                    self.commit, self.abort = own.commit, own.rollback
            try:
                yield
            finally:
                attempt(transaction.abort)
                self.layer.testSetUp()
                self.forget_prepared()

    def forget_prepared(self):
        """Where nothing is prepared, there is nothing to do."""

    @property
    def connection(self):
        return self.get_connection()

    def insert(self, name, connection=None):
        cursor = (connection or self.connection).cursor()
        cursor.execute("INSERT INTO item (name) VALUES (%s)", (self.label + name,))

    def rows(self):
        """The names of the rows that the subtest has committed."""
        return [
            name.removeprefix(self.label) for name in self.names() if name.startswith(self.label)
        ]

    def use(self):
        self.connection.begin()
        self.abort()

    def use_in_autocommit_mode(self):
        self.connection.autocommit = True
        self.connection.cursor().execute("SELECT 1")

    def doom(self):
        self.insert("doomed")
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            self.insert("doomed")

    def start(self, function, *args):
        """Call it in a thread; a function that waits for its end and returns what it raised."""
        told = []
        thread = threading.Thread(target=lambda: told.append(attempt(function, *args)), daemon=True)
        thread.start()

        def join():
            thread.join(PATIENCE)
            self.assertFalse(thread.is_alive(), "the thread hangs")
            return told[0]

        return join

    def in_thread(self, function, *args):
        self.assertIsNone(self.start(function, *args)())


class PostgresSituations(SituationTests):
    ends_by_error = FAILED
    shares = ("descriptor", "two_phase")
    waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    witnesses = WITNESSES
    lost = (("xid", "to_client"), (Ledger(), "to_server"), (Ledger(), "to_client"))

    def setUp(self):
        self.server = self.layer.server
        self.forget_prepared()
        super().setUp()
        self.driver_name = self.driver
        self.make_table()

    def number(self):
        return self.connection.driver_connection.info.backend_pid

    def meet_error(self):
        """End the transaction with an error."""
        self.insert("before")
        with self.assertRaises(self.connection.ProgrammingError):
            self.connection.cursor().execute("SELECT nothing FROM item")

    def prepared(self):
        return self.query(
            "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() ORDER BY gid"
        )

    def forget_prepared(self):
        for (gid,) in self.prepared():
            self.query(f"ROLLBACK PREPARED '{gid}'")

    def prepare(self):
        """Bring the thread's transaction between its phases; a function that calls what follows."""
        self.insert("before")
        current = transaction.get()
        (manager,) = current._resources
        for phase in (manager.tpc_begin, manager.commit, manager.tpc_vote):
            phase(current)
        return lambda name: getattr(manager, name)(current)


class MysqlSituations(SituationTests):
    ends_by_error = ENDED
    shares = ("descriptor",)
    # innodb_trx shows what it has shown before to who asks again within a tenth of a second.
    waiting = (
        "SELECT 1 FROM information_schema.global_status"
        " WHERE variable_name = 'INNODB_ROW_LOCK_CURRENT_WAITS' AND variable_value > 0"
    )
    # There are no transaction ids, so that the others differ in nothing.
    witnesses = ("xid", Ledger())
    lost = ((Ledger(), "to_server"), (Ledger(), "to_client"))

    def setUp(self):
        super().setUp()
        # What a server has written outlives the processes that asked for it all the same.
        self.query("SET GLOBAL innodb_flush_log_at_trx_commit = 0")
        self.addCleanup(self.query, "SET GLOBAL innodb_flush_log_at_trx_commit = 1")

    def number(self):
        return super().number(self.connection)

    def meet_error(self):
        """Lose the transaction to a deadlock."""
        names = [f"{self.label}of a deadlock {number}" for number in range(50)]
        other = self.connect(witness=None).driver_connection
        cursor = other.cursor()
        other.begin()
        cursor.executemany("INSERT INTO item (name) VALUES (%s)", names)
        other.commit()
        other.begin()
        update = "UPDATE item SET number = 1 WHERE name = %s"
        self.connection.cursor().execute(update, names[:1])
        # InnoDB chooses the transaction that has changed less.
        cursor.executemany(update, names[1:])
        join = self.start(cursor.execute, update, names[:1])
        wait_until(lambda: self.query(self.waiting))
        with self.assertRaises(self.connection.OperationalError):
            self.connection.cursor().execute(update, names[1:2])
        self.assertIsNone(join())
        cursor.executemany("DELETE FROM item WHERE name = %s", names)
        other.commit()
