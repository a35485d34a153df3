"""The two-phase calls of DB-API: a program that coordinates its transaction itself."""

import contextlib
import os
import sqlite3
import unittest
import warnings
from unittest import mock

import psycopg
import psycopg2
import transaction
from psycopg2 import extensions

import zreconnect
from zreconnect import (
    FAIL_FAST,
    PERSIST,
    CommitOutcomeUnknown,
    DisconnectionError,
    Ledger,
    twophase,
)
from zreconnect.events import CommitLookedUp
from zreconnect.tests.base import interrupted_at
from zreconnect.tests.interrupts import Alarm, AtLines
from zreconnect.tests.test_twophase import (
    DATABASES,
    IMPATIENT,
    LAYER,
    PREPARED,
    STRIDE,
    Database,
    make_databases,
)


def losing_once(function, lose):
    waiting = [lose]

    def losing(*args):
        if waiting:
            waiting.pop()()
        return function(*args)

    return losing


class TwoPhaseCallsTests:
    layer = LAYER

    def setUp(self):
        make_databases(self.layer.server, "name text PRIMARY KEY")
        self.database = Database(self.layer.server, DATABASES[0])
        self.addCleanup(self.database.forward.stop)
        self.addCleanup(transaction.abort)
        self.connection = self.connect()
        self.gid = "ours"

    def connect(self, **keywords):
        connection = zreconnect.connect(self.database.forwarded_dsn, driver=self.driver, **keywords)
        self.addCleanup(connection.close)
        return connection

    def begin(self, name="one"):
        self.connection.tpc_begin(self.gid)
        self.connection.cursor().execute("INSERT INTO item VALUES (%s)", (name,))

    def prepare(self, name="one"):
        self.begin(name)
        self.connection.tpc_prepare()

    def vanish(self):
        self.connection.work.patience.policy = IMPATIENT
        self.database.vanish()

    def come_back(self):
        self.connection.work.patience.policy = PERSIST
        self.database.forward.accept()

    def check(self, rows, prepared=0, state="idle"):
        self.assertEqual(self.connection.state, state)
        self.assertEqual(len(self.database.query("SELECT name FROM item")), rows)
        self.assertEqual(self.database.prepared(), prepared)

    def check_idle(self, rows):
        """As `check`, and the connection goes on."""
        self.check(rows)
        with self.connection.transaction() as cursor:
            cursor.execute("INSERT INTO item VALUES ('last')")
        self.check(rows + 1)

    def at(self, name, lose):
        """Lose something when the driver's method is called first."""
        driver = self.connection.work.link.driver
        return mock.patch.object(driver, name, losing_once(getattr(driver, name), lose))

    def at_end(self, lose, module="zreconnect.twophase"):
        """Lose something when COMMIT PREPARED or ROLLBACK PREPARED is sent first."""
        return mock.patch(f"{module}.end_branch", losing_once(twophase.end_branch, lose))

    # Without a loss

    def test_commit(self):
        self.prepare()
        self.check(0, prepared=1, state="prepared")
        self.connection.tpc_commit()
        self.check_idle(1)

    def test_rollback(self):
        self.prepare()
        self.connection.tpc_rollback()
        self.check_idle(0)

    def test_in_one_phase(self):
        self.begin()
        self.connection.tpc_commit()
        self.check(1)
        self.begin("two")
        self.connection.tpc_rollback()
        self.check_idle(1)

    def test_names(self):
        for xid in ("", "it's \\ ours", self.connection.xid(1, "global", "branch")):
            self.gid = xid
            self.prepare()
            self.assertEqual(self.database.query(PREPARED), [(str(xid),)])
            (found,) = self.connect().tpc_recover()
            self.assertEqual(str(found), str(xid))
            self.connection.tpc_rollback()

    def test_by_another_connection(self):
        for end, rows in (("tpc_commit", 1), ("tpc_rollback", 1)):
            self.prepare(end)
            self.connection.close()
            other = self.connection = self.connect()
            (xid,) = other.tpc_recover()
            getattr(other, end)(xid)
            self.check(rows)
            with self.assertRaisesRegex(self.module.ProgrammingError, "does not exist"):
                getattr(other, end)(xid)
            self.check(rows)

    def test_with_a_ledger(self):
        self.connection = self.connect(witness=Ledger())
        self.prepare()
        self.connection.tpc_commit()
        self.prepare("two")
        self.connection.reset()
        self.check(1, prepared=1)
        with self.connection.transaction() as cursor:
            cursor.execute("SELECT 1")
        self.connection.tpc_rollback(self.gid)
        self.check_idle(1)

    def test_reset(self):
        self.begin()
        self.connection.reset()
        self.check_idle(0)

    # What is refused

    def test_what_does_not_end_it(self):
        self.begin()
        for end in (self.connection.commit, self.connection.rollback):
            with self.assertRaisesRegex(self.module.ProgrammingError, "tpc_(commit|rollback)"):
                end()
        self.connection.tpc_prepare()
        for end in (
            self.connection.commit,
            self.connection.rollback,
            self.connection.tpc_prepare,
            lambda: self.connection.tpc_begin("other"),
            lambda: self.connection.tpc_commit("other"),
            self.connection.tpc_recover,
            lambda: self.connection.cursor().execute("SELECT 1"),
            lambda: self.connection.driver_connection,
            # That it has one can be seen, as all its attributes can.
            self.connection.cancel,
        ):
            with self.assertRaisesRegex(self.module.ProgrammingError, "prepared"):
                end()
        self.assertEqual(self.connection.info.dbname, DATABASES[0])
        self.check(0, prepared=1, state="prepared")

    def test_outside(self):
        for call in (
            self.connection.tpc_prepare,
            self.connection.tpc_commit,
            self.connection.tpc_rollback,
        ):
            with self.assertRaisesRegex(self.module.ProgrammingError, "tpc_begin"):
                call()
        self.connection.begin()
        for call in (self.connection.tpc_begin, self.connection.tpc_commit):
            with self.assertRaisesRegex(self.module.ProgrammingError, "inside a transaction"):
                call("one")
        self.connection.rollback()
        self.connection.autocommit = True
        with self.assertRaisesRegex(self.module.ProgrammingError, "autocommit"):
            self.connection.tpc_begin("one")
        self.connection.close()
        for call in (self.connection.tpc_prepare, self.connection.tpc_commit):
            with self.assertRaises(self.module.InterfaceError):
                call()

    def test_beside_a_transaction_manager(self):
        with self.assertRaisesRegex(self.module.ProgrammingError, "transaction manager"):
            self.connect(two_phase=True).tpc_begin("one")

    def test_after_a_failed_statement(self):
        self.begin()
        with self.assertRaises(self.module.DataError):
            self.connection.cursor().execute("SELECT 1 / 0")
        with self.assertRaises(self.module.InternalError):
            self.connection.tpc_prepare()
        self.check_idle(0)

    def test_after_a_statement_that_has_ended_it(self):
        for statement, rows in (("ROLLBACK", 0), ("COMMIT", 1)):
            with self.subTest(statement):
                self.begin()
                self.connection.cursor().execute(statement)
                with self.assertRaisesRegex(self.module.InternalError, "or a statement before"):
                    self.connection.tpc_prepare()
                self.connection.tpc_rollback()
                self.check(rows)
        self.begin("two")
        self.connection.cursor().execute("ROLLBACK AND CHAIN")
        self.connection.tpc_prepare()
        self.connection.tpc_commit()
        self.check(1)

    def test_a_block_that_fails_rolls_back(self):
        with self.assertRaises(ZeroDivisionError), self.connection:
            self.begin()
            raise ZeroDivisionError
        self.check_idle(0)

    # Losses

    def test_a_loss_before_it_is_prepared(self):
        for end in (self.connection.rollback, self.connection.tpc_rollback, self.connection.reset):
            self.begin()
            self.database.forward.drop()
            with self.assertRaises(DisconnectionError):
                self.connection.tpc_prepare()
            self.assertEqual(self.connection.state, "doomed")
            end()
            self.check(0)
        self.check_idle(0)

    def test_the_answer_to_prepare_is_lost(self):
        self.begin()
        with self.at("prepare_transaction", self.database.lose_answer):
            self.connection.tpc_prepare()
        self.check(0, prepared=1, state="prepared")
        self.connection.tpc_commit()
        self.check_idle(1)

    def test_prepare_does_not_arrive(self):
        self.begin()
        with (
            self.at("prepare_transaction", self.database.lose_request),
            self.assertRaises(DisconnectionError),
        ):
            self.connection.tpc_prepare()
        self.connection.tpc_rollback()
        self.check_idle(0)

    def prepare_another(self):
        """As a program that was ended has left it."""
        another = zreconnect.connect(self.database.dsn, driver=self.driver)
        self.addCleanup(another.close)
        another.tpc_begin(self.gid)
        another.cursor().execute("INSERT INTO item VALUES ('another')")
        another.tpc_prepare()
        another.reset()

    def test_prepare_does_not_arrive_and_its_name_is_that_of_another(self):
        self.prepare_another()
        self.begin()
        with (
            self.at("prepare_transaction", self.database.lose_request),
            self.assertRaises(DisconnectionError),
        ):
            self.connection.tpc_prepare()
        self.connection.tpc_rollback()
        self.check(0, prepared=1)

    def test_an_interrupt_at_prepare_and_its_name_is_that_of_another(self):
        self.prepare_another()
        self.begin()

        def interrupted(raw, gid):
            raw.close()
            raise Alarm

        driver = self.connection.work.link.driver
        with (
            mock.patch.object(driver, "prepare_transaction", interrupted),
            self.assertRaises(Alarm),
        ):
            self.connection.tpc_prepare()
        self.connection.tpc_rollback()
        self.check(0, prepared=1)

    def test_commit_is_lost_and_its_name_is_used_again(self):
        self.prepare()

        def lose_answer():
            self.database.lose_answer(then=self.prepare_another)

        with self.at_end(lose_answer):
            self.connection.tpc_commit()
        self.check(1, prepared=1)

    def test_whether_it_is_prepared_is_unknown(self):
        self.begin()
        lose = lambda: self.database.lose_answer(then=self.vanish)  # noqa: E731
        with (
            self.at("prepare_transaction", lose),
            self.assertLogs("zreconnect", "ERROR"),
            self.assertRaisesRegex(CommitOutcomeUnknown, "PREPARE TRANSACTION"),
        ):
            self.connection.tpc_prepare()
        self.check(0, prepared=1, state="doomed")
        with self.assertRaisesRegex(self.module.OperationalError, "may still be prepared"):
            self.connection.tpc_rollback()
        self.come_back()
        self.connection.tpc_rollback(self.gid)
        self.check_idle(0)

    def test_commit_is_lost(self):
        for lose in (self.database.lose_answer, self.database.lose_request):
            self.prepare(lose.__name__)
            with self.at_end(lose):
                self.connection.tpc_commit()
        self.check_idle(2)

    def test_rollback_is_lost(self):
        for lose in (self.database.lose_answer, self.database.lose_request):
            self.prepare()
            with self.at_end(lose):
                self.connection.tpc_rollback()
            self.check(0)
        self.check_idle(0)

    def test_whether_it_is_committed_is_unknown(self):
        for end, rows in ((self.connection.tpc_commit, 1), (self.connection.tpc_rollback, 1)):
            self.prepare(end.__name__)
            self.vanish()
            with (
                self.assertLogs("zreconnect", "ERROR"),
                self.assertRaisesRegex(CommitOutcomeUnknown, "called again"),
            ):
                self.connection.tpc_commit()
            self.assertEqual(self.connection.state, "prepared")
            self.come_back()
            end()
            self.check(rows)
        self.check_idle(1)

    def test_what_was_unknown_and_is_rolled_back_is_told_no_more(self):
        self.prepare()
        self.vanish()
        with interrupted_at(CommitLookedUp), self.assertRaises(KeyboardInterrupt):
            self.connection.tpc_commit()
        self.come_back()
        self.database.query(f"ROLLBACK PREPARED '{self.gid}'")
        with self.assertRaisesRegex(self.connection.OperationalError, "not committed"):
            self.connection.tpc_commit()
        self.connection.rollback()
        self.check_idle(0)

    def test_committed_and_then_rolled_back(self):
        self.prepare()
        with (
            self.at_end(lambda: self.database.lose_answer(then=self.vanish)),
            self.assertRaises(CommitOutcomeUnknown),
        ):
            self.connection.tpc_commit()
        with self.assertRaisesRegex(CommitOutcomeUnknown, "called again"):
            self.connection.tpc_rollback()
        self.come_back()
        self.check_idle(1)

    def test_an_interrupt_at_commit(self):
        end = twophase.end_branch

        def interrupted(*args):
            end(*args)
            raise KeyboardInterrupt

        self.prepare()
        with (
            mock.patch.object(twophase, "end_branch", interrupted),
            self.assertRaises(KeyboardInterrupt),
        ):
            self.connection.tpc_commit()
        with self.assertRaises(CommitOutcomeUnknown) as found:
            self.connection.tpc_rollback()
        self.assertEqual(found.exception.outcome, "committed")
        self.connection.rollback()
        self.check_idle(1)

    def test_an_interrupt_at_lines_of_every_call(self):
        """What has been committed is told, by tpc_rollback() or else by rollback()."""
        ignored = warnings.catch_warnings()
        ignored.__enter__()
        self.addCleanup(ignored.__exit__, None, None, None)
        # Of what is left to the garbage collector after an interrupt.
        warnings.simplefilter("ignore", ResourceWarning)
        for name, before, call in (
            ("in two phases", self.prepare, lambda: self.connection.tpc_commit()),
            ("in one phase", self.begin, lambda: self.connection.tpc_commit()),
            ("by name", self.leave, lambda: self.connection.tpc_commit(self.gid)),
            ("left", self.prepare, lambda: self.connection.reset()),
        ):
            before()
            with (counting := AtLines())():
                call()
            self.tidy_up()
            last = counting.lines
            for number in sorted({*range(1, last, 2 * STRIDE), *range(last - 10, last + 1)}):
                with self.subTest(name, number=number):
                    before()
                    interrupt = AtLines([number], [Alarm()])
                    has_returned = False
                    with contextlib.suppress(Alarm), interrupt():
                        call()
                        has_returned = True
                    interrupt.forget()
                    is_told = has_returned or self.is_told()
                    self.assertLessEqual(len(self.database.query("SELECT FROM item")), is_told)
                    self.assertEqual(self.connection.state, "idle")
                    self.assertFalse(self.connection.work.turn.is_mine())
                    self.tidy_up()

    def leave(self):
        self.prepare()
        self.connection.reset()

    def is_told(self):
        try:
            try:
                self.connection.tpc_rollback()
            except self.module.ProgrammingError:
                self.connection.rollback()
        except CommitOutcomeUnknown:
            return True
        return False

    def tidy_up(self):
        for (gid,) in self.database.query(PREPARED):
            self.connection.tpc_rollback(gid)
        with self.connection.transaction() as cursor:
            cursor.execute("DELETE FROM item")

    def test_an_interrupt_at_prepare(self):
        self.begin()
        driver = self.connection.work.link.driver
        prepare = driver.prepare_transaction

        def interrupted(*args):
            prepare(*args)
            raise KeyboardInterrupt

        with (
            mock.patch.object(driver, "prepare_transaction", interrupted),
            self.assertRaises(KeyboardInterrupt),
        ):
            self.connection.tpc_prepare()
        self.connection.tpc_rollback()
        self.check_idle(0)

    def test_commit_in_one_phase_is_lost(self):
        self.begin()
        with self.at("commit", self.database.lose_answer):
            self.connection.tpc_commit()
        self.check(1)
        self.begin("two")
        with (
            self.at("commit", self.database.lose_request),
            self.assertRaises(DisconnectionError),
        ):
            self.connection.tpc_commit()
        self.connection.rollback()
        self.check_idle(1)

    def test_somebody_has_rolled_it_back(self):
        self.prepare()
        self.database.query("ROLLBACK PREPARED 'ours'")
        with self.assertRaisesRegex(self.module.OperationalError, "Somebody has rolled it back"):
            self.connection.tpc_commit()
        self.check_idle(0)

    def test_a_loss_with_a_name_that_anybody_has_prepared(self):
        for end, lose, error, rows in (
            ("tpc_commit", self.database.lose_answer, CommitOutcomeUnknown, 1),
            ("tpc_commit", self.database.lose_request, CommitOutcomeUnknown, 1),
            ("tpc_rollback", self.database.lose_request, DisconnectionError, 1),
            ("tpc_rollback", self.database.lose_answer, None, 1),
        ):
            with self.subTest(end=end, lose=lose.__name__):
                if not self.database.prepared():
                    self.prepare(f"{end} {lose.__name__}")
                    self.connection.close()
                    self.connection = self.connect()
                with self.at_end(lose, "zreconnect.tpc"):
                    expected = self.assertRaises(error) if error else contextlib.nullcontext()
                    with expected:
                        getattr(self.connection, end)(self.gid)
                self.check(rows, prepared=int(lose == self.database.lose_request))

    def test_a_loss_with_such_a_name_when_the_server_stays_away(self):
        vanish = self.database.vanish
        for number, (end, lose, error, prepared) in enumerate(
            (
                (
                    "tpc_commit",
                    lambda: self.database.lose_answer(then=vanish),
                    CommitOutcomeUnknown,
                    0,
                ),
                ("tpc_commit", vanish, CommitOutcomeUnknown, 1),
                ("tpc_rollback", vanish, DisconnectionError, 1),
            )
        ):
            with self.subTest(number):
                if not self.database.prepared():
                    self.prepare(str(number))
                self.connection.close()
                self.connection = self.connect(policy=FAIL_FAST)
                with self.at_end(lose, "zreconnect.tpc"), self.assertRaises(error):
                    getattr(self.connection, end)(self.gid)
                self.database.forward.accept()
                self.check(1, prepared=prepared)

    def test_what_it_commits_under_a_name_is_not_run_again(self):
        other = self.connect()
        nothing = contextlib.nullcontext()
        for lose, gid, runs in (
            (nothing, self.gid, 1),
            (self.at_end(self.database.lose_request, "zreconnect.tpc"), self.gid, 1),
            (nothing, "another", 3),
        ):
            calls = []

            def work(lose=lose, gid=gid, calls=calls):
                calls.append(gid)
                with lose, contextlib.suppress(self.module.Error, CommitOutcomeUnknown):
                    other.tpc_commit(gid)
                raise DisconnectionError(gid)

            with self.subTest(gid=gid, lose=lose):
                self.prepare(f"{gid} {lose is nothing}")
                self.connection.close()
                self.connection = self.connect()
                with self.assertRaises(DisconnectionError):
                    self.connection.run(work, attempts=3)
                self.assertEqual(len(calls), runs)
                other.reset()
                for name in self.database.query("SELECT gid FROM pg_prepared_xacts"):
                    other.tpc_rollback(*name)

    def test_what_is_prepared_is_found_after_a_loss_while_idle(self):
        self.prepare()
        self.connection.close()
        other = self.connect()
        other.begin()
        self.assertEqual(len(other.tpc_recover()), 1)
        other.rollback()
        self.database.forward.drop()
        self.assertEqual(len(other.tpc_recover()), 1)
        self.database.forward.drop()
        other.tpc_rollback(self.gid)
        self.assertEqual(self.database.prepared(), 0)

    def test_a_forked_child_leaves_it_to_its_parent(self):
        self.prepare()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with contextlib.suppress(DisconnectionError):
                    self.connection.tpc_commit()
                    status = 2
                self.connection.tpc_rollback()
                with self.connection.transaction() as cursor:
                    cursor.execute("INSERT INTO item VALUES ('child')")
                status = 0 if status == 1 else status
            finally:
                os._exit(status)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
        self.check(1, prepared=1, state="prepared")
        self.connection.tpc_commit()
        self.check_idle(2)


class Psycopg2Tests(TwoPhaseCallsTests, unittest.TestCase):
    driver = "psycopg2"
    module = psycopg2

    def test_status(self):
        self.assertEqual(self.connection.status, extensions.STATUS_READY)
        self.begin()
        self.assertEqual(self.connection.status, extensions.STATUS_BEGIN)
        self.connection.tpc_prepare()
        self.assertEqual(self.connection.status, extensions.STATUS_PREPARED)
        self.connection.tpc_rollback()
        self.assertEqual(self.connection.status, extensions.STATUS_READY)


class PsycopgTests(TwoPhaseCallsTests, unittest.TestCase):
    driver = "psycopg"
    module = psycopg

    def test_it_has_no_status(self):
        self.assertFalse(hasattr(self.connection, "status"))


class OtherDriversTests(unittest.TestCase):
    def test_transactions_that_cannot_be_prepared(self):
        connection = zreconnect.connect("sqlite://")
        self.addCleanup(connection.close)
        with self.assertRaisesRegex(sqlite3.NotSupportedError, "cannot be prepared"):
            connection.tpc_begin("one")
