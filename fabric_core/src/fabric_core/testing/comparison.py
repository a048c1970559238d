"""How near to the plain loop a training has to come."""

from __future__ import annotations

import functools
import math

import torch

from fabric_core.testing.plain_loop import (
    AUTOCAST,
    DTYPES,
    Build,
    Case,
    Net,
    Parameters,
    Trained,
    difference,
    moved,
    train_plain,
)

HALVES = {*DTYPES, *AUTOCAST} - {"64-true"}
FLOAT32_TOLERANCE = 1e-5
HALF_TOLERANCE = 0.02  # of how far training moved: what the rounding of half precision leaves open
TRUE_TOLERANCE = 0.05  # likewise, where each of twenty updates is rounded to half precision, too
LAST_DIGITS = 2  # what rounding once the other way does to a weight, and to what it is subtracted from next

plain_result = functools.lru_cache(maxsize=128)(train_plain)
"""What `train_plain` returns, which many strategies are compared with; it must not be changed."""


def judge(
    case: Case, trained: Trained, shares: int, *, master: bool = False, build: Build = Net
) -> tuple[float, float]:
    """The largest difference to the plain loop, of losses and parameters; and the largest that is allowed.

    Arguments as `train_plain`.
    """
    plain = plain_result(case, shares, master, build)
    distance = distance_moved(plain, case, build)
    found = max(between(trained.losses, plain.losses), difference(trained.parameters, plain.parameters))
    return found, allowed(case.precision, distance, plain.parameters, master=master)


def distance_moved(plain: Trained, case: Case, build: Build = Net) -> float:
    """How far the plain loop went, which has to be far enough."""
    distance = moved(plain.parameters, case, build)
    assert distance > 1e-2, "training moved too little to compare anything"
    return distance


def between(found: list[float], expected: list[float]) -> float:
    """The largest difference of two rows of numbers, relative to the largest of them where that is above 1."""
    assert len(found) == len(expected), f"there are {len(found)} of them, and not {len(expected)}"
    scale = max(1.0, *map(abs, expected))
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) / scale


def allowed(precision: str, distance: float, parameters: Parameters, *, master: bool = False) -> float:
    """The largest difference to the plain loop that is left open.

    Args:
        precision: The name of the precision.
        distance: How far training moved.
        parameters: Those of the plain loop at the end.
        master: Whether weights in half precision are updated in float32.
    """
    if precision not in HALVES:
        return FLOAT32_TOLERANCE
    if precision not in DTYPES or master:
        return HALF_TOLERANCE * distance
    largest = max(float(value.abs().max()) for value in parameters.values())
    digit = torch.finfo(DTYPES[precision]).eps * 2.0 ** math.floor(math.log2(largest))
    return max(TRUE_TOLERANCE * distance, LAST_DIGITS * digit)
