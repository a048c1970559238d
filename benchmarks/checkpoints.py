"""How fast checkpoints are written and read, beside PyTorch's own ways: in shards, in one file, and beside a training.

``python benchmarks/checkpoints.py [--mb=200] [--rounds=9] [--folder=DIR]``: a model of four layers and its Adam state.
Each round does everything once, in turn, so that a busy machine slows all of it down alike; medians of the rounds
count. What is loaded lies in the memory of the system. Only what says so is flushed to disk; ours always is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp

from fabric_core import Fabric
from fabric_core.sharded.trees import mapped

Action = Callable[[], Any]
Ways = dict[str, tuple[Action, Action]]
"""How each way saves, and how it loads into what is there."""

FABRIC = "fabric"


# -- what is saved ------------------------------------------------------------------------------------------------


def model_of(megabytes: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Four layers which are so large, together with two moments of each weight, and an optimizer without them."""
    width = int((megabytes * 1e6 / 3 / 4 / 4) ** 0.5)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(4)))
    return model, torch.optim.Adam(model.parameters())


def step(model: Any, optimizer: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def flushed(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def in_turn(*actions: Action) -> None:
    for action in actions:
        action()


def emptied(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


# -- in shards ----------------------------------------------------------------------------------------------------


def timed(fabric: Fabric, action: Action) -> float:
    """Seconds until the slowest rank is done."""
    fabric.barrier()
    begun = time.perf_counter()
    action()
    fabric.barrier()
    return time.perf_counter() - begun


def ways(fabric: Fabric, state: dict[str, Any], megabytes: int, folder: Path) -> Ways:
    model, optimizer, distributed = state["model"], state["optimizer"], cast("Any", dcp)
    tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    found: Ways = {
        FABRIC: (
            lambda: fabric.save(folder / "fabric", state),
            lambda: fabric.load(folder / "fabric", dict(state)),
        ),
        "torch.distributed.checkpoint": (
            lambda: distributed.save(tensors, checkpoint_id=folder / "dcp"),
            lambda: distributed.load(tensors, checkpoint_id=folder / "dcp"),
        ),
    }
    if fabric.world_size == 1:
        whole = mapped(tensors, lambda tensor: getattr(tensor, "full_tensor", lambda: tensor)(), torch.Tensor)
        plain, adam = model_of(megabytes)
        groups = adam.state_dict()["param_groups"]

        def load() -> None:
            loaded = torch.load(folder / "torch", weights_only=True)
            plain.load_state_dict(loaded["model"])
            adam.load_state_dict({"state": loaded["optimizer"], "param_groups": groups})

        def save() -> None:
            torch.save(whole, folder / "torch")

        found["torch.save, flushed"] = (lambda: in_turn(save, lambda: flushed(folder / "torch")), load)
        found["torch.save"] = (save, load)
    return found


def in_shards(fabric: Fabric, state: dict[str, Any], megabytes: int, rounds: int, folder: Path) -> None:
    times: dict[tuple[str, str], list[float]] = {}
    found = ways(fabric, state, megabytes, folder)
    for round_ in range(rounds + 1):
        for name, (save, load) in found.items():
            for what, action in (("save", save), ("load", load)):
                seconds = timed(fabric, action)
                if round_:  # the first one warms up
                    times.setdefault((name, what), []).append(seconds)
            if fabric.is_global_zero:
                emptied(folder)
            fabric.barrier()
    for what in ("save", "load"):
        for name in found:
            theirs = times[name, what]
            speed = megabytes / statistics.median(theirs)
            fabric.print(
                f"| {fabric.world_size} | {what} | {name} | {speed:.0f} | {ratio(theirs, times[FABRIC, what])} |"
            )


def ratio(theirs: list[float], ours: list[float]) -> str:
    """How many times as long something takes as something else: the median of pairs of one round."""
    return f"{statistics.median(other / own for other, own in zip(theirs, ours, strict=True)):.2f}"


# -- beside a training --------------------------------------------------------------------------------------------


def beside(fabric: Fabric, state: dict[str, Any], rounds: int, folder: Path) -> None:
    """How long the loop waits for a save, and how much processor time the loop's own thread spends in it."""
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for round_ in range(rounds + 1):
        for wait in (True, False):
            fabric.barrier()
            begun, worked = time.perf_counter(), time.thread_time()
            fabric.save(folder / "beside", state, wait=wait)
            spent = time.perf_counter() - begun, time.thread_time() - worked
            fabric.wait_for_save()
            if round_:
                found[wait].append(spent)
    (waited, busy), (blocked, copying) = (map(list, zip(*found[wait], strict=True)) for wait in (True, False))
    share = statistics.median(short / long for short, long in zip(blocked, waited, strict=True))
    numbers = (1000 * statistics.median(each) for each in (waited, blocked, busy, copying))
    whole, short, work, copy = (f"{number:.0f}" for number in numbers)
    name = fabric.plan.strategy.name
    fabric.print(f"| {name} | {fabric.world_size} | {whole} | {short} | {share:.1%} | {work} | {copy} |")


def on_ranks(section: str, megabytes: int, rounds: int, folder: Path) -> None:
    fabric = Fabric()
    model, optimizer = fabric.setup(*model_of(megabytes))
    step(model, optimizer)
    state = {"model": model, "optimizer": optimizer}
    if section == "shards":
        in_shards(fabric, state, megabytes, rounds, folder)
    else:
        beside(fabric, state, rounds, folder)
    fabric.close()


# -- in one file --------------------------------------------------------------------------------------------------


def in_a_fork(action: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """Do something in a process whose memory is as it is here, so that what it allocates is new; what it returns."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        os.write(sender, json.dumps(action()).encode())
        os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as answers:
        answer = answers.read()
    os.waitpid(child, 0)
    found: dict[str, float] = json.loads(answer)
    return found


def memory(what: str) -> float:
    """Megabytes: ``VmRSS``, what this process has in memory; ``VmHWM``, the most that it ever had."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.split(f"{what}:")[1].split()[0]) / 1e3


def spent(action: Action, afterwards: Callable[[Any], object] = lambda _: None) -> dict[str, float]:
    """Seconds and megabytes of something, and of what is done with its result."""
    before, begun, worked = memory("VmRSS"), time.perf_counter(), time.process_time()
    result = action()
    most = memory("VmHWM")
    afterwards(result)
    seconds, busy = time.perf_counter() - begun, time.process_time() - worked
    return {"seconds": seconds, "busy": busy, "megabytes": most - before}


def first_write(loaded: Any) -> None:
    mapped(loaded, lambda tensor: tensor.add_(1), torch.Tensor)


def in_one_file(megabytes: int, rounds: int, folder: Path) -> None:
    torch.set_num_threads(1)  # a process with more of them cannot be forked
    fabric = Fabric()
    model, optimizer = fabric.setup(*model_of(megabytes))
    step(model, optimizer)
    own, path, new = {"model": model, "optimizer": optimizer}, folder / "one", folder / "new"
    state = {name: part.state_dict() for name, part in own.items()}

    def restored(load: Callable[[Any, Any], object]) -> dict[str, float]:
        fresh = model_of(megabytes)
        return spent(lambda: load(*fresh))

    def plainly(fresh: Any, adam: Any) -> None:
        loaded = torch.load(path, weights_only=True)
        fresh.load_state_dict(loaded["model"])
        adam.load_state_dict(loaded["optimizer"])

    def by_fabric(fresh: Any, adam: Any) -> None:
        fabric.load(path, dict(zip(own, fabric.setup(fresh, adam), strict=True)))

    cases: dict[tuple[str, str], Callable[[], Mapping[str, float]]] = {
        ("save", "torch.save"): lambda: spent(lambda: torch.save(state, new)),
        ("save", "torch.save, flushed"): lambda: spent(
            lambda: in_turn(lambda: torch.save(state, new), lambda: flushed(new))
        ),
        ("save", FABRIC): lambda: spent(lambda: fabric.save(new, own)),
        ("load, and write to all of it", "torch.load"): lambda: spent(
            lambda: torch.load(path, weights_only=True), first_write
        ),
        ("load, and write to all of it", "torch.load, mapped"): lambda: spent(
            lambda: torch.load(path, weights_only=True, mmap=True), first_write
        ),
        ("load, and write to all of it", FABRIC): lambda: spent(lambda: fabric.load(path), first_write),
        ("load into a new model and optimizer", "torch.load"): lambda: restored(plainly),
        ("load into a new model and optimizer", FABRIC): lambda: restored(by_fabric),
    }
    found: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    fabric.save(new, {"small": torch.zeros(1)})  # imports what saving and loading need
    fabric.load(new)
    torch.load(new, weights_only=True)
    in_a_fork(lambda: spent(lambda: fabric.save(path, own)))
    for _ in range(rounds):
        for case, action in cases.items():
            os.sync()
            found[case].append(in_a_fork(action))
    for (what, name), each in found.items():
        seconds, ours = ([one["seconds"] for one in found[what, way]] for way in (name, FABRIC))
        middle, busy, grown = (
            statistics.median(one[key] for one in each) for key in ("seconds", "busy", "megabytes")
        )
        times = f"{1000 * middle:.0f} | {1000 * busy:.0f} | {megabytes / middle:.0f}"
        numbers = f"{times} | {ratio(seconds, ours)} | {grown:.0f}"
        print(f"| {what} | {name} | {numbers} |", flush=True)
    fabric.close()


# -- everything ---------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=200, help="how large the state is")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: a temporary one)")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.section == "file":
        in_one_file(told.mb, told.rounds, told.folder)
        return
    if told.section:
        on_ranks(told.section, told.mb, told.rounds, told.folder)
        return

    def run(section: str, strategy: str, processes: int = 1) -> None:
        with tempfile.TemporaryDirectory(dir=told.folder) as folder:
            launch = [
                "-m",
                "fabric_core",
                "run",
                "--accelerator=cpu",
                f"--devices={processes}",
                f"--strategy={strategy}",
            ]
            own = [
                __file__,
                f"--section={section}",
                f"--mb={told.mb}",
                f"--rounds={told.rounds}",
                f"--folder={folder}",
            ]
            subprocess.run([sys.executable, *launch, *own], check=True)

    print(
        "In shards (fsdp):\n\n| processes | | way | MB/s | times fabric's |\n|---|---|---|---|---|",
        flush=True,
    )
    for processes in (1, 2):
        run("shards", "fsdp", processes)
    print("\nIn one file, each time in a new process:\n", flush=True)
    print(
        "| | way | ms | CPU ms | MB/s | times fabric's | memory grows by, MB |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    run("file", "single_device")
    print("\nBeside a training:\n", flush=True)
    print("| strategy | processes | save, ms | wait=False, ms | of it | CPU ms of the loop | of them |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for strategy, processes in (("single_device", 1), ("fsdp", 1), ("fsdp", 2)):
        run("beside", strategy, processes)


if __name__ == "__main__":
    main()
