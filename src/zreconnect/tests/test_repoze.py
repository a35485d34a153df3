"""Web requests under repoze.tm2 and repoze.retry."""

from pathlib import Path

from zreconnect.tests.stack_tests import StackTests
from zreconnect.tests.web import STACKS, Stack, WebTestCase

COMMAND, DIRECTORY = STACKS["repoze"]
MODULE = "zreconnect.tests.repoze_application"


class RepozeTests(StackTests, WebTestCase):
    stack = "repoze"
    attempts = 3

    def with_views(self):
        return Stack(COMMAND.replace("guestbook:main", f"{MODULE}:main"), DIRECTORY)

    def start(self, stack, *args, **keywords):
        if isinstance(stack, Stack):
            keywords["PIPELINE"] = self.changed_pipeline()
        return super().start(stack, *args, **keywords)

    def changed_pipeline(self):
        configuration = (DIRECTORY / "guestbook.ini").read_text()
        for before, after in (
            ("call:guestbook:make_guest_book", f"call:{MODULE}:make_application"),
            ("pipeline =\n", "pipeline =\n    error_page\n"),
        ):
            self.assertIn(before, configuration)
            configuration = configuration.replace(before, after)
        changed = Path(self.temporary_directory(), "changed.ini")
        changed.write_text(
            f"{configuration}\n[filter:error_page]\nuse = call:{MODULE}:make_error_page\n"
        )
        return str(changed)

    def test_lost_while_streaming(self):
        """repoze.tm2 commits after the response, and nothing of it has been sent before that."""
        example = self.start_views()
        self.assertEqual(example.get("/Streams")[::2], (200, "streamed to the end"))
        self.assertEqual(example.get("/Attempts").body, "2")
        self.assertEqual(self.guests(), ["attempt 2"])
        self.assert_serves(example)

    def test_error_swallowed_with_a_savepoint_that_failed(self):
        """`transaction` refuses to commit then, with an error that is none of ours."""
        example = self.start_views()
        self.assertEqual(example.get("/SwallowsInSavepoint").status, 500)
        self.assertEqual(self.guests(), [])
        self.assert_serves(example)
