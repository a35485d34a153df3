"""What a server lacks that was acknowledged before, because it goes on in another history.

The standbys follow by a line of their own. Where that is cut, what is committed afterwards is lost
by a failover.
"""

import logging
import os
import threading
from unittest import mock

import zreconnect
from zreconnect import (
    CommitOutcomeUnknown,
    DisconnectionError,
    Ledger,
    ReconnectingConnection,
    ledger,
)
from zreconnect.events import CommitLookedUp, ConnectionAttemptFailed, HistoryChanged
from zreconnect.testing import EmbeddedPostgres, EmbeddedStandby, PortForward
from zreconnect.tests.base import DatabaseTestCase, wait_until

DRIVERS = ("psycopg2", "psycopg")
WITNESSES = ("xid", Ledger())


def changes(events):
    return [event for event in events if isinstance(event, HistoryChanged)]


class HistoryTestCase(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.query("CREATE TABLE item (name text)")

    def connections(self, dsn=None, witnesses=WITNESSES):
        """One for each driver and witness, by their names."""
        connections = {}
        for driver in DRIVERS:
            for witness in witnesses:
                connection = zreconnect.connect(dsn or self.dsn, driver, witness=witness)
                self.addCleanup(connection.close)
                connections[f"{driver}, {witness}"] = connection
        return connections

    def insert(self, connection, name):
        connection.run(lambda: connection.cursor().execute("INSERT INTO item VALUES (%s)", (name,)))


class FailoverTestCase(HistoryTestCase):
    def setUp(self):
        super().setUp()
        self.replication = PortForward(self.server.host, self.server.port)
        self.replication.start()
        self.addCleanup(self.replication.stop)
        self.standby = EmbeddedStandby(self.server)
        self.standby.settings["primary_conninfo"] = self.server.dsn(port=self.replication.port)
        self.addCleanup(self.standby.stop)
        self.standby.start()
        self.both = (
            f"host=127.0.0.1,127.0.0.1 port={self.forward.port},{self.standby.port}"
            f" user=postgres password={self.server.password} dbname={self.dbname}"
        )

    def catch_up(self):
        """Wait until the standby has all that is committed by now."""
        ((end,),) = self.query("SELECT pg_current_wal_flush_lsn()::text")
        has_all = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
        wait_until(lambda: self.standby.query(has_all, end) == [(True,)])

    def cut_off(self):
        """The standby has all that is committed by now, and gets nothing any more."""
        self.catch_up()
        self.replication.refuse()
        self.replication.drop()

    def lose_the_primary(self):
        self.forward.refuse()
        self.forward.drop()

    def fail_over(self):
        self.lose_the_primary()
        self.standby.promote()

    def there(self):
        return [name for (name,) in self.standby.query("SELECT name FROM item ORDER BY name")]


class MissingWorkTests(FailoverTestCase):
    def test_it_is_told_once(self):
        connections = self.connections(self.both)
        for name, connection in connections.items():
            self.insert(connection, name)
        self.cut_off()
        for name, connection in connections.items():
            for _ in range(5):
                self.insert(connection, name)
        self.fail_over()
        for name, connection in connections.items():
            with (
                self.subTest(name),
                self.assertLogs("zreconnect", logging.ERROR) as logs,
                self.events() as events,
            ):
                self.insert(connection, name)
                self.standby.terminate_backend(connection.info.backend_pid)
                self.insert(connection, name)
                (change,) = changes(events)
                self.assertTrue(change.is_missing)
                self.assertRegex(
                    change.evidence, "its timeline was [0-9A-F]+, and is [0-9A-F]+ now"
                )
                self.assertIn("was acknowledged", change.evidence)
                (line,) = logs.output
                self.assertIn("Acknowledged work is missing", line)
                self.assertNotIn(self.server.password, line)

    def test_a_ledger_that_has_come_into_being_since(self):
        self.cut_off()
        connections = self.connections(self.both, [Ledger()])
        for name, connection in connections.items():
            self.insert(connection, name)
        self.fail_over()
        for name, connection in connections.items():
            with self.subTest(name), self.events() as events:
                self.insert(connection, name)
                (change,) = changes(events)
                self.assertTrue(change.is_missing)
                self.assertIn("has none", change.evidence)

    def test_promotion_of_a_standby_that_has_everything(self):
        connections = self.connections(self.both)
        for name, connection in connections.items():
            self.insert(connection, name)
        self.catch_up()
        self.fail_over()
        for name, connection in connections.items():
            with self.subTest(name), self.events() as events:
                self.insert(connection, name)
                self.insert(connection, name)
                (change,) = changes(events)
                # The id may have been given to another transaction.
                is_missing = None if "xid" in name else False
                self.assertIs(change.is_missing, is_missing)
                level = logging.WARNING if "xid" in name else logging.INFO
                self.assertEqual(change.level, level)
                self.assertEqual("may be missing" in str(change), "xid" in name)

    def test_in_a_session_whose_standby_is_promoted(self):
        connections = self.connections(self.both)
        for name, connection in connections.items():
            self.insert(connection, name)
        self.cut_off()
        for name, connection in connections.items():
            for _ in range(5):
                self.insert(connection, name)
        self.lose_the_primary()
        with self.events() as events:
            for connection in connections.values():
                connection.run(connection.execute, "SELECT 1")
        self.assertEqual(changes(events), [])
        self.standby.promote()
        for name, connection in connections.items():
            with self.subTest(name), self.events() as events:
                self.insert(connection, name)
                (change,) = changes(events)
                self.assertTrue(change.is_missing)

    def test_who_has_committed_nothing_or_only_reads(self):
        connections = self.connections(self.both)
        for connection in connections.values():
            connection.begin()
            connection.rollback()
        readers = self.connections(self.both)
        for name, connection in readers.items():
            self.insert(connection, name)
            connection.readonly = True
        self.catch_up()
        self.fail_over()
        for name, connection in [*connections.items(), *readers.items()]:
            with self.subTest(name), self.events() as events:
                connection.run(lambda: None)
                (change,) = changes(events)
                self.assertIsNone(change.is_missing)

    def test_a_row_that_was_removed_because_it_was_old(self):
        connections = self.connections(self.both, [Ledger()])
        for name, connection in connections.items():
            self.insert(connection, name)
        self.query("DELETE FROM zreconnect_ledger")
        self.catch_up()
        self.fail_over()
        for name, connection in connections.items():
            with (
                self.subTest(name),
                self.events() as events,
                mock.patch.object(ledger, "KEPT_FOR_CERTAIN", 0.0),
            ):
                self.insert(connection, name)
                (change,) = changes(events)
                self.assertIsNone(change.is_missing)


class LookUpTests(FailoverTestCase):
    """COMMIT is executed on the primary, which is lost before the answer arrives. The look-up
    meets the standby, which is promoted afterwards."""

    def outcomes(self, connections, meanwhile):
        """What `commit` has raised, if anything, by the connection's name.

        meanwhile: called between COMMIT and the loss.
        """
        outcomes = {}
        are_ready = threading.Barrier(len(connections) + 1)
        is_silent = threading.Event()

        def commit(name, connection):
            try:
                connection.begin()
                connection.execute("INSERT INTO item VALUES (%s)", (name,)).close()
                are_ready.wait()
                is_silent.wait()
                connection.commit()
                outcomes[name] = None
            except Exception as error:
                outcomes[name] = type(error)
                connection.rollback()

        threads = [threading.Thread(target=commit, args=pair) for pair in connections.items()]
        with self.events() as events:
            for thread in threads:
                thread.start()
            are_ready.wait()
            self.forward.silence("to_client")
            is_silent.set()
            committed = "SELECT name FROM item"
            wait_until(lambda: {name for (name,) in self.query(committed)} >= set(connections))
            meanwhile()
            self.lose_the_primary()
            self.forward.resume()
            wait_until(lambda: self.has_met_standby(events))
            self.assertEqual(outcomes, {})
            self.standby.promote()
            for thread in threads:
                thread.join()
        looked_up = [event for event in events if isinstance(event, CommitLookedUp)]
        self.assertEqual(len(looked_up), len(connections))
        return outcomes

    def has_met_standby(self, events):
        return any(
            isinstance(event, ConnectionAttemptFailed) and "takes no writes" in str(event)
            for event in list(events)
        )

    def test_what_is_there_is_committed(self):
        connections = self.connections(self.both)
        outcomes = self.outcomes(connections, self.catch_up)
        for name, outcome in outcomes.items():
            with self.subTest(name):
                # In another timeline the id may be that of another transaction.
                self.assertIs(outcome, CommitOutcomeUnknown if "xid" in name else None)
        self.assertEqual(self.there(), sorted(connections))

    def test_what_is_not_there_may_run_again(self):
        connections = self.connections(self.both, [Ledger()])
        for connection in connections.values():
            connection.run(lambda: None)
        self.cut_off()
        self.assert_lost(connections)

    def test_an_id_that_is_not_there_may_run_again(self):
        self.cut_off()
        # Nobody else has got it meanwhile.
        self.assert_lost(self.connections(self.both, ["xid"]))

    def test_without_its_row_it_is_not_there(self):
        first = zreconnect.connect(self.both, witness=Ledger())
        self.addCleanup(first.close)
        first.run(lambda: None)
        self.cut_off()
        self.assert_lost(self.connections(self.both, [Ledger()]))

    def test_without_its_table_it_is_not_there(self):
        self.cut_off()
        self.assert_lost(self.connections(self.both, [Ledger()]))

    def assert_lost(self, connections):
        outcomes = self.outcomes(connections, lambda: None)
        for name, outcome in outcomes.items():
            with self.subTest(name):
                self.assertTrue(issubclass(outcome, DisconnectionError), outcome)
                self.insert(connections[name], name)
        self.assertEqual(self.there(), sorted(connections))


class UntoldHistoryTests(HistoryTestCase):
    """A role that may not ask for it."""

    def setUp(self):
        super().setUp()
        self.query("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
        self.addCleanup(self.query, "GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC")
        self.query(f"CREATE ROLE clerk LOGIN PASSWORD '{self.server.password}'")
        self.addCleanup(self.query, "DROP ROLE clerk")
        self.query("GRANT ALL ON SCHEMA public TO clerk")
        self.query("GRANT ALL ON item TO clerk")
        self.addCleanup(self.query, "DROP OWNED BY clerk")

    def test_the_ledger_decides_all_the_same(self):
        dsn = self.layer.dsn(user="clerk", dbname=self.dbname)
        for name, connection in self.connections(dsn, [Ledger()]).items():
            with self.subTest(name):
                self.insert(connection, name)
                connection.begin()
                connection.execute("INSERT INTO item VALUES (%s)", (name,)).close()
                self.forward.drop()
                with self.events() as events, self.assertRaises(DisconnectionError):
                    connection.commit()
                self.assertEqual(changes(events), [])
                connection.close()


class SameHistoryTests(HistoryTestCase):
    def assert_untold(self, happens, use=None):
        """Nothing is told when that happens after a COMMIT that was acknowledged."""
        connections = self.connections()
        for name, connection in connections.items():
            (use or self.insert)(connection, name)
        with self.events() as events:
            happens()
            self.forward.drop()
            for name, connection in connections.items():
                self.insert(connection, name)
        self.assertEqual(changes(events), [])

    def test_a_restart(self):
        self.assert_untold(self.server.restart)

    def crash(self):
        self.server.kill_all()
        self.server.start()

    def test_a_crash(self):
        self.assert_untold(self.crash)

    def test_a_row_that_somebody_has_removed(self):
        self.assert_untold(lambda: self.query("DELETE FROM zreconnect_ledger"))

    def test_a_ledger_that_somebody_has_removed(self):
        self.assert_untold(lambda: self.query("DROP TABLE zreconnect_ledger"))

    def test_a_transaction_that_the_program_has_replaced(self):
        def replace(connection, name):
            connection.begin()
            connection.execute("ROLLBACK AND CHAIN").close()
            connection.execute("INSERT INTO item VALUES (%s)", (name,)).close()
            connection.commit()

        self.assert_untold(self.crash, replace)

    def test_a_row_that_another_session_has_locked(self):
        connections = self.connections(witnesses=[Ledger()])
        with self.plain() as plain, self.events() as events:
            for name, connection in connections.items():
                self.insert(connection, name)
                with plain.cursor() as cursor:
                    cursor.execute("SELECT FROM zreconnect_ledger FOR UPDATE")
                self.server.terminate_backend(connection.info.backend_pid)
                self.insert(connection, name)
                plain.rollback()
                self.server.terminate_backend(connection.info.backend_pid)
                self.insert(connection, name)
        self.assertEqual(changes(events), [])

    def test_a_forked_child(self):
        for name, connection in self.connections().items():
            self.insert(connection, name)
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    with self.events() as events:
                        self.insert(connection, name)
                    status = len(changes(events))
                finally:
                    os._exit(status)
            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0)

    def test_a_crash_that_loses_what_did_not_wait_for_the_disk(self):
        connections = self.connections()
        for name, connection in connections.items():
            self.insert(connection, name)
            observer = connection.work.link.observer
            observer._acknowledged += 1000
        self.crash()
        for name, connection in connections.items():
            with self.subTest(name), self.events() as events:
                self.insert(connection, name)
                self.server.terminate_backend(connection.info.backend_pid)
                self.insert(connection, name)
                (change,) = changes(events)
                self.assertTrue(change.is_missing)
                self.assertNotIn("timeline", change.evidence)


class OtherSystemTests(HistoryTestCase):
    def test_it_is_told(self):
        with EmbeddedPostgres() as other:
            other.query("CREATE TABLE item (name text)")
            for driver in DRIVERS:
                for witness in WITNESSES:
                    servers = [self.server, other]
                    module = __import__(driver)

                    def make(servers=servers, module=module):
                        return module.connect(servers[0].dsn())

                    connection = ReconnectingConnection(make, driver=driver, witness=witness)
                    self.addCleanup(connection.close)
                    self.insert(connection, "one")
                    self.server.terminate_backend(connection.info.backend_pid)
                    del servers[0]
                    with self.subTest(f"{driver}, {witness}"), self.events() as events:
                        self.insert(connection, "one")
                        (change,) = changes(events)
                        self.assertIn("system identifier was", change.evidence)
                        self.assertIs(change.is_missing, None if witness == "xid" else True)
