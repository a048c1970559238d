"""How the kit's model is divided, for strategies that divide layers."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def parallelize(module: Any, mesh: Any) -> None:
    """The first layer by columns, the last one by rows."""
    plan: Any = {"first": ColwiseParallel(), "last": RowwiseParallel()}
    parallelize_module(module, mesh["tensor_parallel"], plan)


def strategy_options(processes: int) -> dict[str, Any]:
    """All ranks share the model."""
    return {"parallelize_fn": parallelize, "data_parallel_size": 1}
