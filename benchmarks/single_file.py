"""A checkpoint in one file.

A model and the state of its Adam, 201 MB in all; one thread. *save*: to a file in the temporary folder. fabric's has
checksums of its own and is flushed to the disk, and so is *plain, flushed*; the others leave that to the system.
*load*: what is in the file, and then a write to all of it, as the next training step does. *restore*: into a model and
an optimizer that exist, and the same write. What is loaded lies in the memory of the system. accelerate has several
files, and can only restore. *Extra memory* is the peak of one such call over what the process had before.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
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

SAVE, LOAD, RESTORE = "save", "load", "restore"
FLUSHED, MAPPED = "plain, flushed", "plain, mapped"
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

    def load() -> Any:
        return torch.load(file, mmap=mmap, weights_only=True)

    def restore() -> None:
        state = load()
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    return _chosen(case, model, optimizer, save=save, load=load, restore=restore)


def lightning_fabric(case: str) -> Operation:
    """The peer's verbs."""
    from lightning_fabric import Fabric

    return _verbs(case, Fabric(accelerator="cpu", devices=1))


def fabric(case: str) -> Operation:
    """Our verbs, which have the same names."""
    from fabric_core import Fabric

    return _verbs(case, Fabric(accelerator="cpu", devices=1))


def _verbs(case: str, library: Any) -> Operation:
    library.launch()
    model, optimizer = library.setup(*_work())
    file, state = _folder() / "file", {"model": model, "optimizer": optimizer}
    return _chosen(
        case,
        model,
        optimizer,
        save=lambda: library.save(file, state),
        load=lambda: library.load(file),
        restore=lambda: library.load(file, dict(state)),
    )


def accelerate(case: str) -> Operation:
    """The peer's verbs."""
    from accelerate import Accelerator

    peer = Accelerator(cpu=True)
    model, optimizer = peer.prepare(*_work())
    folder = str(_folder())
    return _chosen(
        case,
        model,
        optimizer,
        save=lambda: peer.save_state(folder),
        load=dict,
        restore=lambda: peer.load_state(folder),
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
    case: str,
    model: Any,
    optimizer: Any,
    *,
    save: Operation,
    load: Callable[[], Any],
    restore: Operation,
) -> Operation:
    import torch

    if case == SAVE:
        return save
    save()

    @torch.no_grad()
    def write(parameters: Iterable[Any], moments: Iterable[dict[str, Any]]) -> None:
        for tensor in (*parameters, *(tensor for each in moments for tensor in each.values())):
            tensor.add_(1)

    def load_and_write() -> None:
        state = load()
        write(state["model"].values(), state["optimizer"]["state"].values())

    def restore_and_write() -> None:
        restore()
        write(model.parameters(), optimizer.state.values())

    return load_and_write if case == LOAD else restore_and_write


NEW_MEMORY = (
    "What a load takes is the time in which the system gives 200 MB of new memory: 26 ms in pages of 2 MiB, 140 to "
    "167 in pages of 4 KiB, cleared and filled. Reading takes 15, comparing checksums 7, writing 8. Large pages are "
    "asked for, until one takes longer than 0.5 ms: on a machine whose hypervisor takes free memory back, one that it "
    "has to bring again takes 4.3 instead of 0.17. So whole runs found 60 and 131 ms. "
    "Memory-mapping costs as much as small pages, as soon as what was loaded is written to: "
    "[why](../docs/design/0017-one-file-and-stores.md)."
)

FIGURE = Operations(
    name="single_file",
    about=__doc__,
    contenders={
        PLAIN: plain,
        FLUSHED: plain_flushed,
        MAPPED: plain_mapped,
        LIGHTNING: lightning_fabric,
        ACCELERATE: accelerate,
        OURS: fabric,
    },
    cases=(
        Case(SAVE, rounds=9, contenders=(PLAIN, FLUSHED, LIGHTNING, ACCELERATE, OURS)),
        Case(LOAD, rounds=9, contenders=(PLAIN, MAPPED, LIGHTNING, OURS)),
        Case(RESTORE, rounds=9, contenders=(PLAIN, MAPPED, LIGHTNING, ACCELERATE, OURS)),
    ),
    trimmed=True,
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
    notes=(NEW_MEMORY,),
)

if __name__ == "__main__":
    main(FIGURE)
