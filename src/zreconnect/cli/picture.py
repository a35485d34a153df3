"""A picture of what a command has printed: a terminal as SVG, in light and in dark."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

# A picture that is wider is too small to be read in a page.
COLUMNS = 96
# Of one message; what is more is left out.
MOST_LINES = 2
# What is the same in every line: who logs in, and where.
LOCATION = re.compile(r"(?<=://)\S+(?=/\w)")
CHARACTER, LINE, MARGIN, BAR = 7.8, 19, 18, 34
# What a line is about, by what it says, and its style.
KINDS = (
    ("prompt", re.compile(r"\$ ")),
    ("lost", re.compile(r" +(?:item \d|Lost |No connection )")),
    ("again", re.compile(r" +(?:Connected again|The outcome of COMMIT)")),
    ("figure", re.compile(r" +(?:lost|recorded twice|files found|recorded) +\d")),
)
STYLE = """
  text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
         fill: #24292f; white-space: pre }
  .paper { fill: #f6f8fa; stroke: #d0d7de }
  .bar { fill: #d0d7de }
  .prompt, .figure { font-weight: bold }
  .lost { fill: #b3261e }
  .again { fill: #1a6e34 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .paper { fill: #0d1117; stroke: #3d444d }
    .bar { fill: #3d444d }
    .lost { fill: #ff9a91 }
    .again { fill: #6fdd8b }
  }
"""


class Picture:
    """What a command prints, line by line. command: how it was called."""

    def __init__(self, command: str) -> None:
        # Each with the kind of the message that it is of.
        self._lines = [(f"$ {command}", _kind(f"$ {command}"))]

    def add(self, line: str) -> None:
        """Have another message, on one line or several, unless it is one of several empty ones."""
        if not line and not self._lines[-1][0]:
            return
        indent = " " * (len(line) - len(line.lstrip()))
        parts = textwrap.wrap(
            LOCATION.sub("…", line.strip()),
            COLUMNS,
            initial_indent=indent,
            subsequent_indent=f"{indent}  ",
            max_lines=MOST_LINES,
            placeholder=" …",
            replace_whitespace=False,
        )
        self._lines += [(part, _kind(line)) for part in parts or [""]]

    def write(self, path: Path, title: str, description: str) -> None:
        """Write the picture to a file. title, description: for those who do not see it."""
        path.write_text("\n".join(self._svg(title, description)) + "\n", encoding="utf-8")

    def _svg(self, title: str, description: str) -> Iterator[str]:
        columns = max(len(line) for line, _ in self._lines)
        width = round(columns * CHARACTER + 2 * MARGIN)
        height = len(self._lines) * LINE + BAR + 2 * MARGIN
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-labelledby="title desc">'
        )
        yield f'<title id="title">{escape(title)}</title>'
        yield f'<desc id="desc">{escape(description)}</desc>'
        yield f"<style>{STYLE}</style>"
        yield (
            f'<rect class="paper" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" '
            'rx="8"/>'
        )
        for number in range(3):
            yield f'<circle class="bar" cx="{MARGIN + 6 + 20 * number}" cy="{BAR - 13}" r="6"/>'
        for number, (line, kind) in enumerate(self._lines):
            if line:
                y = BAR + MARGIN + number * LINE
                # Whatever the font, a line takes the room that it was given.
                length = round(len(line) * CHARACTER, 1)
                yield (
                    f'<text class="{kind}" x="{MARGIN}" y="{y}" xml:space="preserve" '
                    f'textLength="{length}" lengthAdjust="spacingAndGlyphs">{escape(line)}</text>'
                )
        yield "</svg>"


def _kind(line: str) -> str:
    return next((name for name, pattern in KINDS if pattern.match(line)), "other")
