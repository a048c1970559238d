"""The base of strategies with a process per device and a ``torch.distributed`` group among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_backends import collectives
from fabric_backends.messages import broadcast_object
from fabric_backends.process_group import Membership, backend_for, join
from fabric_backends.rendezvous import meet
from fabric_backends.timeouts import INIT_TIMEOUT, TIMEOUT, duration, shorten_after_first_step
from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.contracts.strategy import ReduceOp, Strategy
from fabric_core.errors import CheckpointError, ConfigurationError, SetupError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_LOOKING_FOR_PEERS = 2.0  # seconds; who gives up waiting does so at about the same time on all ranks


class ParallelStrategy(Strategy):
    """A process per device, joined by the default process group.

    It does everything but the training itself: ranks, the store, the group, collectives, checkpoints that succeed or
    fail on all ranks alike. A subclass says how modules and optimizers are set up.

    Args:
        process_group_backend: What ``torch.distributed`` calls it. Default: the accelerator's, else PyTorch's own
            for the device, else gloo.
        timeout: How long a collective may take, in seconds or as a ``timedelta``. Raise it when one rank prepares
            data for longer than that while the others wait. Default: what the accelerator says, from the end of the
            first step on, and ``init_timeout`` until then; 600 s where it says nothing.
        init_timeout: How long the ranks wait for each other at the start, likewise.
    """

    def __init__(
        self,
        *,
        process_group_backend: str | None = None,
        timeout: float | timedelta | None = None,
        init_timeout: float | timedelta = INIT_TIMEOUT,
    ) -> None:
        self.process_group_backend = process_group_backend
        self.timeout = None if timeout is None else duration("timeout", timeout)
        self.init_timeout = duration("init_timeout", init_timeout)
        self._store: Store | None = None
        self._membership: Membership | None = None
        self._device: torch.device | None = None
        self._barriers = 0
        self._keep_long: Callable[[], None] = _nothing

    # -- who am I -------------------------------------------------------------------------------------------------

    @property
    def _environment(self) -> ClusterEnvironment:
        return self.surroundings.cluster_environment

    @property
    def root_device(self) -> torch.device:
        """The device of this process. Once it has joined the others, the environment is not asked again."""
        return self._device or super().root_device

    @property
    def world_size(self) -> int:
        """How many processes the job has; before they are started, how many it will have."""
        if self._environment.creates_processes_externally:
            return self._environment.world_size()
        return self.surroundings.processes_per_node * self.surroundings.num_nodes

    @property
    def global_rank(self) -> int:
        """From the cluster environment."""
        return self._environment.global_rank()

    @property
    def local_rank(self) -> int:
        """From the cluster environment."""
        return self._environment.local_rank()

    @property
    def node_rank(self) -> int:
        """From the cluster environment."""
        return self._environment.node_rank()

    # -- coming and going -----------------------------------------------------------------------------------------

    @property
    def store(self) -> Store | None:
        """The store of the job, in which all ranks have met. Reading it the first time waits for every rank.

        Raises:
            LaunchError: Some did not come within ``init_timeout``.
            SetupError: Not all processes of the job have been started.
        """
        if self._store is None and self.world_size > 1:
            self._store = self._meet()
        return self._store

    def _meet(self) -> Store:
        started = self._environment.world_size()
        if started != self.world_size:
            raise SetupError(
                f"The job has {self.world_size} processes, of which {started} are started. Call fabric.launch() first."
            )
        return meet(self._environment, timeout=self.init_timeout)

    def connect(self) -> None:
        """Make the device current and join the process group. Called on every rank, once.

        A group that the user has initialised is used as it is, and left alone by `teardown`.

        Raises:
            LaunchError: Some ranks did not come within ``init_timeout``.
            ConfigurationError: There is a group of another size.
            SetupError: Not all processes of the job have been started.
        """
        surroundings, device = self.surroundings, super().root_device
        self._device = device
        surroundings.accelerator.setup_device(device)
        wanted = self.process_group_backend or surroundings.accelerator.process_group_backend
        self._membership = join(
            backend_for(device, wanted),
            lambda: self.store or self._meet(),
            rank=self.global_rank,
            world_size=self.world_size,
            device=device if surroundings.accelerator.binds_process_group else None,
            timeout=self._timeout_at_start,
            loopback=self._environment.single_node,
        )
        self._membership.at_exit(self.teardown)
        if self.timeout is None and self._own_timeout is not None and self._membership.owned:
            self._keep_long = shorten_after_first_step(self._own_timeout, device)

    @property
    def _own_timeout(self) -> timedelta | None:
        """What the accelerator says."""
        seconds = self.surroundings.accelerator.process_group_timeout
        return None if seconds is None else timedelta(seconds=seconds)

    @property
    def _timeout_at_start(self) -> timedelta:
        own = self._own_timeout
        return self.timeout or (TIMEOUT if own is None else max(self.init_timeout, own))

    @property
    def absence_timeout(self) -> float:
        """The time-out of collectives, since a rank that does not come to one may not come to the other."""
        return self._timeout_at_start.total_seconds()

    def afterwards(self, action: Callable[[], None]) -> None:
        """Do something once the process group is destroyed, at the latest at the end of the process.

        Called on every rank, after `connect`. Where the group is the user's own, it is never done.
        """
        if self._membership is not None:
            self._membership.afterwards(action)

    def teardown(self) -> None:
        """Release the modules, then leave the process group. Called on every rank; safe to call twice."""
        self._keep_long()
        if self._membership is not None:
            self._membership.leave()
        self._membership = self._store = self._device = None
        super().teardown()

    # -- setting up -----------------------------------------------------------------------------------------------

    def synchronize_module(self, module: nn.Module) -> None:
        """Give every rank the weights and buffers of rank 0, in place. Called on every rank."""
        for tensor in (*module.parameters(), *module.buffers()):
            collectives.broadcast_(tensor)

    # -- talking to the other ranks -------------------------------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        """Wait for every rank; all have to give the same name. Called on every rank.

        Raises:
            SetupError: The ranks wait at different barriers, or some never came.
        """
        self._barriers += 1
        try:
            collectives.barrier(name, self.root_device)
        except SetupError:
            raise
        except RuntimeError as error:
            missing = self._absent()
            if not missing:
                raise
            raise SetupError(
                f"Not every rank came to the barrier{'' if name is None else f' {name!r}'}: missing are "
                f"{', '.join(map(str, missing))} of {self.world_size}. They have failed, or are still busy, or have "
                "gone another way. The option 'timeout' sets how long to wait."
            ) from error

    def _absent(self) -> list[int]:
        """The ranks that do not fail at the present barrier as this one does; none when that cannot be found out."""
        store, here = self._store, f"barrier/{self._barriers}"
        if store is None:
            return []
        missing = [rank for rank in range(self.world_size) if rank != self.global_rank]
        with suppress(dist.DistError):
            store.set(f"{here}/{self.global_rank}", "waiting")
            until = time.monotonic() + _LOOKING_FOR_PEERS
            while missing and time.monotonic() < until:
                time.sleep(0.05)
                missing = [rank for rank in missing if not store.check([f"{here}/{rank}"])]
            return missing
        return []

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Send an object from rank ``src``. Called on every rank; what the others pass is ignored.

        Returns:
            The object of rank ``src``; its tensors are detached.

        Raises:
            ConfigurationError: There is no rank ``src``.
            WrongTypeError: The object cannot be pickled; on every rank.
        """
        if not 0 <= src < self.world_size:
            raise ConfigurationError(
                f"broadcast was asked to send from rank {src}. The ranks are 0 to {self.world_size - 1}."
            )
        return broadcast_object(obj, src, self.root_device)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """As the contract. With ``sync_grads``, a rank's gradient is the sum of what all ranks make of its part."""
        if sync_grads and tensor.requires_grad and torch.is_grad_enabled():
            return collectives.all_gather_with_gradient(tensor, group)
        return collectives.all_gather(tensor, group)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean", group: Any = None) -> Tensor:
        """As the contract. Truth values are combined as numbers would be: a sum is true when one of them is."""
        return collectives.all_reduce(tensor, op, group)

    # -- state ----------------------------------------------------------------------------------------------------

    def optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of an optimizer; one that keeps it in shards collects it on rank 0 and is empty elsewhere."""
        consolidate = getattr(optimizer, "consolidate_state_dict", None)
        if consolidate is None:
            return optimizer.state_dict()
        consolidate(0)
        return optimizer.state_dict() if self.global_rank == 0 else {}

    def save_checkpoint(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Write the checkpoint on rank 0. Called on every rank; returns on every rank when it is on disk.

        It may take as long as it takes: ``timeout`` is for collectives.

        Raises:
            CheckpointError: It cannot be written; on every rank.
        """
        failure: Exception | None = None
        if self.global_rank == 0:
            try:
                self.surroundings.checkpoint_io.save(path, checkpoint)
            except Exception as error:  # the other ranks wait, and have to be told
                failure = error
        failed = self.agreement.first_failure(failure, [0])
        if isinstance(failure, CheckpointError):
            raise failure
        if failed is not None:
            raise CheckpointError(f"Rank 0 could not write the checkpoint {path}: {failed[1]}") from failure

    def stage_checkpoint(
        self, checkpoint: Mapping[str, Any], copied: Callable[[Any], Any]
    ) -> Mapping[str, Any]:
        """Copy the checkpoint on rank 0, which will write it. Called on every rank."""
        return self.staged(checkpoint, copied, [0])

    def staged(
        self, checkpoint: Mapping[str, Any], copied: Callable[[Any], Any], ranks: Sequence[int]
    ) -> Mapping[str, Any]:
        """Copy a checkpoint on the ranks that will write. Called on every rank.

        Returns:
            The copy; an empty one on the other ranks.

        Raises:
            CheckpointError: Some rank could not copy it; on every rank.
        """
        copies: list[Mapping[str, Any]] = []
        self.agreement.on_ranks(ranks, lambda: copies.append(copied(checkpoint)), "copy the checkpoint")
        return copies[0] if copies else {}

    def load_checkpoint(self, path: Path, *, weights_only: bool = True) -> dict[str, Any]:
        """Read a checkpoint on every rank, onto the CPU. Called on every rank; it may take as long as it takes.

        Raises:
            CheckpointError: Some rank could not read it; on every rank. Where it is its own failure, of the same type.
        """
        failure: Exception | None = None
        checkpoint: dict[str, Any] = {}
        try:
            checkpoint = self.read_checkpoint(path, weights_only)
        except Exception as error:  # the other ranks wait, and have to be told
            failure = error
        failed = self.agreement.first_failure(failure, range(self.world_size))
        if failure is not None:
            raise failure
        if failed is None:
            return checkpoint
        rank, reason = failed
        raise CheckpointError(
            f"Rank {rank} could not read the checkpoint {path}, which rank {self.global_rank} can: {reason} "
            "Is it on a disk that all nodes share?"
        )

    def read_checkpoint(self, path: Path, weights_only: bool) -> dict[str, Any]:
        """What `load_checkpoint` does on each rank, by itself; the others are told when it fails."""
        return super().load_checkpoint(path, weights_only=weights_only)


def _nothing() -> None:
    """There is no time-out to be shortened."""
