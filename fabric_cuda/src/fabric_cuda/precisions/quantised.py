"""Linear layers in the formats of bitsandbytes: how each is made, and how it is restored.

[Note: restoring quantised weights] A layer's weights may come back in either form, whatever its own state: as plain
floating-point numbers, which are quantised again, or as they were saved, packed, with their scales beside them. Both
are brought into place before PyTorch compares names and shapes, which it does for parameters only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Any]


@dataclass(frozen=True)
class FourBit:
    """Weights in blocks of 4-bit numbers, frozen; see arXiv:2305.14314.

    Attributes:
        library: The module ``bitsandbytes``.
        format: ``"nf4"`` or ``"fp4"``.
        double: Whether the scales of the blocks are quantised too.
    """

    library: Any
    format: str
    double: bool

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    freezes = True

    def layer(self, old: nn.Linear, dtype: torch.dtype) -> Any:
        """A layer with the same weights, which are quantised on their way to the device, and compute in ``dtype``."""
        new = self.library.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=dtype,
            compress_statistics=self.double,
            quant_type=self.format,
            device="meta",
        )
        new.weight, new.bias = self._fresh(old.weight.detach(), new), old.bias
        new.register_load_state_dict_pre_hook(self._bring_into_place)
        return new

    def _fresh(self, weight: Tensor, layer: nn.Module) -> Any:
        return self.library.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=self.double,
            quant_type=self.format,
            module=layer,
        )

    def _bring_into_place(self, layer: Any, state: State, prefix: str, *_: Any) -> None:
        """See [Note: restoring quantised weights]."""
        weight = state.get(f"{prefix}weight")
        scales = {name: state.pop(name) for name in list(state) if name.startswith(f"{prefix}weight.")}
        if weight is None:
            return
        device = layer.weight.device
        if scales:
            layer.weight = self.library.nn.Params4bit.from_prequantized(
                weight, scales, device=device, module=layer
            )
        else:
            present = layer.weight
            dtype = present.dtype if present.quant_state is None else present.quant_state.dtype
            layer.weight = self._fresh(weight.to(dtype), layer).to(device)
        state[f"{prefix}weight"] = layer.weight.data


@dataclass(frozen=True)
class EightBit:
    """Weights in 8-bit integers with a scale for each row, frozen; outliers are computed apart; see arXiv:2208.07339.

    Attributes:
        library: The module ``bitsandbytes``.
    """

    library: Any

    dtypes = (torch.float16,)
    freezes = True
    trains = False

    def layer(self, old: nn.Linear, dtype: torch.dtype) -> Any:
        """A layer with the same weights, which are quantised on their way to the device."""
        new = self._empty(old)
        new.weight, new.bias = self._fresh(old.weight.detach().to(dtype)), old.bias
        new.register_load_state_dict_pre_hook(self._bring_into_place)
        return new

    def _empty(self, old: nn.Linear) -> Any:
        return self.library.nn.Linear8bitLt(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            has_fp16_weights=self.trains,
            threshold=6.0,
            device="meta",
        )

    def _fresh(self, weight: Tensor, scales: Tensor | None = None) -> Any:
        # Quantised by a move from the host only.
        weight = weight if scales is not None else weight.cpu()
        return self.library.nn.Int8Params(
            weight,
            requires_grad=False,
            has_fp16_weights=False,
            CB=None if scales is None else weight,
            SCB=scales,
        )

    def _bring_into_place(self, layer: Any, state: State, prefix: str, *_: Any) -> None:
        """See [Note: restoring quantised weights]."""
        weight = state.get(f"{prefix}weight")
        scales = state.pop(f"{prefix}SCB", None)
        state.pop(f"{prefix}weight_format", None)
        if weight is None:
            return
        device = layer.weight.device
        if scales is None:
            layer.weight = self._fresh(weight.to(torch.float16)).to(device)
        else:
            layer.weight = self._fresh(weight.to(device), scales.to(device))
        layer.state.CB = layer.state.SCB = None  # taken from the weight at the next forward pass
        state[f"{prefix}weight"] = layer.weight.data


class _QuantiseAnew:
    """Before a forward pass, lets a layer forget the integers if its weights have changed since they were made.

    By itself the layer takes weights that have gradients for unchanged, which they are not where ``zero_grad`` comes
    between forward and backward: it would go on with the integers of the first pass for ever.
    """

    def __init__(self) -> None:
        self.version = -1

    def __call__(self, layer: Any, _: Any) -> None:
        version = layer.weight._version
        if version != self.version:
            layer.state.CB = layer.state.SCB = None
            self.version = version


class EightBitTraining(EightBit):
    """Weights in float16 that are trained, and quantised anew whenever they have changed."""

    freezes = False
    trains = True

    def layer(self, old: nn.Linear, dtype: torch.dtype) -> Any:
        """A layer around the same parameters, so that an optimizer that has them already keeps them."""
        new = self._empty(old)
        weight: Any = old.weight
        weight.CB = weight.SCB = None  # what such a layer looks for at its weight
        new.weight, new.bias = weight, old.bias
        new.register_forward_pre_hook(_QuantiseAnew())
        return new
