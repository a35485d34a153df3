"""Metrics: what is counted of real losses, for Prometheus and OpenTelemetry."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import unittest
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from unittest import mock
from urllib.request import urlopen

import zope.event
from opentelemetry import metrics as opentelemetry_api
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, Counter, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from zreconnect import (
    FAIL_FAST,
    CommitOutcomeUnknown,
    DisconnectionError,
    RetryPolicy,
    connect,
    events,
)
from zreconnect.integrations import metrics, opentelemetry, prometheus
from zreconnect.interfaces import ACTIVE, IDLE
from zreconnect.testing import no_waiting
from zreconnect.tests.base import REQUIRED, DatabaseTestCase, wait_until
from zreconnect.tests.interrupts import alarms
from zreconnect.tests.prometheus_server import JOB, EmbeddedPrometheus, promtool
from zreconnect.tests.situations import Child

MONITORING = resources.files("zreconnect.integrations") / "monitoring"
RULES = (MONITORING / "alerts.yml").read_text(encoding="utf-8")
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
PATIENT = RetryPolicy(timeout=60, initial=0.05, maximum=0.05)
SERVER = "postgresql://job@db/work"
IN_PART = events.CommittedInPart("two servers", ("one",), ("two",), (), ConnectionError("gone"))
LOSS = events.ConnectionLost(SERVER, ConnectionError("gone"), IDLE)


def reconnected(seen):
    """How many of the events say so. On a busy machine the first session may take two attempts."""
    return sum(isinstance(event, events.Reconnected) for event in seen)


class PrometheusTestCase(unittest.TestCase):
    def setUp(self):
        super().setUp()
        self.registry = CollectorRegistry()
        prometheus.register(self.registry)
        self.addCleanup(prometheus.unregister, self.registry)

    def value(self, name, **labels):
        return self.registry.get_sample_value(f"zreconnect_{name}", labels)


class LossTestCase(DatabaseTestCase):
    """What brings about all that is counted. ``value`` tells how much was."""

    def setUp(self):
        super().setUp()
        # Connections that other tests have left open, in cycles.
        gc.collect()

    def use(self, connection, statement="SELECT 1"):
        connection.cursor().execute(statement)
        connection.commit()

    def write(self, connection):
        """Begin a transaction and write in it."""
        self.query("CREATE TABLE IF NOT EXISTS item (name text)")
        # By itself, so that its id is known before COMMIT leaves.
        connection.begin()
        connection.cursor().execute("INSERT INTO item VALUES ('one')")
        return connection

    def lose_answer(self, connection):
        """Commit, and lose the answer."""
        self.forward.cut("to_client", 0)
        connection.commit()

    def lose_request(self, connection):
        """Commit, which does not arrive."""
        self.forward.cut("to_server", 0)
        connection.commit()

    @contextmanager
    def away(self):
        """The server is away in the block."""
        self.forward.refuse()
        self.forward.drop()
        try:
            yield
        finally:
            self.forward.accept()


class PrometheusTests(PrometheusTestCase, LossTestCase):
    def test_connections_by_state(self):
        connection = self.connect()
        server = connection.server

        def shown():
            found = {
                state: self.value("connections", server=server, state=state)
                for state in metrics.STATES
            }
            self.assertIsNone(self.value("connections", server=server, state="closed"))
            return {state: number for state, number in found.items() if number}

        self.assertEqual(shown(), {"idle": 1})
        other = connection.fork()
        other.begin()
        self.assertEqual(shown(), {"idle": 1, "active": 1})
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            other.cursor().execute("SELECT 1")
        self.assertEqual(shown(), {"idle": 1, "doomed": 1})
        other.close()
        self.assertEqual(shown(), {"idle": 1})
        connection.close()
        self.assertEqual(shown(), {})

    def test_a_loss_between_transactions(self):
        connection = self.connect()
        server = connection.server
        with self.events() as seen:
            self.use(connection)
            # It begins with 0: so the first loss is an increase.
            self.assertEqual(self.value("connection_losses_total", server=server, state="idle"), 0)
            self.assertEqual(
                self.value("reconnect_duration_seconds_count", server=server), reconnected(seen)
            )
            self.forward.drop()
            self.use(connection)
        self.assertEqual(self.value("connection_losses_total", server=server, state="idle"), 1)
        self.assertEqual(self.value("connection_losses_total", server=server, state="active"), 0)
        self.assertGreater(reconnected(seen), 0)
        self.assertEqual(
            self.value("reconnect_duration_seconds_count", server=server), reconnected(seen)
        )
        self.assertEqual(
            self.value("reconnect_attempts_total", server=server, outcome="succeeded"),
            reconnected(seen),
        )

    def test_a_loss_inside_a_transaction(self):
        connection = self.connect()
        connection.begin()
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            connection.cursor().execute("SELECT 1")
        self.assertEqual(
            self.value("connection_losses_total", server=connection.server, state="active"), 1
        )

    def test_threads_that_wait(self):
        connection = self.connect(policy=PATIENT)
        server = connection.server
        self.use(connection)
        self.assertEqual(self.value("waiting_threads", server=server), 0)

        def failed():
            return self.value("reconnect_attempts_total", server=server, outcome="failed")

        with self.away():
            thread = threading.Thread(target=self.use, args=(connection,))
            thread.start()
            wait_until(lambda: failed() >= 2)
            self.assertEqual(self.value("waiting_threads", server=server), 1)
        thread.join()
        self.assertEqual(self.value("waiting_threads", server=server), 0)
        self.assertGreater(self.value("reconnect_duration_seconds_sum", server=server), 0)
        self.assertEqual(self.value("reconnect_timeouts_total", server=server), 0)

    def test_two_servers_of_one_address(self):
        """DSNs that differ in what the address does not tell."""
        connections = [self.connect(), self.connect(f"{self.dsn}?application_name=other")]
        self.assertEqual(len({each.work.link.server for each in connections}), 2)
        server = connections[0].server
        self.assertEqual(self.value("connections", server=server, state="idle"), 2)
        self.assertEqual(self.value("waiting_threads", server=server), 0)

    def test_giving_up(self):
        connection = self.connect(policy=FAIL_FAST)
        with self.away(), self.assertRaises(DisconnectionError):
            connection.begin()
        server = connection.server
        self.assertEqual(self.value("reconnect_timeouts_total", server=server), 1)
        self.assertEqual(self.value("reconnect_attempts_total", server=server, outcome="failed"), 1)

    def test_lost_commits(self):
        committed, lost, unknown = self.connect(), self.connect(), self.connect(witness=None)
        self.lose_answer(self.write(committed))
        with self.assertRaises(DisconnectionError):
            self.lose_request(self.write(lost))
        with self.assertRaises(CommitOutcomeUnknown):
            self.lose_answer(self.write(unknown))
        for outcome in ("committed", "aborted", "unknown"):
            with self.subTest(outcome):
                self.assertEqual(
                    self.value("lost_commits_total", server=committed.server, outcome=outcome), 1
                )

    def test_runs(self):
        connection = self.connect()
        self.assertEqual(self.value("repeated_runs_total"), 0)

        def lose():
            self.forward.drop()
            connection.cursor().execute("SELECT 1")

        with no_waiting(), self.assertRaises(DisconnectionError):
            connection.run(lose, attempts=3)
        self.assertEqual(self.value("repeated_runs_total"), 2)
        self.assertEqual(self.value("abandoned_runs_total"), 1)

    def test_no_secret_and_no_text_of_an_error(self):
        connection = self.connect()
        self.use(connection)
        self.forward.drop()
        self.use(connection)
        labels = {
            value
            for family in self.registry.collect()
            for sample in family.samples
            for name, value in sample.labels.items()
            if name != "le"
        }
        enumerated = {value for metric in metrics.COUNTERS for value in metric.values}
        self.assertIn(connection.server, labels)
        servers = labels - enumerated
        self.assertNotIn(self.server.password, "".join(servers))
        self.assertTrue(all("://" in server for server in servers), servers)


class CountingTests(PrometheusTestCase):
    """Without a server: the events alone."""

    def losses(self):
        return self.value("connection_losses_total", server=SERVER, state="idle")

    def test_a_change_of_history(self):
        for is_missing in (True, False, None):
            events.announce(events.HistoryChanged(SERVER, "evidence", is_missing))
        for missing in ("yes", "no", "unknown"):
            self.assertEqual(self.value("history_changes_total", server=SERVER, missing=missing), 1)

    def test_a_commit_in_part(self):
        events.announce(IN_PART)
        self.assertEqual(self.value("partial_commits_total"), 1)

    def test_events_of_others_are_left_alone(self):
        zope.event.notify(object())
        zope.event.notify("an event")
        self.assertIsNone(self.losses())

    def test_registering_again_changes_nothing(self):
        prometheus.register(self.registry)
        events.announce(LOSS)
        self.assertEqual(self.losses(), 1)

    def test_registering_again_after_the_subscribers_were_replaced(self):
        with mock.patch("zope.event.subscribers", []):
            prometheus.register(self.registry)
            events.announce(LOSS)
        self.assertEqual(self.losses(), 1)

    def test_two_registries(self):
        other = CollectorRegistry()
        prometheus.register(other)
        events.announce(LOSS)
        prometheus.unregister(other)
        events.announce(LOSS)
        labels = {"server": SERVER, "state": "idle"}
        self.assertEqual(self.losses(), 2)
        self.assertIsNone(other.get_sample_value("zreconnect_connection_losses_total", labels))

    def test_the_last_one_leaves_no_subscriber(self):
        before = list(zope.event.subscribers)
        prometheus.unregister(self.registry)
        self.assertEqual(len(zope.event.subscribers), len(before) - 1)
        # Nothing happens.
        prometheus.unregister(self.registry)
        prometheus.register(self.registry)

    def test_a_name_that_is_taken(self):
        registry = CollectorRegistry()
        Counter("zreconnect_connection_losses", "the program's", registry=registry)
        with self.assertRaisesRegex(ValueError, "zreconnect_connection_losses"):
            prometheus.register(registry)
        self.assertIsNone(metrics.sink_of(registry))

    def test_the_default_registry(self):
        prometheus.register()
        prometheus.unregister()

    def test_what_cannot_be_counted_is_logged_and_keeps_nobody_from_anything(self):
        sink = metrics.sink_of(self.registry)
        seen = []
        zope.event.subscribers.append(seen.append)
        self.addCleanup(zope.event.subscribers.remove, seen.append)
        with (
            mock.patch.object(sink, "record", side_effect=OSError("no space left")),
            self.assertLogs("zreconnect", "ERROR") as log,
        ):
            events.announce(LOSS)
        self.assertIn("no space left", log.output[-1])
        self.assertEqual(seen, [LOSS])
        events.announce(LOSS)
        self.assertEqual(self.losses(), 1)

    def test_a_signal_handler_that_loses_a_connection_while_one_is_counted(self):
        """And the same while they are scraped: no thread waits for itself."""
        sink = metrics.sink_of(self.registry)
        for interrupted in ("record", "_collected"):
            with self.subTest(interrupted):
                called, original = [], getattr(sink, interrupted)

                def interrupt(*arguments, original=original, called=called):
                    if not called:
                        called.append(True)
                        events.announce(LOSS)
                        # It waits until the first one is done.
                        self.assertEqual(list(self.registry.collect()), [])
                    return original(*arguments)

                with mock.patch.object(sink, interrupted, interrupt):
                    events.announce(LOSS)
                    self.assertNotEqual(list(self.registry.collect()), [])
                self.assertEqual(called, [True])
        self.assertEqual(self.losses(), 4)

    def test_alarms_at_any_moment(self):
        handled = []

        def handle(number, frame):
            handled.append(number)
            events.announce(LOSS)

        counted = 0
        with alarms(handle, 0.0005, 0.0005):
            while len(handled) < 50:
                events.announce(LOSS)
                counted += 1
                self.losses()
        self.assertEqual(self.losses(), counted + len(handled))

    def test_threads(self):
        def lose():
            for _ in range(50):
                events.announce(LOSS)
                self.losses()

        threads = [threading.Thread(target=lose) for _ in range(4)]
        for thread in threads:
            thread.start()
        # Connections come and go meanwhile.
        for _ in range(50):
            connect("postgresql://nobody@127.0.0.1/nothing")
        for thread in threads:
            thread.join()
        self.assertEqual(self.losses(), 200)

    def test_a_forked_child_counts_from_0(self):
        events.announce(LOSS)

        def count(child):
            # The series of a server that was known before.
            self.assertIsNone(self.losses())
            events.announce(LOSS)
            self.assertEqual(self.losses(), 1)

        Child(self, count).join()
        self.assertEqual(self.losses(), 1)

    def test_a_child_forked_while_another_thread_counts(self):
        """That thread is not in the child, and what it holds is nobody's."""
        sink = metrics.sink_of(self.registry)
        counts, forked = threading.Event(), threading.Event()

        def hold():
            counts.set()
            forked.wait()

        thread = threading.Thread(target=sink.alone, args=(hold,))
        thread.start()
        counts.wait()

        def count(child):
            prometheus.register(CollectorRegistry())
            events.announce(LOSS)
            self.assertEqual(self.losses(), 1)

        try:
            child = Child(self, count)
        finally:
            forked.set()
            thread.join()
        child.join()

    def test_a_forked_child_of_a_handler_that_interrupted_the_counting(self):
        sink = metrics.sink_of(self.registry)
        original, interrupted = sink.record, []

        def interrupt(measurement):
            if not interrupted:
                interrupted.append(measurement)
                interrupted.append(Child(self, lambda child: events.announce(LOSS)))
            original(measurement)

        with mock.patch.object(sink, "record", interrupt):
            events.announce(LOSS)
        interrupted[1].join()
        self.assertEqual(self.losses(), 1)


MULTIPROCESS = """
import os
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from zreconnect import events
from zreconnect.integrations import prometheus
prometheus.register()
loss = events.ConnectionLost("postgresql://db/work", ConnectionError("gone"), "idle")
events.announce(loss)
for _ in range(2):
    if os.fork() == 0:
        events.announce(loss)
        os._exit(0)
    os.wait()
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


class MultiprocessTests(unittest.TestCase):
    def test_the_processes_are_added_up(self):
        with tempfile.TemporaryDirectory() as directory:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", MULTIPROCESS],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "PROMETHEUS_MULTIPROC_DIR": directory,
                },
                capture_output=True,
                text=True,
            )
        self.assertEqual(done.returncode, 0, done.stderr)
        values = {
            (sample.name, sample.labels.get("state")): sample.value
            for family in text_string_to_metric_families(done.stdout)
            for sample in family.samples
        }
        self.assertEqual(values["zreconnect_connection_losses_total", "idle"], 3)
        self.assertEqual(values["zreconnect_connection_losses_total", "active"], 0)


class OpenTelemetryTests(LossTestCase):
    def setUp(self):
        super().setUp()
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader])
        self.addCleanup(self.provider.shutdown)
        opentelemetry.register(self.provider)
        self.addCleanup(opentelemetry.unregister, self.provider)

    def metrics(self):
        """What is exported, by name."""
        data = self.reader.get_metrics_data()
        return {
            metric.name: metric
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def points(self, name, server):
        """The data points of a metric for a server, by the attributes that are no server's."""
        attributes = opentelemetry.server_attributes(server)
        metric = self.metrics().get(name)
        return {
            tuple(value for key, value in point.attributes.items() if key not in attributes): point
            for point in (metric.data.data_points if metric else ())
            if attributes.items() <= point.attributes.items()
        }

    def values(self, name, server):
        return {key: point.value for key, point in self.points(name, server).items()}

    def test_losses(self):
        connection = self.connect()
        server = connection.server
        with self.events() as seen:
            self.use(connection)
            self.assertEqual(self.values("zreconnect.connection.losses", server), {})
            self.forward.drop()
            self.use(connection)
            connection.begin()
            self.forward.drop()
            with self.assertRaises(DisconnectionError):
                connection.cursor().execute("SELECT 1")
        self.assertEqual(
            self.values("zreconnect.connection.losses", server), {("idle",): 1, ("used",): 1}
        )
        self.assertEqual(
            self.values("db.client.connection.count", server),
            {("idle",): 0, ("used",): 0, ("prepared",): 0, ("doomed",): 1},
        )
        point = self.points("zreconnect.reconnect.duration", server)[()]
        self.assertEqual(point.count, reconnected(seen))
        self.assertEqual(tuple(point.explicit_bounds), metrics.BUCKETS)
        attempts = self.values("zreconnect.reconnect.attempts", server)
        self.assertEqual(attempts["succeeded",], reconnected(seen))

    def test_waiting(self):
        connection = self.connect(policy=PATIENT)
        server = connection.server
        pending = "db.client.connection.pending_requests"
        self.use(connection)
        self.assertEqual(self.values(pending, server), {(): 0})
        with self.away():
            thread = threading.Thread(target=self.use, args=(connection,))
            thread.start()
            wait_until(lambda: self.values(pending, server) == {(): 1})
        thread.join()
        self.assertEqual(self.values(pending, server), {(): 0})

    def test_giving_up(self):
        connection = self.connect(policy=FAIL_FAST)
        with self.away(), self.assertRaises(DisconnectionError):
            connection.begin()
        self.assertEqual(self.values("db.client.connection.timeouts", connection.server), {(): 1})

    def test_a_lost_commit(self):
        connection = self.connect()
        self.lose_answer(self.write(connection))
        self.assertEqual(
            self.values("zreconnect.lost.commits", connection.server), {("committed",): 1}
        )

    def test_runs_have_no_server(self):
        events.announce(events.RunAgain("job.record", 1, 0.0, 0.0, ConnectionError()))
        (point,) = self.metrics()["zreconnect.repeated.runs"].data.data_points
        self.assertEqual((point.value, dict(point.attributes)), (1, {}))

    def test_units(self):
        connection = self.connect()
        self.use(connection)
        self.forward.drop()
        self.use(connection)
        units = {name: metric.unit for name, metric in self.metrics().items()}
        self.assertEqual(units["db.client.connection.count"], "{connection}")
        self.assertEqual(units["db.client.connection.pending_requests"], "{request}")
        self.assertEqual(units["zreconnect.reconnect.duration"], "s")

    def test_registering_again_changes_nothing(self):
        opentelemetry.register(self.provider)
        events.announce(LOSS)
        self.assertEqual(self.values("zreconnect.connection.losses", SERVER), {("idle",): 1})

    def test_unregistered_it_counts_and_observes_nothing(self):
        self.connect()
        opentelemetry.unregister(self.provider)
        events.announce(LOSS)
        self.assertEqual(self.metrics(), {})

    def test_the_programs_provider(self):
        """Whether it was registered by itself, as the program's, or both."""
        unregistered = opentelemetry_api.NoOpMeterProvider()
        for first, second in (
            (None, None),
            (None, self.provider),
            (self.provider, None),
        ):
            with self.subTest(first=first, second=second):
                opentelemetry.unregister(self.provider)
                with mock.patch.object(
                    opentelemetry, "get_meter_provider", return_value=unregistered
                ):
                    opentelemetry.register(first)
                sinks = metrics.sink_of(self.provider), metrics.sink_of(opentelemetry._GLOBAL)
                with mock.patch.object(
                    opentelemetry, "get_meter_provider", return_value=self.provider
                ):
                    opentelemetry.register(second)
                    self.assertEqual(
                        sinks,
                        (metrics.sink_of(self.provider), metrics.sink_of(opentelemetry._GLOBAL)),
                    )
                    opentelemetry.unregister()
                self.assertIsNone(metrics.sink_of(self.provider))
                self.assertIsNone(metrics.sink_of(opentelemetry._GLOBAL))
        opentelemetry.register(self.provider)

    def test_the_attributes_of_servers(self):
        for server, expected in {
            "postgresql://job@db.example.com:5433/my%20work": {
                "db.system.name": "postgresql",
                "server.address": "db.example.com",
                "server.port": 5433,
                "db.namespace": "my work",
            },
            "postgresql:///work": {"db.system.name": "postgresql", "db.namespace": "work"},
            "postgresql:///run/postgresql/work": {
                "db.system.name": "postgresql",
                "server.address": "/run/postgresql",
                "db.namespace": "work",
            },
            "postgresql://one,two:5432,5433/work": {
                "db.system.name": "postgresql",
                "server.address": "one,two:5432,5433",
                "db.namespace": "work",
            },
            "postgresql://::1:5432/work": {
                "db.system.name": "postgresql",
                "server.address": "::1:5432",
                "db.namespace": "work",
            },
            "mysql://db/": {"db.system.name": "mysql", "server.address": "db"},
            "the server of a connection_factory": {},
        }.items():
            with self.subTest(server):
                expected["db.client.connection.pool.name"] = server
                self.assertEqual(opentelemetry.server_attributes(server), expected)


def metric_names():
    """The names of all samples that Prometheus gets, with the labels of each."""
    registry = CollectorRegistry()
    prometheus.register(registry)
    try:
        connection = connect("postgresql://nobody@127.0.0.1/nothing")
        return {
            sample.name: set(sample.labels)
            for family in registry.collect()
            for sample in family.samples
            if connection
        }
    finally:
        prometheus.unregister(registry)


def selectors(expression):
    """The metrics in an expression, each with the labels that it is chosen by."""
    for name, labels in re.findall(r"\b(zreconnect_\w+)(?:\{(.*?)\})?", expression):
        yield name, set(re.findall(r"(\w+)=~?", labels))


def dashboard_queries():
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


class MonitoringTests(unittest.TestCase):
    """The dashboard and the alert rules, as they are shipped."""

    def assert_exist(self, expressions):
        names = metric_names()
        found = [each for expression in expressions for each in selectors(expression)]
        self.assertGreater(len(found), 5)
        for name, labels in found:
            with self.subTest(name):
                self.assertIn(name, names)
                self.assertEqual(labels - names[name] - {"job", "instance"}, set())

    def test_the_dashboard_has_metrics_that_exist(self):
        variables = [
            variable["query"]["query"]
            for variable in DASHBOARD["templating"]["list"]
            if variable["type"] == "query"
        ]
        self.assert_exist([*dashboard_queries(), *variables])

    def test_the_dashboard_shows_all_metrics(self):
        shown = {name for query in dashboard_queries() for name, _ in selectors(query)}
        # Of a histogram one of its series is enough.
        series = {name for name in metric_names() if not re.search("_(sum|count|created)$", name)}
        self.assertEqual(shown, series)

    def test_the_dashboard_is_whole(self):
        panels = DASHBOARD["panels"]
        self.assertEqual(len({panel["id"] for panel in panels}), len(panels))
        places = set()
        for panel in panels:
            with self.subTest(panel["title"]):
                self.assertTrue(panel["description"])
                place = panel["gridPos"]
                self.assertLessEqual(place["x"] + place["w"], 24)
                cells = {
                    (place["x"] + x, place["y"] + y)
                    for x in range(place["w"])
                    for y in range(place["h"])
                }
                self.assertEqual(cells & places, set())
                places |= cells
        variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
        self.assertEqual(used - variables, {"__rate_interval", "__range", "__all"})

    def test_the_rules_have_metrics_that_exist(self):
        self.assert_exist([re.sub(r"(?m)^ *#.*", "", RULES)])


# What promtool takes for a series: values, and how often each follows, a minute apart.
RULE_TESTS = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'zreconnect_waiting_threads{{job="j",instance="i",server="s"}}'
        values: '0 2 2 2 0'
      - series: 'zreconnect_reconnect_timeouts_total{{job="j",instance="i",server="s"}}'
        values: '0 0 1 1 1x20'
      - series: 'zreconnect_connection_losses_total{{job="j",server="s",state="idle"}}'
        values: '0+1x90'
      - series: 'zreconnect_connection_losses_total{{job="k",server="s",state="idle"}}'
        values: '0 0 5 5x90'
      - series: 'zreconnect_lost_commits_total{{job="counted",outcome="unknown",server="s"}}'
        values: '0 0 1 1x90'
      - series: 'zreconnect_lost_commits_total{{job="born",outcome="unknown",server="s"}}'
        values: '_ _ 1 1x90'
      - series: 'zreconnect_lost_commits_total{{job="fine",outcome="committed",server="s"}}'
        values: '0 0 1 1x90'
      - series: 'zreconnect_partial_commits_total{{job="j"}}'
        values: '0 0 1 1x90'
      - series: 'zreconnect_partial_commits_total{{job="born"}}'
        values: '_ _ 1 1x90'
      - series: 'zreconnect_history_changes_total{{job="j",missing="yes",server="s"}}'
        values: '_ _ 1 1x90'
      - series: 'zreconnect_history_changes_total{{job="j",missing="no",server="s"}}'
        values: '_ _ 1 1x90'
      - series: 'zreconnect_abandoned_runs_total{{job="j"}}'
        values: '0 0 3 3x20'
      - series: 'zreconnect_connections{{job="j",state="doomed",server="s"}}'
        values: '0 0 1x90'
      - series: 'zreconnect_connections{{job="j",state="active",server="s"}}'
        values: '1x90'
    promql_expr_test:
{cases}
"""
RULE_CASE = """\
      - expr: count by (alertname, job) (ALERTS{{alertname="{name}",alertstate="firing"}})
        eval_time: {minute}m
        exp_samples: [{samples}]
"""
# The jobs for which each alert fires after so many minutes.
FIRING = {
    "DatabaseAway": {1: [], 2: ["j"], 3: ["j"], 4: []},
    "DatabaseConnectionsGivenUp": {1: [], 3: ["j"], 20: []},
    "DatabaseSessionsLostOften": {15: [], 60: ["j"]},
    "CommitOutcomeUnknown": {1: [], 3: ["counted", "born"], 50: ["counted", "born"], 90: []},
    "CommittedInPart": {1: [], 3: ["j", "born"], 70: []},
    "AcknowledgedWorkMissing": {1: [], 3: ["j"], 90: []},
    "WorkFailedForGood": {1: [], 3: ["j"], 20: []},
    "TransactionLeftDoomed": {10: [], 20: ["j"]},
}


@unittest.skipUnless(promtool() or REQUIRED, "promtool is not installed: make services")
class RulesTests(unittest.TestCase):
    def promtool(self, *arguments):
        done = subprocess.run(
            [promtool(), *arguments], capture_output=True, text=True, cwd=self.directory
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        (self.directory / "alerts.yml").write_text(RULES)

    def test_they_are_rules(self):
        names = re.findall(r"- alert: (\w+)", RULES)
        self.assertEqual(names, list(FIRING))
        self.assertIn(
            f"SUCCESS: {len(names)} rules found", self.promtool("check", "rules", "alerts.yml")
        )

    def test_they_fire_when_they_should(self):
        cases = []
        for name, minutes in FIRING.items():
            for minute, jobs in minutes.items():
                samples = ", ".join(
                    f"""{{labels: '{{alertname="{name}",job="{job}"}}', value: 1}}"""
                    for job in jobs
                )
                cases.append(RULE_CASE.format(name=name, minute=minute, samples=samples))
        text = RULE_TESTS.format(rules="alerts.yml", cases="".join(cases))
        (self.directory / "tests.yml").write_text(text)
        self.promtool("test", "rules", "tests.yml")


class ScrapeTests(PrometheusTestCase, LossTestCase):
    """What is seen from outside, over HTTP, while the database of a job is interrupted."""

    def setUp(self):
        super().setUp()
        server, thread = start_http_server(0, "127.0.0.1", self.registry)
        self.addCleanup(thread.join)
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        self.port = server.server_port

    def scrape(self):
        with urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        return {
            (sample.name, frozenset(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def interrupt(self, look):
        """All that is measured happens. look: called while a thread waits."""
        job = self.connect(policy=PATIENT)
        careless = self.connect(witness=None, policy=PATIENT)

        def record(connection=job):
            connection.cursor().execute("INSERT INTO item VALUES ('one')")

        self.write(job).commit()
        self.server.restart()
        self.write(job)
        self.server.restart()
        with self.assertRaises(DisconnectionError):
            record()
        job.rollback()
        self.lose_answer(self.write(job))
        with self.assertRaises(CommitOutcomeUnknown):
            self.lose_answer(self.write(careless))
        careless.rollback()
        with self.away():
            thread = threading.Thread(target=job.run, args=(record,))
            thread.start()
            look()
        thread.join()

        def lose():
            self.forward.drop()
            record()

        with no_waiting(), self.assertRaises(DisconnectionError):
            job.run(lose, attempts=2)
        impatient = self.connect(policy=FAIL_FAST)
        with self.away(), self.assertRaises(DisconnectionError):
            impatient.begin()
        events.announce(events.HistoryChanged(job.server, "as after a failover", True))
        events.announce(IN_PART)
        doomed = self.write(self.connect(policy=PATIENT))
        self.forward.drop()
        with self.assertRaises(DisconnectionError):
            record(doomed)
        return job.server

    def test_each_metric_moves(self):
        seen = []

        def look():
            wait_until(
                lambda: any(
                    name == "zreconnect_waiting_threads" and value
                    for (name, *_), value in self.scrape().items()
                )
            )
            seen.append(self.scrape())

        server = self.interrupt(look)
        found = self.scrape()
        moved = {key[0] for key, value in (*found.items(), *seen[0].items()) if value}
        self.assertEqual({name for name in metric_names() if name not in moved}, set())

        def value(name, *labels):
            return found[f"zreconnect_{name}", frozenset(labels)]

        self.assertEqual(value("connections", server, "doomed"), 1)
        self.assertEqual(value("lost_commits_total", server, "committed"), 1)
        self.assertEqual(value("lost_commits_total", server, "unknown"), 1)
        self.assertGreaterEqual(value("connection_losses_total", server, ACTIVE), 2)
        self.assertEqual(value("waiting_threads", server), 0)

    @unittest.skipUnless(
        EmbeddedPrometheus.installed() or REQUIRED, "Prometheus is not installed: make services"
    )
    def test_the_dashboard_shows_them(self):
        """Each query of the dashboard, asked of a Prometheus that has scraped the job."""
        with EmbeddedPrometheus(self.port, RULES) as prometheus_server:
            self.connect()
            wait_until(lambda: prometheus_server.query("zreconnect_connections"))

            def look():
                wait_until(lambda: prometheus_server.alerts()["DatabaseAway"] == "pending")

            server = self.interrupt(look)
            for query in dashboard_queries():
                for name, value in {
                    "$__rate_interval": "1m",
                    "$__range": "1h",
                    "$job": JOB,
                    "$instance": ".*",
                    "$server": re.escape(server).replace("\\", "\\\\"),
                }.items():
                    query = query.replace(name, value)
                with self.subTest(query):
                    # What is 0 again was not: it was pending above.
                    is_past = "waiting_threads" in query
                    wait_until(
                        lambda query=query, is_past=is_past: any(
                            value > 0 or is_past for _, value in prometheus_server.query(query)
                        )
                    )
            alerts = prometheus_server.alerts()
            wait_until(
                lambda: (
                    {
                        name
                        for name, state in prometheus_server.alerts().items()
                        if state == "firing"
                    }
                    >= {
                        "CommitOutcomeUnknown",
                        "CommittedInPart",
                        "AcknowledgedWorkMissing",
                        "WorkFailedForGood",
                    }
                )
            )
            self.assertEqual(set(alerts), set(FIRING))
