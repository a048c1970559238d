"""Pieces: a row of numbers with its place in the whole tensor, as ZeRO divides tensors among ranks.

DeepSpeed's own checkpoints are pickles that execute code when they are read, and fit the number of ranks that wrote
them. Here pieces become shares of a checkpoint in shards, which every strategy reads, on any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fabric_core.sharded.reading import StoredTensor
from fabric_core.sharded.shares import Share


@dataclass(frozen=True)
class Piece:
    """What this rank holds of a tensor.

    Attributes:
        data: A row of numbers; may be empty.
        offset: Where in the whole it begins.
        shape: Of the whole.
    """

    data: Tensor
    offset: int
    shape: torch.Size

    def share(self) -> Share:
        """What this rank writes."""
        return Share.of_row(self.shape, self.offset, self.data.detach())

    def whole(self) -> Tensor:
        """All of the tensor, on the device of the piece. Called on every rank, in the same order."""
        full = torch.zeros(self.shape.numel(), dtype=self.data.dtype, device=self.data.device)
        full[self.offset : self.offset + self.data.numel()] = self.data
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(full)
        return full.view(self.shape)


def shape_of(value: Any) -> torch.Size | None:
    """The shape of a tensor, stored or not; ``None`` for anything else."""
    return value.shape if isinstance(value, Tensor | StoredTensor) else None


def cut(value: Any, begin: int, length: int) -> Tensor:
    """A part of a tensor, stored or not, in a row."""
    if isinstance(value, StoredTensor):
        return value.read_row(begin, length)
    row: Tensor = value.detach().reshape(-1)[begin : begin + length]
    return row
