"""The picture: what each library takes, as a multiple of plain PyTorch, one line per figure and case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.figure import ACCELERATE, LIGHTNING, OURS, Figure
from harness.results import Entry

STYLES = {LIGHTNING: ("#9467bd", "s"), ACCELERATE: ("#ff9f1c", "^"), OURS: ("#1f77b4", "o")}


def draw(file: Path, figures: Sequence[Figure], entries: Mapping[str, Entry]) -> None:
    """Write the picture as SVG. A file of the same numbers is the same, to the byte."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "fabric", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lines = [
        line for figure in figures if figure.name in entries for line in _lines(figure, entries[figure.name])
    ]
    canvas, axes = pyplot.subplots(figsize=(8, 0.6 + 0.26 * len(lines)))
    axes.axvline(1, color="#444444", linewidth=1)
    for contender, (colour, marker) in STYLES.items():
        points = [(ratios[contender], y) for y, (_, ratios) in enumerate(lines) if contender in ratios]
        across, down = [ratio for ratio, _ in points], [y for _, y in points]
        axes.scatter(across, down, c=colour, marker=marker, s=36, label=contender, zorder=3)
    axes.set_yticks(range(len(lines)), [label for label, _ in lines])
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axes.set_xlabel("× plain PyTorch (less is better)")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False)
    canvas.savefig(file, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(canvas)


def _lines(figure: Figure, entry: Entry) -> list[tuple[str, dict[str, float]]]:
    """A label and the ratios by contender, for each case that has any."""
    measure = figure.measures[0]
    found: dict[str, dict[str, float]] = {}
    for row in entry.rows:
        ratio = row.numbers[measure.key].ratio if measure.key in row.numbers else None
        if ratio is not None:
            found.setdefault(row.case, {})[row.contender] = ratio
    label = f"{figure.title} ({measure.title})"
    return [(f"{label}: {case}" if case else label, ratios) for case, ratios in found.items()]
