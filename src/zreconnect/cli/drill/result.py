"""What a drill has shown, for people and for scripts."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zreconnect.cli.drill.trial import (
    DEADLY,
    ENDED,
    HUNG,
    MISSED,
    WORKED,
    Interruption,
    Row,
    Trial,
)

# How many findings are named before the rest is only counted.
NAMED_FINDINGS = 10


@dataclass(frozen=True)
class Result:
    """A drill that is over.

    arguments: of the command, as they were given, without the password. server, address: of the
    database. kinds: of the faults that could happen.
    """

    trial: Trial
    arguments: Sequence[str]
    server: str
    address: str
    seed: int
    kinds: Sequence[str]

    @property
    def command(self) -> str:
        """The command as it is typed."""
        return shlex.join(self.arguments)

    @property
    def seconds(self) -> float:
        """How long the drill has lasted while something was seen."""
        samples = self.trial.observation.samples
        return samples[-1][0] if samples else 0.0

    @property
    def done(self) -> int:
        """What was done in all."""
        samples = self.trial.observation.samples
        return samples[-1][1] if samples else 0

    @property
    def not_tried(self) -> list[str]:
        """The kinds of faults that could have happened and did not."""
        happened = {each.kind for each in self.trial.interruptions if each.outcome != MISSED}
        return [kind for kind in self.kinds if kind not in happened]

    @property
    def verdict(self) -> str:
        """What has come out, in one sentence."""
        if not self.trial.tried:
            return "Nothing was tried."
        happened = [each for each in self.trial.interruptions if each.outcome != MISSED]
        times = Counter(each.outcome for each in happened)
        number = f"{len(happened)} fault{'s' if len(happened) != 1 else ''}"
        if self.trial.survived:
            seconds = [
                (each.seconds, each.kind)
                for each in happened
                if each.outcome == WORKED and each.seconds is not None
            ]
            if not seconds:
                return f"Survived: {number} happened."
            longest, kind = max(seconds)
            fewer = sum(has_fewer(each) for each in happened)
            reservation = f", but with fewer connections after {fewer} of them" if fewer else ""
            each_of = "each of " if len(happened) > 1 else ""
            return (
                f"Survived: worked again after {each_of}{number}, at the latest after "
                f"{longest:.2f} s ({kind}){reservation}."
            )
        parts = []
        if times[ENDED]:
            parts.append(f"{times[ENDED]} of {number} ended it")
        if times[HUNG]:
            parts.append(f"{times[HUNG]} of {number} left it hanging")
        if self.trial.has_failed:
            parts.append("it ended by itself")
        if self.trial.findings:
            parts.append(f"the check found {len(self.trial.findings)}")
        return f"Does NOT survive: {', '.join(parts)}."

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        trial = self.trial
        return {
            "survived": trial.survived if trial.tried else None,
            "verdict": self.verdict,
            "command": list(self.arguments),
            "server": self.server,
            "address": self.address,
            "seed": self.seed,
            "seconds": round(self.seconds, 3),
            "measure": trial.observation.measure,
            "done": self.done,
            "starts": trial.starts,
            "over": trial.over,
            "faults": [_fault(each) for each in trial.interruptions],
            "not_tried": self.not_tried,
            "findings_before": trial.findings_before,
            "findings": trial.findings,
        }


def _fault(each: Interruption) -> dict[str, Any]:
    return {
        "number": each.number,
        "kind": each.kind,
        "description": each.description,
        "began": round(each.began, 3),
        "ended": round(each.ended, 3),
        "outcome": each.outcome,
        "seconds": None if each.seconds is None else round(each.seconds, 3),
        "status": each.status,
        "said": each.said,
        "connections": each.connections,
        "connections_after": each.connections_after,
        "findings": each.findings,
    }


def has_fewer(each: Interruption) -> bool:
    """Whether the program has fewer connections than before: a part of it may have ended."""
    return each.connections_after is not None and each.connections_after < each.connections


def line_for(each: Interruption) -> Iterator[str]:
    """What is told of a fault when its outcome is final."""
    fewer = ""
    if has_fewer(each):
        fewer = f", with {each.connections_after} of {each.connections} connections"
    found = f"; the check found {len(each.findings)} more" if each.findings else ""
    yield f"{each.began:7.1f} s  {each.kind:<15}{each.how}{fewer}{found}"
    for line in each.said if each.outcome in DEADLY else ():
        yield f"{'':27}{line}"


def conclusion(result: Result) -> Iterator[str]:
    """What is told at the end, before the verdict."""
    trial = result.trial
    if trial.over:
        yield f"{trial.over[0].upper()}{trial.over[1:]}"
    if result.not_tried:
        yield f"Not tried: {', '.join(result.not_tried)}"
    if trial.observation.measure:
        starts = f", started {trial.starts} times" if trial.starts > 1 else ""
        yield f"{result.done} {trial.observation.measure} in {result.seconds:.0f} s{starts}"
    if trial.findings_before:
        yield f"The check had found {len(trial.findings_before)} before the first fault"
    if trial.findings:
        yield from _findings(trial.findings)


def _findings(findings: Sequence[Row]) -> Iterator[str]:
    yield f"The check found {len(findings)}:"
    for row in findings[:NAMED_FINDINGS]:
        yield f"  {', '.join(row)}"
    if len(findings) > NAMED_FINDINGS:
        yield f"  and {len(findings) - NAMED_FINDINGS} more"
