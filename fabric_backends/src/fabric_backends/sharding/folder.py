"""A sharded checkpoint: a folder to which every rank writes its shards, whole or not at all.

In it are the shards and their index as ``torch.distributed.checkpoint`` writes them, one file with everything that is
not sharded (a tensor on the meta device stands for each that is), and a manifest, written last. A folder without it is
not finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import save

from fabric_backends.sharding.metadata import SafeReader
from fabric_backends.sharding.tensors import is_sharded, mapped, named_tensors
from fabric_core.errors import CheckpointError

MANIFEST = "fabric.json"
VALUES = "values.pt"
FORMAT = "fabric-sharded"
VERSION = 1

ABANDONED = 3600.0
"""Seconds after which a folder that nobody finishes is taken for what a crash has left."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in the folder, and is read when it is needed."""

    folder: ShardedFolder
    name: str
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        """All of it, on the CPU."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.folder.read_into({self.name: tensor})
        return tensor


class ShardedFolder:
    """A finished sharded checkpoint, to be read. Each process reads for itself.

    Raises:
        CheckpointError: It is not finished, of a later version, or not all there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_manifest(path)
        self._reader = SafeReader(path)
        self._metadata: Metadata | None = None

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Read tensors by name, in place; of a sharded one, only what this rank holds.

        Raises:
            CheckpointError: One is not there, or of another shape; or the folder is damaged.
            UnsafeCheckpointError: The index asks for more than tensors.
        """
        if not targets:
            return
        if self._metadata is None:
            self._metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            planner.set_up_planner(dict(targets), self._metadata, is_coordinator=True)
            self._reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # what is damaged fails in any way
            raise CheckpointError(
                f"The checkpoint {str(self.path)!r} cannot be read; it is damaged ({type(error).__name__}: {error})."
            ) from error


def find(path: Path) -> Path | None:
    """The folder of the sharded checkpoint that is called ``path``; ``None`` when that is no folder.

    Where a crash came between putting the old one aside and the new one in its place, it is the new one.
    """
    if path.is_dir():
        return path
    if path.exists():
        return None
    finished = [folder for folder in _siblings(path) if (folder / MANIFEST).is_file()]
    return max(finished, key=lambda folder: (folder / MANIFEST).stat().st_mtime_ns, default=None)


def temporary_for(path: Path, token: str) -> Path:
    """Where a checkpoint is written to before it is finished: beside its place."""
    return path.with_name(f".{path.name}.{token}.tmp")


def write_shards(folder: Path, checkpoint: Any, group: Any) -> None:
    """Write the shards of a checkpoint. Called on every rank of ``group``.

    Raises:
        CheckpointError: Some rank could not; on every rank.
    """
    tensors = named_tensors(checkpoint, is_sharded)
    if not tensors:
        return
    try:
        save(tensors, storage_writer=FileSystemWriter(folder), process_group=group)
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"rank {rank}: {type(reason).__name__}: {reason}") from error


def without_shards(checkpoint: Any) -> Any:
    """A checkpoint in which tensors on the meta device stand for those that are sharded."""
    return mapped(checkpoint, lambda tensor: _stand_in(tensor) if is_sharded(tensor) else tensor)


def with_stored(values: Any, folder: ShardedFolder) -> Any:
    """What `without_shards` gave, with stored tensors in the place of what stands for them."""
    stored = {
        id(tensor): StoredTensor(folder, name, tensor.shape, tensor.dtype)
        for name, tensor in named_tensors(values, lambda tensor: tensor.is_meta).items()
    }
    return mapped(values, lambda tensor: stored.get(id(tensor), tensor))


def _stand_in(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def finish(folder: Path, path: Path) -> None:
    """Write the manifest, and put the folder in its place. Called on one rank, when all else is on disk."""
    files = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "version": VERSION, "torch": torch.__version__, "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _flush(folder)
    aside = folder.with_suffix(".old")
    if path.exists():
        path.rename(aside)
    folder.rename(path)
    _flush(path.parent)
    remove(aside)


def remove(path: Path) -> None:
    """Delete a folder or a file, if it is there and can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove_abandoned(path: Path) -> None:
    """Delete what processes that were killed while they wrote to ``path`` have left."""
    if not path.exists():  # one of them may be what is left of it
        return
    for folder in _siblings(path):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > ABANDONED:
                remove(folder)


def _siblings(path: Path) -> list[Path]:
    if not path.parent.is_dir():
        return []
    beside = (entry for entry in path.parent.iterdir() if entry.name.startswith(f".{path.name}."))
    return [entry for entry in beside if entry.suffix in (".tmp", ".old")]


def _check_manifest(path: Path) -> None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, version = dict(manifest["files"]), manifest["version"]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"The folder {str(path)!r} is no checkpoint that was finished: it has no {MANIFEST}. Either writing it was "
            "interrupted, or another program has made it."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"The manifest {str(path / MANIFEST)!r} is damaged: {error}.") from error
    if version != VERSION:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} is of version {version}, and this library reads version {VERSION}. Load it "
            "with the version of fabric-backends that wrote it."
        )
    for name, size in files.items():
        there = (path / name).stat().st_size if (path / name).is_file() else None
        if there != size:
            raise CheckpointError(
                f"The checkpoint {str(path)!r} is damaged: {name!r} "
                + ("is missing." if there is None else f"has {there} bytes and not {size}.")
            )


def _flush(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
