"""Options of the strategies that hold the whole model in every process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fabric_backends.options.groups import GroupOptions


@dataclass(frozen=True)
class DDPOptions(GroupOptions):
    """Of ``ddp``, and of what is built upon it.

    Attributes:
        find_unused_parameters: Look for parameters that a forward pass has left out, each time.
        static_graph: Promise that every step uses the same parameters in the same way.
        gradient_as_bucket_view: Let gradients lie where they are communicated from, which saves a copy of each.
        bucket_cap_mb: How many megabytes of gradients are communicated at once. Without it, PyTorch's 25.
        broadcast_buffers: Send rank 0's buffers to every rank before each forward pass.
        sync_batchnorm: Let batch normalisation use the batches of all ranks. Not on the CPU.
        comm_hook: Compress gradients on their way: fp16, bf16, powersgd, or a function.
        comm_state: For powersgd the options of its state, for a function whatever it wants to be given.
        comm_wrapper: fp16 or bf16: compress what the hook sends once more; or a function.
        init_sync: Give every rank the parameters of rank 0 at the start.
        check_reduction: Of DistributedDataParallel.
        delay_all_reduce_named_params: Of DistributedDataParallel.
        param_to_hook_all_reduce: Of DistributedDataParallel.
        mixed_precision: Of DistributedDataParallel.
        skip_all_reduce_unused_params: Of DistributedDataParallel.
        bucket_cap_mb_list: Of DistributedDataParallel, where PyTorch is new enough.
        batched_grad_copy: Of DistributedDataParallel, where PyTorch is new enough.
    """

    find_unused_parameters: bool = False
    static_graph: bool = False
    gradient_as_bucket_view: bool = True
    bucket_cap_mb: float | None = None
    broadcast_buffers: bool = True
    sync_batchnorm: bool = False
    comm_hook: str | Callable[..., Any] | None = None
    comm_state: Any = None
    comm_wrapper: str | Callable[..., Any] | None = None
    init_sync: bool = True
    check_reduction: bool = False
    delay_all_reduce_named_params: Any = None
    param_to_hook_all_reduce: Any = None
    mixed_precision: Any = None
    skip_all_reduce_unused_params: bool = False
    bucket_cap_mb_list: list[int] | None = None
    batched_grad_copy: bool = False


@dataclass(frozen=True)
class ShardedDDPOptions(DDPOptions):
    """Of ``ddp_sharded``.

    Attributes:
        engine: Whose engine divides the optimizer's state. auto takes FairScale's where it is installed.
    """

    engine: Literal["auto", "fairscale", "torch"] = "auto"


@dataclass(frozen=True)
class LocalSGDOptions(DDPOptions):
    """Of ``local_sgd``. Those of ``ddp`` hold for the warm-up.

    Attributes:
        sync_every: After how many steps of an optimizer its parameters are averaged over all ranks.
        warmup_steps: During so many steps gradients are averaged in each.
    """

    sync_every: int = 8
    warmup_steps: int = 0
