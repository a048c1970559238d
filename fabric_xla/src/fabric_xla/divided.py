"""Tensors that are divided over the devices of one program, as boxes of the whole."""

from __future__ import annotations

from typing import Any

import torch_xla.distributed.spmd as xs
from torch import Tensor

from fabric_core.sharded.boxes import Box
from fabric_core.sharded.shares import Share

_DIVIDED = (xs.ShardingType.TILED, xs.ShardingType.PARTIAL)


class HostShare(Share):
    """A share whose parts lie on the host, where nobody else knows them: a copy of it would be a second one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> HostShare:
        return self


def in_boxes(tensor: Tensor) -> Tensor | Share:
    """A tensor as what its devices hold of it, fetched from each; one that is not divided as it is.

    Nothing may be pending, and the devices have to be done: torch_xla hands out nothing that is still computed.
    """
    found: Any = xs.wrap_if_sharded(tensor)
    if not isinstance(found, xs.XLAShardedTensor) or found.sharding_type not in _DIVIDED:
        return tensor
    parts: dict[Box, Tensor] = {}
    for shard in found.local_shards:
        box = Box(
            tuple(each.start for each in shard.indices),
            tuple(each.stop - each.start for each in shard.indices),
        )
        # Of copies, the first one counts. What lies beyond the box is padding.
        parts.setdefault(box, shard.data[tuple(map(slice, box.lengths))])
    return HostShare(tensor.shape, tensor.dtype, tuple(parts.items()))
