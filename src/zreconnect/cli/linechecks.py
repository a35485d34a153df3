"""What an examination looks at that is alike with all servers: the line to them, and its ends."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from zreconnect.advice import advice
from zreconnect.cli.findings import Finding, Findings, Patient, note, ok, warning
from zreconnect.cli.servers import remedy
from zreconnect.exceptions import one_line
from zreconnect.interfaces import Meaning
from zreconnect.policy import LONGEST_ATTEMPT

# Of what there may be, such as connections.
NEARLY_ALL = 0.9
# For each host of several, in seconds.
HOST_TIMEOUT = 5.0
# The longest silence of a peer that is not noticed, in seconds. zreconnect's own settings take one
# minute, the kernel's two hours.
LONGEST_SILENCE = 5 * 60.0
SILENCE_REMEDY = (
    "Leave keepalives, keepalives_idle, keepalives_interval, keepalives_count and tcp_user_timeout "
    "out of the DSN and of the environment: zreconnect's own notice a silent peer within a minute"
)


def check_hosts(patient: Patient) -> Findings:
    """Whether each of several hosts lets the role in, and whether a primary is asked for."""
    parameters = patient.parameters
    hosts = (parameters.get("host") or parameters.get("hostaddr") or "").split(",")
    if len(hosts) == 1:
        if patient.is_local:
            yield ok("hosts", "The server, or what is before it, is on this machine")
        else:
            yield note(
                "hosts",
                f"There is one host, {hosts[0]}. When another machine takes over, it is found only "
                "if its name or its address moves there",
                "Behind a virtual address, a proxy or a name that moves that is right. Else name "
                "all servers (host=a,b), with target_session_attrs=read-write",
            )
        return
    places = patient.driver.places({**parameters, "target_session_attrs": "any"})
    reached = 0
    for place in places:
        try:
            raw = patient.driver.connect(place, HOST_TIMEOUT)
        except (patient.driver.module.Error, OSError) as error:
            is_passing = patient.driver.connect_meaning(error, place) is Meaning.DISCONNECT
            yield warning(
                "hosts",
                f"{patient.driver.address(place)} lets nobody in, which would be noticed only when "
                f"it is needed: {one_line(error)}",
                advice(error) if is_passing else remedy(error),
            )
        else:
            patient.driver.close(raw)
            reached += 1
    target = parameters.get("target_session_attrs", "any")
    if target == "any":
        yield warning(
            "hosts",
            f"{len(hosts)} hosts, and the first that answers is taken, also if it is a standby, "
            "where nothing can be written",
            "Add target_session_attrs=read-write",
        )
    elif reached == len(places):
        yield ok("hosts", f"All {reached} hosts let the role in, and one for {target} is taken")


def check_keepalive(patient: Patient) -> Findings:
    """After how long a peer is given up that says nothing any more."""
    if patient.on_socket(lambda line: line.family == socket.AF_UNIX):
        yield ok("keepalive", "A local socket, which needs none")
        return
    silence, unanswered = patient.on_socket(_limits)
    if silence is None or silence > LONGEST_SILENCE:
        when = "is never noticed"
        if silence is not None:
            when = f"is noticed only after {silence:.0f} seconds"
        yield warning(
            "keepalive",
            f"While a statement is executed, a peer or a network that is dead {when}",
            SILENCE_REMEDY,
        )
    elif not 0 < unanswered <= LONGEST_SILENCE:
        after = f"after {unanswered:.0f} seconds" if unanswered else "after a quarter of an hour"
        yield warning(
            "keepalive",
            f"What is sent into a dead network is given up only {after} (tcp_user_timeout)",
            SILENCE_REMEDY,
        )
    else:
        yield ok(
            "keepalive",
            f"A peer that is silent is noticed after {silence:.0f} seconds, and after "
            f"{unanswered:.0f} if something was sent to it",
        )


def _limits(line: socket.socket) -> tuple[float | None, float]:
    """The seconds of silence that keepalives notice, or None, and those for what was sent."""
    option = line.getsockopt
    unanswered = option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
    if not option(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        return None, unanswered
    idle, interval, count = (
        option(socket.IPPROTO_TCP, name)
        for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    )
    return idle + interval * count, unanswered


def check_connect_timeout(patient: Patient) -> Findings:
    """How long an attempt to connect may take."""
    text = patient.parameters.get("connect_timeout", "")
    limit = float(text) if text.strip().isdigit() else 0.0
    if 0 < limit < 2:
        yield warning(
            "connect_timeout",
            f"connect_timeout={limit:.0f}: a server that is busy, as after a failover, is given up "
            "before it can answer",
            f"Leave it out: zreconnect gives an attempt {LONGEST_ATTEMPT:.0f} seconds at most",
        )
    elif limit > LONGEST_ATTEMPT:
        yield note(
            "connect_timeout",
            f"connect_timeout={limit:.0f} has no effect: zreconnect gives an attempt "
            f"{LONGEST_ATTEMPT:.0f} seconds, and makes the next one",
        )
    else:
        yield ok("connect_timeout", f"An attempt takes {limit or LONGEST_ATTEMPT:.0f} seconds")


def check_tls(
    patient: Patient, is_encrypted: bool, mode: str, modes: Mapping[str, Any]
) -> Findings:
    """Whether others can read along, or answer in the server's place.

    mode: what is asked for. modes: those that ask for it, as "required", "verified" and "best".
    """
    if patient.is_local:
        yield ok("tls", "The line does not leave the machine")
    elif not is_encrypted:
        yield warning(
            "tls",
            "The line is not encrypted: who can read along sees all data, and who can write can "
            "answer in the server's place",
            f"Have the server offer TLS, and ask for it: {modes['best']}",
        )
    elif mode in modes["verified"]:
        yield ok("tls", "The line is encrypted, and it is known with whom")
    else:
        first = "" if mode in modes["required"] else ", and the first session could be without TLS"
        yield note(
            "tls",
            f"The line is encrypted, but nobody looks with whom{first}",
            f"Ask for that: {modes['best']}",
        )


def is_nearly_all(used: int, limit: int) -> bool:
    """Whether there is no room to speak of."""
    return used >= NEARLY_ALL * limit


def room_for_connections(used: int, limit: int, remedy: str) -> Finding:
    """Whether there is room for one that comes back."""
    in_use = f"{used} of {limit} connections are in use"
    if is_nearly_all(used, limit):
        told = f"{in_use}: who comes back after a restart may have to wait"
        return warning("connections", told, remedy)
    return ok("connections", in_use)
