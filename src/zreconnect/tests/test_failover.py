"""A primary and its standby change places; one of several hosts is out of order."""

import contextlib
import socket
import threading
import unittest
from types import SimpleNamespace
from unittest import mock

import psycopg
import psycopg2

import zreconnect
from zreconnect import (
    FAIL_FAST,
    PERSIST,
    CommitOutcomeUnknown,
    DisconnectionError,
    Ledger,
    ReconnectingConnection,
    ReconnectingDatabaseAdapter,
    ReconnectTimeout,
    RetryPolicy,
    XidWitness,
)
from zreconnect.events import CommitLookedUp, HistoryChanged
from zreconnect.testing import EmbeddedPgBouncer, EmbeddedStandby, PortForward
from zreconnect.tests.base import REQUIRED, DatabaseTestCase, policy_of, wait_until


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

    def wait_for_table(self):
        wait_until(
            lambda: self.standby.query("SELECT to_regclass('item') IS NOT NULL") == [(True,)]
        )

    def fail_over(self):
        self.wait_for_table()
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

    def test_so_is_one_whose_transaction_began_before_the_promotion(self):
        sessions = []
        for driver in ("psycopg2", "psycopg"):
            for witness in ("xid", Ledger()):
                connection = zreconnect.connect(self.standby.dsn(), driver, witness=witness)
                self.addCleanup(connection.close)
                connection.begin()
                sessions.append(connection)
        self.standby.promote()
        for number, connection in enumerate(sessions):
            # It remains one that only reads, of a server that takes writes by now.
            with self.assertRaises(DisconnectionError):
                connection.execute(f"CREATE TABLE other{number} (n int)")
            connection.rollback()
            connection.run(connection.execute, f"CREATE TABLE other{number} (n int)")

    def test_until_it_takes_writes_it_is_waited_for(self):
        for driver in ("psycopg2", "psycopg"):
            connection = zreconnect.connect(self.both, driver)
            self.addCleanup(connection.close)
            connection.run(lambda: None)
            self.forward.refuse()
            self.forward.drop()
            runs = []

            def work(connection=connection, runs=runs, driver=driver):
                runs.append(None)
                connection.execute("INSERT INTO item VALUES (%s)", (driver,))

            running = threading.Thread(target=connection.run, args=(work,))
            with self.events() as events:
                running.start()
                wait_until(lambda events=events: self.waits_for_writes(events))
                self.forward.accept()
                running.join()
            self.assertEqual(len(runs), 2)
        self.assertEqual(self.query("SELECT count(*) FROM item"), [(2,)])

    def waits_for_writes(self, events):
        return any("takes no writes" in str(event) for event in events)

    def test_who_has_waited_in_vain_for_writes_may_read(self):
        connection = self.connect(self.standby.dsn())
        connection.run(lambda: None)
        with policy_of(connection, timeout=0), self.assertRaises(ReconnectTimeout):
            connection.run(connection.execute, "CREATE TABLE other (n int)")
        with connection.transaction() as cursor:
            cursor.execute("SELECT 1")

    def test_what_writes_when_it_connects_waits_as_well(self):
        def set_up(raw):
            raw.cursor().execute("INSERT INTO item VALUES ('connected')")

        self.wait_for_table()
        connection = self.connect(self.standby.dsn(dbname=self.dbname), on_connect=set_up)
        with policy_of(connection, timeout=0), self.assertRaises(ReconnectTimeout):
            connection.begin()
        self.standby.promote()
        connection.begin()
        rows = self.standby.query("SELECT name FROM item", dbname=self.dbname)
        self.assertEqual(rows, [("connected",)])

    def test_not_if_it_was_made_read_only(self):
        for dsn in (self.standby.dsn(), self.dsn):
            connection = self.connect(dsn)
            connection.readonly = True
            self.assert_refused(connection)

    def assert_refused(self, connection):
        with self.assertRaises(psycopg2.errors.ReadOnlySqlTransaction):
            connection.execute("CREATE TABLE other (n int)")
        self.assertEqual(connection.state, "active")
        connection.close()

    def test_not_if_a_standby_was_asked_for(self):
        dsn = self.standby.dsn()
        for attributes in ("standby", "prefer-standby", "read-only"):
            self.assert_refused(self.connect(f"{dsn}?target_session_attrs={attributes}"))

        def set_up(raw):
            raw.cursor().execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")

        def make():
            raw = psycopg2.connect(dsn)
            raw.readonly = True
            return raw

        self.assert_refused(self.connect(dsn, on_connect=set_up))
        self.assert_refused(ReconnectingConnection(make))

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

    def forwarded(self, server, driver, witness, **keywords):
        """A connection through a forwarder of its own, and that."""
        forward = PortForward(server.host, server.port)
        forward.start()
        self.addCleanup(forward.stop)
        dsn = server.dsn(port=forward.port, dbname=self.dbname)
        connection = zreconnect.connect(dsn, driver, witness=witness, **keywords)
        self.addCleanup(connection.close)
        return connection, forward

    def test_a_commit_in_a_session_that_was_with_a_standby_is_looked_up(self):
        self.connect(witness=Ledger()).run(lambda: None)
        wait_until(
            lambda: (
                self.standby.query("SELECT to_regclass('zreconnect_ledger') IS NOT NULL")
                == [(True,)]
            )
        )
        sessions = []
        for driver in ("psycopg2", "psycopg"):
            for witness in ("xid", Ledger()):
                connection, forward = self.forwarded(self.standby, driver, witness)
                for _ in range(2):
                    connection.execute("SELECT 1")
                    connection.commit()
                sessions.append((f"{driver}, {witness}", connection, forward))
        self.standby.promote()
        for name, connection, forward in sessions:
            with self.subTest(name):
                connection.execute("INSERT INTO item VALUES (%s)", (name,))
                forward.cut("to_client", 0)
                with self.events() as events:
                    connection.commit()
                (outcome,) = (each.outcome for each in events if isinstance(each, CommitLookedUp))
                self.assertEqual(outcome, "committed")
        rows = self.standby.query("SELECT count(*) FROM item", dbname=self.dbname)
        self.assertEqual(rows, [(4,)])

    @unittest.skipUnless(EmbeddedPgBouncer.installed() or REQUIRED, "PgBouncer is not installed")
    def test_a_commit_through_a_pooler_that_was_before_a_standby(self):
        pooler = EmbeddedPgBouncer(self.standby)
        self.addCleanup(pooler.stop)
        pooler.start()
        sessions = []
        for driver in ("psycopg2", "psycopg"):
            for witness in ("xid", Ledger()):
                connection, forward = self.forwarded(pooler, driver, witness)
                connection.run(connection.cursor().execute, "SELECT 1")
                sessions.append((f"{driver}, {witness}", connection, forward))
        self.standby.promote()
        for name, connection, forward in sessions:
            with self.subTest(name):
                connection.execute("INSERT INTO item VALUES (%s)", (name,))
                forward.cut("to_client", 0)
                with self.events() as events:
                    connection.commit()
                (outcome,) = (each.outcome for each in events if isinstance(each, CommitLookedUp))
                self.assertEqual(outcome, "committed")
        rows = self.standby.query("SELECT count(*) FROM item", dbname=self.dbname)
        self.assertEqual(rows, [(4,)])

    def pooler(self, pool_mode="transaction"):
        """A pooler, and what moves the address that it has, to the standby."""
        address = PortForward(self.server.host, self.server.port)
        self.addCleanup(address.stop)
        address.start()
        behind = SimpleNamespace(host="127.0.0.1", port=address.port, password=self.server.password)
        pooler = EmbeddedPgBouncer(behind, pool_mode)
        self.addCleanup(pooler.stop)
        pooler.start()

        def move():
            address.stop()
            address.target_port = self.standby.port
            address.start()

        return pooler, move

    def pooled(self, pool_mode="transaction", **keywords):
        """Connections through a pooler, and what moves the address that it has, to the standby."""
        pooler, move = self.pooler(pool_mode)
        connections = [
            self.forwarded(pooler, driver, witness, **keywords)[0]
            for driver in ("psycopg2", "psycopg")
            for witness in ("xid", XidWitness(at_commit=True), Ledger(), None)
        ]
        for number, connection in enumerate(connections):
            connection.run(connection.execute, "INSERT INTO item VALUES (%s)", (str(number),))
        wait_until(lambda: self.standby.query("SELECT count(*) FROM item") == [(8,)])
        return connections, move

    @unittest.skipUnless(EmbeddedPgBouncer.installed() or REQUIRED, "PgBouncer is not installed")
    def test_a_pooler_that_gives_the_question_for_a_commit_to_a_standby(self):
        self.wait_for_table()
        self.standby.query("SELECT pg_wal_replay_pause()")
        for driver in ("psycopg2", "psycopg"):
            pooler, move = self.pooler()
            connection, forward = self.forwarded(pooler, driver, "xid")
            connection.begin()
            connection.execute("INSERT INTO item VALUES (%s)", (driver,))
            forward.cut("to_client", 0)
            adapter = connection.work.link.driver
            identify = adapter.identify

            def identify_and_move(raw, identify=identify, move=move):
                try:
                    return identify(raw)
                finally:
                    move()

            with (
                self.subTest(driver),
                mock.patch.object(adapter, "identify", identify_and_move),
                self.assertRaises(CommitOutcomeUnknown),
            ):
                # The standby does not know the transaction, which is committed.
                connection.commit()
            connection.rollback()
        self.assertEqual(self.query("SELECT count(*) FROM item"), [(2,)])

    @unittest.skipUnless(EmbeddedPgBouncer.installed() or REQUIRED, "PgBouncer is not installed")
    def test_a_pooler_that_leads_to_the_new_primary_without_a_word(self):
        connections, move = self.pooled()
        self.standby.promote()
        move()
        with self.events() as events:
            for number, connection in enumerate(connections, len(connections)):
                connection.execute("INSERT INTO item VALUES (%s)", (str(number),))
                connection.commit()
                connection.execute("SELECT 1")
                connection.commit()
        # Without a witness nothing is known of it.
        told = [event.server for event in events if isinstance(event, HistoryChanged)]
        self.assertEqual(
            told, [each.server for each in connections if each.work.link.options.witness]
        )
        self.assertEqual(len(events), len(told))
        self.assertEqual(self.standby.query("SELECT count(*) FROM item"), [(16,)])

    @unittest.skipUnless(EmbeddedPgBouncer.installed() or REQUIRED, "PgBouncer is not installed")
    def test_a_pooler_that_leads_to_a_new_primary_which_lacks_work(self):
        """Nobody is told that all is there; also not if the first transaction there has written
        over what would have shown it, as one does whose BEGIN went along with a statement."""
        connections, move = self.pooled()
        self.standby.promote()
        for number, connection in enumerate(connections, len(connections)):
            connection.run(connection.execute, "INSERT INTO item VALUES (%s)", (str(number),))
        move()
        with self.events() as events:
            for number, connection in enumerate(connections):
                for _ in range(2):
                    connection.execute("DELETE FROM item WHERE name = %s", (str(number),))
                    connection.commit()
        told = [event.is_missing for event in events if isinstance(event, HistoryChanged)]
        self.assertEqual(len(told), 6)
        self.assertNotIn(False, told)

    @unittest.skipUnless(EmbeddedPgBouncer.installed() or REQUIRED, "PgBouncer is not installed")
    def test_a_pooler_that_repeats_what_the_primary_has_said(self):
        self.check_a_standby_behind_a_pooler(*self.pooled())

    @unittest.skipUnless(EmbeddedPgBouncer.installed() or REQUIRED, "PgBouncer is not installed")
    def test_a_pooler_that_keeps_sessions_and_does_the_same(self):
        self.check_a_standby_behind_a_pooler(*self.pooled("session", pooled=False))

    def check_a_standby_behind_a_pooler(self, connections, move):
        move()

        def work(connection):
            connection.execute("UPDATE item SET name = name || '!'")

        for connection in connections:
            with (
                self.subTest(connection=connection),
                policy_of(connection, timeout=0),
                self.assertRaises((DisconnectionError, ReconnectTimeout)),
            ):
                connection.run(work, connection)
            connection.rollback()
        running = [
            threading.Thread(target=connection.run, args=(work, connection))
            for connection in connections
        ]
        with self.events() as events:
            for each in running:
                each.start()
            wait_until(lambda: self.waits_for_writes(events))
            self.standby.promote()
            for each in running:
                each.join()
        rows = self.standby.query("SELECT DISTINCT length(name) FROM item")
        self.assertEqual(rows, [(9,)])

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


class SeveralHostsTests(DatabaseTestCase):
    """The server is the second one of two hosts."""

    def both(self, first, **more):
        parameters = {
            "host": "127.0.0.1,127.0.0.1",
            "port": f"{first},{self.server.port}",
            "user": "postgres",
            "password": self.server.password,
            "dbname": self.dbname,
            **more,
        }
        return " ".join(f"{name}={value}" for name, value in parameters.items())

    def works(self, dsn, policies=(PERSIST, FAIL_FAST)):
        for policy in policies:
            # A busy machine takes its time.
            seconds = mock.patch.object(type(policy), "longest_attempt", return_value=3.0)
            with self.subTest(policy=policy), seconds:
                connection = self.connect(dsn, policy=policy)
                cursor = connection.cursor()
                cursor.execute("SELECT 1")
                self.assertEqual(connection.info.port, self.server.port)
                connection.close()

    def test_one_that_is_silent(self):
        with PortForward(self.server.host, self.server.port) as forward:
            forward.silence()
            self.works(self.both(forward.port))
            self.works(self.both(forward.port, target_session_attrs="read-write"), [FAIL_FAST])
            self.works(self.both(forward.port, target_session_attrs="prefer-standby"), [FAIL_FAST])

    def test_one_that_refuses(self):
        with PortForward(self.server.host, self.server.port) as forward:
            forward.refuse()
            self.works(self.both(forward.port))

    def test_one_that_hangs_up(self):
        with hanging_up() as port:
            self.works(self.both(port))
            self.works(self.both(port, target_session_attrs="primary"), [FAIL_FAST])

    def test_one_that_is_a_standby(self):
        standby = EmbeddedStandby(self.server)
        self.addCleanup(standby.stop)
        standby.start()
        for target in ("read-write", "primary"):
            self.works(self.both(standby.port, target_session_attrs=target), [FAIL_FAST])
        for ports in (f"{self.server.port},{standby.port}", f"{standby.port},{self.server.port}"):
            dsn = self.both(0, port=ports, target_session_attrs="prefer-standby")
            connection = self.connect(dsn)
            connection.cursor().execute("SELECT 1")
            self.assertEqual(connection.info.port, standby.port)

    def test_a_session_that_falls_silent_is_followed_by_one_with_the_other(self):
        with PortForward(self.server.host, self.server.port) as forward:
            connection = self.connect(self.both(forward.port), response_timeout=0.5)
            connection.run(lambda: None)
            self.assertEqual(connection.info.port, forward.port)
            forward.silence()
            connection.run(lambda: connection.cursor().execute("SELECT 1"))
            self.assertEqual(connection.info.port, self.server.port)

    def test_one_address_of_a_name_that_is_silent(self):
        found = [(0, 0, 0, "", (address, 0)) for address in ("127.0.0.9", "127.0.0.1")]
        silent = socket.create_server(("127.0.0.9", self.server.port))
        with silent, mock.patch("socket.getaddrinfo", return_value=found):
            dsn = self.both(0, host="launchpad", port=self.server.port)
            self.works(dsn, [FAIL_FAST])

    def test_what_all_say_is_told(self):
        with hanging_up() as first, hanging_up() as second:
            dsn = f"host=127.0.0.1,127.0.0.1 port={first},{second} user=postgres"
            with self.assertRaises(DisconnectionError) as raised:
                self.connect(dsn, policy=RetryPolicy(timeout=30, attempts=1)).begin()
            for port in (first, second):
                self.assertIn(f"port {port} failed", str(raised.exception))

    def test_a_refusal_is_for_good(self):
        with hanging_up() as port:
            dsn = self.both(port, dbname="missing")
            for policy in (PERSIST, FAIL_FAST):
                connection = self.connect(dsn, policy=policy)
                with self.assertRaisesRegex(self.module.OperationalError, "missing") as refused:
                    connection.begin()
                self.assertNotIsInstance(refused.exception, DisconnectionError)

    def test_what_the_server_does_not_know_is_for_good(self):
        for mistake in ("options=-cnothing=1", "client_encoding=nothing"):
            dsn = self.both(self.server.port) + f" {mistake}"
            adapter = ReconnectingDatabaseAdapter(dsn, driver=self.driver)
            for connection in (self.connect(dsn), adapter()):
                with self.assertRaisesRegex(self.module.OperationalError, "nothing") as refused:
                    connection.cursor().execute("SELECT 1")
                self.assertNotIsInstance(refused.exception, DisconnectionError)


class SeveralHostsWithPsycopgTests(SeveralHostsTests):
    driver = "psycopg"
    module = psycopg


@contextlib.contextmanager
def hanging_up():
    """The port of a proxy without servers: it reads what its clients send, and ends them."""

    def serve():
        while True:
            client, _ = listener.accept()
            with client:
                if not client.recv(1000):
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        socket.create_connection(listener.getsockname()).close()
        thread.join()
