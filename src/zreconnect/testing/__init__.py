"""Tools to test how a program bears the loss of its database.

`EmbeddedPostgres` is a server to crash, `PortForward` a line to cut. `zreconnect.testing.layers`
has layers for zope.testrunner that provide both. `DriverConformance` tests a driver of one's own.
"""

from zreconnect.testing.conformance import DriverConformance
from zreconnect.testing.portforward import Count, Cut, PortForward
from zreconnect.testing.postgres import EmbeddedPostgres, EmbeddedPostgresError, EmbeddedStandby

__all__ = [
    "Count",
    "Cut",
    "DriverConformance",
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "EmbeddedStandby",
    "PortForward",
]
