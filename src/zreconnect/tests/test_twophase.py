"""Two-phase commit: both databases or neither, whatever is lost and whoever dies."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import unittest
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path
from unittest import mock

import psycopg2
import transaction
import zope.event

import zreconnect
from zreconnect import (
    PERSIST,
    CommitOutcomeUnknown,
    ConnectionDescriptor,
    DisconnectionError,
    Ledger,
    RetryPolicy,
    branch,
    recover,
    recovery,
    twophase,
)
from zreconnect.drivers.psycopg2 import driver
from zreconnect.events import CommitLookedUp, ConnectionAttemptFailed, ConnectionLost, GaveUp
from zreconnect.testing import EmbeddedPostgres, PortForward
from zreconnect.testing.layers import POSTGRES_LAYER, PostgresLayer
from zreconnect.tests.base import PATIENCE, interrupted_at, wait_until
from zreconnect.tests.test_watchdog import RESPONSE_TIMEOUT, watchdogs_time

# Without fsync PREPARE TRANSACTION takes less time. What a process has written outlives the process
# all the same.
SETTINGS = {"fsync": "off", "max_prepared_transactions": 20}
LAYER = PostgresLayer("TwoPhasePostgresLayer", SETTINGS)
IMPATIENT = RetryPolicy(timeout=0.2)
VERY_IMPATIENT = RetryPolicy(timeout=0.02, initial=0.01)
DATABASES = ("first", "second")
PREPARED = "SELECT gid FROM pg_prepared_xacts"
# Cut after every so many bytes; a look-up has many, and takes longer than the rest.
FULL = os.environ.get("ZRECONNECT_SWEEP") == "full"
STRIDE = 1 if FULL else 7
LONG_STRIDE = 7 if FULL else 89
STRIDE_OF_LINE = 1 if FULL else 30


def make_databases(server, columns):
    """Make both, with nothing but an empty table, and undo what a test before has prepared."""
    for gid, dbname in server.query("SELECT gid, database FROM pg_prepared_xacts"):
        server.query(f"ROLLBACK PREPARED '{gid}'", dbname=dbname)
    for dbname in DATABASES:
        if not server.query("SELECT datname FROM pg_database WHERE datname = %s", dbname):
            server.create_database(dbname)
        for statement in (
            "DROP SCHEMA public CASCADE",
            "CREATE SCHEMA public",
            f"CREATE TABLE item ({columns})",
        ):
            server.query(statement, dbname=dbname)


class Database:
    """One of the two databases, and a line to it."""

    def __init__(self, server, dbname):
        self.server = server
        self.dbname = dbname
        self.forward = PortForward(server.host, server.port)
        self.forward.start()
        self.dsn = server.dsn(dbname=dbname)
        self.forwarded_dsn = server.dsn(
            dbname=dbname, host=self.forward.host, port=self.forward.port
        )

    def query(self, statement, *parameters):
        return self.server.query(statement, *parameters, dbname=self.dbname)

    def prepared(self):
        return len(self.query(f"{PREPARED} WHERE database = current_database()"))

    def vanish(self):
        """The server cannot be reached any more."""
        self.forward.refuse()
        self.forward.drop()

    def lose_answer(self, then=None):
        """What is sent next arrives, and its answer does not."""
        self.forward.cut("to_client", 0, then=then)

    def lose_request(self):
        """What is sent next does not arrive."""
        self.forward.cut("to_server", 0)


class Side(Database):
    """One of the two databases, its connection, and the line between them."""

    def __init__(self, server, dbname, **keywords):
        super().__init__(server, dbname)
        self.connection = zreconnect.connect(self.forwarded_dsn, two_phase=True, **keywords)

    @property
    def key(self):
        return f"zreconnect:{id(self.connection)}"

    def insert(self):
        self.connection.cursor().execute("INSERT INTO item VALUES ('one')")

    def rows(self):
        return len(self.query("SELECT name FROM item"))

    def vanish(self):
        # Only where nothing is to succeed: on a busy machine it may take longer.
        self.connection.work.patience.policy = IMPATIENT
        super().vanish()

    def come_back(self):
        self.forward.accept()
        self.connection.work.patience.policy = PERSIST

    def close(self):
        self.connection.close()
        self.forward.stop()


class Hook:
    """A data manager that does something when `transaction` calls it."""

    transaction_manager = transaction.manager

    def __init__(self, key, **functions):
        self._key = key
        self._functions = functions
        transaction.get().join(self)

    def sortKey(self):
        return self._key

    def __getattr__(self, name):
        if name not in ("abort", "tpc_begin", "commit", "tpc_vote", "tpc_finish", "tpc_abort"):
            raise AttributeError(name)
        return lambda transaction: self._functions.get(name, lambda: None)()


class TwoPhaseTestCase(unittest.TestCase):
    """``self.deciding`` and ``self.other`` are the two sides, in the order of their votes."""

    layer = LAYER

    def setUp(self):
        self.server = self.layer.server
        make_databases(self.server, "name text PRIMARY KEY")
        self.addCleanup(transaction.abort)

    def connect(self, **keywords):
        self.connect_to((self.server, "first"), (self.server, "second"), **keywords)

    def connect_to(self, *databases, **keywords):
        sides = [Side(*database, **keywords) for database in databases]
        for side in sides:
            self.addCleanup(side.close)
        self.deciding, self.other = sorted(sides, key=lambda side: side.key)
        self.sides = (self.deciding, self.other)
        self.dsns = [side.dsn for side in self.sides]

    def insert(self):
        for side in self.sides:
            side.insert()

    def before_finish(self, function):
        Hook("a", tpc_finish=function)

    def between_branches(self, **functions):
        Hook(self.deciding.key + "!", **functions)

    def check(self, rows, prepared=0):
        """Both databases have so many rows, and so many transactions prepared."""
        self.assertEqual([side.rows() for side in self.sides], [rows, rows])
        self.assertEqual([side.prepared() for side in self.sides], [prepared, prepared])

    def recover(self):
        """Settle what is left, and return the decisions, the deciding branch's first."""
        shown = recover(*self.dsns, older_than=0)
        settled = recover(*self.dsns, older_than=0, settle=True)
        self.assertEqual(
            [(each.gid, each.decision) for each in shown],
            [(each.gid, each.decision) for each in settled],
        )
        self.assertFalse(any(each.settled for each in shown))
        self.assertTrue(all(each.settled for each in settled), settled)
        self.assertEqual(recover(*self.dsns, older_than=0), [])
        return [each.decision for each in settled]

    @contextlib.contextmanager
    def left_behind(self, *words):
        """The block logs an error with these words about what stays prepared."""
        with self.assertLogs("zreconnect", logging.ERROR) as logs:
            yield
        errors = [line for line in logs.output if "may still be prepared" in line]
        self.assertEqual(len(errors), len(words), logs.output)
        for line, word in zip(errors, words, strict=True):
            self.assertIn(word, line)


class HealthyTests(TwoPhaseTestCase):
    def test_commit(self):
        self.connect()
        self.insert()
        self.check(rows=0)
        transaction.commit()
        self.check(rows=1)
        self.assertEqual([side.connection.state for side in self.sides], ["idle", "idle"])
        self.assertEqual(transaction.get()._resources, [])

    def test_abort(self):
        self.connect()
        self.insert()
        transaction.abort()
        self.check(rows=0)

    def test_round_trips(self):
        self.connect()
        self.insert()
        transaction.abort()
        before = [side.forward.count() for side in self.sides]
        self.insert()
        transaction.commit()
        spent = [
            (side.forward.count() - then).round_trips
            for side, then in zip(self.sides, before, strict=True)
        ]
        # INSERT along with BEGIN, PREPARE TRANSACTION, COMMIT PREPARED; the deciding one asks for
        # its name.
        self.assertEqual(spent, [4, 3])

    def test_one_branch_alone(self):
        self.connect()
        self.other.insert()
        self.before_finish(lambda: self.assertEqual(self.other.prepared(), 1))
        transaction.commit()
        self.assertEqual((self.deciding.rows(), self.other.rows()), (0, 1))

    def test_a_branch_that_was_rolled_back_has_no_vote(self):
        self.connect()
        self.insert()
        self.deciding.connection.rollback()
        transaction.commit()
        self.assertEqual((self.deciding.rows(), self.other.rows()), (0, 1))

    def test_one_phase_data_managers_vote_last(self):
        self.connect()
        descriptor = ConnectionDescriptor(self.server.dsn(dbname="first"))
        self.addCleanup(descriptor.close)
        descriptor.connection().cursor().execute("INSERT INTO item VALUES ('two')")
        self.insert()
        Hook("~", tpc_vote=lambda: self.check(rows=0, prepared=1))
        Hook("~~", tpc_vote=lambda: self.assertEqual(self.rows_of("first"), 1))
        transaction.commit()
        self.assertEqual((self.rows_of("first"), self.rows_of("second")), (2, 1))

    def rows_of(self, dbname):
        return len(self.server.query("SELECT name FROM item", dbname=dbname))

    def test_another_data_manager_refuses(self):
        self.connect()
        self.insert()

        def refuse():
            self.check(rows=0, prepared=1)
            raise LookupError

        Hook("~", tpc_vote=refuse)
        with self.assertRaises(LookupError):
            transaction.commit()
        self.check(rows=0)
        transaction.abort()
        self.insert()
        transaction.commit()
        self.check(rows=1)

    def test_between_the_phases_the_connection_takes_no_statements(self):
        self.connect()
        self.insert()
        connection = self.deciding.connection
        seen = []

        def look():
            seen.append(connection.state)
            for use in (
                lambda: connection.cursor().execute("SELECT 1"),
                connection.rollback,
                connection.begin,
                lambda: connection.driver_connection,
                lambda: setattr(connection, "autocommit", True),
            ):
                with self.assertRaisesRegex(psycopg2.ProgrammingError, "is prepared"):
                    use()

        Hook("~", tpc_vote=look)
        transaction.commit()
        self.assertEqual(seen, ["prepared"])
        self.check(rows=1)

    def test_the_driver_knows_of_the_transaction(self):
        self.connect()
        cursor = self.deciding.connection.cursor("on_server")
        cursor.execute("SELECT 1")
        self.assertEqual(cursor.fetchall(), [(1,)])
        for _ in range(2):
            self.insert()
            transaction.commit()
            self.check(rows=1)
            self.assertTrue(self.deciding.connection.driver_connection.autocommit)
            for side in self.sides:
                side.query("DELETE FROM item")

    def test_a_ledger(self):
        self.connect(witness=Ledger())
        for rows in (1, 2):
            for side in self.sides:
                side.connection.cursor().execute("INSERT INTO item VALUES (%s)", (str(rows),))
            transaction.commit()
            self.check(rows)

    def test_descriptor_and_fork(self):
        first, second = (
            ConnectionDescriptor(self.server.dsn(dbname=dbname), two_phase=True)
            for dbname in ("first", "second")
        )
        self.addCleanup(first.close)
        self.addCleanup(second.close)
        forked = second.connection().fork()
        self.addCleanup(forked.close)
        for connection in (first.connection(), second.connection(), forked):
            connection.cursor().execute("SELECT 1")
        seen = []
        Hook("~", tpc_vote=lambda: seen.extend(self.server.query(PREPARED)))
        transaction.commit()
        self.assertEqual(len(seen), 3)
        self.assertEqual(len({gid.split(":")[1] for (gid,) in seen}), 1)

    def test_two_servers(self):
        with EmbeddedPostgres(settings=SETTINGS) as second:
            second.query("CREATE TABLE item (name text PRIMARY KEY)")
            self.connect_to((self.server, "first"), (second, "postgres"))
            self.insert()
            transaction.commit()
            self.check(rows=1)
            for side in self.sides:
                side.query("DELETE FROM item")
            self.insert()
            self.before_finish(lambda: self.deciding.lose_answer(then=self.deciding.vanish))
            with (
                self.left_behind("not known", "not known"),
                self.assertRaises(CommitOutcomeUnknown),
            ):
                transaction.commit()
            (undecidable,) = recover(self.other.dsn, older_than=0, settle=True)
            self.assertEqual((undecidable.decision, undecidable.settled), ("undecidable", False))
            self.assertIn("cluster that was not asked", undecidable.reason)
            self.assertEqual(self.recover(), ["commit"])
            self.check(rows=1)
            self.other.connection.close()


class RefusedTests(TwoPhaseTestCase):
    def test_what_cannot_be_prepared(self):
        self.connect()
        for side in self.sides:
            self.insert()
            side.connection.cursor().execute("CREATE TEMPORARY TABLE passing (name text)")
            with self.assertRaisesRegex(psycopg2.NotSupportedError, "temporary"):
                transaction.commit()
            transaction.abort()
            self.check(rows=0)
        self.insert()
        transaction.commit()
        self.check(rows=1)

    def test_a_block_that_has_not_ended(self):
        self.connect()
        for side in self.sides:
            self.insert()
            block = side.connection.transaction()
            block.__enter__()
            with self.assertRaisesRegex(psycopg2.ProgrammingError, "has not ended"):
                transaction.commit()
            transaction.abort()
            self.check(rows=0)
        self.insert()
        with self.other.connection.transaction():
            pass
        transaction.commit()
        self.check(rows=1)

    def test_after_a_failed_statement(self):
        self.connect()
        for side in self.sides:
            self.insert()
            with contextlib.suppress(psycopg2.IntegrityError):
                side.insert()
            with self.assertRaisesRegex(
                psycopg2.errors.InFailedSqlTransaction, "Nothing was committed"
            ):
                transaction.commit()
            transaction.abort()
            self.check(rows=0)

    def test_after_a_statement_that_has_rolled_one_branch_back(self):
        self.connect()
        self.insert()
        self.other.connection.cursor().execute("ROLLBACK")
        with self.assertRaises(psycopg2.InternalError):
            transaction.commit()
        transaction.abort()
        self.check(rows=0)

    def test_a_disconnect_before_the_vote(self):
        self.connect()
        self.insert()
        self.other.forward.drop()
        with contextlib.suppress(DisconnectionError):
            self.other.connection.cursor().execute("SELECT 1")
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        transaction.abort()
        self.check(rows=0)


class DisabledTests(unittest.TestCase):
    layer = POSTGRES_LAYER

    def test_a_server_that_allows_no_prepared_transactions(self):
        connection = zreconnect.connect(self.layer.server.dsn(), two_phase=True)
        self.addCleanup(connection.close)
        self.addCleanup(transaction.abort)
        connection.cursor().execute("SELECT 1")
        with self.assertRaisesRegex(psycopg2.Error, "max_prepared_transactions"):
            transaction.commit()
        transaction.abort()
        self.assertEqual(connection.state, "idle")


class LostVoteTests(TwoPhaseTestCase):
    """The answer to PREPARE TRANSACTION is lost."""

    def test_prepared(self):
        for witness in ("xid", None, Ledger()):
            self.connect(witness=witness)
            self.insert()
            self.between_branches(tpc_vote=self.other.lose_answer)
            transaction.commit()
            self.check(rows=1)
            # With a session that the witness knows.
            for side in self.sides:
                side.query("DELETE FROM item")
            self.insert()
            transaction.commit()
            self.check(rows=1)
            for side in self.sides:
                side.query("DELETE FROM item")
                side.connection.close()

    def test_not_prepared(self):
        self.connect()
        self.insert()
        self.between_branches(tpc_vote=self.other.lose_request)
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        transaction.abort()
        self.check(rows=0)

    def test_an_answer_that_does_not_come_is_not_waited_for(self):
        time = watchdogs_time(self)
        self.connect(response_timeout=RESPONSE_TIMEOUT)
        self.insert()

        def fall_silent():
            self.other.forward.silence("to_client")
            time.hurries = True

        def speak_again(event):
            if isinstance(event, ConnectionLost):
                time.hurries = False
                self.other.forward.resume()

        self.between_branches(tpc_vote=fall_silent)
        zope.event.subscribers.append(speak_again)
        self.addCleanup(zope.event.subscribers.remove, speak_again)
        transaction.commit()
        self.check(rows=1)

    def test_run_runs_again(self):
        self.connect()
        calls = []

        def work():
            calls.append(1)
            self.insert()
            if len(calls) == 1:
                self.between_branches(tpc_vote=self.other.lose_request)

        transaction.manager.run(work)
        self.assertEqual(len(calls), 2)
        self.check(rows=1)

    def test_unknown_counts_as_not_prepared(self):
        self.connect()
        self.insert()
        self.between_branches(tpc_vote=lambda: self.other.lose_answer(then=self.other.vanish))
        with (
            self.left_behind("although the transaction is aborted"),
            self.assertRaises(DisconnectionError),
        ):
            transaction.commit()
        self.assertEqual((self.deciding.prepared(), self.other.prepared()), (0, 1))
        self.assertEqual(self.recover(), ["rollback"])
        self.check(rows=0)

    def test_unknown_and_rolled_back_when_the_server_is_back(self):
        self.connect()
        self.insert()
        self.between_branches(tpc_vote=lambda: self.other.lose_answer(then=self.other.vanish))

        def come_back(event):
            if isinstance(event, GaveUp):
                self.other.come_back()

        zope.event.subscribers.append(come_back)
        self.addCleanup(zope.event.subscribers.remove, come_back)
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        self.check(rows=0)

    def test_an_interrupt(self):
        prepare = driver.prepare_transaction

        def before(raw, gid):
            raise KeyboardInterrupt

        def after(raw, gid):
            prepare(raw, gid)
            raise KeyboardInterrupt

        for interrupted in (before, after):
            self.connect()
            self.insert()
            with (
                mock.patch.object(driver, "prepare_transaction", interrupted),
                self.assertRaises(KeyboardInterrupt),
            ):
                transaction.commit()
            transaction.abort()
            self.check(rows=0)


class LostDecisionTests(TwoPhaseTestCase):
    """The answer to the deciding branch's COMMIT PREPARED is lost."""

    @contextlib.contextmanager
    def looked_up(self, *outcomes):
        seen = []
        zope.event.subscribers.append(seen.append)
        try:
            yield
        finally:
            zope.event.subscribers.remove(seen.append)
        self.assertEqual(
            [event.outcome for event in seen if isinstance(event, CommitLookedUp)], list(outcomes)
        )

    def test_the_request_is_lost(self):
        self.connect()
        self.insert()
        self.before_finish(self.deciding.lose_request)
        with self.looked_up("committed"):
            transaction.commit()
        self.check(rows=1)

    def test_the_answer_is_lost(self):
        for witness in ("xid", None, Ledger()):
            self.connect(witness=witness)
            self.insert()
            self.before_finish(self.deciding.lose_answer)
            with self.looked_up("committed"):
                transaction.commit()
            self.check(rows=1)
            for side in self.sides:
                side.query("DELETE FROM item")
                side.connection.close()

    def test_the_server_restarts_between_the_phases(self):
        for interrupt in (
            self.server.restart,
            lambda: (self.server.stop_immediately(), self.server.start()),
            lambda: (self.server.kill_all(), self.server.start()),
        ):
            self.connect()
            self.insert()
            self.before_finish(interrupt)
            transaction.commit()
            self.check(rows=1)
            for side in self.sides:
                side.query("DELETE FROM item")
                side.connection.close()

    def test_the_server_cannot_be_reached(self):
        self.connect()
        self.insert()
        self.before_finish(self.deciding.vanish)
        with (
            self.left_behind("not known", "not known"),
            self.looked_up("unknown"),
            self.assertRaisesRegex(CommitOutcomeUnknown, "zreconnect recover"),
        ):
            transaction.commit()
        self.check(rows=0, prepared=1)
        self.assertEqual(self.recover(), ["rollback", "rollback"])
        self.check(rows=0)

    def test_the_server_cannot_be_reached_after_it_has_committed(self):
        self.connect()
        self.insert()
        self.before_finish(lambda: self.deciding.lose_answer(then=self.deciding.vanish))
        with (
            self.left_behind("not known", "not known"),
            self.assertRaises(CommitOutcomeUnknown),
        ):
            transaction.commit()
        self.assertEqual((self.deciding.prepared(), self.other.prepared()), (0, 1))
        self.assertEqual(self.recover(), ["commit"])
        self.check(rows=1)

    def test_it_is_not_run_again(self):
        self.connect()
        calls = []

        def work():
            calls.append(1)
            self.insert()
            self.before_finish(self.deciding.vanish)

        with self.assertRaises(CommitOutcomeUnknown):
            transaction.manager.run(work)
        self.assertEqual(len(calls), 1)

    def test_the_connection_goes_on_beside_what_it_left(self):
        self.connect(witness=Ledger())
        for side in self.sides:
            side.connection.cursor().execute("SELECT 1")
        transaction.commit()
        self.insert()
        self.before_finish(self.deciding.vanish)
        with self.assertRaises(CommitOutcomeUnknown):
            transaction.commit()
        transaction.abort()
        self.deciding.come_back()
        for side in self.sides:
            side.connection.cursor().execute("INSERT INTO item VALUES ('two')")
        transaction.commit()
        self.check(rows=1, prepared=1)

    def test_somebody_has_rolled_it_back(self):
        self.connect()
        self.insert()
        self.before_finish(lambda: recover(self.deciding.dsn, older_than=0, settle=True))
        with self.assertRaisesRegex(psycopg2.OperationalError, "Somebody has rolled it back"):
            transaction.commit()
        transaction.abort()
        self.check(rows=0)

    def test_somebody_has_committed_it(self):
        self.connect()
        self.insert()

        def commit():
            ((gid,),) = self.deciding.query(f"{PREPARED} WHERE database = current_database()")
            self.deciding.query(f"COMMIT PREPARED '{gid}'")

        self.before_finish(commit)
        transaction.commit()
        self.check(rows=1)

    def test_an_interrupt(self):
        self.check_an_interrupt(1)

    def test_an_interrupt_in_the_other_branch(self):
        self.check_an_interrupt(2)

    def test_a_time_limit_in_the_deciding_branch(self):
        self.check_an_interrupt(1, TimeoutError)

    def check_an_interrupt(self, number, interrupt=KeyboardInterrupt):
        self.connect()
        self.insert()
        end = twophase.end_branch
        ended = []

        def interrupted(*args):
            end(*args)
            ended.append(args)
            if len(ended) == number:
                raise interrupt

        with (
            mock.patch.object(twophase, "end_branch", interrupted),
            self.assertRaises(interrupt),
        ):
            transaction.commit()
        # It may have arrived, so that the branches are committed.
        with self.assertRaises(CommitOutcomeUnknown) as found:
            transaction.abort()
        self.assertEqual(found.exception.outcome, "committed")
        self.assertEqual(self.recover(), [])
        self.check(rows=1)

    def test_an_interrupt_while_the_server_is_away(self):
        """COMMIT PREPARED has arrived, its answer is lost, and the reconnecting is interrupted."""
        for direction, rows in (("to_client", 1), ("to_server", 0)):
            with self.subTest(direction):
                self.connect()
                self.insert()
                deciding = self.deciding
                self.before_finish(
                    partial(deciding.forward.cut, direction, 0, then=deciding.vanish)
                )
                with (
                    self.left_behind("not known", "not known"),
                    interrupted_at(ConnectionAttemptFailed),
                    self.assertRaises(KeyboardInterrupt),
                ):
                    transaction.commit()
                with self.assertRaisesRegex(CommitOutcomeUnknown, "zreconnect recover") as found:
                    transaction.abort()
                self.assertIn(":0:", found.exception.evidence)
                self.recover()
                self.check(rows)
                for side in self.sides:
                    side.query("DELETE FROM item")
                    side.connection.close()

    def test_an_interrupt_where_it_is_told(self):
        self.connect()
        self.insert()
        self.before_finish(lambda: self.deciding.lose_answer(then=self.deciding.vanish))
        with interrupted_at(CommitLookedUp), self.assertRaises(KeyboardInterrupt):
            transaction.commit()
        with self.assertRaisesRegex(CommitOutcomeUnknown, "zreconnect recover"):
            transaction.abort()
        self.assertEqual(self.recover(), ["commit"])
        self.check(rows=1)

    def test_the_right_to_commit_is_lost(self):
        self.connect()
        role = "some_role"
        self.server.query(f"DROP ROLE IF EXISTS {role}")
        self.server.query(f"CREATE ROLE {role}")
        self.addCleanup(self.server.query, f"DROP ROLE {role}")
        self.insert()
        raw = self.deciding.connection.driver_connection

        def lose_right():
            with raw.cursor() as cursor:
                cursor.execute(f"SET SESSION AUTHORIZATION {role}")

        self.before_finish(lose_right)
        with self.assertRaises(CommitOutcomeUnknown) as caught:
            transaction.commit()
        self.assertIsInstance(caught.exception.__cause__, psycopg2.errors.InsufficientPrivilege)
        self.assertEqual(self.recover(), ["rollback", "rollback"])
        self.check(rows=0)


class WaitingForStandbyTests(TwoPhaseTestCase):
    """The lost session's server process is still busy with COMMIT PREPARED."""

    def setUp(self):
        super().setUp()
        self.addCleanup(self.set, "synchronous_standby_names", "")

    def set(self, name, value):
        self.server.query(f"ALTER SYSTEM SET {name} = '{value}'")
        self.server.query("SELECT pg_reload_conf()")
        wait_until(lambda: self.server.query(f"SHOW {name}") == [(value,)])
        # It is the checkpointer that makes sessions wait, or no more, when it has read the setting.
        self.server.query("CHECKPOINT")

    def commit(self, afterwards):
        """Commit; the deciding branch waits for a standby that is not there, and is cut off."""
        for side in self.sides:
            side.connection.cursor().execute("SET synchronous_commit = local")
            transaction.commit()
        self.deciding.connection.cursor().execute("SET synchronous_commit = on")
        transaction.commit()
        self.insert()
        self.before_finish(lambda: self.set("synchronous_standby_names", "nobody"))
        problems = []
        self.committed = []

        def cut():
            try:
                wait_until(self.orphan)
                self.deciding.forward.drop()
                afterwards()
            except BaseException as problem:
                problems.append(problem)

        thread = threading.Thread(target=cut)
        thread.start()
        try:
            transaction.commit()
            self.committed.append(True)
        finally:
            thread.join()
            self.assertEqual(problems, [])

    def orphan(self):
        return self.server.query("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")

    def end_orphan(self):
        busy = self.server.log().count("is busy")
        wait_until(lambda: self.server.log().count("is busy") > busy)
        ((pid,),) = self.orphan()
        self.server.terminate_backend(pid)
        # Who looks waits for the standby, as COMMIT PREPARED does.
        wait_until(lambda: self.orphan() not in ([], [(pid,)]))
        self.assertEqual(self.committed, [])
        self.set("synchronous_standby_names", "")

    def test_it_is_waited_for(self):
        self.connect()
        self.commit(afterwards=self.end_orphan)
        self.check(rows=1)

    def test_it_is_not_waited_for_for_ever(self):
        self.connect()
        with (
            mock.patch.object(twophase, "PATIENCE_WITH_ORPHANS", 0),
            self.assertRaises(CommitOutcomeUnknown),
        ):
            self.commit(afterwards=lambda: None)
        self.set("synchronous_standby_names", "")
        wait_until(lambda: not self.orphan())
        self.assertEqual(self.recover(), ["commit"])
        self.check(rows=1)


class FinishTests(TwoPhaseTestCase):
    """The decision has been taken; the other branch follows."""

    def test_lost_requests_and_answers(self):
        for lose in ("lose_request", "lose_answer"):
            self.connect()
            self.insert()
            self.between_branches(tpc_finish=getattr(self.other, lose))
            transaction.commit()
            self.check(rows=1)
            for side in self.sides:
                side.query("DELETE FROM item")

    def test_a_branch_that_cannot_be_reached_is_left(self):
        self.connect()
        self.insert()
        self.between_branches(tpc_finish=self.other.vanish)
        with self.left_behind("although the transaction is committed"):
            transaction.commit()
        self.assertEqual((self.deciding.rows(), self.other.prepared()), (1, 1))
        self.assertEqual(self.recover(), ["commit"])
        self.check(rows=1)

    def test_another_data_manager_fails_after_the_decision(self):
        self.connect()
        self.insert()

        def fail():
            raise LookupError

        self.between_branches(tpc_finish=fail)
        with self.assertRaises(LookupError):
            transaction.commit()
        # As with a commit in one phase: the error did not say so.
        with self.assertRaises(CommitOutcomeUnknown) as caught:
            transaction.abort()
        self.assertEqual(caught.exception.outcome, "committed")
        self.check(rows=1)

    def test_another_data_manager_fails_before_the_decision(self):
        self.connect()
        self.insert()

        def fail():
            raise LookupError

        self.before_finish(fail)
        with self.assertRaises(LookupError):
            transaction.commit()
        transaction.abort()
        self.check(rows=0)

    def test_connections_that_are_closed_between_the_phases(self):
        self.connect()
        self.insert()
        self.before_finish(lambda: [side.connection.close() for side in self.sides])
        transaction.commit()
        self.check(rows=1)
        self.assertEqual([side.connection.state for side in self.sides], ["closed", "closed"])
        wait_until(lambda: not self.server.backend_pids())


class AbortTests(TwoPhaseTestCase):
    """The vote is taken back."""

    def refuse(self, before=lambda: None):
        def fail():
            before()
            raise LookupError

        Hook("~", tpc_vote=fail)
        with self.assertRaises(LookupError):
            transaction.commit()
        transaction.abort()

    def test_lost_requests_and_answers(self):
        for side in (0, 1):
            for lose in ("lose_request", "lose_answer"):
                self.connect()
                self.insert()
                self.refuse(getattr(self.sides[side], lose))
                self.check(rows=0)

    def test_branches_that_cannot_be_reached_are_left(self):
        self.connect()
        for left in (self.sides, [self.deciding], [self.other]):
            self.insert()
            why = "although the transaction is aborted"
            with self.left_behind(*[why for side in left]):
                self.refuse(lambda left=left: [side.vanish() for side in left])
            self.assertEqual(sum(side.prepared() for side in self.sides), len(left))
            self.assertEqual(self.recover(), ["rollback" for side in left])
            self.check(rows=0)
            for side in left:
                side.come_back()


class FailoverTests(TwoPhaseTestCase):
    """The deciding branch's server goes on in another timeline, or is another one."""

    def promote(self):
        """The server becomes a standby and then a primary again, as after a failover."""
        ((directory,),) = self.server.query("SHOW data_directory")
        self.server.shut_down()
        Path(directory, "standby.signal").touch()
        self.server.start()
        self.assertEqual(self.server.query("SELECT pg_promote()"), [(True,)])

    def test_between_the_phases(self):
        self.connect()
        self.insert()
        self.before_finish(self.promote)
        transaction.commit()
        self.check(rows=1)

    def test_after_the_decision_a_transaction_id_proves_nothing(self):
        self.connect()
        self.insert()
        self.before_finish(lambda: self.deciding.lose_answer(then=self.promote))
        with self.assertRaises(CommitOutcomeUnknown):
            transaction.commit()
        (undecidable,) = recover(*self.dsns, older_than=0, settle=True)
        self.assertEqual((undecidable.decision, undecidable.settled), ("undecidable", False))
        self.assertIn("failed over", undecidable.reason)
        self.assertEqual((self.deciding.rows(), self.other.prepared()), (1, 1))

    def test_after_the_decision_a_ledger_knows(self):
        self.connect(witness=Ledger())
        self.insert()
        self.before_finish(lambda: self.deciding.lose_answer(then=self.promote))
        transaction.commit()
        self.check(rows=1)

    def test_another_server_takes_its_place(self):
        self.connect()
        self.insert()

        def move():
            forward = self.deciding.forward
            forward.stop()
            forward.target_port = second.port
            forward.start()

        with EmbeddedPostgres() as second:
            second.create_database(self.deciding.dbname)
            second.query(f"ALTER ROLE postgres PASSWORD '{self.server.password}'")
            second.password = self.server.password
            self.before_finish(move)
            with self.assertRaises(CommitOutcomeUnknown) as caught:
                transaction.commit()
            # The last error was the loss: the other server has let us in, and did not know.
            self.assertIn("closed the connection", str(caught.exception.__cause__))
            self.deciding.connection.close()
        self.assertEqual(self.recover(), ["rollback", "rollback"])
        self.check(rows=0)


class RecoverTests(TwoPhaseTestCase):
    def die(self, key):
        """Let a process insert a row on both sides, and be killed in the second phase.

        key: where, as an expression, of the sort keys of the two branches.
        """
        program = f"""
import os, signal, transaction, zreconnect
connections = [zreconnect.connect(dsn, two_phase=True) for dsn in {self.dsns!r}]
for connection in connections:
    connection.cursor().execute("INSERT INTO item VALUES ('one')")
deciding, other = sorted(each.sortKey() for each in transaction.get()._resources)
class Death:
    transaction_manager = transaction.manager
    tpc_begin = commit = tpc_vote = lambda self, transaction: None
    def sortKey(self):
        return {key}
    def tpc_finish(self, transaction):
        os.kill(os.getpid(), signal.SIGKILL)
transaction.get().join(Death())
transaction.commit()
"""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.run([sys.executable, "-c", program], env=environment, timeout=PATIENCE)
        self.assertEqual(process.returncode, -signal.SIGKILL)
        wait_until(lambda: not self.server.backend_pids())

    def leave(self):
        """Leave both branches prepared."""
        self.connect()
        self.die('"a"')

    def prepare(self, gid, dbname="first"):
        with closing(psycopg2.connect(self.server.dsn(dbname=dbname))) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("BEGIN; INSERT INTO item VALUES (%s)", (gid,))
                cursor.execute("PREPARE TRANSACTION %s", (gid,))

    def test_a_process_that_died_before_the_decision(self):
        self.leave()
        self.check(rows=0, prepared=1)
        self.assertEqual(self.recover(), ["rollback", "rollback"])
        self.check(rows=0)

    def test_a_process_that_died_after_the_decision(self):
        self.connect()
        self.die('deciding + "!"')
        self.assertEqual(sum(side.rows() for side in self.sides), 1)
        self.assertEqual(self.recover(), ["commit"])
        self.check(rows=1)

    def test_what_is_shown(self):
        self.leave()
        deciding, other = recover(*self.dsns, *self.dsns, older_than=0)
        self.assertEqual({deciding.database, other.database}, {"first", "second"})
        self.assertEqual(deciding.owner, "postgres")
        self.assertIn(deciding.database, deciding.server)
        self.assertNotIn(self.server.password, repr(deciding))
        self.assertIsNotNone(deciding.prepared.tzinfo)
        self.assertIn("was not committed", deciding.reason)
        self.assertIn(f"in the database {deciding.database}", other.reason)
        self.assertLess(max(len(deciding.gid), len(other.gid)), 200)
        self.check(rows=0, prepared=1)

    def test_young_ones_are_left_alone(self):
        self.leave()
        self.assertEqual(recover(*self.dsns, settle=True), [])
        self.check(rows=0, prepared=1)

    def test_others_are_left_alone(self):
        self.connect()
        self.prepare("somebody")
        self.prepare("zreconnect is not our prefix")
        self.assertEqual(recover(*self.dsns, older_than=0, settle=True), [])

    def test_a_name_of_another_version(self):
        self.connect()
        self.prepare("zreconnect:and something else")
        (found,) = recover(*self.dsns, older_than=0, settle=True)
        self.assertEqual((found.decision, found.settled), ("undecidable", False))
        self.assertIn("another version", found.reason)

    def test_the_deciding_branch_is_in_a_database_that_was_not_given(self):
        self.leave()
        branches = {branch.Branch.from_gid(gid).number: dbname for gid, dbname in self.found()}
        (found,) = recover(self.server.dsn(dbname=branches[1]), older_than=0, settle=True)
        self.assertEqual((found.decision, found.settled), ("undecidable", False))
        self.assertIn(f"in the database {branches[0]}, is still prepared", found.reason)
        self.check(rows=0, prepared=1)

    def found(self):
        return self.server.query("SELECT gid, database FROM pg_prepared_xacts")

    def test_a_transaction_id_that_the_server_has_lost(self):
        self.connect()
        self.prepare("a")
        self.server.query("ROLLBACK PREPARED 'a'", dbname="first")
        ((system_identifier,),) = self.server.query(
            "SELECT system_identifier FROM pg_control_system()"
        )
        gid = branch.Branch("0" * 32, 1, system_identifier, "00000001", 2**40 + 5, "first").gid
        self.prepare(gid)
        self.assertEqual(self.recover(), ["rollback"])

    def test_without_the_right_to_end_them(self):
        self.leave()
        self.server.query("DROP ROLE IF EXISTS visitor")
        self.server.query(f"CREATE ROLE visitor LOGIN PASSWORD '{self.server.password}'")
        self.addCleanup(self.server.query, "DROP ROLE visitor")
        dsns = [self.server.dsn(user="visitor", dbname=side.dbname) for side in self.sides]
        deciding, other = recover(*dsns, older_than=0, settle=True)
        self.assertEqual((deciding.settled, other.settled), (False, False))
        self.assertIn("permission denied", deciding.reason)
        self.assertEqual(other.decision, "undecidable")
        self.check(rows=0, prepared=1)

    def test_somebody_else_ends_one_meanwhile(self):
        self.leave()
        decide = recovery._decide

        def slowly(gid, *args):
            decided = decide(gid, *args)
            if branch.Branch.from_gid(gid).number == 0:
                dbname = dict(self.found())[gid]
                self.server.query(f"COMMIT PREPARED '{gid}'", dbname=dbname)
            return decided

        with mock.patch.object(recovery, "_decide", slowly):
            (other,) = recover(*self.dsns, older_than=0, settle=True)
        self.assertEqual((other.decision, other.settled), ("commit", True))
        self.check(rows=1)

    def test_bad_arguments(self):
        with self.assertRaisesRegex(ValueError, "dsns"):
            recover()
        with self.assertRaisesRegex(TypeError, "older_than"):
            recover("dbname=x", older_than="60")
        with self.assertRaisesRegex(TypeError, "older_than"):
            recover("dbname=x", older_than=True)
        with self.assertRaisesRegex(ValueError, "older_than"):
            recover("dbname=x", older_than=-1)
        with self.assertRaisesRegex(ValueError, "dsn"):
            recover("mongodb://x")

    def test_a_database_that_cannot_be_asked(self):
        self.leave()
        with self.assertRaises(psycopg2.OperationalError):
            recover(*self.dsns, self.server.dsn(dbname="none"), older_than=0, settle=True)
        self.check(rows=0, prepared=1)


class SweepTestCase(TwoPhaseTestCase):
    """The line to one of the servers is cut after each of the bytes of a transaction."""

    driver = "psycopg2"

    def setUp(self):
        super().setUp()
        self.connect(driver=self.driver)
        self.past = []
        for dsn in self.dsns:
            past = psycopg2.connect(dsn)
            self.addCleanup(past.close)
            past.autocommit = True
            self.past.append(past)
        self.insert()
        transaction.commit()
        self.outcome()

    def work(self, place="", hook=None):
        """Insert and commit; whether that came to pass, which must be so on both sides."""
        if hook is not None:
            Hook(hook[0], **hook[1])
        try:
            self.insert()
            transaction.commit()
            committed = True
        except DisconnectionError:
            transaction.abort()
            committed = False
        self.assertEqual(self.outcome(), (committed, committed, 0), place)
        return committed

    def outcome(self):
        """The rows on either side, which are removed, and how many transactions are prepared."""
        rows = [self.ask(past, "DELETE FROM item RETURNING name") for past in self.past]
        return len(rows[0]), len(rows[1]), len(self.ask(self.past[0], PREPARED))

    def ask(self, past, statement):
        with past.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall()

    def roll_back(self):
        """So that BEGIN travels along in the next transaction, whatever became of the last one."""
        self.insert()
        transaction.abort()


class SweepTests(SweepTestCase):
    def test_cuts(self):
        self.roll_back()
        before = [side.forward.count() for side in self.sides]
        self.work()
        spent = [side.forward.count() - then for side, then in zip(self.sides, before, strict=True)]
        outcomes = Counter()
        for side, count in zip(self.sides, spent, strict=True):
            for direction, length in [
                ("to_server", count.bytes_to_server),
                ("to_client", count.bytes_to_client),
            ]:
                for after in range(0, length, STRIDE):
                    reset = bool(after // STRIDE % 2)
                    self.roll_back()
                    cut = side.forward.cut(direction, after, reset)
                    place = f"{side.key} {direction} {after} of {length} {reset}"
                    outcomes[self.work(place)] += 1
                    self.assertTrue(cut.wait(PATIENCE), place)
        self.assertEqual(set(outcomes), {True, False})
        print(f" ({outcomes[True]} committed, {outcomes[False]} not)", end="")

    def test_cuts_of_the_session_that_looks_it_up(self):
        keys = {self.deciding: "a", self.other: self.deciding.key + "!"}
        for phase, side in [
            ("tpc_vote", self.other),
            ("tpc_finish", self.deciding),
            ("tpc_finish", self.other),
        ]:
            for direction in ("to_server", "to_client"):
                for after in range(0, 2000, LONG_STRIDE):
                    forward = side.forward

                    def again(forward=forward, direction=direction, after=after):
                        forward.cut(direction, after)

                    lose = partial(side.lose_answer, then=again)
                    with self.subTest(phase=phase, direction=direction, after=after):
                        self.assertTrue(self.work(hook=(keys[side], {phase: lose})))
                    if forward.cancel_cut():
                        # The transaction has ended before.
                        break


class LineStaysCutTests(SweepTestCase):
    """The line stays cut until the transaction has ended; what is left prepared, `recover` ends."""

    def test_cuts_from_the_vote_on(self):
        before = {}

        def count():
            before.update({side: side.forward.count() for side in self.sides})

        self.work(hook=("a", {"tpc_vote": count}))
        spent = {side: side.forward.count() - before[side] for side in self.sides}
        outcomes = Counter()
        for side in self.sides:
            for direction in ("to_server", "to_client"):
                length = getattr(spent[side], f"bytes_{direction}")
                for after in range(0, length, STRIDE_OF_LINE):
                    with self.subTest(key=side.key, direction=direction, after=after):
                        outcomes[self.work_without_line(side, direction, after)] += 1
        self.assertEqual(set(outcomes), {True, False, None})
        print(f" ({outcomes[True]} committed, {outcomes[False]} not, {outcomes[None]} ?)", end="")

    def work_without_line(self, side, direction, after):
        """Insert and commit. Whether that came to pass, as far as the program is told, and None
        if it is not; it must be so on both sides."""

        def cut():
            side.connection.work.patience.policy = VERY_IMPATIENT
            reset = bool(after // STRIDE_OF_LINE % 2)
            side.forward.cut(direction, after, reset, then=side.forward.refuse)

        Hook("a", tpc_vote=cut)
        committed = None
        with contextlib.suppress(CommitOutcomeUnknown):
            try:
                self.insert()
                transaction.commit()
                committed = True
            except DisconnectionError:
                committed = False
        transaction.abort()
        side.forward.cancel_cut()
        side.come_back()
        mine = side.connection.driver_connection.info.backend_pid
        # What was on its way to them has arrived when the lost sessions have ended.
        wait_until(lambda: self.sessions(side) <= {mine, *self.pids})
        recover(*self.dsns, older_than=0, settle=True)
        outcomes = (0, 1) if committed is None else (int(committed),)
        self.assertIn(self.outcome(), [(each, each, 0) for each in outcomes])
        return committed

    @property
    def pids(self):
        return {past.info.backend_pid for past in self.past}

    def sessions(self, side):
        return {
            pid
            for (pid,) in self.server.query(
                "SELECT pid FROM pg_stat_activity WHERE datname = %s", side.dbname
            )
        }


class PsycopgLineStaysCutTests(LineStaysCutTests):
    driver = "psycopg"
