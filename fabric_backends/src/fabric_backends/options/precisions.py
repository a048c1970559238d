"""Options of the precisions, and of the devices that go by their type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrueOptions:
    """Of ``64-true``, ``16-true`` and ``bf16-true``.

    Attributes:
        dtype: The dtype of everything. The precision's name says it.
    """

    dtype: Any


@dataclass(frozen=True)
class MixedOptions:
    """Of ``16-mixed`` and ``bf16-mixed``.

    Attributes:
        dtype: What is computed in. The precision's name says it.
        scaler: For float16: options of torch.amp.GradScaler by name, or a scaler that is made already.
    """

    dtype: Any
    scaler: dict[str, Any] | Any | None = None
