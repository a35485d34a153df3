"""Z SQL Methods, with a connection object that reconnects in the place of Products.ZPsycopgDA's."""

import base64
import datetime
import shutil
import unittest
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock
from urllib.parse import urlencode

import transaction
from Acquisition import aq_base
from DateTime import DateTime
from OFS.Folder import Folder
from Products.ZSQLMethods.SQL import SQL
from zExceptions import BadRequest

from zreconnect import DisconnectionError
from zreconnect.integrations.zsql.columns import zope_time
from zreconnect.integrations.zsql.connection import (
    ReconnectingSQLConnection,
    manage_addZReconnectConnection,
    replace_connection,
)
from zreconnect.integrations.zsql.database import Settings
from zreconnect.tests.base import (
    DatabaseTestCase,
    LineTestCase,
    needs_mysqlclient,
    on_mariadb,
)
from zreconnect.tests.web import STACKS, Stack, WebTestCase

# What has been a way out of quotes, somewhere.
NASTY = ["O'Hara", "\\", "\\'", "'; DROP TABLE guest; --", "\\'; --", "100 %", "%s", 'a "b"', "é€"]


class MethodTests:
    """A mixin for each database.

    driver_dsn: a DSN that asks for the driver.
    """

    def setUp(self):
        super().setUp()
        self.addCleanup(transaction.abort)
        self.folder = Folder("folder")
        self.add(zdatetime=1)
        self.query("CREATE TABLE IF NOT EXISTS guest (name varchar(40), age integer)")

    def add(self, id="database", **keywords):
        manage_addZReconnectConnection(self.folder, id, "", self.driver_dsn, **keywords)
        database = self.folder[id]
        self.addCleanup(database.manage_close_connection)
        return database

    def method(self, template, arguments="", connection="database"):
        self.folder._setOb("method", SQL("method", "", connection, arguments, template))
        return self.folder.method

    def guests(self):
        return [name for (name,) in self.query("SELECT name FROM guest ORDER BY name")]

    def test_rows_and_columns(self):
        insert = self.method(
            "INSERT INTO guest VALUES (<dtml-sqlvar name type=string>, <dtml-sqlvar age type=int>)"
            "<dtml-var sql_delimiter>SELECT name, age FROM guest",
            "name age",
        )
        (row,) = insert(name="Ada", age=36)
        self.assertEqual((row.name, row.AGE), ("Ada", 36))
        self.assertEqual(self.guests(), [])
        transaction.commit()
        self.assertEqual(self.guests(), ["Ada"])
        self.assertEqual(self.method("DELETE FROM guest")().tuples(), [])

    def test_quoting(self):
        insert = self.method("INSERT INTO guest (name) VALUES (<dtml-sqlvar name type=nb>)", "name")
        find = SQL(
            "", "", "database", "name", "SELECT name FROM guest WHERE <dtml-sqltest name type=nb>"
        )
        for modes in self.modes_of_quoting:
            for nasty in NASTY:
                with self.subTest(modes, nasty=nasty):
                    self.folder.database().query(modes)
                    insert(name=nasty)
                    self.assertEqual(find.__of__(self.folder)(name=nasty).tuples(), [(nasty,)])
                    insert(name=nasty.encode())
                    self.assertEqual(len(find.__of__(self.folder)(name=nasty)), 2)
                    transaction.abort()

    def test_a_loss_in_a_request(self):
        insert = self.method("INSERT INTO guest (name) VALUES ('Ada')")
        insert()
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            insert()
        with self.assertRaises(DisconnectionError):
            transaction.commit()
        transaction.abort()
        insert()
        transaction.commit()
        self.assertEqual(self.guests(), ["Ada"])

    def test_isolation_level(self):
        for level, name in ((1, "READ COMMITTED"), (2, "REPEATABLE READ"), ("3", "SERIALIZABLE")):
            with self.subTest(name):
                database = self.add(f"level_{level}", tilevel=level)
                (((found,),)) = database().query(self.show_level)[1]
                self.assertEqual(found.upper().replace("-", " "), name)
                transaction.abort()


class OtherMethodTests:
    """A mixin for one driver of each database."""

    def test_most_rows(self):
        self.query("INSERT INTO guest VALUES ('a', 1), ('b', 2), ('c', 3)")
        method = self.method("SELECT name FROM guest ORDER BY name")
        method.max_rows_ = 2
        self.assertEqual(method().tuples(), [("a",), ("b",)])
        database = self.folder.database()
        self.assertEqual(len(database.query("SELECT name FROM guest")[1]), 3)
        rows = database.query("SELECT name FROM guest WHERE age > %s", query_data=(2,))[1]
        self.assertEqual(rows, [("c",)])

    def test_statements_with_different_columns(self):
        method = self.method("SELECT 1 AS a<dtml-var sql_delimiter>SELECT 2 AS b")
        with self.assertRaisesRegex(Exception, "two statements whose rows have different columns"):
            method()

    def test_tables_and_columns(self):
        self.query("CREATE OR REPLACE VIEW grown_up AS SELECT name FROM guest WHERE age > 20")
        database = self.folder.database()
        tables = {each["table_name"]: each["table_type"] for each in database.tables()}
        self.assertEqual(tables, {"guest": "TABLE", "grown_up": "VIEW"})
        names = [(each["name"], each["null"]) for each in database.columns("guest")]
        self.assertEqual(names, [("name", True), ("age", True)])
        self.assertEqual(database.columns("none"), [])

    def test_a_loss_between_requests(self):
        count = self.method("SELECT count(*) AS n FROM guest")
        self.assertEqual(count()[0].n, 0)
        transaction.commit()
        self.forward.drop()
        self.assertEqual(count()[0].n, 0)

    def test_a_copy_that_zope_forgets_has_the_same_transaction(self):
        self.method("INSERT INTO guest (name) VALUES ('Ada')")()
        state = aq_base(self.folder.database).__getstate__()
        copy = ReconnectingSQLConnection.__new__(ReconnectingSQLConnection)
        copy.__setstate__(state)
        self.assertIs(copy(), self.folder.database())
        self.assertEqual(copy().query("SELECT name FROM guest")[1], [("Ada",)])


class PostgresqlMethodTests(MethodTests):
    modes_of_quoting = (
        "SET standard_conforming_strings = on",
        "SET standard_conforming_strings = off",
    )
    show_level = "SHOW transaction_isolation"

    types = (
        "SELECT 1::int2 AS a, 2::int8 AS b, 1.5::numeric AS c, 1.5::float8 AS d, true AS e,"
        " 'x'::text AS f, 7::oid AS g, '2024-01-02'::date AS h,"
        " '2024-01-02 03:04:05.5'::timestamp AS i, '2024-01-02 03:04:05+02'::timestamptz AS j,"
        " '03:04:05'::time AS k, NULL::date AS l, 'infinity'::timestamp AS m"
    )

    def test_types_with_zopes_dates(self):
        database = self.folder.database()
        database.query("SET TIME ZONE 'UTC'")
        items, (row,) = database.query(self.types)
        self.assertEqual("".join(item["type"] for item in items), "nnnnnsidddddd")
        self.assertEqual([item["name"] for item in items], list("abcdefghijklm"))
        self.assertEqual(row[:7], (1, 2, Decimal("1.5"), 1.5, True, "x", 7))
        self.assertEqual(row[7], DateTime("2024-01-02"))
        self.assertEqual(row[8], DateTime("2024-01-02 03:04:05.5"))
        self.assertEqual(row[9], DateTime("2024-01-02 01:04:05+00"))
        self.assertEqual(row[10], zope_time("03:04:05"))
        self.assertEqual(row[11:], (None, "infinity"))

    def test_types_with_pythons_dates(self):
        database = self.add("plain")()
        _, (row,) = database.query("SELECT '2024-01-02'::date, '03:04:05'::time")
        self.assertEqual(row, (datetime.date(2024, 1, 2), datetime.time(3, 4, 5)))

    def test_owners(self):
        (table,) = self.folder.database().tables()
        self.assertEqual(table["owner"], "postgres")

    def test_encoding(self):
        database = self.add("latin", encoding="LATIN1")()
        self.assertEqual(database.query("SHOW client_encoding")[1], [("LATIN1",)])


class Psycopg2MethodTests(OtherMethodTests, PostgresqlMethodTests, DatabaseTestCase):
    @property
    def driver_dsn(self):
        return self.dsn


class PsycopgMethodTests(PostgresqlMethodTests, DatabaseTestCase):
    @property
    def driver_dsn(self):
        return self.dsn.replace("postgresql:", "postgresql+psycopg:")


class MysqlMethodTests(MethodTests):
    modes_of_quoting = (
        "SET SESSION sql_mode = ''",
        "SET SESSION sql_mode = 'NO_BACKSLASH_ESCAPES'",
    )
    show_level = "SELECT @@session.tx_isolation"

    def setUp(self):
        self.server, self.forward = self.layer.server, self.layer.forward
        self.server.query("CREATE DATABASE IF NOT EXISTS zsql")
        super().setUp()
        self.query("DELETE FROM guest")

    @property
    def driver_dsn(self):
        return self.layer.dsn(dbname="zsql").replace("mysql:", f"mysql+{self.scheme}:")

    def query(self, statement):
        return self.server.query(statement, dbname="zsql")

    def test_types(self):
        select = (
            "SELECT CAST(1 AS SIGNED) AS a, 1.5 AS b, 1.5e0 AS c, 'x' AS d,"
            " CAST('2024-01-02' AS DATE) AS e, CAST('2024-01-02 03:04:05' AS DATETIME) AS f,"
            " CAST(NULL AS DATE) AS g, age AS h FROM guest"
        )
        self.query("INSERT INTO guest VALUES ('Ada', 36)")
        items, (row,) = self.folder.database().query(select)
        letters = "".join(item["type"] for item in items)
        self.assertIn(letters[0], "il")
        self.assertEqual(letters[1:], "nntdddi")
        dates = (DateTime("2024-01-02"), DateTime("2024-01-02 03:04:05"))
        self.assertEqual(row, (1, Decimal("1.5"), 1.5, "x", *dates, None, 36))
        _, (row,) = self.add("plain")().query(select)
        self.assertEqual(row[4], datetime.date(2024, 1, 2))
        _, rows = self.folder.database().query("SELECT age FROM guest")
        self.assertEqual(rows, [(36,)])


@on_mariadb()
class PymysqlMethodTests(OtherMethodTests, MysqlMethodTests, LineTestCase):
    scheme = "pymysql"


@on_mariadb()
@needs_mysqlclient
class MysqlclientMethodTests(MysqlMethodTests, LineTestCase):
    scheme = "mysqldb"


class ObjectTests(unittest.TestCase):
    """What needs no server."""

    dsn = "postgresql://zope:secret@localhost:1/zope"

    def add(self, dsn=dsn, **keywords):
        folder = Folder("folder")
        manage_addZReconnectConnection(folder, "database", "Title", dsn, **keywords)
        return folder.database

    def test_what_makes_no_sense(self):
        for keywords, message in (
            ({"tilevel": 7}, "tilevel 7 is unknown; known are 1: READ COMMITTED"),
            ({"tilevel": "high"}, "invalid literal"),
            ({"dsn": "sqlite:///file"}, "need PostgreSQL or MySQL"),
            ({"dsn": "postgresql://host:port/"}, ""),
            ({"timeout": "-1"}, "timeout must be"),
            ({"timeout": "soon"}, "could not convert"),
        ):
            with self.subTest(keywords), self.assertRaisesRegex(BadRequest, message) as raised:
                self.add(**keywords)
            self.assertNotIn("secret", str(raised.exception))
        self.assertNotIn("secret", repr(Settings(self.dsn, True, 2, "", None)))

    def test_editing(self):
        database = self.add(timeout="5")
        first = database()
        self.assertEqual(database.timeout, 5.0)
        with self.assertRaises(BadRequest):
            database.manage_edit("Other", self.dsn, tilevel=7)
        self.assertEqual((database.title, database.tilevel), ("Title", 2))
        database.manage_edit("Other", self.dsn, 1, tilevel="1", timeout="")
        other_copy = ReconnectingSQLConnection.__new__(ReconnectingSQLConnection)
        other_copy.__setstate__(aq_base(database).__getstate__())
        settings = (database.title, database.zdatetime, database.tilevel, database.timeout)
        self.assertEqual(settings, ("Other", 1, 1, None))
        self.assertIsNot(database(), first)
        second = database()
        database.manage_edit("Another", self.dsn, 1, tilevel=1)
        self.assertIs(database(), second)
        for copy in (database, other_copy):
            copy.manage_edit("Another", self.dsn, 1, tilevel=3)
        self.assertIs(database(), other_copy())

    def test_a_connection_string_in_the_environment(self):
        with mock.patch.dict("os.environ", {"SHOP_DSN": self.dsn}):
            database = self.add("ENV:SHOP_DSN")
            with self.assertRaisesRegex(DisconnectionError, "zope@localhost:1/zope"):
                database().open()
            self.assertEqual(database.sql_quote__("it's"), "'it''s'")
        with self.assertRaisesRegex(BadRequest, "the environment variable SHOP_DSN, .* not set"):
            self.add("ENV:SHOP_DSN", tilevel=1)

    def test_connecting_at_once(self):
        with self.assertRaises(DisconnectionError):
            self.add(check=1)
        database = self.add()
        self.assertTrue(database.connected())
        database.manage_open_connection()
        self.assertFalse(database.connected())
        self.assertIn("not connected", database.title_and_id())

    def test_in_the_place_of_another_product(self):
        class Connection(ReconnectingSQLConnection):
            """As ZPsycopgDA's, which knows no timeout."""

        folder = Folder("folder")
        old = Connection("database", "Title", self.dsn, 1, tilevel=3, encoding="UTF-8")
        del old.timeout
        old.__ac_local_roles__ = {"ada": ["Manager"]}
        folder._setObject("database", old)
        new = replace_connection(folder, "database", timeout=5.0)
        self.assertIs(type(new.aq_base), ReconnectingSQLConnection)
        self.assertIs(folder.database.aq_base, new.aq_base)
        self.assertEqual(
            (new.title, new.connection_string, new.zdatetime, new.tilevel, new.encoding),
            ("Title", self.dsn, 1, 3, "UTF-8"),
        )
        self.assertEqual((new.timeout, new.__ac_local_roles__), (5.0, {"ada": ["Manager"]}))
        self.assertTrue(new.connected())
        with self.assertRaises(KeyError):
            replace_connection(folder, "none")
        folder._setObject("other", Folder("other"))
        with self.assertRaisesRegex(BadRequest, "other is no database connection"):
            replace_connection(folder, "other")


class ZopeTests(WebTestCase):
    """In a Zope of its own, by its management screens."""

    def start_zope(self, timeout):
        directory = TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        command, example = STACKS["zope"]
        copy = Path(directory.name, "copy")
        shutil.copytree(example, copy)
        (copy / "inituser").write_text("admin:secret\n")
        site = copy / "etc" / "site.zcml"
        include = '<include package="zreconnect.integrations.zsql" />\n</configure>'
        site.write_text(site.read_text().replace("</configure>", include))
        zope = self.start(Stack(command, copy))
        self.zope = zope
        form = self.manage(
            "GET",
            "/manage_addProduct/zreconnect.integrations.zsql/manage_addZReconnectConnectionForm",
        )
        self.assertIn('name="connection_string"', form)
        self.manage(
            "POST",
            "/manage_addProduct/zreconnect.integrations.zsql/manage_addZReconnectConnection",
            id="database",
            title="",
            connection_string=self.dsn,
            zdatetime="1",
            tilevel="2",
            encoding="",
            timeout=str(timeout),
        )
        for id, arguments, template in (
            ("enter", "name", "INSERT INTO guest VALUES (<dtml-sqlvar name type=nb>)"),
            ("count", "", "SELECT count(*) AS number FROM guest"),
        ):
            self.manage(
                "POST",
                "/manage_addProduct/ZSQLMethods/manage_addZSQLMethod",
                id=id,
                title="",
                connection_id="database",
                arguments=arguments,
                template=template,
            )
        self.manage(
            "POST",
            "/manage_addDTMLMethod",
            id="number",
            file="<dtml-in count><dtml-var number></dtml-in>",
        )
        self.manage("POST", "/manage_addDTMLMethod", id="welcome", file="<dtml-call enter>Welcome")

    def manage(self, method, path, **fields):
        password = base64.b64encode(b"admin:secret").decode()
        headers = {
            "Authorization": f"Basic {password}",
            "Content-Type": "application/x-www-form-urlencoded",
        }
        response = self.zope.request(method, path, urlencode(fields) or None, headers)
        self.assertIn(response.status, (200, 302), response.body)
        return response.body

    def get(self, path):
        response = self.zope.get(path)
        return response.status, response.body.strip()

    def test_methods_through_a_restart_and_the_management_screens(self):
        self.start_zope(timeout=0.5)
        self.assertEqual(self.get("/welcome?name=Ada"), (200, "Welcome"))
        self.server.restart()
        self.assertEqual(self.get("/welcome?name=Grace"), (200, "Welcome"))
        self.assertEqual(self.get("/number"), (200, "2"))
        self.assertEqual(self.guests(), ["Ada", "Grace"])
        self.assertIn('value="0.5"', self.manage("GET", "/database/manage_properties"))
        self.assertIn("open", self.manage("GET", "/database/manage_main"))
        tested = self.manage("POST", "/database/manage_test", query="SELECT 'tested' AS a")
        self.assertIn("tested", tested)
        self.forward.refuse()
        self.forward.drop()
        self.assertEqual(self.get("/number")[0], 503)
        self.manage("POST", "/database/manage_close_connection")
        said = self.manage("POST", "/database/manage_open_connection")
        self.assertIn("No connection to postgresql://", said)
        self.assertNotIn(self.server.password, said)
        self.forward.accept()
        self.assertEqual(self.get("/number"), (200, "2"))
        self.manage(
            "POST", "/database/manage_edit", title="New", connection_string=self.dsn, check="1"
        )
        said = self.manage("GET", "/database/manage_properties")
        self.assertIn('value="New"', said)
        self.assertNotIn("checked", said)
        self.assertEqual(self.get("/number"), (200, "2"))
