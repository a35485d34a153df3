"""Plots as plain SVG, that can be read on light and dark ground."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
  text { font: 13px sans-serif; fill: #222; }
  text.title { font-weight: bold; }
  text.small { font-size: 11px; fill: #666; }
  line.grid { stroke: #ccc; }
  line.one { stroke: #222; stroke-dasharray: 3 3; }
  line.whisker { stroke: #222; }
  .s0 { fill: #2b6cb0; stroke: #2b6cb0; } .s1 { fill: #8a8f98; stroke: #8a8f98; }
  .s2 { fill: #c05621; stroke: #c05621; } .s3 { fill: #2f855a; stroke: #2f855a; }
  .s4 { fill: #805ad5; stroke: #805ad5; } .s5 { fill: #b7791f; stroke: #b7791f; }
  polyline { stroke-width: 2; } polyline.s0, polyline.s1, polyline.s2, polyline.s3, polyline.s4,
  polyline.s5 { fill: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #eee; } text.small { fill: #aaa; } line.grid { stroke: #444; }
    line.one, line.whisker { stroke: #eee; }
    .s0 { fill: #63b3ed; stroke: #63b3ed; } .s2 { fill: #ed8936; stroke: #ed8936; }
    .s3 { fill: #68d391; stroke: #68d391; } .s4 { fill: #b794f4; stroke: #b794f4; }
  }
"""
WIDTH, MARGIN, ROW, PLOT_HEIGHT = 760, 20, 20, 300
#: Of a letter, about.
LETTER = 7.2
COLOURS = 6


@dataclass(frozen=True)
class Bar:
    """A horizontal bar; ``lower`` and ``upper`` end its whisker, ``series`` is its colour."""

    label: str
    value: float
    lower: float
    upper: float
    series: int = 0


def bars(title: str, unit: str, bars: Sequence[Bar], one: float | None = None) -> str:
    """Bars below each other. ``one``: where a line stands, that all are compared with."""
    left = MARGIN + LETTER * max(len(bar.label) for bar in bars)
    right = WIDTH - MARGIN - 50
    most = max(bar.upper for bar in bars)
    ticks = _ticks(most)
    scale = (right - left) / max(most, ticks[-1])
    top = 50
    bottom = top + ROW * len(bars)
    parts = []
    for tick in ticks:
        x = left + tick * scale
        parts.append(_line(x, top, x, bottom, "grid"))
        parts.append(_text(x, bottom + 15, f"{tick:g}", "small", "middle"))
    for number, bar in enumerate(bars):
        y = top + ROW * number
        middle = y + ROW / 2
        parts.append(_text(left - 8, middle + 4, bar.label, "", "end"))
        parts.append(
            f'<rect class="s{bar.series % COLOURS}" x="{left:.1f}" y="{y + 3}"'
            f' width="{bar.value * scale:.1f}" height="{ROW - 6}" />'
        )
        ends = left + bar.lower * scale, left + bar.upper * scale
        parts.append(_line(ends[0], middle, ends[1], middle, "whisker"))
        parts.append(_text(ends[1] + 5, middle + 4, f"{bar.value:.3g}", "small", "start"))
    if one is not None:
        x = left + one * scale
        parts.append(_line(x, top - 4, x, bottom, "one"))
    parts.append(_text(left, bottom + 32, unit, "small", "start"))
    return _document(title, bottom + 42, parts)


@dataclass(frozen=True)
class Axis:
    """What it shows, and whether its steps are powers of ten."""

    label: str
    is_logarithmic: bool = False


def lines(title: str, x: Axis, y: Axis, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A line for each series of points. On a logarithmic axis, what is not positive is left out."""
    shown = {
        name: [
            (across, upwards)
            for across, upwards in points
            if (across > 0 or not x.is_logarithmic) and (upwards > 0 or not y.is_logarithmic)
        ]
        for name, points in series.items()
    }
    everything = [point for points in shown.values() for point in points]
    left, right, top = 70, WIDTH - MARGIN, 50
    bottom = top + PLOT_HEIGHT
    across = _Scale([point[0] for point in everything], x, left, right)
    upwards = _Scale([point[1] for point in everything], y, bottom, top)
    parts = []
    for tick in across.ticks:
        at = across.at(tick)
        parts.append(_line(at, top, at, bottom, "grid"))
        parts.append(_text(at, bottom + 16, f"{tick:g}", "small", "middle"))
    for tick in upwards.ticks:
        at = upwards.at(tick)
        parts.append(_line(left, at, right, at, "grid"))
        parts.append(_text(left - 6, at + 4, f"{tick:g}", "small", "end"))
    parts.append(_text(left, top - 8, y.label, "small", "start"))
    parts.append(_text(right, bottom + 32, x.label, "small", "end"))
    for number, (name, points) in enumerate(shown.items()):
        colour = f"s{number % COLOURS}"
        path = " ".join(f"{across.at(a):.1f},{upwards.at(b):.1f}" for a, b in points)
        parts.append(f'<polyline class="{colour}" points="{path}" />')
        legend = bottom + 54 + ROW * number
        parts.append(
            f'<rect class="{colour}" x="{left:.1f}" y="{legend - 9}" width="18" height="4" />'
        )
        parts.append(_text(left + 26, legend, name, "", "start"))
    return _document(title, bottom + 54 + ROW * len(shown), parts)


class _Scale:
    """From a value to a place between two ends."""

    def __init__(self, values: Sequence[float], axis: Axis, start: float, end: float) -> None:
        self._logarithmic = axis.is_logarithmic
        self._start, self._end = start, end
        if axis.is_logarithmic:
            first = math.floor(math.log10(min(values)))
            last = max(math.ceil(math.log10(max(values))), first + 1)
            self.ticks = [10.0**power for power in range(first, last + 1)]
        else:
            self.ticks = _ticks(max(values), 7)
            if self.ticks[-1] < max(values):
                self.ticks.append(self.ticks[-1] + self.ticks[1])
        self._low, self._high = self._linear(self.ticks[0]), self._linear(self.ticks[-1])

    def at(self, value: float) -> float:
        share = (self._linear(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def _linear(self, value: float) -> float:
        return math.log10(value) if self._logarithmic else value


def _ticks(most: float, number: int = 8) -> list[float]:
    """Round values from 0, the last of which is at most ``most``."""
    power = 10.0 ** math.floor(math.log10(most / number)) if most > 0 else 1.0
    step = next(power * step for step in (1, 2, 5, 10) if power * step * number >= most)
    return [step * index for index in range(max(1, int(most / step + 1e-9)) + 1)]


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" />'


def _document(title: str, height: float, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}"'
            f' width="{WIDTH}" height="{height:.0f}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            _text(MARGIN, 24, title, "title", "start"),
            *parts,
            "</svg>",
            "",
        ]
    )
