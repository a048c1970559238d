"""Options of the strategies that divide the model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from fabric_backends.options.groups import GroupOptions


@dataclass(frozen=True)
class FolderOptions(GroupOptions):
    """Of what can write a folder in parts.

    Attributes:
        checkpoint: sharded: a folder, to which every rank writes its part; full: one file, by rank 0.
    """

    checkpoint: Literal["sharded", "full"] = "sharded"


@dataclass(frozen=True)
class FSDPOptions(FolderOptions):
    """Of ``fsdp``. What is a function or a class is written as its path, "package.module:Name"; classes with commas.

    Attributes:
        auto_wrap_policy: Which modules are gathered by themselves: some classes, a function of a module, or auto.
        min_parameters: How many parameters make such a module, with auto.
        mixed_precision: A MixedPrecisionPolicy for all of them. Without it, what the precision wants.
        activation_checkpointing: Which modules are computed again in the backward pass: true for all that are gathered
            by themselves, some classes, or a function of a module.
        cpu_offload: Keep shards in the memory of the CPU. Optimizers step there.
        reshard_after_forward: Drop what was gathered after the forward pass; a number: keep shards of 1 in so many.
        device_mesh: "replicas,shards", or a DeviceMesh: shard over the last axis, replicate along the first.
        shard_size: The same by the number of processes that share one replica; node for those of a node.
    """

    auto_wrap_policy: Literal["auto"] | Callable[..., Any] | Collection[type] = "auto"
    min_parameters: int = 1_000_000
    mixed_precision: Any = None
    activation_checkpointing: bool | Callable[..., Any] | Collection[type] = False
    cpu_offload: bool = False
    reshard_after_forward: bool | int | None = None
    device_mesh: tuple[int, ...] | Any | None = None
    shard_size: int | Literal["node"] | None = None


Size = int | Literal["auto"]


@dataclass(frozen=True)
class ContextParallelOptions(FSDPOptions):
    """Of ``context_parallel``.

    Attributes:
        data_parallel_size: How many groups read different data. auto: what the other size leaves.
        context_parallel_size: How many ranks share a sequence. When both are auto, those of a node.
    """

    data_parallel_size: Size = "auto"
    context_parallel_size: Size = "auto"


@dataclass(frozen=True)
class TensorParallelOptions(FolderOptions):
    """Of ``tensor_parallel``.

    Attributes:
        parallelize_fn: The function of a module and a mesh that divides a model, or its "package.module:function".
        data_parallel_size: How many groups read different data. auto: what the other size leaves.
        tensor_parallel_size: How many ranks share a model. When both are auto, those of a node.
        loss_parallel: Compute cross_entropy of scores that are sharded over the classes in shards, too.
    """

    parallelize_fn: str | Callable[..., Any] | None = None
    data_parallel_size: Size = "auto"
    tensor_parallel_size: Size = "auto"
    loss_parallel: bool = False
