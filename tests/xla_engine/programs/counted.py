"""The model whose states are compared: some parameters, and a buffer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Counted(nn.Sequential):
    """Layers, and a buffer of their own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 4))
        self.register_buffer("count", torch.empty(2, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the buffer its first values; the layers do that by themselves."""
        self.count.copy_(torch.tensor([5, 6]))


def net() -> Any:
    torch.manual_seed(0)
    return Counted()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.05)
