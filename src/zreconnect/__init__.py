"""Database connections that survive their database: reconnecting for Zope's `transaction`."""

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
