"""What was measured, kept in ``results.json`` figure by figure, and ``RESULTS.md``, which is written from it.

A figure that is measured again replaces its own entry only. So each carries its date, its versions and its load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.figure import Figure
from harness.summary import Number, Row
from harness.tables import VERDICT_HEAD, markdown, missed, rows_table, verdict_lines


@dataclass(frozen=True)
class Entry:
    """One figure, measured.

    Attributes:
        date: When, in UTC.
        others: The share of all cores that other programs used meanwhile, from 0 to 1.
        machine: Processor, system and versions.
        rows: What was found.
    """

    date: str
    others: float
    machine: Mapping[str, str]
    rows: Sequence[Row]


def read(file: Path) -> dict[str, Entry]:
    """The entries by the figures' names; none where there is no file."""
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: _entry(entry) for name, entry in kept.items()}


def write(file: Path, entries: Mapping[str, Entry]) -> None:
    """Keep the entries."""
    kept = {name: asdict(entry) for name, entry in entries.items()}
    file.write_text(json.dumps(kept, indent=1, default=str) + "\n", encoding="utf-8")


def _entry(kept: dict[str, Any]) -> Entry:
    rows = [
        Row(row["case"], row["contender"], {key: Number(**number) for key, number in row["numbers"].items()})
        for row in kept["rows"]
    ]
    return Entry(kept["date"], kept["others"], kept["machine"], rows)


HOW = """\
Written by `make bench`; [README.md](README.md) says how it is measured, and what the columns mean. *× plain* is the
median of the ratios to plain PyTorch, round by round; *plain, again* is plain PyTorch a second time, so its distance
from plain is the noise. A verdict compares the median with the target, to the digit. **fabric** is this library."""

BUSY = 0.05
"""From this share on, a figure was measured beside others' work, and times should be taken again."""


def page(figures: Sequence[Figure], entries: Mapping[str, Entry], plot: str, on_gpus: str) -> str:
    """``RESULTS.md``.

    Args:
        figures: In the order of the page.
        entries: What was measured; figures without an entry are named as such.
        plot: The picture's file, beside the page.
        on_gpus: What the scripts for GPUs said.
    """
    measured = [(figure, entries[figure.name]) for figure in figures if figure.name in entries]
    parts = ["# Results", HOW, _machines([entry for _, entry in measured])]
    lines = [
        line for figure, entry in measured for line in verdict_lines(figure, entry.rows, entry.others > BUSY)
    ]
    met = sum(line[VERDICT_HEAD.index("")] == "met" for line in lines)
    if measured:
        parts += [f"## Targets\n\n{met} of {len(lines)} are met.\n\n{markdown(VERDICT_HEAD, lines)}"]
        parts += [f"![CPU time beside plain PyTorch]({plot})"]
    parts += [_section(figure, entry) for figure, entry in measured]
    parts += [f"## On a GPU\n\n```text\n{on_gpus.strip()}\n```"]
    if absent := [figure.title for figure in figures if figure.name not in entries]:
        parts += [f"Not measured: {'; '.join(absent)}."]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machines(entries: Sequence[Entry]) -> str:
    """Each machine that something was measured on; one, unless single figures were measured again elsewhere."""
    found = {", ".join(f"{key} {value}" for key, value in entry.machine.items()): entry for entry in entries}
    return "\n".join(f"- {described}" for described in found)


def _section(figure: Figure, entry: Entry) -> str:
    text = "\n".join(figure.about.strip().splitlines()[1:]).strip()
    load = f"Measured {entry.date}; others used {100 * entry.others:.0f} % of the machine meanwhile"
    busy = ": it was busy, so trust the ratios and the counts only." if entry.others > BUSY else "."
    said = "\n".join(f"- {line}" for line in [*missed(figure, entry.rows), *figure.notes])
    parts = [f"## {figure.title}", text, rows_table(figure, entry.rows), load + busy, said]
    return "\n\n".join(part for part in parts if part)
