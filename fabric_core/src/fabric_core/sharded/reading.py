"""Reading a folder: each process reads the chunks that it needs of, each checked, when it needs them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fabric_core.checked import PIECE
from fabric_core.errors import CheckpointError
from fabric_core.memory import for_a_while, in_large_pages
from fabric_core.sharded.boxes import Box, boxes_of_row, whole_box
from fabric_core.sharded.folders import find
from fabric_core.sharded.manifest import VALUES, Chunk, Entry, Manifest
from fabric_core.sharded.safetensors import SafetensorsFile, open_regular
from fabric_core.sharded.trees import mapped, named
from fabric_core.sharded.writing import sum_of

__all__ = [
    "Begin",
    "MappedTensors",
    "ShardedFolder",
    "StoredTensor",
    "plain",
    "read_checkpoint",
    "reading",
    "verify",
]


READERS = 2
"""Threads that read at once."""
Targets = Sequence[tuple[Box, Tensor]]
"""Parts of a tensor, and where each is to go."""

Begin = Callable[..., None]
"""Calls a function that reads with its arguments, now or later."""


def _at_once(read: Callable[..., None], *arguments: Any) -> None:
    read(*arguments)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a folder or a file, and is read when it is needed.

    Reading raises a `CheckpointError` when a checksum differs, or a file is no longer what it was.
    """

    source: ShardedFolder | WholeTensors | MappedTensors
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
        """Read parts of a tensor.

        Args:
            name: Of the tensor.
            targets: Which parts, each with a plain tensor of the box's shape, on any device.

        Raises:
            CheckpointError: A checksum differs, or a file is not what it was.
        """
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


class WholeTensors:
    """A file of safetensors, of any program, whose tensors are read one by one.

    It holds no checksums, by which another file in its place would be known; so each time it is asked whether it is the
    same.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """

    needs_file = True

    def __init__(self, path: Path) -> None:
        self._seen = _identity(path)
        self._file = SafetensorsFile(path.resolve())

    def at(self, path: Path) -> WholeTensors:
        """The same in another place."""
        return WholeTensors(path)

    def values(self) -> dict[str, StoredTensor]:
        """All of them, by name."""
        return {
            name: StoredTensor(self, name, torch.Size(place.shape), place.dtype)
            for name, place in self._file.places.items()
        }

    def read_into(self, name: str, targets: Targets) -> None:
        """As `ShardedFolder.read_into`."""
        if (now := _identity(self._file.path)) and now != self._seen:
            raise CheckpointError(f"The file {str(self._file.path)!r} is another one than was loaded.")
        whole = self._file.read(name)
        for box, target in targets:
            target.copy_(whole[box.within(whole_box(whole.shape))])


class MappedTensors:
    """A file of ``torch.save`` that is mapped into memory, of whose tensors parts are copied when they are needed.

    A mapping shows what is written to the file meanwhile, and a file that is cut short ends the process that looks. So
    whether it is the same is asked each time. One that was renamed or deleted stays what it was.

    Args:
        path: Of the file. Made before it is mapped.
    """

    needs_file = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = _identity(path)
        self._tensors: list[Tensor] = []

    def stored(self, tree: Any) -> Any:
        """The same as what was loaded, with stored tensors in the place of plain ones."""
        return mapped(tree, self._stored, Tensor)

    def at(self, path: Path) -> MappedTensors:
        """The same: what is mapped is there, wherever its file is."""
        return self

    def read_into(self, name: str, targets: Targets) -> None:
        """As `ShardedFolder.read_into`."""
        now = _identity(self._path)
        if now[:2] == self._seen[:2] and now != self._seen:
            raise CheckpointError(f"The file {str(self._path)!r} was written to since it was loaded.")
        whole = self._tensors[int(name)]
        for box, target in targets:
            target.copy_(whole[box.within(whole_box(whole.shape))])

    def _stored(self, tensor: Tensor) -> Any:
        plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.is_contiguous()
        if not plain or not tensor.dim() or not tensor.numel():
            return tensor
        self._tensors.append(tensor)
        return StoredTensor(self, str(len(self._tensors) - 1), tensor.shape, tensor.dtype)


def _identity(path: Path) -> tuple[int, ...]:
    """Which file it is, first, then what changes when it is written to; nothing when there is none."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return ()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


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


def plain(tree: Any) -> Any:
    """The same with whole tensors, on the CPU, in the place of stored ones."""
    if not named(tree, lambda value: isinstance(value, StoredTensor)):
        return tree
    with reading() as begin:
        return mapped(tree, lambda stored: stored.read(begin), StoredTensor)
