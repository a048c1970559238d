"""Copying batches to a device while it computes.

[Note: two streams] Work on a device is ordered within a stream. A batch that is copied on the stream on which the model
computes waits for the step before it, and the next step waits for the copy. On a stream of its own, a copy runs beside
the computation, if it starts from pinned memory. Three things then have to be said that are otherwise implied: the
computation waits for the copy's event; the memory of the copy belongs to the other stream, and must not be used again
before the computation is done with it (``record_stream``); and only tensors that lie on the host may be copied like
that, since those on a device may not be finished yet.

[Note: one batch ahead] Where worker processes fetch the batches, they are ahead of the loop anyway, and one more batch
is taken from them and copied while the loop works on the one before. Where the loop's own process fetches them,
nothing is asked for early: a dataset that draws random numbers, or counts what it has yielded, would do so in another
order than in a plain loop. Nor is it where the iterator has a state to be saved, in which a batch that waits here would
count as used. The copy of its turn then still runs beside whatever the device has left to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fabric_core.data.collections import map_tensors

Move = Callable[[Any], Any]


def overlapped(batches: Iterator[Any], move: Move, device: torch.device) -> Iterator[Any]:
    """Hand out batches on a device, copied on a stream of their own.

    Args:
        batches: As the loader gives them.
        move: Moves one batch to ``device``; takes care of whatever is no plain tensor on the host.
        device: Where to; the current device of this process.

    Returns:
        The same batches in the same order. What fetching a batch raises is raised when it is the turn of that batch.
    """
    copier = _Copier(move, device)
    # Set by PyTorch's own iterators over a DataLoader. Whatever lacks it fetches in this process.
    has_workers = getattr(batches, "_num_workers", 0) > 0
    if has_workers and not hasattr(batches, "state_dict"):
        return _ahead(batches, copier)
    return (copier.finish(copier.start(batch)) for batch in batches)


def _ahead(batches: Iterator[Any], copier: _Copier) -> Iterator[Any]:
    """See [Note: one batch ahead]."""
    turn = copier.fetch(batches)
    while turn is not None:
        following = copier.fetch(batches) if isinstance(turn, _Copying) else None
        yield copier.finish(turn)
        turn = following


@dataclass
class _Copying:
    """A batch on its way.

    Attributes:
        batch: It, with the copies in place of the tensors on the host.
        copies: Those copies.
        done: Happens when they are complete.
    """

    batch: Any
    copies: list[Tensor]
    done: torch.cuda.Event


class _Copier:
    """Copies batches on a stream of its own; see [Note: two streams]."""

    def __init__(self, move: Move, device: torch.device) -> None:
        self._move = move
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fetch(self, batches: Iterator[Any]) -> _Copying | Exception | None:
        """Take the next batch and start its copy; ``None`` when there is none. An error waits for its turn."""
        try:
            return self.start(next(batches))
        except StopIteration:
            return None
        except Exception as error:
            return error

    def start(self, batch: Any) -> _Copying:
        """Start the copy of a batch, and return at once."""
        copies: list[Tensor] = []

        def copy(tensor: Tensor) -> Tensor:
            if not _lies_on_host(tensor):
                return tensor
            pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
            copies.append(pinned.to(self._device, non_blocking=True))
            return copies[-1]

        with torch.cuda.stream(self._stream):
            there = map_tensors(copy, batch, into_movable=False)
        return _Copying(there, copies, self._stream.record_event())

    def finish(self, turn: _Copying | Exception) -> Any:
        """A batch that the current stream may use: what it computes from now on waits for the copy."""
        if isinstance(turn, Exception):
            raise turn
        current = torch.cuda.current_stream(self._device)
        current.wait_event(turn.done)
        for tensor in turn.copies:
            tensor.record_stream(current)
        return self._move(turn.batch)


def _lies_on_host(tensor: Tensor) -> bool:
    """Whether it can be pinned and copied as it is: plain, dense, no part of a graph."""
    plain = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_quantized
    return plain and tensor.is_cpu and not tensor.requires_grad
