"""A reconnected session is the same session."""

from contextlib import ExitStack
from unittest import mock

import psycopg2
import psycopg2.extensions
import psycopg2.extras

from zreconnect import CommitOutcomeUnknown, ReconnectTimeout, session, watchdog
from zreconnect.events import ConnectionAttemptFailed, ConnectionLost, Reconnected
from zreconnect.tests.base import DatabaseTestCase, policy_of, wait_until

SHOW = (
    "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'),"
    " current_setting('transaction_deferrable')"
)


class SettingsTests(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.connection = self.connect()

    def show(self, connection=None):
        with (connection or self.connection).transaction() as cursor:
            cursor.execute(SHOW)
            return cursor.fetchone()

    def test_defaults(self):
        connection = self.connection
        self.assertEqual(
            (connection.isolation_level, connection.readonly, connection.deferrable), (None,) * 3
        )
        self.assertIsNone(connection.cursor_factory)
        self.assertFalse(connection.autocommit)
        self.assertEqual(self.show(), ("read committed", "off", "off"))

    def test_a_server_that_takes_no_writes_is_of_use_for_reading_only(self):
        for readonly, needs_writes in ((None, True), (False, True), (True, False)):
            self.connection.readonly = readonly
            self.assertIs(self.connection.work.link.needs_writes(), needs_writes)

    def test_transaction_modes_return_after_a_disconnect(self):
        connection = self.connection
        for change, modes in [
            (lambda: setattr(connection, "isolation_level", "serializable"), 0),
            (lambda: setattr(connection, "readonly", True), 1),
            (lambda: setattr(connection, "deferrable", True), 2),
        ]:
            change()
            self.forward.drop()
            self.assertEqual(self.show()[: modes + 1], ("serializable", "on", "on")[: modes + 1])
        self.assertEqual(
            connection.isolation_level, psycopg2.extensions.ISOLATION_LEVEL_SERIALIZABLE
        )
        connection.isolation_level = "DEFAULT"
        connection.readonly = False
        connection.deferrable = "DEFAULT"
        self.assertEqual(self.show(), ("read committed", "off", "off"))
        connection.deferrable = False
        connection.isolation_level = psycopg2.extensions.ISOLATION_LEVEL_REPEATABLE_READ
        self.assertEqual(self.show(), ("repeatable read", "off", "off"))

    def test_they_cost_no_round_trip(self):
        def transaction():
            with self.connection.transaction() as cursor:
                cursor.execute("SELECT 1")

        transaction()
        self.connection.set_session("SERIALIZABLE", readonly=True, deferrable=True)
        self.assertEqual(self.round_trips(transaction), 3)

    def test_bad_values(self):
        for name, value in [
            ("isolation_level", "SNAPSHOT"),
            ("isolation_level", 9),
            ("readonly", "yes"),
            ("deferrable", "no"),
        ]:
            with self.assertRaises(ValueError):
                setattr(self.connection, name, value)
            self.assertIsNone(getattr(self.connection, name))

    def test_not_inside_a_transaction(self):
        self.connection.begin()
        for change in (
            lambda: self.connection.set_session(readonly=True),
            lambda: self.connection.set_isolation_level(3),
            lambda: self.connection.set_client_encoding("LATIN1"),
            lambda: setattr(self.connection, "autocommit", True),
        ):
            with self.assertRaisesRegex(self.module.ProgrammingError, "inside a transaction"):
                change()
        self.assertFalse(self.connection.autocommit)

    def test_set_isolation_level_of_psycopg2(self):
        self.connection.isolation_level = "SERIALIZABLE"
        self.connection.set_isolation_level(psycopg2.extensions.ISOLATION_LEVEL_AUTOCOMMIT)
        self.assertIsNone(self.connection.isolation_level)
        self.assertTrue(self.connection.autocommit)
        self.connection.set_isolation_level(psycopg2.extensions.ISOLATION_LEVEL_SERIALIZABLE)
        self.assertFalse(self.connection.autocommit)
        self.assertEqual(self.show()[0], "serializable")

    def test_client_encoding(self):
        self.connection.set_client_encoding("LATIN1")
        self.forward.drop()
        with self.connection.transaction() as cursor:
            cursor.execute("SHOW client_encoding")
            self.assertEqual(cursor.fetchone(), ("LATIN1",))
        self.assertEqual(self.connection.encoding, "LATIN1")

    def test_the_same_client_encoding_inside_a_transaction(self):
        cursor = self.connection.cursor()
        cursor.execute("CREATE TEMPORARY TABLE kept ()")
        for name in ("utf-8", "UNICODE", "UTF8"):
            self.assertEqual(
                self.round_trips(lambda name=name: self.connection.set_client_encoding(name)), 0
            )
        cursor.execute("SELECT FROM kept")
        self.assertEqual(self.connection.work.link.settings.client_encoding, "UTF8")

    def test_an_unknown_client_encoding_is_not_kept(self):
        with self.assertRaises(self.module.Error):
            self.connection.set_client_encoding("KLINGON")
        self.forward.drop()
        self.assertEqual(self.connection.encoding, "UTF8")

    def test_cursor_factory(self):
        for factory, row in [
            (psycopg2.extras.RealDictCursor, {"one": 1}),
            (psycopg2.extras.DictCursor, [1]),
        ]:
            self.connection.cursor_factory = factory
            for _ in range(2):
                cursor = self.connection.cursor()
                cursor.execute("SELECT 1 AS one")
                self.assertEqual(cursor.fetchone(), row)
                self.connection.rollback()
                self.forward.drop()

    def test_settings_when_the_session_is_lost(self):
        self.connection.autocommit = True
        self.connection.begin()
        self.connection.rollback()
        self.forward.drop()
        self.connection.readonly = True
        self.assertTrue(self.connection.readonly)
        with self.assertRaises(self.module.errors.ReadOnlySqlTransaction):
            self.connection.execute("CREATE TABLE item (name text)")


class AutocommitTests(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()
        self.connection = self.connect()
        self.connection.autocommit = True
        self.cursor = self.connection.cursor()

    def test_each_statement_is_a_transaction(self):
        self.cursor.execute("INSERT INTO item VALUES ('one')")
        self.assertEqual((self.connection.state, self.names()), ("idle", ["one"]))
        self.connection.commit()
        self.connection.rollback()

    def test_a_statement_takes_one_round_trip(self):
        self.cursor.execute("SELECT 1")
        self.assertEqual(self.round_trips(lambda: self.cursor.execute("SELECT 1")), 1)

    def test_a_session_that_ended_while_idle_costs_nothing(self):
        self.cursor.execute("SELECT 1")
        for lose in (self.forward.drop, self.server.restart, self.kill):
            with self.subTest(lose.__name__), self.events() as events:
                lose()
                # The end has to come through the forwarder.
                wait_until(lambda: not self.connection.work.link.session.watch.is_quiet())
                self.cursor.execute("SELECT 2")
                self.assertEqual(self.cursor.fetchone(), (2,))
                self.assertEqual(
                    [
                        type(event)
                        for event in events
                        if not isinstance(event, ConnectionAttemptFailed)
                    ],
                    [ConnectionLost, Reconnected],
                )

    def kill(self):
        self.query(
            "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )

    def test_what_has_arrived_is_not_always_the_end(self):
        self.cursor.execute("LISTEN news")
        raw = self.connection.driver_connection
        self.query("NOTIFY news")
        wait_until(lambda: not self.connection.work.link.session.watch.is_quiet())
        self.assertEqual(self.round_trips(lambda: self.cursor.execute("SELECT 1")), 2)
        self.assertIs(self.connection.driver_connection, raw)
        self.assertEqual(self.round_trips(lambda: self.cursor.execute("SELECT 1")), 1)

    def test_an_error_that_is_no_disconnect(self):
        self.cursor.execute("LISTEN news")
        self.query("NOTIFY news")
        wait_until(lambda: not self.connection.work.link.session.watch.is_quiet())
        driver = self.connection.work.link.driver
        error = self.module.ProgrammingError("in use")
        with (
            mock.patch.object(type(driver), "query", side_effect=error),
            self.assertRaisesRegex(self.module.ProgrammingError, "in use"),
        ):
            self.cursor.execute("SELECT 1")

    def test_the_statement_that_met_the_disconnect_raises_and_the_next_reconnects(self):
        self.cursor.execute("SELECT 1")
        self.forward.cut("to_client", 0)
        # The statement was its own commit, and may have been executed.
        with (
            self.assertLogs("zreconnect", "ERROR") as logs,
            self.assertRaisesRegex(CommitOutcomeUnknown, "a statement in autocommit mode"),
        ):
            self.cursor.execute("SELECT 2")
        self.assertIn("The driver said: ", logs.records[0].evidence)
        self.assertEqual(self.connection.state, "idle")
        self.cursor.execute("SELECT 3")
        self.assertEqual(self.cursor.fetchone(), (3,))

    def test_begin_begins_a_transaction_all_the_same(self):
        with self.assertRaises(LookupError), self.connection.transaction() as cursor:
            cursor.execute("INSERT INTO item VALUES ('one')")
            raise LookupError
        self.assertEqual(self.names(), [])

    def test_modes_are_the_sessions_and_return(self):
        self.connection.set_session("SERIALIZABLE", readonly=True)
        for _ in range(2):
            self.cursor.execute("SHOW default_transaction_isolation")
            self.assertEqual(self.cursor.fetchone(), ("serializable",))
            with self.assertRaises(self.module.errors.ReadOnlySqlTransaction):
                self.cursor.execute("INSERT INTO item VALUES ('one')")
            self.forward.drop()

    def test_modes_of_on_connect_are_there_again_after_it(self):
        connection = self.connect(
            on_connect=lambda raw: raw.cursor().execute(
                "SET default_transaction_isolation TO 'repeatable read'"
            )
        )
        connection.set_session("SERIALIZABLE", deferrable=True, autocommit=True)
        connection.cursor().execute("SELECT 1")
        connection.set_session("READ COMMITTED")
        connection.autocommit = False
        connection.isolation_level = None
        connection.deferrable = None
        cursor = connection.cursor()
        for name, value in [("isolation", "repeatable read"), ("deferrable", "off")]:
            cursor.execute(f"SHOW default_transaction_{name}")
            self.assertEqual(cursor.fetchone(), (value,))

    def test_a_server_that_is_away(self):
        connection = self.connect()
        connection.autocommit = True
        self.forward.refuse()
        cursor = connection.cursor()
        for _ in range(2):
            with policy_of(connection, timeout=0), self.assertRaises(ReconnectTimeout):
                cursor.execute("SELECT 1")
        self.forward.accept()
        cursor.execute("SELECT 1")


class OnConnectTests(DatabaseTestCase):
    def test_it_prepares_each_session_before_the_first_statement(self):
        def on_connect(raw):
            with raw.cursor() as cursor:
                cursor.execute("SET application_name TO 'prepared'")

        connection = self.connect(on_connect=on_connect)
        for _ in range(2):
            with connection.transaction() as cursor:
                cursor.execute("SHOW application_name")
                self.assertEqual(cursor.fetchone(), ("prepared",))
            self.forward.drop()

    def test_its_exceptions_are_raised_and_nothing_is_left(self):
        def on_connect(raw):
            raise LookupError("no such setting")

        connection = self.connect(on_connect=on_connect)
        with self.assertRaisesRegex(LookupError, "no such setting"):
            connection.begin()
        self.assertEqual(connection.state, "idle")
        wait_until(lambda: not self.sessions())

    def test_a_disconnect_in_it_is_another_failed_attempt(self):
        calls = []

        def on_connect(raw):
            calls.append(raw)
            if len(calls) < 3:
                self.forward.drop()
            with raw.cursor() as cursor:
                cursor.execute("SELECT 1")

        connection = self.connect(on_connect=on_connect)
        connection.begin()
        self.assertEqual(len(calls), 3)

    def test_it_may_change_the_mode_but_not_leave_a_transaction(self):
        def in_a_transaction(raw):
            raw.autocommit = False
            with raw.cursor() as cursor:
                cursor.execute("SELECT 1")

        def in_another_mode(raw):
            in_a_transaction(raw)
            raw.commit()

        self.connect(on_connect=in_another_mode).begin()
        with self.assertRaisesRegex(self.module.ProgrammingError, "inside a transaction"):
            self.connect(on_connect=in_a_transaction).begin()


class EndOfTheInterpreterTests(DatabaseTestCase):
    def test_nothing_is_raised_when_the_names_of_modules_are_gone(self):
        connection = self.connect()
        connection.begin()
        left = connection.work.link.session
        names = [(session, "contextlib"), (session, "os"), (watchdog, "contextlib")]
        with ExitStack() as stack:
            for module, name in names:
                stack.enter_context(mock.patch.object(module, name, None))
            left.__del__()
            left.watch.__del__()
