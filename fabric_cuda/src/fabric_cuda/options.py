"""The options of our parts, as users may give them. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CUDAOptions:
    """Of ``cuda``.

    Attributes:
        overlap_copies: Copy batches to the device while it computes, from pinned memory.
    """

    overlap_copies: bool = True


@dataclass(frozen=True)
class TransformerEngineOptions:
    """Of ``transformer-engine``.

    Attributes:
        weights_dtype: bfloat16 or float16; gradients and the optimizer's state have it too.
        recipe: How operands are scaled: delayed, current, block, mxfp8, nvfp4; a table with such a "name" and the
            recipe's options; or a ready recipe. Without it, what Transformer Engine chooses for the device.
        replace_layers: Replace Linear and LayerNorm by layers that compute in 8 bits.
        ignore_modules: Names of modules whose layers are not replaced.
        fallback_compute_dtype: What other layers compute in. Without it, weights_dtype.
    """

    weights_dtype: Any = "bfloat16"
    recipe: Any = None
    replace_layers: bool = True
    ignore_modules: Iterable[str] = ()
    fallback_compute_dtype: Any = None


@dataclass(frozen=True)
class Float8Options:
    """Of ``float8``.

    Attributes:
        recipe: How operands are scaled: tensorwise (fastest), rowwise, rowwise_with_gw_hp (most accurate); or a
            torchao.float8.Float8LinearConfig.
        ignore_modules: Names of modules whose layers stay in bfloat16. The last layer of a model often should.
        module_filter: Called with each linear layer and its name; says whether it is converted.
        emulate: Compute the same numbers slowly, on a device that has no 8-bit matrix units.
    """

    recipe: Any = "tensorwise"
    ignore_modules: Iterable[str] = ()
    module_filter: Callable[..., Any] | None = None
    emulate: bool = False


@dataclass(frozen=True)
class BitsandbytesOptions:
    """Of the formats of bitsandbytes.

    Attributes:
        mode: The format. The precision's name says it.
        dtype: What layers compute in, and of all other weights: bfloat16 or float16. Without it, bfloat16 where the
            format knows it.
        ignore_modules: Names of modules whose layers are not quantised. The last layer of a model often should not.
    """

    mode: str
    dtype: Any = None
    ignore_modules: Iterable[str] = ()
