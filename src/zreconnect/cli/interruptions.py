"""Interrupt the database while a job works with it: the plan, and a thread that carries it out."""

from __future__ import annotations

import bisect
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

#: Carries out one kind of interruption, which lasts that many seconds if its kind lasts.
Way = Callable[[float], object]

# An item takes three messages or more: BEGIN, an INSERT or several, COMMIT.
MOST_MESSAGES = 4
SHORTEST, LONGEST = 0.2, 0.8
# Short beside a transaction of some milliseconds, so that many interruptions fall into one.
POLL_INTERVAL = 0.0005


@dataclass(frozen=True)
class Interruption:
    """One interruption of a plan.

    kind: its name.
    item: the number of the item, from 0, during which it happens.
    messages: how many messages to the server are let pass before, from the start of the item.
    seconds: how long it lasts if its kind lasts.
    """

    kind: str
    item: int
    messages: int
    seconds: float


def make_plan(kinds: Sequence[str], number: int, items: int, seed: int) -> list[Interruption]:
    """Return ``number`` interruptions, in order: at random items, but not at the last one.

    Each kind occurs once before any occurs again. The same arguments give the same plan.
    """
    choose = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < number:
        drawn += choose.sample(kinds, len(kinds))
    places = range(max(1, items - 1))
    if number <= len(places):
        chosen = choose.sample(places, number)
    else:
        chosen = choose.choices(places, k=number)
    return [
        Interruption(
            kind, item, choose.randint(0, MOST_MESSAGES), choose.uniform(SHORTEST, LONGEST)
        )
        for kind, item in zip(drawn[:number], sorted(chosen), strict=True)
    ]


class Interrupter:
    """Carries out a plan in a thread of its own while a job works on its items.

    The job takes its items from `items`. An item is handed out only when the interruptions of
    the items before it have begun, and the last item only when they have ended. So all of them
    happen, and each is followed by a commit. Of several interruptions at one item only the first
    happens while the job works on it.

    plan: in order, as `make_plan` returns it.
    ways: how to carry out each kind.
    count_messages: returns how many messages the job has sent to the server so far.
    announce: called in the thread with each interruption that begins.
    stopping: is set at the end of the ``with`` block; a way that waits should wait for it.
    """

    def __init__(
        self,
        plan: Sequence[Interruption],
        ways: Mapping[str, Way],
        count_messages: Callable[[], int],
        announce: Callable[[Interruption], object],
        stopping: threading.Event,
    ) -> None:
        self._plan = plan
        self._ways = ways
        self._count_messages = count_messages
        self._announce = announce
        self._stopping = stopping
        self._changed = threading.Condition()
        # The number of the item that the job works on, and whether it waits for the next one.
        self._item = -1
        self._job_waits = False
        self._begun = 0
        self._ended: list[float] = []
        self._committed: list[float] = []
        #: What a way has raised; it ends the thread.
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="interrupter", daemon=True)

    def __enter__(self) -> Interrupter:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop after the present interruption."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join()

    def items(self, names: Sequence[str]) -> Iterator[str]:
        """Hand the items out. Whoever asks for the next has committed the one before.

        Raises what a way has raised.
        """
        for number, name in enumerate(names):
            due = sum(each.item < number for each in self._plan)
            is_last = number == len(names) - 1
            self._hold_job_until_begun(due)
            self._hold_job_until_ended(due if is_last else 0)
            with self._changed:
                self._item = number
                self._changed.notify_all()
            yield name
            self._committed.append(time.monotonic())
        self._hold_job_until_ended(len(self._plan))

    def recoveries(self) -> dict[str, list[float]]:
        """Return, for each kind, the seconds from each interruption's end to the next commit."""
        seconds: dict[str, list[float]] = {}
        for interruption, ended in zip(self._plan, self._ended, strict=False):
            following = bisect.bisect_left(self._committed, ended)
            if following < len(self._committed):
                seconds.setdefault(interruption.kind, []).append(self._committed[following] - ended)
        return seconds

    def _hold_job_until_begun(self, number: int) -> None:
        self._hold_job_until(lambda: self._begun >= number)

    def _hold_job_until_ended(self, number: int) -> None:
        self._hold_job_until(lambda: len(self._ended) >= number)

    def _hold_job_until(self, is_true: Callable[[], bool]) -> None:
        with self._changed:
            self._job_waits = True
            self._changed.wait_for(lambda: is_true() or self.error)
            self._job_waits = False
        if self.error:
            raise self.error

    # What follows runs in the thread.

    def _run(self) -> None:
        try:
            for number, interruption in enumerate(self._plan):
                is_first = number == 0 or self._plan[number - 1].item < interruption.item
                self._wait_for_moment(interruption, is_first)
                if self._stopping.is_set():
                    return
                self._carry_out(interruption)
        except Exception as error:
            with self._changed:
                self.error = error
                self._changed.notify_all()

    def _wait_for_moment(self, interruption: Interruption, is_first: bool) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._item >= interruption.item or self._stopping.is_set()
            )
        sent = self._count_messages() + interruption.messages
        while not self._stopping.is_set() and not self._job_waits:
            if is_first and self._count_messages() >= sent:
                return
            self._stopping.wait(POLL_INTERVAL)

    def _carry_out(self, interruption: Interruption) -> None:
        self._announce(interruption)
        with self._changed:
            self._begun += 1
            self._changed.notify_all()
        self._ways[interruption.kind](interruption.seconds)
        with self._changed:
            self._ended.append(time.monotonic())
            self._changed.notify_all()
