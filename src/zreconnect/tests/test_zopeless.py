"""initZopeless and the three values of implicitBegin."""

import subprocess
import sys
import threading
import unittest
import warnings

import psycopg2
import transaction
from transaction.interfaces import AlreadyInTransaction

import zreconnect
from zreconnect import (
    CommitOutcomeUnknown,
    ConflictingTransactionManagerError,
    DisconnectionError,
    ReconnectTimeout,
    initZopeless,
    isZopeless,
)
from zreconnect.tests.base import DatabaseTestCase, wait_until, with_time_to_connect


class ZopelessTestCase(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()

    def install(self, **keywords):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            manager = initZopeless(self.dsn, **keywords)
        self.addCleanup(self.uninstall, manager)
        return manager

    def uninstall(self, manager):
        if isZopeless():
            manager.uninstall()

    def insert(self, manager, name):
        manager.cursor().execute("INSERT INTO item VALUES (%s)", (name,))


@with_time_to_connect
class ExplicitTests(ZopelessTestCase):
    def setUp(self):
        super().setUp()
        self.manager = self.install(implicitBegin=False)

    def test_commit_and_abort(self):
        self.manager.begin()
        self.insert(self.manager, "one")
        self.manager.commit()
        self.manager.begin()
        self.insert(self.manager, "two")
        self.manager.abort()
        self.assertEqual(self.names(), ["one"])

    def test_nothing_begins_by_itself(self):
        for end in (lambda: None, self.manager.commit, self.manager.abort):
            end()
            with self.assertRaisesRegex(psycopg2.ProgrammingError, "call begin"):
                self.manager.cursor().execute("SELECT 1")
            self.manager.begin()

    def test_begin_inside_a_transaction(self):
        self.manager.begin()
        self.insert(self.manager, "one")
        with self.assertRaisesRegex(AlreadyInTransaction, "commit.. or abort"):
            self.manager.begin()
        self.manager.commit()
        self.assertEqual(self.names(), ["one"])

    def test_begin_waits_and_gives_up(self):
        self.manager.uninstall()
        manager = self.install(implicitBegin=False, timeout=0.2)
        self.forward.refuse()
        with self.assertRaises(ReconnectTimeout):
            manager.begin()
        self.assertEqual(transaction.get()._resources, [])
        self.forward.accept()
        manager.begin()
        self.insert(manager, "one")
        manager.commit()
        self.assertEqual(self.names(), ["one"])

    def test_a_restart_between_transactions_costs_nothing(self):
        for name in ("one", "two"):
            self.manager.begin()
            self.insert(self.manager, name)
            self.manager.commit()
            self.server.restart()
        self.assertEqual(self.names(), ["one", "two"])

    def test_a_restart_inside_a_transaction(self):
        self.manager.begin()
        self.server.restart()
        with self.assertRaises(DisconnectionError):
            self.insert(self.manager, "one")
        with self.assertRaises(AlreadyInTransaction):
            self.manager.begin()
        with self.assertRaises(DisconnectionError):
            self.manager.commit()
        self.manager.abort()
        self.manager.begin()
        self.insert(self.manager, "two")
        self.manager.commit()
        self.assertEqual(self.names(), ["two"])

    def test_run(self):
        calls = []

        def work():
            calls.append(1)
            self.insert(self.manager, "one")
            if len(calls) < 3:
                self.forward.drop()
                self.manager.cursor().execute("SELECT 1")
            return "done"

        self.assertEqual(self.manager.run(work), "done")
        self.assertEqual((len(calls), self.names()), (3, ["one"]))
        with self.assertRaises(psycopg2.IntegrityError):
            self.manager.run(work)
        self.assertEqual(len(calls), 4)
        self.assertEqual(self.manager.connection().state, "idle")

    def test_what_is_raised_in_run_is_not_hidden_by_an_abort_that_fails(self):
        class Broken:
            transaction_manager = transaction.manager

            def sortKey(self):
                return "broken"

            def abort(self, transaction):
                raise LookupError("of another data manager")

        def work(error):
            self.insert(self.manager, "one")
            transaction.get().join(Broken())
            raise error

        for cause in (TimeoutError, KeyboardInterrupt, SystemExit):
            error = cause("the program's own")
            with self.assertLogs("zreconnect", "ERROR"), self.assertRaises(cause) as raised:
                self.manager.run(lambda error=error: work(error))
            self.assertIs(raised.exception, error)
            self.assertEqual(self.manager.connection().state, "idle")
            self.manager.abort()
        with self.assertRaises(LookupError):
            self.manager.run(lambda: work(ValueError()))
        self.manager.abort()
        self.assertEqual(self.names(), [])

    def test_run_inside_a_transaction_changes_nothing(self):
        self.manager.begin()
        self.insert(self.manager, "one")
        with self.assertRaises(AlreadyInTransaction):
            self.manager.run(lambda: None)
        self.manager.commit()
        self.assertEqual(self.names(), ["one"])

    def test_run_does_not_run_again_after_an_unknown_outcome(self):
        self.manager.uninstall()
        self.manager = self.install(implicitBegin=False, witness=None)
        calls = []

        def work():
            calls.append(1)
            self.insert(self.manager, "one")
            self.forward.drop()

        with self.assertRaises(CommitOutcomeUnknown):
            self.manager.run(work)
        self.assertEqual(len(calls), 1)

    def test_set_isolation_level_sticks(self):
        self.manager.set_isolation_level("SERIALIZABLE")
        for _ in range(2):
            self.manager.begin()
            cursor = self.manager.cursor()
            cursor.execute("SHOW transaction_isolation")
            self.assertEqual(cursor.fetchone(), ("serializable",))
            self.manager.abort()
            self.forward.drop()
        with self.assertRaisesRegex(ValueError, "isolation level"):
            self.manager.set_isolation_level("SNAPSHOT")

    def test_other_threads(self):
        self.manager.begin()
        self.insert(self.manager, "one")

        def work():
            self.manager.begin()
            self.insert(self.manager, "two")
            self.manager.commit()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        self.manager.abort()
        self.assertEqual(self.names(), ["two"])

    def test_uninstall(self):
        self.manager.begin()
        self.insert(self.manager, "one")
        self.manager.uninstall()
        self.assertFalse(isZopeless())
        wait_until(lambda: not self.sessions())
        self.assertEqual(self.names(), [])
        for use in (
            self.manager.begin,
            self.manager.commit,
            self.manager.abort,
            self.manager.connection,
            self.manager.cursor,
            self.manager.uninstall,
            lambda: self.manager.run(lambda: None),
            lambda: self.manager.set_isolation_level("SERIALIZABLE"),
        ):
            with self.assertRaisesRegex(RuntimeError, "not installed"):
                use()


@with_time_to_connect
class ImplicitTests(ZopelessTestCase):
    def test_warnings(self):
        for value, category in [
            (None, PendingDeprecationWarning),
            (True, DeprecationWarning),
            (False, None),
        ]:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                manager = initZopeless(self.dsn, implicitBegin=value)
            manager.uninstall()
            self.assertEqual([warning.category for warning in seen], [category][: len(seen)])
            self.assertEqual(len(seen), 0 if category is None else 1)
            for warning in seen:
                self.assertEqual(warning.filename, __file__)
                self.assertIn("implicitBegin=False", str(warning.message))

    def test_a_transaction_begins_after_each_commit_and_abort(self):
        for value in (None, True):
            manager = self.install(implicitBegin=value)
            transactions = [transaction.get()]
            self.insert(manager, f"{value} one")
            manager.commit()
            transactions.append(transaction.get())
            self.insert(manager, f"{value} two")
            manager.abort()
            transactions.append(transaction.get())
            self.assertEqual(len({id(each) for each in transactions}), 3)
            self.insert(manager, f"{value} three")
            manager.commit()
            manager.uninstall()
        self.assertEqual(self.names(), ["None one", "None three", "True one", "True three"])

    def test_an_idle_job_survives_a_restart(self):
        manager = self.install()
        for name in ("one", "two"):
            self.insert(manager, name)
            manager.commit()
            self.assertEqual(manager.connection().state, "idle")
            self.server.restart()
        self.assertEqual(self.names(), ["one", "two"])

    def test_begin_touches_the_database(self):
        manager = self.install()
        manager.begin()
        self.assertEqual(manager.connection().state, "active")
        with self.assertRaises(AlreadyInTransaction):
            manager.begin()

    def test_run(self):
        manager = self.install()
        manager.run(lambda: self.insert(manager, "one"))
        self.assertEqual(self.names(), ["one"])

    def test_the_first_statement_waits_and_gives_up(self):
        manager = self.install(timeout=0.2)
        self.forward.refuse()
        with self.assertRaises(ReconnectTimeout):
            self.insert(manager, "one")
        self.forward.accept()
        with self.assertRaises(DisconnectionError):
            manager.commit()
        manager.abort()
        self.insert(manager, "two")
        manager.commit()
        self.assertEqual(self.names(), ["two"])


class InstallTests(ZopelessTestCase):
    def test_same_settings_again(self):
        manager = self.install(implicitBegin=False, timeout=5)
        with self.assertWarnsRegex(UserWarning, "same settings") as warning:
            again = initZopeless(self.dsn, implicitBegin=False, timeout=5)
        self.assertIs(again, manager)
        self.assertEqual(warning.filename, __file__)

    def test_other_settings(self):
        manager = self.install(implicitBegin=False)
        manager.begin()
        self.insert(manager, "one")
        for keywords in ({"timeout": 5}, {"isolation": "SERIALIZABLE"}, {"sqlClass": object}):
            with self.assertRaises(ConflictingTransactionManagerError) as conflict:
                initZopeless(self.dsn, implicitBegin=False, **keywords)
            self.assertNotIn(self.server.password, str(conflict.exception))
        manager.commit()
        self.assertEqual(self.names(), ["one"])

    def test_sql_class(self):
        class SQLBase:
            pass

        manager = self.install(implicitBegin=False, sqlClass=SQLBase)
        self.assertIs(SQLBase._connection, manager.connection())
        manager.uninstall()
        self.assertFalse(hasattr(SQLBase, "_connection"))

    def test_isolation(self):
        manager = self.install(implicitBegin=False, isolation="SERIALIZABLE")
        manager.begin()
        cursor = manager.cursor()
        cursor.execute("SHOW transaction_isolation")
        self.assertEqual(cursor.fetchone(), ("serializable",))

    def test_bad_arguments_install_nothing(self):
        for error, message, arguments in [
            (ValueError, "dsn", ["oracle://here/db"]),
            (ValueError, "dsn", ["host=here and there"]),
            (TypeError, "dsn", [None]),
            (TypeError, "sqlClass", [self.dsn, "Item"]),
            (TypeError, "implicitBegin", [self.dsn, None, "no"]),
            (ValueError, "timeout", [self.dsn, None, False, -1]),
            (ValueError, "isolation", [self.dsn, None, False, None, "SNAPSHOT"]),
            (ValueError, "driver", [self.dsn, None, False, None, None, "oracle"]),
            (ValueError, "witness", [self.dsn, None, False, None, None, None, "crystal ball"]),
            (TypeError, "witness", [self.dsn, None, False, None, None, None, 5]),
            (TypeError, "on_connect", [self.dsn, None, False, None, None, None, None, "SET x"]),
        ]:
            with self.assertRaisesRegex(error, message):
                initZopeless(*arguments)
            self.assertFalse(isZopeless())

    def test_wrong_password_at_once(self):
        manager = initZopeless(self.dsn.replace(self.server.password, "wrong"), implicitBegin=False)
        self.addCleanup(self.uninstall, manager)
        with self.assertRaisesRegex(psycopg2.OperationalError, "password") as refused:
            manager.begin()
        self.assertNotIsInstance(refused.exception, DisconnectionError)
        self.assertEqual(transaction.get()._resources, [])

    def test_a_program_may_end_in_the_middle(self):
        program = (
            "import sys, zreconnect\n"
            "manager = zreconnect.initZopeless(sys.argv[1], implicitBegin=False)\n"
            "manager.begin()\n"
            "manager.cursor().execute('SELECT 1')\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", program, self.dsn],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": ":".join(sys.path)},
        )
        self.assertEqual((ended.returncode, ended.stdout, ended.stderr), (0, "", ""))
        wait_until(lambda: not self.sessions())


class PublicNamesTests(unittest.TestCase):
    def test_all_are_there(self):
        for name in zreconnect.__all__:
            self.assertTrue(hasattr(zreconnect, name), name)
