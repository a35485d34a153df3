"""When a cluster fails over, is a transaction lost, or done twice? How soon do its clients go on?

Usage: PYTHONPATH=. bin/py benchmarks/failover.py [--failovers N] [--witness xid|ledger|both]
       [--maximum S] [--seed N] [--json FILE]

Three PostgreSQL servers under Patroni, synchronous, with an etcd. Processes with several threads
move amounts between accounts, as in soak.py; each thread is a client with one of two drivers and
one of two witnesses, and reaches the cluster directly, with all hosts in its DSN, or through
HAProxy. Meanwhile the primary hands over, or is killed, frozen, or cut off from everybody, in turn.

What is measured of each failover: the seconds until another member has committed its first write
(the cluster's time), and from then until each client has committed its next transfer (the client's
time). At the end a plain connection compares what the clients were told with what is there.

Exits with 1 if a transfer was lost or doubled, if a call raised what it should not or did not
return, or if, with a ledger, an outcome was unknown.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

import psycopg2
import zope.event

import zreconnect
from benchmarks import soak
from zreconnect.testing import EmbeddedHAProxy, EmbeddedPatroni
from zreconnect.testing.patroni import CLUSTER_TIMEOUT

DRIVERS = ("psycopg2", "psycopg")
DIRECT, HAPROXY = "direct", "haproxy"
KINDS = ("switchover", "kill", "freeze", "partition")
# Seconds of silence after which a client leaves its session: the cluster takes 20 to be sure.
RESPONSE_TIMEOUT = 3.0
# Seconds between a cluster that is whole and its next failover.
PAUSE = (1.0, 2.0)
LONGEST_COMMIT = 30.0
POLL_INTERVAL = 0.005
GOAL_ALL, GOAL_P90 = 1.0, 0.3


# The clients: threads of processes of their own


class Client:
    """Makes transfers, one after the other, and takes down what is said of each, and when."""

    def __init__(self, name, dsn, driver, witness, maximum, journal):
        self.name = name
        self._choice = random.Random(name)
        self._journal = journal
        options = {
            "driver": driver,
            "witness": soak.WITNESSES[witness](),
            "policy": zreconnect.RetryPolicy(timeout=soak.PATIENCE, maximum=maximum),
            "response_timeout": RESPONSE_TIMEOUT,
        }
        self._bank = soak.InOne([dsn], options)

    def make_transfers(self, stop):
        for count in itertools.count():
            if stop.is_set():
                break
            identifier = f"{soak.ONE}-{self.name}-{count}"
            source, target = self._choice.sample(range(1, soak.ACCOUNTS + 1), 2)
            amount = self._choice.randint(1, 10)
            started = time.monotonic()
            answer = self._answer(identifier, source, target, amount)
            ended = time.monotonic()
            self._journal.write(answer, identifier, ended - started, ended)
            # So many clients keep two processors busy for no gain.
            time.sleep(0.01)
        self._bank.close()

    def _answer(self, identifier, source, target, amount):
        try:
            self._bank.run(
                lambda: self._bank.transfer(identifier, source, target, amount, lambda: None)
            )
            return "acknowledged"
        except zreconnect.CommitOutcomeUnknown as unknown:
            return "acknowledged" if unknown.outcome == "committed" else "unknown"
        except (zreconnect.DisconnectionError, zreconnect.ReconnectTimeout):
            return "not-done"
        except Exception:
            traceback.print_exc()
            return "unexpected"


def work(number, described, dsns, maximum, seed, journal_path, end):
    """Transfer in a thread for each client until something, or the main process's end, is sent."""
    os.setpgid(0, 0)
    logging.getLogger("zreconnect").addHandler(logging.NullHandler())
    journal = soak.Journal(journal_path)
    zope.event.subscribers.append(journal.see)
    stop = threading.Event()
    clients = [
        Client(f"{route}-{driver}-{witness}-{seed}", dsns[route], driver, witness, maximum, journal)
        for route, driver, witness in described
    ]
    threads = [threading.Thread(target=each.make_transfers, args=(stop,)) for each in clients]
    for thread in threads:
        thread.start()
    try:
        end.recv()
    except EOFError:
        os._exit(1)
    stop.set()
    for thread in threads:
        thread.join()


class Journals:
    """What the clients have taken down, read while they write."""

    def __init__(self, directory):
        self._directory = directory
        self._files = {}
        self.identifiers = defaultdict(list)
        self.lookups = []
        self.longest = 0.0
        # For each client, when its last transfer was acknowledged, and the first after `mark`.
        self.first = {}
        self._mark = float("inf")

    def mark(self, moment):
        self._mark, self.first = moment, {}

    def read(self):
        for path in self._directory.iterdir():
            file = self._files.setdefault(path, path.open())
            # Whole lines: each is one write.
            for line in file:
                self._take(line.split())

    def _take(self, words):
        if words[0] == "lookup":
            self.lookups.append((words[1], float(words[2])))
            return
        answer, identifier, seconds, ended = words[0], words[1], *map(float, words[2:])
        self.identifiers[answer].append(identifier)
        self.longest = max(self.longest, seconds)
        if answer == "acknowledged" and ended >= self._mark:
            self.first.setdefault(identifier.rpartition("-")[0], ended)

    def count(self, answer):
        return len(self.identifiers[answer])


# The failovers


class FirstWrite:
    """Waits for the first write that another member than the primary commits."""

    def __init__(self, cluster, primary):
        self.moment = None
        self._found = threading.Event()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, args=(member,))
            for member in cluster.members
            if member is not primary
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait(self):
        if not self._found.wait(CLUSTER_TIMEOUT):
            raise TimeoutError("no other member has become the primary")
        return self.moment

    def _watch(self, member):
        while not self._stop.is_set():
            with contextlib.suppress(psycopg2.Error):
                self._write_when_it_can(member)
            time.sleep(POLL_INTERVAL)

    def _write_when_it_can(self, member):
        dsn = member.dsn(dbname=soak.DATABASES[0])
        with contextlib.closing(psycopg2.connect(dsn, connect_timeout=2)) as connection:
            connection.autocommit = True
            cursor = connection.cursor()
            while not self._stop.is_set():
                cursor.execute("SELECT pg_is_in_recovery()")
                if cursor.fetchone() == (False,):
                    cursor.execute("UPDATE probe SET n = n + 1")
                    self.moment = time.monotonic()
                    self._found.set()
                    self._stop.set()
                time.sleep(POLL_INTERVAL)


def let_fail(cluster, kind, primary):
    """What happens to the primary."""
    if kind == "switchover":
        cluster.switch_over()
    elif kind == "kill":
        primary.kill_all()
    elif kind == "freeze":
        primary.freeze()
    else:
        primary.partition()


def fail_over(cluster, kind, journals, names):
    """One failover, with what was measured of it; the cluster is whole again at the end."""
    primary = cluster.primary()
    with FirstWrite(cluster, primary) as first_write:
        started = time.monotonic()
        failing = threading.Thread(target=let_fail, args=(cluster, kind, primary))
        failing.start()
        moment = first_write.wait()
        failing.join()
    journals.mark(moment)
    while len(journals.first) < len(names) and time.monotonic() < moment + LONGEST_COMMIT:
        time.sleep(POLL_INTERVAL)
        journals.read()
    clients = {name: journals.first.get(name, float("inf")) - moment for name in names}
    cluster.ensure_running()
    return {"kind": kind, "cluster": moment - started, "clients": clients}


# The whole


@contextlib.contextmanager
def client_processes(dsns, described, options, directory):
    """A process for each route and driver; those that are left at the end are ended."""
    context = multiprocessing.get_context("spawn")
    processes, ends = [], []
    groups = defaultdict(list)
    for each in described:
        groups[each[:2]].append(each)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for number, group in enumerate(groups.values()):
            end, tell_end = context.Pipe(duplex=False)
            path = directory / str(number)
            arguments = (number, group, dsns, options.maximum, options.seed, path, end)
            process = context.Process(target=work, args=arguments, daemon=True)
            process.start()
            processes.append(process)
            ends.append(tell_end)
            end.close()
        signal.signal(signal.SIGINT, handler)
        yield processes, ends
    finally:
        signal.signal(signal.SIGINT, handler)
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def measure(options):
    choice = random.Random(options.seed)
    witnesses = sorted(soak.WITNESSES) if options.witness == "both" else [options.witness]
    described = list(itertools.product((DIRECT, HAPROXY), DRIVERS, witnesses))
    names = [
        f"{soak.ONE}-{route}-{driver}-{witness}-{options.seed}"
        for route, driver, witness in described
    ]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = stack.enter_context(EmbeddedPatroni())
        haproxy = stack.enter_context(EmbeddedHAProxy(cluster))
        primary = cluster.primary()
        soak.open_accounts(primary)
        dbname = soak.DATABASES[0]
        primary.query("CREATE TABLE probe (n int)", dbname=dbname)
        primary.query("INSERT INTO probe VALUES (0)", dbname=dbname)
        dsns = {DIRECT: cluster.dsn(dbname=dbname), HAPROXY: haproxy.dsn(dbname=dbname)}
        journals = Journals(directory)
        with client_processes(dsns, described, options, directory) as (processes, ends):
            journals.mark(0.0)
            while len(journals.first) < len(names):
                time.sleep(POLL_INTERVAL)
                journals.read()
            started = time.monotonic()
            failovers = []
            for number in range(options.failovers):
                time.sleep(choice.uniform(*PAUSE))
                kind = KINDS[number % len(KINDS)]
                failovers.append(fail_over(cluster, kind, journals, names))
                show(failovers[-1])
            seconds = time.monotonic() - started
            for tell_end in ends:
                tell_end.send(None)
            deadline = time.monotonic() + soak.LONGEST_END
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            hanging = sum(process.exitcode != 0 for process in processes)
        journals.read()
        found, _ = soak.audit(cluster, journals)
    found["processes that did not end"] = hanging
    found["unexpected errors"] = journals.count("unexpected")
    return report(options, failovers, journals, found, seconds)


def show(failover):
    times = sorted(failover["clients"].values())
    print(
        f"{failover['kind']:<12}another primary after {failover['cluster']:5.1f} s; clients after "
        f"{statistics.median(times):.2f} s (median), {times[-1]:.2f} s (the last)",
        flush=True,
    )


def report(options, failovers, journals, found, seconds):
    times = sorted(each for failover in failovers for each in failover["clients"].values())
    p90 = times[int(0.9 * (len(times) - 1))]
    unknown = {
        witness: sum(f"-{witness}-" in each for each in journals.identifiers["unknown"])
        for witness in soak.WITNESSES
    }
    figures = {
        "failovers": failovers,
        "median": statistics.median(times),
        "p90": p90,
        "longest": times[-1],
        "acknowledged": journals.count("acknowledged"),
        "not done, and said so": journals.count("not-done"),
        "unknown": unknown,
        "lost COMMITs": dict(Counter(outcome for outcome, _ in journals.lookups)),
        "longest call": journals.longest,
        "seconds": seconds,
        **found,
    }
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        if name != "failovers":
            print(f"{name:<43}{value:.2f}" if isinstance(value, float) else f"{name:<43}{value}")
    print(
        f"{len(failovers)} failovers: lost {found['lost']}, doubled {found['doubled']}, unknown "
        f"{unknown['ledger']} with the ledger and {unknown['xid']} with the transaction id; first "
        f"commit after the new primary's first write: p90 {p90:.2f} s, longest {times[-1]:.2f} s "
        f"(goals: {GOAL_P90}, {GOAL_ALL})"
    )
    is_wrong = any(found.values()) or not journals.count("acknowledged")
    return 1 if is_wrong or unknown["ledger"] else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--failovers", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--witness", choices=[*sorted(soak.WITNESSES), "both"], default="both")
    parser.add_argument(
        "--maximum", type=float, default=0.2, help="of the clients' policy, in seconds"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--json", help="the file to write the figures to")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    print(f"failover: policy's maximum {options.maximum} s, seed {options.seed}", flush=True)
    try:
        return measure(options)
    except KeyboardInterrupt:
        print("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
