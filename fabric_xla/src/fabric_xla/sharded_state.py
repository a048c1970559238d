"""The state of a model whose parameters are in pieces, one per process: collected, and dealt out again.

A piece is a row of numbers: the parameter, laid flat and filled up with zeros until it can be divided evenly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch_xla
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_xla.core import xla_model as xm


def whole(piece: Tensor, shape: torch.Size) -> Tensor | None:
    """Collect a parameter, or something of its shape, from its pieces. Called on every rank.

    Returns:
        All of it on the CPU, on rank 0; ``None`` elsewhere, so that no other host has to hold the model.
    """
    pieces = piece if xr.world_size() == 1 else xm.all_gather(piece, dim=0, pin_layout=False)
    full: Tensor = pieces.detach()[: math.prod(shape)].view(shape)
    torch_xla.sync()
    return full.cpu() if xr.global_ordinal() == 0 else None


def piece_of(value: Tensor, length: int) -> Tensor:
    """This process's piece of a whole, of ``length`` numbers."""
    flat, begin = value.detach().reshape(-1), xr.global_ordinal() * length
    own = flat[begin : begin + length]
    return nn.functional.pad(own, (0, length - own.numel()))


@dataclass
class ShardedModule:
    """Where the state of a model is, after its parameters were taken apart.

    Attributes:
        parameters: The piece that this process has of each, by the name that the parameter had in the user's model.
        buffers: The module that has each buffer, and what it is called there, likewise.
        keys: The keys of the model's state dict, in order.
    """

    parameters: dict[str, nn.Parameter]
    buffers: dict[str, tuple[nn.Module, str]]
    keys: list[str]

    @classmethod
    def before(cls, module: nn.Module) -> ShardedModule:
        """Remember the names in a model that is about to be taken apart; `after` finds the pieces."""
        buffers = {
            f"{prefix}.{name}".lstrip("."): (part, name)
            for prefix, part in module.named_modules(remove_duplicate=False)
            for name, _ in part.named_buffers(recurse=False)
        }
        return cls(dict(module.named_parameters(remove_duplicate=False)), buffers, list(module.state_dict()))

    def after(self) -> ShardedModule:
        """The same names, and the pieces in place of the parameters."""
        pieces = {name: piece_in_place_of(parameter) for name, parameter in self.parameters.items()}
        return ShardedModule(pieces, self.buffers, self.keys)

    def state_dict(self) -> dict[str, Any]:
        """The whole state on rank 0, on the CPU; empty on the others. Called on every rank."""
        state: dict[str, Any] = {}
        for key in self.keys:
            if key in self.parameters:
                piece = self.parameters[key]
                state[key] = whole(piece, shape_of(piece))
            elif key in self.buffers:
                module, name = self.buffers[key]
                state[key] = getattr(module, name)
        return state if xr.global_ordinal() == 0 else {}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool) -> None:
        """Deal a whole state out. Called on every rank, each with all of it.

        Raises:
            RuntimeError: A shape differs; or, with ``strict``, a key is missing or too many.
        """
        missing = [key for key in self.keys if key not in state]
        unexpected = [key for key in state if key not in self.keys]
        if strict and (missing or unexpected):
            raise RuntimeError(f"Missing keys: {missing}. Unexpected keys: {unexpected}.")
        for key in self.keys:
            if key in state:
                self._load(key, state[key])

    @torch.no_grad()
    def _load(self, key: str, value: Any) -> None:
        if key in self.buffers:
            module, name = self.buffers[key]
            getattr(module, name).copy_(value)
        elif key in self.parameters:
            piece = self.parameters[key]
            if value.shape != shape_of(piece):
                raise RuntimeError(
                    f"{key!r} has the shape {tuple(value.shape)} in the checkpoint, and {tuple(shape_of(piece))} here."
                )
            piece.copy_(piece_of(value, piece.numel()))


def piece_in_place_of(parameter: nn.Parameter) -> nn.Parameter:
    """What the wrapper of torch_xla has put in the place of a parameter."""
    piece: nn.Parameter = getattr(parameter, "_sharded_param", parameter)
    return piece


def shape_of(piece: nn.Parameter) -> torch.Size:
    """The shape of the whole."""
    shape: torch.Size = getattr(piece, "_orig_size", piece.shape)
    return shape


def rebind(optimizer: Optimizer) -> None:
    """Let an optimizer that was made before go on with the pieces, and with the pieces of its state."""
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            piece = piece_in_place_of(parameter)
            group["params"][index] = piece
            state = optimizer.state.pop(parameter, None)
            if state is not None:
                optimizer.state[piece] = _in_pieces(state, piece)


def optimizer_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """The whole state of an optimizer of pieces on rank 0, on the CPU. Called on every rank."""
    state, pieces = optimizer.state_dict(), _pieces(optimizer)
    state["state"] = {
        index: {
            name: whole(value, shape_of(pieces[index])) if _is_like(value, pieces[index].shape) else value
            for name, value in entries.items()
        }
        for index, entries in state["state"].items()
    }
    return state if xr.global_ordinal() == 0 else {}


def load_optimizer_state_dict(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Deal the whole state of an optimizer out. Called on every rank, each with all of it."""
    pieces = _pieces(optimizer)
    entries = {index: _in_pieces(own, pieces[index]) for index, own in state["state"].items()}
    optimizer.load_state_dict({**state, "state": entries})


def _in_pieces(state: Mapping[str, Any], piece: nn.Parameter) -> dict[str, Any]:
    return {
        name: piece_of(value, piece.numel()) if _is_like(value, shape_of(piece)) else value
        for name, value in state.items()
    }


def _is_like(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == shape


def _pieces(optimizer: Optimizer) -> list[nn.Parameter]:
    return [piece for group in optimizer.param_groups for piece in group["params"]]
