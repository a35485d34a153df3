"""The places at which a server may be: the hosts of a DSN, and the addresses of a host's name.

The time of an attempt to connect is shared among them. A place that does not answer within its
share is not given up: the next one is tried beside it, and whichever comes first is taken. Those
that fail meanwhile are asked again and again, for one of them may be the next primary; and what was
silent once is asked last, until it has answered.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from zreconnect.answers import Answers
from zreconnect.interfaces import Meaning
from zreconnect.policy import PERSIST

Open = Callable[[Mapping[str, Any], float], Any]
#: The seconds between two rounds, by the number of the first of them.
Pauses = Callable[[int], float]


def default_pauses(rounds: int) -> float:
    """Those of the default policy."""
    return PERSIST.pause(rounds, 0.0)


class Places:
    """The places of one server, from one attempt to the next.

    For the arguments see `connect`.
    """

    def __init__(self, driver: Any, parameters: Mapping[str, Any], open_session: Open) -> None:
        self._arguments = driver, parameters, open_session
        self._silent: set[int] = set()

    def connect(self, timeout: float, pauses: Pauses) -> Any:
        """As the function `connect`."""
        driver, parameters, open_session = self._arguments
        return connect(
            driver, parameters, timeout, open_session, pauses=pauses, silent=self._silent
        )


def connect(
    driver: Any,
    parameters: Mapping[str, Any],
    timeout: float,
    open_session: Open,
    share: float | None = None,
    pauses: Pauses = default_pauses,
    silent: set[int] | None = None,
) -> Any:
    """A new raw connection to one of the places that the parameters name.

    timeout: seconds for all of them. open_session: called with the parameters of one place and a
    timeout; as `IDriver.connect`. share: the seconds in which all are to be tried; None for all of
    the timeout. pauses: between asking those again that have failed, while others are silent.
    silent: what stands for the places that were silent the last time; it is kept for the next one.

    Raises what ``open_session`` raised: if there are several places, what one of them refuses for
    good, or the module's OperationalError with the messages of all, or TimeoutError if there are
    none. Then no place has given a connection, and each has had its share of the time.
    """
    places = driver.places(parameters)
    if len(places) == 1:
        return open_session(places[0], timeout)
    silent = set() if silent is None else silent
    race = _Race(driver, parameters, timeout, open_session, places, pauses, silent)
    try:
        return race.run(timeout if share is None else share)
    finally:
        race.is_over.set()


class _Race:
    """An attempt to connect to several places. A place is known by its number."""

    def __init__(
        self,
        driver: Any,
        parameters: Mapping[str, Any],
        timeout: float,
        open_session: Open,
        places: list[Mapping[str, Any]],
        pauses: Pauses,
        silent: set[int],
    ) -> None:
        self._driver = driver
        self._parameters = parameters
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._open_session = open_session
        self._places = places
        self._pauses = pauses
        self._silent = silent
        # The next attempt may have them in another order.
        self._names = [hash(repr(place)) for place in places]
        # A place with its connection, or with the error that there is none.
        self._outcomes: Answers[tuple[int, Any, BaseException | None]] = Answers()
        self._under_way: set[int] = set()
        self._errors: dict[int, BaseException] = {}
        self.is_over = threading.Event()

    def run(self, seconds: float) -> Any:
        """The connection. seconds: what is shared among the places."""
        end, rounds = time.monotonic() + seconds, 0
        places = sorted(range(len(self._places)), key=self._was_silent)
        while (raw := self._ask(places, end)) is None and self._may_go_on():
            rounds += 1
            pause = self._pauses(rounds) if self._errors else math.inf
            raw = self._first(min(self._deadline, time.monotonic() + pause))
            if raw is not None or not self._may_go_on():
                break
            places, end = sorted(self._errors.keys() - self._under_way), self._deadline
        if raw is None:
            raise self._failure()
        return raw

    def _may_go_on(self) -> bool:
        """Whether there is time left, and somebody to wait for, and nobody has refused for good."""
        is_over = not self._under_way or time.monotonic() >= self._deadline
        return not is_over and self._refusal() is None

    def _ask(self, places: list[int], end: float) -> Any:
        """Try the places, one after the other; the first connection, None if there is none."""
        for number, place in enumerate(places):
            now = time.monotonic()
            # The last share is for all that are still under way.
            share = max(0.0, end - now) / (len(places) - number + 1)
            self._start(place, share)
            raw = self._first(now if self._was_silent(place) else now + share, place)
            if raw is not None:
                return raw
            if place in self._under_way:
                self._silent.add(self._names[place])
        return None

    def _was_silent(self, place: int) -> bool:
        return self._names[place] in self._silent

    def _start(self, place: int, share: float) -> None:
        self._under_way.add(place)
        threading.Thread(
            target=self._try,
            args=(place, share),
            name="zreconnect connection attempt",
            daemon=True,
        ).start()

    def _try(self, place: int, share: float) -> None:
        timeout = max(0.0, self._deadline - time.monotonic())
        try:
            raw = connect(
                *(self._driver, self._places[place], timeout, self._open_session),
                *(share, self._pauses),
            )
        except BaseException as error:
            self._outcomes.put((place, None, error))
        else:
            self._outcomes.put((place, raw, None))
            self.is_over.wait()
            self._close_late()

    def _close_late(self) -> None:
        """Close the connections that came too late, all that there are by now."""
        while (outcome := self._outcomes.get(-math.inf)) is not None:
            _, raw, error = outcome
            if error is None:
                self._driver.close(raw)

    def _first(self, until: float, place: int | None = None) -> Any:
        """The first connection until then; None as soon as ``place``, or all, have failed."""
        while self._under_way and (outcome := self._outcomes.get(until)) is not None:
            found, raw, error = outcome
            self._under_way.remove(found)
            self._silent.discard(self._names[found])
            if error is None:
                return raw
            self._errors[found] = error
            if found == place:
                break
        return None

    def _refusal(self) -> BaseException | None:
        for error in self._errors.values():
            if self._driver.connect_meaning(error, self._parameters) is not Meaning.DISCONNECT:
                return error
        return None

    def _failure(self) -> BaseException:
        if (refusal := self._refusal()) is not None:
            return refusal
        if not self._errors:
            return TimeoutError(f"no answer within {self._timeout:.1f} seconds")
        messages = "\n".join(str(self._errors[place]).strip() for place in sorted(self._errors))
        failure: BaseException = self._driver.module.OperationalError(messages)
        return failure
