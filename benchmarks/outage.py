"""How long begin() takes beside an outage: after the server is back, and until it gives up.

Usage: bin/py benchmarks/outage.py [TRIES] [SECONDS]

Each try shuts the server down for SECONDS (default 10) while begin() waits, and measures the time
from the moment the server accepts connections again, as a client of its own finds out, until
begin() returns. Then begin() with a timeout of 2 seconds meets a host that refuses, and one that
is silent. Exits with 1 if one of them takes longer than it may: 1 second, and 3 seconds.
"""

import statistics
import sys
import threading
import time

import zreconnect
from zreconnect.testing import EmbeddedPostgres, PortForward


def seconds_to_begin(server, dsn, away):
    """The seconds from the server's return until begin() returned."""
    connection = zreconnect.connect(dsn)
    connection.begin()
    connection.rollback()
    server.shut_down()
    begun = []

    def begin():
        connection.begin()
        begun.append(time.monotonic())

    thread = threading.Thread(target=begin)
    thread.start()
    time.sleep(away)
    server.start()
    accepting = time.monotonic()
    thread.join()
    connection.close()
    return begun[0] - accepting


def seconds_to_give_up(dsn):
    connection = zreconnect.connect(dsn, policy=zreconnect.RetryPolicy(timeout=2))
    started = time.monotonic()
    try:
        connection.begin()
    except zreconnect.ReconnectTimeout:
        return time.monotonic() - started
    raise AssertionError("begin() returned")


def main(tries=20, away=10.0):
    with EmbeddedPostgres() as server, PortForward(server.host, server.port) as forward:
        waits = []
        for number in range(1, tries + 1):
            waits.append(seconds_to_begin(server, server.dsn(), away))
            print(f"try {number}: begin() returned {waits[-1]:+.3f} s after the return", flush=True)
        dsn = server.dsn(port=forward.port)
        forward.refuse()
        refused = [seconds_to_give_up(dsn) for _ in range(5)]
        forward.accept()
        forward.silence()
        silent = [seconds_to_give_up(dsn) for _ in range(5)]
    print(f"after {away} s: median {statistics.median(waits):.3f} s, largest {max(waits):.3f} s")
    print(f"timeout of 2 s, refusing host: largest {max(refused):.3f} s")
    print(f"timeout of 2 s, silent host: largest {max(silent):.3f} s")
    return 0 if max(waits) < 1 and max(refused + silent) < 3 else 1


if __name__ == "__main__":
    sys.exit(main(*(kind(value) for kind, value in zip((int, float), sys.argv[1:], strict=False))))
