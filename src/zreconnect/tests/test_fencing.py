"""Whose session a fence ends: that of our lost transaction, and nobody else's."""

import threading
import time
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import psycopg
import psycopg2

from zreconnect import DisconnectionError, Ledger, ReconnectingConnection, XidWitness, witness
from zreconnect.drivers.base import Evidence, ServerSession, load_driver
from zreconnect.drivers.pooling import Pooling
from zreconnect.tests.base import DatabaseTestCase, wait_until

WITNESSES = (XidWitness(), XidWitness(at_commit=True), Ledger())


class FencingTestCase(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()
        self.driver_object = load_driver(self.driver)

    def insert(self, connection):
        connection.cursor().execute("INSERT INTO item VALUES ('one')")

    def suspend(self, orphan):
        """The orphan does not notice that its line is cut."""
        self.server.suspend_backend(orphan)
        self.forward.drop()

    def resume_soon(self, orphan):
        timer = threading.Timer(0.3, self.server.resume_backend, [orphan])
        timer.start()
        self.addCleanup(timer.join)


class EvidenceTests:
    """What makes a driver certain."""

    def raw(self):
        raw = self.driver_object.connect(self.driver_object.parse(self.dsn), 10)
        self.addCleanup(raw.close)
        self.driver_object.prepare(raw)
        return raw

    def setUp(self):
        super().setUp()
        self.ours, self.looking = self.raw(), self.raw()
        self.session = self.driver_object.identify(self.ours)
        # By more than the milliseconds that it takes to ask.
        self.before = time.monotonic() - 1.0

    def ends(self, session=None, **evidence):
        evidence.setdefault("began", self.before)
        found = Evidence(**evidence)
        return self.driver_object.end_session(self.looking, session or self.session, found)

    def ask(self, statement):
        ((answer,),) = self.driver_object.query(self.ours, statement)
        return answer

    def begin(self):
        self.driver_object.query(self.ours, "BEGIN")

    def assert_lives(self):
        self.assertEqual(self.ask("SELECT 1"), 1)

    def test_an_idle_session_is_left_alone(self):
        self.assertFalse(self.ends(began=time.monotonic()))
        self.assert_lives()

    def test_what_has_begun_later_in_the_same_session_is_somebody_elses(self):
        self.begin()
        self.assertFalse(self.ends())
        self.assert_lives()

    def test_what_has_begun_before_is_ours(self):
        self.begin()
        self.assertTrue(self.ends(began=time.monotonic()))
        wait_until(lambda: self.session.pid not in self.sessions())

    def test_behind_a_pooler_the_session_tells_nothing(self):
        self.begin()
        for kind in ({"is_pooled": True}, {"is_lent": True}):
            session = replace(self.session, **kind)
            self.assertFalse(self.ends(session, began=time.monotonic()))
        self.assert_lives()

    def test_the_transactions_own_mark(self):
        elsewhere = ServerSession(0, None, is_pooled=True)
        self.begin()
        pid, start = self.ask(f"SELECT concat_ws(' ', {witness.MARK})").split()
        self.assertFalse(self.ends(elsewhere, marks=((int(pid), start + "1"),)))
        self.assertFalse(self.ends(elsewhere, marks=((0, start),)))
        self.assert_lives()
        self.assertTrue(self.ends(elsewhere, marks=((0, start), (int(pid), start))))
        wait_until(lambda: self.session.pid not in self.sessions())

    def test_the_row_that_it_has_written(self):
        elsewhere = ServerSession(0, None, is_pooled=True)
        self.begin()
        xid = str(self.ask("SELECT pg_current_xact_id()::text"))
        # Its owner has had it locked since he began.
        self.assertFalse(self.ends(elsewhere, xid=xid))
        self.assertFalse(self.ends(elsewhere, xid="0", began=time.monotonic()))
        self.assert_lives()
        self.assertTrue(self.ends(elsewhere, xid=xid, began=time.monotonic()))
        wait_until(lambda: self.session.pid not in self.sessions())

    def test_never_the_session_that_asks(self):
        self.looking = self.ours
        self.begin()
        self.assertFalse(self.ends(began=time.monotonic()))
        self.assert_lives()

    def test_a_pooler_has_numbers_of_its_own(self):
        self.assertFalse(self.driver_object.pooling.is_in_between(self.ours))
        for number in (-5, 2**31 - 1):
            self.assertTrue(self.is_in_between(number, self.driver_object.query))
        # It may be one that a process could have.
        self.assertTrue(self.is_in_between(1, self.driver_object.query))

    def test_pgpool_has_those_of_its_servers(self):
        def query(raw, statement):
            is_pgpools = statement == "SHOW pool_version"
            return [("4.3.5",)] if is_pgpools else self.driver_object.query(raw, statement)

        self.assertFalse(self.is_in_between(1, query))

    def is_in_between(self, number, query):
        raw = SimpleNamespace(info=SimpleNamespace(backend_pid=number))
        driver = SimpleNamespace(
            query=lambda raw, statement: query(self.ours, statement), module=self.module
        )
        return Pooling(driver).is_in_between(raw)


class Psycopg2EvidenceTests(EvidenceTests, FencingTestCase):
    pass


class PsycopgEvidenceTests(EvidenceTests, FencingTestCase):
    driver = "psycopg"
    module = psycopg


class FencingTests:
    def connections(self, **keywords):
        for each in WITNESSES:
            self.query("DELETE FROM item")
            with closing(self.connect(witness=each, **keywords)) as connection:
                yield connection

    def check_that_the_orphan_is_ended(self, connection):
        connection.begin()
        self.insert(connection)
        orphan = connection.info.backend_pid
        self.suspend(orphan)
        self.resume_soon(orphan)
        connection.rollback()

        def work():
            self.assertNotIn(orphan, self.sessions())
            self.insert(connection)

        connection.run(work)
        self.assertEqual(self.names(), ["one"])

    def test_after_set_role(self):
        self.query("CREATE ROLE clerk")
        self.addCleanup(self.query, "DROP ROLE clerk")
        self.query("GRANT ALL ON SCHEMA public TO clerk")
        self.query("GRANT ALL ON item TO clerk")
        self.addCleanup(self.query, "DROP OWNED BY clerk")
        for statement in ("SET ROLE clerk", "SET SESSION AUTHORIZATION clerk"):
            for connection in self.connections(
                on_connect=lambda raw, statement=statement: raw.cursor().execute(statement)
            ):
                self.check_that_the_orphan_is_ended(connection)
                with connection.cursor() as cursor:
                    cursor.execute("SELECT current_user")
                    self.assertEqual(cursor.fetchone(), ("clerk",))
                connection.rollback()

    def test_whatever_times_are_to_the_program(self):
        for connection in self.connections(on_connect=self.read_times_as_objects):
            self.check_that_the_orphan_is_ended(connection)

    def test_behind_a_pooler(self):
        """As far as is known here: one that passes on the server's numbers."""
        for connection in self.connections(pooled=True):
            self.check_that_the_orphan_is_ended(connection)

    def test_one_whose_begin_has_travelled_along_with_a_statement(self, **keywords):
        for connection in self.connections(response_timeout=0.5, **keywords):
            connection.run(self.insert, connection)
            orphan = connection.info.backend_pid
            with self.assertRaises(DisconnectionError), connection.cursor() as cursor:
                # It does not look at its line.
                cursor.execute("DELETE FROM item WHERE pg_sleep(60) IS NOT NULL")
            connection.rollback()
            # A row that the orphan has locked.
            connection.run(lambda c=connection: c.cursor().execute("DELETE FROM item"))
            self.assertNotIn(orphan, self.sessions())
            self.assertEqual(self.names(), [])

    def test_the_same_behind_a_pooler(self):
        """What BEGIN was answered is known, or BEGIN goes by itself."""
        self.test_one_whose_begin_has_travelled_along_with_a_statement(pooled=True)

    def test_nothing_is_done_if_nothing_was_under_way(self):
        for connection in self.connections():
            for end in (connection.commit, connection.rollback):
                connection.begin()
                connection.cursor().execute("UPDATE item SET name = 'two'")
                end()
                self.forward.drop()
                with mock.patch.object(self.driver_object, "end_session") as end_session:
                    connection.run(lambda: None)
                self.assertEqual(end_session.mock_calls, [])

    def test_one_that_cannot_be_ended_is_not_waited_for_for_ever(self):
        for connection in self.connections():
            connection.begin()
            connection.cursor().execute("SELECT count(*) FROM item")
            orphan = connection.info.backend_pid
            self.suspend(orphan)
            connection.rollback()
            try:
                with mock.patch.object(witness, "PATIENCE_WITH_ORPHANS", 0.1):
                    connection.run(self.insert, connection)
                self.assertIn(orphan, self.sessions())
            finally:
                self.server.resume_backend(orphan)
            self.assertEqual(self.names(), ["one"])

    def test_who_has_locked_the_row_of_a_ledger_is_left_alone(self):
        connection = self.connect(witness=Ledger())
        connection.run(lambda: None)
        with closing(psycopg2.connect(self.server.dsn(dbname=self.dbname))) as other:
            other.cursor().execute("SELECT FROM zreconnect_ledger FOR UPDATE")
            connection.work.link.observer._is_under_way = True
            connection.work.link.observer._began = None
            self.forward.drop()
            # BEGIN would wait for it; the connection has another row now.
            connection.run(self.insert, connection)
            other.cursor().execute("SELECT 1")
        self.assertEqual(self.names(), ["one"])
        self.assertEqual(self.query("SELECT count(*) FROM zreconnect_ledger"), [(2,)])

    def test_without_the_ledger_there_is_no_evidence_in_it(self):
        connection = self.connect(witness=Ledger())
        connection.begin()
        self.forward.drop()
        connection.rollback()
        self.query("DROP TABLE zreconnect_ledger")
        connection.run(self.insert, connection)
        self.assertEqual(self.names(), ["one"])


class Psycopg2FencingTests(FencingTests, FencingTestCase):
    def read_times_as_objects(self, raw):
        kind = psycopg2.extensions.new_type((1184,), "OBJECT", lambda value, cursor: object())
        psycopg2.extensions.register_type(kind, raw)


class PsycopgFencingTests(FencingTests, FencingTestCase):
    def read_times_as_objects(self, raw):
        class ObjectLoader(psycopg.adapt.Loader):
            def load(self, data):
                return object()

        raw.adapters.register_loader("timestamptz", ObjectLoader)

    driver = "psycopg"
    module = psycopg


class OtherRoleTests(FencingTestCase):
    def test_one_that_may_be_seen_and_not_ended_is_waited_for(self):
        self.query(f"CREATE ROLE watchman LOGIN PASSWORD '{self.server.password}'")
        self.addCleanup(self.query, "DROP ROLE watchman")
        self.addCleanup(self.query, "DROP OWNED BY watchman")
        self.query("GRANT pg_monitor TO watchman")
        self.query("GRANT CREATE ON SCHEMA public TO watchman")
        self.query("GRANT ALL ON item TO watchman")
        for each in (XidWitness(), Ledger("watched")):
            users = iter(["postgres", "watchman"])
            connection = ReconnectingConnection(
                lambda users=users: psycopg2.connect(self.layer.dsn(next(users), self.dbname)),
                witness=each,
            )
            self.addCleanup(connection.close)
            self.insert(connection)
            self.query("GRANT ALL ON ALL TABLES IN SCHEMA public TO watchman")
            orphan = connection.get_backend_pid()
            self.suspend(orphan)
            self.resume_soon(orphan)
            with self.assertRaises(DisconnectionError):
                connection.commit()
            self.assertEqual(self.names(), [])
            connection.close()
