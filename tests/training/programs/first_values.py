"""Ways in which modules give values to parameters of others, as ``init_module`` and a strategy leave them.

Called as ``fabric run … first_values.py FOLDER``; the test imports `make` for its plain values.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

SEED = 5


class Outer(nn.Module):
    """Writes to what its inner modules have: in a call, in place, and module by module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7)
        self.deep = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5))
        nn.init.xavier_uniform_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)
        nn.init.kaiming_normal_(self.deep[0].weight)
        with torch.no_grad():
            self.deep[0].bias.fill_(3.0)
            self.deep[1].weight.mul_(2.0)
        self.apply(self.more)

    def more(self, module: nn.Module) -> None:
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.bias)


class Special(nn.Module):
    """Uses the functions of ``torch.nn.init`` that look at what they write to, and writes to views."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.high = nn.Linear(6, 4), nn.Linear(4, 6)
        self.square, self.convolution = nn.Linear(5, 5), nn.Conv2d(4, 6, 3)
        self.cell, self.table = nn.LSTM(3, 4), nn.Embedding(5, 4)
        nn.init.orthogonal_(self.wide.weight, gain=2.0)
        nn.init.orthogonal_(self.high.weight)
        nn.init.eye_(self.square.weight)
        nn.init.dirac_(self.convolution.weight, groups=2)
        nn.init.sparse_(self.cell.weight_ih_l0, sparsity=0.5)
        nn.init.trunc_normal_(self.cell.weight_hh_l0)
        self.table.weight.data.normal_(std=0.02)
        self.table.weight.data[2].zero_()
        self.cell.bias_ih_l0.data.chunk(4)[1].fill_(1.0)
        with torch.no_grad():
            self.wide.bias[1:3] = 7.0
            self.high.weight.T[0].copy_(self.square.weight.new_ones(6))
            self.square.weight.diagonal().mul_(3.0)
            self.wide.bias += self.high.weight.sum()
            self.high.bias.copy_(self.wide.weight[0])
        self.copy = nn.Parameter(self.wide.weight.detach().clone())
        assert len(self.table.weight) == self.table.weight.data.size(0) == 5


class Both(nn.Module):
    """Those, and PyTorch's own, which makes layers by copying one, and asks parameters for their dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.special = Special()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.outer, self.layers = Outer(), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def make() -> nn.Module:
    torch.manual_seed(SEED)
    return Both()


def main() -> None:
    from fabric_core import Fabric

    fabric: Any = Fabric()
    fabric.launch()
    with fabric.init_module():
        model = make()
    model = fabric.setup_module(model)
    fabric.save(sys.argv[1], {"model": model})
    fabric.close()


if __name__ == "__main__":
    main()
