"""What is measured of connections, for `zreconnect.integrations.prometheus` and ``opentelemetry``.

Counting follows the events, of which a transaction without a loss has none. How many connections
there are, and how many threads wait, is looked at when somebody asks, so that it costs a
transaction nothing.

What a metrics library does with a number may take a lock of its own, which is no reentrant one. A
signal's handler that loses a connection in the middle of that must not wait for its own thread, nor
a forked child for a thread that it does not have: see `Sink`.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import zope.event
from zope.interface import providedBy
from zope.interface.adapter import AdapterRegistry

from zreconnect import events, interfaces
from zreconnect.interfaces import ACTIVE, CLOSED, DOOMED, IDLE, PREPARED
from zreconnect.witness import Outcome
from zreconnect.work import works

#: What a connection can be, other than closed.
STATES = (IDLE, ACTIVE, PREPARED, DOOMED)
#: The upper limits of the histogram, in seconds: from a session that was lost while idle to the
#: longest outage that a policy is likely to wait for.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_MISSING = {True: "yes", False: "no", None: "unknown"}


class Metric(NamedTuple):
    """What is counted.

    name: with dots between its parts. unit: as UCUM has it. description: for people.
    label: what its series differ in besides the server; values: all that it can be, or nearly all.
    by_server: whether each server has its own.
    """

    name: str
    unit: str
    description: str
    label: str = ""
    values: tuple[str, ...] = ()
    by_server: bool = True


LOSSES = Metric(
    "connection.losses",
    "{loss}",
    "Server sessions that ended without being asked to, by the state of their connections",
    "state",
    STATES,
)
ATTEMPTS = Metric(
    "reconnect.attempts",
    "{attempt}",
    "Attempts to connect again, as each connection counts them",
    "outcome",
    ("succeeded", "failed"),
)
TIMEOUTS = Metric(
    "reconnect.timeouts", "{timeout}", "Times that a connection gave up connecting again"
)
COMMITS = Metric(
    "lost.commits",
    "{commit}",
    "Commits whose answer was lost, by what was found out of them",
    "outcome",
    tuple(outcome.value for outcome in Outcome),
)
# The server of its event is that of several.
PARTIAL_COMMITS = Metric(
    "partial.commits",
    "{commit}",
    "Transactions of several databases, committed in some of them and not, or perhaps not, in all",
    by_server=False,
)
CHANGES = Metric(
    "history.changes",
    "{change}",
    "Servers found to have another history, by whether acknowledged work is missing in them",
    "missing",
    tuple(_MISSING.values()),
)
REPEATED_RUNS = Metric(
    "repeated.runs", "{run}", "Units of work that were run again", by_server=False
)
ABANDONED_RUNS = Metric(
    "abandoned.runs", "{run}", "Units of work that were not run again, and failed", by_server=False
)
#: All that only grow.
COUNTERS = (
    *(LOSSES, ATTEMPTS, TIMEOUTS, COMMITS, CHANGES),
    *(PARTIAL_COMMITS, REPEATED_RUNS, ABANDONED_RUNS),
)
DURATION = Metric("reconnect.duration", "s", "Seconds until there was a session again")
CONNECTIONS = Metric("connections", "{connection}", "Connections, by state", "state", STATES)
WAITING = Metric("waiting.threads", "{thread}", "Threads that wait for a connection to the server")


class Measurement(NamedTuple):
    """A number that was found. server: its address; empty for what has none. value: the label's."""

    metric: Metric
    server: str
    value: str
    amount: float


Measure = Callable[[Any], list[tuple[Metric, str, float]]]
_MEASURES: dict[Any, Measure] = {
    interfaces.IConnectionLost: lambda event: [(LOSSES, event.state, 1)],
    interfaces.IConnectionAttemptFailed: lambda event: [(ATTEMPTS, "failed", 1)],
    interfaces.IReconnected: lambda event: [
        (ATTEMPTS, "succeeded", 1),
        (DURATION, "", event.seconds),
    ],
    interfaces.IGaveUp: lambda event: [(ATTEMPTS, "failed", 1), (TIMEOUTS, "", 1)],
    interfaces.ICommitLookedUp: lambda event: [(COMMITS, event.outcome, 1)],
    interfaces.ICommittedInPart: lambda event: [(PARTIAL_COMMITS, "", 1)],
    interfaces.IHistoryChanged: lambda event: [(CHANGES, _MISSING[event.is_missing], 1)],
    interfaces.IRunAgain: lambda event: [(REPEATED_RUNS, "", 1)],
    interfaces.IGaveUpRunning: lambda event: [(ABANDONED_RUNS, "", 1)],
}
# A program may have many events of its own: looking up that one has no measure has to be quick.
_registry = AdapterRegistry()
for _interface, _measure in _MEASURES.items():
    _registry.subscribe([_interface], None, _measure)


def measured(event: Any) -> list[Measurement]:
    """What is to be counted because of an event; empty for one of somebody else's."""
    return [
        Measurement(metric, event.server if metric.by_server else "", value, amount)
        for measure in _registry.subscriptions([providedBy(event)], None)
        for metric, value, amount in measure(event)
    ]


def connections() -> list[Measurement]:
    """How many connections there are now to each server, in each state; a closed one is none."""
    found: Counter[tuple[str, str]] = Counter()
    for work in works():
        state = work.state.shown
        if state != CLOSED:
            server = work.link.server.address
            # Those of which there are none, too.
            found.update({(server, each): int(each == state) for each in STATES})
    return [Measurement(CONNECTIONS, *key, amount) for key, amount in sorted(found.items())]


def waiting() -> list[Measurement]:
    """How many threads wait now for each server that a connection knows."""
    servers = {work.link.server for work in works()}
    found: Counter[str] = Counter()
    for server in servers:
        found[server.address] += server.outage.waiting
    return [Measurement(WAITING, server, "", amount) for server, amount in sorted(found.items())]


class Sink:
    """Where measurements go: one registry or provider of a metrics library.

    place: that. Only one call of the library's is made at a time, and none within another.
    """

    def __init__(self, place: object) -> None:
        self.place = place
        self.renew()

    def renew(self) -> None:
        """In a forked child, which has one thread only: nobody holds a lock."""
        self._noted: deque[Measurement] = deque()
        self._lock = threading.RLock()
        self._is_busy = False

    def note(self, measurements: Iterable[Measurement]) -> None:
        """Have them counted, now or when what was interrupted goes on."""
        self._noted.extend(measurements)
        self.alone(self._count)

    def alone(self, function: Callable[[], object]) -> None:
        """Call the function, unless this is within such a call, of a thread that was interrupted;
        which then counts what was noted meanwhile."""
        with self._lock:
            if not self._is_busy:
                try:
                    self._is_busy = True
                    function()
                    self._count()
                finally:
                    self._is_busy = False

    def _count(self) -> None:
        while self._noted:
            measurement = self._noted.popleft()
            try:
                self.record(measurement)
            except Exception:
                events.logger.exception("Could not count: %s", measurement.metric.description)

    def record(self, measurement: Measurement) -> None:
        """Give a measurement to the library."""
        raise NotImplementedError


# Replaced and never changed, because a thread may go through it.
_sinks: tuple[Sink, ...] = ()
_lock = threading.RLock()


def sink_of(place: object) -> Sink | None:
    """The one for a place, if what happens is counted there."""
    return next((sink for sink in _sinks if sink.place is place), None)


def switch_on(place: object, make_sink: Callable[[], Sink]) -> None:
    """Have what happens from now on counted in a place, for which a sink is made, once."""
    global _sinks
    with _lock:
        if sink_of(place) is None:
            _sinks = (*_sinks, make_sink())
        if _note not in zope.event.subscribers:
            zope.event.subscribers.append(_note)


def switch_off(place: object) -> Sink | None:
    """Count no longer in that place. Returns the sink, if there was one."""
    global _sinks
    with _lock:
        found = sink_of(place)
        _sinks = tuple(sink for sink in _sinks if sink is not found)
        if not _sinks and _note in zope.event.subscribers:
            zope.event.subscribers.remove(_note)
        return found


def _note(event: Any) -> None:
    measurements = measured(event)
    if measurements:
        for sink in _sinks:
            sink.note(measurements)


def _renew() -> None:
    global _lock
    _lock = threading.RLock()
    for sink in _sinks:
        sink.renew()


os.register_at_fork(after_in_child=_renew)
