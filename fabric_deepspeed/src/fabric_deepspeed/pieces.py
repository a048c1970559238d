"""Pieces: rows of tensors, as ZeRO divides them among ranks.

DeepSpeed's own checkpoints are pickles that execute code when they are read, and fit the number of ranks that wrote
them. Here pieces become shares of a checkpoint in shards, which every strategy reads, on any number of ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fabric_core.sharded.rows import Row


class Piece(Row):
    """What this rank holds of a tensor."""

    def whole(self) -> Tensor:
        """All of the tensor, on the device of the piece. Called on every rank, in the same order."""
        full = torch.zeros(self.shape.numel(), dtype=self.data.dtype, device=self.data.device)
        full[self.offset : self.offset + self.elements.numel()] = self.elements
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(full)
        return full.view(self.shape)
