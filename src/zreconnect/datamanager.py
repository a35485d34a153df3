"""Joins a connection to `transaction`: the two commit together."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING

from transaction.interfaces import ITransaction, ITransactionManager

from zreconnect.documented import implements
from zreconnect.exceptions import CommitOutcomeUnknown
from zreconnect.interfaces import ITransactionDataManager
from zreconnect.siblings import siblings_of
from zreconnect.states import State
from zreconnect.witness import Outcome

if TYPE_CHECKING:
    from zreconnect.connection import ReconnectingConnection
    from zreconnect.savepoint import Savepoint

# What `transaction` says of one that has failed, while it tells its data managers, and afterwards.
# One that has succeeded is aborted, too, for its hooks.
FAILED = frozenset({"Committing", "Commit failed"})


@implements(ITransactionDataManager)
class ConnectionDataManager:
    """One connection's part in one transaction of a transaction manager.

    COMMIT is sent in ``tpc_vote``, as one-phase commit asks: the data manager sorts last, so when
    it votes, all the others have agreed.
    """

    #: Whether nothing takes back what it has voted for.
    commits_in_vote = True
    #: What ``commit()`` of the connection says.
    commit_refused = (
        "This connection is part of a transaction manager's transaction: commit that instead, with "
        "transaction.commit() or the manager's own commit(), or leave it to the framework that does"
    )

    def __init__(
        self, connection: ReconnectingConnection, transaction_manager: ITransactionManager
    ) -> None:
        # Weak, so that it shows when nobody can end the transaction any more.
        self._transaction_manager = weakref.ref(transaction_manager)
        self._connection = connection
        self.work = connection.work
        self.guard = connection.guard
        self._losses = self.work.losses
        # Whether it has committed; and whether the thread was told that.
        self.has_committed = False
        self._has_finished = False
        # What a rollback has found out of a commit that was interrupted.
        self._unknown: CommitOutcomeUnknown | None = None

    @property
    def transaction_manager(self) -> ITransactionManager | None:
        return self._transaction_manager()

    @property
    def disconnected(self) -> bool:
        return self.work.losses != self._losses

    def is_present(self) -> bool:
        """Whether this is the part that the connection has now, and not that of an ended thread."""
        return self.work.member is self

    def abort(self, transaction: ITransaction | None) -> None:
        """Roll back. Raises `CommitOutcomeUnknown` if the commit was interrupted, and has, or may
        have, committed; again each time, because ``transaction`` only logs it in its own commit."""
        try:
            if self.is_present():
                self._roll_back()
            else:
                self.guard.tell()
        except CommitOutcomeUnknown as unknown:
            self._unknown = unknown
        is_told = self.has_committed and self._has_finished
        if is_told and transaction is not None and transaction.status in FAILED:
            # Another one has failed to finish, and what it has raised may run the work again.
            self._unknown = CommitOutcomeUnknown(
                self._connection.server,
                evidence="Another data manager of the transaction has failed to finish.",
                outcome=Outcome.COMMITTED.value,
            )
        if self._unknown is not None:
            raise self._unknown

    def _roll_back(self) -> None:
        unknown: CommitOutcomeUnknown | None = None
        try:
            if self.work.state is not State.CLOSED:
                self.guard.try_turn()
                self.guard.roll_back()
        except CommitOutcomeUnknown as error:
            unknown = self._unknown = error
        # Not after an interrupt: what is left undone is done when the transaction is forgotten.
        self.work.leave(self)
        if unknown is not None:
            raise unknown

    def tpc_begin(self, transaction: ITransaction) -> None:
        # Also when the program rolled back the lost connection itself: a part of the transaction's
        # work is gone.
        if self.work.losses != self._losses or self.work.member is not self:
            self.work.refuse_lost(self._losses)
        turn = self.work.turn
        if not turn.is_mine() and not turn.is_anothers():
            # The thread has ended whose transaction this was.
            self.work.refuse_lost(self._losses)

    def commit(self, transaction: ITransaction) -> None:
        """With several connections, see that this one is there; see `zreconnect.siblings`."""
        siblings_of(transaction).before_commits(self)

    def tpc_vote(self, transaction: ITransaction) -> None:
        is_active = self.work.state is State.ACTIVE
        try:
            self.guard.commit()
            self.has_committed = is_active
        except Exception as error:
            siblings = siblings_of(transaction)
            if not siblings.is_harmless(self, error):
                siblings.tell_part(self, error)
                raise

    def tpc_finish(self, transaction: ITransaction) -> None:
        self.work.leave(self)
        self._has_finished = True
        if self.work.told_by_call != self.work.number:
            _ = [*self.work.own.telling()]

    def tpc_abort(self, transaction: ITransaction) -> None:
        self.abort(transaction)

    def sortKey(self) -> str:
        return f"~zreconnect:{id(self._connection)}"

    def savepoint(self) -> Savepoint:
        return self._connection.savepoint()

    def should_retry(self, error: BaseException) -> bool:
        return self.guard.may_run_again(error)


def join_transactions(
    connection: ReconnectingConnection, transaction_manager: ITransactionManager
) -> None:
    """Make every later transaction of ``connection`` part of the manager's current one."""
    connection.work.join = partial(_join, connection, transaction_manager)


def _join(connection: ReconnectingConnection, transaction_manager: ITransactionManager) -> None:
    if connection.work.member is None:
        data_manager = connection.data_manager_class(connection, transaction_manager)
        manager_transaction = transaction_manager.get()
        manager_transaction.join(data_manager)
        siblings = siblings_of(manager_transaction)
        siblings.add(data_manager)
        # They last as long as the transaction, also if an interrupt keeps it from telling that it
        # ends.
        connection.work.become_part(data_manager, siblings)
