"""What both of Zope's publishers promise, as tests of their example applications."""

import shutil
from pathlib import Path

from zreconnect.tests.stack_tests import StackTests
from zreconnect.tests.web import STACKS, Stack

VIEWS = '<include package="zreconnect.tests" file="zope_views.zcml" />'
OWN_PAGE = """\
<page
    xmlns="http://namespaces.zope.org/browser"
    for="zreconnect.interfaces.IDatabaseUnavailable"
    name="index.html"
    class="zreconnect.tests.zope_views.Unavailable"
    permission="zope.Public"
    />
"""
# As many sites have one.
PAGE_FOR_ALL_ERRORS = """\
<configure xmlns="http://namespaces.zope.org/browser">
  <page
      for="{error}"
      name="index.html"
      class="zreconnect.tests.zope_views.AnyError"
      permission="zope.Public"
      />
  <defaultView for="{error}" name="index.html" />
</configure>
"""


class ZopeTests(StackTests):
    """A mixin for `WebTestCase`.

    site: the path of its site definition.
    five_retries: the path of a file of the example, and a line that makes it five retries.
    """

    # Both publishers run a request again three times.
    attempts = 4

    def with_views(self, configuration="", change=lambda directory: None):
        """A copy of the example with the views of `zreconnect.tests.zope_views`.

        configuration: ZCML to add. change: called with the copy's directory.
        """
        command, directory = STACKS[self.stack]
        copy = Path(self.temporary_directory(), "copy")
        shutil.copytree(directory, copy)
        site = copy / self.site
        before, end, after = site.read_text().rpartition("</configure>")
        site.write_text(before + VIEWS + configuration + end + after)
        change(copy)
        return Stack(command, copy)

    def test_head_while_the_server_is_down(self):
        self.check_head()

    def test_number_of_retries(self):
        def set_number(directory):
            path, line = self.five_retries
            with (directory / path).open("a") as file:
                file.write(line)

        example = self.start_views(change=set_number)
        self.assert_unavailable(example.get("/LosesAlways"))
        self.assertEqual(example.get("/Attempts").body, "6")

    def test_own_page(self):
        example = self.start_views(configuration=OWN_PAGE)
        self.assertEqual(example.get("/LosesAlways")[::2], (503, "Closed at the moment"))
        self.forward.refuse()
        self.assertEqual(example.get()[::2], (503, "Closed at the moment"))

    def test_page_for_all_errors(self):
        for error in ("zope.interface.common.interfaces.IException", "builtins.Exception"):
            page = PAGE_FOR_ALL_ERRORS.format(error=error)
            for timeout in (None, 2):
                with self.subTest(error=error, timeout=timeout):
                    example = self.start_views(timeout, configuration=page)
                    self.assertEqual(example.get("/Mistaken")[::2], (500, "Sorry"))
                    self.assert_unavailable(example.get("/LosesAlways"))
                    self.forward.refuse()
                    self.assert_unavailable(example.get())
                    self.forward.accept()
            own_page = self.start_views(configuration=page + OWN_PAGE)
            self.assertEqual(own_page.get("/LosesAlways")[::2], (503, "Closed at the moment"))

    def test_write_while_streaming(self):
        example = self.start_views()
        self.assertEqual(example.get("/StreamsWithoutLoss").body, "streamed all")
        self.assertEqual(self.guests(), ["attempt 1"])
        self.assert_serves(example)
