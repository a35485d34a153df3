"""The compliance suite gets connections that reconnect."""

from functools import partial

import zreconnect
from suites.through.dbapi_tests import DRIVER, DSN, ComplianceTests

ComplianceTests.connect = staticmethod(
    partial(zreconnect.connect, DSN, driver=DRIVER, policy=zreconnect.FAIL_FAST)
)
