"""Is a transaction ever lost, or done twice? Transfers of money under faults of every kind.

Usage: bin/py benchmarks/soak.py [--seconds S] [--witness xid|ledger] [--seed N]

Processes with several threads each move amounts between accounts, every transfer under an id of its
own, through zreconnect and through a forwarder for each process, while the server and the lines
to it are made to fail every second or two. Some transfers lead from one database to another, in one
transaction, of two phases or of one phase each. The processes are interrupted, by signals whose
handler raises, and they fork in the middle of transfers; the children make some of their own, with
the connections that they find. What each call of `run` said is kept in a file before the next call.
At the end a plain connection compares: the sum of the balances has not changed, they agree with the
transfers, each acknowledged transfer is there once, none is there that was said not to be done, and
none is in one database alone, but those of which that was said.

What two-phase commits have left prepared is settled by `recover`, as an operator would do it.

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
from collections import Counter, defaultdict, deque
from functools import partial
from pathlib import Path

import transaction
import zope.event

import zreconnect
from zreconnect.events import CommitLookedUp, ConnectionLost
from zreconnect.testing import EmbeddedPostgres, PortForward
from zreconnect.tests import faults

PROCESSES = 4
DATABASES = ("first", "second")
# How the threads of a process make their transfers. The first is another one in each process, for
# it is its main thread, which is interrupted.
ONE, TWO_PHASES, ONE_PHASE_EACH = "one", "two_phases", "one_phase_each"
WAYS = (ONE, TWO_PHASES, ONE_PHASE_EACH, ONE)
THREADS = len(WAYS)
SETTINGS = {"max_prepared_transactions": PROCESSES * THREADS, "max_connections": 200}
TRANSFERS_OF_A_CHILD = 3
# Seconds after which what is still prepared is not being committed any more.
LONGEST_PREPARED = 20.0
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
    for dbname in DATABASES:
        server.create_database(dbname)
        query = partial(server.query, dbname=dbname)
        # Without a unique constraint, so that a transfer that is done twice is there twice.
        query("CREATE TABLE transfer (id text, source int, target int, amount int)")
        query("CREATE INDEX ON transfer (id)")
        query("CREATE TABLE account (id int PRIMARY KEY, balance int)")
        query(
            "INSERT INTO account SELECT id, %s FROM generate_series(1, %s) id",
            OPENING_BALANCE,
            ACCOUNTS,
        )


INSERT = "INSERT INTO transfer VALUES (%s, %s, %s, %s)"
CHANGE = "UPDATE account SET balance = balance + %s WHERE id = %s"


class InOne:
    """Transfers in the first database, through a connection's own ``run``."""

    def __init__(self, dsns, options):
        self._connection = zreconnect.connect(dsns[0], **options)
        self.run = partial(self._connection.run, attempts=ATTEMPTS)
        self.undo = self._connection.rollback
        self.close = self._connection.close

    def transfer(self, identifier, source, target, amount, between):
        with self._connection.cursor() as cursor:
            cursor.execute(INSERT, (identifier, source, target, amount))
            between()
            cursor.execute(CHANGE, (-amount, source))
            cursor.execute(CHANGE, (amount, target))


class FromOneToTheOther:
    """Transfers from the first database to the second, in one transaction."""

    def __init__(self, dsns, options, two_phase):
        self._descriptors = [
            zreconnect.ConnectionDescriptor(dsn, two_phase=two_phase, **options) for dsn in dsns
        ]
        self.run = partial(transaction.manager.run, tries=ATTEMPTS)
        self.undo = transaction.abort

    def transfer(self, identifier, source, target, amount, between):
        first, second = (each.connection() for each in self._descriptors)
        with first.cursor() as cursor:
            cursor.execute(INSERT, (identifier, source, None, amount))
            cursor.execute(CHANGE, (-amount, source))
        between()
        with second.cursor() as cursor:
            cursor.execute(INSERT, (identifier, None, target, amount))
            cursor.execute(CHANGE, (amount, target))

    def close(self):
        for each in self._descriptors:
            each.close()


MAKERS = {
    ONE: InOne,
    TWO_PHASES: partial(FromOneToTheOther, two_phase=True),
    ONE_PHASE_EACH: partial(FromOneToTheOther, two_phase=False),
}


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
            # A commit that was interrupted is looked up without having been lost.
            self.write("lookup", event.outcome, getattr(self._lost, "at", time.monotonic()))


class Interrupted(Exception):
    """What the handler of a signal raises."""


class InterruptedForGood(BaseException):
    """The same, as KeyboardInterrupt is raised."""


INTERRUPTS = (Interrupted, InterruptedForGood)
HOME = str(Path(zreconnect.__file__).parent) + os.sep
# An exception between two lines of these leaves a lock locked.
NOT_INTERRUPTED = (logging.__file__, threading.__file__)


class Interrupts:
    """Raises in the main thread, where a call of zreconnect's is under way, and only there: what
    comes after it the program would not have been told."""

    def __init__(self, choice):
        self._choice = choice
        self.is_wanted = False

    def handle(self, number, frame):
        stack = []
        while frame is not None:
            stack.append(frame.f_code)
            frame = frame.f_back
        if (
            self.is_wanted
            and stack[0].co_filename not in NOT_INTERRUPTED
            and not any(function.__code__ in stack for function in UNINTERRUPTED)
            and any(code.co_filename.startswith(HOME) for code in stack)
        ):
            # Once: `transaction` calls no data manager's abort() again that was interrupted, and so
            # could not be told what it has found.
            self.is_wanted = False
            raise self._choice.choice(INTERRUPTS)

    @staticmethod
    def hide_ignored(unraisable):
        """What is raised in a finalizer, the interpreter swallows."""
        if not isinstance(unraisable.exc_value, INTERRUPTS):
            sys.__unraisablehook__(unraisable)


class Forks:
    """Forks where a thread asks, once for each signal."""

    def __init__(self):
        self._wanted = deque()
        self._children = []

    def handle(self, number, frame):
        self._wanted.append(number)

    def fork_if_wanted(self, child):
        """In the child, call the function, and end."""
        with contextlib.suppress(IndexError):
            self._wanted.pop()
            pid = os.fork()
            if pid:
                self._children.append(pid)
                return
            status = 1
            try:
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)
                self._wanted.clear()
                child()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def failed(self):
        """Wait for all children; how many have failed."""
        return sum(os.waitpid(pid, 0)[1] != 0 for pid in self._children)


# What is raised in these becomes another exception, or is ignored.
UNINTERRUPTED = (Forks.fork_if_wanted, threading.Thread.start)


def work(number, dsns, witness, seed, journal_path, end):
    """Transfer in several threads until something, or the end of the main process, is sent."""
    # Whoever ends this process ends its children, too.
    os.setpgid(0, 0)
    for name in ("zreconnect", "txn"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    interrupts, forks = Interrupts(random.Random(f"{seed}-{number}")), Forks()
    sys.unraisablehook = interrupts.hide_ignored
    signal.signal(signal.SIGUSR1, interrupts.handle)
    signal.signal(signal.SIGUSR2, forks.handle)
    journal = Journal(journal_path)
    zope.event.subscribers.append(journal.see)
    stop = threading.Event()

    def wait_for_end():
        try:
            end.recv()
        except EOFError:
            os._exit(1)
        stop.set()

    options = {"policy": zreconnect.RetryPolicy(timeout=PATIENCE), "witness": WITNESSES[witness]()}
    tellers = [
        Teller(f"{seed}-{number}-{n}", WAYS[(number + n) % THREADS], dsns, options, journal, forks)
        for n in range(THREADS)
    ]
    threads = [
        threading.Thread(target=teller.make_transfers, args=(stop,)) for teller in tellers[1:]
    ]
    threads.append(threading.Thread(target=wait_for_end))
    for thread in threads:
        thread.start()
    tellers[0].interrupts = interrupts
    tellers[0].make_transfers(stop)
    for thread in threads:
        thread.join()
    sys.exit(forks.failed())


class Teller:
    """Makes transfers, one after the other, and takes down what is said of each.

    interrupts: those of the main thread; None in another one.
    """

    def __init__(self, name, way, dsns, options, journal, forks):
        self._name = name
        self._way = way
        self._choice = random.Random(name)
        self._bank = MAKERS[way](dsns, options)
        self._journal = journal
        self._forks = forks
        self.interrupts = None

    def make_transfers(self, stop):
        for count in itertools.count():
            if stop.is_set():
                break
            self._forks.fork_if_wanted(partial(self._be_a_child, count))
            self._make_transfer(str(count), lambda count=count: self._be_a_child(count))
        self._bank.close()

    def _be_a_child(self, count):
        """The session is the parent's, and so is a transaction that it has begun."""
        self._bank.undo()
        for number in range(TRANSFERS_OF_A_CHILD):
            self._make_transfer(f"{count}-child-{os.getpid()}-{number}", lambda: None)

    def _make_transfer(self, count, child):
        identifier = f"{self._way}-{self._name}-{count}"
        source, target = self._choice.sample(range(1, ACCOUNTS + 1), 2)
        amount = self._choice.randint(1, 10)

        def transfer():
            self._bank.transfer(
                *(identifier, source, target, amount),
                lambda: self._forks.fork_if_wanted(child),
            )

        started = time.monotonic()
        answer = self._answer(transfer)
        if self.interrupts is not None:
            self.interrupts.is_wanted = False
        self._journal.write(answer, identifier, time.monotonic() - started)

    def _answer(self, transfer):
        """What is said of a transfer, in one word."""
        try:
            try:
                if self.interrupts is not None:
                    self.interrupts.is_wanted = True
                self._bank.run(transfer)
            except INTERRUPTS:
                self._bank.undo()
                return "not-done"
            return "acknowledged"
        except zreconnect.CommitOutcomeUnknown as unknown:
            if self._way == ONE_PHASE_EACH:
                return "in-part"
            return "acknowledged" if unknown.outcome == "committed" else "unknown"
        except (zreconnect.DisconnectionError, zreconnect.ReconnectTimeout):
            return "not-done"
        except Exception:
            traceback.print_exc()
            return "unexpected"


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


class Workers:
    """The worker processes, and what happens to them: faults, as those in `faults`."""

    def __init__(self):
        self.processes = []

    def interrupt(self, server, line, choice):
        deadline = time.monotonic() + choice.uniform(*faults.OUTAGE)
        process = choice.choice(self.processes)
        while time.monotonic() < deadline:
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(choice.uniform(0, 0.02))

    def fork(self, server, line, choice):
        for process in self.processes:
            for _ in range(choice.randint(1, THREADS)):
                os.kill(process.pid, signal.SIGUSR2)


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
    there = [
        Counter(row for (row,) in server.query("SELECT id FROM transfer", dbname=dbname))
        for dbname in DATABASES
    ]
    first, second = there
    everywhere = first.keys() | second.keys()
    in_one = {each for each in first.keys() ^ second.keys() if not is_of_one_database(each)}
    acknowledged = set(answers.identifiers["acknowledged"])
    unknown = set(answers.identifiers["unknown"])
    in_part = set(answers.identifiers["in-part"])
    found = {
        "lost": len((acknowledged - everywhere) | (acknowledged & in_one)),
        "doubled": sum(count > 1 for each in there for count in each.values()),
        "done although said not to be": len(everywhere - acknowledged - unknown - in_part),
        "in one database, and not said so": len(in_one - in_part),
    }
    change = disagreeing = 0
    for dbname, sign in zip(DATABASES, (1, -1), strict=True):
        query = partial(server.query, dbname=dbname)
        ((total,),) = query("SELECT sum(balance) FROM account")
        change += total - ACCOUNTS * OPENING_BALANCE
        # What has left one database, and not arrived in the other; or the other way round.
        ((amount,),) = query(
            "SELECT coalesce(sum(amount), 0) FROM transfer WHERE id = ANY(%s)", list(in_one)
        )
        change += sign * amount
        disagreeing += len(
            query(
                "SELECT id FROM account WHERE balance - %s <>"
                " (SELECT coalesce(sum(amount), 0) FROM transfer WHERE target = account.id)"
                " - (SELECT coalesce(sum(amount), 0) FROM transfer WHERE source = account.id)",
                OPENING_BALANCE,
            )
        )
    found["change of the sum of balances"] = change
    found["balances that disagree with the transfers"] = disagreeing
    return found, len(unknown & everywhere)


def is_of_one_database(identifier):
    return identifier.startswith(f"{ONE}-")


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
    """Worker processes; those that are left at the end are ended, with their children."""
    context = multiprocessing.get_context("spawn")
    workers = Workers()
    ends = []
    # An interrupt from the keyboard is for the main process alone.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for number, line in enumerate(lines):
            dsns = [server.dsn(dbname=dbname, port=line.port) for dbname in DATABASES]
            end, tell_end = context.Pipe(duplex=False)
            arguments = (number, dsns, options.witness, options.seed, directory / str(number), end)
            process = context.Process(target=work, args=arguments, daemon=True)
            process.start()
            workers.processes.append(process)
            ends.append(tell_end)
            end.close()
        signal.signal(signal.SIGINT, handler)
        yield workers, ends
    finally:
        signal.signal(signal.SIGINT, handler)
        for process in workers.processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
            process.join()


class Operator:
    """Settles what is left prepared, meanwhile and at the end; ``settled`` is how much it was."""

    def __init__(self, server):
        self._dsns = [server.dsn(dbname=dbname) for dbname in DATABASES]
        self.settled = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()

    def settle(self, older_than):
        """Returns how many there are that cannot be settled."""
        found = zreconnect.recover(*self._dsns, older_than=older_than, settle=True)
        self.settled += sum(each.settled for each in found)
        return sum(not each.settled for each in found)

    def _watch(self):
        while not self._stop.wait(LONGEST_PREPARED / 4):
            # The server may be down.
            with contextlib.suppress(Exception):
                self.settle(LONGEST_PREPARED)


def soak(options):
    choice = random.Random(options.seed)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(EmbeddedPostgres(settings=SETTINGS))
        lines = [
            stack.enter_context(PortForward(server.host, server.port)) for _ in range(PROCESSES)
        ]
        open_accounts(server)
        operator = Operator(server)
        with worker_processes(lines, server, options, directory) as (workers, ends), operator:
            while not all((directory / str(number)).exists() for number in range(PROCESSES)):
                time.sleep(0.01)
            started = time.monotonic()
            kinds = [*FAULTS, workers.interrupt, workers.fork]
            happened = faults.make_faults(
                kinds, PAUSE_BETWEEN_FAULTS, options.seconds, server, lines, choice
            )
            seconds = time.monotonic() - started
            for tell_end in ends:
                tell_end.send(None)
            deadline = time.monotonic() + LONGEST_END
            for process in workers.processes:
                process.join(max(0.0, deadline - time.monotonic()))
            hanging = sum(process.exitcode != 0 for process in workers.processes)
        left = wait_for_end_of_sessions(server)
        prepared = operator.settle(older_than=0)
        answers = Answers(directory)
        found, committed = audit(server, answers)
        found["worker processes that did not end"] = hanging
        found["sessions left"] = left
        found["left prepared, and undecidable"] = prepared
        found["unexpected errors"] = answers.count("unexpected")
        print(f"left prepared, and settled by recover      {operator.settled}")
        return report(options, answers, happened, seconds, found, committed)


def report(options, answers, happened, seconds, found, committed):
    show_lookups(answers, happened)
    acknowledged, unknown = answers.count("acknowledged"), answers.count("unknown")
    print(f"seconds                                    {seconds:.1f}")
    print(f"transactions acknowledged                  {acknowledged}")
    print(f"transactions per second                    {acknowledged / seconds:.0f}")
    print(f"not done, and said so                      {answers.count('not-done')}")
    print(f"done in part, or perhaps, and said so      {answers.count('in-part')}")
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
