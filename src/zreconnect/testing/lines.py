"""A bad line to a database of one's own, for one test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from urllib.parse import urlsplit

from zreconnect.testing.embedded import EmbeddedServer
from zreconnect.testing.portforward import PortForward


class Line(PortForward):
    """A `PortForward` before a server, and the database that it leads to.

    server: an `EmbeddedPostgres`, or another embedded server. dbname: the name of the database;
    None stands for the server's first one.
    """

    def __init__(self, server: EmbeddedServer, dbname: str | None = None) -> None:
        super().__init__(server.host, server.port)
        self.server = server
        self.dbname = dbname

    def dsn(self, user: str | None = None, dbname: str | None = None) -> str:
        """Return the URL to connect with through the line; see `EmbeddedServer.dsn`."""
        return self.server.dsn(user, dbname or self.dbname, self.host, self.port)


@contextlib.contextmanager
def line_to_fresh_database(server: EmbeddedServer) -> Iterator[Line]:
    """A `Line`, in the block, to a database that is empty at its beginning and gone after its end.

    The block may crash the server, suspend its processes, and leave the line in any state.

    Raises what starting the server again raises, and the database module's errors.
    """
    dbname = urlsplit(server.fresh_database()).path[1:]
    try:
        with Line(server, dbname) as line:
            yield line
    finally:
        server.ensure_running()
        server.drop_database(dbname)
