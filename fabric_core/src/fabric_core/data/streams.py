"""The random numbers of this process: what they are at one moment, as values that a checkpoint can hold.

Python's, NumPy's (once it is imported), those of PyTorch on the host, and generators of the user's.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Generators = Sequence[torch.Generator]


class Streams(NamedTuple):
    """The states of the generators on the host.

    Attributes:
        python, numpy: What ``getstate`` and ``get_state`` say; ``None`` when they were not asked, and for NumPy when it
            is not there, or when its generator was replaced by one of another kind.
        torch: uint8, one dimension.
        generators: The same for generators of the user's.
    """

    python: Any
    numpy: Any
    torch: Tensor
    generators: tuple[Tensor, ...] = ()

    @classmethod
    def capture(cls, generators: Generators = (), *, torch_only: bool = False) -> Streams:
        """The states now.

        Args:
            generators: The user's.
            torch_only: Leave Python's and NumPy's out, which takes a hundred times as long.
        """
        own = torch.default_generator.get_state(), tuple(generator.get_state() for generator in generators)
        if torch_only:
            return cls(None, None, *own)
        numpy = sys.modules.get("numpy")
        legacy = numpy and numpy.random.get_state()
        return cls(
            random.getstate(),
            legacy if isinstance(legacy, tuple) else None,
            *own,
        )

    def restore(self, generators: Generators = ()) -> None:
        """Put the states back; those of ``generators`` in the order in which they were captured."""
        if self.python is not None:
            random.setstate(self.python)
        torch.default_generator.set_state(self.torch)
        if self.numpy is not None:
            import numpy

            numpy.random.set_state(self.numpy)
        for generator, state in zip(generators, self.generators, strict=False):
            generator.set_state(state)

    def fingerprint(self) -> int:
        """64 bits that follow from PyTorch's states alone, and change when anything is drawn from them."""
        states = b"".join(state.numpy().tobytes() for state in (self.torch, *self.generators))
        return int.from_bytes(hashlib.blake2b(states, digest_size=8).digest(), "big")

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        state: dict[str, Any] = {"torch": self.torch, "generators": list(self.generators)}
        if self.python is not None:
            _, words, gauss = self.python
            state["python"] = {"words": torch.tensor(words, device="cpu"), "gauss": gauss}
        if self.numpy is not None:
            _, keys, position, has_gauss, cached = self.numpy
            state["numpy"] = {
                "words": torch.tensor(keys.tolist(), device="cpu"),
                "position": int(position),
                "has_gauss": int(has_gauss),
                "gauss": float(cached),
            }
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Streams:
        """What `state_dict` gave."""
        python, numpy = state.get("python"), state.get("numpy")
        legacy = numpy and (
            "MT19937",
            numpy["words"].to(torch.int64).numpy().astype("uint32"),
            *(numpy[name] for name in ("position", "has_gauss", "gauss")),
        )
        return cls(
            python and (random.getstate()[0], tuple(python["words"].tolist()), python["gauss"]),
            legacy,
            state["torch"],
            tuple(state["generators"]),
        )


@contextlib.contextmanager
def preserved(generators: Generators = ()) -> Iterator[None]:
    """What happens inside draws no number from the streams outside."""
    outside = Streams.capture(generators)
    try:
        yield
    finally:
        outside.restore(generators)
