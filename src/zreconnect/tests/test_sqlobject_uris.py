"""SQLObject's own transactions and autocommit, on connections that reconnect."""

import gc
import threading
from unittest import mock

import sqlobject
from sqlobject import StringCol, dberrors
from sqlobject.dbconnection import TheURIOpener
from transaction.interfaces import TransientError

from zreconnect import (
    FAIL_FAST,
    CommitOutcomeUnknown,
    DisconnectionError,
    Ledger,
    ReconnectTimeout,
    RetryPolicy,
    retry_on_disconnect,
)
from zreconnect.integrations.sqlobject import SCHEME, register
from zreconnect.tests.base import DatabaseTestCase

REGISTRY = __name__


class Tree(sqlobject.SQLObject):
    name = StringCol(length=50, alternateID=True)
    state = StringCol(default="new")

    class sqlmeta:
        registry = REGISTRY


class UriTestCase(DatabaseTestCase):
    """`Tree` has a table with one row, ``self.tar``."""

    def setUp(self):
        super().setUp()
        # What is registered, and made for URIs, is forgotten again.
        for name in ("schemeBuilders", "cachedURIs"):
            patch = mock.patch.object(TheURIOpener, name, dict(getattr(TheURIOpener, name)))
            patch.start()
            self.addCleanup(patch.stop)
        self.connection = self.register_and_connect()
        Tree._connection = self.connection
        self.addCleanup(delattr, Tree, "_connection")
        Tree.createTable()
        self.tar = Tree(name="tar")

    def register_and_connect(self, options="", **keywords):
        register(**keywords)
        uri = self.dsn.replace("postgresql:", f"{keywords.get('scheme', SCHEME)}:")
        TheURIOpener.cachedURIs.clear()
        connection = sqlobject.connectionForURI(f"{uri}?driver={self.driver}{options}")
        self.addCleanup(connection.close)
        return connection

    def states(self):
        return self.query("SELECT name, state FROM tree ORDER BY id")

    def lose(self, connection):
        connection.query("SELECT pg_terminate_backend(pg_backend_pid())")


class UriTests(UriTestCase):
    # Without a transaction

    def test_each_statement_is_committed(self):
        self.tar.state = "packed"
        self.assertEqual(self.states(), [("tar", "packed")])

    def test_between_two_statements_a_restart_costs_nothing(self):
        self.server.restart()
        self.tar.state = "packed"
        self.server.restart()
        self.tar.sync()
        self.assertEqual(self.tar.state, "packed")
        self.assertEqual([tree.name for tree in Tree.select()], ["tar"])

    def test_a_statement_that_is_lost_may_be_committed(self):
        self.forward.cut("to_client", after=0)
        with self.assertRaises(CommitOutcomeUnknown):
            self.tar.state = "packed"
        self.assertEqual(Tree.byName("tar").id, self.tar.id)

    def test_no_autocommit(self):
        connection = self.register_and_connect("&autoCommit=0")
        connection.query("UPDATE tree SET state = 'packed'")
        self.assertEqual(self.states(), [("tar", "new")])

    def test_an_object_outside_of_a_transaction(self):
        self.connection.autoCommit = "exception"
        with self.assertRaisesRegex(Exception, "outside of a transaction"):
            self.tar.sync()

    # SQLObject's own transactions

    def test_commit_and_rollback(self):
        own = self.connection.transaction()
        gzip = Tree(name="gzip", connection=own)
        self.assertEqual(self.states(), [("tar", "new")])
        own.commit()
        gzip.state = "never"
        own.rollback()
        own.begin()
        self.assertEqual(gzip.state, "new")
        gzip.state = "packed"
        own.commit(close=True)
        self.assertEqual(self.states(), [("tar", "new"), ("gzip", "packed")])

    def test_between_two_transactions_a_restart_costs_nothing(self):
        for name in ("gzip", "bzip2"):
            own = self.connection.transaction()
            Tree(name=name, connection=own)
            own.commit(close=True)
            self.server.restart()
        self.assertEqual([tree.name for tree in Tree.select()], ["tar", "gzip", "bzip2"])

    def test_inside_a_transaction_a_loss_dooms_it(self):
        own = self.connection.transaction()
        tar = Tree.get(self.tar.id, connection=own)
        tar.state = "lost"
        with self.assertRaisesRegex(DisconnectionError, "inside a transaction") as caught:
            self.lose(own)
        self.assertIsInstance(caught.exception, own.module.OperationalError)
        with self.assertRaisesRegex(DisconnectionError, "Already"):
            Tree(name="gzip", connection=own)
        with self.assertRaisesRegex(DisconnectionError, "Already"):
            own.commit()
        own.rollback()
        own.begin()
        self.assertEqual(tar.state, "new")
        tar.state = "packed"
        own.commit(close=True)
        self.assertEqual(self.states(), [("tar", "packed")])

    def test_a_transaction_that_is_lost_and_let_go(self):
        # As the garbage collector does, in whatever thread.
        own = self.connection.transaction()
        with self.assertRaises(DisconnectionError) as caught:
            self.lose(own)
        let_go = [own]
        del own, caught
        thread = threading.Thread(target=lambda: (let_go.clear(), gc.collect()))
        thread.start()
        thread.join()
        self.tar.state = "packed"
        self.assertEqual(self.states(), [("tar", "packed")])

    def test_a_function_runs_again(self):
        losses = [self.lose]

        @retry_on_disconnect(timeout=60)
        def pack():
            def work():
                own = sqlobject.sqlhub.threadConnection
                Tree.get(self.tar.id, connection=own).state = f"packed with {len(losses)}"
                if losses:
                    losses.pop()(own)

            sqlobject.sqlhub.doInTransaction(work)

        sqlobject.sqlhub.threadConnection = self.connection
        self.addCleanup(delattr, sqlobject.sqlhub, "threadConnection")
        pack()
        self.assertEqual(self.states(), [("tar", "packed with 0")])

    def test_the_answer_to_commit_is_lost(self):
        self.connection = self.register_and_connect(witness=Ledger())
        own = self.connection.transaction()
        Tree.get(self.tar.id, connection=own).state = "packed"
        cut = self.forward.cut("to_client", after=0)
        own.commit(close=True)
        self.assertTrue(cut.wait(0))
        self.assertEqual(self.states(), [("tar", "packed")])

    def test_the_outcome_is_unknown(self):
        own = self.register_and_connect(witness=None).transaction()
        Tree.get(self.tar.id, connection=own).state = "packed"
        self.forward.cut("to_client", after=0)
        with self.assertRaises(CommitOutcomeUnknown):
            own.commit()
        own.rollback()

    # Errors

    def test_errors_of_statements_are_sqlobjects(self):
        for connection in (self.connection, self.connection.transaction()):
            with self.assertRaises(dberrors.DuplicateEntryError):
                Tree(name="tar", connection=connection)
        connection.rollback()

    def test_a_serialization_failure_may_run_again(self):
        transactions = [self.connection.transaction() for _ in range(2)]
        trees = []
        for own in transactions:
            own.query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            trees.append(Tree.get(self.tar.id, connection=own))
        trees[0].state = "first"
        transactions[0].commit(close=True)
        with self.assertRaises(dberrors.OperationalError) as caught:
            trees[1].state = "second"
        self.assertIsInstance(caught.exception, TransientError)
        transactions[1].rollback()

    def test_no_server(self):
        self.server.shut_down()
        self.addCleanup(self.server.start)
        connection = self.register_and_connect(policy=FAIL_FAST)
        with self.assertRaises(DisconnectionError):
            Tree.get(self.tar.id, connection=connection)
        connection = self.register_and_connect(policy=RetryPolicy(timeout=0.1))
        own = connection.transaction()
        with self.assertRaises(ReconnectTimeout):
            Tree.get(self.tar.id, connection=own)
        own.rollback()

    def test_a_refusal_shows_no_password(self):
        self.dsn = self.layer.dsn(user="nobody").replace("nobody@", "nobody:secret@")
        with self.assertRaisesRegex(dberrors.OperationalError, "nobody") as caught:
            Tree.get(1, connection=self.register_and_connect())
        self.assertNotIn("secret", str(caught.exception))

    # Sessions

    def test_what_the_uri_says_of_sessions_holds_for_each(self):
        self.query("CREATE SCHEMA elsewhere")
        self.addCleanup(self.query, "DROP SCHEMA elsewhere")
        connected = []
        connection = self.register_and_connect(
            "&schema=elsewhere&charset=latin1", on_connect=connected.append
        )
        for number in (1, 2):
            (path,) = connection.queryOne("SHOW search_path")
            (encoding,) = connection.queryOne("SHOW client_encoding")
            self.assertEqual(
                (path, encoding.upper(), len(connected)), ("elsewhere", "LATIN1", number)
            )
            self.server.restart()

    def test_a_schema_would_stay_with_others_behind_a_pooler(self):
        for pooled in (None, True):
            connection = self.register_and_connect("&schema=elsewhere", pooled=pooled)
            behind = mock.patch(
                "zreconnect.drivers.pooling.Pooling.is_in_between", return_value=pooled is None
            )
            refused = self.assertRaisesRegex(dberrors.ProgrammingError, "the schema of a URI")
            with self.subTest(pooled=pooled), behind, refused:
                connection.queryOne("SELECT 1")

    def test_a_socket_of_the_file_system(self):
        uri = f"{SCHEME}:///nowhere at all/trees?driver={self.driver}"
        server = sqlobject.connectionForURI(uri).getConnection().server
        self.assertEqual(server, "postgresql:///nowhere%20at%20all/trees")


class PsycopgUriTests(UriTests):
    """Through psycopg 3."""

    driver = "psycopg"


class RegisterTests(UriTestCase):
    def test_sqlobjects_own_scheme(self):
        connection = self.register_and_connect(scheme="postgres")
        self.server.restart()
        self.assertEqual(Tree.get(self.tar.id, connection=connection).name, "tar")

    def test_what_makes_no_sense(self):
        for scheme in ("", "a:", "mysql"):
            with self.assertRaisesRegex(ValueError, "scheme must"):
                register(scheme)
        for keywords in ({"scheme": 1}, {"policy": 1}, {"on_connect": 1}, {"witness": 1}):
            with self.assertRaisesRegex(TypeError, f"{next(iter(keywords))} must"):
                register(**keywords)

    def test_another_driver(self):
        modules = {"pg8000": mock.Mock(), "pg8000.dbapi": mock.Mock()}
        with (
            mock.patch.dict("sys.modules", modules),
            self.assertRaisesRegex(ValueError, "driver must be one of psycopg2, psycopg"),
        ):
            sqlobject.connectionForURI(f"{SCHEME}://nowhere/none?driver=pg8000")
