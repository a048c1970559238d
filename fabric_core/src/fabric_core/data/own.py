"""What a loader that was set up knows about itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fabric_core.data.iteration import LoaderTracker
from fabric_core.data.order import Indices, Order


@dataclass
class Own:
    """What a loader that was set up has to itself, beside the attributes that it shares with the user's.

    Attributes:
        source: The loader as the user gave it. Kept, because its class may clean up when it dies.
        device, transfer: Where batches go, and how; ``None`` when they stay.
        rank, number: Which reader of the data this is, and which of its loaders.
        seed: From which the seeds of samples and workers follow; ``None`` when each loop draws one.
        seeds_samples: Whether samples and workers are seeded; else they are as PyTorch leaves them.
        next_epoch: The epoch of the next loop.
        chosen: Whether the user set ``next_epoch``.
        announced: The epoch that samplers and dataset were told last.
        heard: What the first of them said its epoch was afterwards.
        order: Of the loop that began last, or that fetches now.
        batches: What the loop hands out that began last.
        serves: The loop that uses the loader's persistent workers.
        indices: What takes the place of the sampler while an iterator is made.
        dealer: Decides the batches in place of the sampler, and its seed: where one rank goes on with an order that
            several had.
        resumed: The state that the next loop goes on from.
        had_workers: Whether persistent workers were there, where the next loop has to start some.
    """

    source: Any
    device: torch.device | None
    transfer: Callable[[Iterator[Any]], Iterator[Any]] | None
    tracker: LoaderTracker
    rank: int
    number: int
    seed: int | None
    seeds_samples: bool
    next_epoch: int = 0
    chosen: bool = False
    announced: int | None = None
    heard: int | None = None
    order: Order | None = field(default=None, repr=False)
    batches: weakref.ref[Generator[Any, None, None]] | None = field(default=None, repr=False)
    serves: weakref.ref[Generator[Any, None, None]] | None = field(default=None, repr=False)
    indices: Indices | None = None
    dealer: tuple[Any, int] | None = None
    resumed: dict[str, Any] | None = field(default=None, repr=False)
    had_workers: bool = False
