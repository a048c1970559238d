"""Mixed precision for sharded models: the units inside of a model are gathered in half precision."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from fabric_backends.hooks import FSDP_MIXED
from fabric_backends.precisions.mixed import MixedPrecision


class FullyShardedMixedPrecision(MixedPrecision):
    """`MixedPrecision` that sends half as much: what is gathered to be computed with in half precision is sent so.

    That concerns the units inside of a model, and their inputs are converted with them. What belongs to the model as a
    whole is gathered in float32, and what the user passes is left alone, so that targets, masks and time steps keep
    their digits. Shards, and the sums of gradients over ranks and micro-batches, are in float32 everywhere. Scaled
    losses, the steps that are skipped (on all ranks alike) and the outputs are as `MixedPrecision` has them.

    Args:
        dtype, scaler: As `MixedPrecision`.
    """

    spec = FSDP_MIXED

    @property
    def unit_policy(self) -> MixedPrecisionPolicy:
        """How the units inside of a model are computed with."""
        return MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
