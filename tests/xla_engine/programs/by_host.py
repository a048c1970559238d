"""Several processes with an XLA device each, that talk to each other by way of the host.

Between processes, XLA has no collectives on the CPU. Everything else is there: so only the functions by which processes
of torch_xla talk are replaced, by PyTorch's collectives over gloo, which fetch what they send from the device. What the
processes compute, `XlaFullyShardedDataParallel` and all, is torch_xla's own.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.runtime as xr
from torch import Tensor
from torch_xla.core import xla_model as xm

from fabric_core import AcceleratorSpec, Fabric, Inventory
from fabric_xla.accelerator import XLAAccelerator
from fabric_xla.store import SERVED, serve_store

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

_OPS = {
    xm.REDUCE_SUM: dist.ReduceOp.SUM,
    xm.REDUCE_MUL: dist.ReduceOp.PRODUCT,
    xm.REDUCE_MIN: dist.ReduceOp.MIN,
    xm.REDUCE_MAX: dist.ReduceOp.MAX,
}


class Device(XLAAccelerator):
    """The device of this process, which is its only one."""

    spec = AcceleratorSpec(
        "xla_by_host", "by_host:Device", probe=lambda: Inventory(tuple(range(SIZE))), groups=("xla", "tpu")
    )


def opened(strategy: str, **options: Any) -> Any:
    return Fabric(accelerator=Device(), strategy=strategy, devices=SIZE, strategy_options=options)


def _all_reduce(
    kind: str, inputs: Any, scale: float = 1.0, groups: Any = None, pin_layout: bool = True
) -> Any:
    """A list is reduced in place; a tensor is not changed."""
    assert not groups

    def reduced(tensor: Tensor) -> Tensor:
        here = tensor.detach().cpu().clone()
        dist.all_reduce(here, _OPS[kind])
        return (here * scale if scale != 1.0 else here).to(tensor.device)

    if isinstance(inputs, Tensor):
        return reduced(inputs)
    with torch.no_grad():
        for tensor in inputs:
            tensor.copy_(reduced(tensor))
    return inputs


def _all_gather(value: Any, dim: int = 0, groups: Any = None, output: Any = None, **_: Any) -> Any:
    assert not groups
    assert output is None
    if isinstance(value, list | tuple):
        return [_all_gather(each, dim) for each in value]
    here = (value.detach() * 1).cpu().contiguous()
    parts = [torch.empty_like(here) for _ in range(SIZE)]
    dist.all_gather(parts, here)
    return torch.cat(parts, dim).to(value.device).clone()


def _reduce_scatter(
    kind: str, inputs: Any, scale: float, scatter_dim: int, shard_count: int, groups: Any = None, **_: Any
) -> Any:
    assert not groups
    assert shard_count == SIZE
    if isinstance(inputs, list):
        return [_reduce_scatter(kind, each, scale, scatter_dim, shard_count) for each in inputs]
    return _all_reduce(kind, inputs, scale).chunk(SIZE, scatter_dim)[RANK].clone()


def _rendezvous(tag: str, payload: bytes = b"", replicas: Any = ()) -> list[bytes]:
    torch_xla.sync()
    payloads: list[Any] = [None] * SIZE
    dist.all_gather_object(payloads, (tag, payload))
    assert len({tag for tag, _ in payloads}) == 1, "torch_xla would hang"
    return [payload for _, payload in payloads]


def join(folder: Path) -> Any:
    """Join the other processes, as the launcher makes them.

    Returns:
        The store that this process serves; it has to live as long as the job.
    """
    os.environ["PJRT_LOCAL_PROCESS_RANK"], os.environ["PJRT_LOCAL_PROCESS_COUNT"] = str(RANK), str(SIZE)
    talk_by_host()
    return _meeting_point(folder)


def talk_by_host() -> None:
    """Let the processes of a launch talk to each other."""
    for name, function in {
        "all_reduce": _all_reduce,
        "all_gather": _all_gather,
        "reduce_scatter": _reduce_scatter,
        "rendezvous": _rendezvous,
    }.items():
        setattr(xm, name, function)
    answers = {"world_size": SIZE, "global_ordinal": RANK, "local_ordinal": RANK, "local_device_count": SIZE}
    for name, answer in answers.items():
        setattr(xr, name, lambda answer=answer: answer)
    dist.init_process_group("gloo")


def _meeting_point(folder: Path) -> Any:
    """What the launcher does: serve the store, and say where."""
    told = folder / "store"
    served = serve_store("127.0.0.1", 0) if RANK == 0 else None
    if served is not None:
        (folder / "part").write_text(f"127.0.0.1:{served.port}")
        (folder / "part").rename(told)
    while not told.exists():
        time.sleep(0.02)
    os.environ[SERVED] = told.read_text()
    return served
