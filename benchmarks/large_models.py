"""How much memory a rank needs to create, load and save a model that is larger than its share.

    .venv/bin/python benchmarks/large_models.py --megabytes 600 --strategies fsdp deepspeed_stage_3 --processes 2 4

Each job creates the model with ``init_module(empty_init=True)``, loads it from one file that a single process wrote,
and saves it; then from the folder that another number of ranks has saved; then all of it again with Adam. Counted is
memory that nothing but this process holds (``RssAnon`` of Linux, looked at all the time): the most that a phase has
needed beyond what the process had before the model, when it had done the same with a tiny one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fabric_core import Fabric

WIDTH = 1024
LAYER = 4 * WIDTH * WIDTH / 2**20
"""Megabytes of one layer in float32."""
STATUS = Path("/proc/self/status")


def make_model(layers: int, width: int = WIDTH) -> nn.Sequential:
    """Layers that are all alike."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def held() -> float:
    """Megabytes that this process alone holds."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024


class Watch:
    """A thread that looks at the memory of its process."""

    def __init__(self) -> None:
        self.before = held()
        self.most: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the most memory that is held meanwhile."""
        over = threading.Event()
        seen = [held()]

        def look() -> None:
            while not over.wait(0.001):
                seen.append(held())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.most[name] = max(*seen, held()) - self.before


def write(path: Path, layers: int, *, adam: bool, width: int = WIDTH) -> None:
    """Save a model with random weights, and with what Adam has of it after a step, as a single process does."""
    model = make_model(layers, width)
    state = {"model": model.state_dict()}
    if adam:
        optimizer = torch.optim.Adam(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        state["optimizer"] = optimizer.state_dict()
    torch.save(state, path)


def set_up(fabric: Fabric, model: Any) -> dict[str, Any]:
    """A model and its optimizer, in the order that the strategy needs."""
    if fabric.strategy.joint_setup:
        model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters()))
    else:
        model = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(torch.optim.Adam(model.parameters()))
    return {"model": model, "optimizer": optimizer}


def create_load_and_save(
    fabric: Fabric, layers: int, width: int, source: str, target: str, adam: bool
) -> Watch:
    """What is measured. Called on every rank."""
    watch = Watch()
    with watch.phase("create"):
        with fabric.init_module(empty_init=True):
            model = make_model(layers, width)
        state = set_up(fabric, model) if adam else {"model": fabric.setup_module(model)}
    with watch.phase("load"):
        fabric.load(source, state)
    with watch.phase("save"):
        fabric.save(target, state)
    return watch


def on_a_rank(args: argparse.Namespace) -> None:
    """Measure, and write down what was found."""
    torch.set_num_threads(1)
    fabric = Fabric()
    fabric.launch()
    folder = Path(args.target).parent
    tiny = folder / "tiny.ckpt"
    if fabric.is_global_zero:
        write(tiny, 2, adam=args.adam, width=8)
    fabric.barrier()
    create_load_and_save(fabric, 2, 8, str(tiny), f"{args.target}-tiny", args.adam)
    began = time.perf_counter()
    watch = create_load_and_save(fabric, args.layers, WIDTH, args.source, args.target, args.adam)
    found = {**watch.most, "seconds": time.perf_counter() - began}
    Path(f"{args.target}.{fabric.global_rank}.json").write_text(json.dumps(found))
    fabric.close()


def measure(
    strategy: str, processes: int, layers: int, source: Path, target: Path, *, adam: bool = False
) -> dict[str, float]:
    """The most that any rank of a job has needed in each phase, in megabytes; and seconds.

    Args:
        strategy, processes: Of the job.
        layers: Of the model.
        source: What it loads.
        target: What it saves.
        adam: Whether an optimizer is created, loaded and saved, too.
    """
    command = [sys.executable, "-m", "fabric_core", "run", f"--strategy={strategy}", f"--devices={processes}"]
    command += ["--accelerator=cpu", __file__, f"--layers={layers}", str(source), str(target)]
    command += ["--adam"] if adam else []
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found = [json.loads(Path(f"{target}.{rank}.json").read_text()) for rank in range(processes)]
    return {name: max(one[name] for one in found) for name in found[0]}


def rows(strategy: str, sizes: list[int], layers: int, folder: Path, adam: bool) -> Iterator[tuple[str, ...]]:
    """What the table says of a strategy, for each number of processes, and each of two sources."""
    sources = {"a file": folder / "whole.ckpt"}
    write(sources["a file"], layers, adam=adam)
    states = 3 if adam else 1  # tensors as large as the model
    for size in sizes:
        target = folder / str(size)
        for origin, source in sources.items():
            most = measure(strategy, size, layers, source, target, adam=adam)
            figures = (most["create"], most["load"], most["save"], most["seconds"])
            share = f"{states * layers * LAYER / size:.0f}"
            what = "model, Adam" if adam else "model"
            yield strategy, what, str(size), origin, share, *(f"{figure:.0f}" for figure in figures)
        sources = {**sources, f"a folder of {size}": target}


def main() -> None:
    """Measure and print a table; or be one rank of what is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=600, help="of the model")
    parser.add_argument("--strategies", nargs="+", default=["fsdp", "deepspeed_stage_3"])
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--adam", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("source", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("target", nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.source is not None:
        on_a_rank(args)
        return

    layers = round(args.megabytes / LAYER)
    title = f"MB that a rank holds at most; model {layers * LAYER:.0f}, layer {LAYER:.0f}"
    table = Table(
        "strategy", "of", "ranks", "from", "share", "create", "load", "save", "seconds", title=title
    )
    with tempfile.TemporaryDirectory() as name:
        for strategy, adam in itertools.product(args.strategies, (False, True)):
            folder = Path(name) / f"{strategy}-{adam}"
            folder.mkdir()
            for row in rows(strategy, args.processes, layers, folder, adam):
                table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
