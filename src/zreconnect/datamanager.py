"""Joins a connection to `transaction`: the two commit together."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from transaction.interfaces import ITransaction, ITransactionManager
from zope.interface import implementer

from zreconnect.interfaces import ITransactionDataManager

if TYPE_CHECKING:
    from zreconnect.connection import ReconnectingConnection, Savepoint


@implementer(ITransactionDataManager)
class ConnectionDataManager:
    """One connection's part in one transaction of a transaction manager.

    COMMIT is sent in ``tpc_vote``, as one-phase commit asks: the data manager sorts last, so when
    it votes, all the others have agreed.
    """

    def __init__(
        self, connection: ReconnectingConnection, transaction_manager: ITransactionManager
    ) -> None:
        # Weak, so that it shows when nobody can end the transaction any more.
        self._transaction_manager = weakref.ref(transaction_manager)
        self.disconnected = False
        self._connection = connection

    @property
    def transaction_manager(self) -> ITransactionManager | None:
        return self._transaction_manager()

    def abort(self, transaction: ITransaction | None) -> None:
        self._connection._leave_transaction_manager()
        if not self._connection.closed:
            self._connection.rollback()

    def tpc_begin(self, transaction: ITransaction) -> None:
        # Also when the program rolled back the lost connection itself: a part of the transaction's
        # work is gone.
        if self.disconnected:
            self._connection._raise_already_disconnected()

    def commit(self, transaction: ITransaction) -> None:
        """Nothing is to be done between the first phase's begin and its vote."""

    def tpc_vote(self, transaction: ITransaction) -> None:
        self._connection._commit()

    def tpc_finish(self, transaction: ITransaction) -> None:
        self._connection._leave_transaction_manager()

    def tpc_abort(self, transaction: ITransaction) -> None:
        self.abort(transaction)

    def sortKey(self) -> str:
        return f"~zreconnect:{id(self._connection)}"

    def savepoint(self) -> Savepoint:
        return self._connection.savepoint()

    def should_retry(self, error: BaseException) -> bool:
        return self._connection._may_run_again(error)


def join_transactions(
    connection: ReconnectingConnection, transaction_manager: ITransactionManager
) -> None:
    """Make every later transaction of ``connection`` part of the manager's current one."""
    connection._before_begin = partial(_join, connection, transaction_manager)


def _join(connection: Any, transaction_manager: ITransactionManager) -> None:
    if connection._data_manager is None:
        data_manager = connection._data_manager_class(connection, transaction_manager)
        transaction_manager.get().join(data_manager)
        connection._data_manager = data_manager
