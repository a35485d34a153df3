"""Is a transaction ever lost, or done twice? Transfers of money under faults of every kind.

Usage: bin/py benchmarks/soak.py [--seconds S] [--witness xid|ledger] [--seed N]

Processes with several threads each move amounts between accounts, every transfer under an id of its
own, through zreconnect and through a forwarder for each process, while the server and the lines
to it are made to fail every second or two. What each call of `run` said is kept in a file before
the next call. At the end a plain connection compares: the sum of the balances has not changed,
they agree with the transfers, each acknowledged transfer is there once, none is there that was
said not to be done.

The seed decides on the faults and the transfers, though not on the moment at which they meet.
Exits with 1 if a transfer was lost or doubled, if a call raised what it should not or did not
return, or if, with a ledger, an outcome was unknown.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from bisect import bisect_right
from collections import Counter, defaultdict
from pathlib import Path

import zope.event

import zreconnect
from zreconnect.events import CommitLookedUp, ConnectionLost
from zreconnect.testing import EmbeddedPostgres, PortForward
from zreconnect.tests import faults

PROCESSES = 4
THREADS = 4
ACCOUNTS = 100
OPENING_BALANCE = 1000
ATTEMPTS = 10
# Seconds that a call may wait for a connection, and that the last calls may take at the end.
PATIENCE = 60.0
LONGEST_END = 3 * PATIENCE
PAUSE_BETWEEN_FAULTS = (0.5, 2.0)

WITNESSES = {"xid": lambda: "xid", "ledger": zreconnect.Ledger}


# The accounts


def open_accounts(server):
    # Without a unique constraint, so that a transfer that is done twice is there twice.
    server.query("CREATE TABLE transfer (id text, source int, target int, amount int)")
    server.query("CREATE INDEX ON transfer (id)")
    server.query("CREATE TABLE account (id int PRIMARY KEY, balance int)")
    server.query(
        "INSERT INTO account SELECT id, %s FROM generate_series(1, %s) id",
        OPENING_BALANCE,
        ACCOUNTS,
    )


def transfer(connection, identifier, source, target, amount):
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO transfer VALUES (%s, %s, %s, %s)", (identifier, source, target, amount)
        )
        change = "UPDATE account SET balance = balance + %s WHERE id = %s"
        cursor.execute(change, (-amount, source))
        cursor.execute(change, (amount, target))


# The workers: processes of their own


class Journal:
    """What a worker process was told, in a file that nothing but the end of the machine loses."""

    def __init__(self, path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._lost = threading.local()

    def write(self, *words):
        os.write(self._file, " ".join(map(str, words)).encode() + b"\n")

    def see(self, event):
        """A subscriber; events come in the thread whose connection they are about."""
        if isinstance(event, ConnectionLost):
            self._lost.at = time.monotonic()
        elif isinstance(event, CommitLookedUp):
            self.write("lookup", event.outcome, self._lost.at)


def work(number, dsn, witness, seed, journal_path, end):
    """Transfer in several threads until something, or the end of the main process, is sent."""
    logging.getLogger("zreconnect").addHandler(logging.NullHandler())
    journal = Journal(journal_path)
    zope.event.subscribers.append(journal.see)
    stop = threading.Event()
    threads = [
        threading.Thread(
            target=make_transfers, args=(f"{seed}-{number}-{name}", dsn, witness, journal, stop)
        )
        for name in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    try:
        end.recv()
    except EOFError:
        os._exit(1)
    stop.set()
    for thread in threads:
        thread.join()


def make_transfers(name, dsn, witness, journal, stop):
    choice = random.Random(name)
    policy = zreconnect.RetryPolicy(timeout=PATIENCE)
    connection = zreconnect.connect(dsn, policy=policy, witness=WITNESSES[witness]())
    for count in itertools.count():
        if stop.is_set():
            break
        identifier = f"{name}-{count}"
        source, target = choice.sample(range(1, ACCOUNTS + 1), 2)
        started = time.monotonic()
        try:
            connection.run(
                transfer,
                *(connection, identifier, source, target, choice.randint(1, 10)),
                attempts=ATTEMPTS,
            )
            answer = "acknowledged"
        except zreconnect.CommitOutcomeUnknown:
            answer = "unknown"
        except (zreconnect.DisconnectionError, zreconnect.ReconnectTimeout):
            answer = "not-done"
        except Exception:
            answer = "unexpected"
            traceback.print_exc()
        journal.write(answer, identifier, time.monotonic() - started)
    connection.close()


FAULTS = [
    faults.fast_restart,
    faults.immediate_stop,
    faults.kill_of_all,
    faults.kill_of_a_backend,
    faults.terminated_backend,
    faults.suspended_backend,
    faults.drop_by_fin,
    faults.drop_by_rst,
    faults.refusal,
    faults.silence_and_drop,
    faults.silence,
    faults.delay,
    faults.cut_at_a_byte,
    faults.cut_and_kill,
]


# The audit


class Answers:
    """What the journals say."""

    def __init__(self, directory):
        self.identifiers = defaultdict(list)
        self.lookups = []
        self.longest = 0.0
        for path in directory.iterdir():
            for line in path.read_text().splitlines():
                kind, what, number = line.split()
                if kind == "lookup":
                    self.lookups.append((what, float(number)))
                else:
                    self.identifiers[kind].append(what)
                    self.longest = max(self.longest, float(number))

    def count(self, kind):
        return len(self.identifiers[kind])


def audit(server, answers):
    """The counts of what must not be and of what is unknown, from a plain connection."""
    there = Counter(identifier for (identifier,) in server.query("SELECT id FROM transfer"))
    acknowledged = set(answers.identifiers["acknowledged"])
    unknown = set(answers.identifiers["unknown"])
    found = {
        "lost": len(acknowledged - there.keys()),
        "doubled": sum(count > 1 for count in there.values()),
        "done although said not to be": len(there.keys() - acknowledged - unknown),
    }
    ((total,),) = server.query("SELECT sum(balance) FROM account")
    found["change of the sum of balances"] = total - ACCOUNTS * OPENING_BALANCE
    found["balances that disagree with the transfers"] = len(
        server.query(
            "SELECT id FROM account WHERE balance - %s <>"
            " (SELECT coalesce(sum(amount), 0) FROM transfer WHERE target = account.id)"
            " - (SELECT coalesce(sum(amount), 0) FROM transfer WHERE source = account.id)",
            OPENING_BALANCE,
        )
    )
    return found, len(unknown & there.keys())


def wait_for_end_of_sessions(server):
    """The number of sessions that are left when the workers have ended."""
    deadline = time.monotonic() + PATIENCE
    while (left := server.backend_pids()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(left)


def show_lookups(answers, happened):
    """For each kind of fault, how often a COMMIT was lost to it and what became of it."""
    moments = [fault.moment for fault in happened]
    outcomes = defaultdict(Counter)
    for outcome, moment in answers.lookups:
        before = bisect_right(moments, moment)
        outcomes[happened[before - 1].name if before else "no fault"][outcome] += 1
    header = f"{'fault':<20}{'times':>6}{'lost COMMITs':>14}"
    print(header + "".join(f"{each:>11}" for each in ("committed", "aborted", "unknown")))
    times = Counter(fault.name for fault in happened)
    for name in sorted(times.keys() | outcomes.keys()):
        line = f"{name:<20}{times[name]:>6}{outcomes[name].total():>14}"
        each = (f"{outcomes[name][outcome]:>11}" for outcome in ("committed", "aborted", "unknown"))
        print(line + "".join(each))
    total = sum(outcomes.values(), Counter())
    print(f"{'all':<20}{len(happened):>6}{total.total():>14}", end="")
    print("".join(f"{total[outcome]:>11}" for outcome in ("committed", "aborted", "unknown")))


# The whole


@contextlib.contextmanager
def worker_processes(lines, server, options, directory):
    """Worker processes; those that are left at the end are ended."""
    context = multiprocessing.get_context("spawn")
    workers = []
    # An interrupt from the keyboard is for the main process alone.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for number, line in enumerate(lines):
            dsn = server.dsn(port=line.port)
            end, tell_end = context.Pipe(duplex=False)
            arguments = (number, dsn, options.witness, options.seed, directory / str(number), end)
            process = context.Process(target=work, args=arguments, daemon=True)
            process.start()
            workers.append((process, tell_end))
            end.close()
        signal.signal(signal.SIGINT, handler)
        yield workers
    finally:
        signal.signal(signal.SIGINT, handler)
        for process, _ in workers:
            process.terminate()
            process.join()


def soak(options):
    choice = random.Random(options.seed)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(EmbeddedPostgres())
        lines = [
            stack.enter_context(PortForward(server.host, server.port)) for _ in range(PROCESSES)
        ]
        open_accounts(server)
        with worker_processes(lines, server, options, directory) as workers:
            while not all((directory / str(number)).exists() for number in range(PROCESSES)):
                time.sleep(0.01)
            started = time.monotonic()
            happened = faults.make_faults(
                FAULTS, PAUSE_BETWEEN_FAULTS, options.seconds, server, lines, choice
            )
            seconds = time.monotonic() - started
            for _, tell_end in workers:
                tell_end.send(None)
            deadline = time.monotonic() + LONGEST_END
            for process, _ in workers:
                process.join(max(0.0, deadline - time.monotonic()))
            hanging = sum(process.exitcode != 0 for process, _ in workers)
        left = wait_for_end_of_sessions(server)
        answers = Answers(directory)
        found, committed = audit(server, answers)
        found["worker processes that did not end"] = hanging
        found["sessions left"] = left
        found["unexpected errors"] = answers.count("unexpected")
        return report(options, answers, happened, seconds, found, committed)


def report(options, answers, happened, seconds, found, committed):
    show_lookups(answers, happened)
    acknowledged, unknown = answers.count("acknowledged"), answers.count("unknown")
    print(f"seconds                                    {seconds:.1f}")
    print(f"transactions acknowledged                  {acknowledged}")
    print(f"transactions per second                    {acknowledged / seconds:.0f}")
    print(f"not done, and said so                      {answers.count('not-done')}")
    for name, count in found.items():
        print(f"{name:<43}{count}")
    print(f"unknown                                    {unknown} ({committed} were committed)")
    print(f"longest call                               {answers.longest:.2f} s")
    is_wrong = any(found.values()) or not acknowledged
    return 1 if is_wrong or (unknown and options.witness == "ledger") else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--witness", choices=sorted(WITNESSES), default="xid")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    # So that what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    print(f"soak: {PROCESSES} processes with {THREADS} threads, ", end="")
    print(f"witness {options.witness}, seed {options.seed}", flush=True)
    try:
        return soak(options)
    except KeyboardInterrupt:
        print("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
