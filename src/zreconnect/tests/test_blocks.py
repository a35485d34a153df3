"""Blocks of ``transaction()``: transactions, savepoints inside them, and what comes in between."""

import contextlib
import itertools
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import psycopg
import transaction

from zreconnect import FAIL_FAST, ConnectionDescriptor, DisconnectionError, initZopeless
from zreconnect.tests.base import (
    PATIENCE,
    DatabaseTestCase,
    LineTestCase,
    needs_mysqlclient,
    on_mariadb,
)
from zreconnect.tests.interrupts import Alarm, AtLines
from zreconnect.tests.test_mysql import MysqlTestCase
from zreconnect.tests.test_sqlite import SqliteTestCase


class BlockTests:
    """``self.connection`` is one of the driver's, to a database with an empty table ``item``."""

    # Of the lines at which a block is interrupted, each step-th one.
    step = 41

    def setUp(self):
        super().setUp()
        self.connection = self.connect()
        self.error = self.connection.ProgrammingError

    def add(self, name):
        self.connection.cursor().execute(f"INSERT INTO item (name) VALUES ('{name}')")

    def transaction(self, *arguments, **keywords):
        return self.connection.transaction(*arguments, **keywords)

    def ways_to_begin(self):
        """Each begins a transaction, and is a block at whose end it is committed."""

        @contextlib.contextmanager
        def committing(begin):
            begin()
            yield
            self.connection.commit()

        yield self.transaction()
        yield self.transaction("second")
        yield committing(self.connection.begin)
        yield committing(lambda: self.connection.cursor().execute("SELECT 1"))

    @contextlib.contextmanager
    def fails(self, *arguments, **keywords):
        with self.assertRaises(LookupError), self.transaction(*arguments, **keywords) as cursor:
            yield cursor
            raise LookupError

    # Savepoints

    def test_a_block_inside_is_a_savepoint(self):
        for number, way in enumerate(self.ways_to_begin()):
            with self.subTest(number), way:
                self.add(f"{number} before")
                with self.fails():
                    self.add("never")
                with self.transaction() as cursor:
                    self.assertIs(cursor.connection, self.connection)
                    self.add(f"{number} inside")
                self.assertEqual(self.connection.state, "active")
                with self.fails("name"):
                    self.add("never")
                    with self.transaction():
                        self.add("never, too")
                self.add(f"{number} behind")
            self.assertEqual(self.connection.state, "idle")
        parts = ("before", "behind", "inside")
        self.assertEqual(self.names(), [f"{n} {part}" for n in range(4) for part in parts])

    def test_what_is_around_it_decides(self):
        with self.fails():
            self.add("outer")
            with self.transaction():
                self.add("inner")
        self.assertEqual((self.connection.state, self.names()), ("idle", []))

    def test_names(self):
        with self.transaction('s-1"`; x') as cursor:
            self.add("one")
            with self.transaction("first"):
                self.add("two")
                cursor.execute("ROLLBACK TO SAVEPOINT first")
                self.add("three")
        self.assertEqual(self.names(), ["one", "three"])
        with self.transaction("second") as cursor:
            self.add("four")
            cursor.execute("ROLLBACK TO SAVEPOINT second")
        self.assertEqual(self.names(), ["one", "three"])
        with (
            self.assertRaisesRegex(TypeError, "savepoint_name must be a string, not int"),
            self.transaction(5),
        ):
            self.fail("there is a savepoint")

    def test_force_rollback(self):
        with self.transaction(force_rollback=True):
            self.add("never")
            with self.transaction():
                self.add("never, too")
        self.assertEqual(self.connection.state, "idle")
        with self.transaction():
            self.add("one")
            with self.transaction("name", force_rollback=True):
                self.add("never")
            self.add("two")
            with self.fails(force_rollback=True):
                self.add("never")
        with self.fails(force_rollback=True):
            self.add("never")
        self.assertEqual(self.names(), ["one", "two"])

    def test_it_cannot_be_used_twice(self):
        block = self.transaction()
        with block:
            pass
        with self.assertRaises((AttributeError, RuntimeError)), block:
            pass

    # What ends within

    def test_a_commit_within(self):
        self.add("one")
        for force_rollback in (False, True):
            with self.transaction(force_rollback=force_rollback):
                with self.assertRaisesRegex(self.error, "has not ended"):
                    self.connection.commit()
                self.add(f"two {force_rollback}")
        self.connection.commit()
        with self.transaction(force_rollback=True):
            self.add("three")
            self.assertRaises(self.error, self.connection.commit)
        with self.transaction():
            self.add("four")
            self.connection.commit()
        self.assertEqual(self.names(), ["four", "one", "two False"])

    def test_a_rollback_within(self):
        for goes_on in (False, True):
            with self.subTest(goes_on):
                self.add("never")
                with self.assertRaisesRegex(self.error, "has ended before"), self.transaction():
                    self.connection.rollback()
                    if goes_on:
                        self.add("one")
                with self.assertRaises(LookupError), self.transaction():
                    self.connection.rollback()
                    raise LookupError
                self.assertEqual(self.connection.state, "idle")
        self.assertEqual(self.names(), [])

    def test_another_transaction_within(self):
        with self.assertRaises(LookupError), self.transaction():
            self.add("never")
            with self.transaction():
                self.connection.rollback()
                self.add("another")
                raise LookupError
        self.assertEqual(self.connection.state, "active")
        self.connection.commit()
        self.assertEqual(self.names(), ["another"])

    def test_a_statement_that_commits_within(self):
        self.add("one")
        with (
            self.assertRaisesRegex(self.error, "by a statement that commits") as caught,
            self.transaction() as cursor,
        ):
            self.add("two")
            cursor.execute("COMMIT")
        self.connection.rollback()
        self.assertIsNotNone(caught.exception.__cause__)
        self.assertEqual((self.connection.state, self.names()), ("idle", ["one", "two"]))

    def test_a_savepoint_that_is_released_within(self):
        self.add("never")
        with self.assertLogs("zreconnect", "WARNING") as logs, self.fails("name") as cursor:
            self.add("never, too")
            cursor.execute("RELEASE SAVEPOINT name")
        self.assertIn("could not be undone", logs.output[0])
        self.assertRaises(self.error, self.connection.commit)
        self.connection.rollback()
        self.assertEqual(self.names(), [])

    def test_closed_within(self):
        self.add("never")
        with self.assertRaises(self.connection.InterfaceError), self.transaction():
            self.connection.close()
        self.assertEqual(self.names(), [])

    # The order

    def enter(self, name):
        block = self.transaction()
        block.__enter__()
        self.add(name)
        return block

    def test_a_block_that_ends_before_one_inside_it(self):
        self.add("one")
        first, second = self.enter("first"), self.enter("second")
        with self.assertRaisesRegex(self.error, "has not ended"):
            first.__exit__(None, None, None)
        self.add("two")
        with self.assertRaisesRegex(self.error, "has ended before"):
            second.__exit__(None, None, None)
        self.connection.commit()
        self.assertEqual(self.names(), ["one", "two"])

    def test_a_transaction_that_ends_before_a_block_inside_it(self):
        first, second = self.enter("first"), self.enter("second")
        with self.assertRaisesRegex(self.error, "has not ended"):
            first.__exit__(None, None, None)
        self.assertEqual(self.connection.state, "idle")
        with self.assertRaisesRegex(self.error, "has ended before"):
            second.__exit__(None, None, None)
        self.assertEqual(self.names(), [])

    def rows(self, name="of the generator"):
        with self.transaction():
            self.add(name)
            yield

    def test_a_suspended_block_is_not_committed(self):
        self.add("one")
        rows = self.rows()
        next(rows)
        with self.assertRaisesRegex(self.error, "has not ended"):
            self.connection.commit()
        rows.close()
        self.connection.commit()
        rows = self.rows()
        with self.assertRaisesRegex(self.error, "has not ended"), self.transaction():
            self.add("two")
            next(rows)
        rows.close()
        self.assertEqual((self.connection.state, self.names()), ("idle", ["one"]))

    def test_a_suspended_block_leaves_another_transaction_alone(self):
        self.add("never")
        first, second = self.rows(), self.rows("of another")
        next(first)
        next(second)
        self.connection.rollback()
        self.add("one")
        first.close()
        with self.assertRaisesRegex(self.error, "has ended before"):
            next(second)
        self.assertEqual(self.connection.state, "active")
        self.connection.commit()
        self.assertEqual(self.names(), ["one"])

    def test_a_suspended_block_that_another_thread_closes(self):
        for close in (lambda rows: rows.close(), next):
            self.add("never")
            rows = self.rows()
            next(rows)
            with ThreadPoolExecutor(1) as thread:
                error = thread.submit(close, rows).exception(PATIENCE)
            self.assertEqual(type(error), self.error if close is next else type(None))
            self.assertRaises(self.error, self.connection.commit)
            self.connection.rollback()
        self.assertEqual(self.names(), [])

    # Transaction managers

    def descriptor(self, **keywords):
        descriptor = ConnectionDescriptor(self.dsn, driver=self.connection_driver(), **keywords)
        self.addCleanup(descriptor.close)
        self.addCleanup(transaction.abort)
        return descriptor

    def connection_driver(self):
        return self.connection.work.link.driver.name

    def test_a_part_of_a_managers_transaction(self):
        self.connection = self.descriptor().connection()
        for autocommit in (False, True):
            self.connection.autocommit = autocommit
            with self.transaction():
                self.add(f"one {autocommit}")
            with self.fails():
                self.add("never")
            self.assertEqual(self.connection.state, "active")
            transaction.commit()
            self.assertEqual(self.connection.state, "idle")
        with self.transaction():
            self.add("never")
        transaction.abort()
        self.assertEqual(self.names(), ["one False", "one True"])

    def test_a_managers_commit_within(self):
        self.connection = self.descriptor().connection()
        with self.assertRaisesRegex(self.error, "has ended before"), self.transaction():
            self.add("never")
            self.assertRaises(self.error, transaction.commit)
            transaction.abort()
        self.assertEqual(self.names(), [])

    def test_explicit_transactions(self):
        manager = initZopeless(self.dsn, driver=self.connection_driver(), implicitBegin=False)
        self.addCleanup(manager.uninstall)
        self.connection = manager.connection()
        with self.assertRaisesRegex(self.error, "call begin"), self.transaction():
            self.fail("there is a transaction")
        manager.begin()
        with self.transaction():
            self.add("one")
        manager.commit()
        self.assertEqual(self.names(), ["one"])

    # Units of work

    def test_functions_that_are_units_of_work(self):
        """Inside an explicit transaction they are parts of it, and else refused, as ever."""
        insert = self.connection.transactional()(self.add)
        with self.transaction():
            insert("one")
            with self.transaction():
                insert("two")
                self.assertRaises(self.error, self.connection.run, self.add, "never")
        self.add("three")
        with self.transaction():
            self.assertRaises(self.error, insert, "never")
        self.connection.commit()
        self.assertEqual(self.names(), ["one", "three", "two"])

    # Interrupts

    def test_an_interrupt_at_every_line(self):
        """What was done in a block that an exception has left is never committed."""
        for kind in ("raises", "forces", "ends"):
            committed = set()
            for number in itertools.count(1, self.step):
                interrupt = AtLines([number], [Alarm()])
                with self.subTest(kind, number=number):
                    committed.add(self.interrupted_block(kind, interrupt))
                if not interrupt.places:
                    break
            self.assertLessEqual({("outer",), ()}, committed)

    def interrupted_block(self, kind, interrupt):
        self.add("outer")
        with contextlib.suppress(LookupError, Alarm):
            block = self.transaction(force_rollback=kind == "forces")
            with interrupt(), block:
                self.add("inner")
                if kind == "raises":
                    raise LookupError
        interrupt.forget()
        try:
            self.connection.commit()
        except self.connection.Error:
            self.connection.rollback()
        self.assertEqual(self.connection.state, "idle")
        names = tuple(self.names())
        if interrupt.places or kind != "ends":
            self.assertIn(names, [(), ("outer",)])
        else:
            self.assertEqual(names, ("inner", "outer"))
        with self.transaction() as cursor:
            cursor.execute("DELETE FROM item")
        return names


class LossTests:
    """With a server, whose sessions can be lost."""

    def test_a_loss_inside(self):
        for lost_in in ("inner", "outer"):
            with self.subTest(lost_in):
                with self.assertRaises(DisconnectionError), self.transaction():
                    self.add("never")
                    with self.transaction():
                        self.add("never, too")
                        if lost_in == "inner":
                            self.forward.drop()
                            self.add("never")
                    self.forward.drop()
                self.assertEqual(self.connection.state, "idle")
                with self.transaction():
                    self.add(lost_in)
        self.assertEqual(self.names(), ["inner", "outer"])

    def test_a_loss_that_nobody_minds(self):
        with self.assertRaises(DisconnectionError), self.transaction():
            with contextlib.suppress(DisconnectionError), self.transaction():
                self.add("never")
                self.forward.drop()
                self.add("never")
            self.assertEqual(self.connection.state, "doomed")
            self.add("never")
        self.assertEqual(self.names(), [])

    def test_a_unit_of_work_is_run_again(self):
        runs = []

        def work():
            runs.append(1)
            self.add("one")
            with self.transaction():
                self.add("two")
                if len(runs) == 1:
                    self.forward.drop()
                self.add("three")

        self.connection.run(work)
        self.assertEqual((len(runs), self.names()), (2, ["one", "three", "two"]))

    def test_no_server_when_it_begins(self):
        connection = self.connect(policy=FAIL_FAST)
        self.forward.refuse()
        self.addCleanup(self.forward.accept)
        with self.assertRaises(DisconnectionError), connection.transaction():
            self.fail("there is a transaction")
        self.assertEqual(connection.state, "idle")

    def test_round_trips(self):
        self.add("one")

        def use(fail=False):
            with contextlib.suppress(LookupError), self.transaction():
                if fail:
                    raise LookupError

        self.assertEqual(self.round_trips(use), 2)
        self.assertEqual(self.round_trips(lambda: use(fail=True)), 3)


class PostgresqlTests(LossTests):
    def setUp(self):
        super().setUp()
        self.make_table()

    def test_a_statement_that_has_failed(self):
        with self.transaction() as cursor:
            self.add("one")
            with self.assertRaises(self.connection.Error), self.transaction():
                cursor.execute("SELECT 1/0")
            self.add("two")
            with self.assertRaises(self.connection.InternalError), self.transaction():
                self.assertRaises(self.connection.Error, cursor.execute, "SELECT 1/0")
            self.add("three")
            with self.assertRaises(self.connection.InternalError), self.transaction("name"):
                self.add("never")
                with contextlib.suppress(self.connection.Error):
                    cursor.execute("SELECT 1/0")
                with self.transaction("name"):
                    self.fail("there is a savepoint")
        self.assertEqual(self.names(), ["one", "three", "two"])

    def test_one_name_again(self):
        with self.transaction("name"):
            self.add("one")
            with self.fails("name"):
                self.add("never")
                with self.transaction("name"):
                    self.add("never, too")
            self.add("two")
        self.assertEqual(self.names(), ["one", "two"])

    def test_inside_what_statements_have_begun(self):
        self.connection.autocommit = True
        cursor = self.connection.cursor()
        for end in ("ROLLBACK", "COMMIT"):
            cursor.execute("BEGIN")
            self.add(end)
            with self.transaction():
                self.add(f"inside {end}")
            with self.fails():
                self.add("never")
            cursor.execute(end)
        with self.assertRaisesRegex(self.error, "has ended before"):
            cursor.execute("BEGIN")
            with self.transaction():
                cursor.execute("COMMIT")
        with self.transaction():
            self.add("whole")
        self.assertEqual(self.names(), ["COMMIT", "inside COMMIT", "whole"])


class Psycopg2BlockTests(BlockTests, PostgresqlTests, DatabaseTestCase):
    pass


class PsycopgBlockTests(BlockTests, PostgresqlTests, DatabaseTestCase):
    driver = "psycopg"
    module = psycopg

    def test_rollback_as_an_exception(self):
        with self.transaction() as whole:
            raise psycopg.Rollback
        with self.transaction():
            self.add("one")
            with self.transaction():
                self.add("never")
                raise psycopg.Rollback
            with self.transaction() as middle:
                self.add("never")
                with self.transaction():
                    raise psycopg.Rollback(middle)
            self.add("two")
        with self.transaction() as whole:
            self.add("never")
            with self.transaction():
                raise psycopg.Rollback(whole)
        with self.assertRaises(psycopg.Rollback), self.transaction():
            raise psycopg.Rollback(whole)
        self.assertEqual((self.connection.state, self.names()), ("idle", ["one", "two"]))

    def test_rollback_of_what_has_ended(self):
        with self.assertRaisesRegex(self.error, "has ended before"), self.transaction():
            self.add("one")
            self.connection.commit()
            raise psycopg.Rollback
        self.add("never")
        with self.assertRaisesRegex(self.error, "has ended before"), self.transaction():
            self.connection.rollback()
            raise psycopg.Rollback
        with self.assertRaisesRegex(self.error, "has ended before"), self.transaction():
            self.connection.rollback()
            self.add("another")
            raise psycopg.Rollback
        self.connection.rollback()
        with self.assertRaises(DisconnectionError), self.transaction(), self.transaction():
            self.forward.drop()
            self.assertRaises(DisconnectionError, self.add, "never")
            raise psycopg.Rollback
        self.assertEqual((self.connection.state, self.names()), ("idle", ["one"]))


class MysqlTests(LossTests):
    def test_a_statement_that_has_failed(self):
        with self.transaction() as cursor:
            self.add("one")
            with self.assertRaises(self.connection.Error), self.transaction():
                self.add("two")
                cursor.execute("SELECT nothing")
            self.add("three")
        self.assertEqual(self.names(), ["one", "three"])

    def test_a_statement_that_commits(self):
        """Savepoints end with the transaction that DDL commits; nothing after it is committed."""
        with self.assertRaisesRegex(self.error, "has not ended"), self.transaction() as cursor:
            with self.assertRaisesRegex(self.error, "has ended before"), self.transaction():
                self.add("one")
                cursor.execute("CREATE TABLE other (number int)")
                self.add("two")
            self.add("three")
        self.add("four")
        with self.assertLogs("zreconnect", "WARNING") as logs, self.fails() as cursor:
            cursor.execute("CREATE TABLE another (number int)")
            self.add("five")
        self.assertIn("could not be undone", logs.output[0])
        self.assertRaises(self.error, self.connection.commit)
        self.connection.rollback()
        self.assertEqual(self.names(), ["four", "one"])

    def test_one_name_again(self):
        """MySQL forgets the first one, and so nothing is committed."""
        with (
            self.assertRaisesRegex(self.connection.Error, "does not exist"),
            self.transaction(),
            self.transaction("name"),
        ):
            self.add("one")
            with self.transaction("name"):
                self.add("two")
        self.assertEqual(self.names(), [])


@on_mariadb()
class PymysqlBlockTests(BlockTests, MysqlTests, MysqlTestCase, LineTestCase):
    driver_name = "pymysql"


@on_mariadb()
@needs_mysqlclient
class MysqlclientBlockTests(BlockTests, MysqlTests, MysqlTestCase, LineTestCase):
    driver_name = "mysqlclient"


class SqliteBlockTests(BlockTests, SqliteTestCase):
    step = 1

    def test_an_error_that_rolls_everything_back(self):
        with self.assertRaises(sqlite3.IntegrityError), self.transaction() as cursor:
            self.add("one")
            with self.transaction():
                cursor.execute("INSERT OR ROLLBACK INTO item VALUES ('one')")
        with self.assertRaises(sqlite3.InternalError), self.transaction() as cursor:
            with contextlib.suppress(sqlite3.IntegrityError), self.transaction():
                self.add("one")
                cursor.execute("INSERT OR ROLLBACK INTO item VALUES ('one')")
            self.add("two")
        self.assertEqual(self.names(), [])
