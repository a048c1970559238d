"""Context parallel: long sequences are divided within groups of ranks, and so is what is computed along them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fabric_backends import sequences
from fabric_backends.hooks import CONTEXT_PARALLEL
from fabric_backends.meshes import CONTEXT, Size
from fabric_backends.strategies.fsdp import FSDPStrategy
from fabric_backends.strategies.grouped import GroupedStrategy
from fabric_core.errors import ConfigurationError, SetupError, unknown_option


class ContextParallelStrategy(GroupedStrategy, FSDPStrategy):
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
    axis = CONTEXT

    def __init__(
        self, *, data_parallel_size: Size = "auto", context_parallel_size: Size = "auto", **options: Any
    ) -> None:
        for name in options:
            if name not in _INHERITED:
                own = ("data_parallel_size", "context_parallel_size")
                raise unknown_option("The strategy 'context_parallel'", name, (*own, *_INHERITED))
        super().__init__(**options)
        self.ask_for(data_parallel_size, context_parallel_size)
        self._is_dividing = False

    # -- sequences ------------------------------------------------------------------------------------------------

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
        rank, ranks = self.mesh[CONTEXT].get_local_rank(), self.group_size
        if ranks == 1:
            yield tensors[0] if len(tensors) == 1 else tensors
            return
        parts = tuple(
            sequences.own_part(tensor, d, rank, ranks) for tensor, d in zip(tensors, dims, strict=True)
        )
        self._is_dividing = True
        try:
            with sequences.WholeAttention(self.group):
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
        return tensor if self.group_size == 1 else sequences.gather(tensor, dim, self.group)


_INHERITED = tuple(inspect.signature(FSDPStrategy).parameters)
