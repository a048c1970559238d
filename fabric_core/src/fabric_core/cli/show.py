"""How results look: JSON for programs; for people text that fits into 80 columns, plain when it is piped."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.table import Table


def show_json(data: Any) -> None:
    """Write data as JSON."""
    import json

    click.echo(json.dumps(data, indent=2, default=str))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table and a blank line; nothing when there are no rows. The first column is never broken."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column.upper(), no_wrap=index == 0, overflow="fold")
    _print(table, rows)


def _print(table: Table, rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.text import Text

    for row in rows:
        table.add_row(*map(Text, row))
    if table.row_count:
        console = Console(highlight=False, emoji=False)
        console.print(table)
        console.print()


def show_fields(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Write a title, and below it names with their values, one under the other."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    click.echo(title)
    _print(table, [(f"  {name}", value) for name, value in rows])


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
