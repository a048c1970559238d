"""``torch.autocast`` for one device and dtype, which are checked once instead of in every forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


class light_autocast(AbstractContextManager[None]):  # noqa: N801  (used like a function)
    """Does what ``torch.autocast(device, dtype)`` does in eager mode. One object per use, so that uses may be nested.

    What it changes belongs to the thread, as with ``torch.autocast``. Where a graph is traced, that has to be used
    itself: tracers know it by its class.

    Args:
        device: The type of the device.
        dtype: What autocast computes in, on a device that can.
    """

    __slots__ = ("_before", "_device", "_dtype")

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype

    def __enter__(self) -> None:
        device = self._device
        self._before = (
            torch.is_autocast_enabled(device),
            torch.get_autocast_dtype(device),
            torch.is_autocast_cache_enabled(),
        )
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, self._dtype)
        torch.autocast_increment_nesting()

    def __exit__(self, *exc_info: object) -> None:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        enabled, dtype, caches = self._before
        torch.set_autocast_enabled(self._device, enabled)
        torch.set_autocast_dtype(self._device, dtype)
        torch.set_autocast_cache_enabled(caches)

    def __call__(self, function: F) -> F:
        """As a decorator: each call of ``function`` runs in a context of its own."""

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with light_autocast(self._device, self._dtype):
                return function(*args, **kwargs)

        return inside  # type: ignore[return-value]


def is_traced() -> bool:
    """Whether operations are being recorded as a graph, so that a context has to be one that the tracer knows."""
    return torch.compiler.is_compiling() or torch._C._is_torch_function_mode_enabled()
