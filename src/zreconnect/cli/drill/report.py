"""The report of a drill: one HTML file that needs nothing else, no script, no network."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from statistics import median
from string import Template

from zreconnect.cli.drill.faults import KINDS
from zreconnect.cli.drill.result import Result
from zreconnect.cli.drill.timeline import CLASSES, mark_shape, rates, timeline
from zreconnect.cli.drill.trial import DEADLY, ENDED, HUNG, MISSED, WORKED, Interruption, Row

SIGNS = {WORKED: "✓", ENDED: "✕", HUNG: "…", MISSED: "-"}
TONES = {ENDED: "bad", HUNG: "warn", MISSED: "quiet"}


def write_report(path: Path, result: Result) -> None:
    """Write it. Raises OSError if that is not possible."""
    # An argument of the command need not be text.
    path.write_text(report(result), encoding="utf-8", errors="backslashreplace")


def report(result: Result) -> str:
    """The page."""
    template = resources.files("zreconnect.cli.drill").joinpath("report.html")
    trial = result.trial
    unit = trial.observation.measure or "transactions"
    bins = rates(trial.observation.samples)
    survived = trial.survived and trial.tried
    return Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(f"{'Survived' if survived else 'Not survived'}: {result.command}"),
        verdict=escape(result.verdict),
        tone="good" if survived else "bad",
        facts="\n".join(
            f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in _facts(result)
        ),
        timeline=timeline(bins, trial.interruptions, result.seconds, unit),
        legend=_legend(),
        figures=_table(
            f"{unit} per second",
            ["from", "until", "per second"],
            [[f"{begin:.2f} s", f"{end:.2f} s", f"{rate:.1f}"] for begin, end, rate in bins],
            numbers=(0, 1, 2),
        ),
        faults=_faults(trial.interruptions),
        kinds=_kinds(trial.interruptions),
        findings=_findings(result),
        repeat=_repeat(result),
    )


def _facts(result: Result) -> Iterator[tuple[str, str]]:
    trial = result.trial
    now = datetime.datetime.now().astimezone()
    yield "Program", f"<code>{escape(result.command)}</code>"
    yield "Database", escape(f"{result.server}, {result.address}")
    yield (
        "Held",
        escape(f"{now:%Y-%m-%d %H:%M %Z}, {result.seconds:.0f} seconds, seed {result.seed}"),
    )
    yield "Done", escape(f"{result.done} {trial.observation.measure or 'transactions'}")
    if trial.starts > 1:
        yield "Started", f"{trial.starts} times, as it was started again after it had not survived"
    if trial.over:
        yield "Over early", f"<pre>{escape(trial.over)}</pre>"
    if result.not_tried:
        yield "Not tried", escape(", ".join(result.not_tried))


def _faults(interruptions: Sequence[Interruption]) -> str:
    rows = []
    for each in interruptions:
        said = "\n".join(each.said) if each.outcome in DEADLY else ""
        # The seconds have a column of their own.
        how = WORKED if each.outcome == WORKED else each.how
        outcome = (
            f'<span class="outcome {TONES.get(each.outcome, "good")}">'
            f'<span aria-hidden="true">{SIGNS.get(each.outcome, "✓")}</span> '
            f"{escape(how)}</span>"
        )
        seconds = (
            f"{each.seconds:.2f} s" if each.outcome == WORKED and each.seconds is not None else ""
        )
        rows.append(
            f'<tr id="fault-{each.number}" tabindex="-1">'
            f'<th scope="row" class="number"><a href="#mark-{each.number}" '
            f'aria-label="{each.number}, to its mark in the timeline">{each.number}</a></th>'
            f'<td class="number">{each.began:.1f} s</td>'
            f"<td><strong>{escape(each.kind)}</strong><br>"
            f'<span class="quiet">{escape(each.description)}</span></td>'
            f'<td class="number">{each.ended - each.began:.2f} s</td>'
            f"<td>{outcome}</td>"
            f'<td class="number">{seconds}</td>'
            f'<td class="number">{_connections(each)}</td>'
            f'<td class="number">{len(each.findings) or ""}</td></tr>'
        )
        if said:
            rows.append(
                f'<tr class="said"><td></td><td colspan="7"><pre>{escape(said)}</pre></td></tr>'
            )
    headings = "".join(
        f'<th scope="col"{" class=number" if is_number else ""}>{name}</th>'
        for name, is_number in (
            *(("No.", True), ("At", True), ("Fault", False), ("Lasted", True)),
            *(("What became of it", False), ("Works again", True), ("Connections", True)),
            ("Findings", True),
        )
    )
    return (
        '<table class="faults"><caption>In the order in which they happened. Works again: seconds '
        "from the end of the fault until the next transaction. Connections: before, and then if it "
        "has others."
        f"</caption><thead><tr>{headings}</tr></thead><tbody>\n"
        + "\n".join(rows)
        + "\n</tbody></table>"
    )


def _connections(each: Interruption) -> str:
    after = each.connections_after
    if after is None or after == each.connections:
        return str(each.connections)
    return f"{each.connections}, then {after}"


def _kinds(interruptions: Sequence[Interruption]) -> str:
    """What each kind of fault has done, if one has happened more than once."""
    rows = []
    repeated = False
    for kind in KINDS:
        happened = [each for each in interruptions if each.kind == kind and each.outcome != MISSED]
        repeated |= len(happened) > 1
        seconds = [each.seconds for each in happened if each.outcome == WORKED and each.seconds]
        if happened:
            rows.append(
                [
                    kind,
                    str(len(happened)),
                    str(sum(each.outcome not in DEADLY for each in happened)),
                    f"{median(seconds):.2f} s" if seconds else "",
                    f"{max(seconds):.2f} s" if seconds else "",
                ]
            )
    if not repeated:
        return ""
    table = _table(
        "Seconds until it worked again, by kinds of faults",
        ["Fault", "Times", "Survived", "Median", "Longest"],
        rows,
        numbers=(1, 2, 3, 4),
    )
    return _section("kinds", "Kinds of faults", table)


def _findings(result: Result) -> str:
    trial = result.trial
    if trial.check is None:
        return ""
    text = f"<p>The check is</p><pre>{escape(trial.check)}</pre>"
    if trial.findings_before:
        text += f"<p>Before the first fault it had found {len(trial.findings_before)} already.</p>"
    if not trial.findings:
        return _section("check", "Check", f"{text}<p>It found nothing wrong.</p>")
    text += _rows("What it found at the end, and not before", trial.findings)
    return _section("check", "Check", text)


def _rows(caption: str, findings: Sequence[Row]) -> str:
    columns = max(len(row) for row in findings)
    return _table(caption, [f"Column {n + 1}" for n in range(columns)], findings)


def _repeat(result: Result) -> str:
    command = f"zreconnect drill --seed {result.seed} -- {shlex.join(result.arguments)}"
    return _section(
        "again",
        "Once more",
        "<p>The seed repeats the order of the faults, how long they last, and how far they are "
        "apart; options such as <code>--faults</code> and <code>--dsn</code> must be the same:</p>"
        f"<pre>{escape(command)}</pre>",
    )


def _legend() -> str:
    marks = [
        (WORKED, "worked again, or was done"),
        (ENDED, "ended"),
        (HUNG, "hung"),
    ]
    items = "".join(
        f'<li class="{CLASSES.get(outcome, "worked")}">'
        f'<svg width="16" height="16" viewBox="0 0 30 30" aria-hidden="true">'
        f"{mark_shape(outcome, 15, 15)}</svg>{text}</li>"
        for outcome, text in marks
    )
    return (
        f'<ul class="legend">{items}{_swatch("fault")}while the fault lasts</li>'
        f"{_swatch('after')}until it works again</li></ul>"
    )


def _swatch(name: str) -> str:
    return (
        '<li><svg width="16" height="16" viewBox="0 0 16 16" aria-hidden="true">'
        f'<rect class="{name}" width="16" height="16"/></svg>'
    )


def _section(name: str, heading: str, content: str) -> str:
    return (
        f'<section aria-labelledby="{name}-heading">'
        f'<h2 id="{name}-heading">{escape(heading)}</h2>\n'
        f"{content}\n</section>"
    )


def _table(
    caption: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[int] = (),
) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if n in numbers else ''}>{escape(cell)}</{tag.split()[0]}>"
            for n, cell in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{cells('th scope=col', headings)}</tr></thead>"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
