"""Carrying out a user's plan for a model on a mesh, and making sure that no gradient is left unsynchronised."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from fabric_backends.meshes import DATA
from fabric_backends.sharding.tensors import is_sharded, local_part, sharded_like
from fabric_backends.sharding.units import inside_out
from fabric_backends.sharding.views import keep_views_inside
from fabric_core.errors import SetupError, WrongTypeError, listing
from fabric_core.materializing import materialize, warn_of_undefined

Plan = Callable[[DeviceMesh], Any]
"""What divides one model over a mesh, in place."""


def plan_of(module: nn.Module, function: Callable[[Any, DeviceMesh], Any] | None) -> Plan:
    """The user's function for a model, or else the model's own method ``parallelize(mesh)``.

    Raises:
        SetupError: There is neither.
    """
    if function is not None:
        return lambda mesh: function(module, mesh)
    own: Plan | None = getattr(module, "parallelize", None)
    if callable(own):
        return own
    name = type(module).__name__
    raise SetupError(
        f"The strategy 'tensor_parallel' cannot know how to divide a {name}: it has no method parallelize(mesh), and "
        f"no function was given. Add the method to the class, or pass strategy_options={{'parallelize_fn': function}}, "
        "where function(module, mesh) calls torch.distributed.tensor.parallel.parallelize_module over "
        "mesh['tensor_parallel']."
    )


def carry_out(plan: Plan, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Divide a model as planned, and shard the rest of it over the data axis. Called on every rank.

    Returns:
        What forward passes go through: what the plan returned, or else the model.

    Raises:
        WrongTypeError: The plan returned something that is no module.
        SetupError: It separated weights that the model shares, or left gradients that nothing would average.
    """
    shared = _shared_parameters(module)
    returned = plan(mesh)
    if not (returned is None or isinstance(returned, nn.Module)):
        raise WrongTypeError(
            f"The function that parallelizes the {type(module).__name__} returned a {type(returned).__qualname__}. It "
            "has to change the model in place, and return it or nothing."
        )
    _check_still_shared(module, shared)
    if mesh[DATA].size() > 1:
        if not isinstance(module, FSDPModule):
            keep_views_inside(module)
            fully_shard(module, mesh=mesh[DATA])
        _check_averaged(module)
    return module if returned is None else returned


def _shared_parameters(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [alike for alike in names.values() if len(alike) > 1]


def _check_still_shared(module: nn.Module, shared: list[list[str]]) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for first, *others in shared:
        for other in others:
            if parameters[other] is not parameters[first]:
                raise SetupError(
                    f"{first!r} and {other!r} of the {type(module).__name__} were one parameter, and are two since it "
                    "was parallelized, so they would drift apart. Give both the same placement, and share them again "
                    "at the end of the function that parallelizes: model.head.weight = model.embedding.weight."
                )


def _check_averaged(module: nn.Module) -> None:
    alone = [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not lies_on(parameter, DATA)
    ]
    if alone:
        raise SetupError(
            f"The gradients of {listing(map(repr, alone))} would not be averaged between the data-parallel ranks, "
            f"because the function that parallelizes the {type(module).__name__} left them out of fully_shard "
            f"(ignored_params), or sharded them over another mesh than mesh[{DATA!r}]. Shard them over that one."
        )


def lies_on(parameter: nn.Parameter, axis: str) -> bool:
    """Whether a parameter is laid out along an axis of a mesh, be it in shards or as copies."""
    tensor: Any = parameter
    return is_sharded(tensor) and axis in (tensor.device_mesh.mesh_dim_names or ())


def give_values(module: nn.Module, device: torch.device) -> None:
    """Give memory and first values to what of a divided model is on the meta device. Called on every rank.

    Layer by layer, every rank computes the values of all of it, with the same random numbers, and keeps its part: so
    they do not depend on the mesh.
    """
    made: dict[int, Tensor] = {}
    without: list[str] = []
    for part in inside_out(module):
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        divided = {
            (index, name): tensor
            for index, table in enumerate(tables)
            for name, tensor in table.items()
            if is_sharded(tensor) and tensor.is_meta
        }
        for (index, name), tensor in divided.items():
            tables[index][name] = _undivided(tensor)
        without += materialize([part], device)
        for (index, name), tensor in divided.items():
            like: Any = torch.empty_like(tensor, device=device)
            values = sharded_like(tables[index][name], like)
            tables[index][name] = _made(made, tensor, values)
    warn_of_undefined(module, without)


def _undivided(tensor: Tensor) -> Tensor:
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole


def _made(made: dict[int, Tensor], tensor: Tensor, values: Tensor) -> Tensor:
    """What takes the place of a tensor; the same again for one that several modules share, with the last values."""
    if id(tensor) in made:
        local_part(made[id(tensor)]).copy_(local_part(values))
    else:
        is_parameter = isinstance(tensor, nn.Parameter)
        made[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if is_parameter else values
    return made[id(tensor)]
