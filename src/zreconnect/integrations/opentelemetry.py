"""OpenTelemetry: what happens to connections, in instruments of a meter named ``zreconnect``.

`register` switches it on. Names, units and attributes are those of OpenTelemetry's semantic
conventions for database clients, where these have some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

from zreconnect.integrations import metrics, needs
from zreconnect.interfaces import ACTIVE

with needs(__name__, "zreconnect[opentelemetry]"):
    from opentelemetry.metrics import (
        CallbackOptions,
        MeterProvider,
        Observation,
        get_meter_provider,
    )

# https://opentelemetry.io/docs/specs/semconv/database/database-metrics/, "Connection pools". What
# is not here is called after zreconnect.
NAMES = {
    metrics.CONNECTIONS: "db.client.connection.count",
    metrics.WAITING: "db.client.connection.pending_requests",
    metrics.TIMEOUTS: "db.client.connection.timeouts",
}
UNITS = {metrics.WAITING: "{request}"}
STATE = "db.client.connection.state"
# The state that the conventions have a word for, and another one than PEP 249.
STATES = {ACTIVE: "used"}
# Stands for the provider that the program has set, or will.
_GLOBAL = object()


def register(meter_provider: MeterProvider | None = None) -> None:
    """Have the events of all connections of this process counted, and their states observed.

    meter_provider: where; None for the one that the program sets, before or after. A second call
    for the same one does nothing. Processes that are forked set up theirs, and call this, after
    the fork.
    """
    place = _place(meter_provider)
    metrics.switch_on(place, lambda: _Instruments(place, meter_provider or get_meter_provider()))


def unregister(meter_provider: MeterProvider | None = None) -> None:
    """Undo `register`. The instruments stay, and are given nothing more."""
    metrics.switch_off(_place(meter_provider))


def _place(meter_provider: MeterProvider | None) -> object:
    current = get_meter_provider()
    if meter_provider is not None and meter_provider is not current:
        return meter_provider
    # It may have become the program's after it was registered here.
    return _GLOBAL if metrics.sink_of(current) is None else current


class _Instruments(metrics.Sink):
    def __init__(self, place: object, meter_provider: MeterProvider) -> None:
        super().__init__(place)
        meter = meter_provider.get_meter("zreconnect")
        self._record: dict[metrics.Metric, Callable[[float, dict[str, Any]], None]] = {
            metric: meter.create_counter(_name(metric), metric.unit, metric.description).add
            for metric in metrics.COUNTERS
        }
        self._record[metrics.DURATION] = meter.create_histogram(
            _name(metrics.DURATION),
            metrics.DURATION.unit,
            metrics.DURATION.description,
            explicit_bucket_boundaries_advisory=metrics.BUCKETS,
        ).record
        for metric, measure in (
            (metrics.CONNECTIONS, metrics.connections),
            (metrics.WAITING, metrics.waiting),
        ):
            meter.create_observable_up_down_counter(
                _name(metric),
                [self._observe(measure)],
                UNITS.get(metric, metric.unit),
                metric.description,
            )

    def record(self, measurement: metrics.Measurement) -> None:
        self._record[measurement.metric](measurement.amount, _attributes(measurement))

    def _observe(
        self, measure: Callable[[], list[metrics.Measurement]]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(options: CallbackOptions) -> Iterable[Observation]:
            found = measure() if metrics.sink_of(self.place) is self else []
            return [Observation(each.amount, _attributes(each)) for each in found]

        return observe


def _name(metric: metrics.Metric) -> str:
    return NAMES.get(metric, f"zreconnect.{metric.name}")


def _attributes(measurement: metrics.Measurement) -> dict[str, Any]:
    metric, server, value, _ = measurement
    attributes = server_attributes(server) if metric.by_server else {}
    if metric.label == "state":
        attributes[STATE] = STATES.get(value, value)
    elif metric.label:
        attributes[f"zreconnect.{metric.label}"] = value
    return attributes


def server_attributes(server: str) -> dict[str, Any]:
    """The attributes for a server's address, of which ``db.client.connection.pool.name`` is all.

    An attribute is left out that the address does not tell for certain.
    """
    attributes: dict[str, Any] = {"db.client.connection.pool.name": server}
    system, is_url, rest = server.partition("://")
    if not is_url:
        return attributes
    location, _, namespace = rest.rpartition("/")
    host, _, port = location.rpartition("@")[2].partition(":")
    # Several hosts have several ports; and an IPv6 address has colons of its own.
    if port.isdecimal():
        attributes |= {"server.address": unquote(host), "server.port": int(port)}
    elif host or port:
        attributes["server.address"] = unquote(location.rpartition("@")[2])
    if namespace:
        attributes["db.namespace"] = unquote(namespace)
    return {"db.system.name": system, **attributes}
