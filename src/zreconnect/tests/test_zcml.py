"""The ZCML of zreconnect: the directive ``<zreconnect:adapter>``, and the exception view."""

import os
import sys
import unittest
from unittest import mock

import transaction
import zope.testing.cleanup
from zope.component import getUtility, queryMultiAdapter, queryUtility
from zope.configuration import xmlconfig
from zope.configuration.config import ConfigurationConflictError
from zope.configuration.exceptions import ConfigurationError
from zope.publisher.browser import TestRequest
from zope.publisher.defaultview import queryDefaultViewName
from zope.publisher.http import HTTPRequest

from zreconnect import (
    CommitOutcomeUnknown,
    DisconnectionError,
    ReconnectingDatabaseAdapter,
    ReconnectTimeout,
)
from zreconnect.adapter import RESPONSE_TIMEOUT
from zreconnect.integrations.wsgi import EXPLANATION
from zreconnect.interfaces import IZopeDatabaseAdapter
from zreconnect.tests.base import DatabaseTestCase, wait_until, with_time_to_connect

SECRET = "postgresql://user:secret@127.0.0.1:1/base"
SITE = """\
<configure xmlns="http://namespaces.zope.org/zope"
           xmlns:zreconnect="http://namespaces.zope.org/zreconnect">
  <include package="zreconnect" />
  {}
</configure>
"""


def configure(*directives):
    xmlconfig.string(SITE.format("\n  ".join(directives)))


def adapter(**attributes):
    text = " ".join(f'{name}="{value}"' for name, value in attributes.items())
    return f"<zreconnect:adapter {text} />"


def database(name=""):
    return getUtility(IZopeDatabaseAdapter, name)


class ZCMLTestCase(unittest.TestCase):
    def setUp(self):
        super().setUp()
        zope.testing.cleanup.cleanUp()
        self.addCleanup(zope.testing.cleanup.cleanUp)


class DirectiveTests(ZCMLTestCase):
    """What can be found out without a server."""

    def assert_refused(self, message, **attributes):
        """The directive is an error at its line that does not show the DSN."""
        with self.assertRaises(ConfigurationError) as caught:
            configure(adapter(**{"dsn": SECRET, **attributes}))
        self.assertIn(message, str(caught.exception))
        self.assertIn('File "<string>", line 4.2', str(caught.exception))
        error = caught.exception
        while error is not None:
            self.assertNotIn("secret", str(error))
            error = error.__cause__ or error.__context__
        self.assertIsNone(queryUtility(IZopeDatabaseAdapter))

    def test_named_utilities(self):
        configure(
            adapter(name="main", dsn=SECRET), adapter(name="other", dsn="dbi://user:secret/other")
        )
        self.assertIsInstance(database("main"), ReconnectingDatabaseAdapter)
        self.assertEqual(database("main").getDSN(), SECRET)
        self.assertEqual(database("other").getDSN(), "dbi://user:secret/other")
        self.assertIsNone(queryUtility(IZopeDatabaseAdapter))

    def test_two_phases(self):
        for value, expected in (("yes", True), ("no", False)):
            with self.subTest(value):
                configure(adapter(name=value, dsn=SECRET, two_phase=value))
                options = database(value)().work.link.options
                self.assertIs(options.two_phase, expected)

    def test_pooled(self):
        for value, expected in (({"pooled": "yes"}, True), ({"pooled": "no"}, False), ({}, None)):
            with self.subTest(value):
                configure(adapter(name=str(expected), dsn=SECRET, **value))
                options = database(str(expected))().work.link.options
                self.assertIs(options.pooled, expected)

    def test_two_phases_that_are_no_truth_value(self):
        self.assert_refused("two_phase", two_phase="perhaps")

    def test_without_name(self):
        configure(adapter(dsn=SECRET))
        self.assertEqual(database().getDSN(), SECRET)

    def test_one_name_twice(self):
        with self.assertRaises(ConfigurationConflictError) as caught:
            configure(adapter(name="main", dsn=SECRET), adapter(name="main", dsn="dbi://x"))
        self.assertNotIn("secret", str(caught.exception))

    def test_plain_registration(self):
        with mock.patch.object(
            sys.modules[__name__], "for_zcml", ReconnectingDatabaseAdapter(SECRET), create=True
        ):
            configure(
                f'<utility name="main" component="{__name__}.for_zcml"'
                ' provides="zreconnect.interfaces.IZopeDatabaseAdapter" />'
            )
        self.assertEqual(database("main").getDSN(), SECRET)

    @mock.patch.dict(os.environ, {"THE_DATABASE": SECRET})
    def test_dsn_from_the_environment(self):
        configure(adapter(dsn="$THE_DATABASE"))
        self.assertEqual(database().getDSN(), SECRET)

    def test_missing_variable(self):
        for name in ("dsn", "timeout", "response_timeout"):
            with self.subTest(name):
                self.assert_refused(
                    f"{name} names the environment variable NO_SUCH_VARIABLE, which does not exist",
                    **{name: "$NO_SUCH_VARIABLE"},
                )

    def test_no_variable_name(self):
        for value in ("${DATABASE_URL}", "$", "$secret:5432/base", "$1", "$A B"):
            with self.subTest(value):
                self.assert_refused(
                    "dsn begins with $, so it must be the name of an environment variable and "
                    'nothing else, as in dsn="$DATABASE_DSN"',
                    dsn=value,
                )

    @mock.patch.dict(os.environ, {"THE_DATABASE": "oracle://user:secret@host/base"})
    def test_bad_dsn(self):
        self.assert_refused("dsn has the unknown scheme 'oracle'", dsn="$THE_DATABASE")
        self.assert_refused("dsn is empty", dsn="")
        with self.assertRaisesRegex(ConfigurationError, "Missing parameter: 'dsn'"):
            configure("<zreconnect:adapter />")

    def test_bad_timeout(self):
        self.assert_refused("timeout must be a number of seconds, not 'soon'", timeout="soon")
        for value in ("-1", "inf", "nan"):
            with self.subTest(value):
                self.assert_refused("timeout must be a finite number of at least 0", timeout=value)

    def test_bad_response_timeout(self):
        self.assert_refused(
            "response_timeout must be a number of seconds, not 'None'", response_timeout="None"
        )
        self.assert_refused("response_timeout must be a finite number", response_timeout="-1")

    def test_bad_witness(self):
        for value in ("", "xids", "ledger:", "none:"):
            with self.subTest(value):
                self.assert_refused(
                    f"witness must be xid, ledger, ledger:TABLE or none, not {value!r}",
                    witness=value,
                )
        self.assert_refused("table must be a name or schema.name", witness="ledger:a b")

    def test_unknown_attribute(self):
        with self.assertRaises(ConfigurationError):
            configure(adapter(dsn=SECRET, patience="5"))


@with_time_to_connect
class AdapterTests(ZCMLTestCase, DatabaseTestCase):
    """What the attributes do."""

    def test_registered_adapter_works(self):
        configure(adapter(name="main", dsn=self.dsn))
        cursor = database("main")().cursor()
        cursor.execute("SELECT 1")
        self.assertEqual(cursor.fetchall(), [[1]])

    @mock.patch.dict(os.environ, {"EMPTY": ""})
    def test_timeout(self):
        self.forward.refuse()
        for timeout, error in (
            ({}, DisconnectionError),
            ({"timeout": ""}, DisconnectionError),
            ({"timeout": "$EMPTY"}, DisconnectionError),
            ({"timeout": "0"}, ReconnectTimeout),
            ({"timeout": "0.1"}, ReconnectTimeout),
        ):
            with self.subTest(timeout):
                zope.testing.cleanup.cleanUp()
                configure(adapter(dsn=self.dsn, **timeout))
                with self.assertRaises(error):
                    database()().cursor().execute("SELECT 1")
                transaction.abort()

    @mock.patch.dict(os.environ, {"SECONDS": "0.1", "EMPTY": ""})
    def test_response_timeout(self):
        for response_timeout, seconds in (
            ({}, RESPONSE_TIMEOUT),
            ({"response_timeout": "$EMPTY"}, RESPONSE_TIMEOUT),
            ({"response_timeout": "none"}, None),
            ({"response_timeout": "600"}, 600),
        ):
            with self.subTest(response_timeout):
                zope.testing.cleanup.cleanUp()
                configure(adapter(dsn=self.dsn, **response_timeout))
                self.assertEqual(database()().work.link.options.response_timeout, seconds)
        zope.testing.cleanup.cleanUp()
        configure(adapter(dsn=self.dsn, response_timeout="$SECONDS"))
        with self.assertRaises(DisconnectionError):
            database()().cursor().execute("SELECT pg_sleep(60)")
        transaction.abort()

    def tables(self):
        return [
            name
            for (name,) in self.query(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename"
            )
        ]

    def test_witness(self):
        for witness, tables in (
            ({}, []),
            ({"witness": "xid"}, []),
            ({"witness": "ledger"}, ["zreconnect_ledger"]),
            ({"witness": "ledger:book"}, ["book"]),
        ):
            with self.subTest(witness):
                zope.testing.cleanup.cleanUp()
                for table in self.tables():
                    self.query(f"DROP TABLE {table}")
                self.lose_answer_to_commit(witness)
                self.assertEqual(self.names(), ["answered", "lost"])
                self.assertEqual(self.tables(), sorted(["item", *tables]))

    def test_without_witness(self):
        with self.assertRaises(CommitOutcomeUnknown):
            self.lose_answer_to_commit({"witness": "none"})
        transaction.abort()
        wait_until(lambda: self.names() == ["answered", "lost"])

    def lose_answer_to_commit(self, witness):
        """Commit an item, and another one whose COMMIT is not answered to the last byte."""
        self.make_table()
        configure(adapter(dsn=self.dsn, timeout="30", **witness))
        database()().cursor().execute("INSERT INTO item VALUES ('answered')")
        before = self.forward.count()
        transaction.commit()
        answer = (self.forward.count() - before).bytes_to_client
        database()().cursor().execute("INSERT INTO item VALUES ('lost')")
        self.forward.cut("to_client", answer - 1)
        transaction.commit()


class ExceptionViewTests(ZCMLTestCase, DatabaseTestCase):
    def setUp(self):
        super().setUp()
        configure()

    def view(self, error, request):
        self.assertEqual(queryDefaultViewName(error, request), "index.html")
        return queryMultiAdapter((error, request), name="index.html")

    def errors(self):
        """One of each kind."""
        self.forward.refuse()
        for timeout in (None, 0):
            try:
                ReconnectingDatabaseAdapter(self.dsn, timeout)().cursor().execute("SELECT 1")
            except (DisconnectionError, ReconnectTimeout) as error:
                yield error
                if isinstance(error, DisconnectionError):
                    yield error.getOriginalException()[1]
            transaction.abort()

    def test_service_unavailable(self):
        for error in self.errors():
            with self.subTest(type(error)):
                request = TestRequest()
                self.assertEqual(self.view(error, request)(), EXPLANATION)
                response = request.response
                self.assertEqual(response.getStatusString(), "503 Service Unavailable")
                self.assertEqual(response.getHeader("Retry-After"), "5")
                self.assertEqual(response.getHeader("Content-Type"), "text/plain; charset=utf-8")

    def test_head(self):
        request = HTTPRequest(None, {"REQUEST_METHOD": "HEAD"})
        error = next(self.errors())
        self.assertEqual(self.view(error, request)(), b"")
        self.assertEqual(request.response.getStatus(), 503)

    def test_other_errors_have_none(self):
        for error in (CommitOutcomeUnknown("server"), ValueError()):
            with self.subTest(error):
                self.assertIsNone(queryMultiAdapter((error, TestRequest()), name="index.html"))
                self.assertIsNone(queryDefaultViewName(error, TestRequest()))
