"""Web requests under Pyramid, with pyramid_tm and pyramid_retry."""

import contextlib
import sys
from pathlib import Path
from unittest import mock

from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationConflictError
from pyramid.request import Request

from zreconnect import DisconnectionError
from zreconnect.tests.stack_tests import StackTests
from zreconnect.tests.web import STACKS, Stack, WebTestCase

EXPLICIT_MANAGER = "tm.manager_hook = pyramid_tm.explicit_manager\n"
ATTEMPTS = "retry.attempts = 3\n"
COMMAND, DIRECTORY = STACKS["pyramid"]
EXAMPLE = (DIRECTORY / "guestbook.ini").read_text()


class PyramidTests(StackTests, WebTestCase):
    """Each request has a transaction manager of its own."""

    stack = "pyramid"
    attempts = 3

    settings = EXPLICIT_MANAGER

    def with_views(self, settings=""):
        includes = "pyramid.includes = pyramid_retry zreconnect.tests.pyramid_views\n"
        return self.configured(self.settings + includes + settings)

    def configured(self, settings):
        """The example with these settings in place of its transaction manager's."""
        for setting in (EXPLICIT_MANAGER, ATTEMPTS):
            self.assertIn(setting, EXAMPLE)
        ini = Path(self.temporary_directory(), "changed.ini")
        example = EXAMPLE.replace(ATTEMPTS, "") if "retry.attempts" in settings else EXAMPLE
        ini.write_text(example.replace(EXPLICIT_MANAGER, settings + "\n"))
        return Stack(COMMAND.replace("guestbook.ini", str(ini)), DIRECTORY)

    def test_application_without_pyramid_retry(self):
        config = Configurator()
        with mock.patch.dict(sys.modules, {"pyramid_retry": None}):
            config.include("zreconnect.integrations.pyramid")
        config.commit()

    def test_own_page_of_a_function_that_is_included(self):
        def ours(config):
            config.include("zreconnect.integrations.pyramid")

        def ours_at_once(config):
            ours(config)
            config.commit()

        def page(config):
            config.add_exception_view(lambda: None, context=DisconnectionError)

        def both(config):
            page(config)
            ours(config)

        for included, conflict in (
            ([both], False),
            ([ours, page], True),
            ([ours_at_once, page], False),
            ([page, ours_at_once], True),
        ):
            with self.subTest(included):
                config = Configurator()
                with contextlib.ExitStack() as stack:
                    if conflict:
                        stack.enter_context(self.assertRaises(ConfigurationConflictError))
                    for function in included:
                        config.include(function)
                    config.commit()

    def test_body_that_an_attempt_has_replaced(self):
        bodies = []

        def view(request):
            bodies.append(request.body)
            request.body = b"replaced"
            if len(bodies) < 3:
                raise DisconnectionError("lost")
            return request.response

        config = Configurator()
        for package in "pyramid_tm", "pyramid_retry", "zreconnect.integrations.pyramid":
            config.include(package)
        config.add_route("body", "/")
        config.add_view(view, route_name="body")
        request = Request.blank("/", method="POST", body=b"the whole body")
        self.assertEqual(request.get_response(config.make_wsgi_app()).status_code, 200)
        self.assertEqual(bodies, [b"the whole body"] * 3)

    def test_head_while_the_server_is_down(self):
        self.check_head()

    def test_error_swallowed_with_a_savepoint_that_failed(self):
        """`transaction` refuses to commit then, with an error that is none of ours."""
        example = self.start_views()
        self.assertEqual(example.get("/SwallowsInSavepoint")[::2], (500, "Sorry"))
        self.assertEqual(example.get("/Shown").body, "Counter({'TransactionFailedError': 1})")
        self.assertEqual(self.guests(), [])
        self.assert_serves(example)

    def test_the_view_for_all_errors_sees_none_of_ours(self):
        example = self.start_views()
        self.assertEqual(example.get("/LosesOnce").status, 200)
        self.query("DELETE FROM guest")
        self.assert_unavailable(example.get("/LosesAlways"))
        self.assertEqual(example.get("/Shown").body, "Counter()")

    def test_own_page(self):
        example = self.start_views(timeout=5, settings="own_page = yes")
        self.assertEqual(example.get("/LosesAlways")[::2], (503, "Closed at the moment"))
        self.assertEqual(example.get("/Attempts").body, str(self.attempts))
        # Once, not after each attempt.
        self.assertRegex(example.get("/Shown").body, "^Counter.{'.*DisconnectionError': 1}.$")
        self.forward.refuse()
        self.assertEqual(example.get()[::2], (503, "Closed at the moment"))

    def test_number_of_attempts(self):
        example = self.start_views(settings="retry.attempts = 5")
        self.assert_unavailable(example.get("/LosesAlways"))
        self.assertEqual(example.get("/Attempts").body, "5")

    def test_lost_before_there_is_a_view(self):
        example = self.start_views()
        self.assertEqual(example.get("/LosesUserOnce")[::2], (200, "Hello"))
        self.assertEqual(example.get("/Attempts").body, "2")
        self.assert_unavailable(example.get("/LosesUserAlways"))
        self.assertEqual(example.get("/Attempts").body, str(2 + self.attempts))
        self.assert_serves(example)

    def test_transaction_that_nobody_ends(self):
        example = self.start_views()
        self.assertEqual(example.get("/ForgetsTransaction")[::2], (200, "forgotten"))
        self.assert_serves(example)
        self.assertNotIn("forgotten", self.guests())


class ThreadManagerTests(PyramidTests):
    """The requests of a thread have one transaction manager, ``transaction.manager``."""

    settings = ""

    def start(self, stack, *args, **keywords):
        if stack == self.stack:
            stack = self.configured(self.settings)
        return super().start(stack, *args, **keywords)
