"""Tensors that lie in a folder or a file, and are read when somebody needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fabric_core.memory import in_large_pages
from fabric_core.sharded.boxes import Box, boxes_of_row, whole_box
from fabric_core.sharded.trees import mapped, named

__all__ = ["Begin", "Source", "StoredTensor", "Targets", "plain", "reading"]

READERS = 2
"""Threads that read at once."""

Targets = Sequence[tuple[Box, Tensor]]
"""Parts of a tensor, and where each is to go."""

Begin = Callable[..., None]
"""Calls a function that reads with its arguments, now or later."""


class Source(Protocol):
    """A folder or a file that is open.

    Attributes:
        needs_file: Whether it has to be there still when something is read.
    """

    needs_file: bool

    def at(self, path: Path) -> Source:
        """The same in another place."""

    def read_into(self, name: str, targets: Targets) -> None:
        """Read parts of a tensor.

        Args:
            name: Of the tensor.
            targets: Which parts, each with a plain tensor of the box's shape, on any device.

        Raises:
            CheckpointError: It is not there any more, another one, or damaged.
        """


def _at_once(read: Callable[..., None], *arguments: Any) -> None:
    read(*arguments)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a folder or a file, and is read when it is needed.

    Reading raises a `CheckpointError` when a checksum differs, or a file is no longer what it was.
    """

    source: Source
    name: str
    shape: torch.Size
    dtype: torch.dtype

    def read(self, begin: Begin = _at_once) -> Tensor:
        """All of it, on the CPU.

        Args:
            begin: What `reading` yields, if it may be there later only.
        """
        tensor = in_large_pages(torch.empty(self.shape, dtype=self.dtype, device="cpu"))
        begin(self.read_into, [(whole_box(self.shape), tensor)])
        return tensor

    def read_row(self, begin: int, length: int) -> Tensor:
        """A row of elements, counted in the order of memory, on the CPU."""
        row, done, targets = torch.empty(length, dtype=self.dtype, device="cpu"), 0, []
        for box in boxes_of_row(self.shape, begin, length):
            targets.append((box, row[done : done + box.numel].view(box.lengths)))
            done += box.numel
        self.read_into(targets)
        return row

    def read_into(self, targets: Targets) -> None:
        """Read parts of it into plain tensors, each of its box's shape, on any device."""
        self.source.read_into(self.name, targets)


@contextmanager
def reading() -> Iterator[Begin]:
    """Read several tensors at once.

    Yields:
        What begins to read. At the end of the block everything has been read.

    Raises:
        CheckpointError: What the first one has raised that failed.
    """
    begun: list[Future[None]] = []
    with ThreadPoolExecutor(READERS, "fabric-reading") as pool:
        yield lambda read, *arguments: begun.append(pool.submit(read, *arguments))
        for each in begun:
            each.result()


def plain(tree: Any) -> Any:
    """The same with whole tensors, on the CPU, in the place of stored ones."""
    if not named(tree, lambda value: isinstance(value, StoredTensor)):
        return tree
    with reading() as begin:
        return mapped(tree, lambda stored: stored.read(begin), StoredTensor)
