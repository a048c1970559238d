"""Gradients that ``fully_shard`` holds back, and parameters that it has gathered.

While synchronisation is off, FSDP2 adds gradients up outside of the parameters that optimizers know, and has no public
way to reach them. What is used of its insides is in this file alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fabric_core.errors import SetupError


def sharded_modules(module: nn.Module) -> list[FSDPModule]:
    """The modules that ``fully_shard`` was applied to, in a model."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """A context in which gradients are added up on each rank alone. Called on every rank; may be nested."""
    before = [(part, _reduces(part)) for part in sharded_modules(module)]
    for part, _ in before:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for part, reduces in before:
            part.set_requires_gradient_sync(reduces, recurse=False)


def scale_held(module: nn.Module, factor: float) -> None:
    """Multiply the gradients that are held back, in place."""
    for parameter in _parameters_of(module):
        for gradient in _held_by(parameter):
            gradient.mul_(factor)


def drop_held(modules: Iterable[nn.Module], parameters: set[int]) -> None:
    """Forget the gradients that are held back for some parameters.

    Args:
        modules: Models that were sharded.
        parameters: The ids of the sharded parameters.
    """
    for module in modules:
        for parameter in _parameters_of(module):
            if id(parameter.sharded_param) in parameters:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None


def reshard(module: nn.Module) -> None:
    """Drop the gathered parameters. Called on every rank before the shards change: the next pass gathers anew.

    After a forward pass without a backward pass, the outermost ones are still there, and would be taken for current.
    """
    for part in sharded_modules(module):
        part.reshard()


def let_go(module: nn.Module) -> None:
    """Release the process groups that a sharded model knows. It cannot compute from then on, and says so."""
    module.register_forward_pre_hook(_refuse_after_closing, prepend=True)
    for part in sharded_modules(module):
        for group in _groups_of(part):
            for mesh_info in (group.mesh_info, group.post_forward_mesh_info):
                for name in ("shard_process_group", "replicate_process_group"):
                    if hasattr(mesh_info, name):
                        setattr(mesh_info, name, None)


def _refuse_after_closing(*_: Any) -> NoReturn:
    raise SetupError(
        "This model was set up by a Fabric that is closed: each rank holds a part of it, and can no longer reach the "
        "others. Compute before close(); to go on elsewhere, save the model with fabric.save() and load it there."
    )


def _reduces(part: FSDPModule) -> bool:
    return all(group.reduce_grads for group in _groups_of(part))


def _groups_of(part: FSDPModule) -> list[Any]:
    state: Any = part._get_fsdp_state()
    groups: Any = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12, a module had at most one
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return list(groups)


def _parameters_of(module: nn.Module) -> Iterator[Any]:
    for part in sharded_modules(module):
        for group in _groups_of(part):
            yield from group.fsdp_params


def _held_by(parameter: Any) -> Iterator[Tensor]:
    accumulated = parameter.unsharded_accumulated_grad
    unsharded = getattr(parameter, "_unsharded_param", None)
    gradients = (accumulated, None if unsharded is None else unsharded.grad)
    for gradient in gradients:
        if gradient is not None:
            yield getattr(gradient, "_local_tensor", gradient).detach()
