"""Tools to test how a program bears the loss of its database.

`EmbeddedPostgres` and `EmbeddedMariaDB` are servers to crash, `EmbeddedPatroni` and
`EmbeddedGalera` are clusters of them, `EmbeddedPgBouncer` is a pooler, `EmbeddedHAProxy` a load
balancer, `PortForward` is a line to cut. `zreconnect.testing.layers` has layers for zope.testrunner
that provide them, `zreconnect.integrations.pytest` fixtures. `losing` is for unit tests without a
server. `DriverConformance` tests a driver of one's own.

PostgreSQL comes with `pip install "zreconnect[embedded]"`. MariaDB needs `"zreconnect[pymysql]"`,
and a package of Debian's, as the others do that their classes name.
"""

from zreconnect.testing.conformance import DriverConformance
from zreconnect.testing.embedded import EmbeddedServer, EmbeddedServerError
from zreconnect.testing.galera import EmbeddedGalera, EmbeddedGaleraError, GaleraNode
from zreconnect.testing.haproxy import EmbeddedHAProxy, EmbeddedHAProxyError
from zreconnect.testing.lines import Line, line_to_fresh_database
from zreconnect.testing.losing import losing, no_waiting
from zreconnect.testing.mariadb import EmbeddedMariaDB, EmbeddedMariaDBError
from zreconnect.testing.patroni import EmbeddedPatroni, EmbeddedPatroniError, PatroniMember
from zreconnect.testing.pgbouncer import EmbeddedPgBouncer, EmbeddedPgBouncerError
from zreconnect.testing.portforward import Count, Cut, PortForward
from zreconnect.testing.postgres import EmbeddedPostgres, EmbeddedPostgresError, EmbeddedStandby

__all__ = [
    "Count",
    "Cut",
    "DriverConformance",
    "EmbeddedGalera",
    "EmbeddedGaleraError",
    "EmbeddedHAProxy",
    "EmbeddedHAProxyError",
    "EmbeddedMariaDB",
    "EmbeddedMariaDBError",
    "EmbeddedPatroni",
    "EmbeddedPatroniError",
    "EmbeddedPgBouncer",
    "EmbeddedPgBouncerError",
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "EmbeddedServer",
    "EmbeddedServerError",
    "EmbeddedStandby",
    "GaleraNode",
    "Line",
    "PatroniMember",
    "PortForward",
    "line_to_fresh_database",
    "losing",
    "no_waiting",
]
