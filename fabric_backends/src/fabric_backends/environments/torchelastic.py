"""Processes that torchrun has started. Nothing here imports PyTorch before it is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from fabric_backends.hooks import TORCHELASTIC
from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.errors import ConfigurationError
from fabric_core.orphans import die_with_parent
from fabric_core.specs import Detection

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

RUN_ID = "TORCHELASTIC_RUN_ID"
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"

# The processes, of which this is one and its parent may be another, that torchrun's end ends.
_tied: set[int] = set()


def detect(environ: Mapping[str, str]) -> Detection | None:
    """Recognise a worker of torchrun."""
    if RUN_ID not in environ:
        return None
    note = f"{RUN_ID} is set"
    try:
        per_node, world = int(environ["LOCAL_WORLD_SIZE"]), int(environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return Detection(note=note)
    if per_node < 1 or world % per_node:
        return Detection(note=f"{note}; its nodes have unequal numbers of processes")
    return Detection(per_node, world // per_node, note)


class TorchElasticEnvironment(ClusterEnvironment):
    """Ranks from the variables that torchrun sets.

    torchrun's workers outlive it when it is killed. The first question for a rank puts an end to that: from then on,
    the process dies with its parent.
    """

    spec = TORCHELASTIC

    @property
    def creates_processes_externally(self) -> bool:
        """Always: torchrun has started them."""
        return True

    @property
    def main_address(self) -> str:
        """``MASTER_ADDR``."""
        return _variable("MASTER_ADDR")

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``."""
        return _number("MASTER_PORT")

    @property
    def single_node(self) -> bool:
        """Whether this node has all processes."""
        return _number("WORLD_SIZE") == _number("LOCAL_WORLD_SIZE")

    def world_size(self) -> int:
        """``WORLD_SIZE``."""
        return _number("WORLD_SIZE")

    def global_rank(self) -> int:
        """``RANK``."""
        _die_with_torchrun()
        return _number("RANK")

    def local_rank(self) -> int:
        """``LOCAL_RANK``."""
        _die_with_torchrun()
        return _number("LOCAL_RANK")

    def node_rank(self) -> int:
        """``GROUP_RANK``."""
        return _number("GROUP_RANK")

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


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise ConfigurationError(
            f"The cluster environment 'torchelastic' needs the environment variable {name}, which is not set. Start "
            "the script with torchrun, which sets it, or leave the cluster environment to be detected."
        )
    return value


def _number(name: str) -> int:
    value = _variable(name)
    try:
        return int(value)
    except ValueError:
        raise ConfigurationError(
            f"The environment variable {name} is {value!r}, which is no number. torchrun sets it; see what changed it."
        ) from None
