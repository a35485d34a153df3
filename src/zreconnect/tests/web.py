"""Runs an example application as its users would, and asks it over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import os
import shlex
import socket
import string
import subprocess
import sys
import tempfile
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

from zreconnect.testing._ports import LOCALHOST, bind
from zreconnect.testing.layers import PortForwardLayer, PostgresLayer
from zreconnect.tests.base import PATIENCE, DatabaseTestCase

EXAMPLES = Path(__file__).parents[3] / "examples"
# What a console script does. It ends with the process that started it, however that one ends:
# the kernel then closes the pipe that is its standard input.
LAUNCHER = """\
import os, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
sys.path.remove("")
from {module} import {function} as main
sys.argv[0] = {script!r}
sys.exit(main())
"""


class Stack(NamedTuple):
    """How an application is started.

    command: the name of a console script and its arguments, as for a shell in ``directory``;
    $PORT and $THREADS stand for what the process is told.
    directory: where the application is; it is on the path of modules, too.
    """

    command: str
    directory: Path


STACKS = {
    "pyramid": Stack(
        "pserve guestbook.ini http_port=$PORT http_threads=$THREADS", EXAMPLES / "pyramid"
    ),
    "repoze": Stack(
        "waitress-serve --listen=127.0.0.1:$PORT --threads=$THREADS --call guestbook:main",
        EXAMPLES / "repoze",
    ),
    "zope": Stack("runwsgi etc/zope.ini http_port=$PORT http_threads=$THREADS", EXAMPLES / "zope"),
    "zope_publisher": Stack(
        "waitress-serve --listen=127.0.0.1:$PORT --threads=$THREADS --call wsgi:make_application",
        EXAMPLES / "zope_publisher",
    ),
}


class Response(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: str


class ExampleProcess:
    """An application in a process of its own, on a free port; a context manager.

    stack: one of `STACKS`, or another `Stack`.
    dsn: its DATABASE_URL.
    timeout: its DATABASE_TIMEOUT in seconds; None leaves it out.
    threads: how many threads of its server answer requests.
    environment: more variables for the process; PYTHONPATH is added to.
    """

    def __init__(self, stack, dsn, timeout=None, threads=4, **environment):
        self.stack = stack
        self.port = 0
        self._opened = contextlib.ExitStack()
        self._settings = {"DATABASE_URL": dsn, "THREADS": str(threads), **environment}
        if timeout is not None:
            self._settings["DATABASE_TIMEOUT"] = str(timeout)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.stop()

    @property
    def pid(self):
        return self._process.pid

    def start(self):
        """Start the process, and wait until it accepts connections."""
        with contextlib.ExitStack() as opened:
            self._output = opened.enter_context(tempfile.TemporaryFile())
            self.port = opened.enter_context(bind()).getsockname()[1]
            environment = self._environment()
            self._process = subprocess.Popen(
                self._command(environment),
                cwd=self.stack.directory,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                # An interrupt from the keyboard is for the tests alone.
                start_new_session=True,
            )
            opened.callback(self._end, self._process)
            self._wait_until_it_listens()
            self._opened = opened.pop_all()

    def stop(self):
        """End the process. Does nothing if it does not run."""
        self._opened.close()

    def output(self):
        """What the process has printed and logged so far."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    def get(self, path="/"):
        return self.request("GET", path)

    def post(self, path="/", **fields):
        """Send a form with these fields."""
        return self.request(
            "POST",
            path,
            urlencode(fields),
            {"Content-Type": "application/x-www-form-urlencoded"},
        )

    def request(self, method, path, body=None, headers=()):
        """The `Response`, on a connection of its own.

        Raises http.client's errors, so IncompleteRead for a response that breaks off.
        """
        connection = http.client.HTTPConnection(LOCALHOST, self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return Response(response.status, response.headers, response.read().decode())
        finally:
            connection.close()

    def _environment(self):
        environment = {**os.environ, **self._settings, "PORT": str(self.port)}
        if "DATABASE_TIMEOUT" not in self._settings:
            environment.pop("DATABASE_TIMEOUT", None)
        # Errors, which libpq and the server word, are in one language; what is printed comes at
        # once.
        environment |= {"LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(
                None,
                (str(self.stack.directory), self._settings.get("PYTHONPATH", ""), *sys.path),
            )
        )
        return environment

    def _command(self, environment):
        words = shlex.split(string.Template(self.stack.command).substitute(environment))
        (script,) = entry_points(group="console_scripts", name=words[0])
        module, _, function = script.value.partition(":")
        launcher = LAUNCHER.format(module=module, function=function, script=script.name)
        return [sys.executable, "-c", launcher, *words[1:]]

    def _end(self, process):
        process.terminate()
        try:
            process.wait(PATIENCE)
        finally:
            process.kill()
            process.communicate()

    def _wait_until_it_listens(self):
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection((LOCALHOST, self.port), PATIENCE).close()
                return
            except ConnectionRefusedError:
                status = self._process.poll()
                if status is not None:
                    raise self._error(f"it ended with status {status}") from None
                if time.monotonic() > deadline:
                    raise self._error(f"it did not answer within {PATIENCE} seconds") from None
            time.sleep(0.01)

    def _error(self, problem):
        return AssertionError(f"{self.stack.command}: {problem}; its output:\n{self.output()}")


class WebTestCase(DatabaseTestCase):
    """Has the table of the guest book, and starts an application whose database it is."""

    # Not that of the other tests, so that both can run at once.
    # Its tests take long: the first layers, by name, begin first.
    layer = PortForwardLayer(PostgresLayer("ApplicationsPostgresLayer"), "ApplicationsForwardLayer")

    def setUp(self):
        super().setUp()
        self.query("CREATE TABLE guest (name text PRIMARY KEY)")

    def start(self, stack, timeout=None, threads=4, **environment):
        """The running `ExampleProcess` of ``stack``, a name in `STACKS` or a `Stack`."""
        if isinstance(stack, str):
            stack = STACKS[stack]
        example = ExampleProcess(stack, self.dsn, timeout, threads, **environment)
        self.addCleanup(example.stop)
        example.start()
        return example

    def guests(self):
        return [name for (name,) in self.query("SELECT name FROM guest ORDER BY name")]
