"""NVIDIA's and AMD's GPUs as a plugin of fabric-core. Every public name is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fabric_cuda.accelerators.cuda import CUDAAccelerator as CUDAAccelerator
    from fabric_cuda.accelerators.usable import find_usable_devices as find_usable_devices
    from fabric_cuda.precisions.bitsandbytes import BitsandbytesPrecision as BitsandbytesPrecision
    from fabric_cuda.precisions.float8 import Float8Precision as Float8Precision
    from fabric_cuda.precisions.transformer_engine import (
        TransformerEnginePrecision as TransformerEnginePrecision,
    )

_HOME = {
    "CUDAAccelerator": "accelerators.cuda",
    "find_usable_devices": "accelerators.usable",
    "BitsandbytesPrecision": "precisions.bitsandbytes",
    "Float8Precision": "precisions.float8",
    "TransformerEnginePrecision": "precisions.transformer_engine",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
