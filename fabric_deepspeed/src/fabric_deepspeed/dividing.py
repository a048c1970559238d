"""Creating a model whose parameters are divided among the ranks as soon as their module is there (ZeRO's stage 3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fabric_backends.sharding.memory import give_back
from fabric_deepspeed.whole import is_divided, whole_while_used

__all__ = ["divided"]


@contextmanager
def divided(deepspeed: Any, config: dict[str, Any], device: torch.device) -> Iterator[None]:
    """DeepSpeed's ``zero.Init``, which besides gives back the memory of what it has divided, and divides copies.

    Whatever a module does with what is divided already, it does with the whole. PyTorch's own ``TransformerEncoder``
    makes its layers by copying one, whose parameters are divided by then.

    Args:
        deepspeed: The library.
        config: Complete.
        device: Of the parameters.
    """
    base: Any = deepspeed.zero.Init

    class Init(base):  # type: ignore[misc]
        def _post_init_method(self, module: nn.Module) -> None:
            super()._post_init_method(module)
            give_back(device)

    init = Init(config_dict_or_path=config)
    parameters: Any = nn.Parameter
    copy = parameters.__deepcopy__

    def copy_whole(parameter: nn.Parameter, memo: dict[int, Any]) -> Any:
        if id(parameter) in memo or not is_divided(parameter):
            return copy(parameter, memo)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            twin = copy(parameter, memo)
        init._convert_to_zero_parameters([twin])
        return twin

    parameters.__deepcopy__ = copy_whole
    try:
        with init, whole_while_used(deepspeed):
            yield
    finally:
        parameters.__deepcopy__ = copy
