"""The state of a model whose parameters are in pieces, one per process.

[Note: pieces] torch_xla lays each parameter flat, fills it up with zeros until it can be divided evenly, and gives each
process one piece. It takes the parameters out of the user's model and keeps the pieces under names of its own. Here
they come back into the model, each under the name of its parameter: ``parameters()``, ``state_dict()`` and
``load_state_dict()`` of the model are about what this process has of each. What the layers compute with is the whole
parameter, which torch_xla sets as a plain attribute, and gathers when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_xla.core import xla_model as xm
from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel

from fabric_core.errors import SetupError
from fabric_core.sharded.rows import Row, check_fits, cut, shape_of
from fabric_core.sharded.stored import plain
from fabric_xla.pending import compute

_INNER = "_fsdp_wrapped_module."  # what torch_xla's wrapper adds to names

Parameters = dict[nn.Module, dict[str, nn.Parameter | None]]
"""For each module its own parameters by name."""


def parameters_of(module: nn.Module) -> Parameters:
    """The parameters in a model, and where they are, for `put_back`."""
    return {part: dict(part._parameters) for part in module.modules()}


def own_modules(module: nn.Module) -> list[nn.Module]:
    """A module and what is in it, outer ones first, but for the parts of it that were taken apart already.

    Raises:
        SetupError: They share a parameter with those.
    """
    parts = [module]
    for child in module.children():
        if not isinstance(child, XlaFullyShardedDataParallel):
            parts += own_modules(child)
    shared = [
        name for part in parts for name, own in part._parameters.items() if hasattr(own, "_sharded_param")
    ]
    if shared:
        raise SetupError(
            f"The {type(module).__name__} has a parameter {shared[0]!r} that it shares with a part that is sharded by "
            "itself. Let auto_wrap_policy name neither of the two layers, or one that holds both."
        )
    return parts


def renew(modules: Iterable[nn.Module]) -> None:
    """Put the parameters of some modules into new memory, in place; for what is about to be taken apart.

    Of a parameter that was ever changed in place, such as by its initialization or by a broadcast, torch_xla keeps the
    value that it had then, and layers would go back to it after each step whatever is gathered for them.
    """
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.clone()


def put_back(whole: Parameters, wrapper: nn.Module) -> None:
    """Put pieces where the parameters of a model were; see [Note: pieces].

    Args:
        whole: What `parameters_of` gave before the model was taken apart.
        wrapper: What torch_xla has made of it.
    """
    for part, parameters in whole.items():
        for name, parameter in parameters.items():
            if parameter is not None:
                own = _piece(getattr(part, name))
                parameters[name] = parameter._sharded_param = own  # type: ignore[attr-defined]  # for `rebind`
        part._parameters.clear()
        part._parameters.update(parameters)
    for each in wrapper.modules():
        if isinstance(each, XlaFullyShardedDataParallel):
            each._parameters.clear()
            each._register_state_dict_hook(_without_prefix)
            each._register_load_state_dict_pre_hook(_with_prefix)


def module_state_dict(module: nn.Module) -> dict[str, Any]:
    """The state dict of a model, with rows in the place of pieces."""
    return {key: _row(value, value) for key, value in module.state_dict(keep_vars=True).items()}


def load_module_state_dict(module: nn.Module, state: Mapping[str, Any], strict: bool) -> None:
    """Restore a whole state, in place; each process takes its part. Called on every rank.

    Raises:
        RuntimeError: A shape differs; or, with ``strict``, a key is missing or too many. Nothing was changed then.
    """
    own = module.state_dict(keep_vars=True)
    shapes = {key: _whole_shape(value) if isinstance(value, Tensor) else None for key, value in own.items()}
    check_fits(type(module).__name__, shapes, state, strict)
    rest = {}
    for key, value in state.items():
        if _is_piece(own.get(key)):
            with torch.no_grad():
                own[key].copy_(_part_for(own[key], value))
        else:
            rest[key] = plain(value)
    module.load_state_dict(rest, strict=False)


def rebind(optimizer: Optimizer) -> None:
    """Let an optimizer that was made before go on with the pieces, and with the pieces of its state."""
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            piece = _piece(parameter)
            group["params"][index] = piece
            state = optimizer.state.pop(parameter, None)
            if state is not None:
                optimizer.state[piece] = _in_pieces(state, piece)


def optimizer_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer of pieces, with rows in the place of what is as a piece."""
    state, pieces = optimizer.state_dict(), _pieces(optimizer)
    state["state"] = {
        index: {name: _row(value, pieces[index]) for name, value in entries.items()}
        for index, entries in state["state"].items()
    }
    return state


def load_optimizer_state_dict(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Restore the whole state of an optimizer; each process takes its part. Called on every rank."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    belongs = dict(
        zip(numbers, _pieces(optimizer), strict=False)
    )  # the optimizer itself complains of other lengths
    entries = {
        number: _in_pieces(own, belongs[number]) if number in belongs else plain(own)
        for number, own in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def whole(row: Row) -> Tensor | None:
    """Collect a tensor from the rows of all processes. Called on every rank.

    Returns:
        All of it on the CPU, on rank 0; ``None`` elsewhere, so that no other host has to hold the model.
    """
    rows = row.data if xr.world_size() == 1 else xm.all_gather(row.data, dim=0, pin_layout=False)
    full: Tensor = rows.detach()[: row.shape.numel()].view(row.shape)
    compute()
    return full.cpu() if xr.global_ordinal() == 0 else None


def _piece(parameter: Any) -> nn.Parameter:
    """What torch_xla has put in the place of a parameter."""
    piece: nn.Parameter = getattr(parameter, "_sharded_param", parameter)
    return piece


def _is_piece(value: Any) -> bool:
    return hasattr(value, "_orig_size")


def _whole_shape(value: Any) -> torch.Size:
    shape: torch.Size = getattr(value, "_orig_size", value.shape)
    return shape


def _row(value: Any, piece: Any) -> Any:
    """A value in the shape of a piece as a row of the whole; any other as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if not _is_piece(piece) or value.shape != piece.shape:
        return value
    return Row(value, xr.global_ordinal() * value.numel(), _whole_shape(piece))


def _part_for(piece: Tensor, value: Any) -> Tensor:
    """What of a whole belongs into a piece, stored or not."""
    own = cut(value, xr.global_ordinal() * piece.numel(), piece.numel())
    return nn.functional.pad(own, (0, piece.numel() - own.numel()))


def _in_pieces(state: Mapping[str, Any], piece: nn.Parameter) -> dict[str, Any]:
    """Entries of an optimizer's state: what is as the whole parameter is cut, the rest is as it was."""
    shape = _whole_shape(piece)
    return {
        name: _part_for(piece, value) if shape and shape_of(value) == shape else plain(value)
        for name, value in state.items()
    }


def _pieces(optimizer: Optimizer) -> list[nn.Parameter]:
    return [piece for group in optimizer.param_groups for piece in group["params"]]


def _without_prefix(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    """After ``state_dict``: names as if there was no wrapper."""
    _rename(state, prefix + _INNER, prefix)


def _with_prefix(state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before ``load_state_dict``: names as the wrapper expects them."""
    _rename(state, prefix, prefix + _INNER)


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    for key in [key for key in state if key.startswith(old)]:
        state[new + key.removeprefix(old)] = state.pop(key)
