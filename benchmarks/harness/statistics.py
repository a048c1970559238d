"""Medians, minima and paired ratios. Nothing here knows what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


def paired_ratio(values: Sequence[float], plain: Sequence[float]) -> float:
    """The median of the ratios of each round: what slows a whole round down slows both alike, and drops out."""
    return median(value / base for value, base in zip(values, plain, strict=True))


def paired_difference(values: Sequence[float], plain: Sequence[float]) -> float:
    """The median of the differences of each round."""
    return median(value - base for value, base in zip(values, plain, strict=True))


def turns(names: Sequence[str], rounds: int) -> list[list[str]]:
    """Who comes when: A B C, B C A, C A B, …, so that nobody always follows the same one."""
    return [[names[(start + i) % len(names)] for i in range(len(names))] for start in range(rounds)]
