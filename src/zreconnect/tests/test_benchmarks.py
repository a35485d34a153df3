"""The directory benchmarks/ of a checkout: a part of it is measured once, and reported."""

import json
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[3]
# The processes of the peers get it, too.
with_root = mock.patch.object(sys, "path", [str(ROOT), *sys.path])
with with_root:
    from benchmarks import peers, report, rounds, running, svg
    from benchmarks.part import Options


class PartTests(unittest.TestCase):
    @with_root
    def test_a_part_is_measured_and_reported(self):
        (part,) = running.chosen(["witnesses"])
        options = Options(rounds=1, seconds=0.001, peers=["connect-psycopg2-ledger"])
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            with mock.patch.object(report, "DIRECTORY", directory):
                report.keep(part, part.measure(options), options, 1.0)
                text = report.write(running.described())
            self.assertEqual((directory / "table.rst").read_text(), text)
            measured = json.loads((directory / "results.json").read_text())["witnesses"]
            for plot in measured["plots"]:
                ElementTree.parse(directory / "plots" / f"{plot}.svg")
        self.assertIn("psycopg2-binary", measured["machine"]["packages"])
        bare, ledger = (
            measured["data"]["SELECT"][name][0] for name in ("psycopg2", "connect-psycopg2-ledger")
        )
        self.assertLess(bare["log"], ledger["log"])
        self.assertIn("zreconnect connect, ledger", text)

    def test_an_unknown_part(self):
        with self.assertRaisesRegex(SystemExit, "there is no weather.*witnesses"):
            running.chosen(["weather"])


class PeersTests(unittest.TestCase):
    def test_those_that_are_compared_with_come_along(self):
        names = [each.name for each in peers.chosen(["zope.sqlalchemy-zreconnect"])]
        self.assertEqual(
            names, ["psycopg2", "sqlalchemy", "zope.sqlalchemy", "zope.sqlalchemy-zreconnect"]
        )

    def test_an_unknown_one(self):
        with self.assertRaisesRegex(ValueError, "there is no psycopg4"):
            peers.chosen(["psycopg4"])


class RoundsTests(unittest.TestCase):
    def test_a_ratio_is_that_of_the_same_rounds(self):
        found = rounds.ratio([1, 20, 300], [2, 20, 100])
        self.assertEqual((found.lower, found.median, found.upper), (0.75, 1, 2))

    def test_all_are_measured_in_each_round(self):
        called = []
        measured = rounds.interleaved(3, ["a", "b"], lambda name: called.append(name) or name)
        self.assertEqual(measured, {"a": ["a"] * 3, "b": ["b"] * 3})
        self.assertEqual([sorted(called[i : i + 2]) for i in (0, 2, 4)], [["a", "b"]] * 3)


class SvgTests(unittest.TestCase):
    def test_lines(self):
        axis = svg.Axis("seconds", is_logarithmic=True)
        points = {"<us>": [(0, 1), (1, 10), (1000, 3)]}
        for x in (axis, svg.Axis("seconds")):
            root = ElementTree.fromstring(svg.lines("Waiting", x, axis, points))
            (line,) = root.iter("{http://www.w3.org/2000/svg}polyline")
            self.assertEqual(len(line.get("points").split()), 2 if x is axis else 3)
