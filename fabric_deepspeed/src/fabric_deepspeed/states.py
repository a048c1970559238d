"""From a model and its optimizers in an engine to state dicts as plain PyTorch has them, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.errors import CheckpointError
from fabric_core.sharded.rows import check_fits, cut, shape_of
from fabric_core.sharded.stored import plain
from fabric_deepspeed.engine import Engine
from fabric_deepspeed.layouts import piece_of, read_piece, write_piece
from fabric_deepspeed.pieces import Piece

SCALER = "loss_scaler"
"""Where the state of the first optimizer of an engine has what the engine knows of its loss scale."""

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def module_state(module: nn.Module, engine: Engine | None) -> dict[str, Any]:
    """The state dict of a model; of what is divided, the pieces of this rank. Trained weights are in float32."""
    state = module.state_dict(keep_vars=True)
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = _value(value, engine)
    return state


def load_module_state(
    module: nn.Module, engine: Engine | None, state: Mapping[str, Any], strict: bool
) -> None:
    """Restore a state dict, of this strategy or any other, in place. Called on every rank.

    Raises:
        RuntimeError: Keys or shapes differ; nothing was changed then.
    """
    own = module.state_dict(keep_vars=True)
    shapes = {name: _shape(value) if isinstance(value, Tensor) else None for name, value in own.items()}
    check_fits(type(module).__name__, shapes, state, strict)
    rest = {}
    for name, saved in state.items():
        value = own.get(name)
        if engine is not None and isinstance(value, nn.Parameter) and value in engine.layout.places:
            place = engine.layout.places[value]
            engine.layout.write(value, cut(saved, place.offset, place.length))
        elif hasattr(value, "ds_tensor"):
            write_piece(value, cut(saved, *piece_of(value)))
        else:
            rest[name] = plain(saved)
    module.load_state_dict(
        rest, strict=False
    )  # buffers, frozen parameters, extra state; what is missing was checked
    if engine is not None:
        engine.layout.publish()


def optimizer_state(optimizer: Optimizer, engine: Engine) -> dict[str, Any]:
    """The state dict that the optimizer would have by itself, numbers and all; of tensors, the pieces of this rank."""
    state = optimizer.state_dict()
    state["state"] = {}
    for number, parameter in _numbered(optimizer):
        place = engine.layout.places.get(parameter)
        if place is None:
            continue
        entries = {
            key: _state_value(engine, parameter, key, value)
            for key, value in engine.layout.state(parameter).items()
        }
        if entries:
            state["state"][number] = entries
    scaler = _scaler(engine)
    if scaler and optimizer is engine.optimizers[0]:
        state[SCALER] = {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}
    return state


def begin_with(engine: Engine, weights: Mapping[nn.Parameter, Tensor]) -> None:
    """Let a new engine begin with float32 weights, and with what its optimizers have. Called on every rank."""
    for parameter, whole in weights.items():
        place = engine.layout.places.get(parameter)
        if place is not None:
            engine.layout.write(parameter, cut(whole, place.offset, place.length))
    for optimizer in engine.optimizers:
        if optimizer.state:  # it has stepped before, or has a state from the beginning
            load_optimizer_state(optimizer, engine, optimizer.state_dict())
            optimizer.state.clear()


def load_optimizer_state(optimizer: Optimizer, engine: Engine, state: Mapping[str, Any]) -> None:
    """Restore a state dict, of this strategy or any other, in place. Called on every rank.

    Raises:
        ValueError: It is that of other parameters; nothing was changed then.
        CheckpointError: A tensor in it has neither one number nor the shape of its parameter.
    """
    numbered = dict(_numbered(optimizer))
    wanted = [
        (numbered[number], key, value)
        for number, entries in state["state"].items()
        if number in numbered and numbered[number] in engine.layout.places
        for key, value in entries.items()
    ]
    for parameter, key, value in wanted:
        shape = shape_of(value)
        if shape is not None and shape.numel() != 1 and shape != _shape(parameter):
            raise CheckpointError(
                f"The state {key!r} of the optimizer has the shape {tuple(shape)}, and its parameter "
                f"{tuple(_shape(parameter))}. DeepSpeed keeps states that are as large as their parameters."
            )
    own = optimizer.state
    optimizer.load_state_dict({"state": {}, "param_groups": [dict(group) for group in state["param_groups"]]})
    optimizer.state = own
    for parameter, key, value in wanted:
        place = engine.layout.places[parameter]
        if shape_of(value) == _shape(parameter) and not _is_count(key, value):
            engine.layout.write(parameter, cut(value, place.offset, place.length), key)
        else:
            value = plain(value)
            engine.layout.state(parameter)[key] = value.clone() if isinstance(value, Tensor) else value
    scaler, saved = _scaler(engine), state.get(SCALER, {})
    for name, value in saved.items() if scaler else ():
        setattr(scaler, name, value)


def _is_count(key: str, value: Any) -> bool:
    return key == "step" and shape_of(value) == torch.Size([])


def _value(value: Tensor, engine: Engine | None) -> Any:
    if engine is not None and isinstance(value, nn.Parameter) and value in engine.layout.places:
        data = engine.layout.read(value)
        if not engine.layout.divides:
            return data.view(value.shape)
        return Piece(data, engine.layout.places[value].offset, _shape(value))
    if hasattr(value, "ds_tensor"):
        return Piece(read_piece(value), piece_of(value)[0], _shape(value))
    return value.detach()


def _state_value(engine: Engine, parameter: nn.Parameter, key: str, value: Any) -> Any:
    place = engine.layout.places[parameter]
    if not isinstance(value, Tensor) or value.numel() != place.flat.numel() or _is_count(key, value):
        # One count of steps stands for all parameters in a piece; outside, each has one, and counts it up.
        return value.clone() if isinstance(value, Tensor) else value
    data = engine.layout.read(parameter, key)
    return (
        Piece(data, place.offset, _shape(parameter)) if engine.layout.divides else data.view(parameter.shape)
    )


def _shape(parameter: Any) -> torch.Size:
    """Of the whole."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _numbered(optimizer: Optimizer) -> Iterator[tuple[int, nn.Parameter]]:
    """The parameters of an optimizer with the numbers that they have in its state dict."""
    number, known = 0, set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in known:
                known.add(id(parameter))
                yield number, parameter
                number += 1


def _scaler(engine: Engine) -> Any:
    """What adapts the loss scale, where there is something to adapt."""
    optimizer = engine.raw.optimizer
    return getattr(optimizer, "loss_scale_config", None) or (
        optimizer.loss_scaler if getattr(optimizer, "dynamic_loss_scale", False) else None
    )
