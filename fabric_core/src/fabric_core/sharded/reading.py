"""Reading a folder: each process reads the chunks that it needs of, each checked, when it needs them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fabric_core.checked import PIECE
from fabric_core.errors import CheckpointError
from fabric_core.memory import for_a_while
from fabric_core.sharded.boxes import Box
from fabric_core.sharded.folders import find
from fabric_core.sharded.manifest import VALUES, Chunk, Entry, Manifest
from fabric_core.sharded.safetensors import SafetensorsFile, open_regular
from fabric_core.sharded.single import WholeTensors
from fabric_core.sharded.stored import StoredTensor, Targets
from fabric_core.sharded.trees import mapped, named
from fabric_core.sharded.writing import sum_of

__all__ = ["ShardedFolder", "read_checkpoint", "verify"]


class ShardedFolder:
    """A finished checkpoint, to be read. Each process reads for itself.

    Args:
        path: Where it is.
        manifest: What has to be in it, where that is known; otherwise it is read.

    Raises:
        CheckpointError: It is not finished, of another version, or not all there.
    """

    needs_file = True

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        self.path = path
        self.manifest = manifest or Manifest.read(path)
        self._files: dict[str, SafetensorsFile] = {}
        for name, entry in self.manifest.files.items():
            with open_regular(path / name) as file:
                size = file.seek(0, 2)
            if size != entry.size:
                raise CheckpointError(
                    f"The checkpoint {str(path)!r} is damaged: {name!r} has {size} bytes and not {entry.size}."
                )

    def at(self, path: Path) -> ShardedFolder:
        """The same in another place."""
        return ShardedFolder(path, self.manifest)

    def values(self, load: Callable[[Path], Any]) -> Any:
        """Everything in the checkpoint, with stored tensors where it lies in shards.

        Args:
            load: Reads ``values.pt``.
        """
        path = self.path / VALUES
        entry = self.manifest.files.get(VALUES)
        if entry is None:
            raise CheckpointError(f"The checkpoint {str(self.path)!r} is damaged: it has no {VALUES!r}.")
        if sum_of(path) != (entry.size, entry.checksum):
            raise CheckpointError(f"The file {str(path)!r} is damaged: its checksum differs.")
        return self._with_stored(load(path))

    def read_into(self, name: str, targets: Targets) -> None:
        """See `Source`. Each checksum is compared."""
        entry = self.manifest.tensors[name]
        wanted: dict[Chunk, list[tuple[Box, Tensor]]] = defaultdict(list)
        for outer, target in targets:
            for chunk in entry.near(outer):
                box = chunk.box.overlap(outer)
                if box is not None:
                    wanted[chunk].append((box, target[box.within(outer)]))
        for chunk, parts in wanted.items():
            self._read_chunk(name, entry, chunk, parts)

    def _read_chunk(self, name: str, entry: Entry, chunk: Chunk, wanted: Targets) -> None:
        """Read what of a chunk is wanted: straight into its place where that is all of it, in one row of memory."""
        file = self._file(chunk.file)
        place = file.places.get(chunk.key)
        if place is None or place.dtype != entry.dtype or place.shape != chunk.box.lengths:
            raise CheckpointError(
                f"The checkpoint {str(self.path)!r} is damaged: {chunk.file!r} does not hold {chunk.key!r} as its "
                f"manifest says, which is part of {name!r}."
            )
        box, target = wanted[0]
        if len(wanted) == 1 and box == chunk.box and _is_row(target, entry.dtype):
            checksum = file.read_into(chunk.key, target.detach())
        else:
            checksum = _read_through(file, chunk, entry.dtype, wanted)
        if checksum != chunk.checksum:
            raise CheckpointError(
                f"The checkpoint {str(self.path)!r} is damaged: the checksum of {chunk.key!r} in {chunk.file!r}, which "
                f"is part of {name!r}, differs."
            )

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            entry = self.manifest.files[name]
            self._files[name] = SafetensorsFile(self.path / name, entry.size, entry.checksum)
        return self._files[name]

    def _with_stored(self, values: Any) -> Any:
        standing = named(values, lambda value: isinstance(value, Tensor) and value.is_meta)
        entries = self.manifest.tensors
        if standing.keys() != entries.keys() or any(
            (tensor.shape, tensor.dtype) != (entries[name].shape, entries[name].dtype)
            for name, tensor in standing.items()
        ):
            raise CheckpointError(
                f"The checkpoint {str(self.path)!r} is damaged: its manifest and its {VALUES} do not name the same "
                "tensors."
            )
        stored = {
            id(tensor): StoredTensor(self, name, tensor.shape, tensor.dtype)
            for name, tensor in standing.items()
        }
        return mapped(values, lambda tensor: stored.get(id(tensor), tensor), Tensor)


def read_checkpoint(path: Path, load: Callable[[Path], Any]) -> Any:
    """A checkpoint, be it a folder of shards or one file.

    Args:
        path: Where it is. A file of safetensors is told by its suffix.
        load: Reads any other file.

    Returns:
        What was saved. What lies in shards comes as `StoredTensor`; `plain` reads it.

    Raises:
        CheckpointError: There is none, or it is damaged.
        UnsafeCheckpointError: It holds more than ``load`` allows.
    """
    folder = find(path)
    if folder is not None:
        return ShardedFolder(folder).values(load)
    return WholeTensors(path).values() if path.suffix == ".safetensors" else load(path)


def verify(path: Path, load: Callable[[Path], Any]) -> None:
    """Read all of a checkpoint, one tensor after the other, and keep nothing. Arguments and errors as above."""
    for stored in named(read_checkpoint(path, load), lambda value: isinstance(value, StoredTensor)).values():
        stored.read()


def _read_through(file: SafetensorsFile, chunk: Chunk, dtype: torch.dtype, wanted: Targets) -> int:
    """Read a chunk through a little memory, and copy from there what is wanted; its checksum."""
    checksum, numel = 0, max(1, PIECE // dtype.itemsize)
    buffer = for_a_while(min(numel, chunk.box.numel), dtype)
    with file.opened(chunk.key) as read:
        for piece in chunk.box.pieces(numel):
            data = buffer[: piece.numel].view(piece.lengths)
            checksum = read(data, checksum)
            for box, target in wanted:
                common = piece.overlap(box)
                if common is not None:
                    target[common.within(box)].copy_(data[common.within(piece)])
    return checksum


def _is_row(target: Tensor, dtype: torch.dtype) -> bool:
    """Whether the bytes of a file can be read into a tensor as they are."""
    return target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
