"""The directory benchmarks/ of a checkout: a part of it is measured once, and reported."""

import json
import os
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
    from benchmarks import peers, report, rounds, running, server, svg, workers
    from benchmarks.measurements import fleet, growth
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

    @with_root
    def test_what_a_restart_costs(self):
        (part,) = running.chosen(["idle"])
        outcome = part.measure(Options(rounds=1, peers=["connect-psycopg2-xid"]))
        self.assertEqual([goal.is_met for goal in outcome.goals], [True])
        (first,) = outcome.data["psycopg2"]
        self.assertEqual(first["success"]["errors"], ("OperationalError",))

    @with_root
    @mock.patch.dict(os.environ)
    def test_reconnecting_leaks_nothing(self):
        # What coverage keeps of a process would be counted.
        os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
        with server.postgres() as postgres:
            address = server.through_socket(postgres)
            worker = workers.Worker("connect-psycopg2-xid", address)
            self.addCleanup(worker.close)
            more = worker.call(growth.reconnects, address, 100)
        self.assertEqual((more["files and sockets"], more["threads"]), (0, 0))
        # Fewer than one for each reconnect.
        self.assertLess(more["objects"], 100)

    def test_an_unknown_part(self):
        with self.assertRaisesRegex(SystemExit, "there is no weather.*witnesses"):
            running.chosen(["weather"])


class FleetTests(unittest.TestCase):
    """The default policy, in simulations with a virtual clock and a seed."""

    def runs(self):
        for scenario in (
            fleet.Scenario(1_000, 1, 500),
            fleet.Scenario(1_000, 10, 50),
            fleet.Scenario(1_000, 60, 200, within=10),
            fleet.Scenario(1_000, 60, 50, is_silent=True),
        ):
            with self.subTest(str(scenario)):
                yield scenario, fleet.simulated(scenario, fleet.OURS)

    def test_never_more_than_twice_the_attempts_of_polling(self):
        for scenario, run in self.runs():
            polling = fleet.simulated(scenario, fleet.POLLING)
            self.assertLessEqual(fleet.busiest(run, polling), 2)

    def test_all_are_served_in_twice_the_time_that_the_server_needs(self):
        for scenario, run in self.runs():
            self.assertEqual(len(run.served), scenario.clients)
            self.assertLessEqual(run.part_served(1, scenario.clients), 2 * scenario.needs)

    def test_the_simulated_server_keeps_its_rate(self):
        for scenario, run in self.runs():
            self.assertGreaterEqual(run.served[-1], scenario.needs - fleet.QUEUE)
            self.assertGreaterEqual(sum(run.a_second), scenario.clients)

    def test_who_does_not_spread_is_not_served(self):
        scenario = fleet.Scenario(1_000, 10, 50)
        self.assertIsNone(fleet.simulated(scenario, "every second").part_served(0.5, 1_000))


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
