"""Boxes: the parts of a tensor that ranks hold, as offsets and lengths in each dimension."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

__all__ = ["Box", "boxes_of_row", "whole_box"]

MOST_CUTS = 8
"""Along how many dimensions a tensor may be cut."""


@dataclass(frozen=True)
class Box:
    """A part of a tensor.

    Attributes:
        offsets: Where it begins, in each dimension.
        lengths: How long it is, in each dimension.
    """

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.lengths)

    def overlap(self, other: Box) -> Box | None:
        """What two boxes of one tensor have in common; ``None`` when that is nothing."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = map(min, self.ends(), other.ends())
        lengths = tuple(end - offset for end, offset in zip(ends, offsets, strict=True))
        return Box(offsets, lengths) if all(length > 0 for length in lengths) else None

    def ends(self) -> tuple[int, ...]:
        """Where it ends, in each dimension: the first index that is no longer in it."""
        return tuple(map(sum, zip(self.offsets, self.lengths, strict=True)))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where it is in a tensor that holds another box, in which it lies."""
        return tuple(
            slice(begin - start, begin - start + length)
            for begin, start, length in zip(self.offsets, outer.offsets, self.lengths, strict=True)
        )

    def pieces(self, numel: int) -> Iterator[Box]:
        """The same in boxes of at most so many elements, cut so that each is a row of the memory of this one."""
        dim = next((dim for dim, length in enumerate(self.lengths) if length > 1), None)
        if self.numel <= numel or dim is None:
            yield self
            return
        length = self.lengths[dim]
        step = max(1, numel // (self.numel // length))
        for start in range(0, length, step):
            piece = Box(
                _replaced(self.offsets, dim, self.offsets[dim] + start),
                _replaced(self.lengths, dim, min(step, length - start)),
            )
            yield from piece.pieces(numel)


def whole_box(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def boxes_of_row(shape: Sequence[int], begin: int, length: int) -> list[Box]:
    """The boxes that a row of elements of a tensor consists of, in the order of memory: at most 2 * dimensions - 1.

    Args:
        shape: Of the tensor.
        begin: The first element, counted in the order of memory.
        length: How many there are; may be 0.
    """
    return [Box(*box) for box in _row(tuple(shape), begin, begin + length)] if length else []


def tile(shape: Sequence[int], boxes: Iterable[Box]) -> bool:
    """Whether boxes inside of a tensor cover it, each element once.

    The corners of a box, with alternating signs, determine where it is; so the corners of boxes that cover the whole
    cancel each other, all but its own.

    Args:
        shape: Of the tensor.
        boxes: None of them empty.
    """
    known = list(boxes)
    if not math.prod(shape):
        return not known
    sides = [
        {(box.offsets[dim], box.lengths[dim]) for box in known} - {(0, size)}
        for dim, size in enumerate(shape)
    ]
    cut = [dim for dim, parts in enumerate(sides) if parts]
    if len(cut) > MOST_CUTS or not known:
        return False
    if len(cut) == 1:  # as most tensors are: one part after the other
        return _follow(((box.offsets[cut[0]], box.lengths[cut[0]]) for box in known), shape[cut[0]])
    corners: Counter[tuple[int, ...]] = Counter()
    for box, sign in (*((box, 1) for box in known), (whole_box(shape), -1)):
        ends = [((box.offsets[dim], 1), (box.offsets[dim] + box.lengths[dim], -1)) for dim in cut]
        for corner in product(*ends):
            corners[tuple(place for place, _ in corner)] += sign * math.prod(turn for _, turn in corner)
    return not any(corners.values())


def _follow(parts: Iterable[tuple[int, int]], size: int) -> bool:
    """Whether parts of a line, as offsets and lengths, make the whole one after the other."""
    end = 0
    for begin, length in sorted(parts):
        if begin != end:
            return False
        end += length
    return end == size


def _row(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and lengths: the end of a first row, whole rows, the beginning of a last one."""
    if not shape:
        yield (), ()
        return
    size = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(begin, size), divmod(end, size)
    if first == last:
        yield from _below(first, _row(shape[1:], head, tail))
        return
    if head:
        yield from _below(first, _row(shape[1:], head, size))
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if tail:
        yield from _below(last, _row(shape[1:], 0, tail))


def _below(
    index: int, boxes: Iterator[tuple[tuple[int, ...], tuple[int, ...]]]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, lengths in boxes:
        yield (index, *offsets), (1, *lengths)


def _replaced(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])
