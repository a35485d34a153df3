"""commit() and rollback() of a program's own class of connections."""

import psycopg2
from psycopg2 import extensions

from zreconnect import (
    CommitOutcomeUnknown,
    DisconnectionError,
    ReconnectingConnection,
    XidWitness,
)
from zreconnect.tests.base import DatabaseTestCase


class Connection(extensions.connection):
    """Calls what the test wants before and after psycopg2's own."""

    during = None

    def commit(self):
        self.during("commit", super().commit)

    def rollback(self):
        self.during("rollback", super().rollback)

    def execute(self, statement):
        with self.cursor() as cursor:
            cursor.execute(statement)

    def insert(self, name):
        self.execute(f"INSERT INTO item VALUES ('{name}')")

    def lose(self):
        self.execute("SELECT pg_terminate_backend(pg_backend_pid())")


class OverridesTests(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()
        self.calls = []
        self.on(None, None)
        self.connection = self.connect_with(Connection)

    def connect_with(self, connection_class, **keywords):
        connection = ReconnectingConnection(
            lambda: psycopg2.connect(self.dsn, connection_factory=connection_class), **keywords
        )
        self.addCleanup(connection.close)
        return connection

    def on(self, name, function):
        """Have the method do that, which is called with the connection and psycopg2's own."""

        def during(raw, called, own):
            self.calls.append(called)
            if called == name:
                function(raw, own)
            else:
                own()

        Connection.during = during

    def insert(self, name="one"):
        self.connection.cursor().execute("INSERT INTO item VALUES (%s)", (name,))

    def check(self, names, state="idle"):
        self.assertEqual((self.connection.state, self.names()), (state, names))

    def test_they_are_called(self):
        self.insert("one")
        self.connection.commit()
        self.insert("two")
        self.connection.rollback()
        with self.connection:
            self.insert("three")
        with self.assertRaises(ZeroDivisionError), self.connection:
            self.insert("four")
            raise ZeroDivisionError
        self.connection.run(self.insert, "five")
        self.assertEqual(self.calls, ["commit", "rollback", "commit", "rollback", "commit"])
        self.check(["five", "one", "three"])
        self.assertIs(type(self.connection.driver_connection).__mro__[1], Connection)

    def test_what_is_done_before_is_a_part_of_the_transaction(self):
        def before(raw, own):
            raw.insert("before")
            self.assertEqual(self.names(), [])
            own()
            self.assertEqual(self.names(), ["before", "one"])
            # As psycopg2's, it has nothing to do.
            own()

        self.on("commit", before)
        self.insert()
        self.connection.commit()
        self.check(["before", "one"])

    def test_a_witness_that_watches_statements_knows_of_it(self):
        self.on("commit", lambda raw, own: (raw.execute("NOTIFY word"), own()))
        self.connection = self.connect_with(Connection, witness=XidWitness(at_commit=True))
        self.connection.cursor().execute("SELECT 1")
        self.connection.commit()
        self.assertTrue(self.connection.work.link.observer.may_have_written)

    def test_an_error_before(self):
        for error, mistake in (
            (psycopg2.ProgrammingError, lambda raw: raw.execute("SELEC 1")),
            (ZeroDivisionError, lambda raw: 1 // 0),
        ):
            for name in ("commit", "rollback"):
                with self.subTest(error=error, name=name):
                    self.on(name, lambda raw, own, mistake=mistake: (mistake(raw), own()))
                    self.insert()
                    with self.assertRaises(error):
                        getattr(self.connection, name)()
                    self.check([], "active" if name == "commit" else "idle")
                    if name == "commit":
                        self.connection.rollback()

    def test_a_loss_before(self):
        for name in ("commit", "rollback"):
            self.on(name, lambda raw, own: (raw.lose(), own()))
            self.insert()
            with self.assertRaises(DisconnectionError):
                getattr(self.connection, name)()
            self.check([], "doomed" if name == "commit" else "idle")
            self.connection.rollback()
        self.check([])

    def test_the_answer_is_lost(self):
        def lose(raw, own):
            self.forward.cut("to_client", 0)
            own()
            self.calls.append("after")

        self.on("commit", lose)
        self.insert()
        self.connection.commit()
        self.assertEqual(self.calls, ["commit", "after"])
        self.check(["one"])

    def test_an_error_that_it_swallows(self):
        def swallow(raw, own):
            with self.assertRaises(psycopg2.errors.InFailedSqlTransaction):
                own()

        self.on("commit", swallow)
        self.insert()
        with self.assertRaises(psycopg2.errors.SyntaxError):
            self.connection.cursor().execute("SELEC 1")
        with self.assertRaises(psycopg2.errors.InFailedSqlTransaction):
            self.connection.commit()
        self.check([])

    def test_the_error_passes(self):
        self.insert()
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            self.connection.commit()
        self.connection.rollback()
        self.check([])

    def test_the_end_is_not_called(self):
        for name in ("commit", "rollback"):
            self.on(name, lambda raw, own: None)
            self.insert()
            if name == "commit":
                with self.assertRaisesRegex(
                    psycopg2.ProgrammingError, r"Nothing is committed: commit\(\) of Connection"
                ):
                    self.connection.commit()
                self.check([], "active")
            self.connection.rollback()
        self.check([])

    def test_an_error_after_the_commit_has_nothing_run_again(self):
        def fail(raw, own):
            own()
            raise DisconnectionError("another one")

        self.on("commit", fail)
        with self.assertRaises(CommitOutcomeUnknown) as committed:
            self.connection.run(self.insert)
        self.assertEqual(committed.exception.outcome, "committed")
        self.check(["one"])

    def test_a_loss_after_the_commit(self):
        self.on("commit", lambda raw, own: (own(), raw.lose()))
        self.insert()
        with self.assertRaises(CommitOutcomeUnknown):
            self.connection.commit()
        self.check(["one"])

    def test_a_class_without_a_dictionary_is_left_alone(self):
        class Bare(extensions.connection):
            __slots__ = ()
            commit = None

        self.connection = self.connect_with(Bare)
        self.insert()
        self.connection.commit()
        self.check(["one"])
        self.assertIs(type(self.connection.driver_connection), Bare)
