"""Rows: what ranks hold of tensors that are laid flat before they are divided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fabric_core.errors import listing
from fabric_core.sharded.shares import Share
from fabric_core.sharded.stored import StoredTensor

__all__ = ["Row", "check_fits", "cut", "shape_of"]


@dataclass(frozen=True)
class Row:
    """What this rank holds of a tensor.

    Attributes:
        data: Elements in the order of memory; may be empty. What lies beyond the end of the whole is padding.
        offset: Where in the whole it begins.
        shape: Of the whole.
    """

    data: Tensor
    offset: int
    shape: torch.Size

    @property
    def elements(self) -> Tensor:
        """The data without its padding."""
        return self.data.detach()[: max(0, self.shape.numel() - self.offset)]

    def share(self) -> Share:
        """What this rank writes."""
        return Share.of_row(self.shape, self.offset, self.elements)


def shape_of(value: Any) -> torch.Size | None:
    """The shape of a tensor, stored or not; ``None`` for anything else."""
    return value.shape if isinstance(value, Tensor | StoredTensor) else None


def cut(value: Any, begin: int, length: int) -> Tensor:
    """A part of a tensor, stored or not, in a row."""
    if isinstance(value, StoredTensor):
        return value.read_row(begin, length)
    row: Tensor = value.detach().reshape(-1)[begin : begin + length]
    return row


def check_fits(
    model: str, shapes: Mapping[str, torch.Size | None], state: Mapping[str, Any], strict: bool
) -> None:
    """Refuse a state dict that is not one of a model, before anything of it is loaded.

    Args:
        model: The name of its class, for the message.
        shapes: Of the whole tensors by key; ``None`` for what is no tensor.
        state: Tensors, stored or not, and other values.
        strict: Whether all keys have to be there, and no others.

    Raises:
        RuntimeError: It does not fit.
    """
    problems = []
    missing, unexpected = shapes.keys() - state.keys(), state.keys() - shapes.keys()
    if strict and missing:
        problems.append(f"missing keys: {listing(missing)}")
    if strict and unexpected:
        problems.append(f"unexpected keys: {listing(unexpected)}")
    for name in shapes.keys() & state.keys():
        here, there = shapes[name], shape_of(state[name])
        if here is not None and there is not None and there != here:
            problems.append(f"{name} has the shape {tuple(there)}, and here {tuple(here)}")
    if problems:
        raise RuntimeError(f"The state dict does not fit {model}: {'; '.join(problems)}.")
