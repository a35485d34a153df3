"""Behind PgBouncer: what is found out, what is turned off or refused, and what its errors mean."""

import contextlib
import pickle
import threading
import unittest
from contextlib import closing, contextmanager
from functools import partial

import psycopg
import psycopg2
import sqlalchemy

import zreconnect
from zreconnect import (
    ConnectionDescriptor,
    DisconnectionError,
    Ledger,
    ReconnectingConnection,
    ReconnectingDatabaseAdapter,
    ReconnectTimeout,
    RetryPolicy,
    initZopeless,
)
from zreconnect.integrations import sqlalchemy as integrations_sqlalchemy
from zreconnect.integrations import sqlobject, storm
from zreconnect.testing import EmbeddedPgBouncer, PortForward
from zreconnect.testing.layers import POSTGRES_LAYER, PgBouncerLayer, PortForwardLayer
from zreconnect.tests.base import DatabaseTestCase, on_pgbouncer, policy_of, wait_until
from zreconnect.tests.test_fencing import WITNESSES

# Checking a password by SCRAM takes half the time of connecting.
SETTINGS = {"auth_type": "md5"}
# Who is given this has what he waits for long before.
POLICY = RetryPolicy(timeout=30, initial=0.01, maximum=0.05)
# Those who are in a transaction; the others wait for their next client.
INSIDE = (
    "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
    " AND xact_start IS NOT NULL AND pid <> pg_backend_pid()"
)
INSERT = "INSERT INTO item VALUES (%s)"


def layer(pool_mode):
    name = f"{pool_mode.capitalize()}Pool"
    pooler = PgBouncerLayer(POSTGRES_LAYER, pool_mode, f"{name}Layer", SETTINGS)
    return PortForwardLayer(pooler, f"{name}ForwardLayer")


TRANSACTION_POOL = layer("transaction")
SESSION_POOL = layer("session")


class KeywordTests(unittest.TestCase):
    dsn = "postgresql://nobody@127.0.0.1:1/nothing"

    def ways(self, pooled):
        """The connections of all that take the keyword."""
        yield zreconnect.connect(self.dsn, pooled=pooled)
        yield zreconnect.connect(self.dsn, pooled=pooled).fork()
        yield ReconnectingConnection(lambda: None, pooled=pooled)
        yield ConnectionDescriptor(self.dsn, pooled=pooled).connection()
        manager = initZopeless(self.dsn, implicitBegin=False, pooled=pooled)
        yield manager.connection()
        manager.uninstall()
        adapter = ReconnectingDatabaseAdapter(self.dsn, pooled=pooled)
        yield adapter()
        yield pickle.loads(pickle.dumps(adapter))()

    def test_it_goes_all_ways(self):
        for pooled in (None, True, False):
            for connection in self.ways(pooled):
                with self.subTest(connection=connection, pooled=pooled):
                    self.assertIs(connection.work.link.options.pooled, pooled)
                    self.assertIs(connection.work.link.settings.pooled, pooled is True)

    def test_integrations_check_it(self):
        engine = sqlalchemy.create_engine("postgresql+psycopg2://")
        for register in (
            partial(integrations_sqlalchemy.register, engine),
            storm.register,
            sqlobject.register,
        ):
            with self.assertRaisesRegex(TypeError, "pooled must be True, False or None, not 'yes'"):
                register(pooled="yes")

    def test_it_is_for_postgresql(self):
        with self.assertRaisesRegex(ValueError, "pooled=True is not possible .* sqlite"):
            zreconnect.connect("sqlite:///:memory:", pooled=True)
        with closing(zreconnect.connect("sqlite:///:memory:", pooled=False)) as connection:
            connection.execute("SELECT 1")


class PoolerTestCase(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.pooler = self.server
        self.addCleanup(self.resume)
        # Past PgBouncer.
        self.server = self.pooler.server
        self.make_table()

    def connect(self, dsn=None, **keywords):
        return super().connect(dsn, **{"policy": POLICY, **keywords})

    def resume(self):
        # If it is not paused, that is an error.
        with contextlib.suppress(psycopg2.Error):
            self.pooler.command(f"RESUME {self.dbname}")

    def inside(self):
        return [pid for (pid,) in self.query(INSIDE)]

    def insert(self, connection, name="one"):
        connection.execute(INSERT, (name,)).close()

    @contextmanager
    def other_client(self, pooler=None):
        """A plain client of the same pool."""
        with closing(psycopg2.connect((pooler or self.pooler).dsn(dbname=self.dbname))) as other:
            yield other

    @contextmanager
    def another_pooler(self, pool_mode=None, **settings):
        mode = pool_mode or self.pooler.pool_mode
        with EmbeddedPgBouncer(self.server, mode, {**SETTINGS, **settings}) as pooler:
            yield pooler

    def show(self, connection, name):
        with closing(connection.execute(f"SHOW {name}")) as cursor:
            ((value,),) = cursor.fetchall()
        connection.commit()
        return value

    def is_pooled(self, connection):
        connection.run(lambda: None)
        return connection.work.link.settings.pooled


class EitherModeTests:
    """What is the same whether a client keeps a server process for a transaction or for longer."""

    def test_it_is_found_out(self):
        for witness in (*WITNESSES, None):
            self.assertTrue(self.is_pooled(self.connect(witness=witness)))
            past = self.connect(self.server.dsn(dbname=self.dbname), witness=witness)
            self.assertFalse(self.is_pooled(past))
        fork = self.connect().fork()
        self.assertTrue(self.is_pooled(fork))
        fork.reset()
        self.assertTrue(self.is_pooled(fork))
        fork.close()

    def test_unless_the_program_knows_better(self):
        self.assertFalse(self.is_pooled(self.connect(pooled=False)))
        past = self.connect(self.server.dsn(dbname=self.dbname), pooled=True)
        self.assertTrue(past.work.link.settings.pooled)
        self.assertTrue(self.is_pooled(past))
        past.reset()
        self.assertTrue(past.work.link.settings.pooled)

    def test_what_only_forwards_is_no_pooler(self):
        with PortForward(self.server.host, self.server.port) as forward:
            self.assertFalse(self.is_pooled(self.connect(self.server.dsn(port=forward.port))))

    def test_its_server_crashes(self):
        connection = self.connect()
        connection.begin()
        self.insert(connection)
        (pid,) = self.inside()
        self.server.kill_backend(pid)
        self.server.wait_until_ready()
        with self.assertRaises(DisconnectionError):
            connection.execute("SELECT 1")
        connection.rollback()
        connection.run(self.insert, connection)
        self.assertEqual(self.names(), ["one"])

    def test_kill(self):
        connection = self.connect()
        connection.begin()
        self.insert(connection)
        self.pooler.command(f"KILL {self.dbname}")
        with self.assertRaises(DisconnectionError):
            connection.execute("SELECT 1")
        connection.rollback()
        # It lets nobody in until it is told to.
        self.resumed_while_waiting(connection)
        self.assertEqual(self.names(), ["two"])

    def resumed_while_waiting(self, connection):
        waiting = threading.Thread(target=connection.run, args=(self.insert, connection, "two"))
        waiting.start()
        wait_until(self.is_waited_for)
        self.pooler.command(f"RESUME {self.dbname}")
        waiting.join()

    def is_waited_for(self):
        pools = [each for each in self.pooler.show("pools") if each["database"] == self.dbname]
        clients = [each for each in self.pooler.show("clients") if each["state"] == "waiting"]
        return any(pool["cl_waiting"] for pool in pools) or clients

    def test_pause_between_transactions(self):
        self.pooler.command(f"PAUSE {self.dbname}")
        connection = self.connect()
        with policy_of(connection, timeout=0.6), self.assertRaises(ReconnectTimeout):
            connection.begin()
        self.resumed_while_waiting(connection)
        self.assertEqual(self.names(), ["two"])

    def test_reconnect_is_not_noticed(self):
        connection = self.connect()
        with self.events() as events:
            connection.begin()
            self.insert(connection)
            self.pooler.command(f"RECONNECT {self.dbname}")
            connection.commit()
            connection.run(self.insert, connection, "two")
        self.assertEqual(events, [])
        self.assertEqual(self.names(), ["one", "two"])

    def test_shutdown(self):
        connection = self.connect()
        connection.begin()
        self.insert(connection)
        with contextlib.suppress(psycopg2.OperationalError):
            self.pooler.command("SHUTDOWN")
        with self.assertRaises(DisconnectionError):
            connection.execute("SELECT 1")
        connection.rollback()
        wait_until(lambda: not self.pooler.running)
        with policy_of(connection, timeout=0), self.assertRaises(ReconnectTimeout):
            connection.begin()
        self.pooler.start()
        connection.run(self.insert, connection, "two")
        self.assertEqual(self.names(), ["two"])

    def test_its_server_is_down(self):
        connection = self.connect()
        connection.run(lambda: None)
        self.server.shut_down()
        for _ in range(2):
            with policy_of(connection, timeout=0.6), self.assertRaises(ReconnectTimeout):
                connection.begin()
        self.server.start()
        connection.run(self.insert, connection)
        self.assertEqual(self.names(), ["one"])

    def test_no_connection_is_left(self):
        with self.another_pooler(max_client_conn=1) as pooler:
            connection = self.connect(pooler.dsn(dbname=self.dbname))
            with self.other_client(pooler):
                with policy_of(connection, timeout=0), self.assertRaises(ReconnectTimeout) as full:
                    connection.begin()
                self.assertIn("max_client_conn", str(full.exception))
            connection.run(self.insert, connection)
        self.assertEqual(self.names(), ["one"])

    def test_no_server_process_is_left_for_a_while(self):
        with (
            self.another_pooler(default_pool_size=1, query_wait_timeout=1) as pooler,
            self.other_client(pooler) as other,
        ):
            other.cursor().execute("SELECT 1")
            connection = self.connect(pooler.dsn(dbname=self.dbname))
            waiting = threading.Thread(target=connection.run, args=(self.insert, connection))
            with self.events() as events:
                waiting.start()
                wait_until(lambda: events)
                other.close()
                waiting.join()
        self.assertEqual(self.names(), ["one"])

    def test_the_client_encoding_is_the_clients_own(self):
        connection = self.connect()
        connection.set_client_encoding("LATIN1")
        for _ in range(2):
            self.assertEqual(self.show(connection, "client_encoding"), "LATIN1")
            with self.other_client() as other, other.cursor() as cursor:
                cursor.execute("SHOW client_encoding")
                self.assertEqual(cursor.fetchone(), ("UTF8",))
            self.forward.drop()
            connection.rollback()

    def test_an_orphan_in_any_process_is_ended(self):
        for witness in WITNESSES:
            for readonly in (False, True):
                with self.subTest(witness=witness, readonly=readonly):
                    self.check_that_the_orphan_is_ended(witness, readonly)

    def check_that_the_orphan_is_ended(self, witness, readonly):
        with (
            PortForward(self.pooler.host, self.pooler.port) as line,
            self.other_client() as other,
            other.cursor() as cursor,
        ):
            connection = self.connect(
                f"host=127.0.0.1,127.0.0.1 port={line.port},{self.pooler.port} user=postgres"
                f" password={self.server.password} dbname={self.dbname}",
                witness=witness,
            )
            connection.run(connection.execute, "SELECT 1")
            # It has what was the first transaction's process, if that can be.
            cursor.execute("SELECT pg_current_xact_id(), pg_backend_pid()")
            ((_, others),) = cursor.fetchall()
            connection.readonly = readonly
            connection.begin()
            connection.execute("LOCK item IN ACCESS SHARE MODE").close()
            (orphan,) = set(self.inside()) - {others}
            line.refuse()
            line.silence()
            connection.work.link.session.watch.hang_up()
            with self.assertRaises(DisconnectionError):
                connection.execute("SELECT 1")
            connection.rollback()
            connection.readonly = None
            connection.run(connection.execute, "LOCK item IN ACCESS EXCLUSIVE MODE")
            self.assertEqual(self.inside(), [others])
            self.assertNotEqual(orphan, others)
            cursor.execute("SELECT 1")
            connection.close()


class TransactionModeTests(EitherModeTests):
    # What a bare transaction takes.
    trips = 2

    def test_it_costs_no_round_trip(self):
        for witness in ("xid", Ledger(), None):
            connection = self.connect(witness=witness)

            def use(connection=connection):
                connection.execute("SELECT 1").close()
                connection.commit()

            use()
            self.assertEqual(self.round_trips(use), self.trips if witness else 2, witness)

    def test_pause_inside_a_transaction(self):
        connection = self.connect()
        connection.begin()
        self.insert(connection)
        pausing = threading.Thread(target=self.pooler.command, args=(f"PAUSE {self.dbname}",))
        pausing.start()
        # It waits for the end of transactions.
        self.insert(connection, "three")
        connection.commit()
        pausing.join()
        self.resumed_while_waiting(connection)
        self.assertEqual(self.names(), ["one", "three", "two"])

    def test_modes_in_autocommit_mode_are_refused(self):
        def both(**modes):
            connection = self.connect()
            connection.run(lambda: None)
            connection.set_session(autocommit=True, **modes)

        def one_after_the_other(**modes):
            connection = self.connect(pooled=True)
            connection.autocommit = True
            try:
                connection.set_session(**modes)
            finally:
                self.assertIsNone(connection.readonly)
                connection.execute("SELECT 1")

        def before_it_is_found_out(**modes):
            connection = self.connect()
            connection.set_session(autocommit=True, **modes)
            try:
                connection.execute("SELECT 1")
            finally:
                connection.autocommit = False
                connection.run(connection.execute, "SELECT 1")

        for change in (both, one_after_the_other, before_it_is_found_out):
            for modes in (
                {"readonly": True},
                {"isolation_level": "SERIALIZABLE"},
                {"deferrable": True},
            ):
                refused = self.assertRaisesRegex(
                    self.module.ProgrammingError, "gives to others.*pooled=False"
                )
                with self.subTest(change=change.__name__, modes=modes), refused:
                    change(**modes)
        with self.other_client() as other, other.cursor() as cursor:
            cursor.execute("SHOW default_transaction_read_only")
            self.assertEqual(cursor.fetchone(), ("off",))

    def test_modes_of_transactions_work(self):
        connection = self.connect()
        connection.set_session(readonly=True, isolation_level="SERIALIZABLE", deferrable=True)
        for name in ("transaction_read_only", "transaction_deferrable"):
            self.assertEqual(self.show(connection, name), "on")

    def test_autocommit_alone_works(self):
        connection = self.connect()
        connection.autocommit = True
        self.insert(connection)
        self.assertEqual(self.names(), ["one"])

    def test_what_is_to_stay_in_the_session_is_refused(self):
        for pooled in (None, True):
            connection = self.connect(pooled=pooled)
            listening = self.assertRaisesRegex(self.module.ProgrammingError, "^LISTEN is not")
            for statement in ("LISTEN a", "-- for b\n listen b", b"LISTEN c", "SELECT 1; LISTEN d"):
                with self.subTest(statement), listening:
                    connection.execute(statement)
                connection.rollback()
            for statement in (
                "DECLARE held CURSOR WITH HOLD FOR SELECT 1",
                'SELECT 1; declare "a;b" BINARY NO SCROLL\n cursor with  hold for SELECT 1',
            ):
                with (
                    self.subTest(statement),
                    self.assertRaisesRegex(self.module.ProgrammingError, "^A cursor WITH HOLD is"),
                ):
                    connection.execute(statement)
                connection.rollback()
            connection.execute("DECLARE a CURSOR WITHOUT HOLD FOR SELECT 'CURSOR WITH HOLD'")
            connection.rollback()
            connection.autocommit = True
            with listening:
                connection.execute("LISTEN a")
            connection.autocommit = False
            for held in self.held_cursors(connection):
                with self.assertRaisesRegex(self.module.ProgrammingError, "WITH HOLD is not"):
                    held.execute("SELECT 1")
                connection.rollback()
            connection.execute("SELECT '; listen'; SELECT 1")
            self.insert(connection, f"LISTEN {pooled}")
            connection.commit()

    def held_cursors(self, connection):
        yield connection.cursor("held", withhold=True)

    def test_startup_options_are_refused(self):
        for driver in ("psycopg2", "psycopg"):
            dsn = self.dsn + "?options=-cgeqo%3Doff"
            with self.assertRaisesRegex(ValueError, "^pooled=True .* ALTER ROLE"):
                zreconnect.connect(dsn, driver, pooled=True)
            with self.assertRaisesRegex(self.module.OperationalError, "startup parameter"):
                self.connect(dsn).begin()

    def test_the_limit_of_a_look_up_stays_with_nobody(self):
        connection = self.connect(witness=Ledger())
        connection.begin()
        self.insert(connection)
        self.forward.cut("to_client", 0)
        connection.commit()
        self.assertEqual(self.names(), ["one"])
        self.assertEqual(self.show(connection, "lock_timeout"), "0")

    def test_a_transaction_is_looked_up_where_it_was(self):
        """Not where the session began: its server has got another history since."""
        for witness in ("xid", Ledger()):
            connection = self.connect(witness=witness)
            connection.run(lambda: None)
            self.query("SELECT pg_stat_reset_shared('bgwriter')")
            connection.begin()
            self.insert(connection, repr(witness))
            self.forward.cut("to_client", 0)
            connection.commit()
        self.assertEqual(len(self.names()), 2)

    def test_who_may_not_ask_for_the_history(self):
        revoked = "EXECUTE ON FUNCTION pg_control_system()"
        self.query(f"REVOKE {revoked} FROM PUBLIC")
        self.addCleanup(self.query, f"GRANT {revoked} TO PUBLIC")
        self.query(f"CREATE ROLE clerk LOGIN PASSWORD '{self.server.password}'")
        self.addCleanup(self.query, "DROP ROLE clerk")
        self.query("GRANT ALL ON SCHEMA public TO clerk")
        self.query("GRANT ALL ON item TO clerk")
        self.addCleanup(self.query, "DROP OWNED BY clerk")
        connection = self.connect(
            self.server.dsn("clerk", self.dbname, port=self.server.port), pooled=True
        )
        for name in ("one", "two"):
            connection.run(self.insert, connection, name)
        self.assertEqual(self.names(), ["one", "two"])

    def test_read_only_by_the_programs_own_choice(self):
        """Nothing is wrong with the server."""
        for witness in (*WITNESSES, None):
            connection = self.connect(witness=witness)
            connection.execute("SELECT 1")
            with self.assertRaises(self.module.errors.ReadOnlySqlTransaction):
                connection.execute("SET TRANSACTION READ ONLY").execute(INSERT, ("one",))
            self.assertEqual(connection.state, "active")
            connection.rollback()
            # As the first statement it comes before all that could be asked.
            for mode in ("TRANSACTION READ  ONLY", "transaction_read_only TO on"):
                with self.assertRaises(self.module.errors.ReadOnlySqlTransaction):
                    connection.execute(f"SET {mode}").execute(INSERT, ("one",))
                connection.rollback()
            connection.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            self.insert(connection, repr(witness))
            connection.commit()
        self.assertEqual(len(self.names()), len(WITNESSES) + 1)


@on_pgbouncer(TRANSACTION_POOL)
class Psycopg2TransactionModeTests(TransactionModeTests, PoolerTestCase):
    # BEGIN has an answer of its own, as with psycopg2 alone.
    trips = 3

    def held_cursors(self, connection):
        yield from super().held_cursors(connection)
        held = connection.cursor("held")
        held.withhold = True
        yield held


@on_pgbouncer(TRANSACTION_POOL)
class PsycopgTransactionModeTests(TransactionModeTests, PoolerTestCase):
    driver = "psycopg"
    module = psycopg

    def test_nothing_is_prepared(self):
        connection = self.connect()
        with self.other_client() as other, other.cursor() as cursor:
            for _ in range(10):
                connection.run(connection.execute, "SELECT %s::int", (1,))
                cursor.execute("SELECT txid_current()")
                connection.run(connection.execute, "SELECT %s::int", (1,))
                other.rollback()
        self.assertIsNone(connection.prepare_threshold)

    def test_nor_if_the_pooler_is_put_before_the_server_later(self):
        with PortForward(self.server.host, self.server.port) as line:
            connection = self.connect(self.server.dsn(port=line.port))
            connection.run(lambda: None)
            self.assertEqual(connection.prepare_threshold, 5)
            line.stop()
            line.target_port = self.pooler.port
            line.start()
            self.assertTrue(self.is_pooled(connection))
            self.assertIsNone(connection.prepare_threshold)

    def test_unless_the_program_knows_better_how(self):
        def set_up(raw):
            raw.prepare_threshold = 7

        connection = self.connect()
        connection.prepare_threshold = 7
        for each in (connection, self.connect(on_connect=set_up)):
            for _ in range(2):
                each.run(lambda: None)
                self.assertEqual(each.prepare_threshold, 7)
                self.forward.drop()

    def test_a_pooler_of_statements_is_refused_at_once(self):
        with self.another_pooler("statement") as pooler:
            connection = self.connect(pooler.dsn(dbname=self.dbname))
            with self.assertRaisesRegex(psycopg.OperationalError, "statement pooling") as refused:
                connection.begin()
            self.assertNotIsInstance(refused.exception, DisconnectionError)


class SessionModeTests(EitherModeTests):
    def test_what_stays_in_a_session_works_if_the_program_says_so(self):
        connection = self.connect(pooled=False)
        connection.set_session(autocommit=True, readonly=True)
        self.assertEqual(self.show(connection, "transaction_read_only"), "on")
        connection.set_session(autocommit=False, readonly=False)
        connection.run(connection.execute, "LISTEN a")
        connection.begin()
        connection.execute("SET TRANSACTION READ ONLY").close()
        with self.assertRaises(self.module.errors.ReadOnlySqlTransaction):
            self.insert(connection)
        connection.rollback()
        held = connection.cursor("held", withhold=True)
        held.execute("SELECT 1")
        connection.commit()
        self.assertEqual(held.fetchall(), [(1,)])
        held.close()

    def test_a_process_that_others_have_by_now_is_left_to_them(self):
        """It is free as soon as the line is gone on which BEGIN has not arrived."""
        with (
            self.another_pooler(default_pool_size=2) as pooler,
            PortForward(pooler.host, pooler.port) as line,
        ):
            for witness in WITNESSES:
                with self.subTest(witness=witness):
                    self.check_that_an_heir_lives(pooler, line, witness)

    def check_that_an_heir_lives(self, pooler, line, witness):
        dsn = pooler.dsn(dbname=self.dbname, port=line.port)
        connection = self.connect(dsn, witness=witness, pooled=False)
        process = "SELECT pg_backend_pid()"
        pid = connection.run(lambda: connection.execute(process).fetchone())
        with self.other_client(pooler) as other, contextlib.ExitStack() as stack:
            other.cursor().execute("SELECT 1")
            line.cut("to_server", 0)
            with self.assertRaises(DisconnectionError):
                connection.execute(INSERT, ("never",))
            heir = stack.enter_context(self.other_client(pooler))
            cursor = heir.cursor()
            cursor.execute(process)
            self.assertEqual(cursor.fetchone(), pid)
            other.close()
            connection.rollback()
            connection.run(self.insert, connection, repr(witness))
            cursor.execute("SELECT 1")
        connection.close()


@on_pgbouncer(SESSION_POOL)
class Psycopg2SessionModeTests(SessionModeTests, PoolerTestCase):
    pass


@on_pgbouncer(SESSION_POOL)
class PsycopgSessionModeTests(SessionModeTests, PoolerTestCase):
    driver = "psycopg"
    module = psycopg

    def test_preparing_works_if_the_program_says_so(self):
        connection = self.connect(pooled=False)
        connection.run(lambda: None)
        self.assertEqual(connection.prepare_threshold, 5)
