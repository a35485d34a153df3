"""Several connections in one transaction of a transaction manager's.

With one phase, each commits by itself when it votes. If a later one's COMMIT fails, what the
earlier ones have committed stays, and nothing can take it back. So before the first COMMIT all of
them are asked: who is lost is found out while the work may still run again. When one has committed,
or may have, what the next one meets is told as what it is, and runs no work again. Of those that
have only read nothing is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transaction.interfaces import ITransaction

from zreconnect import events
from zreconnect.exceptions import CommitOutcomeUnknown, DisconnectionError, PartlyCommitted
from zreconnect.guard import Guard
from zreconnect.states import COMMIT_SENT, Answer, Request, State

if TYPE_CHECKING:
    from zreconnect.datamanager import ConnectionDataManager

# The pairs of servers that were named in a warning.
_named: set[frozenset[str]] = set()


class Siblings:
    """The data managers that connections have joined to one transaction.

    The transaction refers to it as long as it lasts, and nobody else does.
    """

    def __init__(self) -> None:
        self._all: list[ConnectionDataManager] = []
        # Those that commit when they vote; and which of them have written, as far as is known.
        self._one_phase = 0
        self._writers: list[ConnectionDataManager] = []

    def add(self, member: ConnectionDataManager) -> None:
        self._all.append(member)
        self._one_phase += member.commits_in_vote

    def before_commits(self, member: ConnectionDataManager) -> None:
        """To be called for each that commits when it votes, before any of them has committed.

        Raises what refuses a commit, and `DisconnectionError` if the session is lost.
        """
        if self._one_phase < 2 or member.work.ask(Request.COMMIT) is Answer.NOTHING:
            return
        if has_written(member.guard):
            self._writers.append(member)
            _warn(self._writers)
        else:
            member.work.has_only_read = True

    def is_harmless(self, member: ConnectionDataManager, error: Exception) -> bool:
        """Whether nothing is missing although ``member`` has met ``error`` in its vote.

        Then it is rolled back.
        """
        is_lost = isinstance(error, CommitOutcomeUnknown) or (
            isinstance(error, DisconnectionError) and bool(self._committed_beside(member))
        )
        is_harmless: bool = is_lost and member.work.has_only_read
        if is_harmless:
            member.guard.roll_back()
            member.work.own.forget()
        return is_harmless

    def tell_part(self, member: ConnectionDataManager, error: Exception) -> None:
        """Raise `PartlyCommitted` if ``error``, which ``member`` has met, does not tell all.

        That is so if a sibling has committed, or this one may have, and another one not.
        """
        committed = self._committed_beside(member)
        left = [
            each
            for each in self._all
            if each is not member
            and each.work.state is not State.IDLE
            and not each.work.has_only_read
        ]
        is_unknown = isinstance(error, CommitOutcomeUnknown)
        # An interrupt leaves the COMMIT to `abort`, which tells what became of it.
        is_interrupted = member.work.state in COMMIT_SENT
        if is_interrupted and (member.work.has_only_read or not committed):
            return
        is_in_doubt = is_unknown or is_interrupted
        same = [member]
        if not member.commits_in_vote:
            # It is a branch, and those that are left are others of the same transaction.
            same, left = [member, *left], []
        if committed or (is_unknown and left):
            where = (
                _servers(committed),
                _servers(left if is_in_doubt else [*same, *left]),
                _servers(same if is_in_doubt else []),
            )
            partly = PartlyCommitted(*where, str(error))
            events.announce(events.CommittedInPart(partly.server, *where, partly))
            for each in (member, *committed):
                each.work.own.raising(partly)
            raise partly from error

    def _committed_beside(self, member: ConnectionDataManager) -> list[ConnectionDataManager]:
        return [each for each in self._all if each is not member and each.has_committed]


def siblings_of(transaction: ITransaction | None) -> Siblings:
    """Those of a transaction of a transaction manager's; without one there are none."""
    if transaction is None:
        return Siblings()
    try:
        siblings: Siblings = transaction.data(Siblings)
    except KeyError:
        siblings = Siblings()
        transaction.set_data(Siblings, siblings)
    return siblings


def has_written(guard: Guard) -> bool:
    """Whether the present transaction of a connection has written something, or may have.

    Asks the server. Raises `DisconnectionError` if the session is lost.
    """
    link = guard.work.link
    with guard.asking():
        has_written: bool = link.observer.has_written(link.session.raw)
    return has_written


def _servers(members: list[ConnectionDataManager]) -> tuple[str, ...]:
    return tuple(each.work.link.server.address for each in members)


def _warn(writers: list[ConnectionDataManager]) -> None:
    """Say, once for each pair of servers, that they may get a transaction in part."""
    servers = _servers(writers)
    for server in servers[:-1]:
        pair = frozenset((server, servers[-1]))
        if pair not in _named:
            _named.add(pair)
            events.logger.warning(
                "One transaction writes to %s and to %s, each with a COMMIT of its own: if the "
                "second fails, the first stays. With two_phase=True it is both or neither",
                server,
                servers[-1],
                extra={"server": server, "other_server": servers[-1]},
            )
