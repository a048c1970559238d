"""Linear layers computed in 8 bits or fewer, by NVIDIA's Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from fabric_backends.precisions.conversion import dtype_among
from fabric_backends.precisions.true import TruePrecision
from fabric_core.errors import OptionsError, UnsupportedError, did_you_mean, listing
from fabric_cuda.hooks import TRANSFORMER_ENGINE
from fabric_cuda.precisions.layers import (
    each_layer,
    has_layers_of,
    is_ignored,
    replace_layers,
    warn_of_layers_left,
)
from fabric_cuda.precisions.packages import package

RECIPES: Mapping[str, str] = {
    "delayed": "DelayedScaling",
    "current": "Float8CurrentScaling",
    "block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
    "nvfp4": "NVFP4BlockScaling",
}
"""The recipes of ``transformer_engine.common.recipe`` by short names."""

_HALVES = (torch.bfloat16, torch.float16)
_MULTIPLE = 16  # of both sizes of a weight


class TransformerEnginePrecision(TruePrecision):
    """Weights in half precision; linear layers compute in the format of a recipe, everything else under autocast.

    Layers of the model are replaced by those of Transformer Engine, around the same parameters, so that an optimizer
    that has them already keeps them. The product of a batch's leading sizes has to be a multiple of 8.

    Args:
        weights_dtype: ``"bfloat16"`` or ``"float16"``; gradients and the optimizer's state have it too. Losses are not
            scaled.
        recipe: How operands are scaled: a name (``"delayed"``, ``"current"``, ``"block"``, ``"mxfp8"``, ``"nvfp4"``),
            a dictionary with such a ``"name"`` (default ``"delayed"``) and the recipe's options, or a ready recipe of
            ``transformer_engine.common.recipe``. Default: what Transformer Engine chooses for the device.
        replace_layers: Replace ``Linear`` and ``LayerNorm``. Without, only layers of Transformer Engine that the model
            has already compute in 8 bits.
        ignore_modules: Names of modules whose layers are not replaced.
        fallback_compute_dtype: What other layers compute in; default ``weights_dtype``.

    Raises:
        MissingRequirementError: Transformer Engine is not installed.
        OptionsError: A dtype or recipe that there is not, or options that the recipe refuses.
    """

    spec = TRANSFORMER_ENGINE

    def __init__(
        self,
        weights_dtype: str | torch.dtype = "bfloat16",
        recipe: Any = None,
        *,
        replace_layers: bool = True,
        ignore_modules: Iterable[str] = (),
        fallback_compute_dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(dtype_among(weights_dtype, _HALVES, "TransformerEnginePrecision"))
        fallback = self.dtype if fallback_compute_dtype is None else fallback_compute_dtype
        self.fallback_compute_dtype = dtype_among(fallback, _HALVES, "TransformerEnginePrecision")
        self._engine = package("transformer_engine.pytorch", TRANSFORMER_ENGINE)
        self.recipe = self._recipe_of(recipe)
        self.replace_layers = replace_layers
        self.ignore_modules = tuple(ignore_modules)

    def _recipe_of(self, recipe: Any) -> Any:
        if isinstance(recipe, str):
            recipe = {"name": recipe}
        if not isinstance(recipe, Mapping):
            return recipe
        recipes = package("transformer_engine.common.recipe", TRANSFORMER_ENGINE)
        options = {"name": "delayed", **recipe}
        name = options.pop("name")
        cls = getattr(recipes, RECIPES.get(name, ""), None)
        if cls is None:
            raise OptionsError(
                f"Transformer Engine here has no recipe {name!r}.{did_you_mean(str(name), RECIPES)} There are: "
                f"{listing(short for short, full in RECIPES.items() if hasattr(recipes, full))}."
            )
        for option in ("fp8_format", "fp4_format"):
            if isinstance(options.get(option), str):
                options[option] = _format(recipes, options[option])
        try:
            return cls(**options)
        except (TypeError, ValueError, AssertionError) as error:
            raise OptionsError(
                f"The recipe {name!r} of Transformer Engine refuses {options}: {error}"
            ) from error

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the weights, and replace the layers. Called on every rank by ``setup``.

        Raises:
            UnsupportedError: No layer of the model can compute in 8 bits.
        """
        module = super().convert_module(module)
        return self._replaced(module) if self.replace_layers else module

    def _replaced(self, module: nn.Module) -> nn.Module:
        layers = {
            name: layer
            for name, layer in each_layer(module, (nn.Linear, nn.LayerNorm))
            if not is_ignored(name, self.ignore_modules)
        }
        linear = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        left = [
            name for name, layer in linear.items() if any(size % _MULTIPLE for size in layer.weight.shape)
        ]
        if len(left) == len(linear) and not has_layers_of(module, "transformer_engine"):
            raise UnsupportedError(
                f"Transformer Engine computes linear layers whose sizes are multiples of {_MULTIPLE}, and the "
                f"{type(module).__name__} has none to replace. Use precision='bf16-true'."
            )
        warn_of_layers_left(left, f"their sizes are no multiples of {_MULTIPLE}")
        fitting = {
            name: layer for name, layer in layers.items() if name not in left and _has_both_parameters(layer)
        }
        return replace_layers(module, fitting, self._layer)

    def _layer(self, layer: nn.Module) -> nn.Module:
        """The layer of Transformer Engine that computes what a layer of PyTorch does, around its parameters."""
        make = self._linear if isinstance(layer, nn.Linear) else self._norm
        new = make(layer)
        for name, parameter in layer.named_parameters(recurse=False):
            setattr(new, name, parameter)
        return new

    def _linear(self, layer: Any) -> nn.Module:
        sizes, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
        new: nn.Module = self._engine.Linear(*sizes, bias=has_bias, device="meta")
        return new

    def _norm(self, layer: Any) -> nn.Module:
        new: nn.Module = self._engine.LayerNorm(layer.normalized_shape, eps=layer.eps, device="meta")
        return new

    def forward_context(self) -> AbstractContextManager[Any]:
        """A fresh context for one forward pass. Each layer may be used once in it, as Transformer Engine demands."""
        return self._context()

    @contextmanager
    def _context(self) -> Iterator[None]:
        with (
            super().forward_context(),
            torch.autocast(self.device.type, dtype=self.fallback_compute_dtype),
            self._low_precision(),
        ):
            yield

    def _low_precision(self) -> AbstractContextManager[Any]:
        context: Callable[..., AbstractContextManager[Any]]
        if hasattr(self._engine, "autocast"):
            context = self._engine.autocast
            return context(enabled=True, recipe=self.recipe)
        context = self._engine.fp8_autocast  # its name before Transformer Engine 2.8
        return context(enabled=True, fp8_recipe=self.recipe)


def _format(recipes: Any, name: str) -> Any:
    try:
        return recipes.Format[name.upper()]
    except KeyError:
        known = [each.name for each in recipes.Format]
        raise OptionsError(
            f"Transformer Engine has no number format {name!r}.{did_you_mean(name.upper(), known)} It has: "
            f"{listing(known)}."
        ) from None


def _has_both_parameters(layer: nn.Module) -> bool:
    """A normalisation of Transformer Engine cannot do without weight and bias."""
    return isinstance(layer, nn.Linear) or all(p is not None for p in (layer.weight, layer.bias))
