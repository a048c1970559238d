"""Markdown tables: one of a figure, and one of all verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from harness.figure import ACCELERATE, AGAIN, LIGHTNING, OURS, PLAIN, Against, Figure, Measure, Runs, Target
from harness.summary import Number, Row, Verdict, summarise, value_of, verdicts

NAMES = {PLAIN: "plain PyTorch", AGAIN: "plain, again", OURS: "**fabric**"}
COUNTED = ("", "MB")
"""Units of what is counted, not timed: one column is enough."""


def table(figure: Figure, runs: Runs) -> str:
    """The table of one figure."""
    return rows_table(figure, summarise(figure, runs))


def rows_table(figure: Figure, rows: Sequence[Row]) -> str:
    """A line for each contender in each case; the columns of a measure are its median, its best, and × plain."""
    measures = [measure for measure in figure.measures if any(measure.key in row.numbers for row in rows)]
    with_cases = any(row.case for row in rows)
    with_plain = any(row.contender == PLAIN for row in rows)
    head = [*(["case"] if with_cases else []), ""]
    for measure in measures:
        head += _heads(measure)[: _width(measure, with_plain)]
    lines = []
    for row in rows:
        cells = [*([row.case] if with_cases else []), NAMES.get(row.contender, row.contender)]
        for measure in measures:
            cells += _cells(row.numbers.get(measure.key))[: _width(measure, with_plain)]
        lines.append(cells)
    return markdown(head, lines)


def _width(measure: Measure, with_plain: bool) -> int:
    return 1 if measure.unit in COUNTED else 3 if with_plain else 2


def _heads(measure: Measure) -> list[str]:
    return [measure.name, "most" if measure.more_is_better else "least", "× plain"]


def _cells(number: Number | None) -> list[str]:
    if number is None:
        return ["–", "–", "–"]
    return [digits(number.median), digits(number.best), _ratio(number.ratio)]


VERDICT_HEAD = ["figure", "what", "target", "fabric", "", "plain, again", "lightning-fabric", "accelerate"]


def verdict_lines(figure: Figure, rows: Sequence[Row], busy: bool = False) -> list[list[str]]:
    """A line for each target: what was promised, what was found, and the same of the others.

    A time that is too long is no verdict where the machine was ``busy`` with other work.
    """
    found = {(row.case, row.contender): row.numbers for row in rows}
    lines = []
    for verdict in verdicts(figure, rows):
        target, measure = verdict.target, figure.measure(verdict.target.measure)
        others = [value_of(target, found.get((target.case, name))) for name in (AGAIN, LIGHTNING, ACCELERATE)]
        lines.append(
            [
                f"[{figure.title}](#{anchor(figure.title)})",
                _what(target, measure),
                _limit(target, measure),
                _value(verdict.found, target.against),
                _word(verdict, busy and measure.unit not in COUNTED),
                *(_value(other, target.against) for other in others),
            ]
        )
    return lines


def missed(figure: Figure, rows: Sequence[Row]) -> list[str]:
    """For each target that was missed: what, and why."""
    return [
        f"Missed: {_what(verdict.target, figure.measure(verdict.target.measure))} "
        f"({_limit(verdict.target, figure.measure(verdict.target.measure))}). {verdict.target.why}".rstrip()
        for verdict in verdicts(figure, rows)
        if verdict.found is not None and not verdict.met
    ]


def anchor(title: str) -> str:
    """The part of a link that leads to a heading."""
    return "".join(letter for letter in title.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


def _what(target: Target, measure: Measure) -> str:
    contender = "" if target.contender == OURS else target.contender
    return ", ".join(filter(None, (target.case, contender, measure.title)))


def _word(verdict: Verdict, busy: bool) -> str:
    if verdict.found is None:
        return "not measured"
    return "met" if verdict.met else "missed beside other work" if busy else "**missed**"


def _limit(target: Target, measure: Measure) -> str:
    sign = "≥" if target.at_least else "≤"
    if target.against is Against.RATIO:
        return f"{sign} {target.limit:.2f} × plain"
    of_plain = "over plain" if target.against is Against.OVER else ""
    return " ".join(filter(None, (sign, f"{target.limit:,g}", measure.unit, of_plain)))


def _value(value: float | None, against: Against) -> str:
    if value is None:
        return "–"
    if against is Against.RATIO:
        return _ratio(value)
    return f"{'+' if against is Against.OVER and value > 0 else ''}{digits(value)}"


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def digits(value: float) -> str:
    """A number with three digits that matter, or all that stand before the point."""
    size = abs(value)
    places = 0 if size >= 100 or value == int(value) else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{places}f}".replace("-", "\N{MINUS SIGN}")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = "|".join(["---"] * len(head))
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)])
