"""How fast checkpoints in shards are written and read, beside PyTorch's own ways, on one and on two processes.

``python benchmarks/checkpoints.py [--mb=200] [--rounds=9] [--folder=DIR]``: a model and its Adam state under ``fsdp``.
Each round does everything once, in turn, so that a busy machine slows all of it down alike; medians of the rounds
count. What is loaded lies in the memory of the system. ``torch.save`` works on whole tensors, and is measured on one
process only; it does not flush to disk by itself, as the others do, so it is measured with that, too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from fabric_core import Fabric
from fabric_core.sharded.trees import mapped

Ways = dict[str, tuple[Callable[[], Any], Callable[[], Any]]]
"""How each way saves, and how it loads into what is there."""


def flushed(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def timed(fabric: Fabric, action: Callable[[], Any]) -> float:
    """Seconds until the slowest rank is done."""
    fabric.barrier()
    begun = time.perf_counter()
    action()
    fabric.barrier()
    return time.perf_counter() - begun


def ways(fabric: Fabric, state: dict[str, Any], width: int, folder: Path) -> Ways:
    model, optimizer = state["model"], state["optimizer"]
    tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    found: Ways = {
        "fabric": (
            lambda: fabric.save(folder / "fabric", state),
            lambda: fabric.load(folder / "fabric", dict(state)),
        ),
        "torch.distributed.checkpoint": (
            lambda: dcp.save(tensors, checkpoint_id=folder / "dcp"),
            lambda: dcp.load(tensors, checkpoint_id=folder / "dcp"),
        ),
    }
    if fabric.world_size == 1:
        whole = mapped(tensors, lambda tensor: getattr(tensor, "full_tensor", lambda: tensor)(), torch.Tensor)
        plain = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(4)))
        adam = torch.optim.Adam(plain.parameters())
        groups = adam.state_dict()["param_groups"]

        def load() -> None:
            loaded = torch.load(folder / "torch", weights_only=True)
            plain.load_state_dict(loaded["model"])
            adam.load_state_dict({"state": loaded["optimizer"], "param_groups": groups})

        def save() -> None:
            torch.save(whole, folder / "torch")

        found["torch.save, flushed"] = (lambda: (save(), flushed(folder / "torch")), load)
        found["torch.save"] = (save, load)
    return found


def measure(megabytes: int, rounds: int, folder: Path) -> None:
    fabric = Fabric(accelerator="cpu", strategy="fsdp")
    width = int((megabytes * 1e6 / 3 / 4 / 4) ** 0.5)  # four layers, and two moments of each weight
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(4)))
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    state = {"model": model, "optimizer": optimizer}
    size = 3 * 4 * width * width * 4 / 1e6
    times: dict[tuple[str, str], list[float]] = {}
    found = ways(fabric, state, width, folder)
    for round_ in range(rounds + 1):
        for name, (save, load) in found.items():
            for what, action in (("save", save), ("load", load)):
                seconds = timed(fabric, action)
                if round_:  # the first one warms up
                    times.setdefault((name, what), []).append(seconds)
            if fabric.is_global_zero:
                for entry in folder.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            fabric.barrier()
    for what in ("save", "load"):
        ours = times["fabric", what]
        for name in found:
            theirs = times[name, what]
            speed = size / statistics.median(theirs)
            ratio = statistics.median(other / own for own, other in zip(ours, theirs, strict=True))
            fabric.print(f"| {fabric.world_size} | {what} | {name} | {speed:.0f} | {ratio:.2f} |")
    fabric.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=200, help="how large the state is")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: a temporary one)")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.rank:
        measure(told.mb, told.rounds, told.folder)
        return
    print("| processes | | way | MB/s | fabric is faster by |\n|---|---|---|---|---|", flush=True)
    for processes in (1, 2):
        with tempfile.TemporaryDirectory(dir=told.folder) as folder:
            run = [sys.executable, "-m", "fabric_core", "run", f"--devices={processes}", "--accelerator=cpu"]
            own = [__file__, "--rank", f"--mb={told.mb}", f"--rounds={told.rounds}", f"--folder={folder}"]
            subprocess.run([*run, *own], check=True)


if __name__ == "__main__":
    main()
