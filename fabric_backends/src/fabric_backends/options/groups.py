"""Options of everything that joins a process group."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class GroupOptions:
    """Of a process per device.

    Attributes:
        process_group_backend: What torch.distributed calls it. Without it, the accelerator's.
        timeout: How many seconds a collective may take. Without it, what the accelerator says, or 600.
        init_timeout: How many seconds the ranks wait for each other at the start.
    """

    process_group_backend: str | None = None
    timeout: float | timedelta | None = None
    init_timeout: float | timedelta = 300.0
