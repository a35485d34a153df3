"""What the program gets done, as it is seen on its line: whatever program it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from zreconnect.testing import Count

# Seconds between two looks at the line.
INTERVAL = 0.05
# Seconds between two questions to the server, where the line cannot be read.
SERVER_INTERVAL = 0.25
# As many round trips without any answer that can be read are those of an encrypted line.
UNREADABLE = 30

COMMITS = "transactions"
RESULTS = "statements"
ENDED = "writing transactions of all clients"


class Observation:
    """Counts what is done, in a thread for as long as the ``with`` block lasts.

    count: of the line. ask: the server's own number, which grows with what is done; it may raise.
    """

    def __init__(self, count: Callable[[], Count], ask: Callable[[], int]) -> None:
        self._count = count
        self._ask = ask
        self._asked_at = 0.0
        self._known = 0
        self._settled = Count()
        #: What is counted: transactions, or statements where there are no transactions, or what
        #: the server says has ended, if the line cannot be read. None as long as there is nothing.
        self.measure: str | None = None
        #: When it began, as time.monotonic() has it.
        self.began = time.monotonic()
        # Until when how much was done, by each of the measures.
        self._samples: list[tuple[float, Mapping[str, int]]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observation", daemon=True)

    def __enter__(self) -> Observation:
        self._first = self._ask_server()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        self._thread.join()

    def now(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    @property
    def samples(self) -> list[tuple[float, int]]:
        """What was done in all until when, in seconds since the beginning."""
        measure = self.measure or COMMITS
        return [(at, done[measure]) for at, done in self._samples if measure in done]

    def done(self, now: bool = False) -> int:
        """What was done so far. now: including what the server has not yet been asked for."""
        return self._done(now)[self.measure or COMMITS]

    def _done(self, now: bool = False) -> dict[str, int]:
        count = self._count()
        done = {COMMITS: count.commits, RESULTS: count.results}
        if self.measure == ENDED:
            done[ENDED] = self._ask_server(now) - self._first
        return done

    def settle(self) -> bool:
        """Choose the measure by what was done since it was chosen last; return whether there is
        one. Who has committed once, as when making tables, need not do it again."""
        count = self._count()
        lately, self._settled = count - self._settled, count
        if lately.commits:
            self.measure = COMMITS
        elif lately.results:
            self.measure = RESULTS
        elif (
            self.measure is None
            and count.round_trips > UNREADABLE
            and self._ask_server() > self._first
        ):
            self.measure = ENDED
        return self.measure is not None

    def _ask_server(self, now: bool = False) -> int:
        """What the server said last, which is not asked more often than need be."""
        if now or time.monotonic() - self._asked_at >= SERVER_INTERVAL:
            self._asked_at = time.monotonic()
            try:
                self._known = self._ask()
            except Exception:
                # It is down: nothing is done.
                return self._known
        return self._known

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL):
            self._samples.append((self.now(), self._done()))
