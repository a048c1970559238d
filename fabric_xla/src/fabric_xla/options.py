"""The options of our parts, as users may give them. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class XLAOptions:
    """Of ``xla``.

    Attributes:
        sync_module_states: Give every process the weights and buffers of rank 0 when a model is set up.
    """

    sync_module_states: bool = True


@dataclass(frozen=True)
class XLAFSDPOptions(XLAOptions):
    """Of ``xla_fsdp``. What no line explains is an argument of torch_xla's ``XlaFullyShardedDataParallel``.

    Attributes:
        auto_wrap_policy: Which parts are sharded by themselves: classes of modules, or a function as torch_xla takes
            it. Without it, the model as a whole.
        activation_checkpointing: Classes of modules, of those that are wrapped, whose activations are computed again
            in the backward pass.
        checkpoint: sharded: a folder, to which every process writes its part; full: one file, by rank 0.
        reshard_after_forward: Drop what was gathered after the forward pass, and gather it again for the backward pass.
        compute_dtype: What layers compute in, such as torch:bfloat16. Without it, what the precision says.
        fp32_reduce_scatter: Add gradients up in float32.
    """

    auto_wrap_policy: Callable[..., Any] | Collection[type] | None = None
    activation_checkpointing: type | Collection[type] | None = None
    checkpoint: Literal["sharded", "full"] = "sharded"
    reshard_after_forward: bool = True
    execute_sharding_on_init: bool = True
    optimization_barrier_in_forward: bool = True
    optimization_barrier_in_backward: bool = True
    sync_on_finalization: bool = False
    disable_reshard_on_root: bool = True
    compute_dtype: Any = None
    buffer_dtype: Any = None
    fp32_reduce_scatter: bool = False
    pin_layout_in_collective_ops: bool = True
    reduce_scatter_bucket_size_mb: int | None = 0


@dataclass(frozen=True)
class XLASPMDOptions:
    """Of ``xla_spmd``.

    Attributes:
        mesh_shape: The axes and their sizes, of which one may be -1 for what is left. Without it, {"data": -1}.
        partition: Over which axes parameters are divided: patterns of names ({"*.up.weight": ["model", null]}), or a
            function of a name and a parameter.
        parallelize_fn: Called with the model and the mesh, to mark tensors by hand.
        auto_wrap_policy: With an axis fsdp, whose outputs are kept divided too: classes of modules, or a function.
        checkpoint: sharded: a folder of the parts of all devices, where anything is divided; full: one file.
    """

    mesh_shape: dict[str, int] | None = None
    partition: Any = None
    parallelize_fn: Callable[..., Any] | None = None
    auto_wrap_policy: Callable[..., Any] | Collection[type] | None = None
    checkpoint: Literal["sharded", "full"] = "sharded"


@dataclass(frozen=True)
class FullOptions:
    """Of ``32-true``.

    Attributes:
        matmul: How many products of bfloat16 make one of float32: default (one), high (three) or highest (six).
    """

    matmul: str | None = None


@dataclass(frozen=True)
class TrueOptions:
    """Of ``bf16-true`` and ``16-true``.

    Attributes:
        dtype: bfloat16 or float16. The precision's name says it.
    """

    dtype: str
