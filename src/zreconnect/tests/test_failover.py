"""A primary and its standby change places."""

import psycopg2

from zreconnect import DisconnectionError, Ledger
from zreconnect.testing import EmbeddedStandby, PortForward
from zreconnect.tests.base import DatabaseTestCase, wait_until


class FailoverTests(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()
        self.standby = EmbeddedStandby(self.server)
        self.addCleanup(self.standby.stop)
        self.standby.start()
        self.both = (
            f"host=127.0.0.1,127.0.0.1 port={self.forward.port},{self.standby.port}"
            f" user=postgres password={self.server.password} dbname={self.dbname}"
        )

    def fail_over(self):
        wait_until(
            lambda: self.standby.query("SELECT to_regclass('item') IS NOT NULL") == [(True,)]
        )
        self.forward.refuse()
        self.forward.drop()
        self.standby.promote()

    def test_the_next_transaction_finds_the_new_primary(self):
        for witness in ("xid", Ledger()):
            connection = self.connect(self.both, witness=witness)
            connection.run(lambda: None)
            self.assertEqual(connection.info.port, self.forward.port)
        connection = self.connect(self.both + " target_session_attrs=read-write")
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        connection.commit()
        self.fail_over()
        cursor.execute("INSERT INTO item VALUES ('one')")
        self.assertEqual(connection.info.port, self.standby.port)
        connection.commit()
        self.assertEqual(self.standby.query("SELECT name FROM item"), [("one",)])

    def test_a_session_with_a_standby_that_cannot_write_is_lost(self):
        direct = self.connect(self.standby.dsn())
        cursor = direct.cursor()
        cursor.execute("SELECT 1")
        self.assertEqual(direct.state, "active")
        with self.assertRaises(DisconnectionError) as refused:
            cursor.execute("CREATE TABLE other (n int)")
        self.assertEqual(refused.exception.__cause__.pgcode, "25006")
        self.assertEqual(direct.state, "doomed")
        direct.rollback()
        self.standby.promote()
        cursor.execute("CREATE TABLE other (n int)")
        direct.commit()

    def test_not_if_it_was_made_read_only(self):
        for dsn in (self.standby.dsn(), self.dsn):
            connection = self.connect(dsn)
            connection.readonly = True
            with self.assertRaises(psycopg2.errors.ReadOnlySqlTransaction):
                connection.cursor().execute("CREATE TABLE other (n int)")
            self.assertEqual(connection.state, "active")

    def test_not_if_the_primary_is_asked_in_a_read_only_transaction(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("SET TRANSACTION READ ONLY")
        with self.assertRaises(psycopg2.errors.ReadOnlySqlTransaction):
            cursor.execute("CREATE TABLE other (n int)")
        self.assertEqual(connection.state, "active")

    def test_a_lost_commit_on_a_standby_may_run_again(self):
        for witness in ("xid", Ledger()):
            with PortForward(self.standby.host, self.standby.port) as forward:
                connection = self.connect(self.standby.dsn(port=forward.port), witness=witness)
                connection.cursor().execute("SELECT 1")
                forward.drop()
                with self.assertRaises(DisconnectionError):
                    connection.commit()

    def test_a_session_that_misses_its_target_is_left(self):
        other = EmbeddedStandby(self.server)
        self.addCleanup(other.stop)
        other.start()
        for target, before, after in [
            ("standby", self.standby, other),
            ("read-only", other, self.server),
        ]:
            dsn = (
                f"host=127.0.0.1,127.0.0.1 port={before.port},{after.port} user=postgres"
                f" password={self.server.password} target_session_attrs={target}"
            )
            if after is self.server:
                self.addCleanup(self.query, "SELECT pg_reload_conf()")
                self.addCleanup(self.query, "ALTER SYSTEM RESET default_transaction_read_only")
                self.query("ALTER SYSTEM SET default_transaction_read_only TO on")
                self.query("SELECT pg_reload_conf()")
            connection = self.connect(dsn)
            connection.run(lambda: None)
            self.assertEqual(connection.info.port, before.port)
            before.promote()
            with self.events() as seen:
                wait_until(lambda connection=connection: self.is_elsewhere(connection, seen))
            self.assertEqual(connection.info.port, after.port)
            connection.close()

    def is_elsewhere(self, connection, seen):
        connection.run(lambda: None)
        return seen
