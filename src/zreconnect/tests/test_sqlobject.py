"""SQLObject under initZopeless: its objects outlive the server's restarts."""

import gc
import io
import subprocess
import sys
import threading
import warnings
import weakref
from contextlib import closing, redirect_stdout

import psycopg2
import sqlobject
import transaction
from sqlobject import BLOBCol, ForeignKey, IntCol, MultipleJoin, StringCol, UnicodeCol, dberrors
from sqlobject.inheritance import InheritableSQLObject

from zreconnect import (
    CommitOutcomeUnknown,
    ConnectionDescriptor,
    DisconnectionError,
    Ledger,
    ReconnectTimeout,
    initZopeless,
    isZopeless,
)
from zreconnect.integrations.sqlobject import TransientOperationalError, ZopelessConnection
from zreconnect.tests.base import DatabaseTestCase, wait_until
from zreconnect.tests.restarts import ATTEMPTS, SurvivesRestarts

# SQLObject keeps classes by name, and other tests may have a Tree as well.
REGISTRY = __name__


class SQLBase(sqlobject.SQLObject):
    class sqlmeta:
        registry = REGISTRY


class Tree(SQLBase):
    name = StringCol(length=50, alternateID=True)
    state = UnicodeCol(default=None)
    data = BLOBCol(default=None)
    files = MultipleJoin("File", orderBy="path")

    class sqlmeta:
        registry = REGISTRY


class File(SQLBase):
    tree = ForeignKey("Tree", cascade=True)
    path = StringCol(length=50)

    class sqlmeta:
        registry = REGISTRY


class Lazy(SQLBase):
    """Its updates wait for COMMIT."""

    name = StringCol(default=None)
    size = IntCol(default=0)

    class sqlmeta:
        registry = REGISTRY
        lazyUpdate = True


class Uncached(SQLBase):
    name = StringCol()

    class sqlmeta:
        registry = REGISTRY
        cacheValues = False


class Defaulted(SQLBase):
    """Creating one reads back what the server has filled in."""

    name = StringCol(defaultSQL="'nobody'")

    class sqlmeta:
        registry = REGISTRY


class Work(SQLBase):
    number = IntCol()
    state = StringCol(default="started")

    class sqlmeta:
        registry = REGISTRY


class Person(InheritableSQLObject):
    name = StringCol()

    class sqlmeta:
        registry = REGISTRY


class Employee(Person):
    position = StringCol(length=50, unique=True)

    class sqlmeta:
        registry = REGISTRY
        childName = "Employee"


CLASSES = [Tree, File, Lazy, Uncached, Defaulted, Work]


class SQLObjectTestCase(DatabaseTestCase):
    def install(self, sqlClass=SQLBase, implicitBegin=False, **keywords):
        keywords.setdefault("driver", self.driver)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            manager = initZopeless(
                self.dsn, sqlClass=sqlClass, implicitBegin=implicitBegin, **keywords
            )
        self.addCleanup(lambda: isZopeless() and manager.uninstall())
        return manager

    def install_with_tables(self, **keywords):
        """The manager; it has a row of `Tree` named tar."""
        manager = self.ztm = self.install(**keywords)
        manager.run(self.make_tables)
        return manager

    def make_tables(self):
        for each in CLASSES:
            each.createTable()
        self.tar = Tree(name="tar", state="new")

    def begin(self):
        self.ztm.begin()

    def states(self):
        return [state for (state,) in self.query("SELECT state FROM tree ORDER BY id")]

    def lose(self):
        """Have the server end the session inside the transaction."""
        with self.assertRaises(DisconnectionError) as caught:
            SQLBase._connection.query("SELECT pg_terminate_backend(pg_backend_pid())")
        return caught.exception


class ImporterTests(SQLObjectTestCase):
    """importd: its server is restarted while it is idle, busy without it, and uploading."""

    def setUp(self):
        super().setUp()
        self.install_with_tables()

    def test_idle(self):
        self.server.restart()
        self.begin()
        self.tar.state = "started"
        self.ztm.commit()
        self.assertEqual(self.states(), ["started"])

    def test_busy_without_the_database(self):
        self.begin()
        name = self.tar.name
        self.tar.state = "started"
        self.ztm.commit()
        self.server.shut_down()
        # What it works on can still be read.
        self.assertEqual((self.tar.name, self.tar.state), (name, "started"))
        self.server.start()
        self.begin()
        File(tree=self.tar, path="pack.py")
        self.ztm.commit()
        self.assertEqual(self.query("SELECT path FROM file"), [("pack.py",)])

    def test_uploading(self):
        self.begin()
        self.tar.state = "uploading"
        File(tree=self.tar, path="pack.py")
        self.server.shut_down()
        with self.assertRaises(DisconnectionError):
            File(tree=self.tar, path="unpack.py")
        # Not even a part can be committed.
        with self.assertRaises(DisconnectionError):
            self.tar.state = "uploaded"
        with self.assertRaises(DisconnectionError):
            self.ztm.commit()
        self.ztm.abort()
        # New work when the database is available.
        self.server.start()
        self.begin()
        self.assertEqual(self.tar.state, "new")
        self.assertEqual(File.select().count(), 0)
        for path in ("pack.py", "unpack.py"):
            File(tree=self.tar, path=path)
        self.tar.state = "uploaded"
        self.ztm.commit()
        self.begin()
        self.assertEqual([file.path for file in self.tar.files], ["pack.py", "unpack.py"])
        self.assertEqual(self.tar.state, "uploaded")

    def test_run(self):
        attempts = []

        def upload():
            attempts.append(len(attempts))
            file = File(tree=self.tar, path="pack.py")
            self.tar.state = f"attempt {len(attempts)}"
            if len(attempts) == 1:
                self.server.restart()
            file.path = "unpack.py"
            return file

        file = self.ztm.run(upload)
        self.assertEqual(attempts, [0, 1])
        self.assertEqual(file.path, "unpack.py")
        self.assertEqual(self.states(), ["attempt 2"])
        self.assertEqual(self.query("SELECT path FROM file"), [("unpack.py",)])

    def test_run_of_the_transaction_package(self):
        attempts = []

        def upload():
            attempts.append(len(attempts))
            self.tar.state = f"attempt {len(attempts)}"
            if len(attempts) == 1:
                self.lose()
                self.tar.state = "never"

        # It begins a transaction of its own, in which a statement has the database begin.
        self.ztm.uninstall()
        self.ztm = self.install(implicitBegin=True)
        transaction.manager.run(upload)
        self.assertEqual(attempts, [0, 1])
        self.assertEqual(self.states(), ["attempt 2"])

    def test_the_answer_to_commit_is_lost(self):
        self.begin()
        self.tar.state = "committed"
        cut = self.forward.cut("to_client", after=0)
        self.ztm.commit()
        self.assertTrue(cut.wait(0))
        self.assertEqual(self.states(), ["committed"])
        self.assertEqual(self.tar.state, "committed")

    def test_the_outcome_is_unknown(self):
        self.ztm.uninstall()
        self.ztm = self.install(witness=None)
        runs = []

        def work():
            runs.append("run")
            self.tar.state = "perhaps"
            self.forward.cut("to_client", after=0)

        # BEGIN and UPDATE have their answers before the line is cut.
        with self.assertRaises(CommitOutcomeUnknown):
            self.ztm.run(work)
        self.assertEqual(runs, ["run"])

    def test_no_server_within_the_timeout(self):
        self.ztm.uninstall()
        self.ztm = self.install(implicitBegin=True, timeout=0.2)
        self.server.shut_down()
        with self.assertRaises(ReconnectTimeout):
            File.select().count()
        self.ztm.abort()
        with self.assertRaises(ReconnectTimeout):
            Tree(name="gzip")


class TransactionTests(SQLObjectTestCase):
    def test_nothing_is_committed_or_closed_by_sqlobject(self):
        self.install_with_tables()
        self.begin()
        connection = self.ztm.connection()
        self.tar.state = "seen here"
        list(Tree.select())
        self.assertEqual(connection.state, "active")
        self.assertEqual(self.states(), ["new"])
        SQLBase._connection.close()
        self.assertEqual(connection.state, "active")
        self.ztm.abort()
        self.assertEqual(self.states(), ["new"])

    def test_nothing_begins_by_itself(self):
        self.install_with_tables()
        with self.assertRaisesRegex(dberrors.ProgrammingError, "call begin"):
            Tree.get(1000)
        with self.assertRaisesRegex(dberrors.ProgrammingError, "call begin"):
            self.tar.state = "never"

    def test_transaction_commit(self):
        self.install_with_tables()
        self.begin()
        self.tar.state = "committed"
        transaction.commit()
        self.assertEqual(self.states(), ["committed"])

    def test_implicit_begin(self):
        for implicit in (True, None):
            self.install_with_tables(implicitBegin=implicit)
            self.tar.state = "committed"
            self.ztm.commit()
            self.assertEqual(self.states(), ["committed"])
            self.query("UPDATE tree SET state = 'changed'")
            self.assertEqual(self.tar.state, "changed")
            self.ztm.commit()
            self.query("UPDATE tree SET state = 'changed again'")
            self.assertEqual(self.tar.state, "changed again")
            transaction.commit()
            self.query("UPDATE tree SET state = 'and again'")
            self.assertEqual(self.tar.state, "and again")
            self.ztm.abort()
            self.server.restart()
            self.tar.state = "survived"
            self.ztm.commit()
            self.assertEqual(self.states(), ["survived"])
            self.ztm.uninstall()
            self.query("DROP TABLE tree, file, lazy, uncached, defaulted, work CASCADE")

    def test_transactions_of_sqlobjects_own_are_refused(self):
        self.install_with_tables()
        with self.assertRaisesRegex(dberrors.NotSupportedError, "begin"):
            SQLBase._connection.transaction()
        sqlobject.sqlhub.threadConnection = SQLBase._connection
        try:
            with self.assertRaisesRegex(dberrors.NotSupportedError, "begin"):
                sqlobject.sqlhub.doInTransaction(Tree.get, 1)
        finally:
            del sqlobject.sqlhub.threadConnection

    def test_the_database_has_a_name_and_an_address(self):
        ztm = self.install()
        ztm.begin()
        connection = SQLBase._connection
        self.assertIn(connection.db, connection.listDatabases())
        for address in (connection.uri(), connection.oldUri()):
            self.assertTrue(address.endswith(f"/{self.dbname}"), address)
            self.assertNotIn(self.server.password, address)

    def test_making_databases_is_refused(self):
        self.install()
        with self.assertRaises(dberrors.NotSupportedError):
            SQLBase._connection.createEmptyDatabase()
        with self.assertRaises(dberrors.NotSupportedError):
            SQLBase._connection.dropDatabase()

    def test_inheritance_leaves_the_rollback_to_the_manager(self):
        self.ztm = self.install(sqlClass=Person)
        self.begin()
        Person.createTable()
        Employee.createTable()
        employee = Employee(name="Ann", position="clerk")
        self.ztm.commit()
        self.begin()
        with self.assertRaises(dberrors.DuplicateEntryError):
            Employee(name="Bob", position="clerk")
        self.ztm.abort()
        self.server.restart()
        self.begin()
        self.assertEqual([each.name for each in Person.select()], ["Ann"])
        self.assertIs(Person.get(employee.id), employee)
        employee.name = "Anna"
        self.ztm.commit()
        self.assertEqual(self.query("SELECT name FROM person"), [("Anna",)])

    def test_a_select_that_is_read_lazily(self):
        self.install_with_tables()
        self.begin()
        for path in ("a", "b", "c"):
            File(tree=self.tar, path=path)
        files = File.select(orderBy="path").lazyIter()
        self.assertEqual(next(files).path, "a")
        self.assertEqual(Tree.select().count(), 1)
        self.assertEqual([each.path for each in files], ["b", "c"])
        files = File.select().lazyIter()
        next(files)
        self.lose()
        with self.assertRaises(DisconnectionError):
            next(files)
        del files
        gc.collect()
        self.ztm.abort()

    def test_debug_output_numbers_the_connections(self):
        self.install_with_tables()
        SQLBase._connection.debug = True
        with redirect_stdout(io.StringIO()) as output:
            self.ztm.run(Tree.select().count)
        self.assertRegex(output.getvalue(), r"^ 1/QueryOne")


class CacheTests(SQLObjectTestCase):
    """Values last until the next transaction, and one object stands for a row."""

    def setUp(self):
        super().setUp()
        self.install_with_tables()

    def change(self, state):
        self.query("UPDATE tree SET state = %s", state)

    def test_values_are_read_again_in_each_transaction(self):
        self.begin()
        self.assertEqual(self.tar.state, "new")
        self.change("changed")
        self.assertEqual(self.tar.state, "new")
        self.ztm.commit()
        self.assertEqual(self.tar.state, "new")
        self.begin()
        self.assertEqual(self.tar.state, "changed")

    def test_values_of_an_aborted_transaction_are_forgotten(self):
        for load in (True, False):
            with self.subTest(load=load):
                self.begin()
                if load:
                    self.assertEqual(self.tar.state, "new")
                self.tar.state = "aborted"
                self.tar.set(name="also aborted")
                self.ztm.abort()
                with self.assertRaisesRegex(dberrors.ProgrammingError, "call begin"):
                    _ = self.tar.state
                self.begin()
                self.assertEqual((self.tar.name, self.tar.state), ("tar", "new"))
                self.ztm.abort()

    def test_a_lost_transaction_is_an_aborted_one(self):
        self.begin()
        self.tar.state = "lost"
        self.lose()
        self.ztm.abort()
        self.begin()
        self.assertEqual(self.tar.state, "new")

    def test_one_object_for_a_row(self):
        self.begin()
        self.assertIs(Tree.get(self.tar.id), self.tar)
        self.ztm.commit()
        self.begin()
        self.assertIs(Tree.byName("tar"), self.tar)
        self.assertIs(File(tree=self.tar, path="a").tree, self.tar)
        self.ztm.abort()
        self.begin()
        self.assertIs(next(iter(Tree.select())), self.tar)

    def test_objects_that_nobody_holds_are_let_go(self):
        self.begin()
        gzip = weakref.ref(Tree(name="gzip"))
        gc.collect()
        self.assertIsNotNone(gzip())
        self.ztm.commit()
        self.begin()
        gc.collect()
        self.assertIsNone(gzip())

    def test_a_rollback_to_a_savepoint(self):
        self.begin()
        savepoint = transaction.savepoint()
        self.tar.state = "undone"
        savepoint.rollback()
        SQLBase._connection.expireAll()
        self.assertEqual(self.tar.state, "new")
        self.assertIs(Tree.byName("tar"), self.tar)

    def test_a_creation_that_is_rolled_back(self):
        self.begin()
        gzip = Tree(name="gzip")
        self.ztm.abort()
        self.begin()
        with self.assertRaises(sqlobject.SQLObjectNotFound):
            _ = gzip.name
        with self.assertRaises(sqlobject.SQLObjectNotFound):
            Tree.byName("gzip")
        Tree(name="gzip")
        self.ztm.commit()

    def test_a_creation_that_is_lost_before_it_is_read_back(self):
        made = []

        def keep(instance, *arguments):
            made.append(instance)

        sqlobject.events.listen(keep, Defaulted, sqlobject.events.RowCreateSignal)
        self.begin()
        SQLBase._connection.query(
            "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END'"
        )
        SQLBase._connection.query(
            "CREATE TRIGGER lose AFTER INSERT ON defaulted EXECUTE FUNCTION lose()"
        )
        with self.assertRaises(DisconnectionError):
            Defaulted()
        self.ztm.abort()
        self.begin()
        self.assertEqual(Defaulted().name, "nobody")
        # SELECT, by which SQLObject reads the row that it has created.
        with self.assertRaises(DisconnectionError):
            self.cut_at_select()
        self.ztm.abort()
        self.begin()
        with self.assertRaises(sqlobject.SQLObjectNotFound):
            _ = made[-1].name

    def cut_at_select(self):
        execute = ZopelessConnection._executeRetry

        def cut_first(connection, conn, cursor, query):
            if query.startswith("SELECT"):
                self.forward.drop()
            return execute(connection, conn, cursor, query)

        ZopelessConnection._executeRetry = cut_first
        try:
            Defaulted()
        finally:
            ZopelessConnection._executeRetry = execute

    def test_a_deletion(self):
        self.begin()
        File(tree=self.tar, path="a")
        self.tar.destroySelf()
        self.ztm.commit()
        self.assertEqual(self.query("SELECT * FROM tree, file"), [])
        self.begin()
        with self.assertRaises(sqlobject.SQLObjectNotFound):
            Tree.get(self.tar.id)

    def test_a_deletion_that_is_rolled_back(self):
        self.begin()
        file = File(tree=self.tar, path="a")
        uncached = Uncached(name="one")
        self.ztm.commit()
        self.begin()
        self.tar.state = "deleted"
        uncached.destroySelf()
        self.tar.destroySelf()
        self.ztm.abort()
        self.begin()
        self.assertEqual(self.tar.state, "new")
        self.assertIs(Tree.get(self.tar.id), self.tar)
        self.assertEqual(list(self.tar.files), [file])
        self.assertEqual(uncached.name, "one")
        self.ztm.commit()
        self.change("changed")
        self.begin()
        self.assertEqual(self.tar.state, "changed")

    def test_a_deletion_that_is_run_again(self):
        runs = []

        def delete():
            runs.append(self.tar.state)
            self.tar.destroySelf()
            if len(runs) == 1:
                self.lose()
                Tree.select().count()

        self.ztm.run(delete)
        self.assertEqual(runs, ["new", "new"])
        self.assertEqual(self.states(), [])

    def test_each_thread_has_objects_of_its_own(self):
        seen = []

        def work():
            self.ztm.begin()
            tar = Tree.byName("tar")
            seen.append((tar is self.tar, tar == self.tar, tar.state))
            tar.state = "by the thread"
            self.ztm.commit()
            seen.append(tar.state)

        self.begin()
        self.tar.name = "not committed"
        self.ztm.commit()
        self.begin()
        self.tar.name = "tar"
        self.ztm.commit()
        self.begin()
        self.assertEqual(self.tar.state, "new")
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        self.assertEqual(seen, [(False, True, "new"), "by the thread"])
        self.assertEqual(self.tar.state, "new")
        self.ztm.commit()
        self.begin()
        self.assertEqual(self.tar.state, "by the thread")

    def test_objects_of_a_thread_that_has_ended_are_let_go(self):
        kept = []

        def work():
            self.ztm.begin()
            kept.append(weakref.ref(Tree.byName("tar")))
            self.ztm.commit()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        gc.collect()
        self.assertIsNone(kept[0]())
        wait_until(lambda: len(self.sessions()) == 1)


class LazyUpdateTests(SQLObjectTestCase):
    """Lazy updates are written before COMMIT, in the transaction in which they were made."""

    def setUp(self):
        super().setUp()
        self.install_with_tables()
        self.one = self.ztm.run(lambda: Lazy(name="one"))

    def rows(self):
        return self.query("SELECT name, size FROM lazy ORDER BY id")

    def test_written_at_commit(self):
        for commit in (self.ztm.commit, transaction.commit):
            with self.subTest(commit=commit):
                self.begin()
                size = self.one.size + 1
                self.one.size = size
                self.one.set(name=f"name {size}")
                Lazy._connection.query("SELECT 1")
                commit()
                self.assertEqual(self.rows(), [(f"name {size}", size)])

    def test_written_although_nobody_holds_the_object(self):
        self.begin()
        Lazy.get(self.one.id).size = 5
        self.one = None
        Lazy._connection.cache.weakrefAll()
        gc.collect()
        self.ztm.commit()
        self.assertEqual(self.rows(), [("one", 5)])

    def test_what_is_read_later_does_not_hide_an_update(self):
        self.begin()
        self.one.size = 7
        self.assertEqual((self.one.name, self.one.size), ("one", 7))
        self.ztm.commit()
        self.assertEqual((self.rows(), self.one.size), ([("one", 7)], 7))

    def test_implicit_begin(self):
        self.ztm.uninstall()
        self.ztm = self.install(implicitBegin=True)
        for commit in (self.ztm.commit, transaction.commit, transaction.commit):
            size = self.one.size + 1
            commit()
            self.one.size = size
            commit()
            self.assertEqual(self.rows(), [("one", size)])

    def test_forgotten_by_an_abort(self):
        self.begin()
        self.one.size = 7
        self.ztm.abort()
        self.begin()
        self.assertEqual(self.one.size, 0)
        self.one.name = "other"
        self.ztm.commit()
        self.assertEqual(self.rows(), [("other", 0)])
        self.begin()
        self.query("UPDATE lazy SET size = 9")
        self.assertEqual([each.size for each in Lazy.select()], [9])

    def test_outside_a_transaction(self):
        self.begin()
        self.assertEqual(self.one.size, 0)
        self.ztm.commit()
        with self.assertRaisesRegex(psycopg2.ProgrammingError, "call begin"):
            self.one.size = 3

    def test_lost(self):
        self.begin()
        self.one.size = 7
        self.server.restart()
        with self.assertRaises(DisconnectionError):
            self.ztm.commit()
        self.ztm.abort()
        runs = []

        def work():
            runs.append(self.one.size)
            self.one.size += 1
            if len(runs) == 1:
                self.server.restart()

        self.ztm.run(work)
        self.assertEqual(runs, [0, 0])
        self.assertEqual(self.rows(), [("one", 1)])

    def test_doomed(self):
        self.begin()
        self.assertEqual(self.one.size, 0)
        self.lose()
        with self.assertRaises(DisconnectionError):
            self.one.size = 7

    def test_a_hook_that_updates_more(self):
        two = self.ztm.run(lambda: Lazy(name="two"))

        def touch(instance, *arguments):
            if instance is self.one:
                two.size = 2

        sqlobject.events.listen(touch, Lazy, sqlobject.events.RowUpdatedSignal)
        self.begin()
        self.one.size = 1
        self.ztm.commit()
        self.assertEqual(self.rows(), [("one", 1), ("two", 2)])


class ErrorTests(SQLObjectTestCase):
    def setUp(self):
        super().setUp()
        self.install_with_tables()

    def test_a_lost_connection(self):
        self.begin()
        error = self.lose()
        self.assertIsInstance(error, psycopg2.OperationalError)
        self.assertIsInstance(error.getOriginalException()[1], psycopg2.OperationalError)
        self.assertIs(error.__cause__, error.getOriginalException()[1])
        with self.assertRaisesRegex(DisconnectionError, "Already disconnected"):
            Tree.select().count()

    def test_errors_of_statements_are_sqlobjects(self):
        for wrong, error in (
            (lambda: Tree(name="tar"), dberrors.DuplicateEntryError),
            (lambda: Tree._connection.query("SELEC"), dberrors.ProgrammingError),
            (lambda: Tree(name="x" * 51), dberrors.DataError),
            (
                lambda: Tree._connection.query("SET LOCAL lock_timeout = '10ms'; " + WAIT),
                dberrors.OperationalError,
            ),
        ):
            self.begin()
            with self.plain() as other, closing(other.cursor()) as cursor:
                cursor.execute("LOCK TABLE file")
                with self.assertRaises(error) as caught:
                    wrong()
            self.assertNotIsInstance(caught.exception, TransientOperationalError)
            self.ztm.abort()

    def test_a_serialization_failure_may_run_again(self):
        self.ztm.set_isolation_level("SERIALIZABLE")
        runs = []

        def work():
            runs.append(self.tar.state)
            if len(runs) == 1:
                self.query("UPDATE tree SET state = 'changed'")
                with self.assertRaises(TransientOperationalError) as caught:
                    self.tar.state = "mine"
                self.assertEqual(caught.exception.args[0].code, "40001")
                raise caught.exception
            self.tar.state = "mine"

        self.ztm.run(work)
        self.assertEqual(runs, ["new", "changed"])
        self.assertEqual(self.states(), ["mine"])


WAIT = "LOCK TABLE file"


class SchemaTests(SQLObjectTestCase):
    def test_tables_and_columns(self):
        self.ztm = self.install()
        self.begin()
        self.assertFalse(Tree.tableExists())
        self.make_tables()
        self.assertTrue(Tree.tableExists())
        Tree.createTable(ifNotExists=True)
        self.assertIn("tree", SQLBase._connection.listTables())
        self.ztm.commit()
        self.server.restart()
        self.begin()

        class Found(SQLBase):
            class sqlmeta:
                registry = f"{REGISTRY} {self.id()}"
                table = "tree"
                fromDatabase = True

        self.assertEqual(set(Found.sqlmeta.columns), {"name", "state", "data"})
        self.assertEqual(Found.get(self.tar.id).state, "new")
        Tree.dropTable(cascade=True)
        self.assertFalse(Tree.tableExists())
        self.ztm.abort()
        self.begin()
        self.assertTrue(Tree.tableExists())

    def test_ids(self):
        self.install_with_tables()
        self.begin()
        self.assertEqual(Tree(name="a").id, self.tar.id + 1)
        self.assertEqual(Tree(id=100, name="b").id, 100)
        self.ztm.commit()
        self.server.restart()
        self.begin()
        self.assertEqual(Tree(name="c").id, self.tar.id + 2)

    def test_values(self):
        self.install_with_tables()
        data = bytes(range(256))
        state = "déjà 50 % %s 'quoted' \\ back ☃"
        for _ in range(2):
            self.begin()
            self.tar.set(state=state, data=data)
            self.ztm.commit()
            self.begin()
            self.assertEqual((self.tar.state, bytes(self.tar.data)), (state, data))
            self.assertEqual(self.states(), [state])
            found = Tree.select(Tree.q.state.startswith("déjà 50 %")).getOne()
            self.assertIs(found, self.tar)
            self.ztm.abort()
            self.server.restart()


class SessionTests(SQLObjectTestCase):
    def test_settings_of_the_session_are_there_again(self):
        def elsewhere(raw):
            raw.cursor().execute("SET search_path TO elsewhere; COMMIT")

        self.query("CREATE SCHEMA elsewhere")
        self.addCleanup(self.query, "DROP SCHEMA elsewhere CASCADE")
        self.ztm = self.install(on_connect=elsewhere, isolation="REPEATABLE READ")
        self.ztm.connection().set_client_encoding("LATIN1")
        self.ztm.run(lambda: Tree.createTable())
        for _ in range(2):
            self.begin()
            Tree(name=f"é{Tree.select().count()}")
            rows = [SQLBase._connection.queryOne(f"SHOW {name}")[0] for name in SETTINGS]
            self.assertEqual(rows, ["elsewhere", "LATIN1", "repeatable read"])
            self.ztm.commit()
            self.server.restart()
        self.assertEqual(self.query("SELECT name FROM elsewhere.tree"), [("é0",), ("é1",)])


SETTINGS = ["search_path", "client_encoding", "transaction_isolation"]


class PsycopgImporterTests(ImporterTests):
    """Through psycopg 3."""

    driver = "psycopg"


class PsycopgSchemaTests(SchemaTests):
    """Through psycopg 3."""

    driver = "psycopg"


class InstallTests(SQLObjectTestCase):
    def test_the_class_has_sqlobjects_connection(self):
        manager = self.install()
        self.assertIsInstance(SQLBase._connection, ZopelessConnection)
        self.assertIs(Tree._connection, SQLBase._connection)
        self.assertIs(SQLBase._connection.getConnection(), manager.connection())
        manager.uninstall()
        with self.assertRaises(AttributeError):
            _ = SQLBase._connection

    def test_objects_after_uninstalling(self):
        manager = self.install_with_tables()
        manager.uninstall()
        with self.assertRaisesRegex(AttributeError, "No connection"):
            _ = self.tar.state
        # What the transaction package does is nobody's business any more.
        transaction.begin()
        transaction.commit()
        transaction.abort()
        self.ztm = self.install()
        self.begin()
        self.assertEqual(self.tar.state, "new")

    def test_all_classes(self):
        manager = self.install(sqlClass=sqlobject.SQLObject)
        self.assertIsInstance(Tree._connection, ZopelessConnection)
        manager.uninstall()
        self.assertIs(vars(sqlobject.SQLObject)["_connection"], sqlobject.sqlhub)

    def test_a_class_that_is_not_sqlobjects(self):
        class Other:
            pass

        self.install(sqlClass=Other)
        self.assertIsInstance(vars(Other)["_connection"], ConnectionDescriptor)

    def test_other_connections_are_left_alone(self):
        other = sqlobject.connectionForURI(f"{self.dsn}?driver=psycopg2")
        self.addCleanup(other.close)
        self.install_with_tables()
        lazy = Lazy(name="one", connection=other)
        lazy.size = 5
        lazy.syncUpdate()
        self.assertEqual(self.query("SELECT size FROM lazy"), [(5,)])
        lazy.destroySelf()
        self.assertEqual(self.query("SELECT size FROM lazy"), [])

    def test_another_database(self):
        with self.assertRaisesRegex(ValueError, "driver must be one of psycopg2, psycopg"):
            initZopeless("sqlite://", sqlClass=SQLBase, implicitBegin=False)
        self.assertFalse(isZopeless())
        self.assertNotIn("_connection", vars(SQLBase))

    def test_sqlobject_is_imported_by_those_who_have_it(self):
        program = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            "from zreconnect import initZopeless\n"
            "class Other: pass\n"
            "initZopeless('dbname=x', sqlClass=Other, implicitBegin=False).uninstall()\n"
            "assert 'sqlobject' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True)


class RestartTests(SurvivesRestarts, SQLObjectTestCase):
    def test_fifty_restarts(self):
        self.install_with_tables(witness=Ledger())
        own = threading.local()

        def work(number):
            # An object that lives through all restarts, one that is new, and one that is deleted.
            own.tree.state = str(int(own.tree.state) + 1)
            new = Work(number=number)
            new.state = "finished"
            Work.select(Work.q.number == -number).getOne(None)
            if own.last is not None:
                own.last.destroySelf()
            return Work(number=-number)

        def unit(number):
            if not hasattr(own, "tree"):
                own.last = None
                own.tree = self.ztm.run(
                    lambda: Tree(name=str(number), state="0"), attempts=ATTEMPTS
                )
            own.last = self.ztm.run(lambda: work(number), attempts=ATTEMPTS)

        def applied():
            rows = self.query("SELECT number, state FROM work WHERE number > 0")
            self.assertEqual({state for _, state in rows}, {"finished"})
            return [number for number, _ in rows]

        self.survive(unit, threads=3, applied=applied)
        counts = sum(int(state) for state in self.states() if state != "new")
        self.assertEqual(counts, len(applied()))
        # One for each thread: the last.
        self.assertEqual(self.query("SELECT count(*) FROM work WHERE number < 0"), [(3,)])
