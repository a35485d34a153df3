"""Reserve a TCP port of 127.0.0.1 for somebody who listens on it later, or not all the time."""

from __future__ import annotations

import socket

LOCALHOST = "127.0.0.1"


def bind(port: int = 0) -> socket.socket:
    """Return a TCP socket that is bound to `port` of 127.0.0.1, or to a free port if it is 0.

    As long as it is open and does not listen, a connection to the port is refused, the kernel
    gives the port to nobody else, not even as the source port of an outgoing connection (a client
    that tries a closed port again and again could otherwise connect to itself), and whoever sets
    SO_REUSEADDR, as PostgreSQL does, can listen on it. Raises OSError if the port is taken.
    """
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((LOCALHOST, port))
    except BaseException:
        bound.close()
        raise
    return bound
