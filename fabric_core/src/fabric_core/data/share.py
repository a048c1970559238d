"""How the order of an epoch is dealt out to ranks, in batches."""

from __future__ import annotations

from typing import NamedTuple

_SAMPLES_IN_A_BATCH = 2**20


class Share(NamedTuple):
    """How the order of an epoch is dealt out: element k goes to replica k modulo ``replicas``.

    Attributes:
        replicas, rank: Between how many, and which of them this is; (1, 0) where nothing is dealt out.
        size: Elements in a batch; ``None`` when a batch sampler of the user's decides, and an element is a batch.
    """

    replicas: int
    rank: int
    size: int | None

    def elements(self, batches: int) -> int:
        """How many elements of the order all replicas together have consumed after some batches each."""
        return batches * self.replicas * (self.size or 1)

    def numbers(self, begin: int, batch: int) -> tuple[int, int]:
        """The number of the first sample of a batch, and the step to its next ones.

        Args:
            begin: How many elements were consumed before those that are dealt out.
            batch: The number of the batch from there.
        """
        first = begin + self.elements(batch) + self.rank
        return (first * _SAMPLES_IN_A_BATCH, 1) if self.size is None else (first, self.replicas)
