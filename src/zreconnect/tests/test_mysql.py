"""MySQL and MariaDB through each of their modules: what the core promises, and what is theirs."""

import contextlib
import importlib.util
import os
import pickle
import re
import select
import socket
import ssl
import tempfile
import threading
import unittest
from importlib import import_module
from pathlib import Path
from unittest import mock

import pymysql
import transaction
from pymysql.constants import CLIENT
from transaction.interfaces import TransientError

import zreconnect
from zreconnect import (
    FAIL_FAST,
    CommitOutcomeUnknown,
    DisconnectionError,
    Ledger,
    ReconnectTimeout,
    RetryPolicy,
    retry_on_disconnect,
)
from zreconnect.connection import ReconnectingConnection
from zreconnect.datamanager import join_transactions
from zreconnect.drivers import mysql, mysqlchoices
from zreconnect.drivers.base import Evidence, Meaning, SessionSettings, load_driver
from zreconnect.drivers.mysql import MysqlDriver
from zreconnect.dsn import driver_name
from zreconnect.events import CommitLookedUp, ConnectionAttemptFailed
from zreconnect.server import server_from_dsn
from zreconnect.testing import EmbeddedMariaDB
from zreconnect.tests.base import (
    LineTestCase,
    is_evident,
    leave_in_doubt,
    needs_mysqlclient,
    on_mariadb,
    policy_of,
    wait_until,
    with_time_to_connect,
)
from zreconnect.tests.tls import make_certificate, needs_openssl

LATIN1 = ["latin1", "latin1", "latin1_swedish_ci"]
# For statements that wait in vain otherwise.
PATIENCE = 30


def caused_by(original, error):
    """An error as PyMySQL raises it when the socket raises one."""
    error.__context__ = original
    return error


class MysqlTestCase:
    """``self.dsn`` leads to an empty database through ``self.forward``."""

    dbname = "test"

    def setUp(self):
        self.server = self.layer.server
        self.forward = self.layer.forward
        self.driver = load_driver(self.driver_name)
        self.module = self.driver.module
        for session in self.sessions():
            with contextlib.suppress(pymysql.Error):
                self.server.kill_session(session)
        wait_until(lambda: not self.sessions())
        self.query("DROP DATABASE test")
        self.query("CREATE DATABASE test")
        self.query("CREATE TABLE test.item (name varchar(40) PRIMARY KEY, number int)")
        self.dsn = self.layer.dsn()

    def query(self, statement, *parameters):
        return self.server.query(statement, *parameters, dbname="mysql")

    def connect(self, dsn=None, **keywords):
        keywords.setdefault("witness", Ledger())
        connection = zreconnect.connect(dsn or self.dsn, self.driver_name, **keywords)
        self.addCleanup(connection.close)
        return connection

    def sessions(self):
        return self.server.session_ids()

    def names(self):
        return [name for (name,) in self.query("SELECT name FROM test.item ORDER BY name")]

    def insert(self, connection, name="one"):
        connection.cursor().execute("INSERT INTO item VALUES (%s, 0)", (name,))

    def number(self, connection):
        return connection.driver_connection.thread_id()

    def wait_for_end(self, number):
        wait_until(lambda: number not in self.sessions())


class Tests(MysqlTestCase):
    # Disconnects

    def ways_to_lose(self, connection):
        number = self.number(connection)
        yield "restart", self.server.restart
        yield "crash", lambda: (self.server.kill_all(), self.server.start())
        yield "KILL", lambda: (self.server.kill_session(number), self.wait_for_end(number))
        yield "FIN", self.forward.drop
        yield "RST", lambda: self.forward.drop(reset=True)

    def test_between_transactions_a_loss_costs_nothing(self):
        connection = self.connect()
        for name, _ in self.ways_to_lose(connection):
            with self.subTest(name):
                connection.begin()
                connection.rollback()
                dict(self.ways_to_lose(connection))[name]()
                with connection.transaction():
                    self.insert(connection, name)
        self.assertEqual(len(self.names()), 5)

    def test_what_is_said_to_look_at_stays(self):
        for is_committed in (True, False):
            with self.subTest(is_committed=is_committed):
                connection = self.connect(policy=RetryPolicy(timeout=0.2))
                connection.run(self.insert, connection, "before")
                self.insert(connection, "in doubt")
                unknown = leave_in_doubt(self, connection, is_committed)
                for name in ("after", "in the end"):
                    connection.run(self.insert, connection, name)
                connection.close()
                self.assertIs(is_evident(unknown, self.query), is_committed)
                self.assertEqual("in doubt" in self.names(), is_committed)
                self.query("DELETE FROM test.item")

    def test_inside_a_transaction_a_loss_dooms_it(self):
        connection = self.connect()
        for name, _ in self.ways_to_lose(connection):
            with self.subTest(name):
                self.insert(connection, name)
                dict(self.ways_to_lose(connection))[name]()
                with self.assertRaises(DisconnectionError) as lost:
                    self.insert(connection, "second")
                self.assertIsInstance(lost.exception, self.module.OperationalError)
                with self.assertRaisesRegex(DisconnectionError, "Already disconnected"):
                    self.insert(connection, "second")
                connection.rollback()
        self.assertEqual(self.names(), [])

    def test_the_number_of_a_loss(self):
        for lose, number in (
            (
                lambda connection: self.forward.drop(),
                {mysql.CR_SERVER_GONE_ERROR, mysql.CR_SERVER_LOST},
            ),
            (self.lose, mysql.LOST),
        ):
            connection = self.connect()
            self.insert(connection)
            lose(connection)
            for found in (number, {mysql.CR_SERVER_GONE_ERROR}):
                with self.assertRaises(DisconnectionError) as lost:
                    self.insert(connection)
                self.assertIn(lost.exception.args[0], found)
                self.assertEqual(lost.exception.args[1], str(lost.exception))
                copied = pickle.loads(pickle.dumps(lost.exception))
                self.assertEqual(copied.args, lost.exception.args)
                self.assertEqual(str(copied), str(lost.exception))

    def test_what_was_sent(self):
        cursor = self.connect().cursor()
        cursor.execute("SELECT %s", (1,))
        sent = cursor._executed
        self.assertEqual(sent if isinstance(sent, str) else sent.decode(), "SELECT 1")

    def test_autocommit(self):
        connection = self.connect()
        connection.autocommit = True
        self.insert(connection, "first")
        self.assertEqual(self.names(), ["first"])
        self.forward.cut("to_server", 0)
        with self.assertRaises(CommitOutcomeUnknown):
            self.insert(connection, "second")
        self.forward.drop()
        self.insert(connection, "third")
        connection.autocommit = False
        self.insert(connection, "fourth")
        connection.rollback()
        self.assertEqual(self.names(), ["first", "third"])

    def test_a_silent_server_is_given_up(self):
        connection = self.connect(response_timeout=2.0)
        self.insert(connection)
        self.server.suspend()
        with self.assertRaises(DisconnectionError):
            self.insert(connection, "two")
        self.server.resume()
        connection.rollback()
        connection.run(self.insert, connection)
        self.assertEqual(self.names(), ["one"])

    def test_a_server_that_stays_away(self):
        self.forward.refuse()
        with self.assertRaises(ReconnectTimeout):
            self.connect(policy=RetryPolicy(timeout=0.2)).begin()
        with self.assertRaises(DisconnectionError):
            self.connect(policy=FAIL_FAST).begin()

    def test_a_full_server_is_waited_for(self):
        self.query("SET GLOBAL max_connections = 10")
        self.addCleanup(self.query, "SET GLOBAL max_connections = 100")
        plain = [self.server._connect("mysql", PATIENCE)]
        # One more is there for the superuser.
        with contextlib.suppress(pymysql.OperationalError):
            while True:
                plain.append(self.server._connect("mysql", PATIENCE))
        connection = self.connect(policy=RetryPolicy(timeout=PATIENCE))
        begun = threading.Thread(target=connection.begin)
        with self.events() as events:
            begun.start()
            wait_until(lambda: events)
            for each in plain:
                each.close()
            begun.join()
        self.assertEqual(mysql.errno(events[0].error), mysql.ER_CON_COUNT_ERROR)
        self.assertEqual(connection.state, "active")

    # COMMIT

    def lose_commit(self, connection, direction):
        """Cut the line when COMMIT, or its answer, is about to pass."""
        self.insert(connection)
        self.forward.cut(direction, 0)
        with self.events() as events:
            try:
                connection.commit()
            finally:
                self.outcomes = [e.outcome for e in events if isinstance(e, CommitLookedUp)]

    def test_a_lost_answer_to_commit_is_looked_up(self):
        connection = self.connect()
        self.insert(connection)
        connection.rollback()
        wait = threading.Event()
        self.insert(connection)
        self.forward.silence("to_client")

        def cut():
            wait_until(self.names)
            self.forward.drop()
            self.forward.resume()
            wait.set()

        threading.Thread(target=cut).start()
        connection.commit()
        self.assertTrue(wait.wait(PATIENCE))
        self.assertEqual((connection.state, self.names()), ("idle", ["one"]))

    def test_a_lost_commit_may_run_again(self):
        connection = self.connect()
        with self.assertRaises(DisconnectionError):
            self.lose_commit(connection, "to_server")
        self.assertEqual((self.outcomes, self.names()), (["aborted"], []))
        connection.rollback()
        connection.run(self.insert, connection)
        self.assertEqual(self.names(), ["one"])

    def test_without_a_ledger_a_lost_commit_is_unknown(self):
        for witness in (None, "xid"):
            with self.subTest(witness), self.assertRaises(CommitOutcomeUnknown):
                self.lose_commit(self.connect(witness=witness), "to_server")

    def test_an_interrupted_commit_is_looked_up(self):
        connection = self.connect()
        self.insert(connection)
        interrupted = self.module.OperationalError(mysql.ER_QUERY_INTERRUPTED, "interrupted")
        execute_all, ours = self.driver._execute_all, connection.driver_connection

        def interrupt(raw, statements):
            if raw is ours:
                raise interrupted
            return execute_all(raw, statements)

        with (
            mock.patch.object(self.driver, "_execute_all", interrupt),
            self.events() as events,
            self.assertRaises(DisconnectionError),
        ):
            connection.commit()
        (outcome,) = (each.outcome for each in events if isinstance(each, CommitLookedUp))
        self.assertEqual((outcome, self.names()), ("aborted", []))

    def test_an_interrupt_between_a_request_of_ours_and_its_result(self):
        """It is raised, and not what the module says of the result that nobody has read."""
        connection = self.connect()
        connection.run(lambda: None)

        class TimeLimit(Exception):
            """A program's own."""

        result = mock.Mock(side_effect=TimeLimit)
        for request in (connection.begin, connection.ping):
            with (
                mock.patch.object(self.driver.plain_cursor, "_do_get_result", result),
                self.assertRaises(TimeLimit),
            ):
                request()
            connection.rollback()
            connection.run(self.insert, connection, request.__name__)
        self.assertEqual(self.names(), ["begin", "ping"])

    def test_a_conflict_at_commit_has_rolled_back(self):
        connection = self.connect()
        connection.run(lambda: None)
        execute_all = self.driver._execute_all

        def refuse_commit(raw, statements):
            if "COMMIT" in statements:
                raise conflict
            return execute_all(raw, statements)

        for statement, names, number in (
            ("SELECT 1", [], mysql.ER_LOCK_DEADLOCK),
            ("SELECT 1", [], mysql.ER_TRANSACTION_ROLLBACK_DURING_COMMIT),
            ("TRUNCATE other", ["one"], mysql.ER_LOCK_DEADLOCK),
        ):
            conflict = self.module.OperationalError(number, "conflict")
            self.query("CREATE OR REPLACE TABLE test.other (number int)")
            with mock.patch.object(self.driver, "_execute_all", refuse_commit):
                self.insert(connection)
                connection.cursor().execute(statement)
                with self.assertRaises(self.module.OperationalError) as raised:
                    connection.commit()
            self.assertEqual((connection.state, self.names()), ("idle", names))
            self.assertEqual(isinstance(raised.exception, TransientError), not names)

    # Orphans

    def test_the_orphan_is_ended_before_the_work_runs_again(self):
        for witness in (Ledger(), "xid"):
            with self.subTest(witness):
                connection = self.connect(witness=witness, response_timeout=2.0)
                connection.begin()
                orphan = self.number(connection)
                self.insert(connection)
                with self.assertRaises(DisconnectionError):
                    connection.cursor().execute(f"SELECT SLEEP({PATIENCE})")
                self.assertIn(orphan, self.sessions())
                connection.rollback()
                # It would wait for the orphan's lock.
                self.insert(connection)
                self.assertNotIn(orphan, self.sessions())
                connection.rollback()

    def test_an_orphan_that_has_just_ended(self):
        raw = self.connect().driver_connection
        session = self.driver.identify(raw)
        gone = self.module.OperationalError(mysql.ER_NO_SUCH_THREAD, "Unknown thread id")
        for error, expected in ((gone, contextlib.nullcontext()), (self.wrong(), self.refused())):
            query = mock.patch.object(self.driver, "query", side_effect=[[(1,)], error])
            with query, expected:
                self.assertTrue(self.driver.end_session(raw, session, Evidence(0.0)))

    def wrong(self):
        return self.module.OperationalError(1064, "You have an error in your SQL syntax")

    def refused(self):
        return self.assertRaises(self.module.OperationalError)

    def test_a_server_without_locks_of_that_kind(self):
        raw = self.connect().driver_connection
        unsupported = self.module.NotSupportedError(1235, "not in a cluster")
        system = "server_id 1"
        for answer in (
            {"return_value": [(None, system)]},
            {"side_effect": [unsupported, [(None, system)]]},
        ):
            with mock.patch.object(self.driver, "query", **answer):
                session = self.driver.identify(raw)
            self.assertEqual((session.pid, session.start), (raw.thread_id(), None))
            self.assertFalse(self.driver.end_session(raw, session, Evidence(0.0)))
        lost = self.module.OperationalError(mysql.CR_SERVER_LOST, "Lost connection")
        with (
            mock.patch.object(self.driver, "query", side_effect=lost),
            self.assertRaises(self.module.OperationalError),
        ):
            self.driver.identify(raw)

    # What ends a transaction on the server

    def deadlock(self, connection):
        """Make the connection, in a transaction of its own, the victim of a deadlock."""
        other = self.server._connect("test", PATIENCE)
        self.addCleanup(other.close)
        other.begin()
        # InnoDB chooses the transaction that has changed less.
        rows = ", ".join(f"('heavy {n}', 0)" for n in range(50))
        cursor = other.cursor()
        cursor.execute(f"INSERT INTO item VALUES {rows}")
        connection.cursor().execute("UPDATE item SET number = 1 WHERE name = 'a'")
        cursor.execute("UPDATE item SET number = 2 WHERE name = 'b'")
        waiting = threading.Thread(
            target=lambda: cursor.execute("UPDATE item SET number = 2 WHERE name = 'a'")
        )
        waiting.start()
        wait_until(
            # Who asks innodb_trx too often is shown what it has shown before.
            lambda: (
                self.query("SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'")
                != [("Innodb_row_lock_current_waits", "0")]
            )
        )
        try:
            connection.cursor().execute("UPDATE item SET number = 1 WHERE name = 'b'")
        finally:
            waiting.join()
            other.rollback()

    def test_a_deadlock_in_a_savepoints_block(self):
        """The server has rolled back the whole transaction, and not to the savepoint."""
        self.query("INSERT INTO test.item VALUES ('a', 0), ('b', 0)")
        connection = self.connect()
        self.insert(connection, "before")
        with (
            self.assertRaises(self.module.OperationalError) as raised,
            connection.transaction(),
        ):
            self.deadlock(connection)
        self.assertTrue(self.driver.is_transient(raised.exception))
        with self.assertRaises(self.module.InternalError), connection.transaction():
            self.fail("there is a transaction")
        self.assertRaises(self.module.InternalError, connection.commit)
        self.assertEqual((connection.state, self.names()), ("idle", ["a", "b"]))

    def test_nothing_follows_a_deadlock(self):
        self.query("INSERT INTO test.item VALUES ('a', 0), ('b', 0)")
        connection = self.connect()
        self.insert(connection, "before")
        with self.assertRaises(self.module.OperationalError) as raised:
            self.deadlock(connection)
        self.assertEqual(mysql.errno(raised.exception), mysql.ER_LOCK_DEADLOCK)
        self.assertTrue(self.driver.is_transient(raised.exception))
        for follow_up in (lambda: self.insert(connection, "after"), connection.commit):
            with self.assertRaises(self.module.InternalError) as refused:
                follow_up()
            self.assertIsInstance(refused.exception, TransientError)
        connection.rollback()
        self.assertEqual(self.names(), ["a", "b"])
        connection.run(self.insert, connection)
        self.assertEqual(self.names(), ["a", "b", "one"])

    def test_a_deadlock_in_a_savepoint_has_the_work_run_again(self):
        self.query("INSERT INTO test.item VALUES ('a', 0), ('b', 0)")
        connection = self.connect()

        def go_back(savepoint):
            savepoint.rollback()

        def let_go(savepoint):
            savepoint.release()

        def as_statement(savepoint):
            connection.cursor().execute("ROLLBACK TO SAVEPOINT zreconnect_1")

        for number, end in enumerate((go_back, let_go, as_statement)):
            with self.subTest(end.__name__):
                is_first = iter((True, False))

                def work():
                    self.insert(connection, f"before {number}")  # noqa: B023
                    savepoint = connection.savepoint()
                    if next(is_first):  # noqa: B023
                        with contextlib.suppress(self.module.OperationalError):
                            self.deadlock(connection)
                        end(savepoint)  # noqa: B023

                connection.run(work)
                self.assertIn(f"before {number}", self.names())

    def conflict(self, connection, change):
        """Meet what somebody else has changed since the transaction's first statement."""
        cursor = connection.cursor()
        cursor.execute("SET innodb_snapshot_isolation = ON")
        cursor.execute("SELECT * FROM item")
        cursor.fetchall()
        self.query(change)
        self.insert(connection, "before")
        cursor.execute("UPDATE item SET number = number + 1 WHERE name = 'a'")
        cursor.execute("SELECT * FROM other")

    def test_what_somebody_else_has_changed_meanwhile_is_a_conflict(self):
        self.query("INSERT INTO test.item VALUES ('a', 0)")
        self.query("CREATE TABLE test.other (number int)")
        connection = self.connect()
        for number, change in (
            (mysql.ER_CHECKREAD, "UPDATE test.item SET number = number + 10"),
            (mysql.ER_TABLE_DEF_CHANGED, "ALTER TABLE test.other ADD name int, ALGORITHM=COPY"),
        ):
            with self.subTest(number):
                self.query("DELETE FROM test.item WHERE name <> 'a'")
                errors, changes = [], iter((change, "DO 0"))

                def work():
                    try:
                        self.conflict(connection, next(changes))  # noqa: B023
                    except self.module.Error as error:
                        errors.append(mysql.errno(error))  # noqa: B023
                        self.assertIsInstance(error, TransientError)
                        raise

                connection.run(work)
                self.assertEqual((errors, self.names()), ([number], ["a", "before"]))

    def test_nothing_follows_upon_a_change_of_somebody_elses(self):
        self.query("INSERT INTO test.item VALUES ('a', 0)")
        connection = self.connect()
        with self.assertRaises(TransientError):
            self.conflict(connection, "UPDATE test.item SET number = 10")
        with self.assertRaises(TransientError):
            self.insert(connection, "after")
        connection.rollback()
        self.assertEqual(self.names(), ["a"])

    def test_a_deadlock_that_only_the_server_knows_of_is_noticed_by_commit(self):
        connection = self.connect()
        self.insert(connection, "before")
        connection.driver_connection.rollback()
        self.insert(connection, "after")
        with self.assertRaisesRegex(self.module.InternalError, "Nothing was committed"):
            connection.commit()
        self.assertEqual((connection.state, self.names()), ("idle", []))
        self.assertFalse(self.driver.in_transaction(connection.driver_connection))

    def lock_timeout(self, connection):
        other = self.server._connect("test", PATIENCE)
        self.addCleanup(other.close)
        other.begin()
        other.cursor().execute("INSERT INTO item VALUES ('locked', 0)")
        connection.cursor().execute("SET innodb_lock_wait_timeout = 1")
        self.insert(connection, "before")
        with self.assertRaises(self.module.OperationalError) as raised:
            self.insert(connection, "locked")
        other.rollback()
        self.assertTrue(self.driver.is_transient(raised.exception))

    def test_a_lock_timeout_undoes_the_statement_alone(self):
        connection = self.connect()
        self.lock_timeout(connection)
        self.insert(connection, "after")
        connection.commit()
        self.assertEqual(self.names(), ["after", "before"])

    def test_a_lock_timeout_that_rolls_back_is_like_a_deadlock(self):
        connection = self.connect()
        with mock.patch.object(self.driver, "_timeout_ended_transaction", return_value=True):
            self.lock_timeout(connection)
        with self.assertRaises(self.module.InternalError):
            self.insert(connection, "after")
        connection.rollback()
        self.assertEqual(self.names(), [])

    # Statements that commit

    def test_ddl_commits_and_the_rest_is_committed_too(self):
        connection = self.connect()
        self.insert(connection, "before")
        connection.cursor().execute("CREATE TABLE other (number int)")
        self.assertEqual(self.names(), ["before"])
        self.insert(connection, "after")
        connection.commit()
        self.assertEqual(self.names(), ["after", "before"])

    def test_after_a_routine_is_made_the_rest_is_committed_too(self):
        for number, keywords in enumerate(({}, {"client_flag": CLIENT.MULTI_STATEMENTS})):
            connection = ReconnectingConnection(
                lambda: self.plain(**keywords),  # noqa: B023
                self.driver_name,
                witness=None,
            )
            self.addCleanup(connection.close)
            connection.cursor().execute(
                f"CREATE PROCEDURE work_{number}() BEGIN SELECT 1; SELECT 2; END"
            )
            self.insert(connection, f"after {number}")
            connection.commit()
        self.assertEqual(self.names(), ["after 0", "after 1"])

    def plain(self, **keywords):
        """A connection of the module's own."""
        server = self.server
        return self.module.connect(
            host=server.host,
            port=server.port,
            user=server.user,
            password=server.password,
            database="test",
            **keywords,
        )

    def test_after_ddl_a_rollback_on_the_server_is_noticed(self):
        connection = self.connect()
        connection.cursor().execute("CREATE TABLE other (number int)")
        self.insert(connection)
        connection.driver_connection.rollback()
        with self.assertRaises(self.module.InternalError):
            connection.commit()

    def test_after_ddl_nobody_knows_of_a_lost_session(self):
        for way in ("commit", "statement", "fetch"):
            with self.subTest(way):
                connection = self.connect()
                cursor = connection.cursor("rows")
                cursor.execute(f"CREATE TABLE by_{way} (number int)")
                if way == "fetch":
                    cursor.execute("SELECT seq FROM seq_1_to_1000000")
                self.forward.drop()
                with self.assertRaises(CommitOutcomeUnknown):
                    {
                        "commit": connection.commit,
                        "statement": lambda: self.insert(connection),  # noqa: B023
                        "fetch": cursor.fetchall,
                    }[way]()
                connection.rollback()

    def test_a_temporary_table_commits_nothing(self):
        connection = self.connect()
        self.insert(connection)
        connection.cursor().execute("CREATE TEMPORARY TABLE scratch (number int)")
        self.assertFalse(self.driver.has_committed(connection.driver_connection))
        connection.rollback()
        self.assertEqual(self.names(), [])

    def lose(self, connection):
        number = self.number(connection)
        fileno = self.driver.fileno(connection.driver_connection)
        self.server.kill_session(number)
        self.wait_for_end(number)
        # The line passes it on later.
        wait_until(lambda: select.select([fileno], [], [], 0)[0])

    def test_a_statement_that_contains_a_commit(self):
        self.query("CREATE PROCEDURE test.work() BEGIN COMMIT; INSERT INTO item VALUES (1, 1); END")
        for statement in (
            "CALL work()",
            "EXECUTE IMMEDIATE 'COMMIT'",
            "BEGIN NOT ATOMIC COMMIT; END",
            "IF true THEN COMMIT; END IF",
            "SET STATEMENT max_statement_time = 9 FOR COMMIT",
        ):
            with self.subTest(statement):
                self.query("DELETE FROM test.item")
                connection = self.connect()
                self.insert(connection, "before")
                connection.cursor().execute(statement)
                self.insert(connection, "after")
                with self.assertRaisesRegex(self.module.InternalError, "in a procedure, by a"):
                    connection.commit()
                self.assertEqual((connection.state, self.names()), ("idle", ["before"]))

    def test_a_unit_of_work_that_may_have_committed_is_not_run_again(self):
        self.query("CREATE PROCEDURE test.work() COMMIT")

        def work(connection, statement, is_first):
            self.insert(connection, "before")
            connection.cursor().execute(statement)
            if is_first:
                self.lose(connection)
            self.insert(connection, "after")

        for statement in (
            "CALL work()",
            "EXECUTE IMMEDIATE 'COMMIT'",
            "/* a */ COMMIT /* */",
            "/*! COMMIT */",
            "TRUNCATE test.other",
            "SET DEFAULT ROLE NONE",
        ):
            with self.subTest(statement):
                self.query("DELETE FROM test.item")
                self.query("CREATE OR REPLACE TABLE test.other (number int)")
                connection = self.connect()
                attempts = iter((True, False))
                with self.assertRaises(CommitOutcomeUnknown):
                    connection.run(lambda: work(connection, statement, next(attempts)))  # noqa: B023
                self.assertEqual((connection.state, self.names()), ("idle", ["before"]))

    def test_a_statement_that_may_commit_and_is_lost(self):
        connection = self.connect()
        for statement in ("EXECUTE IMMEDIATE 'COMMIT'", "SET @number = 1, autocommit = 1"):
            with self.subTest(statement):
                self.insert(connection)
                self.lose(connection)
                with self.assertRaises(CommitOutcomeUnknown):
                    connection.cursor().execute(statement)
                connection.rollback()

    def test_what_comes_after_ddl_is_not_in_the_ledger(self):
        for lose_in in ("statement", "commit"):
            with self.subTest(lose_in):
                connection = self.connect()
                self.insert(connection, f"before, {lose_in}")
                connection.cursor().execute(f"CREATE TABLE {lose_in}_table (id int)")
                if lose_in == "commit":
                    self.insert(connection, "after")
                self.forward.drop()
                with self.assertRaises(CommitOutcomeUnknown) as raised:
                    if lose_in == "commit":
                        connection.commit()
                    else:
                        self.insert(connection, "after")
                connection.rollback()
                evidence = raised.exception.evidence
                self.assertIn("what came after it is not in the ledger", evidence)
                self.assertRegex(evidence, r"the server process \d+ with the lock zreconnect:")
                self.assertTrue(is_evident(raised.exception, self.query))
                self.assertIn(f"before, {lose_in}", self.names())
                self.assertNotIn("after", self.names())

    def test_a_unit_of_work_whose_first_transaction_ddl_has_committed(self):
        """It rolls back, begins again, and then may run again, if nobody knows of the first."""

        def work(connection):
            self.insert(connection, "before")
            connection.cursor().execute("CREATE TABLE IF NOT EXISTS other (number int)")
            connection.rollback()
            connection.begin()
            self.insert(connection, "after")
            self.lose(connection)
            self.insert(connection, "after")

        for run in (lambda connection: connection.run, self.retry):
            with self.subTest(run):
                self.query("DELETE FROM test.item")
                connection = self.connect()
                with self.assertRaises(DisconnectionError):
                    run(connection)(work, connection)
                connection.rollback()
                self.assertEqual(self.names(), ["before"])

    def retry(self, connection):
        def run(function, *args):
            try:
                function(*args)
            finally:
                connection.rollback()

        return retry_on_disconnect(timeout=PATIENCE)(run)

    def test_a_conflict_after_ddl_is_not_transient(self):
        self.query("INSERT INTO test.item VALUES ('a', 0), ('b', 0)")
        runs = []
        connection = self.connect()

        def work():
            runs.append(None)
            self.insert(connection, f"before {len(runs)}")
            connection.cursor().execute("CREATE TABLE IF NOT EXISTS other (number int)")
            self.deadlock(connection)

        with self.assertRaises(self.module.OperationalError) as raised:
            connection.run(work)
        self.assertNotIsInstance(raised.exception, TransientError)
        self.assertEqual(self.names(), ["a", "b", "before 1"])

    def test_autocommit_mode_that_is_switched_on_inside_a_transaction(self):
        self.query("CREATE PROCEDURE test.work() SET autocommit = 1")
        for statement in (
            "SET autocommit = 1",
            "SET @@session.autocommit = 1",
            "SET LOCAL autocommit = ON",
            "SET @number = 1, @@local.`autocommit` = 1",
            "CALL work()",
            "EXECUTE IMMEDIATE 'SET autocommit = 1'",
        ):
            with self.subTest(statement):
                self.query("DELETE FROM test.item")
                connection = self.connect()
                runs = []

                def work():
                    runs.append(None)  # noqa: B023
                    self.insert(connection, "before")  # noqa: B023
                    connection.cursor().execute(statement)  # noqa: B023

                with self.assertRaisesRegex(self.module.InternalError, "attribute autocommit"):
                    connection.run(work)
                self.assertEqual((self.names(), len(runs)), (["before"], 1))
                connection.begin()
                self.insert(connection, "after")
                connection.rollback()
                self.assertEqual(self.names(), ["before"])

    def test_autocommit_mode_that_was_switched_on_with_the_modules_connection(self):
        connection = self.connect()
        self.insert(connection, "before")
        connection.driver_connection.autocommit(True)
        with self.assertRaisesRegex(self.module.InternalError, "attribute autocommit"):
            self.insert(connection, "after")
        with self.assertRaises(self.module.InternalError):
            connection.commit()
        self.assertEqual(self.names(), ["before"])

    def test_autocommit_as_the_modules_have_it(self):
        connection = self.connect()
        for mode in (True, False):
            connection.autocommit(mode)
            connection.autocommit(mode)
            self.insert(connection, f"called {mode}")
            self.assertEqual(
                (bool(connection.autocommit), connection.get_autocommit()), (mode,) * 2
            )
            self.assertEqual(
                (connection.autocommit, repr(connection.autocommit)), (mode, str(mode))
            )
            connection.rollback()
            connection.autocommit = mode
            self.insert(connection, f"set {mode}")
            self.lose(connection)
            connection.rollback()
            self.assertEqual(connection.autocommit, mode)
        self.assertEqual(self.names(), ["called True", "set True"])

    def test_autocommit_mode_does_not_change_inside_a_transaction(self):
        connection = self.connect()
        self.insert(connection)
        connection.autocommit(False)
        with self.assertRaises(self.module.ProgrammingError):
            connection.autocommit(True)
        connection.commit()
        self.assertEqual(self.names(), ["one"])

    def test_open(self):
        connection = self.connect()
        self.insert(connection)
        self.lose(connection)
        self.assertTrue(connection.open)
        connection.close()
        self.assertFalse(connection.open)

    def test_autocommit_mode_that_is_off_may_be_switched_off(self):
        connection = self.connect()
        self.insert(connection)
        connection.cursor().execute("SET autocommit = 0")
        self.assertEqual(self.names(), [])
        connection.commit()
        self.assertEqual(self.names(), ["one"])

    def test_a_statement_between_transactions_switches_autocommit_mode(self):
        connection = self.connect()
        for mode, statement in enumerate(("SET AUTOCOMMIT=0", b"set @@session.autocommit = on")):
            self.assertEqual(connection.cursor().execute(statement), 0)
            self.assertEqual((connection.state, connection.autocommit), ("idle", mode))
            self.insert(connection, f"first {mode}")
            connection.rollback()
            self.lose(connection)
            self.insert(connection, f"second {mode}")
            connection.rollback()
            self.assertEqual(connection.autocommit, mode)
        self.assertEqual(self.names(), ["first 1", "second 1"])

    def test_a_statement_does_not_switch_the_mode_of_what_belongs_to_a_transaction(self):
        def in_block(connection):
            with connection:
                connection.cursor().execute("SET autocommit = 1")

        def explicitly(connection):
            connection.work.implicit_begin = False
            connection.cursor().execute("SET autocommit = 1")

        def of_a_manager(connection):
            join_transactions(connection, transaction.manager)
            connection.cursor().execute("SET autocommit = 1")

        self.addCleanup(transaction.abort)
        for switch in (in_block, explicitly, of_a_manager):
            with self.subTest(switch.__name__):
                connection = self.connect()
                with self.assertRaises(self.module.Error):
                    switch(connection)
                self.assertFalse(connection.autocommit)

    def test_a_transaction_that_autocommit_mode_ends_for_is_not_continued_in_another_session(self):
        connection = self.connect()
        connection.autocommit = True
        connection.cursor().execute("SET @number = 1, autocommit = 0")
        self.insert(connection, "first half")
        self.lose(connection)
        wait_until(lambda: not connection.work.link.session.watch.is_quiet())
        with self.assertRaises(DisconnectionError):
            self.insert(connection, "second half")
        self.insert(connection)
        self.assertEqual(self.names(), ["one"])

    def test_what_statements_have_begun_in_autocommit_mode_is_not_committed_by_mistake(self):
        connection = self.connect()
        connection.autocommit = True
        cursor = connection.cursor()

        def in_block():
            with connection:
                self.insert(connection, "never")

        for begin in ("START TRANSACTION", "/* own */ BEGIN", "COMMIT AND CHAIN"):
            for request in (
                connection.begin,
                connection.commit,
                lambda: connection.run(self.insert, connection, "never"),
                in_block,
                lambda: connection.autocommit(False),
            ):
                cursor.execute(begin)
                self.insert(connection)
                with self.assertRaisesRegex(self.module.ProgrammingError, "a statement has begun"):
                    request()
                self.assertEqual(self.names(), [])
                cursor.execute("SELECT name FROM item")
                self.assertEqual([tuple(row) for row in cursor.fetchall()], [("one",)])
                cursor.execute("ROLLBACK")
                connection.commit()
        cursor.execute("BEGIN")
        self.insert(connection)
        connection.rollback()
        connection.run(self.insert, connection, "two")
        self.assertEqual(self.names(), ["two"])

    def test_a_block_inside_what_statements_have_begun_is_a_savepoint(self):
        connection = self.connect()
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("START TRANSACTION")
        self.insert(connection)
        with contextlib.suppress(ZeroDivisionError), connection.transaction():
            self.insert(connection, "never")
            _ = 1 / 0
        with connection.transaction():
            self.insert(connection, "two")
        self.assertEqual(self.names(), [])
        cursor.execute("COMMIT")
        self.assertEqual(self.names(), ["one", "two"])

    def test_what_statements_have_begun_is_not_continued_in_another_session(self):
        connection = self.connect()
        connection.autocommit = True
        for lost in (
            lambda: self.insert(connection, "second half"),
            lambda: connection.select_db("test"),
        ):
            connection.cursor().execute("START TRANSACTION")
            self.insert(connection, "first half")
            self.lose(connection)
            wait_until(lambda: not connection.work.link.session.watch.is_quiet())
            with self.assertRaises(DisconnectionError):
                lost()
        self.insert(connection)
        self.assertEqual(self.names(), ["one"])

    def test_a_deadlock_ends_what_statements_have_begun(self):
        self.query("INSERT INTO test.item VALUES ('a', 0), ('b', 0)")
        connection = self.connect()
        connection.autocommit = True
        connection.cursor().execute("START TRANSACTION")
        with self.assertRaises(TransientError):
            self.deadlock(connection)
        connection.run(self.insert, connection)
        self.assertEqual(self.names(), ["a", "b", "one"])

    # Statements that are too long

    def limited(self, limit):
        """A connection whose sessions take statements that are shorter than so many bytes."""
        self.query("SET GLOBAL max_allowed_packet = %s", limit)
        self.addCleanup(self.query, "SET GLOBAL max_allowed_packet = DEFAULT")
        self.query("ALTER TABLE test.item ADD content longtext")
        return self.connect()

    def store(self, connection, name, content):
        with contextlib.closing(connection.cursor()) as cursor:
            cursor.execute("INSERT INTO item VALUES (%s, 0, %s)", (name, content))

    def assert_too_long(self, length, limit):
        shown = f"{length:,} bytes is too long for {re.escape(self.address())}.*{limit:,} bytes"
        return self.assertRaisesRegex(self.module.OperationalError, shown)

    def address(self):
        return self.driver.address({**self.driver.parse(self.dsn), "password": ""})

    def test_a_statement_that_the_server_would_end_the_session_for_is_not_sent(self):
        connection = self.limited(1 << 20)
        runs = []

        def work(content):
            runs.append(None)
            self.store(connection, "long", content)

        for content, length in (("x" * 30_000_000, 30_000_000), ("\u20ac" * 400_000, 1_200_000)):
            length += len("INSERT INTO item VALUES ('long', 0, '')")
            with self.subTest(length), self.assert_too_long(length, 1 << 20) as refused:
                connection.run(work, content)
            self.assertEqual(mysql.errno(refused.exception), mysql.ER_NET_PACKET_TOO_LARGE)
            self.assertNotIsInstance(refused.exception, TransientError)
        self.assertEqual(len(runs), 2)
        # The transaction goes on as after any statement that is refused.
        number = self.number(connection)
        self.store(connection, "before", "\u20ac" * 300_000)
        with self.assertRaises(self.module.OperationalError):
            self.store(connection, "long", "x" * 2_000_000)
        self.store(connection, "after", "")
        connection.commit()
        self.assertEqual((self.names(), self.number(connection)), (["after", "before"], number))

    def test_the_longest_statement(self):
        for autocommit in (False, True):
            with self.subTest(autocommit=autocommit):
                connection = self.limited(1 << 20)
                connection.autocommit = autocommit
                longest = "x" * ((1 << 20) - len("DO ''") - 3)
                connection.cursor().execute(f"DO '{longest}'")
                with self.assert_too_long((1 << 20) - 2, 1 << 20):
                    connection.cursor().execute(f"DO '{longest}x'")
                connection.cursor().execute("DO 0")
                self.query("ALTER TABLE test.item DROP content")

    def test_executemany_of_rows_that_are_too_long_together(self):
        connection = self.limited(1 << 15)
        rows = [(str(number), "x" * 1000) for number in range(100)]
        insert = "INSERT INTO item (name, content) VALUES (%s, %s)"
        cursor = connection.cursor()
        with self.assertRaisesRegex(self.module.OperationalError, "max_stmt_length"):
            cursor.executemany(insert, rows)
        connection.rollback()
        cursor.max_stmt_length = 30_000
        cursor.executemany(insert, rows)
        connection.commit()
        self.assertEqual(len(self.names()), 100)

    def test_a_file_may_be_longer(self):
        connection = self.limited(1 << 15)
        with tempfile.NamedTemporaryFile() as file:
            file.writelines(b"%d\t0\t%s\n" % (number, b"x" * 1000) for number in range(100))
            file.flush()
            Path(file.name).chmod(0o644)
            cursor = connection.cursor()
            cursor.execute(f"LOAD DATA INFILE '{file.name}' INTO TABLE item")
        connection.commit()
        self.assertEqual(len(self.names()), 100)

    # Methods of the modules' connections

    def test_methods_that_work_around_the_transaction_are_refused(self):
        connection = self.connect()
        connection.begin()
        for name in self.driver.refused_methods:
            with self.subTest(name):
                method = getattr(connection, name)
                with self.assertRaisesRegex(self.module.NotSupportedError, "with a cursor"):
                    method()
        self.insert(connection)
        connection.rollback()
        self.assertEqual(self.names(), [])

    def test_ping_outside_a_transaction_has_a_session_that_is_set_up(self):
        def set_up(raw):
            with contextlib.closing(raw.cursor()) as cursor:
                cursor.execute("SET time_zone = '+05:00'")

        connection = self.connect(on_connect=set_up)
        for lose in (lambda: None, lambda: self.lose(connection), self.forward.drop):
            connection.ping(reconnect=True)
            lose()
            connection.ping(reconnect=True)
            self.assertEqual(connection.state, "idle")
            with connection.transaction() as cursor:
                cursor.execute("SELECT @@session.time_zone")
                self.assertEqual(cursor.fetchone(), ("+05:00",))

    def test_ping_in_a_transaction_does_not_hide_its_loss(self):
        connection = self.connect()
        self.insert(connection)
        connection.ping(reconnect=True)
        self.lose(connection)
        with self.assertRaises(DisconnectionError):
            connection.ping(reconnect=True)
        with self.assertRaises(DisconnectionError):
            connection.ping(reconnect=True)
        connection.rollback()
        connection.ping()
        self.assertEqual(self.names(), [])

    def test_several_statements_in_one_are_refused(self):
        with self.assertRaises(self.module.ProgrammingError):
            self.connect().cursor().execute("INSERT INTO item VALUES (1, 1); COMMIT")

    # Sessions

    def test_modes_are_there_again(self):
        connection = self.connect()
        connection.set_session(isolation_level="read committed", readonly=True)
        self.assertEqual(connection.isolation_level, "READ COMMITTED")
        for _ in range(2):
            with self.assertRaises(self.module.OperationalError):
                self.insert(connection)
            connection.rollback()
            self.forward.drop()
        connection.set_session(readonly=False)
        connection.run(self.insert, connection)
        self.assertEqual(self.names(), ["one"])

    def selected(self, connection):
        with connection.transaction() as cursor:
            names = ", ".join(f"@@{name}" for name in mysqlchoices.CHARACTER_SETS)
            cursor.execute(f"SELECT DATABASE(), {names}")
            database, *sets = cursor.fetchone()
        return database, sets

    def utf8(self):
        # MariaDB 11.5 has another collation for it.
        [[collation]] = self.query("SELECT COLLATION(_utf8mb4'')")
        return ["utf8mb4", "utf8mb4", collation]

    def assert_chosen_again(self, connection, database, sets=None):
        sets = sets or self.utf8()
        before = self.number(connection)
        for _ in range(2):
            self.assertEqual(self.selected(connection), (database, sets))
            self.lose(connection)
        self.assertEqual(self.selected(connection), (database, sets))
        self.assertNotEqual(self.number(connection), before)

    def customer(self, name="customer"):
        quoted = mysqlchoices.quoted(name)
        self.query(f"CREATE OR REPLACE DATABASE {quoted}")
        self.addCleanup(self.query, f"DROP DATABASE IF EXISTS {quoted}")

    def dsns(self):
        return self.dsn, self.dsn.replace("/test", "/")

    def test_the_selected_database_is_there_again(self):
        for dsn, name in zip(self.dsns(), ("customer", "a`b; c"), strict=True):
            self.customer(name)
            quoted = mysqlchoices.quoted(name)

            def execute(statement):
                connection.cursor().execute(statement)  # noqa: B023
                connection.rollback()  # noqa: B023

            for choose in (
                lambda: connection.select_db(name),  # noqa: B023
                lambda: execute(f"USE {quoted}"),  # noqa: B023
                lambda: execute(f"/*! USE {quoted} */"),  # noqa: B023
                lambda: execute(f"EXECUTE IMMEDIATE 'USE {quoted}'"),  # noqa: B023
            ):
                with self.subTest(name):
                    connection = self.connect(dsn, witness=None)
                    choose()
                    self.assert_chosen_again(connection, name)

    def test_a_database_is_selected_in_autocommit_mode(self):
        self.customer()
        connection = self.connect(self.dsns()[1], witness=None)
        connection.autocommit = True
        connection.cursor().execute("USE customer")
        self.lose(connection)
        connection.cursor().execute("CREATE TABLE item (number int)")
        self.assertEqual(self.query("SELECT * FROM customer.item"), [])

    def test_what_was_chosen_last_holds(self):
        """Also over what on_connect chooses, and in a fork."""
        self.customer()

        def set_up(raw):
            raw.select_db("test")
            raw.set_character_set("utf8mb4")

        connection = self.connect(on_connect=set_up)
        self.assert_chosen_again(connection, "test")
        connection.select_db("mysql")
        connection.select_db("customer")
        connection.set_character_set("latin2")
        connection.set_client_encoding("latin1")
        connection.begin()
        with self.assertRaisesRegex(self.module.ProgrammingError, "inside a transaction"):
            connection.set_client_encoding("latin1")
        connection.rollback()
        self.assert_chosen_again(connection, "customer", LATIN1)
        connection.readonly = True
        self.assert_chosen_again(connection, "customer", LATIN1)
        connection.cursor().execute("SET NAMES utf8mb4 COLLATE utf8mb4_bin")
        connection.rollback()
        self.assert_chosen_again(connection, "customer", ["utf8mb4", "utf8mb4", "utf8mb4_bin"])
        fork = connection.fork()
        self.addCleanup(fork.close)
        fork.select_db("mysql")
        self.assert_chosen_again(connection, "customer", ["utf8mb4", "utf8mb4", "utf8mb4_bin"])
        self.assertEqual(self.selected(fork)[0], "mysql")
        connection.reset()
        self.assert_chosen_again(connection, "test")

    def test_the_character_set_is_there_again(self):
        utf8 = self.utf8()
        for statement, sets in {
            "SET NAMES latin1": LATIN1,
            "SET NAMES 'latin1'": LATIN1,
            "SET @a = 1, NAMES latin1": LATIN1,
            "SET character_set_results = NULL": [utf8[0], None, utf8[2]],
            "SET collation_connection = 'utf8mb4_bin'": [*utf8[:2], "utf8mb4_bin"],
        }.items():
            with self.subTest(statement):
                connection = self.connect()
                connection.cursor().execute(statement)
                connection.rollback()
                self.assert_chosen_again(connection, "test", sets)

    def test_the_modules_encoding_is_there_again(self):
        connection = self.connect()
        connection.set_character_set("latin1")
        self.assertEqual(connection.encoding, connection.driver_connection.encoding)
        for _ in range(2):
            self.insert(connection, "\u00fc")
            connection.commit()
            self.assertEqual(self.names(), ["\u00fc"])
            self.query("DELETE FROM test.item")
            self.lose(connection)

    def test_a_prepared_statement_or_a_procedure_chooses(self):
        self.customer()
        self.query("CREATE PROCEDURE test.enter() EXECUTE IMMEDIATE 'USE customer'")
        self.query(
            "CREATE PROCEDURE test.tell() BEGIN EXECUTE IMMEDIATE 'USE customer'; SELECT 1; END"
        )
        self.query("CREATE PROCEDURE test.encode_results() SET character_set_results = latin1")
        utf8 = self.utf8()
        latin1_results = [utf8[0], "latin1", utf8[2]]
        for autocommit in (False, True):
            for statements, database, sets in (
                (["CALL enter()"], "customer", utf8),
                (["CALL tell()"], "customer", utf8),
                (["CALL encode_results()"], "test", latin1_results),
                (["SET STATEMENT max_statement_time = 9 FOR CALL enter()"], "customer", utf8),
                (["PREPARE p FROM 'USE customer'", "EXECUTE p"], "customer", utf8),
                (["SET @s = 'SET NAMES latin1'", "EXECUTE IMMEDIATE @s"], "test", LATIN1),
            ):
                with self.subTest(statements, autocommit=autocommit):
                    connection = self.connect()
                    connection.autocommit = autocommit
                    cursor = connection.cursor()
                    for statement in statements:
                        cursor.execute(statement)
                    cursor.close()
                    connection.commit()
                    if statements == ["CALL tell()"]:
                        # Its rows may still be read when it could be asked.
                        connection.run(lambda: None)
                    self.assert_chosen_again(connection, database, sets)

    def test_what_is_asked_travels_with_the_end_of_the_transaction(self):
        self.query("CREATE PROCEDURE test.work() INSERT INTO item VALUES ('one', 1)")
        connection = self.connect()

        def work(end):
            connection.cursor().execute("CALL work()")
            end()

        work(connection.rollback)
        for end in (connection.rollback, connection.commit):
            self.assertEqual(self.round_trips(lambda: work(end)), 3)  # noqa: B023
        self.assertEqual(self.names(), ["one"])

    def test_what_a_lost_transaction_may_have_chosen_is_left_out(self):
        self.customer()
        connection = self.connect()
        connection.cursor().execute("EXECUTE IMMEDIATE 'USE customer'")
        self.lose(connection)
        with self.assertRaises(CommitOutcomeUnknown):
            connection.cursor().execute("SELECT 1")
        connection.rollback()
        self.assertEqual(self.selected(connection)[0], "test")

    def test_a_database_that_was_dropped_leaves_none_selected(self):
        for statement in (
            "DROP DATABASE customer",
            "DROP /* all */ SCHEMA IF EXISTS customer",
            "CREATE OR REPLACE DATABASE customer",
            "EXECUTE IMMEDIATE 'DROP DATABASE customer'",
        ):
            for dsn, safe in zip(self.dsns(), ("information_schema", None), strict=True):
                with self.subTest(statement):
                    self.customer()
                    connection = self.connect(dsn, witness=None)
                    connection.select_db("customer")
                    connection.cursor().execute(statement)
                    connection.rollback()
                    self.assertIsNone(self.selected(connection)[0])
                    for _ in range(2):
                        self.lose(connection)
                        # What was meant for the customer does not go to anybody else.
                        with self.assertRaises(self.module.Error):
                            self.insert(connection, "customer's")
                        connection.rollback()
                        self.assertEqual(self.selected(connection)[0], safe)
                    connection.select_db("test")
                    self.assert_chosen_again(connection, "test")
        self.assertEqual(self.names(), [])

    def test_choosing_in_a_session_that_was_lost_meanwhile(self):
        utf8 = self.utf8()
        self.customer()
        connection = self.connect(policy=FAIL_FAST)
        for autocommit in (False, True):
            connection.autocommit = autocommit
            for lose in (
                self.server.restart,
                self.forward.drop,
                # Seen only when nothing comes back.
                lambda: self.forward.cut("to_server", after=0),
                lambda: self.forward.cut("to_client", after=0),
            ):
                for choose, database, sets in (
                    (lambda: connection.select_db("customer"), "customer", utf8),
                    (lambda: connection.select_db("test"), "test", utf8),
                    (lambda: connection.set_character_set("latin1"), "test", LATIN1),
                    (lambda: connection.set_client_encoding("utf8mb4"), "test", utf8),
                ):
                    raw = connection.driver_connection
                    lose()
                    choose()
                    self.assertIsNot(connection.driver_connection, raw)
                    self.assertEqual(connection.state, "idle")
                    self.assertEqual(self.selected(connection), (database, sets))

    def test_a_choice_that_is_refused_is_not_made_again(self):
        connection = self.connect()
        for lose in (lambda: None, self.forward.drop, lambda: self.forward.cut("to_server", 0)):
            connection.ping()
            lose()
            with self.assertRaisesRegex(self.module.OperationalError, "nowhere"):
                connection.select_db("nowhere")
            connection.begin()
            connection.rollback()

    def test_choosing_inside_a_transaction_that_is_lost(self):
        connection = self.connect()
        self.insert(connection)
        self.lose(connection)
        with self.assertRaises(DisconnectionError):
            connection.select_db("test")
        self.assertEqual(connection.state, "doomed")
        with self.assertRaises(DisconnectionError):
            connection.select_db("test")
        connection.rollback()

    def test_a_database_that_somebody_else_has_dropped_is_an_error(self):
        self.customer()
        connection = self.connect()
        connection.select_db("customer")
        self.query("DROP DATABASE customer")
        self.lose(connection)
        with self.assertRaisesRegex(self.module.OperationalError, "Unknown database") as refused:
            connection.begin()
        self.assertNotIsInstance(refused.exception, TransientError)
        connection.reset()
        self.assertEqual(self.selected(connection)[0], "test")

    def test_converters_are_there_again(self):
        class Name:
            def __str__(self):
                return "one"

        connection = self.connect()
        connection.encoders[Name] = lambda value, *rest: f"'{value}'"
        for _ in range(2):
            connection.cursor().execute("INSERT INTO item VALUES (%s, 0)", (Name(),))
            connection.commit()
            self.assertEqual(self.names(), ["one"])
            self.query("DELETE FROM test.item")
            self.lose(connection)
        fork = connection.fork()
        self.addCleanup(fork.close)
        self.assertIn(Name, fork.encoders)
        del fork.encoders[Name]
        self.assertIn(Name, connection.encoders)

    def test_choosing_costs_no_round_trip(self):
        connection = self.connect()

        def use():
            with connection.transaction() as cursor:
                cursor.execute("USE test")
                cursor.execute("SET NAMES utf8mb4")

        use()
        self.assertEqual(self.round_trips(use), 4)

    def test_rows_that_wait_to_be_read_are_left_alone(self):
        connection = self.connect()
        cursor = connection.cursor("rows")
        cursor.execute("EXECUTE IMMEDIATE 'SELECT seq FROM seq_1_to_10 /* USE */'")
        self.assertEqual(len(list(cursor.fetchall())), 10)

    def test_modes_in_autocommit_mode(self):
        connection = self.connect()
        connection.set_session(isolation_level="SERIALIZABLE", readonly=True, autocommit=True)
        for _ in range(2):
            cursor = connection.cursor()
            cursor.execute("SELECT @@tx_isolation, @@tx_read_only")
            self.assertEqual(cursor.fetchone(), ("SERIALIZABLE", 1))
            connection.work.link.end()

    def test_a_cursor_class_as_the_modules_take_it(self):
        connection = self.connect()
        dictionaries = import_module(f"{self.module.__name__}.cursors").DictCursor
        for cursor in (
            connection.cursor(dictionaries),
            connection.cursor(cursor_factory=dictionaries),
            connection.cursor(cursor=dictionaries),
            connection.cursor(cursorclass=dictionaries),
        ):
            cursor.execute("SELECT 1 AS one")
            self.assertEqual(cursor.fetchall()[0], {"one": 1})
            self.assertTrue(self.driver.in_transaction(connection.driver_connection))
            connection.rollback()
        with self.assertRaisesRegex(TypeError, "no argument colour"):
            connection.cursor(colour="red").execute("SELECT 1")

    def test_the_usual_cursor_class_is_there_again(self):
        connection = self.connect()
        connection.cursorclass = import_module(f"{self.module.__name__}.cursors").DictCursor
        for _ in range(2):
            with connection.transaction() as cursor:
                cursor.execute("SELECT 1 AS one")
                self.assertEqual(cursor.fetchall()[0], {"one": 1})
            self.lose(connection)

    def test_begin_that_fails_leaves_no_transaction(self):
        raw = self.connect().driver_connection
        for rider in ("UPDATE nothing SET number = 1", "SELEKT"):
            with self.assertRaises(self.module.Error):
                self.driver.begin(raw, SessionSettings(), rider)
            self.assertFalse(self.driver.in_transaction(raw))

    def test_a_cursor_on_the_server(self):
        connection = self.connect()
        with connection.transaction():
            cursor = connection.cursor("numbers")
            cursor.execute("SELECT seq FROM seq_1_to_1000")
            self.assertIsInstance(cursor._raw, self.driver.server_side_cursor)
            self.assertEqual(list(cursor.fetchmany(2)), [(1,), (2,)])
            self.assertEqual(len(list(cursor)), 998)
            cursor.close()

    def test_a_cursor_on_the_server_that_nobody_has_read_to_the_end(self):
        connection = self.connect()
        connection.begin()
        cursor = connection.cursor("numbers")
        cursor.execute("SELECT seq FROM seq_1_to_100000")
        cursor.fetchone()
        connection.rollback()
        connection.run(self.insert, connection)
        self.assertEqual(self.names(), ["one"])

    def test_rows_on_the_server_are_gone_with_their_session(self):
        for read in (
            lambda cursor: cursor.fetchone(),
            lambda cursor: cursor.fetchmany(2),
            lambda cursor: cursor.fetchall(),
            list,
        ):
            connection = self.connect()
            cursor = connection.cursor("numbers")
            cursor.execute("SELECT seq FROM seq_1_to_1000000")
            cursor.fetchone()
            # A server that is told to end a session may have sent all rows before.
            self.forward.drop()
            connection.rollback()
            for _ in range(2):
                with self.assertRaisesRegex(self.module.InterfaceError, "are gone"):
                    read(cursor)
                connection.run(lambda: None)
            cursor.execute("SELECT 1")
            self.assertEqual(list(cursor.fetchall()), [(1,)])
            connection.rollback()

    def test_a_forked_child_leaves_the_session_to_its_parent(self):
        connection = self.connect()
        self.insert(connection)
        pid = os.fork()
        if pid == 0:
            status = 1
            with contextlib.suppress(BaseException):
                connection.rollback()
                connection.run(self.insert, connection, "child's")
                status = 0
            os._exit(status)
        self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)
        connection.commit()
        self.assertEqual(self.names(), ["child's", "one"])

    # Servers that take no writes

    def writer(self, **keywords):
        """A connection of somebody's whom ``read_only`` concerns."""
        self.query("CREATE USER IF NOT EXISTS writer@'%%' IDENTIFIED BY %s", self.server.password)
        self.addCleanup(self.query, "DROP USER IF EXISTS writer@'%'")
        self.query("GRANT ALL ON test.* TO writer@'%'")
        self.addCleanup(self.query, "SET GLOBAL read_only = 0")
        return self.connect(self.layer.dsn(user="writer"), **keywords)

    def is_waiting(self, events):
        return any(isinstance(event, ConnectionAttemptFailed) for event in events)

    def test_a_server_that_takes_no_writes_for_a_while_is_waited_for(self):
        self.connect(witness=Ledger()).run(lambda: None)
        for witness, is_connected, runs_needed in (
            (Ledger(), True, 1),
            (Ledger(), False, 1),
            (None, True, 2),
        ):
            with self.subTest(witness, is_connected=is_connected):
                self.query("DELETE FROM test.item")
                connection = self.writer(witness=witness, policy=RetryPolicy(timeout=PATIENCE))
                if is_connected:
                    connection.run(lambda: None)
                self.query("SET GLOBAL read_only = 1")
                runs = []

                def work():
                    runs.append(None)  # noqa: B023
                    self.insert(connection)  # noqa: B023

                running = threading.Thread(target=connection.run, args=(work,))
                with self.events() as events:
                    running.start()
                    wait_until(lambda: self.is_waiting(events))
                    self.query("SET GLOBAL read_only = 0")
                    running.join()
                self.assertEqual((self.names(), len(runs)), (["one"], runs_needed))

    def test_who_has_waited_in_vain_for_a_server_that_takes_writes_may_read(self):
        connection = self.writer(witness=None)
        connection.run(lambda: None)
        self.query("SET GLOBAL read_only = 1")
        with policy_of(connection, timeout=0), self.assertRaises(ReconnectTimeout) as gave_up:
            connection.run(self.insert, connection)
        self.assertIn("takes no writes", str(gave_up.exception))
        with connection.transaction() as cursor:
            cursor.execute("SELECT count(*) FROM item")
            self.assertEqual(cursor.fetchone(), (0,))

    def test_ddl_that_a_server_refuses_has_committed_nothing(self):
        connection = self.writer()
        self.insert(connection)
        self.query("SET GLOBAL read_only = 1")
        with self.assertRaises(DisconnectionError):
            connection.cursor().execute("CREATE TABLE other (number int)")
        connection.rollback()
        self.assertEqual(self.names(), [])

    def test_a_commit_that_a_server_refuses_has_committed_nothing(self):
        for witness in (None, Ledger()):
            with self.subTest(witness):
                connection = self.writer(witness=witness)
                self.insert(connection)
                self.query("SET GLOBAL read_only = 1")
                with self.events() as events, self.assertRaises(DisconnectionError):
                    connection.commit()
                self.assertFalse([event for event in events if isinstance(event, CommitLookedUp)])
                connection.rollback()
                self.query("SET GLOBAL read_only = 0")
                self.assertEqual(self.names(), [])

    def test_what_was_committed_before_a_commit_that_a_server_refuses(self):
        connection = self.writer(witness=None)
        self.insert(connection)
        connection.execute("CREATE TABLE other (number int)")
        self.insert(connection, "two")
        self.query("SET GLOBAL read_only = 1")
        with self.assertRaises(CommitOutcomeUnknown):
            connection.commit()
        connection.rollback()
        self.assertEqual(self.names(), ["one"])

    def test_a_read_only_connection_does_not_mind(self):
        connection = self.writer()
        connection.readonly = True
        self.query("SET GLOBAL read_only = 1")
        with self.assertRaises(self.module.OperationalError) as refused:
            self.insert(connection)
        self.assertEqual(mysql.errno(refused.exception), 1290)
        self.assertEqual(connection.state, "active")

    def test_what_says_that_a_server_takes_no_writes(self):
        error = self.module.OperationalError
        for refused, expected in {
            error(1290, "The server is running with the --super-read-only option"): True,
            error(1290, "The server is running with the --secure-file-priv option"): False,
            error(1036, "Table 'item' is read only"): True,
            error(1836, "Running in read-only mode"): True,
            error(1792, "Cannot execute statement in a READ ONLY transaction"): False,
        }.items():
            with self.subTest(refused):
                self.assertIs(self.driver.is_refused_by_standby(refused, None), expected)

    def test_a_node_without_its_cluster_is_waited_for(self):
        refused = self.module.OperationalError(1047, "WSREP has not yet prepared node")
        unknown = self.module.OperationalError(1047, "Unknown command")
        connection = self.connect()
        raw = connection.driver_connection
        self.assertIs(self.driver.meaning(refused, raw), Meaning.DISCONNECT)
        self.assertIs(self.driver.connect_meaning(refused, {}), Meaning.DISCONNECT)
        self.assertIs(self.driver.meaning(unknown, raw), Meaning.USER)
        self.assertIs(self.driver.connect_meaning(unknown, {}), Meaning.PERMANENT)
        refusals = iter([refused] * 3)
        execute_all = self.driver._execute_all

        def refuse(raw, statements):
            for refusal in refusals:
                raise refusal
            return execute_all(raw, statements)

        with mock.patch.object(self.driver, "_execute_all", refuse), self.events() as events:
            connection.run(self.insert, connection)
        self.assertTrue(self.is_waiting(events))
        self.assertEqual(self.names(), ["one"])

    # Round trips

    def test_round_trips(self):
        for witness in (None, "xid", Ledger()):
            for end in ("commit", "rollback"):
                with self.subTest(witness, end=end):
                    connection = self.connect(witness=witness)

                    def use(connection=connection, end=end):
                        cursor = connection.cursor()
                        cursor.execute("SELECT 1")
                        cursor.fetchall()
                        getattr(connection, end)()

                    use()
                    self.assertEqual(self.round_trips(use), 3)

    def test_a_server_without_compound_statements(self):
        with mock.patch.object(self.driver, "_is_mariadb", return_value=False):
            connection = self.connect()
            connection.set_session(isolation_level="READ COMMITTED")
            connection.run(lambda: None)
            # Five to begin, one statement, and three to commit.
            self.assertEqual(self.round_trips(lambda: connection.run(self.insert, connection)), 9)
            self.insert(connection, "two")
            connection.driver_connection.rollback()
            with self.assertRaises(self.module.InternalError):
                connection.commit()
            self.insert(connection, "three")
            connection.rollback()
            self.insert(connection, "four")
            self.forward.drop()
            with self.assertRaises(DisconnectionError):
                connection.commit()
        self.assertEqual(self.names(), ["one"])

    # Connecting

    def test_refusals_are_for_good_and_show_no_password(self):
        secret = self.server.password
        for dsn in (
            self.layer.dsn(user="nobody"),
            self.layer.dsn(dbname="nothing"),
            self.dsn.replace(secret, "wrong-password"),
        ):
            connection = self.connect(dsn)
            with self.assertRaises(self.module.OperationalError) as refused:
                connection.begin()
            self.assertNotIsInstance(refused.exception, DisconnectionError)
            for shown in (repr(connection), connection.server, str(refused.exception)):
                self.assertNotIn(secret, shown)
                self.assertNotIn("wrong-password", shown)

    def test_options(self):
        dsn = (
            f"{self.dsn}?charset=latin1&connect_timeout=5&ssl_mode=PREFERRED&read_timeout=7"
            "&sql_mode=ANSI_QUOTES"
        )
        cursor = self.connect(dsn).cursor()
        cursor.execute('SELECT @@character_set_client, @@sql_mode AS "mode"')
        self.assertEqual(cursor.fetchone(), ("latin1", "ANSI_QUOTES"))

    def test_a_server_without_tls_is_refused_if_tls_is_asked_for(self):
        for mode in ("REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY"):
            self.is_refused(f"ssl_mode={mode}")

    def test_what_the_server_or_the_module_does_not_know_is_refused(self):
        for option in ("charset=nothing", "collation=nothing", "sql_mode=nothing"):
            self.is_refused(option)

    def is_refused(self, option):
        with self.subTest(option), self.assertRaises((ValueError, self.module.Error)) as refused:
            self.connect(f"{self.dsn}?{option}").begin()
        self.assertNotIsInstance(refused.exception, DisconnectionError)

    def test_a_socket_of_the_file_system(self):
        path = self.server._temporary / "socket"
        self.query("CREATE OR REPLACE USER local@localhost IDENTIFIED BY 'p'")
        self.addCleanup(self.query, "DROP USER local@localhost")
        connection = self.connect(f"mysql://local:p@localhost?unix_socket={path}", witness=None)
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        self.assertEqual(cursor.fetchall()[0][0], 1)

    def test_what_a_certificate_says_is_for_good(self):
        error = self.module.OperationalError
        meaning = {
            error(2026, "SSL connection error: certificate verify failed"): Meaning.PERMANENT,
            error(2026, "SSL connection error: unexpected eof"): Meaning.DISCONNECT,
            error(2026, "TLS/SSL error: No such file or directory (2)"): Meaning.PERMANENT,
            error(2026, "TLS/SSL error: tlsv1 alert unknown ca"): Meaning.PERMANENT,
            error(2019, "Can't initialize character set"): Meaning.PERMANENT,
            error(2061, "Authentication plugin error"): Meaning.PERMANENT,
            caused_by(ssl.SSLCertVerificationError(), error(2003)): Meaning.PERMANENT,
            caused_by(ssl.SSLEOFError(), error(2006)): Meaning.DISCONNECT,
            caused_by(ssl.SSLError(), error(2013)): Meaning.PERMANENT,
            caused_by(ConnectionRefusedError(), error(2003)): Meaning.DISCONNECT,
            error(2005, "Unknown host"): Meaning.DISCONNECT,
            error(1193, "Unknown system variable"): Meaning.PERMANENT,
            error("strange"): Meaning.PERMANENT,
            self.module.ProgrammingError(2019, "strange"): Meaning.PERMANENT,
            TimeoutError(): Meaning.DISCONNECT,
        }
        for each, expected in meaning.items():
            with self.subTest(each):
                self.assertIs(self.driver.connect_meaning(each, {}), expected)

    def test_several_results_and_iterations(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute(
            "CREATE PROCEDURE two_results() BEGIN"
            " SELECT 1 UNION SELECT 2; SELECT 3 UNION SELECT 4; END"
        )
        for read in (list, lambda cursor: next(iter(cursor))):
            cursor.callproc("two_results")
            read(cursor)
            self.assertTrue(cursor.nextset())
            self.assertEqual(list(cursor.fetchall()), [(3,), (4,)])
            while cursor.nextset():
                pass
        cursor.execute("DROP PROCEDURE two_results")

    def test_an_iteration_is_that_of_the_cursors_class(self):
        class Own(import_module(f"{self.module.__name__}.cursors").Cursor):
            def fetchone(self):
                row = super().fetchone()
                return None if row is None else ("one", *row)

        cursor = self.connect().cursor(cursor_factory=Own)
        cursor.execute("SELECT 1 UNION SELECT 2")
        self.assertEqual(list(cursor), [("one", 1), ("one", 2)])

    def test_a_factorys_connection(self):
        parameters = self.driver.parse(self.dsn)
        connection = ReconnectingConnection(
            lambda: self.driver.connect(parameters, PATIENCE), self.driver_name
        )
        self.addCleanup(connection.close)
        connection.run(self.insert, connection)
        self.assertEqual(connection.server, self.driver.address(parameters))

    def test_reading(self):
        cursor = mock.Mock()
        for statement, expected in {"select 1": True, "INSERT": False, "SHOW TABLES": True}.items():
            cursor.zreconnect_sent = statement
            self.assertIs(self.driver.looks_like_reading(cursor), expected)

    def test_bytes_as_statement(self):
        connection = self.connect()
        connection.cursor().execute(b"CREATE TABLE other (number int)")
        self.assertTrue(self.driver.has_committed(connection.driver_connection))

    def test_two_phase_is_refused(self):
        raw = self.connect().driver_connection
        with self.assertRaises(self.module.NotSupportedError):
            self.driver.prepare_transaction(raw, "gid")

    def test_tls_files(self):
        files = {"ssl_ca": "ca", "ssl_cert": "cert", "ssl_key": "key"}
        keywords = self.driver.tls_keywords(files)
        self.assertIn("ca", {**keywords, **keywords.get("ssl", {})}.values())


@on_mariadb()
class PymysqlTests(Tests, LineTestCase):
    driver_name = "pymysql"

    def test_the_modules_own_ping_does_not_replace_the_session(self):
        connection = self.connect()
        self.insert(connection)
        self.lose(connection)
        raw = connection.driver_connection
        with self.assertRaises(pymysql.Error):
            raw.ping()
        with self.assertWarns(DeprecationWarning), self.assertRaises(pymysql.NotSupportedError):
            raw.ping(reconnect=True)
        with self.assertRaises(DisconnectionError):
            self.insert(connection, "two")
        connection.rollback()
        self.assertEqual(self.names(), [])

    def test_the_old_name_for_choosing_a_character_set(self):
        connection = self.connect()
        connection.set_charset("latin1")
        self.assert_chosen_again(connection, "test", LATIN1)

    def test_an_address_that_is_silent_keeps_no_other_from_being_tried(self):
        def addresses(parameters):
            found = [] if "hostaddr" in parameters else ["127.0.0.9", "127.0.0.1"]
            return [{**parameters, "hostaddr": address} for address in found]

        dsn = self.server.dsn(host="mariadb")
        with (
            socket.create_server(("127.0.0.9", self.server.port)),
            mock.patch("zreconnect.drivers.pymysql.addresses", addresses),
            mock.patch.object(type(FAIL_FAST), "longest_attempt", return_value=3.0),
        ):
            connection = self.connect(dsn, policy=FAIL_FAST)
            connection.run(self.insert, connection)
        self.assertEqual(connection.driver_connection.host, "mariadb")

    def test_rows_on_the_server_that_are_read_to_the_end_stay_so(self):
        connection = self.connect()
        cursor = connection.cursor("numbers")
        cursor.execute("SELECT seq FROM seq_1_to_3")
        self.assertEqual(len(cursor.fetchall()), 3)
        connection.rollback()
        self.lose(connection)
        connection.run(lambda: None)
        self.assertIsNone(cursor.fetchone())
        self.assertEqual(list(cursor.fetchall()), [])

    def test_one_place(self):
        for dsn in ("mysql://127.0.0.1/db", "mysql://localhost/db?unix_socket=/s"):
            parameters = self.driver.parse(dsn)
            self.assertEqual(self.driver.places(parameters), [parameters])

    def test_a_closed_connection_has_no_socket(self):
        raw = self.connect().driver_connection
        self.driver.close(raw)
        with self.assertRaises(pymysql.InterfaceError):
            self.driver.fileno(raw)
        self.driver.close(raw)
        self.driver.abandon(raw)


@on_mariadb()
@needs_mysqlclient
class MysqlclientTests(Tests, LineTestCase):
    driver_name = "mysqlclient"

    def test_the_sql_mode_is_there_again(self):
        connection = self.connect()
        connection.set_sql_mode("ANSI_QUOTES")
        self.lose(connection)
        cursor = connection.cursor()
        cursor.execute('SELECT @@sql_mode AS "mode"')
        self.assertEqual(cursor.fetchone(), ("ANSI_QUOTES",))

    def test_the_time_is_shared_among_addresses(self):
        for dsn, expected in {
            "mysql://db/x": 5,
            "mysql://localhost/x": 10,
            "mysql://db/x?unix_socket=/s": 10,
            "mysql:///x?charset=utf8": 10,
        }.items():
            found = [(0, 0, 0, "", (address, 0)) for address in ("::1", "127.0.0.1")]
            with (
                mock.patch("socket.getaddrinfo", return_value=found),
                mock.patch.object(self.module, "connect") as connect,
            ):
                self.driver.connect(self.driver.parse(dsn), 10.0)
            self.assertEqual(connect.call_args.kwargs["connect_timeout"], expected, dsn)


@on_mariadb()
class RollbackOnTimeoutTests(unittest.TestCase):
    def test_the_server_is_asked(self):
        with EmbeddedMariaDB(settings={"innodb_rollback_on_timeout": "ON"}) as server:
            server.query("CREATE TABLE item (number int PRIMARY KEY)")
            other = server._connect("test", PATIENCE)
            other.begin()
            other.cursor().execute("INSERT INTO item VALUES (1)")
            connection = zreconnect.connect(server.dsn(), "pymysql", witness=Ledger())
            cursor = connection.cursor()
            cursor.execute("SET innodb_lock_wait_timeout = 1")
            cursor.execute("INSERT INTO item VALUES (2)")
            with self.assertRaisesRegex(pymysql.OperationalError, "Lock wait timeout"):
                cursor.execute("INSERT INTO item VALUES (1)")
            with self.assertRaises(pymysql.InternalError):
                connection.commit()
            other.close()
            self.assertEqual(server.query("SELECT number FROM item"), [])
            connection.close()


@with_time_to_connect
@on_mariadb()
@needs_openssl
class TlsTests(unittest.TestCase):
    def setUp(self):
        self.certificate, key = make_certificate(self)
        self.server = EmbeddedMariaDB(settings={"ssl_cert": self.certificate, "ssl_key": key})
        self.server.start()
        self.addCleanup(self.server.stop)
        self.server.query("CREATE USER nopassword@'%'")
        self.server.query("GRANT SELECT ON *.* TO nopassword@'%'")

    def cipher(self, driver, options, dsn=None):
        dsn = f"{dsn or self.server.dsn()}?{options}"
        connection = zreconnect.connect(dsn, driver, policy=FAIL_FAST, witness=None)
        self.addCleanup(connection.close)
        cursor = connection.cursor()
        cursor.execute("SHOW STATUS LIKE 'Ssl_cipher'")
        ((_, cipher),) = cursor.fetchall()
        return cipher

    def test_modes(self):
        drivers = ["pymysql"] + ["mysqlclient"] * (importlib.util.find_spec("MySQLdb") is not None)
        # MariaDB's client library 3.4 takes any certificate from a server that proves itself by the
        # password, and any from 127.0.0.1.
        nopassword = self.server.dsn(user="nopassword", host="127.1")
        nopassword = nopassword.replace(f":{self.server.password}@", "@")
        for driver in drivers:
            with self.subTest(driver):
                self.assertTrue(self.cipher(driver, "ssl_mode=REQUIRED", nopassword))
                self.assertTrue(self.cipher(driver, "ssl_mode=REQUIRED"))
                for mode in ("VERIFY_CA", "VERIFY_IDENTITY"):
                    verified = f"ssl_mode={mode}&ssl_ca="
                    self.assertTrue(self.cipher(driver, f"{verified}{self.certificate}"))
                    # Who has signed it is not among those of the system.
                    error = load_driver(driver).module.OperationalError
                    with self.assertRaisesRegex(error, "certificate") as refused:
                        self.cipher(driver, f"ssl_mode={mode}", nopassword)
                    self.assertNotIsInstance(refused.exception, DisconnectionError)
                for option in ("ssl_ca=/missing", "ssl_mode=REQUIRED&ssl_cert=/no&ssl_key=/no"):
                    # PyMySQL reads the files earlier.
                    errors = (ValueError, load_driver(driver).module.OperationalError)
                    with self.assertRaises(errors) as refused:
                        self.cipher(driver, option)
                    self.assertNotIsInstance(refused.exception, DisconnectionError)


class DsnTests(unittest.TestCase):
    driver = load_driver("pymysql")

    def test_parts(self):
        self.assertEqual(
            self.driver.parse("mysql://me%40here:s%2Fecret@host:3307/my%20db?charset=latin1"),
            {
                "user": "me@here",
                "password": "s/ecret",
                "host": "host",
                "port": "3307",
                "dbname": "my db",
                "charset": "latin1",
            },
        )

    def test_what_is_wrong_is_named(self):
        for dsn, message in {
            "mysql://h:port/db": "no URL of the form",
            "mysql:///": "has not the form",
            "mysql://host/db#part": "has not the form",
            "oracle://host/db": "has not the form",
            "mysql://host:0/db": "has not the form",
            "mysql://host/db?colour=red": "unknown option 'colour'",
            "mysql://host/db?charset=nothing": "does not know the charset",
            "mysql://host/db?ssl_ca=/missing": "FileNotFoundError: No such file or directory",
            "mysql://host/db?write_timeout=0": "refuses an option, with ValueError",
            "mysql://host/db?connect_timeout=soon": "connect_timeout must be a whole number",
            "mysql://host/db?ssl_mode=maybe": "ssl_mode must be one of",
        }.items():
            with self.subTest(dsn), self.assertRaisesRegex(ValueError, message):
                self.driver.parse(dsn)

    def test_what_a_signals_handler_raises_is_none_of_it(self):
        class TimeIsUp(Exception):
            pass

        with mock.patch("pymysql.connect", side_effect=TimeIsUp):
            self.assertRaises(TimeIsUp, self.driver.parse, "mysql://host/db")

    def test_the_driver_for_the_scheme(self):
        for found, name in ((None, "pymysql"), (object(), "mysqlclient")):
            with mock.patch("zreconnect.dsn.importlib.util.find_spec", return_value=found):
                self.assertEqual(driver_name("mysql://host/db"), name)
        self.assertEqual(server_from_dsn("mysql://host/db", "pymysql").driver.name, "pymysql")

    def test_levels(self):
        self.assertEqual(self.driver.isolation_level("repeatable-read"), "REPEATABLE READ")
        self.assertIsNone(self.driver.isolation_level("default"))

    def test_what_each_module_has_of_its_own(self):
        for incomplete in (lambda: MysqlDriver().tls_keywords({}), lambda: MysqlDriver().fileno(0)):
            self.assertRaises(NotImplementedError, incomplete)

    def test_a_statement_of_its_own_module(self):
        self.assertEqual(import_module("zreconnect.drivers.pymysql").driver, self.driver)
        self.assertTrue(self.driver.begins_read_only(None, SessionSettings(readonly=True)))
