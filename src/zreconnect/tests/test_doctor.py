"""The command ``zreconnect doctor``."""

from __future__ import annotations

import json
import socket
import unittest
from contextlib import closing
from unittest import mock
from urllib.parse import quote

import psycopg2

from zreconnect.cli import findings, linechecks, postgresqlchecks
from zreconnect.testing import EmbeddedStandby
from zreconnect.testing.layers import (
    POSTGRES_LAYER,
    PgBouncerLayer,
    PostgresLayer,
)
from zreconnect.tests.base import needs_mysqlclient, on_mariadb, on_pgbouncer, wait_until
from zreconnect.tests.test_command import run_here
from zreconnect.tests.tls import Terminator, make_certificate, needs_openssl

SETTINGS = {
    "max_prepared_transactions": 20,
    "tcp_keepalives_idle": 30,
    "tcp_keepalives_interval": 10,
    "tcp_keepalives_count": 3,
}
LAYER = PostgresLayer("DoctorPostgresLayer", SETTINGS)
POOLER_LAYER = PgBouncerLayer(POSTGRES_LAYER, "transaction", "DoctorPgBouncerLayer")
STATEMENT_LAYER = PgBouncerLayer(POSTGRES_LAYER, "statement", "DoctorStatementLayer")
ROLE = "patient"


class DoctorTestCase(unittest.TestCase):
    def setUp(self):
        self.server = self.layer.server

    def examine(self, dsn, *arguments, is_bad=None):
        """The findings by check and severity."""
        status, output, errors = run_here("doctor", "--json", *arguments, dsn)
        self.assertEqual(errors, "")
        self.assertNotIn(self.server.password, output)
        told = json.loads(output)
        found = {}
        for each in told["findings"]:
            found.setdefault((each["check"], each["severity"]), []).append(each)
            needs_remedy = each["severity"] in ("error", "warning")
            self.assertTrue(each["reason"] and (each["remedy"] or not needs_remedy), each)
        self.assertNotIn("does not tell", output)
        bad = [key for key in found if key[1] in ("error", "warning")]
        self.assertEqual(status, 1 if bad else 0)
        self.assertEqual(told["status"], status)
        if is_bad is not None:
            self.assertEqual(bool(bad), is_bad, bad)
        return found

    def finding(self, found, check, severity):
        """The only finding of a check with a severity."""
        self.assertIn((check, severity), found, found)
        (finding,) = found[check, severity]
        return finding


class PostgresDoctorTestCase(DoctorTestCase):
    layer = LAYER
    scheme = "postgresql"

    def setUp(self):
        super().setUp()
        self.query("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        self.query("GRANT USAGE ON SCHEMA public TO PUBLIC")
        self.query(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{self.server.password}'")
        self.addCleanup(self.query, f"DROP OWNED BY {ROLE}; DROP ROLE {ROLE}")

    def query(self, statement, *parameters):
        return self.server.query(statement, *parameters)

    def dsn(self, options="", user=ROLE):
        dsn = self.server.dsn(user=user)
        return f"{self.scheme}:{dsn.partition(':')[2]}{options and '?'}{options}"

    def after(self, statement, undo):
        """What is found when a superuser has executed a statement."""
        self.query(statement)
        self.addCleanup(self.query, undo)
        return self.examine(self.dsn())

    def for_role(self, setting, value):
        return self.after(
            f"ALTER ROLE {ROLE} SET {setting} = {value}", f"ALTER ROLE {ROLE} RESET {setting}"
        )


class PostgresDoctorTests(PostgresDoctorTestCase):
    def test_all_is_well(self):
        found = self.examine(self.dsn())
        self.assertEqual({severity for _, severity in found}, {"ok", "note"})
        for check in ("hosts", "tls", "keepalive", "pooler", "writes", "fencing", "xid witness"):
            self.finding(found, check, "ok")
        self.finding(found, "monitoring", "note")
        self.finding(found, "idle_in_transaction_session_timeout", "note")

    def test_text(self):
        status, output, errors = run_here("doctor", self.dsn("keepalives=0"))
        self.assertEqual((status, errors), (1, ""))
        self.assertRegex(output, r"\Apostgresql://patient@\S+: PostgreSQL \d")
        self.assertIn("\nwarning: keepalive\n    While a statement", output)
        self.assertIn("    Remedy: Leave keepalives", output)
        self.assertRegex(output, r"\n1 warning, \d+ notes, \d+ ok\n\Z")
        self.assertNotIn(self.server.password, output)

    def test_a_driver_that_asks(self):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            status, output, _errors = run_here("doctor", f"postgresql://me@127.0.0.1:{port}/work")
        self.assertEqual(status, 1)
        self.assertRegex(output, r"TCP/IP\s+connections\?\n")

    def test_keepalives(self):
        for options in ("keepalives=0", "keepalives_idle=3600", "tcp_user_timeout=0"):
            with self.subTest(options):
                self.finding(self.examine(self.dsn(options)), "keepalive", "warning")

    def test_connect_timeout(self):
        for seconds, severity in ((1, "warning"), (60, "note"), (5, "ok")):
            found = self.examine(self.dsn(f"connect_timeout={seconds}"))
            self.finding(found, "connect_timeout", severity)

    def test_hosts(self):
        address = f"{self.server.host}:{self.server.port}"
        for second, target, severities in (
            (address, "", {"warning"}),
            (address, "read-write", {"ok"}),
            (f"{self.server.host}:1", "read-write", {"warning"}),
            (f"{self.server.host}:1", "prefer-standby", {"warning"}),
        ):
            dsn = self.dsn(target and f"target_session_attrs={target}")
            found = self.examine(dsn.replace(address, f"{address},{second}"))
            with self.subTest(second=second, target=target):
                self.assertEqual({each for check, each in found if check == "hosts"}, severities)
        ((_, finding),) = [item for item in found.items() if item[0] == ("hosts", "warning")]
        self.assertIn("Start the server", finding[0]["remedy"])

    def test_timeouts(self):
        name = "idle_in_transaction_session_timeout"
        self.finding(self.for_role(name, "'5s'"), name, "warning")
        self.finding(self.for_role(name, "'15min'"), name, "ok")
        for name in ("statement_timeout", "lock_timeout"):
            self.finding(self.for_role(name, "'1min'"), name, "note")
        self.finding(self.for_role("idle_session_timeout", "'1h'"), "idle_session_timeout", "ok")

    def test_default_read_only(self):
        found = self.for_role("default_transaction_read_only", "on")
        self.assertIn("is on", self.finding(found, "writes", "warning")["reason"])

    def test_role(self):
        self.finding(self.examine(self.dsn(user="postgres")), "role", "note")
        soon = self.query("SELECT (now() + interval '3 days')::text")[0][0]
        found = self.after(
            f"ALTER ROLE {ROLE} VALID UNTIL '{soon}'", f"ALTER ROLE {ROLE} VALID UNTIL 'infinity'"
        )
        self.assertIn("expires in 3 days", self.finding(found, "role", "warning")["reason"])

    def test_rights_for_fencing(self):
        function = "FUNCTION pg_terminate_backend(integer, bigint)"
        found = self.after(
            f"REVOKE EXECUTE ON {function} FROM PUBLIC", f"GRANT EXECUTE ON {function} TO PUBLIC"
        )
        self.assertIn("pg_terminate_backend", self.finding(found, "fencing", "warning")["remedy"])

    def test_what_the_witness_asks(self):
        function = "FUNCTION pg_control_system()"
        found = self.after(
            f"REVOKE EXECUTE ON {function} FROM PUBLIC", f"GRANT EXECUTE ON {function} TO PUBLIC"
        )
        finding = self.finding(found, "xid witness", "warning")
        self.assertIn("pg_control_system", finding["reason"])

    def test_ledger(self):
        self.assertIn(
            "may make none", self.finding(self.examine(self.dsn()), "ledger", "note")["reason"]
        )
        self.query("GRANT CREATE ON SCHEMA public TO PUBLIC")
        self.assertIn(
            "first needed", self.finding(self.examine(self.dsn()), "ledger", "note")["reason"]
        )
        run_here("ledger", self.dsn(user="postgres"))
        found = self.finding(self.examine(self.dsn()), "ledger", "ok")
        self.assertIn("belongs to postgres", found["reason"])
        self.query("REVOKE DELETE ON zreconnect_ledger FROM PUBLIC")
        found = self.finding(self.examine(self.dsn()), "ledger", "error")
        self.assertIn("may not use", found["reason"])
        self.query("CREATE UNLOGGED TABLE unlogged (id uuid)")
        found = self.examine(self.dsn(), "--table", "unlogged")
        self.assertIn("after a crash", self.finding(found, "ledger", "error")["reason"])

    def test_durability(self):
        found = self.for_role("synchronous_commit", "off")
        reasons = [each["reason"] for each in found["durability", "warning"]]
        self.assertIn("synchronous_commit is off", "".join(reasons))

    def test_a_synchronous_standby_that_is_not_there(self):
        self.query("ALTER SYSTEM SET synchronous_standby_names = 'other'")
        self.addCleanup(self.query, "SELECT pg_reload_conf()")
        self.addCleanup(self.query, "ALTER SYSTEM RESET synchronous_standby_names")
        self.query("SELECT pg_reload_conf()")
        finding = self.finding(self.examine(self.dsn()), "replication", "error")
        self.assertIn("no synchronous standby is connected", finding["reason"])

    def prepare(self, gid):
        with (
            closing(psycopg2.connect(self.server.dsn())) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("PREPARE TRANSACTION %s", (gid,))
        self.addCleanup(self.query, f"ROLLBACK PREPARED '{gid}'")

    def test_prepared_transactions(self):
        self.prepare("zreconnect:1")
        self.prepare("of_others")
        self.finding(self.examine(self.dsn()), "prepared transactions", "ok")
        with mock.patch.object(postgresqlchecks, "FORGOTTEN", 0.0):
            found = self.examine(self.dsn())["prepared transactions", "warning"]
        remedies = " ".join(sorted(each["remedy"] for each in found))
        self.assertIn("zreconnect recover", remedies)
        self.assertIn("ROLLBACK PREPARED or COMMIT PREPARED 'of_others'", remedies)

    def test_forgotten_transactions(self):
        with closing(psycopg2.connect(self.server.dsn(user=ROLE))) as forgotten:
            with forgotten.cursor() as cursor:
                cursor.execute("SELECT 1")
            with mock.patch.object(postgresqlchecks, "FORGOTTEN_IDLE", 0.0):
                found = self.examine(self.dsn())
            self.assertIn(
                str(forgotten.info.backend_pid),
                self.finding(found, "orphans", "warning")["remedy"],
            )

    def test_who_is_not_let_in(self):
        for dsn, remedy in (
            (self.server.dsn(user="nobody_here"), "Correct the user"),
            (self.server.dsn(dbname="nothing_here"), "Create the database"),
            (f"postgresql://{ROLE}@127.0.0.1:1/x", "Start the server"),
        ):
            found = self.examine(dsn, is_bad=True)
            self.assertEqual(list(found), [("connection", "error")])
            self.assertIn(remedy, self.finding(found, "connection", "error")["remedy"])

    def test_a_line_that_leaves_the_machine(self):
        with mock.patch.object(findings.Patient, "is_local", False):
            found = self.examine(self.dsn())
            self.assertIn("one host", self.finding(found, "hosts", "note")["reason"])
            finding = self.finding(found, "tls", "warning")
            self.assertIn("not encrypted", finding["reason"])
            self.assertIn("sslmode=verify-full", finding["remedy"])

    @needs_openssl
    def test_tls(self):
        certificate, key = make_certificate(self)
        terminator = Terminator(self, self.server, certificate, key)
        dsn = self.server.dsn(user=ROLE, host=terminator.host, port=terminator.port)
        with mock.patch.object(findings.Patient, "is_local", False):
            for mode, severity, told in (
                ("prefer", "note", "could be without TLS"),
                ("require", "note", "nobody looks with whom"),
                (f"verify-full&sslrootcert={certificate}", "ok", "known with whom"),
            ):
                with self.subTest(mode):
                    found = self.examine(f"{dsn}?sslmode={mode}")
                    self.assertIn(told, self.finding(found, "tls", severity)["reason"])
        found = self.examine(f"{dsn}?sslmode=verify-full&sslrootcert=/nothing/here")
        self.assertIn("certificate", self.finding(found, "connection", "error")["remedy"])

    def test_no_room(self):
        with mock.patch.object(linechecks, "NEARLY_ALL", 0.0):
            found = self.examine(self.dsn())
        self.finding(found, "connections", "warning")
        self.finding(found, "prepared transactions", "warning")

    def test_what_the_role_may_not_ask(self):
        self.query("REVOKE SELECT ON pg_prepared_xacts FROM PUBLIC")
        self.addCleanup(self.query, "GRANT SELECT ON pg_prepared_xacts TO PUBLIC")
        status, output, _errors = run_here("doctor", self.dsn())
        self.assertEqual(status, 0)
        self.assertIn("note: prepared\n    The server does not tell: permission denied", output)

    def test_a_connection_that_is_lost_meanwhile(self):
        def lose(patient):
            patient.query("SELECT pg_terminate_backend(pg_backend_pid())")

        with mock.patch.object(postgresqlchecks, "CHECKS", (lose,)):
            found = self.examine(self.dsn(), is_bad=True)
        self.assertIn("It was lost", self.finding(found, "connection", "error")["reason"])

    def test_bad_arguments(self):
        for arguments, complaint in (
            (("--table", "a; b", "dbname=x"), "argument --table"),
            (("mongodb://x",), "argument DSN"),
        ):
            status, _output, errors = run_here("doctor", *arguments)
            self.assertEqual(status, 2)
            self.assertIn(complaint, errors)


class StandbyDoctorTests(PostgresDoctorTestCase):
    # A standby must have the settings of the primary.
    layer = POSTGRES_LAYER

    def test_replicas(self):
        with EmbeddedStandby(self.server) as standby:
            found = self.examine(standby.dsn())
            self.assertIn("standby", self.finding(found, "writes", "warning")["reason"])
            wait_until(lambda: self.query(postgresqlchecks.REPLICAS))
            self.finding(self.examine(self.dsn()), "replication", "note")
            self.query("ALTER SYSTEM SET synchronous_standby_names = '*'")
            self.query("SELECT pg_reload_conf()")
            try:
                wait_until(lambda: self.query(postgresqlchecks.REPLICAS)[0][1] == "sync")
                self.finding(self.examine(self.dsn(user="postgres")), "replication", "ok")
                found = self.finding(self.examine(self.dsn()), "replication", "note")
                self.assertIn("may not see", found["reason"])
            finally:
                self.query("ALTER SYSTEM RESET synchronous_standby_names")
                self.query("SELECT pg_reload_conf()")


class PsycopgDoctorTests(PostgresDoctorTestCase):
    scheme = "postgresql+psycopg"

    test_all_is_well = PostgresDoctorTests.test_all_is_well
    test_keepalives = PostgresDoctorTests.test_keepalives
    test_hosts = PostgresDoctorTests.test_hosts
    test_what_the_witness_asks = PostgresDoctorTests.test_what_the_witness_asks
    test_forgotten_transactions = PostgresDoctorTests.test_forgotten_transactions


@on_pgbouncer(POOLER_LAYER)
class PoolerDoctorTests(DoctorTestCase):
    def test_it_is_seen(self):
        found = self.examine(self.server.dsn(), is_bad=False)
        self.assertIn("pooled=False", self.finding(found, "pooler", "note")["remedy"])
        self.finding(found, "xid witness", "ok")

    def test_options(self):
        settings = {"ignore_startup_parameters": "options,extra_float_digits"}
        layer = PgBouncerLayer(POSTGRES_LAYER, "session", "DoctorOptionsLayer", settings)
        layer.setUp()
        self.addCleanup(layer.tearDown)
        dsn = f"{layer.server.dsn()}?options={quote('-c search_path=work')}"
        found = self.examine(dsn)
        self.assertIn("ALTER ROLE", self.finding(found, "pooler", "warning")["remedy"])


@on_pgbouncer(STATEMENT_LAYER)
class StatementPoolerDoctorTests(DoctorTestCase):
    def test_it_takes_no_transactions(self):
        found = self.examine(self.server.dsn(), is_bad=True)
        self.assertIn("pool_mode", self.finding(found, "pooler", "error")["remedy"])


class MysqlDoctorTestCase(DoctorTestCase):
    scheme = "mysql+pymysql"

    def setUp(self):
        super().setUp()
        dsn = self.server.fresh_database()
        self.dbname = dsn.rpartition("/")[2]
        self.dsn = f"{self.scheme}:{dsn.partition(':')[2]}"

    def query(self, statement, *parameters):
        return self.server.query(statement, *parameters, dbname=self.dbname)

    def with_variable(self, name, value):
        ((before,),) = self.query(f"SELECT @@global.{name}")
        self.query(f"SET GLOBAL {name} = {value}")
        try:
            return self.examine(self.dsn)
        finally:
            self.query(f"SET GLOBAL {name} = {before}")


@on_mariadb()
class PymysqlDoctorTests(MysqlDoctorTestCase):
    def test_all_is_well(self):
        found = self.examine(self.dsn)
        found.pop(("durability", "warning"), None)
        self.assertEqual({severity for _, severity in found}, {"ok", "note"})
        for check in ("hosts", "tls", "keepalive", "writes", "fencing", "engines"):
            self.finding(found, check, "ok")
        self.assertIn("Ledger()", self.finding(found, "ledger", "note")["remedy"])

    def test_variables(self):
        for name, value, check in (
            ("read_only", "ON", "writes"),
            ("wait_timeout", 10, "wait_timeout"),
            ("idle_transaction_timeout", 10, "idle_transaction_timeout"),
            ("innodb_flush_log_at_trx_commit", 2, "durability"),
        ):
            with self.subTest(name):
                found = self.with_variable(name, value)
                self.assertIn((check, "warning"), found)

    def test_notes(self):
        self.finding(self.with_variable("max_statement_time", 5), "max_statement_time", "note")
        self.finding(self.with_variable("max_allowed_packet", 65536), "max_allowed_packet", "note")

    def test_ledger(self):
        run_here("ledger", self.dsn)
        self.finding(self.examine(self.dsn), "ledger", "ok")
        self.assertEqual(self.query("SELECT count(*) FROM zreconnect_ledger"), [(0,)])
        self.query("ALTER TABLE zreconnect_ledger ENGINE=MyISAM")
        self.assertIn("MyISAM", self.finding(self.examine(self.dsn), "ledger", "error")["reason"])
        self.assertEqual(self.query("SELECT count(*) FROM zreconnect_ledger"), [(0,)])

    def test_engines(self):
        self.query("CREATE TABLE old (id integer) ENGINE=MyISAM")
        found = self.finding(self.examine(self.dsn), "engines", "warning")
        self.assertIn("old", found["reason"])

    def test_prepared_transactions(self):
        self.query("CREATE TABLE work (id integer) ENGINE=InnoDB")
        with closing(self.server._connect(self.dbname, 10)) as connection:
            cursor = connection.cursor()
            for statement in (
                "XA START 'left'",
                "INSERT INTO work VALUES (1)",
                "XA END 'left'",
                "XA PREPARE 'left'",
            ):
                cursor.execute(statement)
            self.finding(self.examine(self.dsn), "prepared transactions", "warning")
            cursor.execute("XA ROLLBACK 'left'")
        self.finding(self.examine(self.dsn), "prepared transactions", "ok")

    def test_who_is_not_let_in(self):
        found = self.examine(f"{self.dsn}_missing", is_bad=True)
        self.assertIn("Create the database", self.finding(found, "connection", "error")["remedy"])
        wrong = self.dsn.replace(self.server.password, "secret")
        found = self.examine(wrong, is_bad=True)
        self.assertIn("Correct the user", self.finding(found, "connection", "error")["remedy"])


@needs_mysqlclient
@on_mariadb()
class MysqlclientDoctorTests(MysqlDoctorTestCase):
    scheme = "mysql+mysqldb"

    test_all_is_well = PymysqlDoctorTests.test_all_is_well
    test_ledger = PymysqlDoctorTests.test_ledger
    test_who_is_not_let_in = PymysqlDoctorTests.test_who_is_not_let_in


class FileDoctorTests(unittest.TestCase):
    def test_sqlite(self):
        status, output, _errors = run_here("doctor", "sqlite:///:memory:")
        self.assertEqual(status, 0)
        self.assertIn("It can be used", output)
