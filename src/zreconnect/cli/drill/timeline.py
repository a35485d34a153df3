"""The timeline of a drill's report: what was done each second, and the faults, as SVG."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape

from zreconnect.cli.drill.trial import ENDED, HUNG, MISSED, Interruption

# Seconds that a bin may last: the shortest of them with which there are no more than MOST_BINS.
BINS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 3600.0)
MOST_BINS = 240

# In pixels. A mark needs that much of a lane.
LEFT, RIGHT, BOTTOM, LANE, MARK = 64, 24, 44, 28, 24
HEIGHT = 220
NARROWEST = 1040
CLASSES = {ENDED: "ended", HUNG: "hung", MISSED: "missed"}


def rates(samples: Sequence[tuple[float, int]]) -> list[tuple[float, float, float]]:
    """What was done per second, as (from, until, rate) with seconds since the beginning.

    samples: what was done in all until when.
    """
    if len(samples) < 2:
        return []
    times = [at for at, _ in samples]
    begin, end = times[0], times[-1]
    width = next((each for each in BINS if (end - begin) / each <= MOST_BINS), BINS[-1])
    edges = [begin + width * number for number in range(math.floor((end - begin) / width) + 1)]
    totals = [_total_at(samples, times, edge) for edge in edges]
    return [
        (edges[n], edges[n + 1], max(0.0, totals[n + 1] - totals[n]) / width)
        for n in range(len(edges) - 1)
    ]


def _total_at(samples: Sequence[tuple[float, int]], times: Sequence[float], moment: float) -> float:
    after = min(max(bisect.bisect_left(times, moment), 1), len(samples) - 1)
    (before_at, before), (after_at, total) = samples[after - 1], samples[after]
    part = (moment - before_at) / (after_at - before_at) if after_at > before_at else 1.0
    return before + (total - before) * min(1.0, max(0.0, part))


def timeline(
    bins: Sequence[tuple[float, float, float]],
    interruptions: Sequence[Interruption],
    seconds: float,
    unit: str,
) -> str:
    """The SVG. seconds: of the whole drill. unit: of what is done."""
    width = max(NARROWEST, LEFT + RIGHT + MARK * len(interruptions) // 2)
    seconds = max(seconds, 0.1)
    scale = (width - LEFT - RIGHT) / seconds

    def x(moment: float) -> float:
        return LEFT + scale * moment

    lanes = list(_lanes([x(each.began) for each in interruptions]))
    top = 12 + LANE * (max(lanes, default=0) + 1)
    foot = top + HEIGHT
    highest = _nice(max((rate for _, _, rate in bins), default=1.0), (1, 1.5, 2, 3, 4, 5, 6, 8))

    def y(rate: float) -> float:
        return foot - HEIGHT * rate / highest

    parts = [
        f'<svg width="{width}" height="{foot + BOTTOM}" viewBox="0 0 {width} {foot + BOTTOM}"'
        ' role="group" aria-labelledby="timeline-title timeline-text">',
        f'<title id="timeline-title">{escape(unit)} per second, and the faults</title>',
        f'<desc id="timeline-text">{escape(_in_words(bins, interruptions, seconds, unit))}</desc>',
        '<g aria-hidden="true">',
        *_axes(width, foot, highest, seconds, unit, x, y),
    ]
    for each in interruptions:
        until = each.ended + (each.seconds or 0.0)
        parts += [
            _band("fault", x(each.began), x(each.ended), top),
            _band("after", x(each.ended), x(until), top),
        ]
    if bins:
        path = " ".join(
            f"L{x(begin):.1f},{y(rate):.1f} L{x(end):.1f},{y(rate):.1f}"
            for begin, end, rate in bins
        )
        first, last = x(bins[0][0]), x(bins[-1][1])
        parts += [
            f'<path class="area" d="M{first:.1f},{foot} {path} L{last:.1f},{foot} Z"/>',
            f'<path class="line" d="M{path[1:]}"/>',
        ]
    parts.append("</g>")
    for each, lane in zip(interruptions, lanes, strict=True):
        parts.append(_mark(each, x(each.began), 12 + LANE * lane + LANE / 2, foot))
    return "\n".join([*parts, "</svg>"])


def mark_shape(outcome: str, x: float, y: float) -> str:
    """The mark of an outcome: they differ not only by colour."""
    if outcome == ENDED:
        return f'<rect class="mark" x="{x - 11:.1f}" y="{y - 11:.1f}" width="22" height="22"/>'
    if outcome == HUNG:
        points = (
            f"{x:.1f},{y - 14:.1f} {x + 14:.1f},{y:.1f} {x:.1f},{y + 14:.1f} {x - 14:.1f},{y:.1f}"
        )
        return f'<polygon class="mark" points="{points}"/>'
    return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="11"/>'


def _mark(each: Interruption, x: float, y: float, foot: float) -> str:
    label = escape(
        f"Fault {each.number} at {each.began:.1f} s, {each.kind}: {each.how}", quote=True
    )
    return (
        f'<line class="stem" aria-hidden="true" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 11:.1f}" '
        f'y2="{foot}"/><a id="mark-{each.number}" href="#fault-{each.number}" '
        f'class="{CLASSES.get(each.outcome, "worked")}" aria-label="{label}">'
        f"<title>{label}</title>{mark_shape(each.outcome, x, y)}"
        f'<text aria-hidden="true" x="{x:.1f}" y="{y + 4:.1f}">{each.number}</text></a>'
    )


def _lanes(places: Iterable[float]) -> Iterator[int]:
    """The lane of each mark, from left to right, so that none hides another."""
    ends: list[float] = []
    for place in places:
        for lane, end in enumerate(ends):
            if place - end >= MARK:
                ends[lane] = place
                yield lane
                break
        else:
            ends.append(place)
            yield len(ends) - 1


def _band(name: str, begin: float, end: float, top: float) -> str:
    width = max(1.5 if name == "fault" else 0.0, end - begin)
    return f'<rect class="{name}" x="{begin:.1f}" y="{top}" width="{width:.1f}" height="{HEIGHT}"/>'


def _axes(
    width: float,
    foot: float,
    highest: float,
    seconds: float,
    unit: str,
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> Iterator[str]:
    for rate in (0.0, highest / 2, highest):
        at = y(rate)
        yield f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{rate:g}</text>'
    step = _nice(seconds / 12, (1, 2, 5))
    for number in range(math.floor(seconds / step) + 1):
        at = x(step * number)
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{foot}" y2="{foot + 5}"/>'
        yield (
            f'<text x="{at:.1f}" y="{foot + 20}" text-anchor="middle">{step * number:g} s</text>'
        )
    yield f'<text x="{LEFT}" y="{foot + 38}">{escape(unit)} per second, by seconds</text>'


def _nice(number: float, steps: Sequence[float]) -> float:
    """The next of the steps, with zeros, or as a fraction."""
    if number <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(number))
    return next(step * power for step in (*steps, 10) if step * power >= number * 0.999)


def _in_words(
    bins: Sequence[tuple[float, float, float]],
    interruptions: Sequence[Interruption],
    seconds: float,
    unit: str,
) -> str:
    peak = max((rate for _, _, rate in bins), default=0.0)
    return (
        f"In {seconds:.0f} seconds up to {peak:.0f} {unit} per second; {len(interruptions)} "
        "faults, each of which is a link to its row in the table below."
    )
