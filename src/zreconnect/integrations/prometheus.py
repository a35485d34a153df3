"""Prometheus: what happens to connections, in metrics of ``prometheus_client``.

`register` switches it on. A dashboard for Grafana and alert rules are beside this module, in the
directory ``monitoring``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from zreconnect.integrations import metrics, needs

with needs(__name__, "zreconnect[prometheus]"):
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector

# In this mode each process has a file of its own, of which it takes care itself after a fork.
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"


def register(registry: CollectorRegistry = REGISTRY) -> None:
    """Have the events of all connections of this process counted, and their states shown.

    registry: where; a second call for the same one does nothing. Raises ValueError if the program
    has metrics of the same names there.

    Metrics begin with ``zreconnect_``, and their label ``server`` is the server's address without
    password. A forked child counts for itself, from 0.
    """
    metrics.switch_on(registry, lambda: _Collector(registry))


def unregister(registry: CollectorRegistry = REGISTRY) -> None:
    """Undo `register`."""
    sink = metrics.switch_off(registry)
    if isinstance(sink, _Collector):
        registry.unregister(sink)


class _Collector(metrics.Sink, Collector):
    """All metrics in one, so that none is asked for a value while one is changed."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._make()
        super().__init__(registry)
        registry.register(self)

    def renew(self) -> None:
        super().renew()
        if self._process != os.getpid() and MULTIPROCESS not in os.environ:
            self._make()

    def _make(self) -> None:
        self._process = os.getpid()
        self._servers: set[str] = set()
        # Known to nobody else: the registry has this collector.
        self._counters = {
            metric: Counter(_name(metric), metric.description, _labels(metric), registry=None)
            for metric in metrics.COUNTERS
        }
        self._duration = Histogram(
            f"{_name(metrics.DURATION)}_seconds",
            metrics.DURATION.description,
            _labels(metrics.DURATION),
            buckets=metrics.BUCKETS,
            registry=None,
        )

    def describe(self) -> Iterable[Any]:
        """The metrics without values, in which the registry looks for names that it has."""
        for each in (*self._counters.values(), self._duration):
            yield from each.describe()
        yield _gauge(metrics.CONNECTIONS)
        yield _gauge(metrics.WAITING)

    def collect(self) -> Iterable[Any]:
        """The metrics with their present values."""
        found: list[Any] = []
        self.alone(lambda: found.extend(self._collected()))
        return found

    def _collected(self) -> Iterable[Any]:
        gauges = {
            metrics.CONNECTIONS: metrics.connections(),
            metrics.WAITING: metrics.waiting(),
        }
        for measurements in gauges.values():
            for measurement in measurements:
                self._know(measurement.server)
        for each in (*self._counters.values(), self._duration):
            yield from each.collect()
        for metric, measurements in gauges.items():
            gauge = _gauge(metric)
            for measurement in measurements:
                gauge.add_metric(_values(measurement), measurement.amount)
            yield gauge

    def record(self, measurement: metrics.Measurement) -> None:
        metric = measurement.metric
        if metric.by_server:
            self._know(measurement.server)
        if metric is metrics.DURATION:
            self._duration.labels(*_values(measurement)).observe(measurement.amount)
            return
        counter = self._counters[metric]
        if metric.by_server:
            counter = counter.labels(*_values(measurement))
        counter.inc(measurement.amount)

    def _know(self, server: str) -> None:
        """Have the server's series begin with 0, so that the first event is an increase."""
        if server in self._servers:
            return
        for metric, counter in self._counters.items():
            if metric.by_server:
                for value in metric.values or ("",):
                    counter.labels(*_values(metrics.Measurement(metric, server, value, 0)))
        self._duration.labels(server)
        self._servers.add(server)


def _name(metric: metrics.Metric) -> str:
    return "zreconnect_" + metric.name.replace(".", "_")


def _labels(metric: metrics.Metric) -> list[str]:
    return [name for name in ("server" if metric.by_server else "", metric.label) if name]


def _values(measurement: metrics.Measurement) -> list[str]:
    """Those of the labels of a metric that has them by server."""
    return [measurement.server, *([measurement.value] if measurement.metric.label else [])]


def _gauge(metric: metrics.Metric) -> Any:
    return GaugeMetricFamily(_name(metric), metric.description, labels=_labels(metric))
