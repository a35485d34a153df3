"""Layers for zope.testrunner: one server, and a bad line to it, for many tests.

Name one of the layers in a test case::

    from zreconnect.testing.layers import PORT_FORWARD_LAYER

    class BadLine(unittest.TestCase):
        layer = PORT_FORWARD_LAYER

        def test_disconnect(self):
            connection = psycopg2.connect(self.layer.dsn())
            self.layer.forward.drop()
            ...

The server is started before the first such test and ended after the last. A test may crash the
server, suspend its processes and leave the line in any state: the next test finds both in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

from zreconnect.testing.embedded import EmbeddedServer
from zreconnect.testing.galera import EmbeddedGalera
from zreconnect.testing.haproxy import EmbeddedHAProxy
from zreconnect.testing.mariadb import EmbeddedMariaDB
from zreconnect.testing.patroni import EmbeddedPatroni
from zreconnect.testing.pgbouncer import EmbeddedPgBouncer
from zreconnect.testing.portforward import PortForward
from zreconnect.testing.postgres import EmbeddedPostgres


class Startable(Protocol):
    """What a layer can have: a server, or several that belong together."""

    def start(self) -> object: ...

    def stop(self) -> None: ...

    def ensure_running(self) -> None: ...


Server = TypeVar("Server", bound=Startable)


class StartingLayer(Generic[Server]):
    """Starts what its class makes for all tests that name this layer."""

    #: The server, or the cluster, while the layer is set up.
    server: Server

    def __init__(self, name: str | None = None, *bases: StartingLayer[Any]) -> None:
        self.__name__ = name or type(self).__name__
        self.__bases__: tuple[Any, ...] = bases

    def make(self) -> Server:
        """What is to be started."""
        raise NotImplementedError

    def setUp(self) -> None:
        """Start the server."""
        self.server = self.make()
        self.server.start()

    def tearDown(self) -> None:
        """End the server and remove its data."""
        self.server.stop()
        del self.server

    def testTearDown(self) -> None:
        """Make sure that all runs for the next test, whatever this one did to it."""
        for base in self.__bases__:
            base.server.ensure_running()
        self.server.ensure_running()


class ServerLayer(StartingLayer[Any]):
    """Starts one server for all tests that name this layer.

    Make another one, with a name of its own, for other `settings` of the server.
    """

    server_class: type[EmbeddedServer]
    server: EmbeddedServer

    def __init__(
        self, name: str | None = None, settings: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(name)
        self._settings = settings

    def make(self) -> EmbeddedServer:
        """A server with the settings."""
        return self.server_class(settings=self._settings)


class PostgresLayer(ServerLayer):
    """Starts one EmbeddedPostgres for all tests that name this layer."""

    server_class = EmbeddedPostgres
    server: EmbeddedPostgres


class MariaDBLayer(ServerLayer):
    """Starts one EmbeddedMariaDB for all tests that name this layer."""

    server_class = EmbeddedMariaDB
    server: EmbeddedMariaDB


class PgBouncerLayer(StartingLayer[EmbeddedPgBouncer]):
    """Puts one EmbeddedPgBouncer before the server of a PostgresLayer.

    Its `server` is the EmbeddedPgBouncer. Put a PortForwardLayer on this one for a line to it.
    """

    def __init__(
        self,
        base: PostgresLayer,
        pool_mode: str,
        name: str | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(name, base)
        self._base = base
        self._pool_mode = pool_mode
        self._settings = settings

    def make(self) -> EmbeddedPgBouncer:
        """A pooler of the mode, before the server."""
        return EmbeddedPgBouncer(self._base.server, self._pool_mode, self._settings)


class PatroniLayer(StartingLayer[EmbeddedPatroni]):
    """Starts one EmbeddedPatroni for all tests that name this layer.

    Make another one, with a name of its own, for another `configuration` of Patroni's.
    """

    def __init__(
        self, name: str | None = None, configuration: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(name)
        self._configuration = configuration

    def make(self) -> EmbeddedPatroni:
        """A cluster with the configuration."""
        return EmbeddedPatroni(self._configuration)


class GaleraLayer(StartingLayer[EmbeddedGalera]):
    """Starts one EmbeddedGalera for all tests that name this layer."""

    def make(self) -> EmbeddedGalera:
        """A cluster."""
        return EmbeddedGalera()


class HAProxyLayer(StartingLayer[EmbeddedHAProxy]):
    """Puts one EmbeddedHAProxy before the server of a PostgresLayer, or a PatroniLayer's cluster.

    Its `server` is the EmbeddedHAProxy. Put a PortForwardLayer on this one for a line to it.
    """

    def __init__(self, base: PostgresLayer | PatroniLayer, name: str | None = None) -> None:
        super().__init__(name, base)
        self._base = base

    def make(self) -> EmbeddedHAProxy:
        """A proxy before the server."""
        return EmbeddedHAProxy(self._base.server)


class PortForwardLayer:
    """Puts one PortForward before the server of a ServerLayer, PgBouncerLayer or HAProxyLayer."""

    #: The forwarder, while the layer is set up.
    forward: PortForward

    def __init__(self, base: StartingLayer[Any], name: str = "PortForwardLayer") -> None:
        self.__name__ = name
        self.__bases__: tuple[object, ...] = (base,)
        self._base = base

    @property
    def server(self) -> EmbeddedServer:
        """The server that is forwarded to."""
        server: EmbeddedServer = self._base.server
        return server

    def dsn(self, user: str | None = None, dbname: str | None = None) -> str:
        """Return the URL to connect with through the forwarder."""
        return self.server.dsn(user, dbname, self.forward.host, self.forward.port)

    def setUp(self) -> None:
        """Start the forwarder."""
        self.forward = PortForward(self.server.host, self.server.port)
        self.forward.start()

    def tearDown(self) -> None:
        """Stop the forwarder."""
        self.forward.stop()
        del self.forward

    def testSetUp(self) -> None:
        """Let the forwarder accept and forward all at once, without connections or a cut."""
        self.forward.cancel_cut()
        self.forward.drop()
        self.forward.delay(0)
        self.forward.throttle(None)
        self.forward.resume()
        self.forward.accept()

    def testTearDown(self) -> None:
        """End what connections the test has left."""
        self.forward.drop()


POSTGRES_LAYER = PostgresLayer()
PORT_FORWARD_LAYER = PortForwardLayer(POSTGRES_LAYER)
MARIADB_LAYER = MariaDBLayer()
MARIADB_PORT_FORWARD_LAYER = PortForwardLayer(MARIADB_LAYER, "MariaDBPortForwardLayer")
