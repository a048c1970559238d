"""Collectives: talking to the other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fabric_core.collectives import each_tensor, reducible
from fabric_core.collectives import reduce_op as reduce_op_named
from fabric_core.contracts.store import read_when_there
from fabric_core.errors import ConfigurationError, SetupError
from fabric_core.verbs.life import Life

T = TypeVar("T")


class Talking(Life):
    """What is exchanged between the ranks."""

    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank is here. Called on every rank.

        Args:
            name: What is waited for, for messages.
        """
        self._require_launched("barrier")
        self.strategy.barrier(name)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Send an object from global rank ``src`` to all. Called on every rank.

        Args:
            obj: A tensor, or anything that can be pickled; the other ranks may pass anything.
            src: Whose object.

        Returns:
            The object of rank ``src``.
        """
        self._require_launched("broadcast")
        if not 0 <= src < self.world_size:
            raise ConfigurationError(f"broadcast(src={src}): there are ranks 0 to {self.world_size - 1}.")
        result: T = self.strategy.broadcast(obj, src)
        return result

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        r"""Collect tensors or numbers from every rank. Called on every rank (of ``group``).

        Args:
            data: A tensor of any shape S, the same on every rank, a number, or a collection of them.
            group: A ``torch.distributed`` process group; all ranks by default.
            sync_grads: Let gradients flow back to the ranks.

        Returns:
            The same collection, each tensor of shape (ranks, \*S), in rank order; with one rank too.
        """
        if not self._connected:
            self._require_launched("all_gather")
        strategy = self._parts.strategy
        return each_tensor(
            data, strategy.root_device, lambda tensor: strategy.all_gather(tensor, group, sync_grads)
        )

    def all_reduce(self, data: Any, group: Any = None, reduce_op: str = "mean") -> Any:
        """Reduce tensors or numbers over every rank. Called on every rank (of ``group``).

        Args:
            data: A tensor of any shape, the same on every rank, a number, or a collection of them. It is not changed.
            group: A ``torch.distributed`` process group; all ranks by default.
            reduce_op: ``"mean"``, ``"sum"``, ``"min"``, ``"max"`` or ``"product"``.

        Returns:
            The same collection, equal on every rank. Means of whole numbers are float64, sums of booleans int64.
        """
        if not self._connected:
            self._require_launched("all_reduce")
        op, strategy = reduce_op_named(reduce_op), self._parts.strategy
        return each_tensor(
            data,
            strategy.root_device,
            lambda tensor: strategy.all_reduce(reducible(tensor, op), op, group),
        )

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """A block that rank 0 runs before all others, for a download or a cache. Called on every rank.

        When rank 0 fails in it, the others do not run it; they fail as well.

        Args:
            local: Let rank 0 of each node go first, for files that nodes do not share.

        Raises:
            SetupError: On the other ranks, when rank 0 has failed.
        """
        self._require_launched("rank_zero_first")
        store = self.strategy.store
        self._turns += 1
        key = f"fabric/first/{self._turns}/{self.node_rank if local else 0}"
        if store is None:
            yield
        elif (self.local_rank if local else self.global_rank) == 0:
            try:
                yield
            except BaseException as error:
                store.set(key, f"{type(error).__name__}: {error}")
                raise
            store.set(key, "")
        else:
            failure = read_when_there(store, key)
            if failure:
                raise SetupError(
                    f"rank_zero_first: rank 0 failed in the block, so it is not run here. {failure}"
                )
            yield
