"""The command ``zreconnect drill``, of programs that survive and of programs that do not."""

from __future__ import annotations

import contextlib
import html.parser
import itertools
import json
import os
import signal
import socket
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from urllib.parse import quote

from zreconnect.cli import drill as module_of_command
from zreconnect.cli.drill import observation as module_of_observation
from zreconnect.cli.drill import schedule, trial
from zreconnect.cli.drill.database import open_database
from zreconnect.cli.drill.faults import KINDS
from zreconnect.cli.drill.observation import Observation
from zreconnect.cli.drill.program import how_it_ended
from zreconnect.cli.drill.report import report
from zreconnect.cli.drill.result import Result
from zreconnect.cli.drill.timeline import rates
from zreconnect.cli.drill.trial import Interruption
from zreconnect.testing import Count, EmbeddedMariaDB, PortForward
from zreconnect.testing import portforward as module_of_forward
from zreconnect.testing.layers import POSTGRES_LAYER
from zreconnect.tests import test_command
from zreconnect.tests.base import PATIENCE, REQUIRED, wait_until
from zreconnect.tests.test_command import environment, start

# Numbers, each in a transaction of its own.
PLAIN = """
import itertools, os, sys, time, psycopg2
connection = psycopg2.connect(sys.argv[1])
cursor = connection.cursor()
cursor.execute("CREATE TABLE IF NOT EXISTS number (value int)")
connection.commit()
for number in itertools.count(time.time_ns() // 1000000 % 1000000 * 1000):
    cursor.execute("INSERT INTO number VALUES (%s)", (number,))
    connection.commit()
    time.sleep(0.002)
"""
WITH_ZRECONNECT = """
import itertools, sys, time, zreconnect
connection = zreconnect.connect(sys.argv[1], witness=zreconnect.Ledger())
def record(number):
    connection.cursor().execute("INSERT INTO number VALUES (%s)", (number,))
connection.run(connection.cursor().execute, "CREATE TABLE IF NOT EXISTS number (value int)")
connection.commit()
for number in itertools.count():
    connection.run(record, number, attempts=20)
    time.sleep(0.002)
"""
# Runs everything again, so also what was committed.
AGAIN_AND_AGAIN = """
import itertools, os, time, psycopg2
connection = None
def record(number):
    global connection
    if connection is None:
        connection = psycopg2.connect(os.environ["DATABASE_URL"])
        connection.cursor().execute("CREATE TABLE IF NOT EXISTS number (value int)")
    connection.cursor().execute("INSERT INTO number VALUES (%s)", (number,))
    connection.commit()
for number in itertools.count():
    while True:
        try:
            record(number)
            break
        except psycopg2.Error:
            connection = None
            time.sleep(0.01)
    time.sleep(0.002)
"""
HANGS = PLAIN.replace(
    "for number",
    "sys.excepthook = lambda *error: (print('Hm.', file=sys.stderr), time.sleep(600))\nfor number",
)
# The variables alone lead to the database.
FINISHES = """
import time, psycopg2
connection = psycopg2.connect("")
for number in range(40):
    connection.cursor().execute("SELECT 1")
    connection.rollback()
    time.sleep(0.02)
"""
ON_MARIADB = """
import itertools, os, time, pymysql
for number in itertools.count():
    try:
        connection = pymysql.connect(
            host=os.environ["MYSQL_HOST"], port=int(os.environ["MYSQL_PORT"]),
            user=os.environ["MYSQL_USER"], password=os.environ["MYSQL_PASSWORD"],
            database=os.environ["MYSQL_DATABASE"])
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE IF NOT EXISTS drilled (value int)")
            while True:
                cursor.execute("INSERT INTO drilled VALUES (%s)", (number,))
                connection.commit()
                time.sleep(0.005)
    except pymysql.Error:
        time.sleep(0.05)
"""
# Makes its table in a transaction, and needs none for what it then does.
READS = """
import os, time, psycopg2
def connect():
    connection = psycopg2.connect(os.environ["DATABASE_URL"])
    connection.autocommit = True
    return connection
connection = connect()
connection.cursor().execute("BEGIN; CREATE TABLE IF NOT EXISTS number (value int); COMMIT")
while True:
    try:
        connection.cursor().execute("SELECT count(*) FROM number")
        time.sleep(0.002)
    except psycopg2.Error:
        connection = connect()
"""
DOUBLED = "SELECT value, count(*) FROM number GROUP BY value HAVING count(*) > 1"


def python(program, *arguments):
    return ["--", sys.executable, "-c", program, *arguments]


@contextlib.contextmanager
def hurried():
    """Drills are short in the block, and their programs find what this process imports."""
    with (
        mock.patch.multiple(schedule, CALM=(0.1, 0.2), LASTS=(0.1, 0.2)),
        mock.patch.object(trial, "CALM", (0.1, 0.2)),
        mock.patch.dict(os.environ, environment()),
    ):
        yield


def run_here(*arguments):
    """The exit status of a drill in this process, and what it has written."""
    with hurried():
        return test_command.run_here("drill", *map(str, arguments))


def drill(*arguments, status):
    """What a drill says as JSON."""
    found, output, errors = run_here("--json", *arguments)
    assert found == status, (found, output, errors)
    return json.loads(output)


def outcomes(result):
    return {each["kind"]: each["outcome"] for each in result["faults"]}


def all_of(faults, outcome):
    return dict.fromkeys(faults.split(","), outcome)


class OwnServerTests(unittest.TestCase):
    def test_with_zreconnect_it_survives_and_nothing_is_there_twice(self):
        faults = "lost-commit,terminate,freeze,crash-session"
        result = drill(
            *("--faults", faults, "--check", DOUBLED), *python(WITH_ZRECONNECT, "{dsn}"), status=0
        )
        self.assertEqual(outcomes(result), all_of(faults, "worked again"))
        self.assertIs(result["survived"], True)
        self.assertEqual(result["starts"], 1)
        self.assertEqual(result["findings"], [])
        self.assertEqual(result["not_tried"], [])

    @unittest.skipUnless(
        EmbeddedMariaDB.installed() or REQUIRED, "MariaDB's server is not installed: make services"
    )
    def test_mariadb(self):
        faults = "lost-commit,terminate,restart"
        result = drill(*("--server", "mariadb", "--faults", faults), *python(ON_MARIADB), status=0)
        self.assertEqual(outcomes(result), all_of(faults, "worked again"))
        self.assertEqual(result["measure"], "transactions")


class GivenServerTests(unittest.TestCase):
    layer = POSTGRES_LAYER

    def setUp(self):
        self.dsn = self.layer.server.fresh_database()

    def drill(self, *arguments, status):
        return drill("--dsn", self.dsn, *arguments, status=status)

    def test_a_plain_program_dies_of_each_fault(self):
        faults = "close,lost-commit,terminate"
        result = self.drill("--faults", faults, *python(PLAIN, "{dsn}"), status=1)
        self.assertEqual(outcomes(result), all_of(faults, "ended"))
        self.assertIs(result["survived"], False)
        self.assertEqual(result["starts"], 3)
        self.assertEqual(result["measure"], "transactions")
        for each in result["faults"]:
            self.assertEqual(each["status"], 1)
            self.assertIn("psycopg2.", " ".join(each["said"]))

    def test_what_is_there_twice_is_found(self):
        """Whatever happens on the line, the program goes on, and does again what was done."""
        faults = "line"
        result = self.drill(
            *("--faults", faults, "--check", DOUBLED), *python(AGAIN_AND_AGAIN), status=1
        )
        line = [kind for kind in KINDS if KINDS[kind].place == "line"]
        self.assertEqual(outcomes(result), dict.fromkeys(line, "worked again"))
        (lost,) = [each for each in result["faults"] if each["kind"] == "lost-commit"]
        ((_value, times),) = lost["findings"]
        self.assertEqual(times, "2")
        self.assertIn(lost["findings"][0], result["findings"])

    def test_a_program_that_hangs(self):
        result = self.drill(
            *("--faults", "reset,close", "--patience", "6", "--once"),
            *("--check", "SELECT 'old'"),
            *python(HANGS, "{dsn}"),
            status=1,
        )
        ((_kind, outcome),) = outcomes(result).items()
        self.assertEqual(outcome, "hung")
        self.assertEqual(result["faults"][0]["said"], ["Hm."])
        self.assertEqual(len(result["not_tried"]), 1)
        # What was there before is not its fault.
        self.assertEqual(result["findings_before"], [["old"]])
        self.assertEqual(result["findings"], [])

    def test_a_program_that_finishes_its_work(self):
        """It has no transactions but what it reads, and does not say where."""
        arguments = ("--faults", "slow", "--seconds", "60", "--seed", "5")
        result = self.drill(*arguments, *python(FINISHES), status=0)
        self.assertIn("finished its work by itself", result["over"])
        self.assertEqual(result["measure"], "statements")
        self.assertEqual(result["seed"], 5)
        self.assertGreater(len(result["faults"]), 1)

    def test_a_program_that_commits_only_when_it_begins(self):
        faults = "close,slow"
        result = self.drill("--faults", faults, *python(READS), status=0)
        self.assertEqual(outcomes(result), all_of(faults, "worked again"))
        self.assertEqual(result["measure"], "statements")

    def test_no_command_that_could_be_tried(self):
        for program, patience, complaint in (
            (
                "import sys; sys.exit('No.')",
                "60",
                "ended with status 1 before it had done anything",
            ),
            (
                "import time; time.sleep(600)",
                "1",
                "has done nothing in 1 seconds, with 0 connections",
            ),
        ):
            with self.subTest(program):
                result = self.drill("--patience", patience, *python(program), status=2)
                self.assertIn(complaint, result["over"])
                self.assertIsNone(result["survived"])

    def somebody(self, options, password):
        """The DSN of a role of that password, and those options."""
        server = self.layer.server
        server.query(f"CREATE ROLE somebody LOGIN {options} PASSWORD %s", password)
        self.addCleanup(server.query, "DROP ROLE somebody")
        self.addCleanup(server.query, "DROP OWNED BY somebody", dbname=self.dsn.rpartition("/")[2])
        return self.dsn.replace(
            f"{server.user}:{server.password}", f"somebody:{quote(password, safe='')}"
        )

    def test_text_and_report_have_no_password(self):
        self.dsn = self.somebody("SUPERUSER", "zqx'ret\\zqx/\"zqx ret")
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "report.html")
            leaks = (
                "import json, os, sys\n"
                "password = os.environ['PGPASSWORD']\n"
                "for each in sys.argv[1], password, repr(password), json.dumps(password):\n"
                "    print(each, file=sys.stderr, flush=True)\n"
            )
            status, output, errors = run_here(
                *("--dsn", self.dsn, "--faults", "close", "--report", path),
                # An argument need not be text.
                *python(leaks + PLAIN, "{dsn}", os.fsdecode(b"\xff")),
            )
            self.assertEqual(status, 1, errors)
            page = path.read_text()
        self.assertRegex(output, r"close +ended with status 1\n")
        self.assertIn("Does NOT survive: 1 of 1 fault ended it.", output)
        for text in (output, errors, page):
            self.assertNotIn("zqx", text)
        self.assertIn("ended with status 1", page)

    @mock.patch.object(trial, "CHECK_PATIENCE", 0.0)
    def test_what_is_wrong_is_refused(self):
        for arguments, complaint in {
            ("--faults", "close"): "there is no COMMAND",
            ("--faults", "nonsense", "--", "x"): "there is no fault 'nonsense'",
            # The server itself is left alone.
            ("--faults", "server", "--", "x"): "none of these faults can happen",
            ("--check", "SELECT nonsense", *python(FINISHES)): "argument --check: ",
            ("--", "/nowhere/at/all", "{dsn}"): "cannot start /nowhere/at/all postgresql://",
        }.items():
            with self.subTest(arguments):
                status, _output, errors = run_here("--dsn", self.dsn, *arguments)
                self.assertEqual(status, 2)
                self.assertIn(complaint, errors)
                self.assertNotIn(self.layer.server.password, errors)

    def test_no_connection_is_left_for_the_drill(self):
        dsn = self.somebody("CONNECTION LIMIT 3", "secret")
        takes = (
            "import psycopg2, sys, time\n"
            "taken = []\n"
            "while True:\n"
            "    try: taken.append(psycopg2.connect(sys.argv[1]))\n"
            "    except psycopg2.Error: time.sleep(0.01)\n"
            "    taken[0].cursor().execute('SELECT 1')\n"
        )
        status, _output, errors = run_here(
            *("--dsn", dsn, "--faults", "terminate"), *python(takes, "{dsn}")
        )
        self.assertEqual(status, 2)
        self.assertIn("cannot ask postgresql://somebody@", errors)
        self.assertIn("too many connections", errors)


class WhereTests(unittest.TestCase):
    """A server that may be on another machine is left alone."""

    layer = POSTGRES_LAYER

    def drill(self, dsn, *arguments):
        """How it refuses, or that it does not find the program."""
        status, _output, errors = run_here("--dsn", dsn, *arguments, "--", "/nowhere/at/all")
        self.assertEqual(status, 2)
        return errors

    def test_another_machine(self):
        errors = self.drill("postgresql://me@192.0.2.1/work")
        self.assertIn("is not on this machine (192.0.2.1)", errors)

    def test_no_tcp(self):
        self.assertIn("cannot use", self.drill("postgresql:///nothing?host=/tmp"))
        self.assertIn("there is no line to a file", self.drill("sqlite:////tmp/nothing"))

    def test_a_tunnel_may_lead_to_another(self):
        server = self.layer.server
        server.query(f"CREATE ROLE somebody LOGIN PASSWORD '{server.password}'")
        self.addCleanup(server.query, "DROP ROLE somebody")
        with PortForward(server.host, server.port) as tunnel:
            somebody = server.dsn(user="somebody", port=tunnel.port)
            self.assertIn("may be on another", self.drill(somebody))
            self.assertIn("cannot start", self.drill(somebody, "--really"))
            # Who may read the server's files sees that it is the same machine.
            self.assertIn("cannot start", self.drill(server.dsn(port=tunnel.port)))
        self.assertIn("cannot start", self.drill(server.dsn(user="somebody")))

    def test_the_line_leads_where_the_name_has_led(self):
        """Also if it has another address besides."""
        server = self.layer.server
        found = socket.getaddrinfo("127.0.0.2", 0, type=socket.SOCK_STREAM)
        with (
            mock.patch.object(module_of_forward.socket, "getaddrinfo", lambda *_, **__: found),
            open_database(server.dsn(host="localhost"), "postgresql", really=False) as database,
        ):
            self.assertEqual(database.forward.target_host, "127.0.0.1")
            self.assertEqual(database.parameters["host"], "localhost")


class EndTests(unittest.TestCase):
    """Whatever ends a drill, nothing is left."""

    layer = POSTGRES_LAYER

    def check(self, number, status, *where):
        program = (
            "import subprocess, sys\n"
            "subprocess.Popen(['sleep', '600'], start_new_session=True)\n" + PLAIN
        )
        with tempfile.TemporaryDirectory() as directory:
            Path(directory).chmod(0o755)
            with start(
                *("drill", *where, "--faults", "slow", "--seconds", "600"),
                *python(program, "{dsn}"),
                env=environment(TMPDIR=directory),
            ) as process:
                lines = iter(process.stdout.readline, b"")
                self.assertTrue(any(b" slow " in line for line in lines))
                marked = self.processes(directory)
                process.send_signal(number)
                process.communicate(timeout=PATIENCE)
            self.assertEqual(process.returncode, status)
            self.assertGreater(len(marked), 2)
            wait_until(lambda: not self.processes(directory))
            self.assertEqual(os.listdir(directory), [])

    def processes(self, directory):
        """Those with the directory in their environment, so all that the drill has started."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"TMPDIR={directory}".encode() in (process / "environ").read_bytes():
                    found.append(process.name)
        return found

    def test_ctrl_c(self):
        self.check(signal.SIGINT, 130)

    def test_a_check_that_takes_long(self):
        check = "SELECT pg_sleep(600)"
        with start(
            *("drill", "--dsn", self.layer.server.dsn(), "--check", check),
            *python(PLAIN, "{dsn}"),
        ) as process:
            sleeping = "SELECT pid FROM pg_stat_activity WHERE query = %s"
            wait_until(lambda: self.layer.server.query(sleeping, check))
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, 130)
        self.layer.server.query(f"SELECT pg_terminate_backend(pid) FROM ({sleeping}) s", check)

    def test_nohup(self):
        ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGHUP, ignored)
        with module_of_command._ended_by_signals():
            self.assertIs(signal.getsignal(signal.SIGHUP), signal.SIG_IGN)
            self.assertIsNot(signal.getsignal(signal.SIGTERM), signal.SIG_DFL)
        self.assertIs(signal.getsignal(signal.SIGHUP), signal.SIG_IGN)

    def test_sigterm(self):
        self.check(signal.SIGTERM, 143, "--dsn", self.layer.server.dsn())


class TrialTests(unittest.TestCase):
    def test_a_program_that_ends_by_itself_has_not_survived(self):
        """Although it has survived all that has happened."""
        statuses = itertools.repeat(None)

        def miss(planned):
            nonlocal statuses
            statuses = itertools.chain([None, None], itertools.repeat(3))
            return False

        program = SimpleNamespace(
            status=lambda: next(statuses), last_lines=lambda: ["Hm."], end=lambda: None
        )
        commits = itertools.count(1)
        forward = SimpleNamespace(
            count=lambda: Count(commits=next(commits)), server_ports=lambda: [5432]
        )
        database = SimpleNamespace(forward=forward, ended_transactions=lambda: 0, sessions=list)
        ways = {"slow": lambda planned: None, "lost-commit": miss}
        held = trial.Trial(database, lambda: program, ways, PATIENCE, False, None, id)
        plan = [schedule.Planned(kind, 0.05, 0.1, 0) for kind in ("slow", "lost-commit", "slow")]
        held.run(plan, lambda seconds, faults: False)
        result = Result(held, ["job"], "PostgreSQL", "postgresql:///", 1, list(ways))
        self.assertEqual(
            [each.outcome for each in held.interruptions], ["worked again", "no occasion"]
        )
        self.assertIn("ended with status 3 when nothing had happened to it", held.over)
        self.assertIs(held.survived, False)
        self.assertEqual(result.verdict, "Does NOT survive: it ended by itself.")


class ScheduleTests(unittest.TestCase):
    def test_each_kind_happens_before_any_happens_again(self):
        for seed in range(20):
            kinds = [each.kind for each in itertools.islice(schedule.make_plan("abcd", seed), 8)]
            self.assertEqual(sorted(kinds[:4]), list("abcd"))
            self.assertEqual(sorted(kinds[4:]), list("abcd"))

    def test_the_seed_repeats_it(self):
        first, again, other = (
            list(itertools.islice(schedule.make_plan("abcd", n), 9)) for n in (1, 1, 2)
        )
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)


class ObservationTests(unittest.TestCase):
    """What is counted, by what passes on the line."""

    def measure(self, *counts, server=(0, 0)):
        passed, ended = iter(counts), itertools.chain(server, itertools.repeat(server[-1]))
        observation = Observation(lambda: next(passed), lambda: next(ended))
        quiet = mock.patch.multiple(module_of_observation, INTERVAL=PATIENCE, SERVER_INTERVAL=0.0)
        with quiet, observation:
            settled = [observation.settle() for _ in counts[:-1]]
            return settled, observation.measure, observation.done()

    def test_transactions(self):
        counts = Count(commits=2, results=5), Count(commits=3)
        self.assertEqual(self.measure(*counts), ([True], "transactions", 3))

    def test_statements_as_long_as_there_are_no_transactions(self):
        first = Count(results=1)
        self.assertEqual(self.measure(first, Count(results=4)), ([True], "statements", 4))
        counts = first, Count(results=4, commits=1), Count(results=5, commits=2)
        self.assertEqual(self.measure(*counts), ([True, True], "transactions", 2))

    def test_who_has_committed_once_need_not_do_it_again(self):
        counts = (
            *(Count(commits=1, results=2), Count(commits=1, results=9)),
            *(Count(commits=1, results=9), Count(commits=1, results=11)),
        )
        self.assertEqual(self.measure(*counts), ([True, True, True], "statements", 11))

    def test_what_the_server_has_done_before_is_known(self):
        """And not taken for what is done afterwards."""
        with mock.patch.object(module_of_observation, "INTERVAL", PATIENCE):
            answers = iter((7, 9))
            observation = Observation(lambda: Count(round_trips=300), lambda: next(answers))
            with observation:
                observation.measure = "writing transactions of all clients"
                self.assertEqual(observation.done(), 0)
                self.assertEqual(observation.done(now=True), 2)

    def test_what_the_server_says_if_the_line_cannot_be_read(self):
        few, many = Count(round_trips=3), Count(round_trips=300)
        self.assertEqual(self.measure(few, few)[:2], ([False], None))
        settled, measure, done = self.measure(many, many, server=(7, 8, 9))
        self.assertEqual((settled, done), ([True], 2))
        self.assertEqual(measure, "writing transactions of all clients")

    def test_a_server_that_does_not_answer_has_done_nothing(self):
        def fail():
            raise OSError

        with Observation(Count, fail) as observation:
            self.assertFalse(observation.settle())
            self.assertEqual(observation.done(), 0)


class Page(html.parser.HTMLParser):
    """The ids and the links of a page; fails if an element is not closed."""

    VOID = ("meta", "br", "input", "link")

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.open, self.loaded = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in found:
            self.ids.append(found["id"])
        if "href" in found:
            self.links.append(found["href"])
        self.loaded += [each for each in ("src", "srcset", "data") if each in found]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def some_result(outcome="ended", findings=()):
    """A drill that never was."""
    interruptions = [
        Interruption(1, "close", 1.0, 1.0, 3, 2, "worked again", 0.25),
        Interruption(2, "restart", 2.0, 2.5, 2, None, outcome, 0.5, 1, ["<b>&amp;</b>"]),
        Interruption(3, "close", 2.6, 2.6, 2, 2, "worked again", 0.01),
        Interruption(4, "lost-commit", 3.0, 8.0, 2),
    ]
    samples = [(each / 20, each * 5) for each in range(20, 200)]
    held = SimpleNamespace(
        interruptions=interruptions,
        observation=SimpleNamespace(samples=samples, measure="transactions"),
        survived=False,
        has_failed=False,
        tried=True,
        starts=2,
        over=None,
        check="SELECT '<i>'",
        findings=list(findings),
        findings_before=[("old",)],
    )
    command = ["sh", "-c", "exec <script>"]
    return Result(held, command, "PostgreSQL 18", "postgresql://me@127.0.0.1/", 7, list(KINDS))


class ReportTests(unittest.TestCase):
    def test_it_is_one_well_formed_file_whose_links_lead_somewhere(self):
        page = Page(report(some_result(findings=[("7", "2")])))
        self.assertEqual(page.loaded, [])
        self.assertEqual(len(page.ids), len(set(page.ids)))
        self.assertEqual({link for link in page.links if link[1:] not in page.ids}, set())
        for number in range(1, 5):
            self.assertIn(f"#fault-{number}", page.links)
            self.assertIn(f"#mark-{number}", page.links)

    def test_nothing_of_the_programs_is_markup(self):
        text = report(some_result(outcome="hung", findings=[("<u>",)]))
        for tag in ("<b>", "<i>", "<u>", "<script"):
            self.assertNotIn(tag, text)
        self.assertIn("exec &lt;script&gt;", text)
        self.assertIn("&lt;b&gt;&amp;amp;&lt;/b&gt;", text)

    def test_a_drill_in_which_nothing_was_seen(self):
        result = some_result()
        result.trial.interruptions, result.trial.observation.samples = [], []
        result.trial.tried = False
        self.assertIn("Nothing was tried.", report(result))

    def test_rates(self):
        samples = [(0.0, 0), (1.0, 100), (1.5, 100), (2.0, 200)]
        self.assertEqual(
            rates(samples),
            [(n / 4, (n + 1) / 4, 100.0) for n in range(4)]
            + [(1.0, 1.25, 0.0), (1.25, 1.5, 0.0), (1.5, 1.75, 200.0), (1.75, 2.0, 200.0)],
        )
        self.assertEqual(rates(samples[:1]), [])
        self.assertLessEqual(len(rates([(0.0, 0), (3000.0, 9)])), 240)

    def test_statuses_for_people(self):
        self.assertEqual(how_it_ended(3), "status 3")
        self.assertEqual(how_it_ended(-9), "SIGKILL")
        self.assertEqual(how_it_ended(-250), "signal 250")
