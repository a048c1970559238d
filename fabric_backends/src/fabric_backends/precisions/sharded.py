"""Mixed precision with float16 where a rank has the gradients of its own parameters only."""

from __future__ import annotations

from torch.optim import Optimizer

from fabric_backends import collectives
from fabric_backends.hooks import SHARDED_MIXED
from fabric_backends.precisions.loss_scaling import LossScaling
from fabric_backends.precisions.mixed import MixedPrecision


class ShardedLossScaling(LossScaling):
    """Loss scaling that skips a step on every rank when the gradients of one of them are not finite.

    A rank may have no gradient at all; it still has to ask the others. So from the first loss on, every optimizer
    that steps counts as one with gradients.
    """

    def _has_gradients(self, optimizer: Optimizer) -> bool:
        return self._used or super()._has_gradients(optimizer)

    def _unscale(self, optimizer: Optimizer) -> None:
        super()._unscale(optimizer)
        found = self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        own = self.scaler._scale.new_zeros(())  # type: ignore[union-attr]  # a loss was scaled, so it is there
        for infinite in found.values():
            own += infinite.to(own.device)
        anywhere = collectives.all_reduce(own, "max")
        for infinite in found.values():
            infinite.copy_(anywhere)
        found.setdefault(own.device, anywhere)


class ShardedMixedPrecision(MixedPrecision):
    """`MixedPrecision` for strategies that leave each rank the gradients of its own parameters."""

    spec = SHARDED_MIXED
    scaling_type = ShardedLossScaling
