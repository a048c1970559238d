"""Writing a folder: each rank its shares, then one rank everything else and the manifest. Nothing is sent between them.

It may happen in a thread of each rank, as long as the ranks agree in between: `write_part` everywhere, then `finish`.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fabric_core import checked
from fabric_core.errors import CheckpointError
from fabric_core.manifest import LARGEST, MANIFEST, described
from fabric_core.sharded import folders
from fabric_core.sharded.boxes import Box
from fabric_core.sharded.manifest import (
    FORMAT,
    VALUES,
    VERSION,
    Manifest,
    as_text,
    chunk_as_data,
    entry_as_data,
)
from fabric_core.sharded.safetensors import METADATA, check_dtype, open_regular, write_safetensors
from fabric_core.sharded.shares import Share
from fabric_core.sharded.trees import mapped, named

__all__ = ["VALUES", "finish", "without_shares", "write_part"]

LARGEST_CHUNK = 32 << 20
"""Bytes; larger parts are written in pieces, so that a reader who needs a little of them reads little more."""


def without_shares(tree: Any) -> Any:
    """A checkpoint in which tensors on the meta device stand for those of which ranks hold shares.

    Raises:
        CheckpointError: A tensor of the user's is on the meta device, too.
    """
    empty = named(tree, lambda value: isinstance(value, Tensor) and value.is_meta)
    if empty:
        raise CheckpointError(
            f"The tensor {next(iter(empty))!r} is on the meta device, and has no values to be saved."
        )
    return mapped(tree, Share.stand_in, Share)


def write_part(folder: Path, rank: int, tree: Any) -> None:
    """Write what this rank holds, and wait until it is on disk. Called on every rank.

    Args:
        folder: It is there already.
        rank: Of this process.
        tree: A checkpoint with shares in it, the same on every rank but for what is in them.

    Raises:
        CheckpointError: A tensor is of a kind that shards cannot have.
        OSError: It cannot be written.
    """
    shares = named(tree, lambda value: isinstance(value, Share))
    tensors: dict[str, Tensor] = {}
    index: dict[str, list[tuple[Box, str]]] = {}
    for name, share in shares.items():
        check_dtype(name, share.dtype)  # on every rank, also where nothing of it is written
        index[name] = []
        for box, tensor in _pieces(share):
            key = _key(name, box, share.shape, tensors)
            tensors[key] = tensor
            index[name].append((box, key))
    file = f"shard-{rank:06d}.safetensors"
    content: dict[str, Any] = {"files": {}, "tensors": {}}
    sums: Mapping[str, int] = {}
    if tensors:
        written = write_safetensors(folder / file, tensors)
        content["files"][file] = {"size": written.size, "crc32": written.header}
        sums = written.tensors
    for name, share in shares.items():
        chunks = [chunk_as_data(box, file, key, sums[key]) for box, key in index[name]]
        content["tensors"][name] = entry_as_data(share.dtype, share.shape, chunks)
    (folder / _index(rank)).write_text(json.dumps(content), encoding="utf-8")


def finish(folder: Path, path: Path, world_size: int, origin: Mapping[str, Any]) -> None:
    """Write the manifest, and put the folder in its place. Called on one rank, when all else is on disk.

    Args:
        folder: Where everybody has written to; ``values.pt`` is there, too.
        path: Its place. What is there is replaced.
        world_size: How many ranks have written.
        origin: What the manifest says of the job.

    Raises:
        CheckpointError: The parts of the ranks do not make whole tensors, or are too many. Nothing was replaced.
        OSError: It cannot be written.
    """
    files, tensors = _merged(folder, world_size)
    content = {
        **described(FORMAT, VERSION, origin),
        "files": {VALUES: _file_entry(folder / VALUES), **files},
        "tensors": tensors,
    }
    try:
        Manifest.parsed(content)
    except ValueError as error:
        raise CheckpointError(f"What the ranks have written makes no checkpoint: {error}.") from error
    text = as_text(content).encode()
    if len(text) > LARGEST:
        raise CheckpointError(
            f"The ranks have written the tensors in so many parts that the manifest takes {len(text)} bytes, and at "
            f"most {LARGEST} can be read. Save with fewer ranks, or in one file."
        )
    with (folder / MANIFEST).open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    for rank in range(world_size):
        (folder / _index(rank)).unlink()
    folders.publish(folder, path)


def _merged(folder: Path, world_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The indexes of all ranks as one. Of what several have written, the first one counts."""
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    there: dict[str, set[Any]] = defaultdict(set)
    for rank in range(world_size):
        index = json.loads((folder / _index(rank)).read_text(encoding="utf-8"))
        files.update(index["files"])
        for name, entry in index["tensors"].items():
            known = tensors.setdefault(name, {**entry, "chunks": []})
            if any(known[what] != entry[what] for what in ("dtype", "shape")):
                raise CheckpointError(
                    f"Rank {rank} has {name!r} as {entry['dtype']} of the shape {entry['shape']}, and others as "
                    f"{known['dtype']} of {known['shape']}. All ranks have to save the same state."
                )
            new = [chunk for chunk in entry["chunks"] if _place(chunk) not in there[name]]
            known["chunks"] += new
            there[name].update(map(_place, new))
    return files, tensors


def _place(chunk: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(chunk["offsets"]), tuple(chunk["lengths"])


def _pieces(share: Share) -> Iterator[tuple[Box, Tensor]]:
    for box, tensor in share.parts:
        if box.numel:
            for piece in box.pieces(LARGEST_CHUNK // share.dtype.itemsize):
                yield piece, tensor[piece.within(box)]


def _key(name: str, box: Box, shape: torch.Size, taken: Mapping[str, Tensor]) -> str:
    """What a box is called in its file: the tensor's name, and where it is unless it is all of it."""
    if box.lengths != tuple(shape):
        name += f"[{','.join(f'{begin}:{end}' for begin, end in zip(box.offsets, box.ends(), strict=True))}]"
    while name in taken or name == METADATA:
        name += "'"
    return name


def _index(rank: int) -> str:
    return f"index-{rank:06d}.json"


def _file_entry(path: Path) -> dict[str, int]:
    size, checksum = sum_of(path)
    return {"size": size, "crc32": checksum}


def sum_of(path: Path) -> tuple[int, int]:
    """The size and the checksum of a file."""
    with open_regular(path) as file:
        return checked.sum_of(file)
