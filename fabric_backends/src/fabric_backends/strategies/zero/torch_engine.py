"""PyTorch's engine: ``ZeroRedundancyOptimizer`` steps in parts, ``DistributedDataParallel`` averages the gradients."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_backends.strategies.ddp import DDPStrategy
from fabric_backends.strategies.zero.part import Part


def _zero_redundancy_optimizer() -> Any:
    with warnings.catch_warnings():  # its package compiles functions in a way that PyTorch deprecates
        warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer


class TorchEngine:
    """Every rank has all gradients until the step; the state of optimizers is sharded.

    The base of the other engine.

    Args:
        ddp: Sets up modules and talks to the other ranks.
    """

    name = "torch"

    def __init__(self, ddp: DDPStrategy) -> None:
        self._ddp = ddp

    def shard(self, optimizer: Optimizer) -> Part:
        """Divide an optimizer between the ranks. Called on every rank."""
        return Part(optimizer, self._make, grows=True)

    def _make(self, groups: list[dict[str, Any]], local: Any) -> Any:
        # One buffer per rank holds its parameters, so that they are sent in one go.
        return _zero_redundancy_optimizer()(groups, local, parameters_as_bucket_view=True)

    def wrap(self, module: nn.Module, parts: list[Part]) -> nn.Module:
        """Average the gradients of a model from now on. Called on every rank, after its optimizers were divided."""
        return DDPStrategy.setup_module(self._ddp, module)

    def hold(self, module: nn.Module) -> AbstractContextManager[Any]:
        """As `Strategy.hold_gradient_sync`."""
        return DDPStrategy.hold_gradient_sync(self._ddp, module)

    def backward(self) -> AbstractContextManager[Any] | None:
        """A context for each backward pass, if it needs one."""
        return None

    def clip_norm(
        self,
        parts: list[Part],
        module: nn.Module,
        parameters: list[nn.Parameter],
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
    ) -> Tensor:
        """As `Strategy.clip_gradients_norm`; ``parts`` are those of all optimizers."""
        return DDPStrategy.clip_gradients_norm(
            self._ddp, module, parameters, max_norm, norm_type, error_if_nonfinite
        )

    def release(self) -> None:
        """Let go of what holds the process group. Called on every rank when the job ends."""
