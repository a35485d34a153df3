"""The directory suites/ of a checkout: how it counts, and a part of what it runs."""

import contextlib
import dataclasses
import io
import os
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[3]
with mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
    from suites import counting, recording, running, sources, storm, suite, zope_sqlalchemy
    from suites.__main__ import chosen, described, main

SUITE = suite.Suite(
    name="imaginary",
    title="Imaginary 1",
    source=None,
    requirements=(),
    through="imaginary",
    tests=(),
    not_counted={"tests/test_types.py::*": "a C type"},
    command=suite.with_unittest,
    patience=60,
)
PASSED, FAILED, SKIPPED = ((name, "") for name in ("passed", "failed", "skipped"))
# What buildout has installed.
PATH = [path for path in sys.path if path]


def run(described, through=False):
    """Run a suite with this Python and without a source; its record, and what was printed."""
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(printed):
        directory = Path(name)
        record = running.run(described, through, sys.executable, directory, directory, PATH)
        return record.outcomes(), printed.getvalue()


class CountingTests(unittest.TestCase):
    def count(self, bare, through):
        return counting.count(SUITE, bare, through)

    def test_only_what_passes_bare_counts(self):
        bare = {"a": PASSED, "b": FAILED, "c": SKIPPED, "d": ("started", "")}
        row, differences = self.count(bare, dict.fromkeys("abcd", PASSED))
        self.assertEqual(row, counting.Row("Imaginary 1", 1, 0, 1))
        self.assertEqual(differences, {})

    def test_what_does_not_pass_through_differs(self):
        bare = dict.fromkeys("abcde", PASSED)
        through = {"a": PASSED, "b": ("failed", "why"), "c": SKIPPED, "d": ("started", "")}
        row, differences = self.count(bare, through)
        self.assertEqual((row.bare, row.not_counted, row.through), (5, 0, 1))
        self.assertEqual(
            differences, {"b": "why", "c": "skipped", "d": "did not end", "e": "not run"}
        )

    def test_what_is_not_counted_does_not_count_either_way(self):
        names = ("tests/test_types.py::test_x[1]", "tests/test_types.py::test_y", "tests/t.py::z")
        for outcome in (PASSED, FAILED):
            with self.subTest(outcome):
                row, differences = self.count(
                    dict.fromkeys(names, PASSED),
                    {**dict.fromkeys(names, outcome), names[2]: PASSED},
                )
                self.assertEqual((row.bare, row.not_counted, row.through), (3, 2, 1))
                self.assertEqual(differences, {})

    def test_a_pattern_that_nothing_needs_is_found(self):
        names = ("tests/test_types.py::test_x", "tests/test_types.py::test_y")
        bare = dict.fromkeys(names, PASSED)
        self.assertEqual(counting.needless(SUITE, bare, {names[0]: PASSED}), [])
        for needs_none in (bare, {}):
            self.assertEqual(counting.needless(SUITE, needs_none, bare), ["tests/test_types.py::*"])

    def test_in_a_pattern_only_the_asterisk_is_special(self):
        self.assertTrue(suite.matches("t.py::test[a?]*", "t.py::test[a?]-[b]"))
        self.assertFalse(suite.matches("t.py::test[a?]", "t.py::testa"))
        self.assertFalse(suite.matches("t.py::test", "t.py::test_2"))

    def test_enough(self):
        for bare, not_counted, through, enough in (
            (100, 0, 99, True),
            (1000, 0, 989, False),
            (200, 100, 99, True),
            (200, 100, 98, False),
            (0, 0, 0, False),
            (3, 3, 0, False),
        ):
            row = counting.Row("", bare, not_counted, through)
            with self.subTest(row):
                self.assertEqual(row.is_enough, enough)

    def test_the_percentage_is_rounded_down(self):
        self.assertEqual(counting.Row("", 10000, 0, 9899).percentage, 98.9)

    def test_the_table(self):
        rows = [counting.Row("Imaginary 1", 1000, 10, 980), counting.Row("No", 0, 0, 0)]
        self.assertEqual(
            counting.table(rows),
            "===========  =========  ===========  ===================  ====\n"
            "Suite        pass bare  not counted  of the rest through     %\n"
            "===========  =========  ===========  ===================  ====\n"
            "Imaginary 1       1000           10                  980  98.9\n"
            "No                   0            0                    0   0.0\n"
            "===========  =========  ===========  ===================  ====\n",
        )


class ProgramTests(unittest.TestCase):
    def test_each_suite_has_a_name_of_its_own(self):
        names = [each.name for some in described().values() for each in some]
        self.assertEqual(sorted(names), sorted(set(names)))

    def test_each_is_put_through_by_a_module(self):
        for _, each in chosen([]):
            with self.subTest(each.name):
                self.assertTrue((ROOT / "suites/through" / f"{each.through}.py").exists())

    def test_chosen_by_name_or_by_module(self):
        names = [each.name for _, each in chosen(["storm", "zope_sqlalchemy-psycopg"])]
        self.assertEqual(names, ["storm", "zope_sqlalchemy-psycopg"])
        self.assertEqual(len(chosen(["zope_sqlalchemy"])), 2)

    def test_a_name_that_there_is_not(self):
        with (
            mock.patch("sys.argv", ["suites", "storm", "strom"]),
            self.assertRaisesRegex(SystemExit, "there is no strom. There are: .*storm"),
        ):
            main()

    def run_main(self, source, *names):
        """Run one suite of that source; what main() returns, and what it prints."""
        described = dataclasses.replace(SUITE, source=source)
        printed = io.StringIO()
        with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
            module = sys.modules[main.__module__]
            for name, value in {
                "chosen": lambda names: [("imaginary", described)],
                "DIRECTORY": Path(directory),
                "RESULTS": Path(directory),
            }.items():
                stack.enter_context(mock.patch.object(module, name, value))
            stack.enter_context(mock.patch("sys.argv", ["suites", *names]))
            stack.enter_context(mock.patch("signal.signal"))
            stack.enter_context(contextlib.redirect_stdout(printed))
            return main(), printed.getvalue()

    def test_what_cannot_be_fetched_is_told_and_is_a_failure(self):
        class Nowhere:
            def fetch(self, directory):
                raise sources.NotToBeHad("there is no network")

        failed, printed = self.run_main(Nowhere())
        self.assertEqual(failed, 1)
        self.assertIn("imaginary: not to be had here: there is no network", printed)
        self.assertIn("Not run: imaginary", printed)

    def test_what_the_user_has_to_fetch_is_one_only_if_it_is_asked_for(self):
        source = sources.Checkout("ZRECONNECT_SUITES_NOWHERE", "1", "a checkout of it")
        for names, failed in (([], 0), (["imaginary"], 1)):
            with self.subTest(names):
                returned, printed = self.run_main(source, *names)
                self.assertEqual(returned, failed)
                self.assertIn("set ZRECONNECT_SUITES_NOWHERE to the path of a checkout", printed)


class RunningTests(unittest.TestCase):
    def run_tests(self, text, **changes):
        """Run the tests of a module that has this text."""
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "imaginary_tests.py").write_text("import unittest\n" + text)
            with mock.patch(f"{__name__}.PATH", [name, *PATH]):
                tests = ("imaginary_tests",)
                return run(dataclasses.replace(SUITE, tests=tests, **changes))

    def test_the_outcomes(self):
        outcomes, printed = self.run_tests(
            "class T(unittest.TestCase):\n"
            "    def test_passes(self): pass\n"
            "    def test_fails(self): self.fail('for a reason')\n"
            "    def test_errs(self): 1 / 0\n"
            "    def test_skips(self): self.skipTest('')\n"
            "    @unittest.expectedFailure\n"
            "    def test_is_expected_to_fail(self): self.fail()\n"
            "    @unittest.expectedFailure\n"
            "    def test_is_expected_to_fail_and_does_not(self): pass\n"
            "    def test_fails_in_part(self):\n"
            "        with self.subTest(): self.fail()\n"
            "        with self.subTest(): pass\n"
            "class Unsupported(unittest.TestCase):\n"
            "    def run(self, result):\n"
            "        result.startTest(self)\n"
            "        result.addSkip(self, '')\n"
            "    def test_is_not_supported(self): pass\n"
        )
        self.assertEqual(
            {name.rpartition("test_")[2]: outcome for name, (outcome, _) in outcomes.items()},
            {
                "passes": "passed",
                "fails": "failed",
                "errs": "failed",
                "skips": "skipped",
                "is_expected_to_fail": "skipped",
                "is_expected_to_fail_and_does_not": "failed",
                "fails_in_part": "failed",
                "is_not_supported": "skipped",
            },
        )
        self.assertIn("for a reason", outcomes["imaginary_tests.T.test_fails"][1])
        self.assertEqual(printed, "imaginary, bare: 8 tests\n")

    def test_what_hangs_is_named_and_ended(self):
        outcomes, printed = self.run_tests(
            "import threading\n"
            "class T(unittest.TestCase):\n"
            "    def test_1(self): pass\n"
            "    def test_2(self): threading.Event().wait()\n",
            patience=2,
        )
        self.assertEqual(outcomes["imaginary_tests.T.test_2"][0], "started")
        self.assertIn("hangs, nothing for 2 seconds: imaginary_tests.T.test_2", printed)

    def test_an_interrupted_run_leaves_no_outcomes(self):
        with (
            mock.patch.object(running, "_watch", side_effect=KeyboardInterrupt),
            mock.patch.object(recording.Record, "outcomes", self.fail),
            tempfile.TemporaryDirectory() as name,
        ):
            with self.assertRaises(KeyboardInterrupt):
                running.run(SUITE, False, sys.executable, Path(name), Path(name))
            self.assertEqual(os.listdir(name), ["bare.log"])

    def test_what_ends_the_process_leaves_the_outcomes_before_it(self):
        outcomes, _ = self.run_tests(
            "import os\n"
            "class T(unittest.TestCase):\n"
            "    def test_1(self): pass\n"
            "    def test_2(self): os.abort()\n"
        )
        self.assertEqual([outcome for outcome, _ in outcomes.values()], ["passed", "started"])

    def test_the_callers_server_is_not_used(self):
        with mock.patch.dict(os.environ, PGHOST="far.example", PGPASSWORD="secret"):
            outcomes, _ = self.run_tests(
                "import os\n"
                "class T(unittest.TestCase):\n"
                "    def test(self): self.assertFalse({'PGHOST', 'PGPASSWORD'} & set(os.environ))\n"
            )
        self.assertEqual(list(outcomes.values()), [PASSED])


class RecordTests(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.record = recording.Record(Path(directory.name) / "record")

    def test_a_test_that_is_met_twice_has_failed_if_it_failed_once(self):
        for outcome in ("started", "failed", "started", "passed"):
            self.record.add(outcome, "a")
        self.assertEqual(self.record.outcomes(), {"a": FAILED})

    def test_an_incomplete_line_is_none(self):
        self.record.add("passed", "a")
        with self.record.path.open("a") as file:
            file.write('["pas')
        self.assertEqual(self.record.outcomes(), {"a": PASSED})

    def test_pytest(self):
        def report(failed=False, skipped=False):
            return mock.Mock(failed=failed, skipped=skipped, longrepr="why")

        with mock.patch.dict(os.environ, {recording.FILE: str(self.record.path)}):
            for name, reports in {
                "a": [report(), report(), report()],
                "b": [report(), report(skipped=True), report()],
                "c": [report(), report(), report(failed=True)],
            }.items():
                recording.pytest_runtest_logstart(name, None)
                for each in reports:
                    recording.pytest_runtest_logreport(each)
                recording.pytest_runtest_logfinish(name, None)
        outcomes = {"a": PASSED, "b": SKIPPED, "c": ("failed", "why")}
        self.assertEqual(self.record.outcomes(), outcomes)


class PartTests(unittest.TestCase):
    """A part of the suites, as far as their projects install their tests."""

    def assert_enough(self, described, **changes):
        part = dataclasses.replace(described, **changes)
        outcomes = [run(part, through)[0] for through in (False, True)]
        row, differences = counting.count(part, *outcomes)
        self.assertTrue(row.is_enough, f"{row}\n" + "\n".join(differences))

    def test_storm(self):
        (described,) = storm.SUITES
        self.assert_enough(
            described, tests=("storm.tests.store.postgres.PostgresEmptyResultSetTest",)
        )

    def test_zope_sqlalchemy(self):
        # The one with psycopg.
        self.assert_enough(zope_sqlalchemy.SUITES[1])
