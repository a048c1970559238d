"""What torch_xla keeps whole between the passes of a sharded model: it must not outlive what it was gathered from.

[Note: gathered parameters] The outermost part of a model keeps its parameters whole after the forward pass, for the
backward pass, which lets go of them; so does every part in which gradients are held back. When there is no backward
pass, as in an evaluation, torch_xla goes on to compute with them, whatever becomes of the pieces: an optimizer's step,
a checkpoint that is loaded. Therefore a step drops them, and each forward pass begins with a look whether the pieces
have changed since.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel


def look_out(wrapper: nn.Module) -> None:
    """Let each part of a model see to it that it computes with the parameters as they are."""
    for part in _parts(wrapper):
        part.register_forward_pre_hook(_let_go_of_old)


def let_go(wrapper: nn.Module) -> None:
    """Drop the whole parameters that are there; the next forward pass gathers them anew."""
    for part in _parts(wrapper):
        part._free_full_params(apply_opt_barrier=False)


def drop_held(wrapper: nn.Module, own: Collection[int]) -> None:
    """Drop whole gradients that were held back.

    Args:
        wrapper: The model.
        own: The ids of the pieces whose gradients are dropped.
    """
    for whole, piece in _parameters(wrapper):
        if id(piece) in own:
            whole.grad = None


def scale_held(wrapper: nn.Module, factor: float) -> None:
    """Multiply whole gradients that were held back."""
    for whole, _ in _parameters(wrapper):
        if whole.grad is not None:
            whole.grad.mul_(factor)


def _parts(wrapper: nn.Module) -> Iterator[Any]:
    return (part for part in wrapper.modules() if isinstance(part, XlaFullyShardedDataParallel))


def _parameters(wrapper: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """The whole parameters, and their pieces."""
    for part in _parts(wrapper):
        yield from zip(part.full_params, part.sharded_params, strict=True)


def _let_go_of_old(part: Any, _: Any) -> None:
    versions = [piece._version for piece in part.sharded_params]
    if versions != part.__dict__.get("_fabric_versions"):
        part._free_full_params(apply_opt_barrier=False)
    part.__dict__["_fabric_versions"] = versions
