"""How results look: JSON for programs; for people text that fits into 80 columns, plain when it is piped."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import click

GAP = "  "
"""Between two columns of a table."""

NARROWEST = 8
"""Characters; a column that has more to say is not made narrower than that."""


def show_json(data: Any) -> None:
    """Write data as JSON."""
    import json

    click.echo(json.dumps(data, indent=2, default=str))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table and a blank line; nothing when there are no rows. The first column is never broken."""
    shown = [tuple(row) for row in rows]
    if not shown:
        return
    header = tuple(column.upper() for column in columns)
    widths = _widths([header, *shown])
    for line in _lines(header, widths):
        click.secho(line, bold=True)
    _write(shown, widths)


def show_fields(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Write a title, and below it names with their values, one under the other."""
    click.echo(title)
    shown = [(f"  {name}", value) for name, value in rows]
    if shown:
        _write(shown, _widths(shown))


def _write(rows: Iterable[tuple[str, ...]], widths: list[int]) -> None:
    click.echo("".join(f"{line}\n" for row in rows for line in _lines(row, widths)))


def _widths(rows: Sequence[tuple[str, ...]]) -> list[int]:
    """Every column as wide as its widest cell; where the terminal has no room for that, the widest ones give way."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = shutil.get_terminal_size().columns - len(GAP) * (len(widths) - 1)
    while sum(widths) > room and max(widths[1:], default=0) > NARROWEST:
        widths[widths.index(max(widths[1:]), 1)] -= 1
    return widths


def _lines(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """One row; the cells that are too wide go on below."""
    others = (_broken(cell, width) for cell, width in zip(row[1:], widths[1:], strict=True))
    for cells in zip_longest([row[0]], *others, fillvalue=""):
        yield GAP.join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _broken(cell: str, width: int) -> list[str]:
    """The lines of one cell, broken at words where that is possible."""
    return [
        line
        for paragraph in cell.splitlines()
        for line in textwrap.wrap(paragraph, width, break_on_hyphens=False) or [""]
    ]


def show_text(text: str, indent: int = 0) -> None:
    """Write a paragraph, broken at words, ``indent`` columns from the left."""
    width, left = min(100, shutil.get_terminal_size().columns), " " * indent
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=left,
        subsequent_indent=f"{left}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    click.echo("\n".join(lines))
