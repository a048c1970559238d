"""A share: what this rank holds of a tensor that is spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fabric_core.sharded.boxes import Box, boxes_of_row

__all__ = ["Share"]


@dataclass(frozen=True)
class Share:
    """What this rank writes of a tensor. Strategies put it into a checkpoint in the place of their own kind of shards.

    Attributes:
        shape: Of the whole.
        dtype: Of the whole.
        parts: Boxes of the whole, with what is in them, each of the box's shape, on any device. Empty when this rank
            has nothing, or another one writes the same.
    """

    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[tuple[Box, Tensor], ...]

    @classmethod
    def of_row(cls, shape: Sequence[int], begin: int, data: Tensor) -> Share:
        """Of a tensor of which this rank has a row of elements.

        Args:
            shape: Of the whole.
            begin: Where in the whole the row begins, counted in the order of memory.
            data: One dimension; may be empty.
        """
        parts, done = [], 0
        for box in boxes_of_row(shape, begin, data.numel()):
            parts.append((box, data[done : done + box.numel].view(box.lengths)))
            done += box.numel
        return cls(torch.Size(shape), data.dtype, tuple(parts))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Share:
        """The same with a function applied to what is in the boxes, such as a copy to the CPU."""
        return replace(self, parts=tuple((box, function(tensor)) for box, tensor in self.parts))

    def stand_in(self) -> Tensor:
        """What stands for the whole where everything else is written: a tensor on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")
