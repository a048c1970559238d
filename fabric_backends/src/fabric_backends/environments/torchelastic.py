"""Processes that torchrun has started. Nothing here imports PyTorch before it is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from fabric_backends.environments.started import EnvEnvironment
from fabric_backends.environments.variables import Variables, of_equal_nodes, whole
from fabric_backends.hooks import TORCHELASTIC
from fabric_core.orphans import die_with_parent
from fabric_core.specs import Detection

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

RUN_ID = "TORCHELASTIC_RUN_ID"
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"

_variables = Variables("torchelastic", "Start the script with torchrun, which sets it", "torchrun")

# The processes, of which this is one and its parent may be another, that torchrun's end ends.
_tied: set[int] = set()


def detect(environ: Mapping[str, str]) -> Detection | None:
    """Recognise a worker of torchrun."""
    if RUN_ID not in environ:
        return None
    numbers = whole(environ, "WORLD_SIZE"), whole(environ, "LOCAL_WORLD_SIZE")
    return of_equal_nodes(*numbers, f"{RUN_ID} is set")


class TorchElasticEnvironment(EnvEnvironment):
    """Ranks from the variables that torchrun sets.

    torchrun's workers outlive it when it is killed. The first question for a rank puts an end to that: from then on,
    the process dies with its parent.
    """

    spec = TORCHELASTIC
    variables = _variables

    def global_rank(self) -> int:
        """``RANK``."""
        _die_with_torchrun()
        return super().global_rank()

    def local_rank(self) -> int:
        """``LOCAL_RANK``."""
        _die_with_torchrun()
        return super().local_rank()

    def node_rank(self) -> int:
        """``GROUP_RANK``."""
        return _variables.number("GROUP_RANK")

    @property
    def restart_count(self) -> int:
        """How often ``torchrun --max-restarts`` has started the workers again."""
        return whole(os.environ, "TORCHELASTIC_RESTART_COUNT") or 0

    def shared_store(self, timeout: timedelta) -> Store | None:
        """The store of torchrun's agent, if it lends it to its workers. Called on every rank.

        Args:
            timeout: How long to wait for it.
        """
        if os.environ.get(_AGENT_STORE) != "True":
            return None
        from torch.distributed import rendezvous  # type: ignore[attr-defined]

        store: Store = next(rendezvous("env://", timeout=timeout))[0]
        return store


def _die_with_torchrun() -> None:
    if os.getpid() not in _tied and RUN_ID in os.environ:
        _tied.add(os.getpid())
        die_with_parent()
