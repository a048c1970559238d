"""Context parallel: long sequences are divided within groups of ranks, and so is what is computed along them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fabric_backends import sequences
from fabric_backends.alike import check_alike, share_random_state
from fabric_backends.hooks import CONTEXT_PARALLEL
from fabric_backends.meshes import CONTEXT, DATA, Size, axis_sizes, make_mesh
from fabric_backends.sharding.grid import forget_groups
from fabric_backends.strategies.fsdp import FSDPStrategy
from fabric_core.contracts.strategy import Surroundings
from fabric_core.errors import ConfigurationError, SetupError, unknown_option


class ContextParallelStrategy(FSDPStrategy):
    """Divides sequences within groups of ranks (context parallel), batches between these groups (data parallel).

    The model is sharded over all ranks, as ``fsdp`` does, and knows nothing of this: in a block of `shard_sequence`,
    ``scaled_dot_product_attention`` sees the keys and values of the whole sequence, and everything else this rank's
    part of it. What a model makes of positions has to be passed to it, because its part does not begin at 0.

    Args:
        data_parallel_size: How many groups read different data. ``"auto"``: what the other size leaves; when both
            are, the number of nodes.
        context_parallel_size: How many ranks share a sequence, likewise; when both are ``"auto"``, those of a node.
        options: As `FSDPStrategy`.

    Raises:
        OptionsError: A size is none, or there is no such option.
    """

    spec = CONTEXT_PARALLEL

    def __init__(
        self, *, data_parallel_size: Size = "auto", context_parallel_size: Size = "auto", **options: Any
    ) -> None:
        for name in options:
            if name not in _INHERITED:
                own = ("data_parallel_size", "context_parallel_size")
                raise unknown_option("The strategy 'context_parallel'", name, (*own, *_INHERITED))
        super().__init__(**options)
        self._asked_sizes: dict[str, Size] = {DATA: data_parallel_size, CONTEXT: context_parallel_size}
        self._sizes: dict[str, int] = {}
        self._context_mesh: DeviceMesh | None = None
        self._is_dividing = False

    # -- who am I -------------------------------------------------------------------------------------------------

    def attach(self, surroundings: Surroundings) -> None:
        """As `FSDPStrategy`.

        Raises:
            OptionsError: The sizes of the axes do not make the number of processes.
        """
        super().attach(surroundings)
        self._sizes = axis_sizes(self._asked_sizes, self.world_size, surroundings.num_nodes)

    @property
    def mesh(self) -> DeviceMesh:
        """The ranks as a grid with the axes ``"data_parallel"`` and ``"context_parallel"``; either may be 1 long.

        Raises:
            SetupError: The ranks have not joined yet.
        """
        if self._context_mesh is None:
            raise SetupError(
                "The mesh is there once the processes have joined. Call fabric.launch() first, and any verb of setting "
                "up (such as setup or barrier)."
            )
        return self._context_mesh

    @property
    def sampler_arguments(self) -> dict[str, int]:
        """Data is split between the groups only: within one, all ranks read the same, to divide it afterwards."""
        return {"num_replicas": self._sizes[DATA], "rank": self.global_rank // self._sizes[CONTEXT]}

    # -- coming and going -----------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Join the other ranks and make the mesh. Called on every rank, once. Errors as in `ParallelStrategy`."""
        super().connect()
        self._context_mesh = make_mesh(self.root_device, self._sizes)

    def teardown(self) -> None:
        """Leave the process group. Called on every rank; safe to call twice."""
        super().teardown()
        mesh, self._context_mesh = self._context_mesh, None
        forget_groups(mesh)

    # -- sequences ------------------------------------------------------------------------------------------------

    def move_batches(self, batches: Iterator[Any], move: Callable[[Any], Any]) -> Iterator[Any]:
        """As the contract. Each loop begins with the same random numbers on all ranks of a group.

        Raises:
            SetupError: The ranks of a group read different batches; from the first ``next`` of the loop.
        """
        there = super().move_batches(batches, move)
        if self._sizes[CONTEXT] == 1:
            return there
        share_random_state(self._context_group, self.root_device)
        return check_alike(there, self._context_group, self.root_device)

    @contextmanager
    def shard_sequence(self, *tensors: Tensor, dim: int | Sequence[int] = 1) -> Iterator[Any]:
        """A block in which this rank computes with its part of sequences. Called on every rank of a group.

        Forward pass, loss and ``fabric.backward`` all belong inside, so that a forward pass that is computed again
        there sees the whole sequence, too. Attention has to go through ``scaled_dot_product_attention``.

        Example:
            >>> with fabric.strategy.shard_sequence(text, targets, positions, dim=(1, 1, 0)) as parts:
            ...     text, targets, positions = parts
            ...     fabric.backward(cross_entropy(model(text, positions).flatten(0, 1), targets.flatten()))

        Args:
            tensors: Whole sequences, equal on all ranks of the group: inputs, targets, positions, rows of masks.
            dim: Along which dimension they run; one for all, or one for each.

        Yields:
            This rank's parts, as a tuple; of one tensor its part.

        Raises:
            ConfigurationError: The length of a sequence cannot be divided, or there is not one ``dim`` for each.
            SetupError: Inside of another such block.
        """
        dims = [dim] * len(tensors) if isinstance(dim, int) else list(dim)
        if not tensors or len(dims) != len(tensors):
            raise ConfigurationError(
                f"shard_sequence got {len(tensors)} tensors and {len(dims)} dims. It takes at least one tensor, and "
                "one dim for all of them or one for each."
            )
        if self._is_dividing:
            raise SetupError(
                "shard_sequence was entered inside of a block of its own. Leave the outer one first."
            )
        rank, ranks = self.mesh[CONTEXT].get_local_rank(), self._sizes[CONTEXT]
        if ranks == 1:
            yield tensors[0] if len(tensors) == 1 else tensors
            return
        parts = tuple(
            sequences.own_part(tensor, d, rank, ranks) for tensor, d in zip(tensors, dims, strict=True)
        )
        self._is_dividing = True
        try:
            with sequences.WholeAttention(self._context_group):
                yield parts[0] if len(parts) == 1 else parts
        finally:
            self._is_dividing = False

    def gather_sequence(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """The whole sequence, of which each rank of a group has the part that `shard_sequence` gives it.

        Called on every rank of a group. Gradients flow back through it.

        Args:
            tensor: This rank's part, of the same shape on each of them.
            dim: Along which dimension it runs.
        """
        return tensor if self._sizes[CONTEXT] == 1 else sequences.gather(tensor, dim, self._context_group)

    @property
    def _context_group(self) -> Any:
        return self.mesh[CONTEXT].get_group()


_INHERITED = tuple(inspect.signature(FSDPStrategy).parameters)
