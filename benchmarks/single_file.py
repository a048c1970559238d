"""A checkpoint in one file.

A model and the state of its Adam, 201 MB in all. *save*: to a file in the temporary folder. fabric's has checksums of
its own and is flushed to the disk, and so is *plain, flushed*; the others leave it to the system. accelerate writes
two files. *load*: into the model and optimizer that exist, and then a write to all of it, as the next training step
does; the file lies in the system's memory. One thread. *Extra memory* is the peak of one save or load over what the
process had before.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import (
    ACCELERATE,
    LIGHTNING,
    OURS,
    PLAIN,
    Against,
    Case,
    Measure,
    Operation,
    Operations,
    Target,
    main,
)

SAVE, LOAD = "save", "load"
WIDTH, LAYERS = 2048, 4
MEGABYTES = 3 * 4 * LAYERS * WIDTH**2 / 1e6
"""Weights and two moments, in float32."""


def plain(case: str) -> Operation:
    """``torch.save`` and ``torch.load``."""
    return _plain(case)


def plain_flushed(case: str) -> Operation:
    """The same, and the file on the disk."""
    return _plain(case, flush=True)


def plain_mapped(case: str) -> Operation:
    """The same, memory-mapped."""
    return _plain(case, mmap=True)


def _plain(case: str, flush: bool = False, mmap: bool = False) -> Operation:
    import torch

    model, optimizer = _work()
    file = _folder() / "file"

    def save() -> None:
        with file.open("wb") as stream:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
            if flush:
                stream.flush()
                os.fsync(stream.fileno())

    def load() -> None:
        state = torch.load(file, mmap=mmap, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    return _chosen(case, save, load, model, optimizer)


def lightning_fabric(case: str) -> Operation:
    """The peer's verbs."""
    from lightning_fabric import Fabric

    peer = Fabric(accelerator="cpu", devices=1)
    model, optimizer = peer.setup(*_work())
    file, state = _folder() / "file", {"model": model, "optimizer": optimizer}
    return _chosen(
        case, lambda: peer.save(file, state), lambda: peer.load(file, dict(state)), model, optimizer
    )


def accelerate(case: str) -> Operation:
    """The peer's verbs."""
    from accelerate import Accelerator

    peer = Accelerator(cpu=True)
    model, optimizer = peer.prepare(*_work())
    folder = str(_folder())
    return _chosen(case, lambda: peer.save_state(folder), lambda: peer.load_state(folder), model, optimizer)


def fabric(case: str) -> Operation:
    """Our verbs."""
    from fabric_core import Fabric

    ours = Fabric(accelerator="cpu", devices=1)
    ours.launch()
    model, optimizer = ours.setup(*_work())
    file, state = _folder() / "file", {"model": model, "optimizer": optimizer}
    return _chosen(
        case, lambda: ours.save(file, state), lambda: ours.load(file, dict(state)), model, optimizer
    )


def _work() -> Any:
    """A model and an optimizer that has made one step."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def _folder() -> Path:
    """A folder that lives as long as this process."""
    _FOLDERS.append(tempfile.TemporaryDirectory())
    return Path(_FOLDERS[-1].name)


def _chosen(
    case: str, save: Callable[[], object], load: Callable[[], object], model: Any, optimizer: Any
) -> Operation:
    import torch

    if case == SAVE:
        return save
    save()

    @torch.no_grad()
    def load_and_write() -> None:
        load()
        for parameter in model.parameters():
            parameter.add_(1)
            for tensor in optimizer.state[parameter].values():
                tensor.add_(1)

    return load_and_write


FIGURE = Operations(
    name="single_file",
    about=__doc__,
    contenders={
        PLAIN: plain,
        "plain, flushed": plain_flushed,
        "plain, mapped": plain_mapped,
        LIGHTNING: lightning_fabric,
        ACCELERATE: accelerate,
        OURS: fabric,
    },
    cases=(
        Case(SAVE, rounds=9, contenders=(PLAIN, "plain, flushed", LIGHTNING, ACCELERATE, OURS)),
        Case(LOAD, rounds=9, contenders=(PLAIN, "plain, mapped", LIGHTNING, ACCELERATE, OURS)),
    ),
    counted=("grow",),
    measures=(
        Measure("wall", "ms", "wall"),
        Measure("speed", "MB/s", "speed", source="wall", amount=MEGABYTES),
        Measure("cpu", "ms", "CPU"),
        Measure("growth", "MB", "extra memory"),
    ),
    targets=(
        Target(SAVE, "speed", 1536, Against.VALUE, at_least=True),
        Target(SAVE, "speed", 1.0, at_least=True),
        Target(SAVE, "growth", 20, Against.VALUE),
        Target(LOAD, "wall", 125, Against.VALUE),
        Target(LOAD, "wall", 125 / 196),
    ),
)

if __name__ == "__main__":
    main(FIGURE)
