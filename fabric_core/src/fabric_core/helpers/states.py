"""Refusing the state of something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fabric_core.errors import CheckpointError


def check_state(what: str, state: Any, names: Iterable[str]) -> None:
    """See that a state has what it needs to have.

    Args:
        what: Whose state is needed.
        state: What was loaded.
        names: Its entries.

    Raises:
        CheckpointError: It is something else.
    """
    if not isinstance(state, Mapping) or not set(names) <= set(state):
        raise CheckpointError(
            f"The state of {what} is needed, as its state_dict() gives it; this is something else. Load it under the "
            f"name that it was saved under, or leave {what} out of the state."
        )
