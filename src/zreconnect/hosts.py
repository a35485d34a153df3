"""The places at which a server may be: the hosts of a DSN, and the addresses of a host's name.

The time of an attempt to connect is shared among them. A place that does not answer within its
share is not given up: the next one is tried beside it, and whichever comes first is taken.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from zreconnect.answers import Answers
from zreconnect.interfaces import Meaning

Open = Callable[[Mapping[str, Any], float], Any]


def connect(
    driver: Any,
    parameters: Mapping[str, Any],
    timeout: float,
    open_session: Open,
    share: float | None = None,
) -> Any:
    """A new raw connection to one of the places that the parameters name.

    timeout: seconds for all of them. open_session: called with the parameters of one place and a
    timeout; as `IDriver.connect`. share: the seconds in which all are to be tried; None for all of
    the timeout.

    Raises what ``open_session`` raised: if there are several places, what one of them refuses for
    good, or the module's OperationalError with the messages of all, or TimeoutError if there are
    none. Then no place has given a connection, and each has had its share of the time.
    """
    places = driver.places(parameters)
    if len(places) == 1:
        return open_session(places[0], timeout)
    race = _Race(driver, parameters, timeout, open_session)
    try:
        return race.run(places, timeout if share is None else share)
    finally:
        race.is_over.set()


class _Race:
    """An attempt to connect to several places."""

    def __init__(
        self, driver: Any, parameters: Mapping[str, Any], timeout: float, open_session: Open
    ) -> None:
        self._driver = driver
        self._parameters = parameters
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._open_session = open_session
        # A place with its connection, or with the error that there is none.
        self._outcomes: Answers[tuple[Any, Any, BaseException | None]] = Answers()
        self._errors: list[BaseException] = []
        self.is_over = threading.Event()

    def run(self, places: list[Mapping[str, Any]], seconds: float) -> Any:
        """The connection. seconds: what is shared among the places."""
        end = time.monotonic() + seconds
        for number, place in enumerate(places):
            now = time.monotonic()
            # The last share is for all that are still under way.
            share = max(0.0, end - now) / (len(places) - number + 1)
            self._start(place, share)
            raw = self._first(now + share, number + 1, place)
            if raw is not None:
                return raw
        if self._refusal() is None and len(self._errors) < len(places):
            raw = self._first(self._deadline, len(places))
            if raw is not None:
                return raw
        raise self._failure()

    def _start(self, place: Mapping[str, Any], share: float) -> None:
        threading.Thread(
            target=self._try,
            args=(place, share),
            name="zreconnect connection attempt",
            daemon=True,
        ).start()

    def _try(self, place: Mapping[str, Any], share: float) -> None:
        timeout = max(0.0, self._deadline - time.monotonic())
        try:
            raw = connect(self._driver, place, timeout, self._open_session, share)
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

    def _first(self, until: float, started: int, place: Any = None) -> Any:
        """The first connection until then; None as soon as ``place``, or all, have failed."""
        while (outcome := self._outcomes.get(until)) is not None:
            found, raw, error = outcome
            if error is None:
                return raw
            self._errors.append(error)
            if found is place or len(self._errors) == started:
                break
        return None

    def _refusal(self) -> BaseException | None:
        for error in self._errors:
            if self._driver.connect_meaning(error, self._parameters) is not Meaning.DISCONNECT:
                return error
        return None

    def _failure(self) -> BaseException:
        if (refusal := self._refusal()) is not None:
            return refusal
        if not self._errors:
            return TimeoutError(f"no answer within {self._timeout:.1f} seconds")
        messages = "\n".join(str(error).strip() for error in self._errors)
        failure: BaseException = self._driver.module.OperationalError(messages)
        return failure
