"""Seeds: one number from which every random stream of a run follows.

The number is kept in this module. The environment variables are read and never written, so nothing leaks into
processes that have no part in the run; whoever starts some that have adds `seed_environment` to theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import os
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from fabric_core.errors import ConfigurationError, WrongTypeError

if TYPE_CHECKING:
    from fabric_core.data.streams import Streams

__all__ = ["current_seed", "seed_also", "seed_environment", "seed_everything"]

SEED_VARIABLE = "FABRIC_SEED"
"""The seed of the run, for processes in which `seed_everything` is not called or is called without a seed."""

WORKERS_VARIABLE = "FABRIC_SEED_WORKERS"
"""``0`` when the seed is not meant for the workers of loaders; counts only together with ``FABRIC_SEED``."""

MAX_SEED = 2**32 - 1
"""The largest seed that every generator takes."""


class _Choice(NamedTuple):
    seed: int
    workers: bool


@dataclass
class _State:
    choice: _Choice | None = None
    others: dict[str, Callable[[int], None]] = field(default_factory=dict)


_state = _State()


def seed_everything(seed: int | None = None, workers: bool = True, verbose: bool = False) -> int:
    """Seed Python, NumPy (if it is installed) and PyTorch on every device. Call it on every rank alike.

    All ranks get the same streams, so that they create the same weights. What has to differ between ranks
    (shares of the data, workers of loaders) is derived from the seed and the rank where it is used.

    Args:
        seed: From 0 to 4294967295. ``None`` takes the seed of an earlier call, else ``FABRIC_SEED``, else 0.
        workers: Also seed the worker processes of loaders that are set up from now on, each differently.
        verbose: Say on the error stream which seed it is.

    Returns:
        The seed.

    Raises:
        WrongTypeError: ``seed`` is no integer.
        ConfigurationError: ``seed`` is out of range, or ``FABRIC_SEED`` holds something else.
    """
    value = (current_seed() or 0) if seed is None else _checked(seed)
    _state.choice = _Choice(value, bool(workers))
    _seed_all(value)
    for seed_other in _state.others.values():
        seed_other(value)
    if verbose:
        sys.stderr.write(f"Seed set to {value}.\n")
    return value


def seed_also(name: str, seed_other: Callable[[int], None]) -> None:
    """Seed what ``torch.manual_seed`` does not reach, whenever the run is seeded. Called by accelerators.

    Args:
        name: Whose numbers they are; a later call with the same name takes the place of an earlier one.
        seed_other: Gets the seed: now, if the run has one already, and at each `seed_everything` from now on.
    """
    _state.others[name] = seed_other
    seed = current_seed()
    if seed is not None:
        seed_other(seed)


def current_seed() -> int | None:
    """The seed of the run: that of the last `seed_everything` here, else ``FABRIC_SEED``, else ``None``."""
    choice = _state.choice or _inherited(os.environ)
    return None if choice is None else choice.seed


def workers_are_seeded() -> bool | None:
    """Whether the run has a seed that is meant for the workers of loaders, too; ``None`` when it has no seed."""
    choice = _state.choice or _inherited(os.environ)
    return None if choice is None else choice.workers


def seed_environment() -> dict[str, str]:
    """The variables by which a process that is started for the same run learns the seed, if there is one."""
    choice = _state.choice or _inherited(os.environ)
    if choice is None:
        return {}
    return {SEED_VARIABLE: str(choice.seed), WORKERS_VARIABLE: str(int(choice.workers))}


def worker_seed(base_seed: int, worker_id: int, rank: int, *more: int) -> int:
    """A seed for one worker of one rank: the same for the same numbers, unrelated for any others.

    Args:
        base_seed: The seed of the run.
        worker_id: The number of the worker within its loader.
        rank: The global rank of the process that the worker belongs to.
        more: Whatever else should make a difference, such as the epoch.

    Returns:
        An integer of 64 bits.
    """
    return mixed(base_seed, worker_id, rank, *more)


def mixed(*numbers: int) -> int:
    """64 bits that follow from some integers: the same for the same, unrelated for any others."""
    text = "/".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def seed_worker(seed: int) -> None:
    """Seed the generators of a worker process with 64 bits."""
    _seed_all(seed)


def seed_sample(seed: int) -> None:
    """Seed what a dataset draws from with 64 bits, in 25 µs: the host's generators; NumPy's with half of the bits."""
    import torch

    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed & MAX_SEED)


class seeded_rng:  # noqa: N801 - used like a function
    """A context with random streams of its own, on the host; the streams outside do not notice.

    Python's, NumPy's (if it is imported) and PyTorch's CPU generator start from the seed. Entering the same
    object again goes on where it was left. An object cannot be entered within itself.

    Example:
        >>> with seeded_rng(7):
        ...     order = torch.randperm(10)  # the same whatever was drawn before

    Args:
        seed: Any integer from 0 to 2**64 - 1.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inside: Streams | None = None
        self._outside: Streams | None = None

    def __enter__(self) -> None:
        from fabric_core.data.streams import Streams

        self._outside = Streams.capture()
        if self._inside is None:
            _seed_host(self._seed)
        else:
            self._inside.restore()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from fabric_core.data.streams import Streams

        self._inside = Streams.capture()
        if self._outside is not None:
            self._outside.restore()


def _seed_all(seed: int) -> None:
    import torch

    with contextlib.suppress(ImportError):
        import numpy  # noqa: F401 - one that is imported later would start from chance
    _seed_host(seed)
    torch.manual_seed(seed)


def _seed_host(seed: int) -> None:
    import torch

    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed if seed <= MAX_SEED else [seed >> 32, seed & MAX_SEED])


def _checked(seed: Any) -> int:
    try:
        if isinstance(seed, bool):
            raise TypeError
        value = operator.index(seed)
    except TypeError:
        raise WrongTypeError(
            f"seed_everything was given {seed!r}, which is a {type(seed).__name__}. "
            f"A seed is an integer from 0 to {MAX_SEED}, or None."
        ) from None
    if not 0 <= value <= MAX_SEED:
        raise ConfigurationError(
            f"seed_everything was given {value}. A seed is an integer from 0 to {MAX_SEED}; "
            f"for a larger one take it modulo {MAX_SEED + 1}."
        )
    return value


def _inherited(environ: Mapping[str, str]) -> _Choice | None:
    text = environ.get(SEED_VARIABLE)
    if not text:
        return None
    if not text.strip().isdecimal() or int(text) > MAX_SEED:
        raise ConfigurationError(
            f"The environment variable {SEED_VARIABLE} is {text!r}, not an integer from 0 to {MAX_SEED}. "
            "Correct the variable, or remove it and call seed_everything(seed)."
        )
    return _Choice(int(text), environ.get(WORKERS_VARIABLE, "1") != "0")
