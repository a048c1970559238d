"""Reading one file, tensor by tensor: of safetensors, or of ``torch.save`` mapped into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fabric_core.errors import CheckpointError
from fabric_core.sharded.boxes import whole_box
from fabric_core.sharded.safetensors import SafetensorsFile
from fabric_core.sharded.stored import StoredTensor, Targets
from fabric_core.sharded.trees import mapped

__all__ = ["MappedTensors", "WholeTensors"]


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
        """See `Source`."""
        if (now := _identity(self._file.path)) and now != self._seen:
            raise CheckpointError(f"The file {str(self._file.path)!r} is another one than was loaded.")
        _copy_parts(self._file.read(name), targets)


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
        """See `Source`."""
        now = _identity(self._path)
        if now[:2] == self._seen[:2] and now != self._seen:
            raise CheckpointError(f"The file {str(self._path)!r} was written to since it was loaded.")
        _copy_parts(self._tensors[int(name)], targets)

    def _stored(self, tensor: Tensor) -> Any:
        plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.is_contiguous()
        if not plain or not tensor.dim() or not tensor.numel():
            return tensor
        self._tensors.append(tensor)
        return StoredTensor(self, str(len(self._tensors) - 1), tensor.shape, tensor.dtype)


def _copy_parts(whole: Tensor, targets: Targets) -> None:
    for box, target in targets:
        target.copy_(whole[box.within(whole_box(whole.shape))])


def _identity(path: Path) -> tuple[int, ...]:
    """Which file it is, first, then what changes when it is written to; nothing when there is none."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return ()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns
