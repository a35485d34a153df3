"""Waiting for a server: deadlines, attempts, events, and one knock at the door."""

import logging
import threading
import time
import unittest
from unittest import mock

import psycopg2
import zope.event

from zreconnect import (
    FAIL_FAST,
    DisconnectionError,
    ReconnectingConnection,
    ReconnectTimeout,
    RetryPolicy,
)
from zreconnect.drivers.base import Meaning
from zreconnect.drivers.psycopg2 import driver
from zreconnect.events import (
    ConnectionAttemptFailed,
    ConnectionLost,
    GaveUp,
    Reconnected,
    Waiting,
)
from zreconnect.server import AttemptFailed, server_from_dsn
from zreconnect.testing import no_waiting
from zreconnect.tests.base import DatabaseTestCase, policy_of, wait_until


class WaitingTests(DatabaseTestCase):
    def begin_in_thread(self, connection):
        """Call begin() in a thread; returns the thread and what it raised."""
        raised = []

        def begin():
            try:
                connection.begin()
                connection.rollback()
            except Exception as error:
                raised.append(error)

        thread = threading.Thread(target=begin)
        thread.start()
        return thread, raised

    def wait_for_failed_attempt(self, seen):
        wait_until(lambda: any(isinstance(event, ConnectionAttemptFailed) for event in seen))

    def test_begin_waits_until_the_server_is_back(self):
        connection = self.connect()
        for go, come_back in [
            (self.forward.refuse, self.forward.accept),
            (self.server.shut_down, self.server.start),
            (self.server.kill_all, self.server.start),
        ]:
            connection.begin()
            connection.rollback()
            go()
            self.forward.drop()
            with self.events() as seen:
                thread, raised = self.begin_in_thread(connection)
                self.wait_for_failed_attempt(seen)
                come_back()
                thread.join()
            self.assertEqual(raised, [])

    def test_a_full_server_is_waited_for(self):
        role = f"few_{self.dbname}"
        self.query(f"CREATE ROLE {role} LOGIN PASSWORD '{self.server.password}' CONNECTION LIMIT 1")
        self.addCleanup(self.query, f"DROP ROLE {role}")
        dsn = self.layer.dsn(user=role, dbname=self.dbname)
        first, second = self.connect(dsn), self.connect(dsn)
        first.begin()
        with self.events() as seen:
            thread, raised = self.begin_in_thread(second)
            self.wait_for_failed_attempt(seen)
            first.close()
            thread.join()
        self.assertEqual(raised, [])
        self.assertIn("too many connections for role", str(seen[0].error))
        second.close()
        wait_until(lambda: not self.sessions())

    def test_timeout(self):
        connection = self.connect()
        self.forward.refuse()
        with (
            policy_of(connection, timeout=30),
            no_waiting(),
            self.assertRaises(ReconnectTimeout) as gave_up,
        ):
            connection.begin()
        error = gave_up.exception
        self.assertEqual(error.server, connection.server)
        self.assertGreaterEqual(error.attempts, 2)
        self.assertGreaterEqual(error.seconds, 30)
        self.assertIsInstance(error.last_error, psycopg2.OperationalError)
        self.assertIs(error.__cause__, error.last_error)
        self.assertIn("Connection refused", str(error))
        self.assertEqual(connection.state, "idle")
        self.forward.accept()
        connection.begin()

    def test_timeout_of_a_silent_host(self):
        connection = self.connect()
        self.forward.silence()
        with (
            policy_of(connection, timeout=0.3),
            self.assertRaisesRegex(ReconnectTimeout, "no answer within") as gave_up,
        ):
            connection.begin()
        self.assertIsInstance(gave_up.exception.last_error, TimeoutError)
        self.forward.resume()
        connection.begin()

    def test_a_connection_that_comes_too_late_is_closed(self):
        connection = self.connect()
        self.forward.silence("to_client")
        with policy_of(connection, timeout=0), self.assertRaises(ReconnectTimeout):
            connection.begin()
        self.forward.resume()
        connection.begin()
        # Nobody else has one, as soon as the one that was late is closed.
        wait_until(lambda: self.sessions() == [connection.info.backend_pid])

    def test_attempts(self):
        connection = self.connect(policy=RetryPolicy(attempts=3))
        self.forward.refuse()
        with self.assertRaisesRegex(ReconnectTimeout, "after 3 attempts"):
            connection.begin()

    def test_fail_fast_tries_once_and_is_for_the_publisher_to_retry(self):
        connection = self.connect(policy=FAIL_FAST)
        self.forward.refuse()
        with self.events() as seen, self.assertRaises(DisconnectionError) as lost:
            connection.begin()
        self.assertEqual([type(event) for event in seen], [GaveUp])
        self.assertIs(lost.exception.getOriginalException()[1], lost.exception.__cause__)
        self.assertIn("no transaction was begun", str(lost.exception))
        self.assertEqual(connection.state, "idle")

    def test_a_statement_that_gets_no_connection_dooms_its_unit_of_work(self):
        for policy, error in [
            ({"timeout": 2, "attempts": 1}, DisconnectionError),
            ({"timeout": 0}, ReconnectTimeout),
        ]:
            connection = self.connect()
            cursor = connection.cursor()
            self.forward.refuse()
            with policy_of(connection, **policy), self.assertRaises(error):
                cursor.execute("SELECT 1")
            self.forward.accept()
            self.assertEqual(connection.state, "doomed")
            with self.assertRaisesRegex(DisconnectionError, "Already disconnected"):
                cursor.execute("SELECT 1")
            connection.rollback()
            cursor.execute("SELECT 1")

    def test_an_error_of_begin_itself_is_raised(self):
        connection = self.connect()
        connection.driver_connection.set_session(autocommit=False)
        connection.driver_connection.cursor().execute("SELECT x'0'::text FROM pg_class LIMIT 0")
        connection.driver_connection.rollback()
        connection.driver_connection.cursor().execute("SELECT 1")
        with self.assertRaises(psycopg2.errors.SyntaxError):
            connection.driver_connection.cursor().execute("SELEC")
        with self.assertRaises(psycopg2.errors.InFailedSqlTransaction):
            connection.begin()
        self.assertEqual(connection.state, "idle")


class EventTests(DatabaseTestCase):
    def test_the_first_session_is_not_announced_and_a_later_one_is(self):
        connection = self.connect()
        with self.events() as seen:
            connection.begin()
        self.assertEqual(seen, [])
        connection.rollback()
        self.forward.drop()
        with self.events() as seen:
            connection.begin()
        self.assertEqual([type(event) for event in seen], [ConnectionLost, Reconnected])

    def test_the_story_of_an_outage(self):
        connection = self.connect()
        connection.begin()
        self.forward.refuse()
        self.forward.drop()
        with self.events() as seen, self.assertLogs("zreconnect", "DEBUG") as logs:
            with self.assertRaises(DisconnectionError):
                connection.cursor().execute("SELECT 1")
            connection.rollback()
            with (
                policy_of(connection, timeout=5),
                no_waiting(),
                self.assertRaises(ReconnectTimeout) as gave_up,
            ):
                connection.begin()
            self.forward.accept()
            connection.begin()
        lost, *failed, ended, again = seen
        # As soon as the waiting has begun.
        waiting = failed.pop(1)
        self.assertEqual((type(lost), lost.state), (ConnectionLost, "active"))
        self.assertIsInstance(lost.error, psycopg2.OperationalError)
        self.assertEqual({type(event) for event in failed}, {ConnectionAttemptFailed})
        self.assertEqual([event.attempt for event in failed], list(range(1, len(failed) + 1)))
        self.assertEqual((type(ended), type(again)), (GaveUp, Reconnected))
        self.assertEqual((type(waiting), waiting.waiting), (Waiting, 1))
        self.assertEqual(ended.attempts, gave_up.exception.attempts)
        self.assertEqual(ended.attempts, len(failed) + 1)
        self.assertEqual(again.attempts, 1)
        self.assertEqual(
            [record.levelno for record in logs.records],
            [logging.WARNING, logging.DEBUG, logging.WARNING]
            + [logging.DEBUG] * (len(failed) - 1)
            + [logging.ERROR, logging.WARNING],
        )
        for event, record in zip(seen, logs.records, strict=True):
            self.assertEqual(event.server, connection.server)
            self.assertEqual(record.getMessage(), str(event))
            self.assertNotIn("\n", record.getMessage())
            self.assertNotIn(self.server.password, record.getMessage() + repr(event))

    def test_a_loss_while_idle(self):
        connection = self.connect()
        connection.begin()
        connection.rollback()
        self.forward.drop()
        with self.events() as seen:
            connection.begin()
        self.assertEqual([type(event) for event in seen], [ConnectionLost, Reconnected])
        self.assertEqual(seen[0].state, "idle")

    def test_the_first_connection_is_no_event(self):
        with self.events() as seen:
            self.connect().begin()
        self.assertEqual(seen, [])

    def test_reconnected_after_several_attempts(self):
        calls = []

        def connection_factory():
            calls.append(1)
            if len(calls) < 3:
                raise OSError("not yet")
            return psycopg2.connect(self.dsn)

        connection = ReconnectingConnection(connection_factory)
        self.addCleanup(connection.close)
        with self.events() as seen:
            connection.begin()
        self.assertEqual(seen[-1].attempts, 3)
        self.assertIn("after 3 attempts", str(seen[-1]))

    def test_the_time_to_tell_comes_while_it_is_asked_for(self):
        connection = self.connect()
        self.forward.refuse()
        asked = []

        def until_told(outage):
            asked.append(outage)
            # Not yet; and at the next look it is overdue.
            return 0.001 if len(asked) % 2 else -0.001

        with (
            mock.patch("zreconnect.outage.Outage.until_told", until_told),
            policy_of(connection, timeout=0.1),
            self.assertRaises(ReconnectTimeout),
        ):
            connection.begin()
        self.assertGreater(len(asked), 1)

    def test_a_subscriber_that_fails_does_not_keep_the_connection_from_coming_back(self):
        def fail(event):
            raise LookupError("pager is out of order")

        connection = self.connect()
        connection.begin()
        connection.rollback()
        self.forward.drop()
        zope.event.subscribers.append(fail)
        self.addCleanup(zope.event.subscribers.remove, fail)
        with self.assertLogs("zreconnect") as logs:
            connection.begin()
        self.assertIn("pager is out of order", logs.output[1])
        self.assertEqual(connection.state, "active")


class DoorTests(DatabaseTestCase):
    """One process, one knock at the door."""

    def setUp(self):
        super().setUp()
        self.lock = threading.Lock()
        self.under_way = self.most_at_once = self.calls = 0
        self.is_down = threading.Event()
        self.is_down.set()

    def connection_factory(self):
        """Counts the attempts that are under way at the same time."""
        with self.lock:
            self.calls += 1
            self.under_way += 1
            self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            if self.is_down.is_set():
                time.sleep(0.02)
                raise ConnectionRefusedError("down")
            return psycopg2.connect(self.dsn)
        finally:
            with self.lock:
                self.under_way -= 1

    def test_threads_share_one_attempt_while_the_server_is_down(self):
        factory = self.connection_factory
        connections = [ReconnectingConnection(factory) for _ in range(16)]
        threads = [threading.Thread(target=connection.begin) for connection in connections]
        for thread in threads:
            thread.start()
        wait_until(lambda: self.calls > 10)
        self.assertEqual(self.most_at_once, 1)
        self.is_down.clear()
        for thread in threads:
            thread.join()
        self.assertEqual({connection.state for connection in connections}, {"active"})
        self.assertEqual(len(self.sessions()), 16)
        for connection in connections:
            connection.close()

    def test_a_failure_is_that_of_the_threads_that_pause(self):
        policy = RetryPolicy(initial=0.4, maximum=0.4)
        factory = self.connection_factory
        connections = [ReconnectingConnection(factory, policy=policy) for _ in range(16)]
        threads = [threading.Thread(target=connection.begin) for connection in connections]
        with self.events() as seen:
            for thread in threads:
                thread.start()
            wait_until(lambda: len(seen) > 6 * 16)
        # Each thread has failed as often as if it were alone, and together they have tried little
        # more often than one.
        self.assertLess(self.calls, len(seen) / 4)
        self.is_down.clear()
        for thread in threads:
            thread.join()
        for connection in connections:
            connection.close()

    def test_a_lost_session_makes_them_share_again(self):
        self.is_down.clear()
        factory = self.connection_factory
        connections = [ReconnectingConnection(factory) for _ in range(4)]
        for connection in connections:
            self.addCleanup(connection.close)
            connection.begin()
            connection.rollback()
        self.is_down.set()
        self.forward.drop()
        self.calls = self.most_at_once = 0
        threads = [threading.Thread(target=connection.begin) for connection in connections]
        for thread in threads:
            thread.start()
        wait_until(lambda: self.calls > 4)
        self.assertEqual(self.most_at_once, 1)
        self.is_down.clear()
        for thread in threads:
            thread.join()

    def test_a_shared_failure_is_everybodys(self):
        # A server of its own, not known to be up, as one that other tests use may be.
        dsn = self.dsn + "?application_name=door"
        server = server_from_dsn(dsn)
        self.assertIs(server, server_from_dsn(dsn))
        self.forward.silence()
        errors = []

        def connect():
            try:
                server.connect(30)
            except AttemptFailed as failure:
                errors.append(failure.error)

        threads = [threading.Thread(target=connect) for _ in range(2)]
        before = self.forward.count()
        for thread in threads:
            thread.start()
        wait_until(lambda: server._latest._answers_to_others)
        wait_until(lambda: (self.forward.count() - before).connections == 1)
        self.forward.drop()
        for thread in threads:
            thread.join()
        self.assertEqual([type(error) for error in errors], [psycopg2.OperationalError] * 2)
        self.assertLessEqual((self.forward.count() - before).connections, 2)


class MeaningTests(unittest.TestCase):
    """What errors mean that no test can make a server send, or only with effort."""

    class Open:
        closed = 0

        class info:
            status = 0

    class Bad(Open):
        class info:
            status = 1

    class Error(psycopg2.OperationalError):
        pgcode = None

    def meaning(self, state=None, message="", raw=Open):
        error = self.Error(message)
        error.pgcode = state
        return driver.meaning(error, raw)

    def test_state_first(self):
        self.assertIs(self.meaning("42601", raw=self.Bad), Meaning.DISCONNECT)
        self.assertIs(self.meaning("42601"), Meaning.USER)

    def test_then_sqlstate(self):
        for state in ("08000", "08006", "57P01", "57P02", "57P03", "57P04", "57P05", "25P03"):
            self.assertIs(self.meaning(state), Meaning.DISCONNECT)
        for state in ("40001", "40P01"):
            self.assertIs(self.meaning(state), Meaning.TRANSIENT)
        for state in ("57014", "23505", "25006"):
            self.assertIs(
                self.meaning(state, "server closed the connection unexpectedly"), Meaning.USER
            )

    def test_message_last(self):
        for message in (
            "server closed the connection unexpectedly\n\tThis probably means",
            "SSL connection has been closed unexpectedly",
            "SSL SYSCALL error: EOF detected",
            "could not receive data from server: Connection timed out",
        ):
            self.assertIs(self.meaning(None, message), Meaning.DISCONNECT)
        self.assertIs(self.meaning(None, "can't adapt type 'object'"), Meaning.USER)


NAMES = {"user": "importd", "dbname": "launchpad", "host": "launchpad"}


class ConnectMeaningTests(unittest.TestCase):
    at = 'connection to server at "launchpad" (10.0.0.1), port 5432 failed: '

    def meaning(self, message, error=psycopg2.OperationalError, parameters=NAMES):
        return driver.connect_meaning(error(message), parameters)

    def test_passing(self):
        for message in (
            self.at + "Connection refused\n\tIs the server running on that host",
            self.at + "FATAL:  the database system is starting up\n",
            self.at + "FATAL:  sorry, too many clients already\n",
            self.at + 'FATAL:  too many connections for role "importd"\n',
            self.at + 'FATAL:  database "launchpad" is not currently accepting connections\n',
            self.at + "FATAL:  das Datenbanksystem startet\n",
            self.at + "timeout expired\n",
            self.at + "server is in hot standby mode\n",
            self.at + "session is read-only\n",
            self.at + "SSL error: unexpected eof while reading\n",
            self.at + "FATAL:  remaining connection slots are reserved for non-replication\n",
            # PgBouncer's.
            self.at + "FATAL:  query_wait_timeout\n",
            self.at + "FATAL:  pgbouncer cannot connect to server\n",
            self.at + "FATAL:  server login has been failing, try again later\n",
            self.at + "FATAL:  no more connections allowed (max_client_conn)\n",
            self.at + "FATAL:  client_login_timeout (server down)\n",
            self.at + 'FATAL:  database "launchpad" is disabled\n',
            self.at + "server closed the connection unexpectedly\n",
            # Of two hosts, the second has the database's name.
            'connection to server at "10.0.0.1", port 5432 failed: Connection refused\n'
            + self.at
            + "Connection refused\n",
            'could not translate host name "launchpad" to address: Name or service not known\n',
            'connection to server on socket "/run/.s.PGSQL.5432" failed: '
            "No such file or directory\n",
        ):
            with self.subTest(message):
                self.assertIs(self.meaning(message), Meaning.DISCONNECT)
        self.assertIs(self.meaning("no answer", TimeoutError), Meaning.DISCONNECT)

    def test_refused(self):
        for message in (
            self.at + 'FATAL:  password authentication failed for user "importd"\n',
            self.at + 'FATAL:  no pg_hba.conf entry for host "10.0.0.2", user "importd"\n',
            self.at + 'FATAL:  role "importd" does not exist\n',
            self.at + "fe_sendauth: no password supplied\n",
            self.at + "server does not support SSL, but SSL was required\n",
            self.at + "SSL error: certificate verify failed\n",
            'root certificate file "/root.crt" does not exist\n',
            self.at + "FATAL:  Passwort-Authentifizierung für Benutzer »importd« fehlgeschlagen\n",
            self.at + "FATAL:  la base de données « launchpad » n'existe pas\n",
            self.at + 'FATAL:  permission denied for database "other"\n',
            self.at + 'FATAL:  role "other" is not permitted to log in\n',
            self.at + "FATAL:  must be superuser or replication role to start walsender\n",
            self.at + 'FATAL:  unrecognized configuration parameter "statment_timeout"\n',
            self.at + 'FATAL:  invalid value for parameter "TimeZone": "nowhere"\n',
            self.at + 'FATAL:  parameter "server_version" cannot be changed\n',
            self.at + 'FATAL:  -5 ms is outside the valid range for parameter "work_mem"\n',
            self.at + "FATAL:  --nothing requires a value\n",
            self.at + "FATAL:  invalid command-line argument for server process: -z\n",
            self.at + "FATAL:  unsupported frontend protocol 1.0: server supports 3.0 to 3.0\n",
            self.at + "FATAL:  connection requires a valid client certificate\n",
            self.at + 'server certificate for "a" does not match host name "launchpad"\n',
            self.at + "SSL error: tlsv1 alert unknown ca\n",
            self.at + "SSL error: tlsv13 alert certificate required\n",
            self.at + "SSL error: unsupported protocol\n",
            self.at + 'private key file "/k" has group or world access; file must have\n',
            self.at + 'certificate present, but not private key file "/k"\n',
            self.at + 'could not read root certificate file "/r": no certificate or crl found\n',
            self.at + 'could not open certificate file "/c": No such file or directory\n',
            self.at + "channel binding required, but SSL not in use\n",
            self.at + 'authentication method requirement "md5" failed: server requested SASL\n',
            self.at + "none of the server's SASL authentication mechanisms are supported\n",
            self.at + 'requirepeer specifies "a", but actual peer user name is "b"\n',
            self.at + 'server only supports protocol version 3.0, but "min_protocol_version"\n',
            "GSSAPI encryption required but no credential cache\n",
            'invalid sslmode value: "verify-ful"\n',
            'invalid port number: "99999"\n',
            'definition of service "missing" not found\n',
            'Unix-domain socket path "/long/.s.PGSQL.1" is too long (maximum 107 bytes)\n',
            "no Python encoding for PostgreSQL encoding 'NOTHING'\n",
            # PgBouncer's.
            self.at + "FATAL:  no such database: launchpad\n",
            self.at + "FATAL:  no such user: importd\n",
            self.at + "FATAL:  unsupported startup parameter: options\n",
            self.at + "FATAL:  bouncer config error\n",
            self.at + "FATAL:  SSL required\n",
            self.at + "FATAL:  TLS client certificate required\n",
        ):
            with self.subTest(message):
                self.assertIs(self.meaning(message), Meaning.PERMANENT)
        self.assertIs(self.meaning("bad argument", TypeError), Meaning.PERMANENT)

    def test_what_quotes_what_was_asked_for_is_refused_in_every_language(self):
        parameters = {"options": "-c statment_timeout=5s --zone=Nirgends", "sslkey": "/k"}
        for message in (
            "FATAL:  unbekannter Konfigurationsparameter »statment_timeout«\n",
            "FATAL:  ungültiger Wert für Parameter »zone«: »Nirgends«\n",
            "Datei »/k« hat Zugriffsrechte für Gruppe oder Welt\n",
        ):
            meaning = self.meaning(self.at + message, parameters=parameters)
            self.assertIs(meaning, Meaning.PERMANENT)
            self.assertIs(self.meaning(self.at + message), Meaning.DISCONNECT)

    def test_sqlstate_first(self):
        for state, expected in {
            "57P03": Meaning.DISCONNECT,
            "53300": Meaning.DISCONNECT,
            "08P01": Meaning.DISCONNECT,
            "28P01": Meaning.PERMANENT,
            "3D000": Meaning.PERMANENT,
            "42704": Meaning.PERMANENT,
            "22023": Meaning.PERMANENT,
            "55000": Meaning.DISCONNECT,
            "55P02": Meaning.PERMANENT,
        }.items():
            error = MeaningTests.Error(self.at + 'FATAL:  "importd"\n')
            error.pgcode = state
            self.assertIs(driver.connect_meaning(error, NAMES), expected, state)

    def test_without_names(self):
        self.assertIs(
            self.meaning(self.at + "Connection refused", parameters={}), Meaning.DISCONNECT
        )
