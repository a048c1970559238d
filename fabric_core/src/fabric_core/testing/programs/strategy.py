"""What a strategy does on real ranks: one section after the other, each with a ``Fabric`` of its own.

The program judges nothing. It writes down what every rank saw, one file per section and rank, and the checks of
`fabric_core.testing.strategy` read them. A section that takes too long ends the job, and says where it hung.
"""

from __future__ import annotations

import faulthandler
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fabric_core.testing.programs import (
    strategy_closing,
    strategy_saving,
    strategy_talking,
    strategy_training,
)
from fabric_core.testing.programs.task import Task

SECTIONS: dict[str, Callable[..., Any]] = {
    **strategy_closing.SECTIONS,
    **strategy_saving.SECTIONS,
    **strategy_talking.SECTIONS,
    **strategy_training.SECTIONS,
}
"""By name. A section is asked for as its name and arguments, with ``:`` between: ``"train:32-true:plain"``."""


def main(arguments: dict[str, Any]) -> None:
    """Run the sections that are asked for.

    Args:
        arguments: ``folder``: where what is found is written; ``sections``: their names; ``patience``: how long one
            may take, in seconds; ``task``: the fields of `Task`.
    """
    folder, rank = Path(arguments["folder"]), int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    task = Task(folder=folder, size=size, **arguments["task"])
    for section in arguments["sections"]:
        name, *more = section.split(":")
        with _watched(folder / file_name(section, size, rank, "hung"), arguments["patience"]):
            path = folder / file_name(section, size, rank, "pt")
            try:
                _write(path, {"facts": SECTIONS[name](task.in_section(section), *more)})
            except Exception:
                _write(path, {"error": traceback.format_exc()})
            _wait_for([folder / file_name(section, size, each, "pt") for each in range(size)])


def file_name(section: str, size: int, rank: int, suffix: str) -> str:
    """Where a rank writes what it found in a section; ``hung``: where it did not come back from."""
    words = section.replace(":", "-").replace(" ", "_")
    return f"{words}.{rank}-of-{size}.{suffix}"


def _write(path: Path, found: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    torch.save(found, part)
    torch.load(part, weights_only=True)  # what is no plain value is an error here, and not where it is read
    part.replace(path)


def _wait_for(paths: list[Path]) -> None:
    """Begin nothing new before every rank is out of a section, however it left it."""
    while not all(path.exists() for path in paths):
        time.sleep(0.005)


@contextmanager
def _watched(path: Path, seconds: float) -> Iterator[None]:
    """End the process when a block takes too long, and leave the stacks of its threads in a file."""
    with path.open("w") as file:
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    path.unlink()
