"""What both of Zope's publishers promise, as tests of their example applications."""

import shutil
from pathlib import Path

from zreconnect.tests.stack_tests import StackTests
from zreconnect.tests.web import STACKS, Stack


class ZopeTests(StackTests):
    """A mixin for `WebTestCase`.

    site: the path of its site definition.
    """

    # Both publishers run a request again three times.
    attempts = 4

    def with_views(self):
        """A copy of the example that also has the views of `zreconnect.tests.zope_views`."""
        command, directory = STACKS[self.stack]
        copy = Path(self.temporary_directory(), "copy")
        shutil.copytree(directory, copy)
        site = copy / self.site
        before, end, after = site.read_text().rpartition("</configure>")
        include = '<include package="zreconnect.tests" file="zope_views.zcml" />'
        site.write_text(before + include + end + after)
        return Stack(command, copy)

    def test_head_while_the_server_is_down(self):
        self.check_head()
