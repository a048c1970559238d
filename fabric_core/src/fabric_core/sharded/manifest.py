"""The manifest of a folder: read without trust, so that what it says is right before anything is read by it."""

from __future__ import annotations

import json
import math
import os
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fabric_core.checked import crc32
from fabric_core.errors import CheckpointError
from fabric_core.manifest import LARGEST, MANIFEST, check_format, parsed
from fabric_core.sharded.boxes import Box, tile
from fabric_core.sharded.dtypes import DTYPES, NAMES
from fabric_core.sharded.safetensors import LARGEST_SIZE, open_regular

VALUES = "values.pt"
"""The file of a folder that holds everything that lies in no shard."""

FORMAT, VERSION = "fabric-shards", 1

_FILE = re.compile(r"shard-\d{6,9}\.safetensors|values\.pt")
_SUM = "checksum"


@dataclass(frozen=True)
class FileEntry:
    """A file: how many bytes it has, and the checksum of those that are in no chunk."""

    size: int
    checksum: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: its file, what it is called in there, and the checksum of its bytes."""

    box: Box
    file: str
    key: str
    checksum: int


@dataclass(frozen=True)
class Entry:
    """A tensor, and the chunks that cover it, each element once."""

    dtype: torch.dtype
    shape: torch.Size
    chunks: tuple[Chunk, ...]

    def near(self, box: Box) -> Sequence[Chunk]:
        """The chunks that may have something in common with a box; one of many is found without looking at all."""
        if not box.offsets:
            return self.chunks
        dim, begins, longest, chunks = self._in_order
        first = bisect_right(begins, box.offsets[dim] - longest)
        return chunks[first : bisect_left(begins, box.offsets[dim] + box.lengths[dim])]

    @cached_property
    def _in_order(self) -> tuple[int, list[int], int, list[Chunk]]:
        """In which dimension there are most parts, where they begin in it, the longest one, and the chunks likewise."""
        dim = max(
            range(len(self.shape)), key=lambda dim: len({chunk.box.offsets[dim] for chunk in self.chunks})
        )
        chunks = sorted(self.chunks, key=lambda chunk: chunk.box.offsets[dim])
        longest = max((chunk.box.lengths[dim] for chunk in chunks), default=0)
        return dim, [chunk.box.offsets[dim] for chunk in chunks], longest, chunks


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        files: By name.
        tensors: By name, in the order of the checkpoint.
        content: All that the manifest says, for people.
    """

    files: dict[str, FileEntry]
    tensors: dict[str, Entry]
    content: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a finished folder.

        Raises:
            CheckpointError: The folder is not finished, of another format or version, or the manifest is damaged.
        """
        path = folder / MANIFEST
        if not path.exists() and not path.is_symlink():
            raise CheckpointError(_unfinished(folder))
        with open_regular(path) as file:
            text = file.read() if os.fstat(file.fileno()).st_size <= LARGEST else None
        try:
            if text is None:
                raise ValueError("it is too large")
            content = parsed(text, folder)
            check_format(content, folder, FORMAT, VERSION)
            if content.pop(_SUM) != _sum(content):
                raise ValueError("its checksum differs")
            return cls.parsed(content)
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            missing = isinstance(error, KeyError) and "there is no "
            raise CheckpointError(
                f"The manifest {str(path)!r} is damaged: {missing or ''}{error}."
            ) from error

    @classmethod
    def parsed(cls, content: Mapping[str, Any]) -> Manifest:
        """What a manifest says, checked.

        Raises:
            ValueError, KeyError, TypeError: It makes no sense.
        """
        files = {
            name: FileEntry(*_numbers(entry, "size", "crc32")) for name, entry in content["files"].items()
        }
        for name in files:
            if not _FILE.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a file that a checkpoint has")
        tensors = {name: _entry(name, entry) for name, entry in content["tensors"].items()}
        used: dict[str, int] = defaultdict(int)
        known = set()
        for name, entry in tensors.items():
            for chunk in entry.chunks:
                if chunk.file not in files or chunk.file == VALUES:
                    raise ValueError(f"{name!r} lies in {chunk.file!r}, which is none of its shards")
                if (chunk.file, chunk.key) in known:
                    raise ValueError(
                        f"{chunk.key!r} in {chunk.file!r} is part of two tensors, or twice of one"
                    )
                known.add((chunk.file, chunk.key))
                used[chunk.file] += chunk.box.numel * entry.dtype.itemsize
        for name, size in used.items():
            if size > files[name].size:
                raise ValueError(f"{name!r} is smaller than what it is to hold")
        return cls(files, tensors, content)


def as_text(content: Mapping[str, Any]) -> str:
    """A manifest as it is written: with its own checksum."""
    return json.dumps({**content, _SUM: _sum(content)}, ensure_ascii=False, separators=(",", ":"))


def chunk_as_data(box: Box, file: str, key: str, checksum: int) -> dict[str, Any]:
    """A chunk as the manifest has it."""
    place = {"offsets": list(box.offsets), "lengths": list(box.lengths)}
    return {**place, "file": file, "key": key, "crc32": checksum}


def entry_as_data(dtype: torch.dtype, shape: torch.Size, chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """A tensor as the manifest has it."""
    return {"dtype": NAMES[dtype], "shape": list(shape), "chunks": chunks}


def _entry(name: str, data: Mapping[str, Any]) -> Entry:
    if data["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} is of the dtype {data['dtype']!r}, which is not known here")
    dtype, shape = DTYPES[data["dtype"]], _sizes(name, data["shape"])
    if math.prod(shape) * dtype.itemsize > LARGEST_SIZE:
        raise ValueError(f"{name!r} is larger than any tensor")
    chunks = tuple(_chunk(name, shape, chunk) for chunk in data["chunks"])
    if not tile(shape, (chunk.box for chunk in chunks)):
        raise ValueError(f"the parts of {name!r} overlap, or do not make the whole")
    return Entry(dtype, torch.Size(shape), chunks)


def _chunk(name: str, shape: tuple[int, ...], data: Mapping[str, Any]) -> Chunk:
    box = Box(_sizes(name, data["offsets"]), _sizes(name, data["lengths"]))
    inside = len(box.offsets) == len(box.lengths) == len(shape) and all(
        end <= size for end, size in zip(box.ends(), shape, strict=True)
    )
    if not inside or not box.numel:
        raise ValueError(f"a part of {name!r} lies outside of it")
    if not isinstance(data["file"], str) or not isinstance(data["key"], str):
        raise ValueError(f"a part of {name!r} is in no file")
    (checksum,) = _numbers(data, "crc32")
    return Chunk(box, data["file"], data["key"], checksum)


def _sizes(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > 64 or not all(map(_is_size, values)):
        raise ValueError(f"{name!r} has no sizes")
    return tuple(values)


def _numbers(data: Mapping[str, Any], *names: str) -> list[int]:
    values = [data[name] for name in names]
    if not all(map(_is_size, values)):
        raise ValueError(f"{' or '.join(names)} is no number")
    return values


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST_SIZE


def _sum(content: Mapping[str, Any]) -> int:
    return crc32(json.dumps(content, sort_keys=True).encode())


def _unfinished(folder: Path) -> str:
    if (folder / ".metadata").exists():
        return (
            f"The folder {str(folder)!r} was written by torch.distributed.checkpoint alone, whose index is a pickle "
            "and can execute code. If you trust it, make it one file with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save, and load that."
        )
    return (
        f"The folder {str(folder)!r} is no checkpoint that was finished: it has no {MANIFEST}. Either writing it was "
        "interrupted, or another program has made it."
    )
