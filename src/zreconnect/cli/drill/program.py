"""The program that is put to the test: it is started, listened to and ended with all it starts."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import quote, quote_plus

from zreconnect.cli.errors import CommandError

# How many of the last lines of each output are kept.
LAST_LINES = 20
# How long a line may be, in characters; the middle of a longer one is left out.
LONGEST_LINE = 500
# Seconds that the program has to end when it is asked to, before it is killed.
ORDERLY_END = 5.0
# Seconds in which the kernel ends what was killed, unless that waits for a disk.
KILL_TIMEOUT = 10.0
POLL_INTERVAL = 0.02
# Marks the environment of what the program starts, also if that leaves its process group.
MARK = "ZRECONNECT_DRILL"


class Program:
    """A command in a process group of its own, with an environment that leads to the database.

    arguments: of the command, its name first.
    environment: what it has in addition.
    password: is never told, neither of the arguments nor of what the program prints.

    Raises `CommandError` if it cannot be started.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], password: str
    ) -> None:
        self._spellings = _spellings(password)
        self._mark = secrets.token_hex(8)
        #: The last lines that it has printed.
        self.errors: deque[str] = deque(maxlen=LAST_LINES)
        self.output: deque[str] = deque(maxlen=LAST_LINES)
        try:
            self._process = subprocess.Popen(
                arguments,
                env={**environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # An interrupt from the keyboard is for the drill, which then ends the program.
                start_new_session=True,
            )
        except OSError as error:
            command = self._without_password(shlex.join(arguments))
            raise CommandError(f"cannot start {command}: {error}") from error
        assert self._process.stderr is not None and self._process.stdout is not None
        self._readers = [
            threading.Thread(target=self._read, args=each, daemon=True)
            for each in ((self._process.stderr, self.errors), (self._process.stdout, self.output))
        ]
        for reader in self._readers:
            reader.start()

    def status(self) -> int | None:
        """Its exit status, negative for a signal; None as long as it runs."""
        status = self._process.poll()
        if status is not None:
            # What it said last is still on its way; a child may hold the pipe open.
            for reader in self._readers:
                reader.join(1.0)
        return status

    def last_lines(self, number: int = 5) -> list[str]:
        """What it said last: of its errors, or else of its output."""
        return list(self.errors or self.output)[-number:]

    def end(self) -> None:
        """End it and whatever it has started that still runs."""
        try:
            self._signal_group(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ORDERLY_END)
        finally:
            # Also if somebody has pressed Ctrl-C once more.
            self._kill()

    def _kill(self) -> None:
        self._signal_group(signal.SIGKILL)
        deadline = time.monotonic() + KILL_TIMEOUT
        while (marked := self._marked()) and time.monotonic() < deadline:
            for pid in marked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_INTERVAL)
        self._process.wait()
        for reader in self._readers:
            reader.join(1.0)

    def _signal_group(self, number: int) -> None:
        # When its first process is gone, another group may come to have its number.
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _marked(self) -> list[int]:
        """The processes that have the mark, zombies excluded, which have no environment."""
        mark = f"{MARK}={self._mark}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found

    def _read(self, stream: IO[bytes], lines: deque[str]) -> None:
        with stream:
            for line in stream:
                text = self._without_password(line.decode(errors="replace").rstrip())
                if len(text) > LONGEST_LINE:
                    text = f"{text[: LONGEST_LINE // 2]} … {text[-LONGEST_LINE // 2 :]}"
                if text:
                    lines.append(text)

    def _without_password(self, text: str) -> str:
        for each in self._spellings:
            text = text.replace(each, "***")
        return text


def _spellings(password: str) -> list[str]:
    """The ways in which a password may be written: as it is, in URLs, and in quotes of libpq's,
    Python's, JSON's and the shell's."""
    in_urls = {quote(password, safe=safe) for safe in ("", "/")} | {quote_plus(password)}
    quoted = {
        password.replace("\\", "\\\\").replace("'", "\\'"),
        repr(password)[1:-1],
        json.dumps(password)[1:-1],
        password.replace("'", "'\"'\"'"),
    }
    # One may be the beginning of another.
    return sorted(filter(None, {password, *in_urls, *quoted}), key=len, reverse=True)


def how_it_ended(status: int) -> str:
    """An exit status for people."""
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
