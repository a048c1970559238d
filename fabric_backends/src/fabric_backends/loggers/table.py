"""A CSV file that grows by rows and by columns, of which a crash costs at most the rows that were not written yet.

[Note: the open row] Metrics of one step may come in several calls. The last row is therefore kept after it was
written, and is written again, over itself, when more metrics of its step have come. A file that gets new columns is
written anew beside the old one and put in its place.

[Note: the same bytes] A run that was killed may have written rows, cells and columns after its last checkpoint. The
checkpoint therefore says how many rows there were, the open one in full, and which columns. A resumed run cuts the file
back to that, whatever its steps are called, and then writes byte for byte what a run never killed writes.
"""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fabric_backends.loggers.replacing import replacing
from fabric_core.errors import ConfigurationError

STEP = "step"
MOST_ROWS_HELD = 100_000


class Table:
    """Rows on their way into a CSV file.

    Args:
        path: The file. One that exists is continued; a last line that a crash cut off is dropped.

    Attributes:
        unsaved: How many rows are held that are not in the file as they are.
        lost: How many rows were given up because too many were held.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unsaved = 0
        self.lost = 0
        self._process = os.getpid()
        self._rows: list[dict[str, Any]] = []
        self._row_of_step: dict[float, dict[str, Any]] = {}
        self._columns: list[str] = []
        self._final = 0  # bytes of the file that will not change
        self._final_rows = 0
        self._first_is_saved = False
        if path.exists():
            self._continue()

    def add(self, step: float | None, metrics: Mapping[str, Any]) -> None:
        """Add metrics to the row of a step, or as a row of their own when there is no step."""
        row = None if step is None else self._row_of_step.get(step)
        if row is None:
            row = {STEP: step}
            self._rows.append(row)
            self.unsaved += 1
            if step is not None:
                self._row_of_step[step] = row
        elif self._first_is_saved and row is self._rows[0]:
            self._first_is_saved = False
            self.unsaved += 1
        row.update(metrics)

    def save(self) -> None:
        """Write what is held.

        Raises:
            OSError: It cannot be written. Everything is still held, and the next call tries again.
        """
        if not self.unsaved:
            return
        new_columns = {name: None for row in self._rows for name in row if name not in self._columns}
        if new_columns:
            self._rewrite([*self._columns, *new_columns])
        else:
            self._append()
        self._keep_open_row()

    def state(self) -> dict[str, Any]:
        """What is there, as plain values: the columns, how many rows will not change, and the others as texts."""
        return {
            "columns": list(self._columns),
            "rows": self._final_rows,
            "held": [_as_texts(row) for row in self._rows],
        }

    def go_back(self, state: Mapping[str, Any]) -> int:
        """Make the table, and the file, what they were when `state` was asked for; see [Note: the same bytes].

        Returns:
            How many rows should be in the file, and are not.

        Raises:
            OSError: The file cannot be written; it is as it was.
        """
        columns, rows = state["columns"], list(self._saved_rows())[: state["rows"]]
        with replacing(self.path) as file:
            file.write(_header(columns))
            file.writelines(_lines([{name: row.get(name, "") for name in columns}], columns) for row in rows)
            final = file.tell()
        self._columns, self._final, self._final_rows = columns, final, len(rows)
        self._hold([{**row, STEP: _step_of(row[STEP])} for row in state["held"]])
        self.save()
        return int(state["rows"]) - len(rows)

    def forget(self) -> None:
        """Forget the rows that are held."""
        self._hold([])

    def save_at_exit(self) -> None:
        """Write what is held, in the process that collected it; a forked copy of it keeps out of the way."""
        if os.getpid() != self._process:
            return
        try:
            self.save()
        except OSError as error:
            message = f"{self.unsaved} row(s) of metrics could not be written to {str(self.path)!r}: {error}."
            warnings.warn(message, UserWarning, stacklevel=2)

    def give_up_oldest(self) -> None:
        """Forget the older half of the rows when more are held than memory should be spent on."""
        if len(self._rows) <= MOST_ROWS_HELD:
            return
        kept = self._rows[-MOST_ROWS_HELD // 2 :]
        self.lost += len(self._rows) - len(kept)
        self._hold(kept)

    def _hold(self, rows: list[dict[str, Any]]) -> None:
        self._rows, self.unsaved, self._first_is_saved = rows, len(rows), False
        self._row_of_step = {row[STEP]: row for row in rows if row[STEP] is not None}

    def _keep_open_row(self) -> None:
        is_open = self._rows[-1][STEP] is not None
        self._hold(self._rows[-1:] if is_open else [])
        self._first_is_saved, self.unsaved = is_open, 0

    def _append(self) -> None:
        *closed, last = (_lines([row], self._columns) for row in self._rows)
        with self.path.open("r+b") as file:
            file.seek(self._final)
            file.write(b"".join(closed) + last)
            file.truncate()
        self._settle(self._final + sum(map(len, closed)), last)

    def _rewrite(self, columns: list[str]) -> None:
        *closed, last = (_lines([row], columns) for row in self._rows)
        with replacing(self.path) as file:
            file.write(_header(columns))
            file.writelines(_lines([row], columns) for row in self._saved_rows())
            file.write(b"".join(closed))
            final = file.tell()
            file.write(last)
        self._columns = columns
        self._settle(final, last)

    def _settle(self, final: int, last: bytes) -> None:
        is_open = self._rows[-1][STEP] is not None
        self._final = final if is_open else final + len(last)
        self._final_rows += len(self._rows) - is_open

    def _saved_rows(self) -> Iterable[dict[str, str]]:
        if not self._columns:
            return []
        with self.path.open("rb") as file:
            text = file.read(self._final).decode(errors="surrogateescape")
        return csv.DictReader(io.StringIO(text, newline=""))

    def _continue(self) -> None:
        content = self.path.read_bytes()
        self._final = content.rfind(b"\n") + 1
        if not self._final:
            return
        text = content[: self._final].decode(errors="surrogateescape")
        self._columns = next(csv.reader(io.StringIO(text, newline="")))
        if self._columns[:1] != [STEP]:
            raise ConfigurationError(
                f"The file {str(self.path)!r} cannot be continued: its first column is not {STEP!r}, so it is no "
                "table of this logger. Choose another version, name or root_dir."
            )
        self._final_rows = sum(1 for _ in self._saved_rows())


def _header(columns: list[str]) -> bytes:
    return _lines([{name: name for name in columns}], columns) if columns else b""


def _step_of(cell: str) -> float | None:
    """The step that a cell holds, from which the same text comes again; steps may be fractions, such as epochs."""
    if not cell:
        return None
    return int(cell) if cell.lstrip("-").isdigit() else float(cell)


def _as_texts(row: Mapping[str, Any]) -> dict[str, str]:
    """The cells of a row, as they stand in the file."""
    columns = list(row)
    text = _lines([row], columns).decode()
    return dict(zip(columns, next(csv.reader(io.StringIO(text, newline=""))), strict=True))


def _lines(rows: Iterable[Mapping[str, Any]], columns: list[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")
