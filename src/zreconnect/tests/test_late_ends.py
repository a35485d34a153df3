"""What ends, commits or comes back at a moment at which nobody expects it."""

import contextlib
import itertools
import os
import resource
import signal
import sqlite3
import tempfile
import threading
import unittest
import warnings
from pathlib import Path
from unittest import mock

import psycopg
import psycopg2
import pymysql
import transaction
import zope.event

import zreconnect
from zreconnect import (
    FAIL_FAST,
    CommitOutcomeUnknown,
    DisconnectionError,
    Ledger,
    ReconnectTimeout,
    RetryPolicy,
    initZopeless,
    retry_on_disconnect,
)
from zreconnect.interfaces import (
    ICommitLookedUp,
    IConnectionAttemptFailed,
    IConnectionLost,
    IGaveUp,
    IReconnected,
)
from zreconnect.link import Link
from zreconnect.server import Server
from zreconnect.session import NO_SESSION
from zreconnect.testing import no_waiting
from zreconnect.tests.base import (
    PATIENCE,
    DatabaseTestCase,
    LineTestCase,
    on_mariadb,
    wait_until,
)
from zreconnect.witness import Outcome


class Interrupt(BaseException):
    """Raised at a certain moment."""


@contextlib.contextmanager
def subscriber(function):
    zope.event.subscribers.append(function)
    try:
        yield
    finally:
        zope.event.subscribers.remove(function)


@contextlib.contextmanager
def interrupt_at(interface):
    """The first event of that kind meets an interrupt."""
    events = []

    def stop(event):
        if interface.providedBy(event) and not events:
            events.append(event)
            raise Interrupt

    with subscriber(stop):
        yield


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


class LateEndTests:
    def setUp(self):
        super().setUp()
        self.make_table()
        self.connection = self.connect()

    def insert(self, name, connection=None):
        (connection or self.connection).cursor().execute("INSERT INTO item VALUES (%s)", (name,))

    def terminate(self):
        pid = self.connection.driver_connection.info.backend_pid
        self.server.terminate_backend(pid)
        wait_until(lambda: pid not in self.sessions())

    # Blocks that were left suspended

    def suspended(self, block):
        def rows():
            with block:
                self.connection.cursor().execute("SELECT 1")
                yield

        generator = rows()
        next(generator)
        return generator

    def test_a_suspended_block_ends_no_transaction_but_its_own(self):
        for kind in ("with", "transaction()"):
            with self.subTest(kind):
                block = self.connection if kind == "with" else self.connection.transaction()
                generator = self.suspended(block)
                self.connection.rollback()
                self.insert(kind)
                generator.close()
                self.insert(kind + ", second")
                self.connection.commit()
                self.assertEqual(self.connection.state, "idle")
        self.assertEqual(len(self.names()), 4)

    def test_a_suspended_block_commits_no_transaction_but_its_own(self):
        generator = self.suspended(self.connection.transaction())
        self.connection.rollback()
        self.insert("one")
        with self.assertRaises(self.module.ProgrammingError):
            next(generator)
        self.assertEqual((self.connection.state, self.names()), ("active", []))
        self.connection.commit()
        self.assertEqual(self.names(), ["one"])

    def test_a_block_that_is_resumed_when_its_transaction_has_ended(self):
        generator = self.suspended(self.connection.transaction())
        self.connection.rollback()
        with self.assertRaises(StopIteration):
            next(generator)
        self.assertEqual(self.connection.state, "idle")

    def test_a_suspended_block_ends_its_own_transaction(self):
        for kind in ("with", "transaction()"):
            with self.subTest(kind):
                block = self.connection if kind == "with" else self.connection.transaction()
                self.suspended(block).close()
                self.assertEqual(self.connection.state, "idle")
                with self.connection:
                    self.insert(kind)
        self.assertEqual(self.names(), ["transaction()", "with"])

    def test_the_number_of_a_thread_is_given_again(self):
        told = []

        def leave():
            self.connection.work.own.leave_untold(Outcome.COMMITTED)

        def ask():
            try:
                self.connection.rollback()
            except CommitOutcomeUnknown as error:
                told.append(error)

        for function in [leave, ask] * 20:
            in_thread(function).join(PATIENCE)
        self.assertEqual(told, [])

    # What an interrupt leaves to be told

    def test_an_interrupt_at_the_end_of_a_block_is_told_by_rollback(self):
        for interface in (ICommitLookedUp, IConnectionLost):
            with self.subTest(interface.__name__):
                with self.assertRaises(Interrupt), interrupt_at(interface), self.connection:
                    self.insert(interface.__name__)
                    self.forward.cut("to_client", 0)
                with self.assertRaises(CommitOutcomeUnknown) as caught:
                    self.connection.rollback()
                self.assertEqual(caught.exception.outcome, "committed")
        self.assertEqual(len(self.names()), 2)

    def test_what_an_earlier_call_has_not_committed_does_not_count(self):
        self.insert("before")
        self.forward.cut("to_server", 0)
        with self.assertRaises(Interrupt), interrupt_at(IConnectionLost):
            self.connection.commit()
        runs = []

        @retry_on_disconnect(timeout=PATIENCE)
        def job():
            runs.append(1)
            self.connection.rollback()
            with self.connection.transaction():
                self.insert(f"first {len(runs)}")
            with self.connection.transaction():
                self.insert(f"second {len(runs)}")
                self.terminate()
                self.insert(f"third {len(runs)}")

        with self.assertRaises(DisconnectionError):
            job()
        self.assertEqual(self.names(), ["first 1"])

    # Units of work that commit within

    def test_a_function_that_commits_is_not_run_again(self):
        def refuse():
            self.connection.cursor().execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")

        def lose():
            self.insert("not committed")
            self.terminate()
            self.insert("never")

        for number, fail in enumerate((refuse, lose)):
            runs = []

            def work(runs=runs, fail=fail, number=number):
                runs.append(1)
                self.insert(f"{number}, run {len(runs)}")
                self.connection.commit()
                fail()

            with self.subTest(fail), self.assertRaises(self.module.Error):
                self.connection.run(work)
            self.assertEqual(self.connection.state, "idle")
        self.assertEqual(self.names(), ["0, run 1", "1, run 1"])

    def test_after_a_commit_that_is_a_statement_nobody_knows(self):
        for number, (end, ask) in enumerate(
            itertools.product(
                ("COMMIT", "END; "),
                (lambda: self.insert("lost"), self.connection.commit),
            )
        ):
            with self.subTest(end, number=number):
                self.insert(str(number))
                self.connection.cursor().execute(end)
                self.connection.cursor().execute("SELECT 1")
                self.terminate()
                with self.assertRaises(CommitOutcomeUnknown):
                    ask()
                self.connection.rollback()
        self.assertEqual(self.names(), ["0", "1", "2", "3"])

    def test_a_child_that_was_forked_within_runs_nothing_again(self):
        parent, runs = os.getpid(), []

        def work():
            runs.append(1)
            self.insert(f"run {len(runs)}")
            if os.getpid() == parent:
                self.child = os.fork()

        try:
            self.connection.run(work)
        finally:
            if os.getpid() != parent:
                os._exit(len(runs))
        _, status = os.waitpid(self.child, 0)
        self.assertEqual(os.waitstatus_to_exitcode(status), 1)
        self.assertEqual(self.names(), ["run 1"])

    # Sessions

    def test_a_forked_child_without_a_free_descriptor_has_a_session_of_its_own(self):
        self.insert("parent")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with open(os.devnull) as highest:
            limit = highest.fileno() + 1
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            limit = max(limit, descriptor + 1)
        taken = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            child = os.fork()
            if child == 0:
                os._exit(int(self.connection.work.link.session is NO_SESSION))
            _, status = os.waitpid(child, 0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in taken:
                os.close(descriptor)
        self.assertEqual(os.waitstatus_to_exitcode(status), 1)
        self.connection.commit()
        self.assertEqual(self.names(), ["parent"])

    def test_a_session_that_the_fork_has_not_taken_away_is_not_used(self):
        self.connection.run(lambda: self.insert("before"))
        with mock.patch.object(Link, "renew_observer", side_effect=OSError):
            child = os.fork()
        if child == 0:
            try:
                raw = self.connection.work.link.session.raw
                self.connection.run(lambda: self.insert("child"))
                os._exit(int(self.connection.work.link.session.raw is not raw))
            finally:
                os._exit(2)
        _, status = os.waitpid(child, 0)
        self.assertEqual(os.waitstatus_to_exitcode(status), 1)
        self.connection.run(lambda: self.insert("parent"))
        self.assertEqual(self.names(), ["before", "child", "parent"])

    def test_no_second_session_takes_the_place_of_one_in_use(self):
        is_connecting, may_go_on = threading.Event(), threading.Event()

        def wait_once(raw):
            if not is_connecting.is_set():
                is_connecting.set()
                may_go_on.wait(PATIENCE)

        connection = self.connect(on_connect=wait_once, witness=None)
        cursor = connection.cursor()

        def use():
            connection.begin()
            self.insert("one", connection)
            connection.rollback()

        threads = [in_thread(lambda: cursor.rownumber)]
        self.assertTrue(is_connecting.wait(PATIENCE))
        threads.append(in_thread(use))
        may_go_on.set()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(self.names(), [])
        self.assertEqual(len(self.sessions()), 1)

    def test_a_subscriber_may_use_the_connection_that_is_back(self):
        connection = self.connect(witness=None)
        connection.begin()
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            connection.cursor().execute("SELECT 1")
        connection.rollback()

        def audit(event):
            if IReconnected.providedBy(event) and connection.state == "idle":
                self.insert("audit", connection)

        with subscriber(audit):
            _ = connection.info
        self.assertEqual(connection.state, "active")
        self.insert("second", connection)
        connection.rollback()
        self.assertEqual(self.names(), [])

    def test_a_subscriber_may_roll_back_what_could_not_begin(self):
        for policy, interface, error in [
            (RetryPolicy(timeout=1), IConnectionAttemptFailed, ReconnectTimeout),
            (RetryPolicy(timeout=1), IGaveUp, ReconnectTimeout),
            (FAIL_FAST, IGaveUp, DisconnectionError),
        ]:
            connection = self.connect(policy=policy)

            def undo(event, interface=interface, connection=connection):
                if interface.providedBy(event):
                    connection.rollback()

            self.forward.refuse()
            with self.subTest(interface.__name__), subscriber(undo), no_waiting():
                with self.assertRaises(error):
                    connection.cursor().execute("SELECT 1")
                self.assertEqual(connection.state, "doomed")
                connection.rollback()
            self.forward.accept()

    def test_an_error_of_a_function_is_no_loss_whatever_its_sqlstate(self):
        for state in ("08001", "08006", "57P01", "57P03"):
            with self.subTest(state):
                self.insert(state)
                savepoint = self.connection.savepoint()
                with self.assertRaises(self.module.Error) as caught:
                    self.connection.cursor().execute(
                        f"DO $$ BEGIN RAISE SQLSTATE '{state}'; END $$"
                    )
                self.assertNotIsInstance(caught.exception, DisconnectionError)
                savepoint.rollback()
                self.connection.commit()
        self.assertEqual(len(self.names()), 4)

    # close()

    def test_close_ends_the_wait_for_a_server(self):
        self.forward.refuse()
        errors = []

        def begin():
            try:
                self.connection.begin()
            except self.module.InterfaceError as error:
                errors.append(error)

        failed = threading.Event()
        with subscriber(lambda event: failed.set()):
            thread = in_thread(begin)
            self.assertTrue(failed.wait(PATIENCE))
            self.connection.close()
        thread.join(PATIENCE)
        self.assertEqual(len(errors), 1)

    def test_close_when_the_server_is_back(self):
        self.connection.run(lambda: self.insert("before"))
        self.forward.drop()

        def close(event):
            if IReconnected.providedBy(event):
                self.connection.close()

        with subscriber(close), self.assertRaises(self.module.InterfaceError):
            self.connection.begin()
        wait_until(lambda: not self.sessions())

    def test_close_beside_a_statement_on_a_silent_line(self):
        for autocommit in (False, True):
            with self.subTest(autocommit=autocommit):
                connection = self.connect()
                connection.autocommit = autocommit
                connection.cursor().execute("SELECT 1")
                if not autocommit:
                    connection.rollback()
                self.forward.silence()
                errors = []

                def ask(connection=connection, errors=errors):
                    try:
                        connection.cursor().execute("SELECT 1")
                    except Exception as error:
                        errors.append(error)

                thread = in_thread(ask)
                wait_until(connection.work.turn.is_anothers)
                closing = in_thread(connection.close)
                for each in (closing, thread):
                    each.join(PATIENCE)
                    self.assertFalse(each.is_alive())
                self.assertEqual(len(errors), 1)
                self.forward.resume()


class Psycopg2Tests(LateEndTests, DatabaseTestCase):
    module = psycopg2


class PsycopgTests(LateEndTests, DatabaseTestCase):
    driver = "psycopg"
    module = psycopg


@on_mariadb()
class MySQLTests(LineTestCase):
    """What is different there: statements that commit, and rows that are read one by one."""

    def setUp(self):
        self.server = self.layer.server
        dbname = self.server.fresh_database().rpartition("/")[2]
        self.server.query("CREATE TABLE item (name varchar(40))", dbname=dbname)
        self.connection = zreconnect.connect(
            self.layer.dsn(dbname=dbname), driver="pymysql", witness=Ledger()
        )
        self.addCleanup(self.connection.close)

    def names(self):
        with self.connection.transaction() as cursor:
            cursor.execute("SELECT name FROM item ORDER BY name")
            return [name for (name,) in cursor.fetchall()]

    def test_a_function_whose_statement_commits_is_not_run_again(self):
        runs = []

        def work():
            runs.append(1)
            cursor = self.connection.cursor()
            cursor.execute("INSERT INTO item VALUES (%s)", (f"run {len(runs)}",))
            cursor.execute("CREATE TABLE IF NOT EXISTS other (name text)")
            cursor.execute("SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213")

        with self.assertRaises(pymysql.Error):
            self.connection.run(work)
        self.assertEqual(self.names(), ["run 1"])

    def test_a_commit_after_some_rows_of_a_server_side_cursor(self):
        self.connection.begin()
        cursor = self.connection.cursor("rows")
        cursor.execute("SELECT seq FROM seq_1_to_9")
        cursor.fetchone()
        self.connection.cursor().execute("INSERT INTO item VALUES ('one')")
        cursor.execute("SELECT seq FROM seq_1_to_9")
        cursor.fetchone()
        self.connection.commit()
        self.assertEqual(self.names(), ["one"])

    def test_an_interrupt_between_the_rows_of_a_server_side_cursor(self):
        self.connection.begin()
        cursor = self.connection.cursor("rows")
        cursor.execute("SELECT seq FROM seq_1_to_9")
        cursor.fetchone()
        read, raw = pymysql.connections.Connection._read_bytes, []

        def interrupted(connection, number):
            raw.append(read(connection, number))
            raise Interrupt

        with (
            mock.patch.object(pymysql.connections.Connection, "_read_bytes", interrupted),
            self.assertRaises(Interrupt),
        ):
            cursor.fetchone()
        with self.assertRaises(DisconnectionError):
            self.connection.commit()
        self.connection.rollback()
        self.assertEqual(self.names(), [])


class OthersTests(unittest.TestCase):
    def test_executemany_of_an_sqlite_connection_is_a_part_of_the_transaction(self):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "job.db")
            connection = zreconnect.connect(f"sqlite:///{path}")
            self.addCleanup(connection.close)
            connection.execute("CREATE TABLE item (name text)")
            connection.commit()
            connection.executemany("INSERT INTO item VALUES (?)", [("one",), ("two",)])
            self.assertEqual(connection.state, "active")
            connection.rollback()
            with contextlib.closing(sqlite3.connect(path)) as other:
                self.assertEqual(other.execute("SELECT * FROM item").fetchall(), [])

    def test_a_signals_handler_may_connect_while_its_thread_does(self):
        made = []

        def handler(number, frame):
            made.append("handler")
            zreconnect.connect("postgresql://127.0.0.1/handler")

        reopen = Server.reopen_door

        def interrupted(server):
            reopen(server)
            if not made:
                signal.raise_signal(signal.SIGUSR1)

        before = signal.signal(signal.SIGUSR1, handler)
        self.addCleanup(signal.signal, signal.SIGUSR1, before)
        with mock.patch.object(Server, "reopen_door", interrupted):
            zreconnect.connect("postgresql://127.0.0.1/program")
        self.assertEqual(len(made), 1)


class ZopelessTests(unittest.TestCase):
    DSN = "postgresql://127.0.0.1/zopeless"

    def test_a_synchronizer_may_ask_for_the_manager(self):
        found = []

        class Synchronizer:
            def newTransaction(self, transaction):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found.append(initZopeless(ZopelessTests.DSN, implicitBegin=True))

            def beforeCompletion(self, transaction):
                """Nothing is to be done."""

            afterCompletion = beforeCompletion

        synchronizer = Synchronizer()
        transaction.manager.registerSynch(synchronizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            manager = initZopeless(self.DSN, implicitBegin=True)
        transaction.manager.unregisterSynch(synchronizer)
        manager.uninstall()
        self.assertIs(found[0], manager)

    def test_what_an_abort_raises_does_not_keep_it_from_being_uninstalled(self):
        class Base:
            pass

        manager = initZopeless(self.DSN, Base, implicitBegin=False)

        class Stubborn:
            transaction_manager = transaction.manager

            def abort(self, transaction):
                raise LookupError

        transaction.get().join(Stubborn())
        with self.assertRaises(LookupError):
            manager.uninstall()
        self.assertFalse(hasattr(Base, "_connection"))
        initZopeless(self.DSN, implicitBegin=False).uninstall()
