"""What a rank tells its supervisor while it lives: an empty file per rank and milestone, in the private directory."""

from __future__ import annotations

import os
from contextlib import suppress
from enum import Enum

from fabric_core.supervisor.variables import ERROR_DIR


class Milestone(Enum):
    """How far a rank has come."""

    JOINED = "joined"
    """It has met the others."""
    WATCHES = "watches"
    """It takes SIGTERM, which would have ended it, for the announcement of an end. See [Note: preemption]."""
    PREEMPTED = "preempted"
    """It has agreed with the others to stop before the end."""


def tell_supervisor(milestone: Milestone) -> None:
    """Leave word of a milestone. Called on the rank; nothing where no supervisor of ours has started it."""
    error_dir, rank = os.environ.get(ERROR_DIR), os.environ.get("RANK")
    if error_dir and rank:
        with suppress(OSError), open(_path(error_dir, int(rank), milestone), "x"):
            pass


def has_told(error_dir: str | None, rank: int, milestone: Milestone) -> bool:
    """Whether a rank has left word of it."""
    return error_dir is not None and os.path.exists(_path(error_dir, rank, milestone))


def _path(error_dir: str, rank: int, milestone: Milestone) -> str:
    return os.path.join(error_dir, f"rank-{rank}.{milestone.value}")
