"""Database connections that survive their database: reconnecting for Zope's `transaction`.

The modules are imported when the first of their names is asked for.
"""

from typing import TYPE_CHECKING, Any

__all__ = [
    "FAIL_FAST",
    "PERSIST",
    "CommitOutcomeUnknown",
    "ConflictingTransactionManagerError",
    "ConnectionDescriptor",
    "DisconnectedConnectionError",
    "DisconnectionError",
    "Ledger",
    "PartlyCommitted",
    "PreparedTransaction",
    "ReconnectTimeout",
    "ReconnectingConnection",
    "ReconnectingCursor",
    "ReconnectingDatabaseAdapter",
    "RetryPolicy",
    "XidWitness",
    "ZopelessTransactionManager",
    "connect",
    "initZopeless",
    "isZopeless",
    "recover",
    "retry_on_disconnect",
]

if TYPE_CHECKING:
    from zreconnect.adapter import ReconnectingDatabaseAdapter
    from zreconnect.connection import ReconnectingConnection, connect
    from zreconnect.cursor import ReconnectingCursor
    from zreconnect.descriptor import ConnectionDescriptor
    from zreconnect.exceptions import (
        CommitOutcomeUnknown,
        ConflictingTransactionManagerError,
        DisconnectedConnectionError,
        DisconnectionError,
        PartlyCommitted,
        ReconnectTimeout,
    )
    from zreconnect.ledger import Ledger
    from zreconnect.policy import FAIL_FAST, PERSIST, RetryPolicy
    from zreconnect.recovery import PreparedTransaction, recover
    from zreconnect.retry import retry_on_disconnect
    from zreconnect.witness import XidWitness
    from zreconnect.zopeless import ZopelessTransactionManager, initZopeless, isZopeless
else:
    _MODULES = {
        "FAIL_FAST": "policy",
        "PERSIST": "policy",
        "CommitOutcomeUnknown": "exceptions",
        "ConflictingTransactionManagerError": "exceptions",
        "ConnectionDescriptor": "descriptor",
        "DisconnectedConnectionError": "exceptions",
        "DisconnectionError": "exceptions",
        "Ledger": "ledger",
        "PartlyCommitted": "exceptions",
        "PreparedTransaction": "recovery",
        "ReconnectTimeout": "exceptions",
        "ReconnectingConnection": "connection",
        "ReconnectingCursor": "cursor",
        "ReconnectingDatabaseAdapter": "adapter",
        "RetryPolicy": "policy",
        "XidWitness": "witness",
        "ZopelessTransactionManager": "zopeless",
        "connect": "connection",
        "initZopeless": "zopeless",
        "isZopeless": "zopeless",
        "recover": "recovery",
        "retry_on_disconnect": "retry",
    }

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
