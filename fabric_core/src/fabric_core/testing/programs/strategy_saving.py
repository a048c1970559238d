"""A section in which a checkpoint is saved while the training goes on."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fabric_core.testing.plain_loop import CASES
from fabric_core.testing.programs.strategy_training import MIDDLE, differences
from fabric_core.testing.programs.task import Task
from fabric_core.testing.programs.training import Training

PATIENCE = 30.0  # seconds after which a thread begins to write even if the training has not ended


def saved_meanwhile(task: Task) -> dict[str, Any]:
    """Two saves of one moment: one that is waited for, and one that is not written before all has changed."""
    case = CASES["everything"]
    with task.fabric() as fabric:
        training = Training(fabric, case, build=task.build)
        training.run(end=MIDDLE * case.every)
        state = training.state | {"notes": {"seen": [1, 2]}, "counts": torch.arange(3)}
        fabric.save(task.path("waited-for"), state)
        with _written_late(fabric.strategy) as late:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*cannot save while the training goes on")
                fabric.save(task.own, state, wait=False)
            training.run(begin=MIDDLE * case.every, end=case.full)
            state["notes"]["seen"].append(3)
            state["counts"] += 1
        fabric.wait_for_save()
        before, meanwhile = fabric.load(task.path("waited-for")), fabric.load(task.own)
        return {"changed": list(differences(before, meanwhile)), "threads": late.threads}


@dataclass
class _Late:
    """The names of the threads in which was written."""

    threads: list[str] = field(default_factory=list)


@contextmanager
def _written_late(strategy: Any) -> Iterator[_Late]:
    """While this is open, other threads than this one do not begin to write."""
    late, closed, here, save = (
        _Late(),
        threading.Event(),
        threading.current_thread(),
        strategy.save_checkpoint,
    )

    def wait_and_save(path: Path, checkpoint: Mapping[str, Any]) -> None:
        late.threads.append("its own" if threading.current_thread() is here else "another")
        if threading.current_thread() is not here:
            closed.wait(PATIENCE)
        save(path, checkpoint)

    strategy.save_checkpoint = wait_and_save
    try:
        yield late
    finally:
        closed.set()
        del strategy.save_checkpoint


SECTIONS: dict[str, Callable[..., Any]] = {"saved meanwhile": saved_meanwhile}
