"""What the commands have in common: help, output, exit statuses, and how they end."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

from zreconnect.cli import main
from zreconnect.cli.commands import make_parser
from zreconnect.cli.output import Output, OutputClosed
from zreconnect.testing._ports import bind
from zreconnect.tests.base import PATIENCE

ESCAPE = "\x1b"
PARSER, COMMANDS = make_parser()


def environment(**changes):
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR",)}
    return {**inherited, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **changes}


class _Process(subprocess.Popen):
    """Ends with its block, also one that waits for what does not come when a test has failed."""

    def __exit__(self, error_type, *error):
        if error_type is not None:
            self.kill()
        super().__exit__(error_type, *error)


def start(*arguments, before="", **keywords):
    """Start the command as a process of its own. before: what it is to execute first."""
    program = (
        f"import signal, sys\n{before}\n"
        # What a shell starts in the background ignores SIGINT, and so do its children.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from zreconnect.cli import main\nsys.exit(main())"
    )
    defaults = {
        "env": environment(),
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }
    return _Process(
        [sys.executable, "-c", program, *map(str, arguments)], **{**defaults, **keywords}
    )


def run(*arguments, **keywords):
    """The exit status of a process, and what it has written to both streams."""
    with start(*arguments, **keywords) as process:
        output, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, (output or b"").decode(), errors.decode()


def run_here(*arguments):
    """The exit status of the command in this process, and what it has written."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as output,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        status = main(arguments)
    return status, output.getvalue(), errors.getvalue()


def at_terminal(program, **changes):
    """What a Python program writes to a terminal of 80 columns."""
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment(**{"TERM": "xterm-256color", "COLUMNS": "80", **changes}),
        stdin=follower,
        stdout=follower,
    ) as process:
        os.close(follower)
        written = b""
        # A terminal that nobody writes to any more raises.
        with contextlib.suppress(OSError):
            while part := os.read(leader, 4096):
                written += part
    os.close(leader)
    assert process.returncode == 0, written
    return written.decode()


class HelpTests(unittest.TestCase):
    def test_each_help_begins_with_examples(self):
        for name in ("", *COMMANDS):
            with self.subTest(name):
                status, output, _errors = run_here(*filter(None, [name, "--help"]))
                self.assertEqual(status, 0)
                self.assertRegex(output, rf"\Aexamples:\n  .*zreconnect {name}")

    def test_examples_are_understood(self):
        for name, parser in COMMANDS.items():
            for line in re.findall("^  (.*zreconnect .*)$", parser.format_help(), re.MULTILINE)[:3]:
                called = re.search(r"zreconnect ([^>)&]*)", line)[1].replace(
                    "~/src/project", "/tmp"
                )
                with self.subTest(called):
                    self.assertEqual(PARSER.parse_args(called.split()).command, name)

    def test_exit_statuses_are_in_one_table(self):
        _status, output, _errors = run_here("--help")
        table = output.partition("exit status:\n")[2]
        self.assertEqual(
            sorted({int(number) for number in re.findall(r"^ +(\d+)", table, re.MULTILINE)}),
            [0, 1, 2, 130, 141],
        )
        for name, parser in COMMANDS.items():
            if not_so := parser.get_default("not_so"):
                self.assertRegex(table, rf"(?m)^ +1  {name} +{not_so}$")
                self.assertIn(f"1 if {not_so}", parser.format_help())

    def test_every_command_has_json(self):
        for name in COMMANDS:
            self.assertIn("--json", COMMANDS[name].format_help())

    def test_python_m(self):
        done = subprocess.run(
            [sys.executable, "-m", "zreconnect", "--version"],
            env=environment(),
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r"^zreconnect \d+\.")


class ArgumentTests(unittest.TestCase):
    def test_complaints_have_no_password(self):
        url, options = "postgresql://me:zqx/zqx@h/work", "host=h password = 'zqx zqx' user=me"
        for arguments in (
            (url,),
            ("wait", "here", url),
            ("wait", "here", options),
            ("wait", "--timeout", options, "here"),
            ("doctor", f"{url}?sslpassword=zqx", "there"),
        ):
            with self.subTest(arguments):
                status, output, errors = run_here(*arguments)
                self.assertEqual((status, output), (2, ""))
                self.assertNotIn("zqx", errors)
                self.assertIn("error: ", errors)

    def test_recover_takes_what_it_cannot_ask_for_no_success(self):
        with bind() as bound:
            port = bound.getsockname()[1]
            for scheme, complaint in {
                "postgresql": "cannot ask a database",
                "postgresql+psycopg": "cannot ask a database",
                "mysql": "is not PostgreSQL",
                "nonsense": "argument DSN: ",
            }.items():
                with self.subTest(scheme):
                    status, output, errors = run_here("recover", f"{scheme}://127.0.0.1:{port}/x")
                    self.assertEqual((status, output), (2, ""))
                    self.assertIn(complaint, errors)

    def test_a_file_that_cannot_be_written(self):
        with tempfile.TemporaryDirectory() as directory, mock.patch("os.access", lambda *_: False):
            for command in ("demo", "drill"):
                option = {"demo": "--record", "drill": "--report"}[command]
                status, _output, errors = run_here(command, option, f"{directory}/new")
                self.assertEqual(status, 2)
                self.assertIn("no file can be written to", errors)


class CompletionTests(unittest.TestCase):
    def test_scripts(self):
        if importlib.util.find_spec("shtab") is None:
            self.skipTest("shtab is not installed")
        for shell in ("bash", "zsh", "tcsh"):
            with self.subTest(shell):
                status, output, errors = run_here("completion", shell)
                self.assertEqual((status, errors), (0, ""))
                self.assertIn("recover", output)
        self.assertIn(
            json.loads(run_here("completion", "--json", "bash")[1])["script"][:20], output
        )

    def test_without_shtab(self):
        with mock.patch.dict(sys.modules, shtab=None):
            status, output, errors = run_here("completion", "bash")
        self.assertEqual((status, output), (2, ""))
        self.assertIn('shtab is missing: pip install "zreconnect[cli]"', errors)


class OutputTests(unittest.TestCase):
    def printed(self, write, as_json=False):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            output = Output(as_json)
            write(output)
            output.finish("test", 1)
        return printed.getvalue()

    def test_lines_and_styles(self):
        self.assertEqual(self.printed(lambda output: output.line("[b]text", "red")), "[b]text\n")

    def test_paragraphs(self):
        with mock.patch.dict(os.environ, COLUMNS="30"):
            text = self.printed(lambda output: output.paragraph("well-known word " * 4, indent=4))
        lines = text.splitlines()
        self.assertEqual(lines, ["    well-known word", *lines[1:]])
        self.assertLess(max(map(len, lines)), 30)
        self.assertEqual({line[:4] for line in lines}, {"    "})

    def test_tables(self):
        rows = [("one", 1), ("eleven", 11)]
        self.assertEqual(
            self.printed(lambda output: output.table(rows, heading=("number", "is"))),
            "\n  number  is\n  one      1\n  eleven  11\n\n",
        )

    def test_progress(self):
        def write(output):
            with output.progress("Done", 4) as advance:
                for _ in range(4):
                    advance()

        self.assertEqual(self.printed(write).count("Done: "), 4)

    def test_json_has_the_result_and_no_text(self):
        def write(output):
            output.line("text")
            output.table([("one", 1)])
            output.result(number=1)
            output.result(path=self.id)

        printed = self.printed(write, as_json=True)
        told = json.loads(printed)
        self.assertEqual((told["command"], told["status"], told["number"]), ("test", 1, 1))
        self.assertEqual(printed.count("\n"), 1)

    def test_notes_are_for_the_standard_error(self):
        for as_json in (False, True):
            with contextlib.redirect_stderr(io.StringIO()) as errors:
                Output(as_json).note("a note")
            self.assertEqual(errors.getvalue(), "a note\n")

    def test_nobody_reads(self):
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as closed, contextlib.redirect_stdout(closed):
            with self.assertRaises(OutputClosed):
                Output().line("text")
            # What could not be written would be tried again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), writing)


class TerminalTests(unittest.TestCase):
    """Without a terminal, or with a dumb one, there is nothing but text."""

    PROGRAM = (
        "from zreconnect.cli.output import Output\noutput = Output()\n"
        "with output.progress('Done', 2) as advance:\n    advance(); advance()\n"
        "output.line('text', 'bold red')\noutput.finish('test', 0)\n"
    )

    def test_styles_and_a_progress_bar(self):
        written = at_terminal(self.PROGRAM)
        self.assertRegex(written, rf"{ESCAPE}\[1;31mtext")
        self.assertIn("2/2", written)

    def test_dumb(self):
        for term in ("dumb", ""):
            written = at_terminal(self.PROGRAM, TERM=term)
            self.assertNotIn(ESCAPE, written)
            self.assertEqual(written, "Done: 1 of 2\r\nDone: 2 of 2\r\ntext\r\n")

    def test_no_color(self):
        written = at_terminal(self.PROGRAM, NO_COLOR="1")
        self.assertNotRegex(written, rf"{ESCAPE}\[[0-9;]*m[a-zA-Z]")
        self.assertNotRegex(written, rf"{ESCAPE}\[(?:1;)?3[0-9]")

    def test_without_rich(self):
        hidden = "import sys\nsys.modules['rich.console'] = None\n"
        self.assertNotIn(ESCAPE, at_terminal(hidden + self.PROGRAM))


class EndTests(unittest.TestCase):
    """A server that answers nothing keeps nobody."""

    def setUp(self):
        self.silent = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(self.silent.close)
        host, port = self.silent.getsockname()
        self.dsn = f"postgresql://work:secret@{host}:{port}/work"

    def interrupted(self, *arguments):
        with start(*arguments) as process:
            # It has connected, so it waits for an answer.
            connection, _address = self.silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                output, errors = process.communicate(timeout=PATIENCE)
        return process.returncode, output.decode(), errors.decode()

    def test_ctrl_c(self):
        for command in ("ledger", "recover", "wait", "doctor"):
            with self.subTest(command):
                self.assertEqual(self.interrupted(command, self.dsn), (130, "", "Interrupted.\n"))

    def test_ctrl_c_at_once(self):
        """Also while modules are imported."""
        hook = (
            "import os, signal\n"
            "class Hook:\n"
            "    def find_spec(self, name, path, target=None):\n"
            "        if name == 'zreconnect.cli.ledger': os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.meta_path.insert(0, Hook())\n"
        )
        status, output, errors = run("--version", before=hook)
        self.assertEqual((status, output, errors), (130, "", "Interrupted.\n"))

    def test_a_closed_pipe(self):
        for arguments in (("--help",), ("demo", "/nothing")):
            reading, writing = os.pipe()
            os.close(reading)
            try:
                status, _output, errors = run(*arguments, stdout=writing)
            finally:
                os.close(writing)
            with self.subTest(arguments):
                self.assertNotIn("Traceback", errors)
                self.assertNotIn("Broken pipe", errors)
                self.assertEqual(status, 2 if "demo" in arguments else 141)

    def test_a_full_disk(self):
        with open("/dev/full", "w") as full:
            status, _output, errors = run("recover", "--json", "sqlite:////tmp", stdout=full)
        self.assertEqual(status, 2)
        self.assertIn("zreconnect: error: cannot write the output: ", errors)
        self.assertNotIn("Traceback", errors)

    def test_streams_that_are_closed(self):
        close = "import os\nfor each in (0, 1, 2): os.close(each)\n"
        # As if it had been so from the beginning.
        close += "sys.stdin = sys.stdout = sys.stderr = None\n"
        for arguments, expected in ((("--help",), 0), (("recover", "--json", "nonsense:"), 2)):
            with self.subTest(arguments):
                self.assertEqual(run(*arguments, before=close), (expected, "", ""))

    def test_lines_of_several_threads(self):
        lines = (
            "import threading\n"
            "from zreconnect.cli.output import Output\n"
            "output = Output()\n"
            "def write():\n"
            "    for _ in range(1000): output.line('whole')\n"
            "threads = [threading.Thread(target=write) for _ in range(4)]\n"
            "for thread in threads: thread.start()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", lines],
            env=environment(PYTHONUNBUFFERED="1"),
            stdout=subprocess.PIPE,
            check=True,
        )
        self.assertEqual(set(done.stdout.splitlines()), {b"whole"})

    def test_characters_that_the_terminal_has_not(self):
        fail = (
            "from zreconnect.cli import recover\n"
            "from zreconnect.cli.errors import CommandError\n"
            "def fail(*arguments, **keywords): raise CommandError('\\u20ac')\n"
            "recover.recover = fail\n"
        )
        status, _output, errors = run(
            "recover", self.dsn, before=fail, env=environment(PYTHONIOENCODING="ascii")
        )
        self.assertEqual((status, errors), (2, "zreconnect recover: error: \\u20ac\n"))
