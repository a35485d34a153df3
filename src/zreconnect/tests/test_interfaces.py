"""The interfaces are the contract, and the code keeps it."""

import pickle
import unittest

import psycopg2
import transaction
from transaction.interfaces import TransientError
from zope.interface.verify import verifyClass, verifyObject
from zope.publisher.interfaces import IRetry, Retry

import zreconnect
from zreconnect import events, interfaces, ledger
from zreconnect import witness as witnesses
from zreconnect.connection import Savepoint
from zreconnect.datamanager import ConnectionDataManager
from zreconnect.drivers import psycopg as psycopg_driver
from zreconnect.drivers import psycopg2 as psycopg2_driver
from zreconnect.exceptions import make_transient
from zreconnect.tests.base import DatabaseTestCase

DRIVERS = (psycopg2_driver.driver, psycopg_driver.driver)


class InterfaceTests(DatabaseTestCase):
    def test_connection(self):
        verifyClass(interfaces.IReconnectingConnection, zreconnect.ReconnectingConnection)
        verifyObject(interfaces.IReconnectingConnection, self.connect())

    def test_cursor(self):
        verifyClass(interfaces.IReconnectingCursor, zreconnect.ReconnectingCursor)
        verifyObject(interfaces.IReconnectingCursor, self.connect().cursor())

    def test_savepoint(self):
        verifyClass(interfaces.ISavepoint, Savepoint)

    def test_data_manager(self):
        data_manager = ConnectionDataManager(self.connect(), transaction.manager)
        verifyClass(interfaces.ITransactionDataManager, ConnectionDataManager)
        verifyObject(interfaces.ITransactionDataManager, data_manager)

    def test_driver(self):
        verifyClass(interfaces.IDriver, psycopg2_driver.Psycopg2Driver)
        verifyObject(interfaces.IDriver, psycopg2_driver.driver)
        verifyClass(interfaces.IPipeliningDriver, psycopg_driver.PsycopgDriver)
        verifyObject(interfaces.IPipeliningDriver, psycopg_driver.driver)

    def test_witnesses(self):
        for witness in (
            witnesses.XidWitness(),
            witnesses.XidWitness(at_commit=True),
            ledger.Ledger(),
        ):
            verifyObject(interfaces.IWitness, witness)
            verifyObject(interfaces.IObserver, witness.observer(psycopg2_driver.driver))
        verifyObject(interfaces.IObserver, witnesses.NoObserver(psycopg2_driver.driver))

    def test_descriptor(self):
        descriptor = zreconnect.ConnectionDescriptor(self.dsn)
        verifyClass(interfaces.IConnectionDescriptor, zreconnect.ConnectionDescriptor)
        verifyObject(interfaces.IConnectionDescriptor, descriptor)

    def test_adapter(self):
        adapter = zreconnect.ReconnectingDatabaseAdapter(self.dsn)
        self.addCleanup(adapter.disconnect)
        verifyClass(interfaces.IManageableZopeDatabaseAdapter, type(adapter))
        verifyObject(interfaces.IManageableZopeDatabaseAdapter, adapter)
        adapter.connect()
        verifyClass(interfaces.IZopeConnection, type(adapter()))
        verifyObject(interfaces.IZopeConnection, adapter())
        verifyClass(interfaces.IZopeCursor, type(adapter().cursor()))
        verifyObject(interfaces.IZopeCursor, adapter().cursor())

    def test_zopeless(self):
        verifyClass(interfaces.IZopelessTransactionManager, zreconnect.ZopelessTransactionManager)
        manager = zreconnect.ZopelessTransactionManager(self.dsn, implicitBegin=False)
        verifyObject(interfaces.IZopelessTransactionManager, manager)

    def test_events(self):
        error = ValueError("x")
        for interface, event in [
            (interfaces.IConnectionLost, events.ConnectionLost("s", error, "idle")),
            (
                interfaces.IConnectionAttemptFailed,
                events.ConnectionAttemptFailed("s", 1, 0.0, 0.0, error),
            ),
            (interfaces.IWaiting, events.Waiting("s", 0.0, 1, error)),
            (interfaces.ICommitLookedUp, events.CommitLookedUp("s", "committed")),
            (interfaces.ICommittedInPart, events.CommittedInPart("s", (), (), (), error)),
            (interfaces.IHistoryChanged, events.HistoryChanged("s", "timeline", None)),
            (interfaces.IReconnected, events.Reconnected("s", 1, 0.0)),
            (interfaces.IGaveUp, events.GaveUp("s", 1, 0.0, error)),
            (interfaces.IRunAgain, events.RunAgain("f", 1, 0.0, 0.0, error)),
            (interfaces.IGaveUpRunning, events.GaveUpRunning("f", 1, 0.0, error, "time")),
        ]:
            verifyObject(interface, event)


class ExceptionTests(unittest.TestCase):
    def test_disconnection_error_is_understood_by_publishers_loops_and_old_code(self):
        for driver in DRIVERS:
            error = driver.disconnection_error("gone", (ValueError, ValueError(), None))
            self.assertIsInstance(error, Retry)
            self.assertIsInstance(error, TransientError)
            self.assertIsInstance(error, driver.module.OperationalError)
            self.assertIsInstance(error, zreconnect.DisconnectionError)
            self.assertIsNone(error.diag.sqlstate)
            verifyObject(IRetry, error)
            verifyObject(interfaces.IDisconnectionError, error)

    def test_an_error_is_made_transient_once(self):
        for driver in DRIVERS:
            error = driver.module.OperationalError("deadlock")
            make_transient(error)
            kind = type(error)
            self.assertTrue(issubclass(kind, (TransientError, driver.module.OperationalError)))
            make_transient(error)
            self.assertIs(type(error), kind)

    def test_no_loop_runs_these_again(self):
        for error_type in (zreconnect.ReconnectTimeout, zreconnect.CommitOutcomeUnknown):
            self.assertFalse(issubclass(error_type, (Retry, TransientError, psycopg2.Error)))

    def test_they_travel_between_processes(self):
        disconnections = [
            driver.disconnection_error("gone", (ValueError, ValueError(), None))
            for driver in DRIVERS
        ]
        timeout = zreconnect.ReconnectTimeout("server", 2, 3.0, ValueError("refused"))
        unknown = zreconnect.CommitOutcomeUnknown("server")
        for error in (*disconnections, timeout, unknown):
            copy = pickle.loads(pickle.dumps(error))
            self.assertIs(type(copy), type(error))
            self.assertEqual(str(copy), str(error))

    def test_timeout_tells_attempts_and_seconds(self):
        self.assertIn(
            "after 1 attempt in 2.5 seconds",
            str(zreconnect.ReconnectTimeout("server", 1, 2.5, ValueError("refused"))),
        )
        self.assertIn(
            "after 7 attempts in 2.5 seconds",
            str(zreconnect.ReconnectTimeout("server", 7, 2.5, ValueError("refused"))),
        )
