"""What the two witnesses know, and what they do not."""

import contextlib
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest import mock

import psycopg
import psycopg.sql
import psycopg2
import psycopg2.sql
import transaction
import zope.event

import zreconnect
from zreconnect import (
    CommitOutcomeUnknown,
    ConnectionDescriptor,
    DisconnectionError,
    Ledger,
    ReconnectingConnection,
    RetryPolicy,
    XidWitness,
    ledger,
    witness,
)
from zreconnect.drivers.psycopg2 import driver
from zreconnect.events import ConnectionLost, HistoryChanged
from zreconnect.siblings import has_written
from zreconnect.tests.base import (
    DatabaseTestCase,
    is_evident,
    leave_in_doubt,
    policy_of,
    wait_until,
)


class WitnessTestCase(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()

    def insert(self, connection, name="one"):
        # Along with BEGIN psycopg2 has no answer to what the witness asks.
        if connection.state == "idle":
            connection.begin()
        connection.cursor().execute("INSERT INTO item VALUES (%s)", (name,))

    def lose_answer_to_commit(self, connection, meanwhile=lambda: None):
        """Commit; the line is cut when the server has committed, and ``meanwhile`` is done."""
        self.forward.silence("to_client")

        def cut():
            try:
                wait_until(self.names)
                meanwhile()
            finally:
                self.forward.drop()
                self.forward.resume()

        thread = threading.Thread(target=cut)
        thread.start()
        try:
            connection.commit()
        finally:
            thread.join()


class BothTests(WitnessTestCase):
    def connections(self, **keywords):
        for each in (XidWitness(), Ledger()):
            with self.subTest(witness=each):
                yield self.connect(witness=each, **keywords)
                self.query("DELETE FROM item")

    def test_the_orphan_of_a_silent_line_is_ended(self):
        for connection in self.connections():
            self.insert(connection)
            orphan = connection.get_backend_pid()
            self.forward.silence("to_server")
            threading.Timer(0.05, lambda: (self.forward.drop(), self.forward.resume())).start()
            with self.assertRaisesRegex(DisconnectionError, "nothing of it is committed"):
                connection.commit()
            self.assertNotIn(orphan, self.sessions())
            connection.rollback()
            self.assertEqual(self.names(), [])

    def test_the_orphan_of_a_lost_transaction_is_ended_before_the_work_runs_again(self):
        for connection in self.connections():
            self.insert(connection)
            orphan = connection.get_backend_pid()
            self.server.suspend_backend(orphan)
            self.forward.drop()
            resume = threading.Timer(0.3, self.server.resume_backend, [orphan])
            resume.start()
            connection.rollback()

            def work(connection=connection, orphan=orphan):
                self.assertNotIn(orphan, self.sessions())
                self.insert(connection)

            connection.run(work)
            resume.join()
            self.assertEqual(self.names(), ["one"])

    def chained(self, **keywords):
        """A connection whose transaction a statement has ended, and begun another one."""
        for module in (psycopg2, psycopg):
            self.driver, composed = module.__name__, module.sql.SQL("{}; START TRANSACTION")
            ends = composed.format(module.sql.SQL("END"))
            for statement in ("COMMIT AND CHAIN", "ROLLBACK; BEGIN", ends):
                for connection in self.connections(**keywords):
                    with self.subTest(self.driver, statement=statement):
                        self.insert(connection, "first")
                        connection.execute(statement)
                        self.insert(connection, "second")
                        yield connection
                        connection.rollback()
                        connection.close()

    def test_what_is_known_of_a_transaction_says_nothing_of_the_one_that_is_chained_to_it(self):
        for direction in ("to_server", "to_client"):
            for connection in self.chained():
                with self.subTest(direction):
                    self.forward.cut(direction, 0)
                    self.assertRaises(CommitOutcomeUnknown, connection.commit)

    def test_a_statement_that_chains_has_committed_something(self):
        for connection in self.chained():
            self.forward.drop()
            with self.assertRaises(CommitOutcomeUnknown):
                self.insert(connection)

    def test_a_conflict_after_a_commit_in_the_same_string_has_nothing_run_again(self):
        for self.driver in ("psycopg2", "psycopg"):
            connection = self.connect()

            def work(connection=connection):
                self.insert(connection)
                connection.execute("COMMIT; DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")

            with self.assertRaises(connection.OperationalError):
                connection.run(work)
            self.assertEqual(self.names(), ["one"])
            self.query("DELETE FROM item")

    def test_statements_that_chain(self):
        for statement in (
            "commit and chain",
            b"/* why */ ROLLBACK WORK AND CHAIN;",
            "SELECT ';'; -- END\nABORT /* */ ; BEGIN; SELECT 1",
            "PREPARE TRANSACTION 'one'; START TRANSACTION",
            "COMMIT; SELECT 1",
            "SELECT E'\\'; '; COMMIT; SELECT 1; BEGIN",
        ):
            self.assertTrue(driver.chains(statement), statement)
        for statement in (
            "COMMIT",
            "SELECT 1; COMMIT AND NO CHAIN ; --",
            "PREPARE transactions AS SELECT 1; SELECT 1",
            "ROLLBACK TO SAVEPOINT a; BEGIN",
            "SELECT '; COMMIT AND CHAIN', \"; END; BEGIN\"",
            "DO $a$ BEGIN PERFORM 1; END; BEGIN $a$",
            "/* ; COMMIT */ SELECT 1; BEGIN -- AND CHAIN",
            b"SELECT 1",
            1,
        ):
            self.assertFalse(driver.chains(statement), statement)

    def test_a_server_that_does_not_come_back_leaves_it_unknown(self):
        for connection in self.connections():
            connection.run(lambda: None)
            self.insert(connection)
            process = connection.get_backend_pid()
            with (
                policy_of(connection, timeout=0.2),
                self.assertRaises(CommitOutcomeUnknown) as unknown,
            ):
                self.lose_answer_to_commit(connection, self.forward.refuse)
            self.assertIsInstance(unknown.exception.__cause__, zreconnect.ReconnectTimeout)
            self.assertIn(unknown.exception.evidence, str(unknown.exception))
            self.check_evidence(unknown.exception.evidence, process)
            self.forward.accept()
            connection.rollback()
            self.assertEqual(self.names(), ["one"])

    def check_evidence(self, evidence, process):
        """Who does what it says finds out that the transaction of that process was committed."""
        self.assertIn(f"in the server process {process} ", evidence)
        if ledger := re.search(r"(SELECT number .*) gives (\d+);", evidence):
            self.assertEqual(self.query(ledger[1]), [(int(ledger[2]),)])
        else:
            by_id = re.search(r"SELECT pg_xact_status\('\d+'\)", evidence)
            self.assertEqual(self.query(by_id[0]), [("committed",)])

    def test_a_readonly_transaction_may_always_run_again(self):
        for connection in self.connections():
            connection.readonly = True
            connection.cursor().execute("SELECT 1")
            self.forward.drop()
            with self.assertRaises(DisconnectionError):
                connection.commit()

    def test_what_was_found_out_stays_true_when_the_line_is_cut_again(self):
        for connection in self.connections():
            connection.run(lambda: None)
            self.insert(connection)
            observer = connection.work.link.observer
            asked = []

            class Interrupted(type(observer)):
                def record_session(observer, raw, settings, asked=asked):
                    asked.append(raw)
                    if len(asked) == 1:
                        self.forward.drop()
                    super().record_session(raw, settings)

            observer.__class__ = Interrupted
            self.lose_answer_to_commit(connection)
            self.assertEqual(len(asked), 2)
            self.assertEqual((connection.state, self.names()), ("idle", ["one"]))

    def test_a_forked_child_ends_nothing_of_the_parents(self):
        for connection in self.connections():
            self.insert(connection)
            pid = os.fork()
            if pid == 0:
                status = 1
                with contextlib.suppress(BaseException):
                    connection.rollback()
                    connection.begin()
                    connection.rollback()
                    status = 0
                os._exit(status)
            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
            connection.commit()
            self.assertEqual(self.names(), ["one"])


class StandbyTests(WitnessTestCase):
    """A synchronous standby is not there, so that COMMIT waits."""

    def setUp(self):
        super().setUp()
        self.addCleanup(self.set_standby, "")

    def set_standby(self, name):
        self.query(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'")
        self.query("SELECT pg_reload_conf()")
        wait_until(lambda: self.query("SHOW synchronous_standby_names") == [(name,)])
        # It is the checkpointer that makes sessions wait, or no more, when it has read the setting.
        self.query("CHECKPOINT")

    def waiting(self):
        rows = self.query("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
        return {pid for (pid,) in rows}

    def commit(self, connection, meanwhile):
        """Commit in a thread of its own; what it raised, or None. meanwhile: given a function that
        cuts the line when a server process waits, and returns the process."""
        self.raised = raised = []

        def work():
            try:
                connection.begin()
                self.insert(connection)
                connection.commit()
                raised.append(None)
            except Exception as error:
                raised.append(error)

        seen = set()

        def lose():
            wait_until(lambda: self.waiting() - seen or raised)
            self.assertEqual(raised, [])
            (pid,) = self.waiting() - seen
            seen.add(pid)
            self.forward.drop()
            return pid

        connection.run(lambda: None)
        self.set_standby("nobody")
        thread = threading.Thread(target=work)
        thread.start()
        try:
            meanwhile(lose)
        finally:
            self.set_standby("")
            thread.join()
        return raised[0]

    def test_committed_is_believed_when_it_is_there_too(self):
        for each in (XidWitness(), XidWitness(at_commit=True)):
            connection = self.connect(witness=each)

            def meanwhile(lose):
                orphan, looking = lose(), lose()
                # Who looks again does not leave the others waiting.
                wait_until(lambda: self.waiting() and not self.waiting() & {orphan, looking})
                self.assertEqual(self.raised, [])

            self.assertIsNone(self.commit(connection, meanwhile))
            self.assertEqual(self.names(), ["one"])
            self.query("DELETE FROM item")

    def test_the_ledger_waits_by_itself(self):
        connection = self.connect(witness=Ledger())

        def meanwhile(lose):
            orphan = lose()
            wait_until(lambda: self.waiting() and orphan not in self.waiting())
            self.assertEqual(self.raised, [])

        self.assertIsNone(self.commit(connection, meanwhile))
        self.assertEqual(self.names(), ["one"])

    def test_it_is_unknown_when_the_time_is_up(self):
        connection = self.connect(response_timeout=1.0, policy=RetryPolicy(timeout=1.0))
        raised = self.commit(connection, lambda lose: wait_until(lambda: self.raised))
        self.assertIsInstance(raised, CommitOutcomeUnknown)

    def test_who_does_not_wait_at_commit_does_not_wait_afterwards(self):
        connection = self.connect(
            on_connect=lambda raw: raw.cursor().execute("SET synchronous_commit = local")
        )
        connection.run(lambda: None)
        self.set_standby("nobody")
        self.insert(connection)
        self.lose_answer_to_commit(connection)
        self.assertEqual((connection.state, self.names()), ("idle", ["one"]))


class NotificationTests(WitnessTestCase):
    """A notification has no transaction id before COMMIT."""

    def setUp(self):
        super().setUp()
        self.query(
            "CREATE FUNCTION tell() RETURNS void LANGUAGE plpgsql"
            " AS $$ BEGIN PERFORM pg_notify('pay', '10'); END $$"
        )
        self.listener = psycopg2.connect(self.server.dsn(dbname=self.dbname))
        self.addCleanup(self.listener.close)
        self.listener.autocommit = True
        self.listener.cursor().execute("LISTEN pay")

    def run_and_lose_answer(self, connection, statement, then=lambda cursor: None):
        """Run a unit of work, the answer to whose first COMMIT is lost. What became of it, and how
        often something was delivered."""
        driver = connection.work.link.driver
        commit, losses = driver.commit, [True]

        def lose(raw, rider=""):
            if losses:
                losses.pop()
                self.forward.cut("to_client", 0)
            commit(raw, rider)

        def work():
            with connection.cursor() as cursor:
                if statement:
                    cursor.execute(statement)
                then(cursor)

        with mock.patch.object(driver, "commit", lose):
            try:
                connection.run(work)
                outcome = "committed"
            except CommitOutcomeUnknown:
                outcome = "unknown"
        connection.rollback()
        self.assertEqual(losses, [])
        self.listener.cursor().execute("SELECT 1")
        delivered = len(self.listener.notifies)
        self.listener.notifies.clear()
        return outcome, delivered

    def test_it_is_delivered_once(self):
        for self.driver in ("psycopg2", "psycopg"):
            for statement in (
                "SELECT pg_notify('pay', '10')",
                "NOTIFY pay, '10'",
                "SELECT tell()",
                "DO $$ BEGIN PERFORM tell(); END $$",
                "NOTIFY pay, '10'; SELECT 1",
                "SELECT 1; NOTIFY pay, '10'",
            ):
                for each, readonly, outcome in [
                    (XidWitness(at_commit=True), False, "committed"),
                    (XidWitness(at_commit=True), True, "committed"),
                    (XidWitness(), False, "committed"),
                    (XidWitness(), True, "committed"),
                    (Ledger(), False, "committed"),
                    (Ledger(), True, "unknown"),
                    (None, True, "unknown"),
                ]:
                    with self.subTest(driver=self.driver, statement=statement, witness=each):
                        connection = self.connect(witness=each)
                        connection.readonly = readonly
                        connection.run(connection.cursor().execute, "SELECT 1")
                        self.assertEqual(
                            self.run_and_lose_answer(connection, statement), (outcome, 1)
                        )
                        connection.close()

    def test_a_statement_that_the_modules_compose_is_delivered_once(self):
        for self.driver, module in (("psycopg2", psycopg2.sql), ("psycopg", psycopg.sql)):
            with self.subTest(self.driver):
                connection = self.connect(witness=XidWitness(at_commit=True))
                connection.run(connection.cursor().execute, "SELECT 1")
                statement = module.SQL("SELECT pg_notify('pay', '10')")
                self.assertEqual(self.run_and_lose_answer(connection, statement), ("committed", 1))

    def test_what_psycopg_executes_later_is_delivered_once(self):
        self.driver = "psycopg"

        def copied(cursor):
            with cursor.copy("COPY (SELECT pg_notify('pay', '10')) TO STDOUT") as copy:
                list(copy)

        def streamed(cursor):
            list(cursor.stream("SELECT pg_notify('pay', '10')"))

        for notify in (copied, streamed):
            for readonly in (False, True):
                with self.subTest(notify, readonly=readonly):
                    connection = self.connect(witness=XidWitness(at_commit=True))
                    connection.readonly = readonly
                    connection.run(connection.cursor().execute, "SELECT 1")
                    outcome = self.run_and_lose_answer(connection, "SELECT 1", notify)
                    self.assertEqual(outcome, ("committed", 1))
                    connection.close()

    def test_what_was_executed_though_its_call_raised_is_delivered_once(self):
        self.driver = "psycopg"

        def fail(cursor):
            raise LookupError

        def notified(cursor):
            other = cursor.connection.cursor()
            other.row_factory = fail
            with self.assertRaises(LookupError):
                other.execute("SELECT pg_notify('pay', '10')")

        for statement in ("", "SELECT 1"):
            for readonly in (False, True):
                with self.subTest(statement, readonly=readonly):
                    connection = self.connect(witness=XidWitness(at_commit=True))
                    connection.readonly = readonly
                    connection.run(connection.cursor().execute, "SELECT 1")
                    outcome = self.run_and_lose_answer(connection, statement, notified)
                    self.assertEqual(outcome, ("committed", 1))
                    connection.close()

    def test_the_evidence_of_a_read_only_transaction_does_not_lead_to_the_ledger(self):
        connection = self.connect(witness=Ledger())
        connection.readonly = True
        connection.begin()
        self.assertIn("not in the ledger", connection.work.link.observer.describe())

    def test_a_sibling_that_has_notified_has_written(self):
        connection = self.connect(witness=XidWitness(at_commit=True))
        connection.cursor().execute("SELECT 1")
        self.assertFalse(has_written(connection.guard))
        connection.cursor().execute("NOTIFY pay")
        self.assertTrue(has_written(connection.guard))


class FirstStatementTests(WitnessTestCase):
    """What has to come before any query of its transaction, also before the witness's."""

    STATEMENTS = (
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "/* a comment */ -- and\n set local transaction_isolation = 'serializable'",
        "SET SESSION transaction_isolation TO serializable",
        "BEGIN ISOLATION LEVEL SERIALIZABLE",
        "start transaction read write, isolation level serializable",
        b"SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    )

    def connections(self, *witnesses):
        for self.driver, self.sql in (("psycopg2", psycopg2.sql), ("psycopg", psycopg.sql)):
            for each in witnesses or (XidWitness(), XidWitness(at_commit=True), Ledger(), None):
                with self.subTest(driver=self.driver, witness=each):
                    yield self.connect(witness=each)
                    self.query("DELETE FROM item")

    def composed(self):
        level = self.sql.SQL("SERIALIZABLE")
        return self.sql.SQL("SET TRANSACTION ISOLATION LEVEL {}").format(level)

    def test_it_is_heeded(self):
        for connection in self.connections():
            for statement in (*self.STATEMENTS, self.composed()):
                with self.subTest(statement=statement), connection.cursor() as cursor:
                    cursor.execute(statement)
                    cursor.execute("SHOW transaction_isolation")
                    self.assertEqual(cursor.fetchall(), [("serializable",)])
                    connection.commit()

    def test_what_it_is_not(self):
        for connection in self.connections(None):
            name = self.sql.Identifier("SET TRANSACTION")
            for statement in (
                "SET LOCAL lock_timeout = 1",
                "BEGIN",
                "SELECT 'SET TRANSACTION'",
                name,
                self.sql.Composed([name]),
                self.sql.Composed([]),
                None,
            ):
                with self.subTest(statement=statement):
                    self.assertFalse(connection.work.link.driver.sets_modes(statement))

    def test_a_lost_commit_of_its_transaction_is_looked_up(self):
        for connection in self.connections(XidWitness(), XidWitness(at_commit=True), Ledger()):
            for _ in range(2):
                connection.cursor().execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
                self.insert(connection)
                self.lose_answer_to_last_request(connection)
                self.assertEqual((connection.state, self.names()), ("idle", ["one"]))
                self.query("DELETE FROM item")

    def lose_answer_to_last_request(self, connection):
        commit, losses = connection.work.link.driver.commit, [True]

        def lose(raw, rider=""):
            if losses:
                losses.pop()
                self.forward.cut("to_client", 0)
            commit(raw, rider)

        with mock.patch.object(connection.work.link.driver, "commit", lose):
            connection.commit()
        self.assertEqual(losses, [])

    def test_a_commit_that_was_ended_before_it_was_sent_and_comes_again(self):
        """A time limit strikes when the witness asks, and the transaction goes on."""
        for connection in self.connections(XidWitness(), XidWitness(at_commit=True), Ledger()):
            with self.subTest(connection.work.link.options.witness):
                connection.cursor().execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
                self.insert(connection)
                limit = mock.Mock(side_effect=TimeoutError)
                with (
                    mock.patch.object(connection.work.link.driver, "query", limit),
                    self.assertRaises(TimeoutError),
                ):
                    connection.commit()
                self.assertEqual((connection.state, limit.call_count), ("active", 1))
                self.insert(connection, "two")
                self.lose_answer_to_last_request(connection)
                self.assertEqual((connection.state, self.names()), ("idle", ["one", "two"]))
                self.query("DELETE FROM item")

    def test_a_ledger_that_somebody_has_locked(self):
        for connection in self.connections(Ledger()):
            cursor = connection.cursor()
            connection.run(lambda: None)
            cursor.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            cursor.execute("SAVEPOINT before")
            cursor.execute("SET LOCAL statement_timeout = '100ms'")
            dsn = self.server.dsn(dbname=self.dbname)
            with contextlib.closing(psycopg2.connect(dsn)) as holder:
                holder.cursor().execute("LOCK TABLE zreconnect_ledger")
                with self.assertRaises(connection.OperationalError):
                    connection.commit()
            self.assertEqual(connection.state, "active")
            cursor.execute("ROLLBACK TO SAVEPOINT before")
            self.insert(connection)
            self.lose_answer_to_last_request(connection)
            self.assertEqual((connection.state, self.names()), ("idle", ["one"]))
            self.query("DELETE FROM item")

    def test_what_is_lost_before_commit_may_run_again(self):
        for connection in self.connections(XidWitness(), Ledger()):
            connection.cursor().execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            self.insert(connection)
            self.forward.drop()
            with self.assertRaises(DisconnectionError):
                connection.commit()
            connection.rollback()
            self.assertEqual(self.names(), [])

    def test_read_only(self):
        for connection in self.connections():
            connection.cursor().execute("SET TRANSACTION READ ONLY")
            with self.assertRaises(connection.Error):
                self.insert(connection)
            connection.rollback()
            connection.cursor().execute("SET TRANSACTION READ ONLY")
            connection.commit()

    def test_one_whose_outcome_is_not_in_the_ledger_is_unknown(self):
        for connection in self.connections(Ledger()):
            connection.cursor().execute("SET TRANSACTION READ ONLY")
            with self.assertRaisesRegex(CommitOutcomeUnknown, "not in the ledger"):
                self.lose_answer_to_last_request(connection)
            connection.rollback()

    def test_after_a_failed_statement_nothing_is_committed(self):
        for connection in self.connections():
            connection.cursor().execute("SET TRANSACTION READ WRITE")
            with self.assertRaises(connection.Error):
                connection.cursor().execute("SELECT 1/0")
            with self.assertRaisesRegex(connection.InternalError, "Nothing was committed"):
                connection.commit()

    def test_the_next_transaction_is_witnessed_from_its_begin(self):
        for connection in self.connections(XidWitness(), Ledger()):
            cursor = connection.cursor()

            def use(first, connection=connection, cursor=cursor):
                cursor.execute(first)
                connection.commit()

            use("SET TRANSACTION READ WRITE")
            self.assertEqual(self.round_trips(lambda use=use: use("SHOW search_path")), 3)
            use("SET TRANSACTION READ WRITE")
            connection.begin()
            self.assertEqual(self.round_trips(connection.commit), 1)


class JoinedTests(WitnessTestCase):
    def test_the_transaction_goes_on_when_the_commit_had_arrived(self):
        descriptor = ConnectionDescriptor(self.dsn)
        self.addCleanup(descriptor.close)
        connection = descriptor.connection()
        connection.cursor().execute("SELECT 1")
        transaction.abort()
        self.insert(connection)
        self.lose_answer_to_commit(transaction)
        self.assertEqual((connection.state, self.names()), ("idle", ["one"]))

    def test_without_a_witness_nothing_is_taken_down(self):
        connection = self.connect(witness=None)
        self.insert(connection)
        with self.events() as seen, self.assertRaises(CommitOutcomeUnknown) as unknown:
            self.lose_answer_to_commit(connection)
        names = [type(event).__name__ for event in seen]
        self.assertEqual(names, ["ConnectionLost", "CommitLookedUp"])
        self.assertEqual(seen[1].outcome, "unknown")
        self.assertIn("no witness", unknown.exception.evidence)
        self.assertIs(witness.NoObserver(driver).outcome(None), witness.Outcome.UNKNOWN)
        connection.rollback()
        connection.run(lambda: None)
        connection.close()


class XidTests(WitnessTestCase):
    def test_the_id_of_the_transaction_is_known(self):
        connection = self.connect()
        connection.begin()
        cursor = connection.cursor()
        cursor.execute("SELECT pg_current_xact_id()")
        ((number,),) = cursor.fetchall()
        self.assertEqual(connection.work.link.observer.xid, int(number))

    def test_after_a_crash_a_commit_is_not_proven(self):
        connection = self.connect()
        self.insert(connection)

        def crash():
            self.server.kill_all()
            self.server.start()

        with self.assertRaises(CommitOutcomeUnknown) as unknown:
            self.lose_answer_to_commit(connection, crash)
        self.assertIn("pg_xact_status", str(unknown.exception))
        connection.rollback()

    def test_without_the_right_to_know_the_history_it_is_unknown(self):
        self.query("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
        self.addCleanup(self.query, "GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC")
        self.query(f"CREATE ROLE clerk LOGIN PASSWORD '{self.server.password}'")
        self.addCleanup(self.query, "DROP ROLE clerk")
        self.query("GRANT ALL ON item TO clerk")
        self.addCleanup(self.query, "DROP OWNED BY clerk")
        connection = self.connect(self.layer.dsn(user="clerk", dbname=self.dbname))
        self.insert(connection)
        with self.assertRaises(CommitOutcomeUnknown):
            self.lose_answer_to_commit(connection)
        connection.close()
        wait_until(lambda: not self.sessions())

    def test_on_a_server_that_has_no_such_ids_it_is_unknown(self):
        with mock.patch.object(type(driver), "has_transaction_ids", return_value=False):
            for at_commit in (False, True):
                connection = self.connect(witness=XidWitness(at_commit))
                self.insert(connection)
                with self.assertRaises(CommitOutcomeUnknown) as unknown:
                    self.lose_answer_to_commit(connection)
                self.assertIn("no transaction id", unknown.exception.evidence)
                connection.rollback()
                self.query("DELETE FROM item")

    def test_an_id_that_the_server_does_not_know_was_not_committed(self):
        connection = self.connect()
        self.insert(connection)
        connection.work.link.observer.xid += 1000
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            connection.commit()

    def test_a_transaction_that_does_not_end_is_unknown(self):
        holder = psycopg2.connect(self.server.dsn(dbname=self.dbname))
        self.addCleanup(holder.close)
        with holder.cursor() as cursor:
            cursor.execute("SELECT pg_current_xact_id()")
            (xid,) = cursor.fetchone()
        connection = self.connect()
        self.insert(connection)
        connection.work.link.observer.xid = int(xid)
        self.forward.drop()
        with self.assertRaises(CommitOutcomeUnknown):
            connection.commit()

    def test_another_system_knows_nothing_of_it(self):
        connection = self.connect()
        self.insert(connection)
        observer = connection.work.link.observer
        history = replace(observer.history, system_identifier=0)
        observer._session = replace(observer._session, history=history)
        self.forward.drop()
        with self.assertRaises(CommitOutcomeUnknown):
            connection.commit()


class XidAtCommitTests(WitnessTestCase):
    def setUp(self):
        super().setUp()
        self.query(
            "CREATE FUNCTION add_item(text) RETURNS text LANGUAGE sql"
            " AS 'INSERT INTO item VALUES ($1) RETURNING name'"
        )
        self.query("CREATE VIEW adding AS SELECT add_item('one')")
        self.connection = self.connect(witness=XidWitness(at_commit=True))
        self.connection.run(lambda: None)

    def execute(self, statement, name=None):
        cursor = self.connection.cursor(name)
        cursor.execute(statement)
        if cursor.description:
            cursor.fetchall()
        cursor.close()

    def trips(self, statement, name=None):
        return self.round_trips(lambda: self.connection.run(self.execute, statement, name))

    def test_reading_costs_no_round_trip_and_writing_one(self):
        for statement in ("SELECT 1", "SHOW search_path", "SELECT count(*) FROM item"):
            self.assertEqual(self.trips(statement), 3)
        for statement in (
            "INSERT INTO item VALUES ('one')",
            "UPDATE item SET name = 'two'",
            "DELETE FROM item WHERE name = 'three'",
            "CREATE TABLE item2 ()",
        ):
            self.assertEqual(self.trips(statement), 4)
        self.assertEqual(self.trips("SELECT 1"), 3)

    def test_reading_uses_up_no_transaction_id(self):
        next_id = "SELECT pg_snapshot_xmax(pg_current_snapshot())"

        def uses_none():
            before = self.query(next_id)
            for _ in range(3):
                self.connection.run(self.execute, "SELECT count(*) FROM item")
            return self.query(next_id) == before

        # Autovacuum uses one up from time to time.
        wait_until(uses_none)

    def test_a_select_that_calls_a_function_costs_one(self):
        self.assertEqual(self.trips("SELECT add_item('one')"), 4)
        self.assertEqual(self.trips("SELECT 1"), 3)

    def test_a_select_that_writes_unseen_is_found_out_once(self):
        self.assertEqual(self.trips("SELECT * FROM adding"), 5)
        self.query("DELETE FROM item")
        self.assertEqual(self.trips("SELECT * FROM adding"), 4)
        self.assertEqual(self.trips("SELECT 1"), 4)
        self.assertEqual(self.names(), ["one"])

    def test_a_server_side_cursor_that_only_reads(self):
        # BEGIN, psycopg2's own BEGIN, DECLARE, CLOSE, the look at the id, COMMIT.
        self.assertEqual(self.trips("SELECT 1", name="numbers"), 6)

    def test_lost_answers_of_transactions_that_wrote(self):
        for number, statement in enumerate(
            ["INSERT INTO item VALUES ('one')", "SELECT * FROM adding"], start=1
        ):
            with self.subTest(statement):
                self.execute(statement)
                with self.events() as seen:
                    self.lose_answer_to_last_request()
                outcomes = [getattr(event, "outcome", None) for event in seen]
                self.assertIn("committed", outcomes)
                self.assertEqual((self.connection.state, self.names()), ("idle", ["one"]))
                self.query("DELETE FROM item")
                self.connection.work.link.observer._reads_write = number == 1

    def lose_answer_to_last_request(self):
        """Commit; the line is cut when the server has committed."""
        observer = self.connection.work.link.observer
        commit = observer._driver.commit

        def commit_without_answer(raw, rider=""):
            if rider:
                commit(raw, rider)
            if cutter.ident is None:
                self.forward.silence("to_client")
                cutter.start()
            commit(raw)

        def cut():
            wait_until(self.names)
            self.forward.drop()
            self.forward.resume()

        cutter = threading.Thread(target=cut)
        with mock.patch.object(observer._driver, "commit", commit_without_answer):
            self.connection.commit()
        cutter.join()

    def test_a_lost_commit_of_one_that_only_read_is_not_looked_up(self):
        self.execute("SELECT count(*) FROM item")
        self.forward.drop()
        self.forward.refuse()
        with self.events() as seen, self.assertRaises(DisconnectionError):
            self.connection.commit()
        self.assertEqual([type(event).__name__ for event in seen], ["ConnectionLost"])

    def test_a_connection_lost_while_the_id_is_asked_for_has_committed_nothing(self):
        self.insert(self.connection)
        self.forward.drop()
        self.forward.refuse()
        with self.assertRaises(DisconnectionError):
            self.connection.commit()
        self.assertEqual(self.connection.state, "doomed")

    def test_a_failed_transaction_is_not_committed(self):
        with self.assertRaises(self.module.errors.DivisionByZero):
            self.execute("SELECT 1/0")
        with self.assertRaises(self.module.errors.InFailedSqlTransaction):
            self.connection.commit()
        self.assertEqual(self.connection.state, "idle")

    def test_a_readonly_transaction_asks_nothing(self):
        self.connection.readonly = True
        self.assertEqual(self.trips("SELECT 1"), 3)
        # It may notify.
        self.assertEqual(self.trips("DO $$ BEGIN END $$"), 4)

    def test_arguments(self):
        self.assertEqual(repr(XidWitness(at_commit=True)), "XidWitness(at_commit=True)")
        self.assertEqual(
            {XidWitness(), XidWitness(at_commit=True)}, {*map(XidWitness, (0 > 1, 1 > 0))}
        )
        self.assertNotEqual(XidWitness(), XidWitness(at_commit=True))
        self.assertNotEqual(XidWitness(), Ledger())
        with self.assertRaisesRegex(TypeError, "at_commit"):
            XidWitness("yes")


class LedgerTests(WitnessTestCase):
    def test_transactions_of_several_connections_are_in_nobodys_way(self):
        self.query("CREATE TABLE item2 (name text)")
        tables = ("item", "item2")
        connections = [self.connect(witness=Ledger()) for _ in tables]
        for connection in connections:
            connection.isolation_level = "SERIALIZABLE"
            connection.run(lambda: None)
        # As autovacuum does: a small table is scanned from its first row to the last.
        self.query("VACUUM ANALYZE")
        for number in range(3):
            for connection, table in zip(connections, tables, strict=True):
                connection.cursor().execute(f"INSERT INTO {table} VALUES ('{number}')")
            for connection in connections:
                connection.commit()
        self.assertEqual(self.names(), ["0", "1", "2"])

    def test_sessions_that_are_serializable_by_default(self):
        connection = self.connect(
            witness=Ledger(),
            on_connect=lambda raw: raw.cursor().execute(
                "SET default_transaction_isolation TO 'serializable'"
            ),
        )
        self.insert(connection)
        orphan = connection.get_backend_pid()
        with mock.patch.object(driver, "end_session", return_value=False):
            self.server.suspend_backend(orphan)
            resume = threading.Timer(0.3, self.server.resume_backend, [orphan])
            resume.start()
            # COMMIT arrives, and is executed while it is looked up.
            threading.Timer(0.1, self.forward.drop).start()
            connection.commit()
            resume.join()
        self.assertEqual(self.names(), ["one"])

    def rows(self):
        return self.query("SELECT id::text, number FROM zreconnect_ledger ORDER BY id")

    def test_after_a_crash_it_still_decides(self):
        connection = self.connect(witness=Ledger())
        self.insert(connection)

        def crash():
            self.server.kill_all()
            self.server.start()

        self.lose_answer_to_commit(connection, crash)
        self.assertEqual((connection.state, self.names()), ("idle", ["one"]))

    def test_the_session_that_looks_it_up_keeps_its_limit_for_locks(self):
        for setting, expected in [("lock_timeout = DEFAULT", "0"), ("lock_timeout = '3s'", "3s")]:

            def set_up(raw, setting=setting):
                raw.cursor().execute(f"SET {setting}")

            connection = self.connect(witness=Ledger(), on_connect=set_up)
            self.insert(connection, expected)
            self.lose_answer_to_commit(connection)
            cursor = connection.cursor()
            cursor.execute("SHOW lock_timeout")
            self.assertEqual(cursor.fetchone(), (expected,))
            connection.rollback()

    def test_it_is_found_whatever_the_path_became(self):
        self.query("CREATE SCHEMA tenant")
        self.addCleanup(self.query, "DROP SCHEMA tenant CASCADE")
        with self.connect(
            witness=Ledger(),
            on_connect=lambda raw: raw.cursor().execute("SET search_path TO tenant"),
        ) as tenant:
            tenant.execute("SELECT 1")
        connection = self.connect(witness=Ledger())
        connection.run(lambda: connection.execute("SET search_path TO tenant, public"))
        self.insert(connection)
        self.lose_answer_to_commit(connection)
        self.assertEqual((connection.state, self.names()), ("idle", ["one"]))
        self.assertEqual([number for _, number in self.rows()], [2])

    def test_each_connection_has_a_row_until_it_is_closed(self):
        first, second = self.connect(witness=Ledger()), self.connect(witness=Ledger())
        for connection in (first, second, first):
            connection.run(lambda: None)
        self.assertEqual(sorted(number for _, number in self.rows()), [1, 2])
        self.forward.drop()
        first.run(lambda: None)
        self.assertEqual(len(self.rows()), 2)
        first.close()
        self.assertEqual([number for _, number in self.rows()], [1])
        second.begin()
        second.close()
        self.assertEqual(len(self.rows()), 1)

    def test_rows_of_the_dead_are_removed_when_they_are_old(self):
        connection = self.connect(witness=Ledger())
        connection.run(lambda: None)
        for age in ("30 days 1 hour", "29 days 23 hours"):
            self.query(
                "INSERT INTO zreconnect_ledger (id, used)"
                " VALUES (gen_random_uuid(), now() - %s::interval)",
                age,
            )
        self.connect(witness=Ledger()).run(lambda: None)
        ages = self.query("SELECT extract(day FROM now() - used) FROM zreconnect_ledger ORDER BY 1")
        self.assertEqual([int(days) for (days,) in ages], [0, 0, 29])

    def test_a_row_that_was_removed_because_it_was_old_is_made_again(self):
        connection = self.connect(witness=Ledger())
        connection.run(lambda: None)
        self.query("UPDATE zreconnect_ledger SET used = now() - interval '31 days'")
        self.connect(witness=Ledger()).run(lambda: None)
        self.assertEqual(len(self.rows()), 1)
        connection.run(lambda: None)
        self.assertEqual(len(self.rows()), 2)

    def test_a_row_that_somebody_removed_is_made_again(self):
        connection = self.connect(witness=Ledger())
        connection.run(lambda: None)
        self.query("DELETE FROM zreconnect_ledger")
        self.insert(connection)
        self.lose_answer_to_commit(connection)
        self.assertEqual((connection.state, self.names()), ("idle", ["one"]))

    def test_without_its_row_the_outcome_is_unknown(self):
        for goes_on in (False, True):
            connection = self.connect(witness=Ledger())
            self.insert(connection)
            with self.assertRaises(CommitOutcomeUnknown) as unknown:
                self.lose_answer_to_commit(
                    connection, lambda: self.query("DELETE FROM zreconnect_ledger")
                )
            self.assertIn("zreconnect_ledger", unknown.exception.evidence)
            self.assertIn("negative number, says nothing", unknown.exception.evidence)
            connection.rollback()
            if goes_on:
                connection.run(self.insert, connection, "two")
            connection.close()
            self.assertEqual(self.query("SELECT number FROM zreconnect_ledger"), [(-1,)])
            self.query("DELETE FROM item")

    def test_what_is_looked_up_again_is_the_same_commit(self):
        connection = self.connect(witness=Ledger(), policy=RetryPolicy(timeout=0.2))
        self.insert(connection, "before")
        connection.commit()
        self.insert(connection, "in doubt")
        told = []

        def roll_back(event):
            if isinstance(event, ConnectionLost):
                try:
                    connection.rollback()
                except CommitOutcomeUnknown as unknown:
                    told.append(unknown)
                self.forward.accept()

        zope.event.subscribers.append(roll_back)
        self.addCleanup(zope.event.subscribers.remove, roll_back)
        self.forward.cut_at_commit(then=self.forward.refuse)
        # It is found, because the server is there again.
        connection.commit()
        connection.run(self.insert, connection, "after")
        (unknown,) = told
        self.assertTrue(is_evident(unknown, self.query))
        self.assertEqual(self.names(), ["after", "before", "in doubt"])

    def test_what_was_acknowledged_before_is_compared_all_the_same(self):
        connection = self.connect(witness=Ledger(), policy=RetryPolicy(timeout=0.2))
        for name in ("one", "two"):
            self.insert(connection, name)
            connection.commit()
        self.insert(connection, "in doubt")
        leave_in_doubt(self, connection, is_committed=False)
        # A session of which nothing is acknowledged, and one that does not get its row.
        connection.begin()
        connection.rollback()
        self.forward.drop()
        alter = f"ALTER DATABASE {self.dbname}"
        self.query(f"{alter} SET default_transaction_read_only TO on")
        with self.assertRaisesRegex(psycopg2.ProgrammingError, "ledger cannot be written"):
            connection.begin()
        elsewhere = "template1"
        self.server.query(f"{alter} RESET default_transaction_read_only", dbname=elsewhere)
        # As a failover would.
        self.query("UPDATE zreconnect_ledger SET number = 1 WHERE number = 2")
        with self.events() as seen:
            connection.begin()
        changes = [each for each in seen if isinstance(each, HistoryChanged)]
        self.assertEqual([each.is_missing for each in changes], [True])

    def test_each_row_that_is_left_in_a_session_stays(self):
        connection = self.connect(witness=Ledger())
        for name in ("one", "two"):
            self.insert(connection, name)
            connection.commit()
            connection.work.link.observer.leave_evidence()
        connection.close()
        numbers = self.query("SELECT number FROM zreconnect_ledger ORDER BY number")
        self.assertEqual(numbers, [(1,), (2,)])

    def test_what_is_not_in_the_ledger_gives_no_row_back(self):
        connection = self.connect(witness=Ledger(), policy=RetryPolicy(timeout=0.2))
        self.insert(connection)
        unknown = leave_in_doubt(self, connection, is_committed=True)
        connection.readonly = True
        connection.begin()
        connection.cursor().execute("NOTIFY item")
        self.assertIn(
            "not in the ledger", leave_in_doubt(self, connection, is_committed=False).evidence
        )
        connection.close()
        self.assertTrue(is_evident(unknown, self.query))

    def test_what_comes_after_a_commit_of_the_programs_is_not_in_the_ledger(self):
        connection = self.connect(witness=Ledger(), policy=RetryPolicy(timeout=0.2))
        self.insert(connection, "first part")
        connection.cursor().execute("COMMIT AND CHAIN")
        self.insert(connection, "second part")
        unknown = leave_in_doubt(self, connection, is_committed=False)
        self.assert_evident_in_part(unknown)

    def assert_evident_in_part(self, unknown):
        """It leads to what came before a COMMIT of the program's, and says so."""
        self.assertIn("what came after it is not in the ledger", unknown.evidence)
        self.assertTrue(is_evident(unknown, self.query))

    def test_a_statement_after_a_commit_of_the_programs_that_is_lost(self):
        for self.driver in ("psycopg2", "psycopg"):
            for statement in ("COMMIT AND CHAIN", "COMMIT; BEGIN"):
                with self.subTest(self.driver, statement=statement):
                    connection = self.connect(witness=Ledger())
                    self.insert(connection, "first part")
                    connection.cursor().execute(statement)
                    self.forward.drop()
                    with self.assertRaises(CommitOutcomeUnknown) as raised:
                        self.insert(connection, "second part")
                    connection.rollback()
                    connection.run(self.insert, connection, "after")
                    self.assert_evident_in_part(raised.exception)
                    connection.close()
                    self.assert_evident_in_part(raised.exception)
                    self.query("DELETE FROM item")

    def test_what_was_not_entered_yet_is_not_called_read_only(self):
        connection = self.connect(witness=Ledger())
        connection.cursor().execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        self.insert(connection)
        self.forward.cut_at_commit()
        with self.assertRaises(CommitOutcomeUnknown) as raised:
            connection.cursor().execute("COMMIT")
        self.assertIn("a statement has ended it", raised.exception.evidence)

    def test_another_threads_close_leaves_the_evidence(self):
        connection = self.connect(witness=Ledger())
        with ThreadPoolExecutor(1) as threads, ThreadPoolExecutor(1) as others:
            threads.submit(self.insert, connection).result()
            self.forward.silence("to_client")
            committing = threads.submit(connection.commit)
            wait_until(self.names)
            # With psycopg2 it waits for the COMMIT.
            others.submit(connection.close)
            wait_until(lambda: connection.state == "closed")
            self.forward.drop()
            with self.assertRaises(CommitOutcomeUnknown) as raised:
                committing.result()
        self.assertIn("Another thread has closed the connection", raised.exception.evidence)
        self.assertTrue(is_evident(raised.exception, self.query))

    def test_what_is_said_to_look_at_stays(self):
        for self.driver in ("psycopg2", "psycopg"):
            for is_committed in (True, False):
                with self.subTest(self.driver, is_committed=is_committed):
                    connection = self.connect(witness=Ledger(), policy=RetryPolicy(timeout=0.2))
                    self.insert(connection, "before")
                    connection.commit()
                    self.insert(connection, "in doubt")
                    unknown = leave_in_doubt(self, connection, is_committed)
                    for name in ("after", "in the end"):
                        connection.run(self.insert, connection, name)
                        self.assertIs(is_evident(unknown, self.query), is_committed)
                    self.forward.cut_at_commit()
                    self.insert(connection, "found")
                    connection.commit()
                    connection.close()
                    self.assertIs(is_evident(unknown, self.query), is_committed)
                    self.assertEqual("in doubt" in self.names(), is_committed)
                    self.assertEqual(self.query("SELECT count(*) FROM zreconnect_ledger"), [(1,)])
                    self.query("DELETE FROM zreconnect_ledger")
                    self.query("DELETE FROM item")

    def test_without_its_table_the_outcome_is_unknown_and_the_servers_error_says_why(self):
        connection = self.connect(witness=Ledger())
        self.insert(connection)
        with self.assertRaises(CommitOutcomeUnknown) as unknown:
            self.lose_answer_to_commit(
                connection, lambda: self.query("DROP TABLE zreconnect_ledger")
            )
        self.assertIsInstance(unknown.exception.__cause__, psycopg2.errors.UndefinedTable)
        connection.rollback()
        self.assertEqual(self.names(), ["one"])

    def test_a_row_that_stays_locked_leaves_it_unknown(self):
        connection = self.connect(witness=Ledger())
        self.insert(connection)
        holder = psycopg2.connect(self.server.dsn(dbname=self.dbname))
        self.addCleanup(holder.close)

        def lock():
            with holder.cursor() as cursor:
                cursor.execute("SELECT FROM zreconnect_ledger FOR UPDATE")

        with (
            mock.patch.object(witness, "PATIENCE_WITH_ORPHANS", 0.2),
            self.assertRaises(CommitOutcomeUnknown),
        ):
            self.lose_answer_to_commit(connection, lock)

    def test_without_the_right_to_make_it_the_error_says_what_to_do(self):
        self.query(f"CREATE ROLE clerk LOGIN PASSWORD '{self.server.password}'")
        self.addCleanup(self.query, "DROP ROLE clerk")
        connection = self.connect(
            self.layer.dsn(user="clerk", dbname=self.dbname), witness=Ledger("office.ledger")
        )
        with self.assertRaises(psycopg2.Error):
            connection.begin()
        self.query("CREATE SCHEMA office")
        self.addCleanup(self.query, "DROP SCHEMA office CASCADE")
        self.query("GRANT USAGE ON SCHEMA office TO clerk")
        self.addCleanup(self.query, "DROP OWNED BY clerk")
        with self.assertRaisesRegex(
            psycopg2.ProgrammingError, "zreconnect ledger --table office.ledger DSN"
        ):
            connection.begin()
        self.assertEqual(connection.state, "idle")

    def test_without_the_right_to_write_it_the_servers_error_is_raised(self):
        self.connect(witness=Ledger()).run(lambda: None)
        self.query(f"CREATE ROLE clerk LOGIN PASSWORD '{self.server.password}'")
        self.addCleanup(self.query, "DROP ROLE clerk")
        connection = self.connect(
            self.layer.dsn(user="clerk", dbname=self.dbname), witness=Ledger()
        )
        with self.assertRaises(psycopg2.errors.InsufficientPrivilege):
            connection.begin()
        self.assertEqual(connection.state, "idle")

    def test_a_table_that_another_session_is_making(self):
        holder = psycopg2.connect(self.server.dsn(dbname=self.dbname))
        self.addCleanup(holder.close)
        holder.set_session(autocommit=False)
        ledger.make_ledger(driver, holder, "zreconnect_ledger")
        connection = self.connect(witness=Ledger())
        thread = threading.Thread(target=connection.run, args=[lambda: None])
        thread.start()
        wait_until(
            lambda: self.query("SELECT true FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        )
        holder.commit()
        thread.join()
        self.assertEqual(len(self.rows()), 1)

    def test_sessions_that_are_read_only_by_default(self):
        self.connect(witness=Ledger()).run(lambda: None)
        dsn = self.dsn + "?options=-c%20default_transaction_read_only%3Don"
        connection = self.connect(dsn, witness=Ledger())
        with self.assertRaisesRegex(psycopg2.ProgrammingError, "default_transaction_read_only"):
            connection.begin()
        connection.readonly = True
        connection.run(lambda: connection.cursor().execute("SELECT 1"))

        def read_only_factory():
            raw = psycopg2.connect(self.dsn)
            raw.readonly = True
            return raw

        connection = ReconnectingConnection(read_only_factory, witness=Ledger())
        self.addCleanup(connection.close)
        connection.run(lambda: connection.cursor().execute("SELECT 1"))
        connection.readonly = False
        connection.run(self.insert, connection)
        self.assertEqual(len(self.rows()), 2)

    def test_many_connections_make_it_at_once(self):
        connections = [self.connect(witness=Ledger()) for _ in range(8)]
        errors = []

        def begin(connection):
            try:
                connection.begin()
                connection.rollback()
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=begin, args=[each]) for each in connections]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])
        self.assertEqual(len(self.rows()), 8)

    def test_bad_table_names(self):
        for table in ("", "a b", "a.b.c", "a;DROP TABLE item", "1a"):
            with self.assertRaisesRegex(ValueError, "table"):
                Ledger(table)
        self.assertEqual(repr(Ledger("office.ledger")), "Ledger(table='office.ledger')")
