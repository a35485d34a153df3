"""The sweeps of `test_exactly_once` through HAProxy: nothing lost or doubled, and with the ledger
nothing unknown; and ten innocent clients beside it lose nothing.

The line is cut between the program and HAProxy, which ends its own session with the server then,
sooner or later. But for COMMIT there are few cuts, unless ZRECONNECT_SWEEP=full is in the
environment.
"""

import unittest

from zreconnect.testing.layers import HAProxyLayer, PortForwardLayer, PostgresLayer
from zreconnect.tests.base import on_haproxy
from zreconnect.tests.test_exactly_once import SETTINGS, SweepLayer
from zreconnect.tests.test_pooled_exactly_once import LedgerTestCase, PooledLane, XidTestCase


def sweep_layer():
    lines = []
    for n in (1, 2):
        server = PostgresLayer(f"BalancedSweep{n}Layer", SETTINGS)
        balancer = HAProxyLayer(server, f"BalancedSweep{n}HAProxyLayer")
        lines.append(PortForwardLayer(balancer, f"BalancedSweep{n}ForwardLayer"))
    layer = SweepLayer(*lines)
    layer.__name__ = "BalancedSweepLayer"
    return layer


LAYER = sweep_layer()


class BalancedLane(PooledLane):
    # HAProxy gives nobody the process of somebody else.
    def crash(self, raw):
        return super(PooledLane, self).crash(raw)


class BalancedTests:
    lane = BalancedLane


@on_haproxy(LAYER)
class Psycopg2Tests(BalancedTests, LedgerTestCase, unittest.TestCase):
    driver = "psycopg2"


@on_haproxy(LAYER)
class PsycopgTests(BalancedTests, XidTestCase, unittest.TestCase):
    driver = "psycopg"
    begins_with_statement = True
