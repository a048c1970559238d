"""Creating a model whose parameters are divided among the ranks as soon as their module is there (ZeRO's stage 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fabric_backends.sharding.memory import give_back

__all__ = ["divided", "whole_while_written"]


@contextmanager
def divided(deepspeed: Any, config: dict[str, Any], device: torch.device) -> Iterator[None]:
    """DeepSpeed's ``zero.Init``, which besides gives back the memory of what it has divided, and divides copies.

    PyTorch's own ``TransformerEncoder`` makes its layers by copying one, whose parameters are divided by then.

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
        if id(parameter) in memo or not _is_divided(parameter):
            return copy(parameter, memo)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            twin = copy(parameter, memo)
        init._convert_to_zero_parameters([twin])
        return twin

    parameters.__deepcopy__ = copy_whole
    try:
        with init:
            yield
    finally:
        parameters.__deepcopy__ = copy


class whole_while_written(TorchFunctionMode):  # noqa: N801  (used like a function)
    """A context in which a divided parameter says how large the whole is, and is whole while it is written to.

    A module may give values to what its inner modules have, which are divided by then, and would stay as they are.

    Args:
        deepspeed: The library.
    """

    def __init__(self, deepspeed: Any) -> None:
        super().__init__()
        self._gathered = deepspeed.zero.GatheredParameters

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        target: Any = kwargs.get("tensor", args[0] if args else None)
        if not _is_divided(target):
            return func(*args, **kwargs)
        if func in _ASKING:
            return func(torch.empty(target.ds_shape, device="meta"), *args[1:], **kwargs)
        if not _writes(func):
            return func(*args, **kwargs)
        with self._gathered([target], modifier_rank=0):  # the values of rank 0 count
            return func(*args, **kwargs)


_tensor: Any = Tensor
_ASKING = {_tensor.dim, _tensor.size, _tensor.numel, _tensor.ndim.__get__, _tensor.shape.__get__}
"""How one asks for the size of a tensor."""


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place and getattr(func, "__module__", None) in ("torch.nn.init", None)


def _is_divided(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and hasattr(value, "ds_tensor") and not value.data.numel()
