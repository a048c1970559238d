"""Checkpoints in pieces: a folder to which every rank writes what it holds, and from which any number of ranks reads.

DeepSpeed's own checkpoints are pickles that execute code when they are read, and fit the number of ranks that wrote
them. Here a piece is a row of numbers with its place in the whole tensor, written by ``torch.save`` and read with
``weights_only=True``. Beside the pieces there is one file with everything else (a tensor on the meta device stands for
each that is in pieces), and a manifest, written last: a folder without it is not finished.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fabric_backends.sharding import folder as folders
from fabric_backends.sharding.tensors import mapped, named_tensors
from fabric_core.errors import CheckpointError, UnsafeCheckpointError

_FILES = "pieces-*.pt"


@dataclass(frozen=True)
class Piece:
    """What this rank holds of a tensor.

    Attributes:
        data: A row of numbers; may be empty.
        offset: Where in the whole it begins.
        shape: Of the whole.
    """

    data: Tensor
    offset: int
    shape: torch.Size

    def whole(self) -> Tensor:
        """All of the tensor, on the device of the piece. Called on every rank, in the same order."""
        full = torch.zeros(self.shape.numel(), dtype=self.data.dtype, device=self.data.device)
        full[self.offset : self.offset + self.data.numel()] = self.data
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(full)
        return full.view(self.shape)


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a folder in pieces, and is read when it is needed.

    Attributes:
        pieces: Where each begins, and its numbers, which are on the disk until they are looked at.
        shape, dtype: Of the whole.
    """

    pieces: tuple[tuple[int, Tensor], ...]
    shape: torch.Size
    dtype: torch.dtype

    def read(self, begin: int = 0, length: int | None = None) -> Tensor:
        """A part of it, in a row, on the CPU."""
        length = self.shape.numel() - begin if length is None else length
        part = torch.empty(length, dtype=self.dtype)
        for offset, data in self.pieces:
            start, end = max(begin, offset), min(begin + length, offset + data.numel())
            if start < end:
                part[start - begin : end - begin] = data[start - offset : end - offset]
        return part

    def whole(self) -> Tensor:
        """All of it, on the CPU."""
        return self.read().view(self.shape)


def has_pieces(tree: Any) -> bool:
    """Whether anything in a checkpoint is in pieces; the same on every rank."""
    return bool(_list(tree))


def write_pieces(folder: Path, rank: int, tree: Any) -> None:
    """Write what this rank holds. Called on every rank, in a folder that is there."""
    names = named_tensors(without_pieces(tree), lambda tensor: tensor.is_meta)
    content = {
        name: {"offset": piece.offset, "data": piece.data.detach().cpu().clone()}
        for name, piece in zip(names, _list(tree), strict=True)
        if piece.data.numel()
    }
    torch.save(content, folder / _FILES.replace("*", f"{rank:06d}"))


def without_pieces(tree: Any) -> Any:
    """The same with tensors on the meta device in the place of pieces."""
    return mapped(
        tree, lambda piece: torch.empty(piece.shape, dtype=piece.data.dtype, device="meta"), (Piece,)
    )


def with_stored(values: Any, folder: Path, weights_only: bool) -> Any:
    """What `without_pieces` gave, with stored tensors in the place of what stands for them.

    Raises:
        CheckpointError: Something is damaged or missing.
        UnsafeCheckpointError: A file holds more than tensors.
    """
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for path in sorted(folder.glob(_FILES)):
        for name, entry in _read(path, weights_only).items():
            found.setdefault(name, []).append((int(entry["offset"]), entry["data"]))
    standing = named_tensors(values, lambda tensor: tensor.is_meta)
    stored = {}
    for name, tensor in standing.items():
        pieces = tuple(sorted(found.get(name, ()), key=lambda piece: piece[0]))
        there = sum(data.numel() for _, data in pieces)
        if there != tensor.numel():
            raise CheckpointError(
                f"The checkpoint {str(folder)!r} is damaged: of {name!r}, it has {there} of {tensor.numel()} numbers."
            )
        stored[id(tensor)] = Stored(pieces, tensor.shape, tensor.dtype)
    return mapped(values, lambda tensor: stored.get(id(tensor), tensor))


def plain(tree: Any) -> Any:
    """The same with whole tensors in the place of what is stored in pieces."""
    return mapped(
        tree,
        lambda value: value.whole() if isinstance(value, Stored) else value.read(),
        (Stored, folders.StoredTensor),
    )


def shape_of(value: Any) -> torch.Size | None:
    """The shape of a tensor, stored or not; ``None`` for anything else."""
    return value.shape if isinstance(value, Tensor | Stored | folders.StoredTensor) else None


def cut(value: Any, begin: int, length: int) -> Tensor:
    """A part of a tensor, stored or not, in a row."""
    if isinstance(value, Stored):
        return value.read(begin, length)
    tensor: Tensor = value.read() if isinstance(value, folders.StoredTensor) else value
    return tensor.detach().reshape(-1)[begin : begin + length]


def _list(tree: Any) -> list[Piece]:
    found: list[Piece] = []
    mapped(tree, found.append, (Piece,))
    return found


def _read(path: Path, weights_only: bool) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    except Exception as error:  # what is damaged fails in any way
        asked = list(_globals(path)) if weights_only else []
        if asked:
            raise UnsafeCheckpointError(
                f"The checkpoint file {str(path)!r} was not loaded, because it holds more than tensors: "
                f"{', '.join(asked)}. Loading that can execute code. If you trust whoever wrote it, load it with "
                "weights_only=False."
            ) from error
        raise CheckpointError(
            f"The checkpoint file {str(path)!r} cannot be read; it is damaged ({type(error).__name__}: {error})."
        ) from error
    return content


def _globals(path: Path) -> Iterator[str]:
    try:
        yield from torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it is no file of torch.save
        return
