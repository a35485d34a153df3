"""Connection parameters as libpq has them: mistakes in them, and the places that they name."""

from __future__ import annotations

import math
import random
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from zreconnect.drivers.base import addresses

# No directory can be there, so that libpq does not come to contact anybody.
NOWHERE = "/dev/null/zreconnect"
INTEGER = re.compile(r"\s*[+-]?\d+\s*")
INTEGERS = (
    "connect_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
)
LAST_PORT = 65535
# The kernel's defaults notice a silent peer after two hours if nothing is sent, and after a quarter
# of an hour if something is. tcp_user_timeout is in milliseconds.
KEEPALIVE = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60000,
}


def check(
    parameters: Mapping[str, str],
    start: Callable[[Mapping[str, str]], object],
    error_type: type[Exception],
) -> None:
    """Raise ValueError for what libpq refuses whatever the server says. Contacts nobody.

    start: has libpq start to connect with parameters, and raises ``error_type`` if that fails.
    """
    for mistake in _mistakes(parameters):
        raise ValueError(f"dsn: {mistake}")
    try:
        start(_leading_nowhere(parameters))
    except error_type as error:
        message = str(error).strip()
        if NOWHERE not in message:
            # A part of a password that was not quoted as in URLs may be taken for anything.
            for value in parameters.values():
                message = message.replace(f'"{value}"', '"..."')
            raise ValueError(f"dsn is refused by libpq: {message}") from None


def _mistakes(parameters: Mapping[str, str]) -> Iterator[str]:
    """What libpq would find only when it has gone on to contact a server."""
    for name in INTEGERS:
        if name in parameters and not INTEGER.fullmatch(parameters[name]):
            yield f"{name} must be a whole number"
    for port in filter(None, parameters.get("port", "").split(",")):
        if not INTEGER.fullmatch(port) or not 0 < int(port) <= LAST_PORT:
            yield f"port must be a number from 1 to {LAST_PORT}, or several with commas between"
    hosts, numeric = parameters.get("host"), parameters.get("hostaddr")
    if numeric:
        if hosts and hosts.count(",") != numeric.count(","):
            yield "host and hostaddr must have the same number of parts"
        if not all(_is_address(part) for part in numeric.split(",")):
            yield "hostaddr must be an IP address, or several with commas between"


def _is_address(text: str) -> bool:
    try:
        return not text or bool(socket.getaddrinfo(text, None, flags=socket.AI_NUMERICHOST))
    except OSError:
        return False


def _leading_nowhere(parameters: Mapping[str, str]) -> dict[str, str]:
    """The parameters with as many hosts, none of which can be contacted."""
    named = parameters.get("host") or parameters.get("hostaddr")
    nowhere = {**parameters, "host": NOWHERE, "hostaddr": ""}
    if named:
        nowhere["host"] += f",{NOWHERE}" * named.count(",")
    else:
        # The environment or the service may name several.
        nowhere["port"] = "5432"
    if parameters.get("gssencmode", "require") == "require":
        # What leads nowhere is a local socket, for which libpq refuses it, wherever it has it from.
        nowhere["gssencmode"] = "disable"
    return nowhere


def places(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """As `IDriver.places`."""
    found = _hosts(parameters) or addresses(parameters)
    if len(found) < 2:
        return [parameters]
    if parameters.get("target_session_attrs") == "prefer-standby":
        return [{**parameters, "target_session_attrs": target} for target in ("standby", "any")]
    if parameters.get("load_balance_hosts") == "random":
        random.shuffle(found)
    return found


def _hosts(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parameters for each host, if there are several."""
    lists = {
        name: str(parameters[name]).split(",")
        for name in ("host", "hostaddr", "port")
        if parameters.get(name)
    }
    number = max(len(lists.get("host", "")), len(lists.get("hostaddr", "")))
    if number < 2 or any(len(parts) not in (1, number) for parts in lists.values()):
        return []
    return [
        {
            **parameters,
            **{name: parts[index % len(parts)] for name, parts in lists.items()},
        }
        for index in range(number)
    ]


def known(keywords: Mapping[str, Any]) -> dict[str, str]:
    """The parameters among the keywords of a module's ``connect()``, without the password; none if
    a service file has the others."""
    if keywords.get("service"):
        return {}
    return {
        name: str(value)
        for name, value in keywords.items()
        if isinstance(value, (str, int)) and name != "password"
    }


def connect_keywords(parameters: Mapping[str, str], timeout: float) -> dict[str, Any]:
    """The parameters for a connection that is given up after ``timeout`` seconds."""
    # libpq takes whole seconds; 0 would be for ever.
    limit = max(1, math.ceil(timeout))
    if int(parameters.get("connect_timeout") or 0) > 0:
        limit = min(limit, int(parameters["connect_timeout"]))
    return {**KEEPALIVE, **parameters, "connect_timeout": limit}
