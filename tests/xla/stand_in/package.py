"""A stand-in for torch_xla, for what cannot exist without a TPU: several processes that talk to each other.

It has the names that `fabric_xla` uses for that, and PyTorch's own collectives behind them. Its device is the CPU, and
its tensors are computed at once. Nothing about XLA itself can be learnt from it.
"""

from __future__ import annotations

import os
from typing import Any

import torch

launches: list[tuple[Any, str]] = []
"""What was handed to `launch`."""

failure: Exception | None = None
"""What `launch` raises."""


def sync(wait: bool = False) -> None:
    """There is nothing pending."""


def device(index: int | None = None) -> torch.device:
    return torch.device("cpu")


def device_count() -> int:
    return 1


def launch(fn: Any, args: Any = (), start_method: str = "spawn", debug_single_process: bool = False) -> None:
    """Notes what it is given; runs the function here, as torch_xla does in each process."""
    launches.append((fn, start_method))
    if failure is not None:
        raise failure
    os.environ["PJRT_LOCAL_PROCESS_RANK"] = "0"
    try:
        fn(0, *args)
    finally:
        del os.environ["PJRT_LOCAL_PROCESS_RANK"]
