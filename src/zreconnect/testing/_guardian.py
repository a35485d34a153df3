"""Ends the processes of a test server and removes its directory when the test process is gone.

An `EmbeddedServer` runs this file as a program of its own, with nothing but the standard library:

    python _guardian.py DIRECTORY DATA_DIRECTORY SIGNAL < pipe

The pipe's other end is held open by the test process. A byte in it, or its end, which the kernel
brings about however the test process dies, is the sign to clean up: the server that works in
DATA_DIRECTORY is ended by SIGNAL, and DIRECTORY is removed with all that is in it.

A process of the server is known by its working directory: PostgreSQL's and MariaDB's are all in
the data directory, and those of what Patroni starts below it. That finds backends whose postmaster
was killed, and never a process that was given the same process id later.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ORDERLY_END_TIMEOUT = 6.0
"""Seconds an immediate shutdown may take; PostgreSQL itself kills its children after 5."""
KILL_TIMEOUT = 10.0
POLL_INTERVAL = 0.01


def processes_in(directory: Path) -> list[int]:
    """Return the ids of the processes that work in the directory or below, zombies excluded."""
    found = []
    inside = f"{directory}/"
    for process in os.listdir("/proc"):
        if process.isdigit():
            try:
                working_directory = os.readlink(f"/proc/{process}/cwd")
            except OSError:
                continue
            if f"{working_directory}/".startswith(inside):
                found.append(int(process))
    return found


def send_signal(process_ids: Iterable[int], signal_number: int) -> None:
    """Send the signal to those that still exist."""
    for process_id in process_ids:
        try:
            os.kill(process_id, signal_number)
        except ProcessLookupError:
            continue


def wait_until_empty(directory: Path, timeout: float) -> bool:
    """Wait until no process works in the directory; return False after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while processes_in(directory):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_INTERVAL)
    return True


def kill_all_in(directory: Path) -> None:
    """SIGKILL all processes that work in the directory, and wait until they are gone."""
    deadline = time.monotonic() + KILL_TIMEOUT
    while left := processes_in(directory):
        send_signal(left, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {left} in {directory} survive SIGKILL")
        time.sleep(POLL_INTERVAL)


def end_all_in(directory: Path, signal_number: int) -> None:
    """End the server that works in the directory by the signal, and by SIGKILL after."""
    running = processes_in(directory)
    send_signal(running, signal_number)
    # One that is stopped acts upon a signal only when it continues.
    send_signal(running, signal.SIGCONT)
    if not wait_until_empty(directory, ORDERLY_END_TIMEOUT):
        kill_all_in(directory)
    for data_directory in (directory, *directory.glob("*/")):
        remove_shared_memory(data_directory)


def remove_shared_memory(data_directory: Path) -> None:
    """Remove the System V segment of a killed postmaster, which the kernel keeps otherwise."""
    try:
        lock_file = (data_directory / "postmaster.pid").read_text()
        _key, segment = lock_file.splitlines()[6].split()
    except (OSError, IndexError, ValueError):
        return
    ipc_rmid = 0
    ctypes.CDLL(None).shmctl(int(segment), ipc_rmid, None)


def main(directory: Path, data_directory: Path, signal_number: int) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    os.read(0, 1)
    end_all_in(data_directory, signal_number)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
