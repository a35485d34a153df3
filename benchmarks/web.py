"""Does a web site outlive its database's restarts? The examples, under load and faults.

Usage: bin/py benchmarks/web.py [--seconds S] [--stack NAME] [--seed N] [--log FILE]

Each example runs as its users run it, behind waitress with 16 threads, and 16 clients read, write
under names that are never sent twice, and read a long result, each on a connection of its own,
which sends nothing again by itself:

1. without faults, for a fourth of S seconds;
2. for S seconds (default 60) while the server is restarted, its backends are terminated, and the
   lines to it are cut, with DATABASE_TIMEOUT=5, which no fault lasts as long as. Every answer must
   be 200 and be right: what was acknowledged before is there, nothing is there that was not sent;
3. through an outage longer than the timeout. Every answer must come within 6 seconds, and be 200
   or a 503 that says when to try again and nothing of the database; one second after the server's
   return there is service again;
4. through an outage without DATABASE_TIMEOUT, where the 503 must come within one second.

At the end the table must have each acknowledged name once, none that was refused with 503, and none
that was never sent. It has no primary key here, so that a write that is done twice is there twice.

No fault is a crash (soak.py has those). After one, a transaction id does not prove a commit; the
answer to a lost COMMIT is then `CommitOutcomeUnknown`, a 500 of which nobody could say whether it
should have been. The same is right if a COMMIT is lost to a long outage: these, in 3 and 4, are
accepted up to the number that the application's log has, and listed as unknown.

The seed decides on the faults and the requests, though not on the moment at which they meet.
Exits with 1, and says what failed, if anything did.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import random
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

from zreconnect.testing import EmbeddedPostgres, PortForward
from zreconnect.tests import faults
from zreconnect.tests.web import STACKS, ExampleProcess

THREADS = 16
TIMEOUT = 5
LONGEST_ANSWER = TIMEOUT + 1.0
LONGEST_ANSWER_FAIL_FAST = 1.0
LONGEST_RETURN = 1.0
# Seconds until a client no longer believes in an answer.
PATIENCE = 30.0
THINKING = (0.0, 0.2)
PAUSE_BETWEEN_FAULTS = (1.0, 2.5)
# Seconds that the server is down for in a long restart: with stopping and starting, on a busy
# machine, less than TIMEOUT.
LONG_RESTART = (0.5, 2.5)
# Seconds that the server is down for in an outage: each client is refused, and refused again.
OUTAGE = 2 * TIMEOUT + 1.0
OUTAGE_FAIL_FAST = 3.0
# Seconds under load at the start, and before and after an outage.
MARGIN = 2.0
EARLIER_GUESTS = 10_000
EARLIER_GUEST = "earlier guest "
BYTES_OF_A_LONG_RESULT = 100_000
EXAMPLES_OF_A_PROBLEM = 3
BYTES_OF_A_QUOTATION = 200
# What libpq, the server and Python say, and no page may.
DRIVERS_WORDS = [
    "psycopg2",
    "Traceback",
    "OperationalError",
    "server closed the connection",
    "terminating connection",
    "Connection refused",
    "reset by peer",
]

READ, LONG_READ, WRITE = "GET /", "GET /all", "POST /"
KINDS = {READ: 5, LONG_READ: 1, WRITE: 4}


# The faults


def long_restart(server, line, choice):
    server.shut_down()
    time.sleep(choice.uniform(*LONG_RESTART))
    server.start()


def terminated_backends(server, line, choice):
    for pid in server.backend_pids():
        # It may have ended since.
        with contextlib.suppress(ValueError):
            server.terminate_backend(pid)


def cut_in_a_long_result(server, line, choice):
    faults.cut_at_a_byte(server, line, choice, within=BYTES_OF_A_LONG_RESULT)


FAULTS = [
    faults.fast_restart,
    long_restart,
    faults.terminated_backend,
    terminated_backends,
    faults.drop_by_fin,
    faults.drop_by_rst,
    faults.cut_at_a_byte,
    cut_in_a_long_result,
    faults.refusal,
]


# The clients


@dataclass(frozen=True)
class Answer:
    """What became of a request; ``status`` is 0 without a whole response.

    body: the start of it.
    wrong: what is wrong with it, whatever its status; None for nothing.
    """

    client: int
    kind: str
    name: str | None
    sent: float
    received: float
    status: int
    body: str
    wrong: str | None

    @property
    def seconds(self):
        return self.received - self.sent

    def __str__(self):
        request = f"{self.kind} {self.name or ''}".strip()
        wrong = f"{self.wrong}, " if self.wrong else ""
        return f"{request}: {self.status} after {self.seconds:.2f} s, {wrong}{self.body!r}"


@dataclass
class GuestBook:
    """What the clients know of the table.

    secrets: what no page may say.
    """

    secrets: list[str]
    sent: set[str] = field(default_factory=set)
    acknowledged: int = EARLIER_GUESTS
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def welcome(self):
        with self._lock:
            self.acknowledged += 1

    def problem(self, kind, name, response, body, at_least):
        """What is wrong with a response; ``at_least`` names were there when it was asked for."""
        if response.status != 200:
            told = [secret for secret in self.secrets if secret.lower() in body.lower()]
            if told:
                return f"it tells {told}"
            retry_after = response.headers["Retry-After"] or ""
            if response.status == 503 and not retry_after.isdigit():
                return f"Retry-After is {retry_after!r}"
            return None
        if kind == WRITE:
            return (
                None if body == f"Welcome, {name}\n" else f"it is {body[:BYTES_OF_A_QUOTATION]!r}"
            )
        if kind == READ:
            number = int(body.removesuffix(" guests\n"))
        else:
            names = body.splitlines()
            number = len(names)
            if names != sorted(set(names)):
                return f"its {number} names are not sorted, or not unique"
        at_most = EARLIER_GUESTS + len(self.sent)
        if not at_least <= number <= at_most:
            return f"{number} guests, which should be {at_least} to {at_most}"
        return None


class Load:
    """Clients that ask an example inside the block; after it there is their ``phase``."""

    def __init__(self, name, example, guest_book, seed):
        self._name = name
        self._example = example
        self._guest_book = guest_book
        self._seed = seed
        self._stop = threading.Event()
        self._answers = []

    def __enter__(self):
        self._logged = len(self._example.output())
        self._pool = ThreadPoolExecutor(THREADS)
        self._clients = [
            self._pool.submit(self._send_requests, client) for client in range(THREADS)
        ]
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._pool.shutdown()
        for client in self._clients:
            client.result()
        log = self._example.output()[self._logged :]
        self.phase = Phase(self._name, self._answers, log)

    def _send_requests(self, client):
        choice = random.Random(f"{self._seed} {self._name} {client}")
        connection = http.client.HTTPConnection("127.0.0.1", self._example.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            for count in itertools.count():
                if self._stop.wait(choice.uniform(*THINKING)):
                    break
                (kind,) = choice.choices(list(KINDS), KINDS.values())
                name = f"{self._name}, {client}, {count}" if kind == WRITE else None
                self._answers.append(self._ask(connection, client, kind, name))

    def _ask(self, connection, client, kind, name):
        at_least = self._guest_book.acknowledged
        form, headers = None, {}
        if name is not None:
            self._guest_book.sent.add(name)
            form = urlencode({"name": name})
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
        status, body = 0, ""
        sent = time.monotonic()
        try:
            connection.request(*kind.split(), form, headers)
            response = connection.getresponse()
            body = response.read().decode()
            received = time.monotonic()
            status = response.status
            wrong = self._guest_book.problem(kind, name, response, body, at_least)
            if status == 200 and name is not None:
                self._guest_book.welcome()
        except (OSError, http.client.HTTPException, ValueError) as error:
            received = time.monotonic()
            connection.close()
            wrong = repr(error)
        start = body[:BYTES_OF_A_QUOTATION]
        return Answer(client, kind, name, sent, received, status, start, wrong)


# What must hold


class Problems:
    """What does not hold, with examples of each."""

    def __init__(self):
        self._examples = defaultdict(list)

    def __bool__(self):
        return bool(self._examples)

    def add(self, what, examples):
        """``what`` does not hold for the ``examples``, of which there may be none."""
        if examples:
            self._examples[what].extend(examples)

    def show(self):
        for what, examples in self._examples.items():
            print(f"  FAILED, {len(examples)} times: {what}")
            for each in examples[:EXAMPLES_OF_A_PROBLEM]:
                print(f"    {each}")


@dataclass(frozen=True)
class Phase:
    """The answers of a part of the run, and what the application logged meanwhile."""

    name: str
    answers: list[Answer]
    log: str

    @property
    def refused(self):
        return [each for each in self.answers if each.status == 503]

    @property
    def unknown(self):
        """The answers that are right because the outcome of a COMMIT is unknown."""
        found = [each for each in self.answers if each.status == 500 and each.kind == WRITE]
        return found[: self.log.count("was lost: unknown")]

    def latencies(self, kind):
        """The seconds until each answer that is 200, sorted."""
        return sorted(
            each.seconds for each in self.answers if each.kind == kind and each.status == 200
        )


@dataclass(frozen=True)
class Outage:
    """The moments when the server was told to stop, was down, was told to start, and was back."""

    stopping: float
    down: float
    starting: float
    back: float

    def seconds(self, answer):
        """How long an answer took, counted from when there could be trouble."""
        return answer.received - max(answer.sent, self.stopping)

    def first_services(self, answers):
        """For each client that has one, the seconds from the server's return to its first 200."""
        first = {}
        for each in sorted(answers, key=lambda answer: answer.received):
            if each.status == 200 and each.received > self.starting:
                first.setdefault(each.client, each.received - self.back)
        return first


def check_served(phase, problems):
    """Every request was served."""
    problems.add(
        f"{phase.name}: an answer is not 200, or wrong",
        [each for each in phase.answers if each.status != 200 or each.wrong],
    )


def check_faulty(phase, happened, problems):
    """Every request was served, while connections were lost, and none for too long."""
    check_served(phase, problems)
    if "Lost the connection to " not in phase.log:
        problems.add(f"{phase.name}: the log should have lost connections", [phase.log[-1000:]])
    problems.add(
        f"{phase.name}: a fault lasted as long as the timeout, so this run says nothing",
        [fault for fault in happened if fault.seconds >= TIMEOUT],
    )


def check_outage(phase, outage, longest, problems):
    """Every request was answered in time, by 503 if it could not be served."""
    answers = phase.answers
    unknown = phase.unknown
    found = {
        "an answer is neither 200, 503 nor unknown, or it is wrong": [
            each
            for each in answers
            if each.wrong or (each.status not in (200, 503) and each not in unknown)
        ],
        f"an answer that is not 200 took longer than {longest} s": [
            each for each in answers if each.status != 200 and outage.seconds(each) > longest
        ],
        f"an answer took longer than {LONGEST_ANSWER} s": [
            each for each in answers if outage.seconds(each) > LONGEST_ANSWER
        ],
        "a 200 without a server": [
            each
            for each in answers
            if each.status == 200 and outage.down < each.sent and each.received < outage.starting
        ],
        f"no service {LONGEST_RETURN} s after the server's return": [
            each
            for each in answers
            if each.status != 200 and each.sent > outage.back + LONGEST_RETURN
        ],
    }
    for what, examples in found.items():
        problems.add(f"{phase.name}: {what}", examples)
    without = set(range(THREADS)) - {each.client for each in phase.refused}
    problems.add(f"{phase.name}: a client was never answered 503", sorted(without))
    first = min(outage.first_services(answers).values(), default=None)
    if first is None or first > LONGEST_RETURN:
        problems.add(f"{phase.name}: seconds until the first 200", [first])


def check_table(server, dbname, phases, problems):
    """Each acknowledged name is there once; returns how many are."""
    there = Counter(name for (name,) in server.query("SELECT name FROM guest", dbname=dbname))
    writes = [each for phase in phases for each in phase.answers if each.kind == WRITE]
    acknowledged = {each.name for each in writes if each.status == 200}
    refused = {each.name for each in writes if each.status == 503}
    earlier = {f"{EARLIER_GUEST}{number}" for number in range(1, EARLIER_GUESTS + 1)}
    sent = {each.name for each in writes}
    found = {
        "lost: acknowledged, and not there": acknowledged - there.keys(),
        "doubled: there more than once": {name for name in there if there[name] > 1},
        "there, although refused with 503": refused & there.keys(),
        "there, although never sent": there.keys() - sent - earlier,
        "an earlier guest is not there": earlier - there.keys(),
    }
    for what, names in found.items():
        problems.add(what, sorted(names))
    return len(acknowledged & there.keys())


# What is shown


def show_header(name):
    latencies = "".join(f"{kind:>16}" for kind in KINDS)
    print(f"{name:<20}{'requests':>9}{'503':>7}{'unknown':>9}{latencies}")
    print(f"{'':<45}{'   p50 ms p99 ms' * len(KINDS)}", flush=True)


def show_phase(phase):
    counts = f"{len(phase.answers):>9}{len(phase.refused):>7}"
    print(f"  {phase.name:<18}{counts}{len(phase.unknown):>9}", end="")
    for kind in KINDS:
        latencies = phase.latencies(kind) or [float("nan")]
        for part in (0.5, 0.99):
            milliseconds = 1000 * latencies[int(part * len(latencies))]
            print(f"{milliseconds:>{9 if part == 0.5 else 7}.0f}", end="")
    print(flush=True)


def show_outage(phase, outage):
    longest = max((outage.seconds(each) for each in phase.answers if each.status != 200), default=0)
    first = sorted(outage.first_services(phase.answers).values())
    print(f"{'':<20}longest wait for no service {longest:.2f} s", end="")
    if first:
        print(f"; after the server's return service in {first[0]:.2f} s", end="")
        print(f", for all {len(first)} in {first[-1]:.2f} s", end="")
    print(flush=True)


# One stack


def open_guest_book(server, line, dbname):
    """Returns the DSN of a database with guests, through the line."""
    server.create_database(dbname)
    server.query("CREATE TABLE guest (name text)", dbname=dbname)
    server.query(
        f"INSERT INTO guest SELECT '{EARLIER_GUEST}' || id FROM generate_series(1, %s) id",
        EARLIER_GUESTS,
        dbname=dbname,
    )
    return server.dsn(dbname=dbname, port=line.port)


def make_outage(server, seconds):
    time.sleep(MARGIN)
    stopping = time.monotonic()
    server.shut_down()
    down = time.monotonic()
    time.sleep(seconds)
    starting = time.monotonic()
    server.start()
    back = time.monotonic()
    time.sleep(LONGEST_RETURN + MARGIN)
    return Outage(stopping, down, starting, back)


def load_stack(name, server, line, options):
    """Go through all phases, and show what became of them; returns these and the problems."""
    problems = Problems()
    phases = []
    dbname = f"guests_of_{name}"
    dsn = open_guest_book(server, line, dbname)
    guest_book = GuestBook(
        [dsn, server.password, f":{line.port}", f":{server.port}", *DRIVERS_WORDS]
    )
    choice = random.Random(f"{options.seed} {name}")

    def ask(example, phase_name, meanwhile, *arguments):
        """Have the clients ask while ``meanwhile`` runs; returns the phase, and its result."""
        with Load(phase_name, example, guest_book, options.seed) as load:
            result = meanwhile(*arguments)
        phases.append(load.phase)
        show_phase(load.phase)
        return load.phase, result

    show_header(name)
    with ExampleProcess(STACKS[name], dsn, TIMEOUT, THREADS) as example:
        # The first request of each thread sets up much, and is not what the latencies are about.
        phase, _ = ask(example, "starting", time.sleep, MARGIN)
        check_served(phase, problems)
        phase, _ = ask(example, "without faults", time.sleep, options.seconds / 4)
        check_served(phase, problems)
        phase, happened = ask(
            *(example, "with faults", faults.make_faults, FAULTS, PAUSE_BETWEEN_FAULTS),
            *(options.seconds, server, [line], choice),
        )
        check_faulty(phase, happened, problems)
        phase, outage = ask(example, "in an outage", make_outage, server, OUTAGE)
        check_outage(phase, outage, LONGEST_ANSWER, problems)
        show_outage(phase, outage)
    with ExampleProcess(STACKS[name], dsn, None, THREADS) as example:
        phase, outage = ask(example, "without timeout", make_outage, server, OUTAGE_FAIL_FAST)
        check_outage(phase, outage, LONGEST_ANSWER_FAIL_FAST, problems)
        show_outage(phase, outage)
    written = check_table(server, dbname, phases, problems)
    longest = max((fault.seconds for fault in happened), default=0)
    print(f"  {len(happened)} faults, the longest of {longest:.2f} s; ", end="")
    print(f"{written} writes were acknowledged and are there")
    problems.show()
    if options.log:
        with options.log.open("a") as log:
            log.writelines(f"{name}, {phase.name}:\n{phase.log}" for phase in phases)
    return phases, problems


def load_stacks(options):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(EmbeddedPostgres())
        line = stack.enter_context(PortForward(server.host, server.port))
        results = {name: load_stack(name, server, line, options) for name in options.stacks}
    print("summary")
    for name, (phases, problems) in results.items():
        print(f"  {name:<18}{'FAILED' if problems else 'holds':<7}", end="")
        print(f"{sum(len(phase.answers) for phase in phases)} requests, ", end="")
        print(f"{sum(len(phase.refused) for phase in phases)} answered 503, ", end="")
        print(f"{sum(len(phase.unknown) for phase in phases)} unknown")
    return 1 if any(problems for _, problems in results.values()) else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how long with faults, for each (default 60)"
    )
    parser.add_argument(
        "--stack", dest="stacks", action="append", choices=sorted(STACKS), help="default: all"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--log", type=Path, help="a file to append to what the examples log")
    options = parser.parse_args()
    options.stacks = options.stacks or sorted(STACKS)
    # So that what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    print(f"web: {THREADS} clients, timeout {TIMEOUT} s, seed {options.seed}", flush=True)
    try:
        return load_stacks(options)
    except KeyboardInterrupt:
        print("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
