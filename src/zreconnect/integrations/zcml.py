"""The ZCML directive ``<zreconnect:adapter>``: registers a database adapter as a utility."""

from __future__ import annotations

import os
import re
from typing import Any

from zope.interface import Interface

from zreconnect.adapter import RESPONSE_TIMEOUT, ReconnectingDatabaseAdapter
from zreconnect.integrations import needs
from zreconnect.interfaces import IZopeDatabaseAdapter
from zreconnect.ledger import Ledger

with needs(__name__, "zreconnect[zope]"):
    from zope.component.zcml import utility
    from zope.configuration.exceptions import ConfigurationError
    from zope.configuration.fields import Bool
    from zope.schema import TextLine


class IAdapterDirective(Interface):
    """Registers a `ReconnectingDatabaseAdapter` as an `IZopeDatabaseAdapter` utility.

    A value that begins with ``$`` is the name of an environment variable, which is read when the
    directive is.
    """

    name = TextLine(
        title="Name",
        description="The name of the utility.",
        required=False,
        default="",
    )
    dsn = TextLine(
        title="Data source name",
        description="As ReconnectingDatabaseAdapter has it, or $NAME.",
    )
    timeout = TextLine(
        title="Timeout",
        description=(
            "How many seconds a request waits in all for a transaction to begin, or $NAME; "
            "without it, or if it is empty, a failed attempt to connect is an error at once."
        ),
        required=False,
        default="",
    )
    witness = TextLine(
        title="Witness",
        description=(
            "How the outcome of a lost COMMIT is looked up: xid, ledger, ledger:TABLE or none."
        ),
        required=False,
        default="xid",
    )
    response_timeout = TextLine(
        title="Response timeout",
        description=(
            "After how many seconds a statement without an answer counts as a lost connection, or "
            f"$NAME; without it, or if it is empty, {RESPONSE_TIMEOUT:.0f}; none waits for ever."
        ),
        required=False,
        default="",
    )
    two_phase = Bool(
        title="Two phases",
        description=(
            "Whether transactions are committed in two phases, so that they are committed in all "
            "databases that take part, or in none; the servers must allow prepared transactions."
        ),
        required=False,
        default=False,
    )
    pooled = Bool(
        title="Pooled",
        description=(
            "Whether each transaction may have another server process, as behind PgBouncer with "
            "pool_mode=transaction; without it a pooler is found out, and taken for such a one."
        ),
        required=False,
        default=None,
    )


def register_adapter(
    _context: Any,
    dsn: str,
    name: str = "",
    timeout: str = "",
    witness: str = "xid",
    response_timeout: str = "",
    two_phase: bool = False,
    pooled: bool | None = None,
) -> None:
    """Handle the directive.

    Raises ConfigurationError, without quoting the DSN, for a value that makes no sense, and for
    an environment variable that does not exist.
    """
    try:
        database = ReconnectingDatabaseAdapter(
            _expanded("dsn", dsn),
            timeout=_seconds("timeout", timeout, default=None),
            witness=_witness(witness),
            response_timeout=(
                None
                if response_timeout == "none"
                else _seconds("response_timeout", response_timeout, default=RESPONSE_TIMEOUT)
            ),
            two_phase=two_phase,
            pooled=pooled,
        )
    except (TypeError, ValueError) as error:
        raise ConfigurationError(str(error)) from None
    utility(_context, provides=IZopeDatabaseAdapter, component=database, name=name)


def _expanded(attribute: str, value: str) -> str:
    """The value of the attribute, or of the environment variable that it names."""
    if not value.startswith("$"):
        return value
    variable = value[1:]
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", variable):
        raise ConfigurationError(
            f"{attribute} begins with $, so it must be the name of an environment variable and "
            f'nothing else, as in {attribute}="$DATABASE_{attribute.upper()}"'
        )
    try:
        return os.environ[variable]
    except KeyError:
        raise ConfigurationError(
            f"{attribute} names the environment variable {variable}, which does not exist"
        ) from None


def _seconds(attribute: str, value: str, default: float | None) -> float | None:
    value = _expanded(attribute, value)
    if not value:
        return default
    try:
        return float(value)
    except ValueError:
        raise ConfigurationError(
            f"{attribute} must be a number of seconds, not {value!r}"
        ) from None


def _witness(witness: str) -> str | Ledger | None:
    kind, _, table = witness.partition(":")
    if witness == "none":
        return None
    if witness == "xid":
        return "xid"
    if kind == "ledger" and (table or witness == "ledger"):
        return Ledger(table) if table else Ledger()
    raise ConfigurationError(f"witness must be xid, ledger, ledger:TABLE or none, not {witness!r}")
