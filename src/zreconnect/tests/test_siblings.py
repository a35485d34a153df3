"""Several connections in one transaction, each of which commits by itself."""

import logging
import pickle
import sqlite3
import tempfile
import unittest
from contextlib import closing
from pathlib import Path

import psycopg
import transaction
from transaction.interfaces import TransientError
from zope.publisher.interfaces import Retry

import zreconnect
from zreconnect import (
    CommitOutcomeUnknown,
    ConnectionDescriptor,
    DisconnectionError,
    Ledger,
    PartlyCommitted,
    ReconnectingDatabaseAdapter,
    XidWitness,
    initZopeless,
)
from zreconnect.datamanager import join_transactions
from zreconnect.events import CommittedInPart
from zreconnect.recovery import recover
from zreconnect.siblings import has_written
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests.base import (
    DatabaseTestCase,
    LineTestCase,
    needs_mysqlclient,
    on_mariadb,
    wait_until,
)

SETTINGS = {"fsync": "off", "max_prepared_transactions": 5}
LAYER = PortForwardLayer(PostgresLayer("SiblingsPostgresLayer", SETTINGS), "SiblingsForwardLayer")
WITNESSES = ("xid", XidWitness(at_commit=True), Ledger(), None)


class Between:
    """A data manager whose vote comes between those of two connections."""

    transaction_manager = transaction.manager

    def __init__(self, before, vote):
        self._before = before
        self._vote = vote

    def sortKey(self):
        return self._before.work.member.sortKey() + "~"

    def tpc_vote(self, transaction):
        self._vote()

    def nothing(self, transaction):
        pass

    abort = tpc_begin = commit = tpc_finish = tpc_abort = nothing


class TimeLimit(Exception):
    """What a handler of SIGALRM raises in many a program."""


class SiblingTests:
    """`first` commits before `second` does."""

    witness = "xid"
    #: Whether the server tells whether a transaction has written.
    tells_what_has_written = True

    def setUp(self):
        super().setUp()
        self.open(self.witness)

    def open(self, witness):
        """Two connections to two databases."""
        self.databases = [self.fresh_database() for _ in range(2)]
        connections = [self.connection(dsn, witness) for dsn in self.databases]
        for connection in connections:
            join_transactions(connection, transaction.manager)
        # As their data managers sort.
        self.first, self.second = sorted(connections, key=lambda each: str(id(each)))

    def fresh_database(self):
        """The DSN of a database with a table in it."""
        dbname = self.server.fresh_database().rpartition("/")[2]
        self.server.query("CREATE TABLE item (name varchar(20))", dbname=dbname)
        dsn = self.layer.dsn(dbname=dbname)
        # Not by a session of the test's, which would have written then.
        with closing(zreconnect.connect(dsn, driver=self.driver, witness=Ledger())) as connection:
            connection.begin()
        return dsn

    def connection(self, dsn, witness):
        connection = zreconnect.connect(dsn, driver=self.driver, witness=witness)
        self.addCleanup(connection.close)
        return connection

    def execute(self, connection, statement):
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if statement.startswith("SELECT") else None

    def insert(self, *connections):
        for connection in connections:
            self.execute(connection, "INSERT INTO item VALUES ('one')")

    def read(self, connection):
        self.execute(connection, "SELECT name FROM item")

    def numbers(self):
        """How many items are in the databases of the first and of the second."""
        transaction.abort()
        numbers = []
        for each in (self.first, self.second):
            ((number,),) = self.execute(each, "SELECT count(*) FROM item")
            numbers.append(number)
            transaction.abort()
        return numbers

    def between(self, function, *args):
        """Call it when the first has voted, and the second has not."""
        transaction.get().join(Between(self.first, lambda: function(*args)))

    def assert_partly_committed(self, committed=(), not_committed=(), unknown=()):
        with self.events() as seen, self.assertRaises(PartlyCommitted) as caught:
            transaction.commit()
        error = caught.exception
        self.assertNotIsInstance(error, (Retry, TransientError))
        (told,) = (event for event in seen if isinstance(event, CommittedInPart))
        self.assertEqual(
            (told.committed, told.not_committed, told.unknown, told.error, told.level),
            (error.committed, error.not_committed, error.unknown, error, logging.ERROR),
        )
        for found, connections in [
            (error.committed, committed),
            (error.not_committed, not_committed),
            (error.unknown, unknown),
        ]:
            self.assertEqual(found, tuple(each.server for each in connections))
        return error

    def test_a_loss_before_the_first_commit_has_the_work_run_again(self):
        for lost in (self.first, self.second):
            runs = []

            def work(runs=runs, lost=lost):
                runs.append(1)
                self.insert(self.first, self.second)
                if len(runs) == 1:
                    self.lose(lost)

            transaction.manager.run(work)
            self.assertEqual(len(runs), 2)
        self.assertEqual(self.numbers(), [2, 2])

    def test_a_loss_after_the_first_commit_is_told(self):
        self.insert(self.first, self.second)
        self.between(self.lose, self.second)
        error = self.assert_partly_committed(committed=[self.first], not_committed=[self.second])
        self.assertIsInstance(error.__cause__, DisconnectionError)
        self.assertIn(
            f"committed in {self.first.server}, not committed in {self.second.server}", str(error)
        )
        transaction.abort()
        self.assertEqual(self.numbers(), [1, 0])
        self.insert(self.first, self.second)
        transaction.commit()
        self.assertEqual(self.numbers(), [2, 1])

    def test_what_was_rolled_back_before_has_not_committed(self):
        self.insert(self.first)
        self.first.rollback()
        self.insert(self.second)
        self.between(self.lose, self.second)
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        transaction.abort()
        self.assertEqual(self.numbers(), [0, 0])

    def test_a_rollback_meanwhile_hides_no_commit(self):
        """Who is told that the first is found to be committed rolls it back, in vain."""
        self.insert(self.first, self.second)

        def meanwhile():
            with self.assertRaises(CommitOutcomeUnknown):
                self.first.rollback()
            self.lose(self.second)

        self.between(meanwhile)
        self.assert_partly_committed(committed=[self.first], not_committed=[self.second])
        transaction.abort()

    def test_nobody_runs_it_again(self):
        runs = []

        def work():
            runs.append(1)
            self.insert(self.first, self.second)
            self.between(self.lose, self.second)

        with self.assertRaises(PartlyCommitted):
            transaction.manager.run(work)
        self.assertEqual(len(runs), 1)
        self.assertEqual(self.numbers(), [1, 0])

    def test_that_the_second_is_unknown_is_told(self):
        self.open(None)
        self.insert(self.first, self.second)
        self.between(self.lose, self.second)
        error = self.assert_partly_committed(committed=[self.first], unknown=[self.second])
        self.assertIsInstance(error, CommitOutcomeUnknown)
        transaction.abort()
        self.assertEqual(self.numbers(), [1, 0])

    def test_that_the_first_is_unknown_is_told(self):
        self.open(None)
        self.insert(self.first, self.second)
        # Before any of them votes, and after all were asked.
        member = Between(self.first, lambda: self.lose(self.first))
        member.sortKey = lambda: "~"
        transaction.get().join(member)
        self.assert_partly_committed(unknown=[self.first], not_committed=[self.second])
        transaction.abort()
        self.assertEqual(self.numbers(), [0, 0])

    def test_an_interrupt_passes_and_is_told_afterwards(self):
        self.insert(self.first, self.second)

        def interrupt():
            raise KeyboardInterrupt

        self.between(interrupt)
        with self.assertRaises(KeyboardInterrupt):
            transaction.commit()
        with self.assertRaises(CommitOutcomeUnknown) as caught:
            transaction.abort()
        self.assertEqual(caught.exception.outcome, "committed")
        self.assertEqual(self.numbers(), [1, 0])

    def test_a_time_limit_in_a_commit(self):
        """Whether its COMMIT has arrived is not known before it is looked up."""
        for arrives in (True, False):
            with self.subTest(arrives=arrives):
                self.open(self.witness)
                self.insert(self.first, self.second)
                self.between(self.limit_commit, arrives)
                error = self.assert_partly_committed(committed=[self.first], unknown=[self.second])
                self.assertIsInstance(error.__cause__, TimeLimit)
                if arrives:
                    with self.assertRaises(CommitOutcomeUnknown) as caught:
                        transaction.abort()
                    self.assertEqual(caught.exception.outcome, "committed")
                self.assertEqual(self.numbers(), [1, int(arrives)])

    def test_a_time_limit_in_a_commit_of_who_has_only_read(self):
        if not self.tells_what_has_written:
            self.skipTest("this server does not tell what has only read")
        self.insert(self.first)
        self.read(self.second)
        self.between(self.limit_commit, True)
        with self.assertRaises(TimeLimit):
            transaction.commit()
        with self.assertRaises(CommitOutcomeUnknown) as caught:
            transaction.abort()
        self.assertEqual(caught.exception.outcome, "committed")
        self.assertEqual(self.numbers(), [1, 0])

    def limit_commit(self, arrives):
        """The next COMMIT of any connection of this driver is interrupted."""
        driver = self.second.work.link.driver

        def commit(raw, *args):
            del driver.commit, driver.is_at_rest
            if arrives:
                driver.commit(raw, *args)
            driver.is_at_rest = busy
            raise TimeLimit

        def busy(raw):
            del driver.is_at_rest
            return False

        driver.commit, driver.is_at_rest = commit, busy

    def test_who_had_only_read_when_it_was_asked(self):
        """It writes later, when another data manager votes."""
        for writes_late in (self.first, self.second):
            with self.subTest(is_first=writes_late is self.first):
                self.read(self.first)
                self.read(self.second)
                self.insert(self.second if writes_late is self.first else self.first)
                member = Between(self.first, lambda each=writes_late: self.insert(each))
                member.sortKey = lambda: "z"
                transaction.get().join(member)
                self.between(self.lose, self.second)
                self.assert_partly_committed(committed=[self.first], not_committed=[self.second])
                transaction.abort()
        self.assertEqual(self.numbers(), [2, 0])

    def test_of_who_has_only_read_nothing_is_missing(self):
        if not self.tells_what_has_written:
            self.skipTest("this server does not tell what has only read")
        self.open(None)
        self.insert(self.first)
        self.read(self.second)
        member = Between(self.first, lambda: self.lose(self.first))
        member.sortKey = lambda: "~"
        transaction.get().join(member)
        with self.assertRaises(CommitOutcomeUnknown) as caught:
            transaction.commit()
        self.assertNotIsInstance(caught.exception, PartlyCommitted)
        transaction.abort()
        self.assertEqual(self.numbers(), [0, 0])

    def test_the_loss_of_what_has_only_read_harms_nobody(self):
        if not self.tells_what_has_written:
            self.skipTest("this server does not tell what has only read")
        for witness in WITNESSES:
            self.open(witness)
            for reader, writer in [(self.first, self.second), (self.second, self.first)]:
                with self.subTest(witness, reader_is_first=reader is self.first):
                    self.read(reader)
                    self.insert(writer)
                    self.between(self.lose, reader)
                    with self.assertLogs("zreconnect", "DEBUG") as logs:
                        logging.getLogger("zreconnect").debug("committing")
                        transaction.commit()
                    self.assertNotIn("two_phase", "".join(logs.output))
            self.assertEqual(self.numbers(), [1, 1])

    def test_a_second_one_that_writes_is_announced_once(self):
        with self.assertLogs("zreconnect", "WARNING") as logs:
            for _ in range(2):
                self.insert(self.first, self.second)
                transaction.commit()
        (line,) = logs.output
        for expected in (self.first.server, self.second.server, "two_phase=True"):
            self.assertIn(expected, line)

    def test_one_that_writes_is_not_announced(self):
        with self.assertNoLogs("zreconnect", "WARNING"):
            self.insert(self.first)
            transaction.commit()

    def test_one_round_trip_each_before_the_first_commit(self):
        self.insert(self.first, self.second)
        transaction.commit()

        def both():
            self.insert(self.first, self.second)
            transaction.commit()

        def one():
            self.insert(self.first)
            transaction.commit()

        self.assertEqual(self.round_trips(both), 2 * self.round_trips(one) + 2)


class PostgreSQLTests(SiblingTests):
    layer = LAYER

    def lose(self, connection):
        pid = connection.work.link.session.raw.info.backend_pid
        self.server.terminate_backend(pid)
        wait_until(lambda: not self.query("SELECT 1 FROM pg_stat_activity WHERE pid = %s", pid))

    def test_a_lock_is_held_until_its_connection_votes(self):
        """Also if it sorts after the one that writes."""
        self.server.query("INSERT INTO item VALUES ('lock')", dbname=self.dbname_of(self.second))
        self.execute(self.second, "SELECT name FROM item FOR UPDATE")
        self.insert(self.first)
        found = []

        def look():
            found.extend(
                self.server.query(
                    "SELECT name FROM item FOR UPDATE SKIP LOCKED",
                    dbname=self.dbname_of(self.second),
                )
            )

        self.between(look)
        transaction.commit()
        self.assertEqual(found, [])

    def test_a_role_that_may_not_look_at_locks(self):
        for connection in (self.first, self.second):
            self.server.query(
                "REVOKE SELECT ON pg_locks, pg_stat_xact_sys_tables FROM PUBLIC;"
                "GRANT ALL ON SCHEMA public TO PUBLIC; GRANT ALL ON item TO PUBLIC",
                dbname=self.dbname_of(connection),
            )
        self.server.query("DROP ROLE IF EXISTS anybody; CREATE ROLE anybody")
        for connection in (self.first, self.second):
            self.execute(connection, "SET LOCAL ROLE anybody")
        self.insert(self.first, self.second)
        transaction.commit()
        self.assertEqual(self.numbers(), [1, 1])

    def dbname_of(self, connection):
        return connection.server.rpartition("/")[2]

    def query_first(self, statement):
        """Past the first connection, in its database."""
        self.server.query(statement, dbname=self.dbname_of(self.first))

    def test_a_failed_statement_is_met_before_the_first_commit(self):
        for failed, other in [(self.first, self.second), (self.second, self.first)]:
            self.insert(other)
            with self.assertRaises(self.module.Error):
                self.execute(failed, "nonsense")
            with self.assertRaises(self.module.InternalError):
                transaction.commit()
            self.assertEqual(self.numbers(), [0, 0])

    def test_a_refused_commit_runs_nothing_again(self):
        self.execute(
            self.second,
            "CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE SQLSTATE '40001'; END $$;"
            "CREATE CONSTRAINT TRIGGER conflict AFTER INSERT ON item INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION conflict();",
        )
        transaction.commit()
        self.insert(self.first, self.second)
        self.assert_partly_committed(committed=[self.first], not_committed=[self.second])
        self.assertEqual(self.numbers(), [1, 0])

    def test_a_branch_of_two_phases_is_not_committed(self):
        branch = zreconnect.connect(self.fresh_database(), driver=self.driver, two_phase=True)
        self.addCleanup(branch.close)
        self.insert(branch, self.first, self.second)
        self.between(self.lose, self.second)
        self.assert_partly_committed(committed=[self.first], not_committed=[self.second, branch])
        self.assertEqual(self.query("SELECT gid FROM pg_prepared_xacts"), [])

    def test_one_that_commits_by_itself_and_one_in_two_phases(self):
        branch = zreconnect.connect(self.fresh_database(), driver=self.driver, two_phase=True)
        self.addCleanup(branch.close)
        self.insert(branch, self.first)
        transaction.get().join(member := Between(self.first, lambda: self.lose(self.first)))
        member.sortKey = lambda: "~"
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        self.assertEqual(self.numbers(), [0, 0])

    def test_a_branch_that_somebody_has_rolled_back(self):
        """When it is to finish, the one that commits by itself has committed."""
        dsn = self.fresh_database()
        branch = zreconnect.connect(dsn, driver=self.driver, two_phase=True)
        self.addCleanup(branch.close)
        self.insert(branch, self.first)
        member = Between(self.first, lambda: recover(dsn, older_than=0, settle=True))
        member.sortKey = lambda: "~~"
        transaction.get().join(member)
        self.assert_partly_committed(committed=[self.first], not_committed=[branch])
        transaction.abort()
        self.assertEqual(self.numbers(), [1, 0])

    def test_who_has_notified_has_committed(self):
        """No lock shows it, so it must not be done twice."""
        self.execute(self.first, "NOTIFY news")
        self.insert(self.second)
        self.between(self.lose, self.second)
        self.assert_partly_committed(committed=[self.first], not_committed=[self.second])
        transaction.abort()

    def test_what_counts_as_writing(self):
        self.open(Ledger())
        statements = {
            "SELECT name FROM item FOR UPDATE": False,
            "SET LOCAL work_mem = '1MB'": False,
            "SELECT count(*) FROM pg_class": False,
            "DELETE FROM item": True,
            "SELECT name FROM written()": True,
            "CREATE TABLE other (name text)": True,
            "CREATE TEMPORARY TABLE other (name text)": True,
            "TRUNCATE item": True,
            "SELECT lo_create(0)": True,
            "CREATE FUNCTION one() RETURNS integer LANGUAGE sql AS 'SELECT 1'": True,
        }
        self.query_first(
            "CREATE FUNCTION written() RETURNS SETOF item LANGUAGE sql AS"
            " $$ INSERT INTO item VALUES ('one') RETURNING * $$"
        )
        savepoint = self.first.savepoint()
        self.insert(self.first)
        self.assertTrue(has_written(self.first.guard))
        savepoint.rollback()
        self.assertFalse(has_written(self.first.guard))
        for statement, expected in statements.items():
            with self.subTest(statement):
                self.execute(self.first, statement)
                self.assertIs(has_written(self.first.guard), expected)
                transaction.abort()


class Psycopg2Tests(PostgreSQLTests, DatabaseTestCase):
    pass


class PsycopgTests(PostgreSQLTests, DatabaseTestCase):
    driver = "psycopg"
    module = psycopg


class MySQLTests(SiblingTests):
    witness = Ledger()
    tells_what_has_written = False

    def setUp(self):
        self.server = self.layer.server
        self.forward = self.layer.forward
        self.addCleanup(transaction.abort)
        super().setUp()

    def lose(self, connection):
        session = connection.work.link.session.raw.thread_id()
        self.server.kill_session(session)
        wait_until(lambda: session not in self.server.session_ids())


@on_mariadb()
class PyMySQLTests(MySQLTests, LineTestCase):
    driver = "pymysql"


@needs_mysqlclient
@on_mariadb()
class MysqlclientTests(MySQLTests, LineTestCase):
    driver = "mysqlclient"


def be_impatient(raw):
    raw.execute("PRAGMA busy_timeout = 100")


class SQLiteTests(unittest.TestCase):
    """No session is lost, but a COMMIT can be refused that may succeed later."""

    def test_a_refused_commit_runs_nothing_again(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.addCleanup(transaction.abort)
        connections = []
        for name in ("one", "two"):
            path = Path(holder.name, name)
            connection = zreconnect.connect(f"sqlite:///{path}", on_connect=be_impatient)
            self.addCleanup(connection.close)
            connection.execute("CREATE TABLE item (name text)")
            connection.commit()
            join_transactions(connection, transaction.manager)
            connections.append((str(id(connection)), connection, path))
        (_, first, _), (_, second, path) = sorted(connections)
        # Who reads keeps the other one from committing, not from writing.
        reader = sqlite3.connect(path, isolation_level=None)
        self.addCleanup(reader.close)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM item").fetchall()
        for connection in (first, second):
            connection.execute("INSERT INTO item VALUES ('one')")
        with self.assertRaises(PartlyCommitted) as caught:
            transaction.commit()
        self.assertEqual(caught.exception.committed, (first.server,))
        self.assertEqual(caught.exception.not_committed, (second.server,))
        self.assertNotIsInstance(caught.exception, TransientError)


class PartlyCommittedTests(unittest.TestCase):
    def test_it_can_be_pickled(self):
        error = PartlyCommitted(("one",), ("two",), ("three",), "the reason")
        copy = pickle.loads(pickle.dumps(error))
        self.assertEqual(str(copy), str(error))
        self.assertEqual(copy.args, error.args)
        self.assertEqual(
            (copy.committed, copy.not_committed, copy.unknown), (("one",), ("two",), ("three",))
        )
        self.assertIn(
            "committed in one, not committed in two, perhaps committed in three", str(copy)
        )


class TwoPhaseTests(DatabaseTestCase):
    """Whoever makes connections can make them commit in two phases."""

    layer = LAYER

    def check(self, *cursors):
        for cursor in cursors:
            cursor.execute("CREATE TABLE item (name text)")
        names = [type(each).__name__ for each in transaction.get()._resources]
        self.assertEqual(names, ["TwoPhaseDataManager"] * len(cursors))
        transaction.commit()

    def test_adapters(self):
        adapters = [
            ReconnectingDatabaseAdapter(self.server.fresh_database(), two_phase=True)
            for _ in range(2)
        ]
        for adapter in adapters:
            self.addCleanup(adapter.disconnect)
        self.check(*(pickle.loads(pickle.dumps(each))().cursor() for each in adapters))

    def test_what_has_committed_within_run_is_not_run_again(self):
        self.make_table()
        manager = initZopeless(self.dsn, implicitBegin=False, two_phase=True)
        self.addCleanup(manager.uninstall)
        runs = []

        def work():
            runs.append(1)
            manager.cursor().execute("INSERT INTO item VALUES (%s)", (f"run {len(runs)}",))
            manager.commit()
            manager.begin()
            manager.cursor().execute("SELECT 1")
            self.forward.drop()
            manager.cursor().execute("SELECT 1")

        with self.assertRaises(DisconnectionError):
            manager.run(work)
        self.assertEqual(self.names(), ["run 1"])

    def test_init_zopeless_and_a_descriptor(self):
        manager = initZopeless(self.dsn, implicitBegin=False, two_phase=True)
        self.addCleanup(manager.uninstall)
        descriptor = ConnectionDescriptor(self.server.fresh_database(), two_phase=True)
        self.addCleanup(descriptor.close)
        manager.begin()
        self.check(manager.cursor(), descriptor.connection().cursor())
