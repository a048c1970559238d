"""Our own loggers, through the kit that we ship."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fabric_core.testing import LoggerConformance
from fabric_core.testing.logger import Written


def dies(folder: Path) -> None:
    """The folder of the run is gone, and cannot be made again."""
    shutil.rmtree(folder / "run")
    (folder / "run").write_text("in the way")


class TestCSV(LoggerConformance):
    name = "csv"

    def options_for(self, folder: Path) -> Mapping[str, Any]:
        return {"root_dir": folder, "name": "run", "version": "one"}

    def written(self, folder: Path) -> Iterable[Written]:
        file = folder / "run" / "one" / "metrics.csv"
        if not file.exists():
            return
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                text = row.pop("step")
                step = int(text) if text else None
                yield from ((name, float(value), step) for name, value in row.items() if value)

    def break_sink(self, folder: Path) -> None:
        dies(folder)


class TestTensorBoard(LoggerConformance):
    name = "tensorboard"
    relative_error = 1e-6

    def options_for(self, folder: Path) -> Mapping[str, Any]:
        return {"root_dir": folder, "name": "run", "version": "one", "default_hp_metric": False}

    def written(self, folder: Path) -> Iterable[Written]:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

        if not (folder / "run").exists():
            return
        events = EventAccumulator(str(folder / "run" / "one"), size_guidance={SCALARS: 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            yield from ((tag, event.value, event.step) for event in events.Scalars(tag))

    def break_sink(self, folder: Path) -> None:
        dies(folder)
