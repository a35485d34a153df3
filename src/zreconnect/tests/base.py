"""What the tests of the core share: a database of their own behind a line that can be cut."""

from __future__ import annotations

import importlib.util
import os
import re
import time
import unittest
from contextlib import closing, contextmanager
from unittest import mock

import psycopg2
import transaction
import zope.event

import zreconnect
from zreconnect import CommitOutcomeUnknown, RetryPolicy
from zreconnect.policy import LONGEST_ATTEMPT
from zreconnect.testing import (
    EmbeddedGalera,
    EmbeddedHAProxy,
    EmbeddedMariaDB,
    EmbeddedPatroni,
    EmbeddedPgBouncer,
)
from zreconnect.testing.layers import (
    MariaDBLayer,
    PortForwardLayer,
    PostgresLayer,
)

# Those of most tests. The first layers, by name, begin first, and these take longest.
LAYER = PortForwardLayer(PostgresLayer("BasicPostgresLayer"), "BasicForwardLayer")
MARIADB_LAYER = PortForwardLayer(MariaDBLayer("BasicMariaDBLayer"), "BasicMariaDBForwardLayer")
PATIENCE = 60.0
# Whether it is an error if what tests need is not installed.
REQUIRED = os.environ.get("ZRECONNECT_REQUIRE_SERVERS") == "1"
# A decorator, or a context manager: where a short timeout gives up, it does not give up an attempt
# that is under way. A busy machine takes its time to connect.
with_time_to_connect = mock.patch("zreconnect.policy.SHORTEST_ATTEMPT", LONGEST_ATTEMPT)


def needs_mysqlclient(test_case):
    """Skip the tests if mysqlclient is not installed, unless it must be."""
    is_missing = importlib.util.find_spec("MySQLdb") is None and not REQUIRED
    return unittest.skipIf(is_missing, "mysqlclient is not installed: make services")(test_case)


def on_mariadb(layer=MARIADB_LAYER):
    """A decorator: give the tests a layer with MariaDB, or skip them if it is not installed, unless
    it must be."""

    return _on(layer, EmbeddedMariaDB.installed(), "MariaDB's server")


def on_pgbouncer(layer):
    """A decorator: give the tests a layer with PgBouncer, or skip them if it is not installed,
    unless it must be."""

    return _on(layer, EmbeddedPgBouncer.installed(), "PgBouncer")


def on_haproxy(layer):
    """A decorator: give the tests a layer with HAProxy, or skip them if it is not installed, unless
    it must be."""

    return _on(layer, EmbeddedHAProxy.installed(), "HAProxy")


def on_cluster(layer):
    """A decorator: give the tests a layer with a cluster and HAProxy before it, or skip them if the
    programs are not installed, unless they must be."""

    is_installed = EmbeddedPatroni.installed() and EmbeddedHAProxy.installed()
    return _on(layer, is_installed, "Patroni, etcd or HAProxy")


def on_galera(layer):
    """A decorator: give the tests a layer with a cluster of MariaDB servers, or skip them if Galera
    is not installed, unless it must be."""

    return _on(layer, EmbeddedGalera.installed(), "Galera")


def _on(layer, is_installed, program):
    def decorate(test_case):
        if not is_installed and not REQUIRED:
            return unittest.skip(f"{program} is not installed: make services")(test_case)
        test_case.layer = layer
        return test_case

    return decorate


def wait_until(condition, patience=PATIENCE):
    """Wait until ``condition()`` is true; fail after ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {patience} seconds: {condition}")
        time.sleep(0.005)


def leave_in_doubt(test_case, connection, is_committed):
    """Commit when the line is lost and the server away until the policy has given up.

    is_committed: whether COMMIT has arrived before. Returns the `CommitOutcomeUnknown`.
    """
    forward = test_case.forward
    if is_committed:
        forward.cut_at_commit(then=forward.refuse)
    else:
        forward.cut("to_server", 0)
        forward.refuse()
    with test_case.assertRaises(CommitOutcomeUnknown) as raised:
        connection.commit()
    connection.rollback()
    forward.accept()
    return raised.exception


@contextmanager
def subscriber(event_class, function):
    """It is called once, in the block, when an event of that class is announced."""
    pending = [function]

    def call(event):
        if isinstance(event, event_class) and pending:
            pending.pop()()

    zope.event.subscribers.append(call)
    try:
        yield
    finally:
        zope.event.subscribers.remove(call)


def interrupted_at(event_class):
    """An interrupt comes, once, when an event of that class is announced in the block."""

    def interrupt():
        raise KeyboardInterrupt

    return subscriber(event_class, interrupt)


def is_evident(unknown, query):
    """Whether it was committed, by what a `CommitOutcomeUnknown` says to look at in the ledger."""
    statement, number = re.search(r"if (SELECT .*) gives (\d+)", unknown.evidence).groups()
    return query(statement) == [(int(number),)]


@contextmanager
def policy_of(connection, **keywords):
    """Another `RetryPolicy` in the block, where connecting is to fail.

    Where it is to succeed, a short timeout may pass on a busy machine.
    """
    with mock.patch.object(connection.work.patience, "policy", RetryPolicy(**keywords)):
        yield


class ContextTestCase(unittest.TestCase):
    def enterContext(self, context):
        # unittest has it from Python 3.11 on.
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value


class LineTestCase(ContextTestCase):
    """What is seen of a connection on its line, ``self.forward``, and of what it announces."""

    def round_trips(self, function):
        before = self.forward.count()
        function()
        return (self.forward.count() - before).round_trips

    @contextmanager
    def events(self):
        """The events that are announced inside the block."""
        seen = []
        zope.event.subscribers.append(seen.append)
        try:
            yield seen
        finally:
            zope.event.subscribers.remove(seen.append)


class DatabaseTestCase(LineTestCase):
    """``self.dsn`` leads to an empty database through ``self.forward``."""

    layer = LAYER

    dbname = "postgres"
    #: The driver of `connect`, and its module.
    driver = "psycopg2"
    module = psycopg2

    def setUp(self):
        self.server = self.layer.server
        self.forward = self.layer.forward
        # A session of the test before may still run its last statement. Emptying a database takes
        # a tenth of the time that making one takes.
        self.query(
            "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        self.query("DROP SCHEMA public CASCADE")
        self.query("CREATE SCHEMA public")
        self.query("GRANT USAGE ON SCHEMA public TO PUBLIC")
        self.dsn = self.layer.dsn(dbname=self.dbname)
        self.addCleanup(transaction.abort)

    def connect(self, dsn=None, **keywords):
        connection = zreconnect.connect(dsn or self.dsn, driver=self.driver, **keywords)
        self.addCleanup(connection.close)
        return connection

    def query(self, statement, *parameters):
        """The rows that a connection of its own gets, past the forwarder."""
        return self.server.query(statement, *parameters, dbname=self.dbname)

    def make_table(self):
        self.query("CREATE TABLE item (name text PRIMARY KEY)")

    def names(self):
        return [name for (name,) in self.query("SELECT name FROM item ORDER BY name")]

    def sessions(self):
        """The process ids of the test's sessions."""
        return self.server.backend_pids()

    @contextmanager
    def plain(self):
        """A plain connection of the module's through the forwarder."""
        with closing(self.module.connect(self.dsn)) as plain:
            yield plain
