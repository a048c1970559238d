"""What leaves a sharded module is no view: changing a view in place would drop the hooks of ``fully_shard``.

A plain ``nn.Linear`` returns a view of what it has computed when its input has more than two dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fabric_core.data.collections import map_tensors


def keep_views_inside(module: nn.Module) -> None:
    """Let a module return no views. Called before ``fully_shard``, which then attaches its hooks to what is returned.

    Nothing is copied.
    """
    module.register_forward_hook(lambda *call: _without_views(call[-1]))


class _Detached(torch.autograd.Function):
    """The identity. Its result shares the memory of its argument, but is no view of it to autograd."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _without_views(output: Any) -> Any:
    detached: Any = _Detached.apply
    return map_tensors(lambda tensor: tensor if tensor._base is None else detached(tensor), output)
