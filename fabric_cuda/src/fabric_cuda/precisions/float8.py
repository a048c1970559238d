"""Linear layers computed in 8-bit floating point, by torchao."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fabric_backends.precisions.mixed import MixedPrecision
from fabric_core.errors import OptionsError, UnsupportedError, did_you_mean, listing
from fabric_cuda.hooks import FLOAT8_DIVIDED
from fabric_cuda.precisions.layers import each_layer, has_layers_of, is_ignored, warn_of_layers_left
from fabric_cuda.precisions.packages import package

_MULTIPLE = 16  # what the matrix units want both sizes of a weight to be divisible by
_FIRST_NVIDIA, _FIRST_AMD = (8, 9), (9, 4)  # compute capabilities: Ada and Hopper; MI300


class Float8Precision(MixedPrecision):
    """As ``bf16-mixed``, and the matrix products of linear layers in 8 bits: forward, and both of backward.

    Weights stay in float32 and keep their names, and optimizers that have them already keep them. Each product scales
    its operands anew. It is fast only in a compiled model: ``fabric.setup(torch.compile(model), …)``.

    Args:
        recipe: How operands are scaled: ``"tensorwise"`` (fastest), ``"rowwise"``, ``"rowwise_with_gw_hp"`` (most
            accurate); or a ``torchao.float8.Float8LinearConfig``, for everything else that there is to choose.
        ignore_modules: Names of modules whose layers stay in bfloat16. The last layer of a model often should.
        module_filter: Called with each linear layer and its name; says whether it is converted.
        emulate: Compute the same numbers slowly, on a device that has no 8-bit matrix units.

    Raises:
        MissingRequirementError: torchao is not installed.
        OptionsError: There is no such recipe.
    """

    spec = FLOAT8_DIVIDED

    def __init__(
        self,
        recipe: Any = "tensorwise",
        *,
        ignore_modules: Iterable[str] = (),
        module_filter: Callable[[nn.Module, str], bool] | None = None,
        emulate: bool = False,
    ) -> None:
        super().__init__("bfloat16")
        self._torchao = package("torchao.float8", FLOAT8_DIVIDED)
        config = self._config_of(recipe)
        self.config = dataclasses.replace(config, emulate=True) if emulate else config
        self.ignore_modules = tuple(ignore_modules)
        self.module_filter = module_filter

    def _config_of(self, recipe: Any) -> Any:
        if isinstance(recipe, self._torchao.Float8LinearConfig):
            return recipe
        names = [name.value for name in self._torchao.Float8LinearRecipeName]
        if recipe not in names:
            raise OptionsError(
                f"The precision 'float8' has no recipe {recipe!r}.{did_you_mean(str(recipe), names)} It has: "
                f"{listing(names)}; or pass a Float8LinearConfig of torchao."
            )
        return self._torchao.Float8LinearConfig.from_recipe_name(recipe)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the linear layers whose sizes are multiples of 16, in place. Called on every rank by ``setup``.

        Raises:
            UnsupportedError: The device has no 8-bit matrix units, or the model no such layer.
        """
        module = super().convert_module(module)
        self._check_device()
        wanted = [
            (name, layer)
            for name, layer in each_layer(module, (nn.Linear,))
            if not is_ignored(name, self.ignore_modules)
            and (self.module_filter is None or self.module_filter(layer, name))
        ]
        fitting = {layer for _, layer in wanted if all(size % _MULTIPLE == 0 for size in layer.weight.shape)}
        if not fitting and not has_layers_of(module, "torchao"):
            raise UnsupportedError(
                f"The precision 'float8' computes linear layers whose sizes are multiples of {_MULTIPLE}, and the "
                f"{type(module).__name__} has none. Use precision='bf16-mixed'."
            )
        left = [name for name, layer in wanted if layer not in fitting]
        warn_of_layers_left(left, f"their sizes are no multiples of {_MULTIPLE}")
        converted: nn.Module = self._torchao.convert_to_float8_training(
            module, config=self.config, module_filter_fn=lambda layer, _: layer in fitting
        )
        return converted

    def _check_device(self) -> None:
        if self.config.emulate:
            return
        if self.device.type == "cuda":
            capability = torch.cuda.get_device_capability(self.device)
            if capability >= (_FIRST_AMD if torch.version.hip else _FIRST_NVIDIA):
                return
        raise UnsupportedError(
            f"The device {str(self.device)!r} cannot multiply in 8 bits: that takes an Ada, Hopper or newer GPU, or an "
            "MI300. Use precision='bf16-mixed'; to see the numbers all the same, slowly, "
            "precision_options={'emulate': True}."
        )
