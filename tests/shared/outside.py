"""Variables of the environment as they are outside of any job, for programs that the tests start."""

from __future__ import annotations

import os

OF_JOBS = ("FABRIC_", "MASTER_", "RANK", "LOCAL_", "WORLD_", "NODE_", "GROUP_", "TORCHELASTIC_")
"""How names begin that a launcher, a test or a user of ours may have set."""


def outside_of_jobs(*more: str) -> dict[str, str]:
    """The variables of this process without those, and without names that begin with one of ``more``."""
    return {name: value for name, value in os.environ.items() if not name.startswith((*OF_JOBS, *more))}
