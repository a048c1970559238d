"""What the precisions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fabric_core.data.collections import map_tensors


def widen(data: Any) -> Any:
    """Bring the floating-point tensors of an output to the default dtype, so that losses are computed in it.

    What has more digits keeps them.
    """
    default = torch.get_default_dtype()

    def convert(tensor: Tensor) -> Tensor:
        if tensor.dtype is default or not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.promote_types(tensor.dtype, default))

    return map_tensors(convert, data)
