"""Linear layers in 4 or 8 bits, by bitsandbytes: for adapters on top of a big frozen model, and for inference."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_backends.precisions.conversion import dtype_among
from fabric_backends.precisions.true import TruePrecision
from fabric_core.errors import OptionsError, SetupError, UnsupportedError, did_you_mean, listing
from fabric_cuda.hooks import BITSANDBYTES
from fabric_cuda.precisions.layers import (
    each_layer,
    has_layers_of,
    is_ignored,
    replace_layers,
    warn_of_layers_left,
)
from fabric_cuda.precisions.packages import package
from fabric_cuda.precisions.quantised import EightBit, EightBitTraining, FourBit

_MODES: Mapping[str, Callable[[Any], FourBit | EightBit]] = {
    "nf4": partial(FourBit, format="nf4", double=False),
    "nf4-dq": partial(FourBit, format="nf4", double=True),
    "fp4": partial(FourBit, format="fp4", double=False),
    "fp4-dq": partial(FourBit, format="fp4", double=True),
    "int8": EightBit,
    "int8-training": EightBitTraining,
}


class BitsandbytesPrecision(TruePrecision):
    """Linear layers hold their weights in few bits, and everything else is in one half-precision dtype.

    Weights are quantised one after the other on their way to the device, in ``setup``: create the model on the CPU,
    outside of ``fabric.init_module()``, and the device never holds all of it in full. They are frozen (but for
    ``"int8-training"``), so create the optimizer after ``fabric.setup_module(model)``, from the parameters that still
    require gradients, and set it up with ``fabric.setup_optimizers``. Plain checkpoints and those of quantised models
    can be loaded. Layers whose weight another module uses too are left alone.

    Args:
        mode: ``"nf4"``, ``"nf4-dq"``, ``"fp4"``, ``"fp4-dq"`` (the scales are quantised too), ``"int8"``, or
            ``"int8-training"``.
        dtype: What layers compute in, and of all other weights: ``"bfloat16"``, ``"float16"``; the ``int8`` modes know
            ``"float16"`` only. Default: bfloat16 where the mode knows it.
        ignore_modules: Names of modules whose layers are not quantised. The last layer of a model often should not.

    Raises:
        MissingRequirementError: bitsandbytes is not installed.
        OptionsError: There is no such mode, or it does not know the dtype.
    """

    spec = BITSANDBYTES

    def __init__(
        self, mode: str, dtype: str | torch.dtype | None = None, *, ignore_modules: Iterable[str] = ()
    ) -> None:
        if mode not in _MODES:
            raise OptionsError(
                f"bitsandbytes has no mode {mode!r} here.{did_you_mean(str(mode), _MODES)} There are: "
                f"{listing(_MODES)}."
            )
        self.mode = mode
        self._format = _MODES[mode](package("bitsandbytes", BITSANDBYTES))
        known = self._format.dtypes
        super().__init__(
            known[0] if dtype is None else dtype_among(dtype, known, f"BitsandbytesPrecision({mode!r})")
        )
        self.ignore_modules = tuple(ignore_modules)
        self._replaced: dict[int, weakref.ref[nn.Parameter]] = {}

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the weights, and replace the linear layers. Called on every rank by ``setup``.

        Raises:
            UnsupportedError: The model has no linear layer that can be quantised.
        """
        module = super().convert_module(module)
        owners = Counter(
            id(parameter) for part in module.modules() for parameter in part._parameters.values()
        )
        wanted = {
            name: layer
            for name, layer in each_layer(module, (nn.Linear,))
            if not is_ignored(name, self.ignore_modules)
        }
        left = [
            name for name, layer in wanted.items() if self._format.freezes and owners[id(layer.weight)] > 1
        ]
        layers = {name: layer for name, layer in wanted.items() if name not in left}
        if not layers and not has_layers_of(module, "bitsandbytes"):
            raise UnsupportedError(
                f"The precision 'bitsandbytes-{self.mode}' quantises linear layers, and the {type(module).__name__} "
                "has none that can be. Use precision='bf16-true'."
            )
        warn_of_layers_left(left, "other modules use their weights too")
        if self._format.freezes:
            self._remember(layer.weight for layer in layers.values())
        return replace_layers(module, layers, lambda old: self._format.layer(old, self.dtype))

    def _remember(self, weights: Iterable[Any]) -> None:
        for weight in weights:
            self._replaced[id(weight)] = weakref.ref(weight)

    def setup_optimizer(self, optimizer: Optimizer) -> None:
        """See that an optimizer does not wait for gradients of weights that are quantised by now.

        Raises:
            SetupError: It does.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gone = sum(self._replaced.get(id(each), _nothing)() is each for each in parameters)
        if gone:
            raise SetupError(
                f"{gone} of {len(parameters)} parameters of the {type(optimizer).__name__} are weights that "
                f"'bitsandbytes-{self.mode}' has quantised and frozen. Set up the model first, create the optimizer "
                "from what can still be trained, and set it up, too: model = fabric.setup_module(model); optimizer = "
                "fabric.setup_optimizers(Optimizer(p for p in model.parameters() if p.requires_grad))."
            )


def _nothing() -> None:
    """A reference to a parameter that nobody knows."""
