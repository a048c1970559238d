"""How it is noticed that an order which is made again is another one than before.

[Note: the last index] A place also says which index the body of the loop was given last. If the order that is made
again has another one there, it is another order, and to go on in it would read some samples twice and others never.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from fabric_core.errors import CheckpointError

_MOST_FETCHED_EARLY = 4096


@dataclass(slots=True)
class Drawn:
    """What is remembered of a batch that a sampler has said.

    Attributes:
        batch: Its number among those that were drawn.
        samples: How many are in it.
        index: Of the last of them.
    """

    batch: int
    samples: int
    index: int


class Consumed:
    """What a loop has drawn from its sampler, as far as it may be asked, see [Note: the last index]."""

    def __init__(self) -> None:
        self._drawn: deque[tuple[int, int, int]] = deque(maxlen=_MOST_FETCHED_EARLY)  # as in `Drawn`
        self._batches = -1
        self.last: dict[str, int] | None = None

    def inherit(self, batches: int, last: dict[str, int] | None) -> None:
        """A loop is taken up.

        Args:
            batches: How many count as given to its body.
            last: The ``index`` that was given last, and its ``number`` in the whole order; ``None`` if it is not known.
        """
        self._batches, self.last = batches, last

    def note(self, batch: int, indices: Any) -> None:
        """A batch was drawn. Called for each, so it makes no object of ours."""
        samples = 1
        if isinstance(indices, list) and indices:
            samples, indices = len(indices), indices[-1]
        if isinstance(indices, int):
            self._drawn.append((batch, samples, indices))

    def find(self, batch: int) -> Drawn | None:
        """A batch that was drawn not long ago."""
        return next((Drawn(*drawn) for drawn in self._drawn if drawn[0] == batch), None)

    def is_inherited(self, batches: int) -> bool:
        """Whether the body of a loop that was taken up has been given nothing else yet."""
        return batches == self._batches

    def compare(self, indices: Any, found: bool = True) -> None:
        """Compare the batch that was given last, as it is drawn now, with what it was.

        Args:
            indices: The batch.
            found: Whether there is any.

        Raises:
            CheckpointError: The order is another one.
        """
        drawn = Consumed()
        if found:
            drawn.note(0, indices)
        one = drawn.find(0)
        if self.last is None or (one and one.index == self.last["index"]):
            return
        there = f"that of index {one.index}" if one else "none"
        raise CheckpointError(
            f"The checkpoint was saved in the middle of an epoch, when the sample of index {self.last['index']} had "
            f"been read last; in the order that the sampler makes now, there is {there} in its place. To go on in it "
            "would read some samples twice and others never. Resume with the same sampler and batches, and with a "
            "sampler that draws from the generators of the process, or from a torch.Generator that it calls "
            "'generator', or that has state_dict and load_state_dict. Otherwise resume from a checkpoint between two "
            "epochs, or leave the loader out of the state."
        )
