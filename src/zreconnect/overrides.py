"""``commit()`` and ``rollback()`` of a class of connections that the program has made.

What such a method does besides calling the one that it overrides is done here, too: it is called,
and what it calls is the connection's own commit, with all that belongs to it. What it does before
is a part of the transaction.
"""

from __future__ import annotations

from collections.abc import Callable

from zreconnect.guard import Guard
from zreconnect.states import Moment, State


def end_by_class(guard: Guard, name: str, end: Callable[[], object]) -> None:
    """Call ``end``, by way of the method of that name of the raw connection's class, if that has an
    attribute ``zreconnect_overridden``: a dictionary, where the base class's method finds it.

    name: "commit" or "rollback". Raises what ``end`` raises, whether or not the method lets it
    pass; what else the method raises; and the driver's ProgrammingError if it has not called that
    of its base class, so that nothing is committed. A rollback is done in any case.
    """
    ends = getattr(guard.work.link.session.raw, "zreconnect_overridden", None)
    if ends is None:
        end()
        return
    raised: list[BaseException | None] = []
    try:
        _end_by_method(guard, ends, name, end, raised)
    finally:
        ends.clear()
        # Their tracebacks refer to it.
        raised.clear()


def _end_by_method(
    guard: Guard,
    ends: dict[str, Callable[[], None]],
    name: str,
    end: Callable[[], object],
    raised: list[BaseException | None],
) -> None:
    """raised: empty, for what ``end`` has raised, or None, when it was called."""
    work, link, raw = guard.work, guard.work.link, guard.work.link.session.raw

    def end_once() -> None:
        # Another call is the module's own, and does nothing.
        ends.clear()
        if link.observer.watches_statements:
            link.observer.executed(None)
        try:
            end()
        except BaseException as error:
            raised.append(error)
            raise
        raised.append(None)

    ends[name] = end_once
    try:
        getattr(raw, name)()
    except BaseException as error:
        try:
            if error not in raised:
                # What it does outside the transaction is committed at once.
                is_outside = work.state is State.IDLE
                guard.meet(error, Moment.AUTOCOMMIT if is_outside else Moment.STATEMENT)
        finally:
            if not raised and name == "rollback":
                end()
        raise
    if not raised:
        if name == "commit":
            raise link.driver.module.ProgrammingError(
                f"Nothing is committed: commit() of {type(raw).__name__} has not called that of "
                "its base class"
            )
        end()
    elif raised[0] is not None:
        raise raised[0]
