"""What a healthy transaction costs beside plain psycopg2: seconds, and round trips on the wire.

Both connections take turns in one run, so that the machine's noise meets both; the medians are
those of the ratios of neighbouring turns. Usage: bin/py benchmarks/overhead.py [TURNS]
"""

import statistics
import sys
import time

import psycopg2

import zreconnect
from zreconnect.testing import EmbeddedPostgres, PortForward

TRANSACTIONS = 50


def transaction(connection):
    cursor = connection.cursor()
    cursor.execute("SELECT 1")
    cursor.fetchall()
    cursor.close()
    connection.commit()


def seconds(connection):
    started = time.perf_counter()
    for _ in range(TRANSACTIONS):
        transaction(connection)
    return (time.perf_counter() - started) / TRANSACTIONS


def round_trips(connection, forward):
    transaction(connection)
    before = forward.count()
    transaction(connection)
    return (forward.count() - before).round_trips


def main(turns):
    with EmbeddedPostgres() as server, PortForward(server.host, server.port) as forward:
        through = server.dsn(port=forward.port)
        for name, connection in [
            ("psycopg2", psycopg2.connect(through)),
            ("zreconnect", zreconnect.connect(through)),
        ]:
            print(f"{name}: {round_trips(connection, forward)} round trips for a transaction")
            connection.close()
        plain, ours = psycopg2.connect(server.dsn()), zreconnect.connect(server.dsn())
        transaction(plain), transaction(ours)
        turns = [(seconds(plain), seconds(ours)) for _ in range(turns)]
        plain.close()
        ours.close()
    for name, values in zip(("psycopg2", "zreconnect"), zip(*turns, strict=True), strict=True):
        print(f"{name}: {statistics.median(values) * 1e6:.0f} µs for a transaction (median)")
    ratios = statistics.quantiles([ours / plain for plain, ours in turns], n=20)
    print(f"zreconnect / psycopg2: {ratios[9]:.3f} (median; {ratios[0]:.3f} to {ratios[18]:.3f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
