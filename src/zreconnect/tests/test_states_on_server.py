"""Each state of a connection, reached on a server, and what it makes of each request."""

from contextlib import contextmanager, suppress
from functools import partial
from unittest import mock

import psycopg
import transaction
import zope.event
from transaction.interfaces import TransientError

from zreconnect import CommitOutcomeUnknown, DisconnectionError, commits, work
from zreconnect.events import ConnectionLost
from zreconnect.session import NO_SESSION
from zreconnect.states import REQUESTS, Answer, Event, Request, State
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests.base import DatabaseTestCase
from zreconnect.tests.steps import interrupted, moments

LAYER = PortForwardLayer(
    PostgresLayer("StatesPostgresLayer", {"max_prepared_transactions": 20}), "StatesForwardLayer"
)
# Every so many-th step is interrupted; all of them take a minute.
STRIDE = 7


@contextmanager
def when_lost(function):
    """Call it when a connection tells that its session is lost."""

    def see(event):
        if isinstance(event, ConnectionLost):
            function()

    zope.event.subscribers.append(see)
    try:
        yield
    finally:
        zope.event.subscribers.remove(see)


def interrupt():
    raise KeyboardInterrupt


# What is rolled back when its session ends.
ENDS_WITH_SESSION = {
    *(State.BEGINNING, State.TORN, State.ACTIVE, State.ENDED, State.CONFLICT),
    *(State.DOOMED, State.UNKNOWN, State.ROLLING_BACK),
}


class Anchor:
    """What a larger transaction refers to."""


class ServerTestCase(DatabaseTestCase):
    layer = LAYER

    def setUp(self):
        super().setUp()
        self.connections = []
        self.query("CREATE TABLE item (name text UNIQUE DEFERRABLE INITIALLY DEFERRED)")

    def connect(self, **keywords):
        connection = super().connect(**keywords)
        self.connections.append(connection)
        # Made when it still can be.
        self.cursor = connection.cursor()
        return connection

    def written(self, **keywords):
        self.query("DELETE FROM item")
        connection = self.connect(**keywords)
        connection.begin()
        connection.execute("INSERT INTO item VALUES ('one')")
        return connection

    def noted(self, *events):
        connection = self.written()
        for event in events:
            connection.work.note(event)
        return connection

    def assert_state_is_true(self, connection):
        """The state says what the driver does."""
        raw, driver = connection.work.link.session.raw, connection.work.link.driver
        is_inside = raw is not None and driver.in_transaction(raw)
        self.assertEqual(is_inside, connection.work.state is State.ACTIVE)

    # How each state is reached. Those of a request under way are noted.

    def idle(self):
        return self.connect()

    def beginning(self):
        connection = self.connect()
        # Else it would be what a thread has left that has ended.
        connection.work.take_turn()
        connection.work.note(Event.BEGIN_LEAVES)
        return connection

    def torn(self):
        connection = self.connect(on_connect=lambda raw: interrupt())
        with self.assertRaises(KeyboardInterrupt):
            connection.execute("SELECT 1")
        return connection

    def active(self):
        return self.written()

    def ended(self):
        connection = self.written()
        connection.execute("INSERT INTO item VALUES ('one')")
        with self.assertRaises(self.module.IntegrityError):
            connection.execute("COMMIT")
        return connection

    def conflict(self):
        connection = self.written()
        self.query(
            "CREATE OR REPLACE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql"
            " AS $$ BEGIN RAISE serialization_failure; END $$"
        )
        connection.execute(
            "CREATE CONSTRAINT TRIGGER conflict AFTER UPDATE ON item DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION conflict()"
        )
        connection.execute("UPDATE item SET name = 'two'")
        with self.assertRaises(TransientError):
            connection.execute("COMMIT")
        return connection

    def committing(self):
        return self.noted(Event.COMMIT_LEAVES)

    def unsettled(self, lost="to_server"):
        connection = self.written()
        self.forward.cut(lost, 0)
        with when_lost(interrupt), self.assertRaises(KeyboardInterrupt):
            connection.commit()
        return connection

    def unknown(self):
        connection = self.written(witness=None)
        self.forward.cut("to_server", 0)
        with self.assertRaises(CommitOutcomeUnknown):
            connection.commit()
        return connection

    def preparing(self):
        return self.noted(Event.PREPARE_LEAVES)

    def prepared(self):
        connection = self.written(two_phase=True)
        self.vote(connection)
        return connection

    def vote(self, connection):
        member = connection.work.member
        for phase in (member.tpc_begin, member.commit, member.tpc_vote):
            phase(transaction.get())

    def rolling_back(self):
        return self.noted(Event.ROLLBACK_LEAVES)

    def doomed(self):
        connection = self.written()
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            connection.execute("SELECT 1")
        return connection

    def closed(self):
        connection = self.connect()
        connection.close()
        return connection


class EveryState:
    def make(self, request, connection):
        {
            Request.LOOK: connection.cursor,
            Request.STATEMENT: lambda: self.cursor.execute("SELECT 1"),
            Request.BEGIN: connection.begin,
            Request.SETTINGS: lambda: setattr(connection, "autocommit", True),
            Request.COMMIT: connection.commit,
            Request.ROLLBACK: connection.rollback,
        }[request]()

    def end_all(self):
        """End what is prepared, and then the sessions, of which others would wait for a row."""
        transaction.abort()
        for connection in self.connections:
            connection.close()
        self.connections.clear()

    def reach(self, state):
        self.end_all()
        connection = getattr(self, state.name.lower())()
        self.assertIs(connection.work.state, state)
        self.assertEqual(connection.state, state.shown)
        return connection

    def test_each_request_in_each_state(self):
        for state in State:
            for request, expected in REQUESTS[state].items():
                with self.subTest(f"{state.name}, {request.name}"):
                    self.check(self.reach(state), state, request, expected)

    def check(self, connection, state, request, expected):
        after = {
            Request.STATEMENT: State.ACTIVE,
            Request.BEGIN: State.ACTIVE,
            Request.COMMIT: State.IDLE,
            Request.ROLLBACK: State.IDLE,
        }.get(request, state)
        module = self.module
        refusal = {
            Answer.INSIDE: module.ProgrammingError,
            Answer.OVER: module.InternalError,
            Answer.CONFLICT: module.InternalError,
            Answer.PREPARED: module.ProgrammingError,
            Answer.LOST: DisconnectionError,
            Answer.UNKNOWN: CommitOutcomeUnknown,
            Answer.CLOSED: module.InterfaceError,
        }
        if expected not in refusal:
            self.make(request, connection)
        else:
            with self.assertRaises(refusal[expected]) as refused:
                self.make(request, connection)
            self.assertEqual(
                isinstance(refused.exception, TransientError),
                expected in (Answer.CONFLICT, Answer.LOST),
            )
            if request is Request.LOOK:
                with self.assertRaises(refusal[expected]):
                    self.cursor.fetchone()
            # What the server has ended, is over when it was to be committed.
            if expected not in (Answer.OVER, Answer.CONFLICT) or request is not Request.COMMIT:
                after = state
        self.assertIs(connection.work.state, after)
        rows = 1 if (state, request) == (State.ACTIVE, Request.COMMIT) else 0
        if after is State.IDLE:
            self.assertEqual(len(self.names()), rows)
            self.assert_state_is_true(connection)

    def test_close_in_each_state(self):
        for state in State:
            with self.subTest(state.name):
                connection = self.reach(state)
                connection.close()
                self.assertEqual(connection.state, "closed")

    def test_the_larger_transaction_is_forgotten_in_each_state(self):
        for state in State:
            with self.subTest(state.name):
                connection = self.reach(state)
                before, anchor = connection.work.member, Anchor()
                connection.work.become_part("member", anchor)
                self.assertFalse(connection.work.is_forgotten())
                del anchor
                if state is State.IDLE or state in ENDS_WITH_SESSION:
                    self.assertEqual((connection.state, connection.work.member), ("idle", None))
                    self.assertFalse(connection.work.turn.is_mine())
                    self.assertEqual(self.names(), [])
                else:
                    # What may be committed or prepared takes longer.
                    self.assertIs(connection.work.state, state)
                    self.assertTrue(connection.work.is_forgotten())
                if state in ENDS_WITH_SESSION:
                    self.assertIs(connection.work.link.session, NO_SESSION)
                connection.work.become_part(before)

    def test_a_larger_transaction_that_is_not_forgotten(self):
        connection, anchor = self.reach(State.ACTIVE), Anchor()
        # A transaction of somebody else's begins while the larger one is still there.
        connection.work.become_part("member", anchor)
        connection.work.forget_member()
        del anchor
        self.assertFalse(connection.work.is_forgotten())
        self.assertIs(connection.work.state, State.ACTIVE)
        # It is certain to be told its end.
        connection.work.become_part("member")
        self.assertFalse(connection.work.is_forgotten())
        connection.work.forget_member()

    def test_what_is_known_not_to_be_committed_is_no_longer_counted(self):
        for state, event, sent in (
            (State.COMMITTING, Event.REFUSED, 0),
            (State.COMMITTING, Event.GOES_ON, 0),
            (State.COMMITTING, Event.FOUND_ABORTED, 0),
            (State.UNSETTLED, Event.FOUND_ABORTED, 0),
            (State.COMMITTING, Event.COMMITTED, 1),
            (State.COMMITTING, Event.NOT_FOUND, 1),
            (State.COMMITTING, Event.LOST, 1),
            (State.UNSETTLED, Event.COMMITTED, 1),
            # That of another connection is counted here.
            (State.ACTIVE, Event.GOES_ON, 1),
            (State.PREPARING, Event.GOES_ON, 1),
            (State.ENDED, Event.REFUSED, 1),
            (State.IDLE, Event.FOUND_ABORTED, 1),
        ):
            with self.subTest(f"{state.name}, {event.name}"):
                connection = self.reach(state)
                with commits.watched() as outer, commits.watched() as inner:
                    connection.work.own.sending()
                    connection.work.note(event)
                self.assertEqual((outer.sent, inner.sent), (sent, sent))

    def test_what_counts_as_a_loss(self):
        for state, event, losses in (
            (State.ACTIVE, Event.LOST, 1),
            (State.BEGINNING, Event.NOT_BEGUN_FOR_STATEMENT, 1),
            (State.BEGINNING, Event.NOT_REACHED_FOR_STATEMENT, 1),
            (State.COMMITTING, Event.NOT_FOUND, 1),
            (State.UNSETTLED, Event.FOUND_ABORTED, 1),
            (State.BEGINNING, Event.NOT_BEGUN, 0),
            (State.COMMITTING, Event.LOST, 0),
            (State.DOOMED, Event.LOST, 0),
            (State.DOOMED, Event.ROLLED_BACK, 0),
        ):
            with self.subTest(f"{state.name}, {event.name}"):
                connection = self.reach(state)
                before = connection.work.losses
                connection.work.note(event)
                self.assertEqual(connection.work.losses - before, losses)

    def test_rollback_tells_of_a_commit(self):
        connection = self.unsettled(lost="to_client")
        with self.assertRaisesRegex(CommitOutcomeUnknown, "committed"):
            connection.rollback()
        self.assertEqual((connection.state, self.names()), ("idle", ["one"]))

    def test_requests_under_way(self):
        seen = []
        connection = self.connect(on_connect=lambda raw: seen.append(connection.work.state))
        with when_lost(lambda: seen.append(connection.work.state)):
            connection.execute("INSERT INTO item VALUES ('one')")
            for end in (connection.commit, connection.rollback):
                self.forward.cut("to_server", 0)
                with suppress(DisconnectionError):
                    end()
                connection.rollback()
                connection.begin()
        self.assertEqual(
            [state.name for state in seen],
            # The end of the session, and the session in which it is looked up; then the next one.
            ["BEGINNING", *("UNSETTLED", "UNSETTLED"), "BEGINNING", "ROLLING_BACK", "BEGINNING"],
        )


class Interrupts:
    """An interrupt is raised as it is, wherever it comes, and the state is true afterwards."""

    def sweep(self, prepare, call):
        connection = self.connect()
        for moment in moments():
            is_interrupted = True
            prepare(connection)
            with self.subTest(step=moment * STRIDE):
                is_interrupted, _ = interrupted(partial(call, connection), work, moment * STRIDE)
                self.assert_state_is_true(connection)
            # It may be committed although it was interrupted.
            with suppress(CommitOutcomeUnknown):
                connection.rollback()
            self.assert_state_is_true(connection)
            if not is_interrupted:
                return

    def replace(self, connection):
        connection.execute("DELETE FROM item")
        connection.execute("INSERT INTO item VALUES ('one')")

    def test_begin(self):
        self.sweep(lambda connection: None, lambda connection: connection.begin())

    def test_begin_for_a_statement(self):
        self.sweep(lambda connection: None, self.replace)

    def test_commit(self):
        self.sweep(self.replace, lambda connection: connection.commit())

    def test_rollback(self):
        self.sweep(self.replace, lambda connection: connection.rollback())

    def test_before_a_commit_is_counted(self):
        """What the same call has committed before stays said."""
        connection = self.written()
        with commits.watched() as watched:
            commits.note()
            with (
                mock.patch.object(commits.OwnCommits, "sending", lambda own: interrupt()),
                self.assertRaises(KeyboardInterrupt),
            ):
                connection.commit()
        self.assertEqual((connection.state, watched.sent), ("active", 1))

    def test_a_vote(self):
        """What may be prepared is ended, also if the program has rolled back meanwhile."""
        connection = self.written(two_phase=True)
        self.addCleanup(self.end_prepared)
        prepare = connection.work.prepare

        def lose_answer(gid):
            self.forward.cut("to_client", 0)
            prepare(gid)

        with (
            mock.patch.object(type(connection.work), "prepare", lambda work, gid: lose_answer(gid)),
            when_lost(interrupt),
            self.assertRaises(KeyboardInterrupt),
        ):
            self.vote(connection)
        with suppress(self.module.ProgrammingError):
            connection.rollback()
        transaction.abort()
        self.assertEqual(connection.state, "idle")
        self.assertEqual(self.query("SELECT gid FROM pg_prepared_xacts"), [])

    def end_prepared(self):
        for (gid,) in self.query("SELECT gid FROM pg_prepared_xacts"):
            self.query(f"ROLLBACK PREPARED '{gid}'")


class RollsBackAtOnce:
    """Who hears of the loss rolls back at once, while a request is under way."""

    def check(self, connection, request, *refusals):
        with when_lost(connection.rollback), suppress(*refusals):
            request()
        self.assert_state_is_true(connection)
        connection.rollback()
        self.assertEqual(connection.state, "idle")
        self.assert_state_is_true(connection)

    def test_begin(self):
        connection = self.connect()
        connection.begin()
        connection.rollback()
        self.forward.drop()
        self.check(connection, connection.begin)

    def test_statement(self):
        connection = self.written()
        self.forward.drop()
        self.check(connection, lambda: connection.execute("SELECT 1"), DisconnectionError)

    def test_commit(self):
        for lost in ("to_server", "to_client"):
            with self.subTest(lost):
                connection = self.written()
                self.forward.cut(lost, 0)
                self.check(connection, connection.commit, DisconnectionError, CommitOutcomeUnknown)

    def test_rollback(self):
        connection = self.written()
        self.forward.cut("to_server", 0)
        self.check(connection, connection.rollback)


class Psycopg2StatesTests(EveryState, ServerTestCase):
    """With psycopg2."""


class Psycopg2InterruptTests(Interrupts, ServerTestCase):
    """With psycopg2."""


class Psycopg2SubscriberTests(RollsBackAtOnce, ServerTestCase):
    """With psycopg2."""


class PsycopgStatesTests(EveryState, ServerTestCase):
    driver = "psycopg"
    module = psycopg


class PsycopgInterruptTests(Interrupts, ServerTestCase):
    driver = "psycopg"
    module = psycopg


class PsycopgSubscriberTests(RollsBackAtOnce, ServerTestCase):
    driver = "psycopg"
    module = psycopg
