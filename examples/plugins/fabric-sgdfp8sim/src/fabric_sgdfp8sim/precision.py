"""The precision: a forward pass in which the factors of products are rounded, and gradients pass straight through."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fabric_core import Precision, UnsupportedError
from fabric_sgdfp8sim.hooks import FP8

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

PRODUCTS = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__),
}
FACTORS = ("input", "weight", "other", "mat2")
"""What PyTorch calls the two factors where they are given by name."""

HIDDEN = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
"""Modules whose products are inside of PyTorch, where a mode does not see them."""


class Round(torch.autograd.Function):
    """The nearest number of a format, or one of its two neighbours at random; too large ones become the largest.

    The gradient is that of the identity (the straight-through estimator: https://arxiv.org/abs/1308.3432).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, stochastic: bool) -> Tensor:
        """Shape and dtype of ``x``; the values are those of ``dtype``."""
        numbers = torch.finfo(dtype)
        rounded = x.clamp(numbers.min, numbers.max)
        if stochastic:
            size = rounded.abs().clamp(numbers.smallest_normal)
            step = (
                size / torch.frexp(size).mantissa * (numbers.eps / 2)
            )  # the distance to the next number, exactly
            rounded = (torch.floor(rounded / step + torch.rand_like(x)) * step).clamp(
                numbers.min, numbers.max
            )
        return rounded.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient as it is."""
        return gradients[0], None, None


class Rounding(TorchFunctionMode):
    """A context in which the factors of products are rounded."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called in place of every function of PyTorch, also with an optimizer's or a strategy's own."""
        kwargs = kwargs or {}
        if func in PRODUCTS:
            args = (*map(self.change, args[:2]), *args[2:])
            kwargs = {key: self.change(value) if key in FACTORS else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


class SimulatedFP8(Precision):
    """Weights, gradients and the optimizer's state in float32; products of what 8 bits leave of their factors.

    Each number is rounded by itself, without a scale that all of a tensor share, so that the parts of a batch on
    several ranks are rounded as the whole batch is. Arguments: `fabric_sgdfp8sim.options.Options`.
    """

    spec = FP8

    def __init__(self, format: Literal["e4m3", "e5m2"] = "e4m3", stochastic: bool = False) -> None:  # noqa: A002
        self.dtype, self.stochastic = FORMATS[format], stochastic

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Refuse what could not be rounded, rather than leave it in float32 unnoticed."""
        for name, part in module.named_modules():
            if isinstance(part, HIDDEN):
                raise UnsupportedError(
                    f"{self.spec.name!r} rounds what linear layers, convolutions and matmul multiply, but "
                    f"{name or 'the model'}, a {type(part).__name__}, multiplies inside of PyTorch. Build it of linear "
                    "layers and scaled_dot_product_attention (which stays in float32), or use precision='32-true'."
                )
        return module

    def forward_context(self) -> AbstractContextManager[Any]:
        """A fresh mode for one forward pass."""
        return Rounding(self._round)

    def _round(self, factor: Any) -> Any:
        floating = isinstance(factor, Tensor) and factor.is_floating_point()
        return Round.apply(factor, self.dtype, self.stochastic) if floating else factor  # type: ignore[no-untyped-call]
