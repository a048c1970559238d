"""How long ranks wait for each other: at the start, where each loads and compiles at its own speed, and afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.optim.optimizer import register_optimizer_step_post_hook

from fabric_core.errors import OptionsError

INIT_TIMEOUT = 300.0
"""Seconds in which every rank has to come to the start of the job, where a slow one is loading its libraries."""

TIMEOUT = timedelta(seconds=600)
"""How long a collective may take where neither user nor device say it: as PyTorch's own for NCCL. For gloo, it would
be half an hour."""


def duration(option: str, value: float | timedelta) -> timedelta:
    """The value of an option that is a time.

    Raises:
        OptionsError: It is none.
    """
    with suppress(TypeError, OverflowError):
        found = value if isinstance(value, timedelta) else timedelta(seconds=value)
        if found > timedelta():
            return found
    raise OptionsError(
        f"The option {option} is {value!r}. It takes a number of seconds above 0, or a timedelta."
    )


def shorten_after_first_step(timeout: timedelta, device: torch.device) -> Callable[[], None]:
    """Let collectives of the default group take no longer than ``timeout`` once an optimizer has stepped.

    Called on every rank, when the group is there. The first step may take long, and not equally long on all ranks:
    kernels are compiled and connections made. So the device is waited for, once: what it has done by then includes
    the collectives of the first step, to which the slowest rank has come. It costs nothing after that.

    Args:
        timeout: From the first step on.
        device: Of this rank.

    Returns:
        Gives it up, if it has not happened yet.
    """

    def shorten(*_: Any) -> None:
        handle.remove()
        if dist.is_initialized():
            if device.type != "cpu":
                torch.get_device_module(device).synchronize(device)
            _set_pg_timeout(timeout)

    handle = register_optimizer_step_post_hook(shorten)
    return handle.remove
