"""Forks in every state of a connection, threads that end in every state, and close() meanwhile."""

import logging
import sqlite3
import threading
from functools import partial
from itertools import product
from unittest import mock

import psycopg
import transaction

from zreconnect import CommitOutcomeUnknown, DisconnectionError, Ledger
from zreconnect.testing.layers import PortForwardLayer
from zreconnect.tests.base import PATIENCE, DatabaseTestCase, LineTestCase, on_mariadb, wait_until
from zreconnect.tests.situations import (
    BLOCKS,
    CLOSED,
    ITERATORS,
    SITUATIONS,
    WITNESSES,
    Child,
    MysqlSituations,
    PostgresSituations,
    Situation,
    attempt,
)
from zreconnect.tests.test_mysql import MysqlTestCase
from zreconnect.tests.test_sqlite import SqliteTestCase
from zreconnect.tests.test_twophase import LAYER

# One for each pair of a witness and a way to end transactions. Python takes its time to end.
ENDINGS_OF_FORKS = ("as programs do", *("SIGKILL", "os._exit") * 4)


class SharedTests:
    # Forks

    def be_child(self, situation, number, child):
        self.assertEqual(self.connection.state, situation.childs)
        if situation.childs == "closed":
            with self.assertRaises(self.connection.InterfaceError):
                self.insert("child")
            return
        if situation.childs == "doomed":
            for request in (self.connection.begin, partial(self.insert, "child"), self.commit):
                with self.assertRaises(DisconnectionError):
                    request()
            self.abort()
        self.assertEqual(self.connection.state, "idle")
        self.insert("child")
        self.assertNotEqual(self.number(), number)
        self.commit()
        self.assertEqual(self.connection.state, "idle")
        if not self.connection.autocommit:
            self.insert("left by the child")

    def test_forks(self):
        for (share, witness), ending in zip(
            product((None, "descriptor"), reversed(self.witnesses)), ENDINGS_OF_FORKS, strict=False
        ):
            situations = SITUATIONS | CLOSED | self.ends_by_error | ({} if share else BLOCKS)
            for name, situation in situations.items():
                with self.case(witness, share, state=name, ending=ending):
                    situation.enter(self)
                    number = self.number() if situation.has_session else None
                    Child(self, partial(self.be_child, situation, number), ending).join()
                    self.assertEqual(self.connection.state, situation.parents)
                    if name != "closed":
                        before = ["before"] if name in ("active", "in a block") else []
                        self.go_on(situation, number, [*before, "child", "parent"])

    def go_on(self, situation, number, rows):
        """What the parent does with its connection afterwards."""
        if situation.error:
            error = type(attempt(self.commit))
            self.assertIn(situation.error, [each.__name__ for each in error.__mro__])
            self.abort()
        self.insert("parent")
        self.commit()
        self.assertEqual(self.connection.state, "idle")
        if number is not None:
            self.assertEqual(self.number(), number)
        self.assertEqual(self.rows(), rows)

    def check_lost_commit(self, name):
        """Commit, when the line is about to be cut; what that tells about a row must be true."""
        error = attempt(self.commit)
        self.assertIsInstance(error, type(None) if name in self.rows() else DisconnectionError)

    def test_processes_do_not_share_a_witness(self):
        names = ("never used", "idle", "idle after a loss", "active")
        for (witness, lost), name in product(self.lost, names):
            with self.case(witness, state=name, lost=lost):
                SITUATIONS[name].enter(self)

                def work(name, commit, child):
                    if self.connection.state == "doomed":
                        self.abort()
                    self.insert(name)
                    if name == "slow":
                        child.pause()
                    commit()

                Child(self, partial(work, "first", self.commit)).join()
                look_up = partial(self.check_lost_commit, "slow")
                slow = Child(self, partial(work, "slow", look_up))
                slow.wait_for_pause()
                # Others work while that one's transaction is under way.
                other = Child(self, partial(work, "other", self.commit))
                wait_until(lambda other=other: other.has_ended() or self.query(self.waiting))
                self.assertFalse(self.query(self.waiting), "a child waits for another one")
                other.join()
                self.insert("parent")
                self.commit()
                self.forward.cut(lost, 0)
                slow.go()
                slow.join()
                self.insert("parent's last")
                self.forward.cut(lost, 0)
                self.check_lost_commit("parent's last")

    def test_a_fork_while_another_thread_commits(self):
        with self.case():
            self.use()

            def be_child(child):
                self.abort()
                child.pause()
                with self.connection:
                    self.insert("child")

            join = self.start(self.commit_silently)
            wait_until(self.rows)
            child = Child(self, be_child)
            child.wait_for_pause()
            self.forward.resume()
            self.assertIsNone(join())
            child.go()
            child.join()
            self.assertEqual(self.rows(), ["child", "row"])

    def test_a_fork_beside_another_threads_block(self):
        with self.case():
            entered, leave = threading.Event(), threading.Event()

            def work():
                with self.connection:
                    entered.set()
                    leave.wait(PATIENCE)
                    self.insert("thread")

            def be_child(child):
                with self.connection:
                    self.insert("child")

            join = self.start(work)
            entered.wait(PATIENCE)
            Child(self, be_child).join()
            leave.set()
            self.assertIsNone(join())
            self.assertEqual(self.rows(), ["child", "thread"])

    def test_a_fork_beside_the_idle_connection_of_another_thread(self):
        """The child has lost the thread, and what the thread held."""
        for witness in self.witnesses:
            with self.case(witness, share="descriptor"):
                idle, leave = threading.Event(), threading.Event()

                def work(idle=idle, leave=leave):
                    self.use()
                    idle.set()
                    leave.wait(PATIENCE)
                    self.insert("thread")
                    self.commit()

                join = self.start(work)
                idle.wait(PATIENCE)
                before = self.forward.count()
                Child(self, lambda child: None).join()
                self.assertEqual(self.forward.count(), before)
                leave.set()
                self.assertIsNone(join())
                self.assertEqual(self.rows(), ["thread"])

    def commit_silently(self):
        """Insert a row and commit, with an answer that does not arrive."""
        # The witness has nothing to ask for before COMMIT then.
        self.connection.begin()
        self.insert("row")
        self.forward.silence("to_client")
        self.commit()

    # Threads that end

    def test_threads_that_end(self):
        situations = SITUATIONS | self.ends_by_error | BLOCKS | ITERATORS
        if self.driver == "psycopg":
            # psycopg closes it with a statement, in whoever's transaction.
            del situations["iterator of a cursor on the server"]
        for name, situation in situations.items():
            with self.case(state=name):
                commit = self.commit
                self.in_thread(situation.enter, self)
                # What the thread has entered is suspended, and not left.
                self.left.append(self.commit)
                self.commit = commit

                def work():
                    with self.connection:
                        self.insert("block")

                self.in_thread(work)
                self.insert("main")
                for end in self.left[:-1]:
                    attempt(end)
                self.commit()
                self.assertEqual(self.rows(), ["block", "main"])

    def test_the_late_end_of_a_dead_threads_block(self):
        for name in ("connection", "transaction"):
            with self.case(block=name):

                def block(name):
                    with self.connection if name == "connection" else self.connection.transaction():
                        yield

                suspended = block(name)
                self.in_thread(next, suspended)
                self.insert("main")
                suspended.close()
                self.assertEqual(self.connection.state, "active")
                self.commit()
                self.assertEqual(self.rows(), ["main"])

    def test_what_a_dead_thread_has_left_is_not_committed_without_a_word(self):
        for name in ("active", "in a block"):
            with self.case(state=name):
                self.in_thread((SITUATIONS | BLOCKS)[name].enter, self)
                with self.assertRaisesRegex(self.connection.ProgrammingError, "another thread's"):
                    self.connection.commit()
                self.assertEqual(self.rows(), [])
                self.connection.commit()
                self.insert("main")
                self.connection.commit()
                self.assertEqual(self.rows(), ["main"])

    def test_a_thread_that_ends_while_others_wait(self):
        for name in ("begun", "active", "doomed", "in an empty block", "in a block"):
            with self.case(state=name), self.assertLogs("zreconnect", "DEBUG") as logs:
                entered, leave = threading.Event(), threading.Event()

                def work(name, entered=entered, leave=leave):
                    (SITUATIONS | BLOCKS)[name].enter(self)
                    entered.set()
                    leave.wait(PATIENCE)

                ending = self.start(work, name)
                entered.wait(PATIENCE)
                waiting = [self.start(self.connection.run, self.insert, each) for each in "ab"]
                wait_until(lambda logs=logs: "".join(logs.output).count("waits for another") == 2)
                leave.set()
                self.assertEqual([join() for join in (ending, *waiting)], [None] * 3)
                self.assertEqual(self.rows(), ["a", "b"])

    def test_the_late_end_of_a_dead_threads_transaction(self):
        for share, late, moment in product(
            self.shares, ("abort", "commit"), ("before others", "meanwhile")
        ):
            with self.case("xid", share, late=late, moment=moment):

                def work(name):
                    self.insert(name)
                    self.left.append(transaction.get())

                self.in_thread(work, "dead")
                if moment == "meanwhile":
                    work("living")
                error = attempt(getattr(self.left[0], late))
                if late == "commit":
                    self.assertIsNotNone(error)
                else:
                    self.assertIsNone(error)
                if moment == "before others":
                    work("living")
                self.assertEqual((self.connection.state, self.rows()), ("active", []))
                self.commit()
                self.assertEqual(self.rows(), ["living"])

    # close() by another thread

    def close(self):
        """Close the connection; a function that waits until close() has returned."""
        closing = self.start(self.connection.close)
        wait_until(lambda: self.connection.state == "closed")
        return closing

    def check_closed(self, closing, join, *right):
        """The connection stays closed and leaves no session; the thread was told what is right."""
        told = join()
        self.assertIsNone(closing())
        self.assertEqual(self.connection.state, "closed")
        with self.assertRaises(self.connection.InterfaceError):
            self.insert("row")
        wait_until(lambda: not self.sessions())
        self.assertIsInstance(told, right)

    def test_close_while_a_statement_is_under_way(self):
        with self.case():
            holder = self.connect(witness=None)
            self.insert("row", holder)
            join = self.start(lambda: (self.insert("before"), self.insert("row"), self.commit()))
            wait_until(lambda: self.query(self.waiting))
            closing = self.close()
            holder.close()
            self.check_closed(closing, join, self.connection.Error)
            self.assertEqual(self.rows(), [])

    def test_close_while_commit_waits_for_its_answer(self):
        for witness in ("xid", Ledger()):
            with self.case(witness):
                join = self.start(self.commit_silently)
                wait_until(self.rows)
                closing = self.close()
                self.forward.drop()
                self.forward.resume()
                errors = (CommitOutcomeUnknown, self.connection.InterfaceError)
                self.check_closed(closing, join, type(None), *errors)

    def test_close_while_the_outcome_is_looked_up(self):
        for witness, lost in self.lost:
            with self.case(witness, lost=lost):
                before = self.forward.count()

                def work(lost):
                    self.insert("row")
                    self.forward.cut(lost, 0, then=self.forward.silence)
                    self.commit()

                join = self.start(work, lost)
                wait_until(lambda before=before: (self.forward.count() - before).connections == 2)
                closing = self.close()
                self.forward.resume()
                errors = (CommitOutcomeUnknown, self.connection.InterfaceError)
                right = type(None) if lost == "to_client" else DisconnectionError
                self.check_closed(closing, join, right, *errors)


class PostgresTests(PostgresSituations, SharedTests):
    layer = PortForwardLayer(LAYER, "TwoPhasePortForwardLayer")

    def test_a_session_that_has_lost_its_socket(self):
        """As when another thread of the parent's was just about to learn of its end."""
        with self.case():
            raw = mock.Mock()
            raw.fileno.return_value = -1
            self.connection.work.link.driver.abandon(raw)
            raw.fileno.assert_called_once()

    def test_forks_between_the_phases(self):
        ends = ("tpc_finish", "tpc_abort")
        for witness, childs, parents in product(WITNESSES, ends, ends):
            with self.case(witness, "two_phase", child=childs, parent=parents):
                end = self.prepare()
                sessions, prepared = self.sessions(), self.prepared()

                def be_child(child, end=end, childs=childs):
                    self.assertEqual(self.connection.state, "doomed")
                    with self.assertRaises(DisconnectionError):
                        self.insert("child")
                    error = attempt(end, childs)
                    if childs == "tpc_finish":
                        self.assertIsNotNone(error)
                    self.abort()
                    self.assertEqual(self.connection.state, "idle")
                    self.insert("child")
                    self.commit()

                Child(self, be_child).join()
                self.assertEqual((self.connection.state, self.prepared()), ("prepared", prepared))
                end(parents)
                self.assertEqual(self.prepared(), [])
                self.abort()
                before = ["before"] if parents == "tpc_finish" else []
                (number,) = sessions
                self.go_on(Situation(None), number, [*before, "child", "parent"])

    def test_a_thread_that_ends_between_the_phases(self):
        for late in ("tpc_finish", "tpc_abort"):
            with self.case("xid", "two_phase", late=late):
                self.in_thread(lambda: self.left.append(self.prepare()))
                with self.assertRaises(self.connection.ProgrammingError):
                    self.insert("main")
                self.assertEqual(len(self.prepared()), 1)
                self.left[0](late)
                self.assertEqual(self.prepared(), [])
                self.insert("main")
                self.commit()
                before = ["before"] if late == "tpc_finish" else []
                self.assertEqual(self.rows(), [*before, "main"])

    def test_a_fork_while_a_silence_is_logged(self):
        logs, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)

        class Slow(logging.Handler):
            def createLock(self):
                self.lock = None  # It holds up only who has something to log.

            def emit(self, record):
                if threading.current_thread() is not threading.main_thread():
                    logs.set()
                    go_on.wait(PATIENCE)

        def be_child(child):
            logging.getLogger("zreconnect").removeHandler(handler)
            own = self.connect(self.server.dsn(), response_timeout=PATIENCE)
            own.run(self.insert, "child", own)

        handler = Slow()
        with self.case():
            connection = self.connect(response_timeout=0.2)
            logging.getLogger("zreconnect").addHandler(handler)
            self.addCleanup(logging.getLogger("zreconnect").removeHandler, handler)

            def ask():
                connection.begin()
                self.forward.silence()
                self.insert("row", connection)

            join = self.start(ask)
            logs.wait(PATIENCE)
            Child(self, be_child).join()
            go_on.set()
            join()
            self.assertEqual(self.rows(), ["child"])


class Psycopg2Tests(PostgresTests, DatabaseTestCase):
    pass


class PsycopgTests(PostgresTests, DatabaseTestCase):
    driver = "psycopg"
    module = psycopg


@on_mariadb()
class PymysqlTests(MysqlSituations, SharedTests, MysqlTestCase, LineTestCase):
    driver_name = "pymysql"


class SqliteTests(SqliteTestCase):
    """A file has no sessions; a child that was forked inside a transaction may not write to it."""

    def test_forks(self):
        for name, ending in product(("never used", "idle", "active"), ("os._exit", "SIGKILL")):
            with self.subTest(state=name, ending=ending):
                connection = self.connect()
                insert = partial(connection.execute, "INSERT INTO item VALUES (?)")
                if name != "never used":
                    insert(["before"])
                if name == "idle":
                    connection.rollback()

                def be_child(child, connection=connection, insert=insert, active=name == "active"):
                    self.assertEqual(connection.state, "doomed" if active else "idle")
                    connection.rollback()
                    if active:
                        with self.assertRaisesRegex(sqlite3.OperationalError, "forked inside"):
                            insert(["child"])
                    else:
                        connection.run(insert, ["child"])
                        insert(["left by the child"])

                Child(self, be_child, ending).join()
                insert(["parent"])
                connection.commit()
                first = "before" if name == "active" else "child"
                self.assertEqual(self.names(), [first, "parent"])
                connection.run(connection.execute, "DELETE FROM item")
