"""Reading the index of a checkpoint of ``torch.distributed.checkpoint``, which is a pickle, without executing it."""

from __future__ import annotations

import pathlib
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from fabric_core.errors import CheckpointError, UnsafeCheckpointError

_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_PATHS = {"Path", "PosixPath", "WindowsPath"}
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "device", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "collections": {OrderedDict.__name__},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}


class SafeReader(FileSystemReader):
    """PyTorch's reader of a folder, whose index brings back nothing but descriptions of tensors.

    PyTorch's own would unpickle whatever the index asks for, and then whatever the index says is no tensor. The class
    that says so is not allowed here.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            UnsafeCheckpointError: It asks for anything else.
            CheckpointError: It is missing or damaged.
        """
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file, path).load()
            _check_places(metadata, path)
        except CheckpointError:
            raise
        except Exception as error:  # garbage makes a pickle fail in any way
            raise CheckpointError(
                f"The index {str(path)!r} of the checkpoint cannot be read; it is missing or damaged "
                f"({type(error).__name__}: {error})."
            ) from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        checked: Metadata = metadata
        return checked


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise UnsafeCheckpointError(
                f"The checkpoint was not loaded, because its index {str(self._path)!r} asks for {module}.{name}, which "
                "no index needs. Somebody has tampered with it."
            )
        if module.startswith("pathlib"):  # from another system, it could not be made here
            return pathlib.PurePath
        return super().find_class(module, name)


def _check_places(metadata: Any, path: Path) -> None:
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise UnsafeCheckpointError(
                f"The checkpoint was not loaded, because its index {str(path)!r} points out of its folder, to "
                f"{info.relative_path!r}."
            )
