"""Sections in which the ranks talk to each other, and share data and files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from fabric_core.errors import CheckpointError, FabricError
from fabric_core.testing.programs.task import Task

LATE = 0.4  # seconds that one rank comes late to a barrier
SAMPLES = 24


def ranks(task: Task) -> dict[str, Any]:
    """Who this process is, as the strategy says and as the variables of the job say."""
    with task.fabric() as fabric:
        fabric.barrier("joined")
        names = ("global_rank", "world_size", "local_rank", "node_rank")
        variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK")
        single = {"WORLD_SIZE": "1"}
        return {
            "said": {name: int(getattr(fabric.strategy, name)) for name in names},
            "true": {
                name: int(os.environ.get(variable, single.get(variable, "0")))
                for name, variable in zip(names, variables, strict=True)
            },
            "device": str(fabric.device),
            "planned": str(fabric.strategy.surroundings.devices[fabric.strategy.local_rank]),
        }


def gathered(task: Task) -> dict[str, Any]:
    """``all_gather`` of tensors of several types, and of their gradients."""
    with task.fabric() as fabric:
        rank, gather = fabric.global_rank, fabric.strategy.all_gather
        mine = torch.arange(6.0).reshape(2, 3) + 10 * rank
        flowing = torch.tensor([1.0 + rank, 2.0], requires_grad=True)
        weighted = gather(fabric.to_device(flowing), sync_grads=True)
        factors = torch.arange(1.0, 1 + weighted.numel()).reshape(weighted.shape)
        (weighted * fabric.to_device(factors)).sum().backward()
        return {
            "float": _plain(gather(fabric.to_device(mine))),
            "int": _plain(gather(fabric.to_device(torch.tensor([2**40 + rank])))),
            "bool": _plain(gather(fabric.to_device(torch.tensor(rank == 0)))),
            "gradient": flowing.grad,
        }


def reduced(task: Task) -> dict[str, Any]:
    """``all_reduce`` with each way to combine, and what became of its argument."""
    with task.fabric() as fabric:
        rank, reduce = fabric.global_rank, fabric.strategy.all_reduce
        mine = fabric.to_device(torch.tensor([[1.0 + rank, -2.0], [0.5 * rank, 4.0]]))
        kept = mine.clone()
        operations = ("mean", "sum", "min", "max", "product")
        found = {name: _plain(reduce(mine, name)) for name in operations}
        found["default"] = _plain(reduce(mine))
        found["whole"] = _plain(reduce(fabric.to_device(torch.tensor([2**40 + rank])), "sum"))
        return {"results": found, "argument unchanged": bool(torch.equal(mine, kept))}


def sent(task: Task) -> dict[str, Any]:
    """``broadcast`` of an object from the first and from the last rank."""
    with task.fabric() as fabric:
        mine = {
            "rank": fabric.global_rank,
            "tensor": fabric.to_device(torch.full((2, 2), float(fabric.global_rank))),
            "nested": [("text", None), {"at": 0.5 + fabric.global_rank}],
        }
        found = {}
        for src in {0, task.size - 1}:
            found[str(src)] = _all_plain(fabric.strategy.broadcast(mine, src))
        found["tensor"] = _all_plain(fabric.strategy.broadcast(mine["tensor"], task.size - 1))
        return found


def waited(task: Task) -> dict[str, Any]:
    """Whether a rank that comes to a barrier early is still there when a late one comes."""
    with task.fabric() as fabric:
        fabric.barrier("joined")
        missed = []
        for late in range(task.size):
            arrived = task.folder / f"arrived-{late}"
            if fabric.global_rank == late:
                time.sleep(LATE)
                arrived.touch()
            fabric.strategy.barrier(f"rank {late} is late")
            missed += [] if arrived.exists() else [late]
        fabric.strategy.barrier()
        return {"missed": missed}


def grouped(task: Task) -> dict[str, Any]:
    """Collectives in groups of one rank each, and in a group of all; empty where the strategy has no groups."""
    with task.fabric() as fabric:
        fabric.barrier("joined")
        if not dist.is_initialized():
            return {"none": "the ranks are not joined by torch.distributed"}
        alone = [dist.new_group([rank]) for rank in range(task.size)]
        everybody = dist.new_group(list(range(task.size)))
        rank = fabric.global_rank
        mine = fabric.to_device(torch.tensor([1.0 + rank, 2.0]))
        found: dict[str, Any] = {}
        try:
            for name, group in (("alone", alone[rank]), ("all", everybody)):
                found[f"{name} gathered"] = _plain(fabric.strategy.all_gather(mine, group=group))
                found[f"{name} summed"] = _plain(fabric.strategy.all_reduce(mine, "sum", group=group))
                found[f"{name} averaged"] = _plain(fabric.strategy.all_reduce(mine, "mean", group=group))
        except FabricError as error:
            return {"none": str(error)}
        return found


def dealt(task: Task) -> dict[str, Any]:
    """Which samples this rank reads, in order, shuffled, and where they arrive."""
    with task.fabric() as fabric:
        arguments = dict(fabric.strategy.sampler_arguments)
        samples: Any = torch.arange(SAMPLES)
        found: dict[str, Any] = {"sampler": arguments}
        for name, shuffle in (("in order", False), ("shuffled", True)):
            torch.manual_seed(3)
            loader: DataLoader[Any] = DataLoader(samples, batch_size=2, shuffle=shuffle)
            batches = list(fabric.setup_dataloaders(loader))
            found[name] = [int(value) for batch in batches for value in batch]
            found["devices"] = sorted({str(batch.device) for batch in batches})
        device = fabric.strategy.loader_device
        found["loader device"] = "" if device is None else str(device)
        return found


def failing_files(task: Task) -> dict[str, Any]:
    """What is raised for a checkpoint that cannot be written, and for one that is not there."""
    with task.fabric() as fabric:
        if fabric.global_rank == 0:
            task.path("file").write_text("no folder")
        fabric.barrier("the file is there")
        with _told() as unwritable:
            fabric.save(task.path("file") / "x.ckpt", {"a": 1})
        with _told() as missing:
            fabric.load(task.path("nothing"))
        return {"unwritable": unwritable, "missing": missing}


def written(task: Task) -> dict[str, Any]:
    """Whether this rank asks the checkpoint io to write."""
    with task.fabric() as fabric:
        checkpoint_io, asked = fabric.strategy.surroundings.checkpoint_io, []
        save = checkpoint_io.save

        def noted(path: Path, checkpoint: Mapping[str, Any]) -> None:
            asked.append(path)
            save(path, checkpoint)

        checkpoint_io.save = noted
        fabric.save(task.own, {"step": 1})
        return {"writes": bool(asked)}


@contextmanager
def _told() -> Iterator[dict[str, Any]]:
    """What a block raises."""
    told: dict[str, Any] = {"error": "nothing", "is right": False}
    try:
        yield told
    except Exception as error:
        told.update(
            {"error": f"{type(error).__name__}: {error}", "is right": isinstance(error, CheckpointError)}
        )


def _plain(tensor: Any) -> Any:
    """A tensor on the CPU, or the name of the type of what is none."""
    if type(tensor) is not torch.Tensor:
        return type(tensor).__qualname__
    return tensor.detach().cpu().clone()


def _all_plain(obj: Any) -> Any:
    if isinstance(obj, dict):
        return {key: _all_plain(value) for key, value in obj.items()}
    return _plain(obj) if isinstance(obj, torch.Tensor) else obj


SECTIONS: dict[str, Callable[..., Any]] = {
    "ranks": ranks,
    "gathered": gathered,
    "reduced": reduced,
    "sent": sent,
    "waited": waited,
    "grouped": grouped,
    "dealt": dealt,
    "failing files": failing_files,
    "written": written,
}
