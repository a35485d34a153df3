"""Which faults happen to a program, in which order, and for how long."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Seconds in which the program works undisturbed before a fault, so that what one has done to it
# is not taken for the next one's.
CALM = (0.5, 1.0)
# Seconds that a fault lasts, if its kind lasts.
LASTS = (0.3, 1.0)
# Bytes that pass before a line is cut: a short transaction is about this many in each direction.
MOST_BYTES = 600


@dataclass(frozen=True)
class Planned:
    """A fault of a schedule.

    kind: its name.
    calm: the seconds that the program has worked before.
    seconds: how long it lasts, if its kind lasts.
    after: how many bytes pass before, if its kind counts them.
    """

    kind: str
    calm: float
    seconds: float
    after: int


def make_plan(kinds: Sequence[str], seed: int) -> Iterator[Planned]:
    """Give faults without end; each kind happens once before any happens again.

    The same arguments give the same ones.
    """
    choose = random.Random(seed)
    while True:
        for kind in choose.sample(kinds, len(kinds)):
            yield Planned(
                kind, choose.uniform(*CALM), choose.uniform(*LASTS), choose.randrange(MOST_BYTES)
            )
