"""The files of shards: the format of safetensors, with a checksum for each tensor.

The format is a header in JSON and the bytes of the tensors. The library of that name maps a file into memory, where a
fault of the disk or a file that is cut short kills the process, and looks at no checksum. Here a tensor is read
straight into the memory where it belongs, and its checksum is computed on the way.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fabric_core.checked import CheckedWriter, crc32, read_into
from fabric_core.errors import CheckpointError
from fabric_core.memory import in_large_pages
from fabric_core.sharded.dtypes import DTYPES, NAMES

__all__ = ["SafetensorsFile", "check_dtype", "write_safetensors"]

METADATA = "__metadata__"
"""The one name in a header that is no tensor."""

PYTORCH = {"format": "pt"}
"""What stands there; some libraries read no weights without it."""

LARGEST_HEADER = 100_000_000
"""Bytes; as the format has it."""

LARGEST_SIZE = 1 << 62
"""Elements; more are no tensor."""


@dataclass(frozen=True)
class Written:
    """What was written to a file.

    Attributes:
        size: Of the file, in bytes.
        header: The checksum (CRC-32) of everything before the tensors.
        tensors: The checksum of each tensor.
    """

    size: int
    header: int
    tensors: dict[str, int]


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a file: its dtype, its shape, its first byte, and how many bytes it has."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    size: int


def write_safetensors(
    path: Path, tensors: Mapping[str, Any], fetch: Callable[[Any], Tensor] = lambda tensor: tensor
) -> Written:
    """Write tensors, from any device, one by one, and wait until they are on disk.

    Args:
        path: Where to.
        tensors: By name; or what has a shape and a dtype, and becomes a tensor when it is needed.
        fetch: Makes a tensor of it.

    Raises:
        CheckpointError: One has a dtype or a layout that the format does not know.
        OSError: It cannot be written.
    """
    ordered = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # each is aligned then
    header: dict[str, Any] = {METADATA: PYTORCH}
    end = 0
    for name in ordered:
        tensor, begin = tensors[name], end
        check_dtype(name, tensor.dtype)
        end += tensor.shape.numel() * tensor.dtype.itemsize
        shape = list(tensor.shape)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    with CheckedWriter(path) as file:
        checksum = file.write(head)
        sums = {name: file.write(bytes_of(_plain(name, fetch(tensors[name])))) for name in ordered}
        file.finish()
    return Written(len(head) + end, checksum, sums)


class SafetensorsFile:
    """A file whose header has been read and found to be right. It is opened anew for each reading.

    Args:
        path: Of a regular file; a link is refused.
        size: How many bytes it has to have, where that is known.
        header: The checksum of its header, where that is known.

    Raises:
        CheckpointError: It is missing, no file, damaged, or of another size.
    """

    def __init__(self, path: Path, size: int | None = None, header: int | None = None) -> None:
        self.path = path
        with open_regular(path) as file:
            there = os.fstat(file.fileno()).st_size
            if size is not None and there != size:
                raise CheckpointError(f"The file {str(path)!r} is damaged: it has {there} bytes, not {size}.")
            self.places = _places(path, file, there, header)

    @contextmanager
    def opened(self, name: str) -> Iterator[Callable[[Tensor, int], int]]:
        """Read a tensor piece by piece.

        Yields:
            What reads the next bytes into a contiguous tensor on the CPU: it takes the checksum of the bytes before
            these, and returns the one with these.

        Raises:
            CheckpointError: The file has become shorter, or cannot be read.
        """
        with open_regular(self.path) as file:
            file.seek(self.places[name].begin)

            def read(target: Tensor, before: int) -> int:
                buffer = bytes_of(target)
                got, checksum = read_into(file, buffer, before)
                if got < len(buffer):
                    raise CheckpointError(f"The file {str(self.path)!r} ends within the tensor {name!r}.")
                return checksum

            yield read

    def read_into(self, name: str, target: Tensor) -> int:
        """Read a tensor into one of its dtype and as large, contiguous, on the CPU; its checksum. Errors as above."""
        with self.opened(name) as read:
            return read(target, 0)

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        place = self.places[name]
        tensor = in_large_pages(torch.empty(place.shape, dtype=place.dtype, device="cpu"))
        self.read_into(name, tensor)
        return tensor


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading: nothing else is waited for, and no link is followed.

    Raises:
        CheckpointError: It is missing, or something else.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb", buffering=0)
        os.close(descriptor)
    except FileNotFoundError as error:
        raise CheckpointError(f"The file {str(path)!r} is missing.") from error
    except OSError as error:
        what = "a link" if path.is_symlink() else str(error)
        raise CheckpointError(f"The file {str(path)!r} cannot be opened: {what}.") from error
    raise CheckpointError(f"The file {str(path)!r} is no regular file.")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU. It keeps the tensor as long as it is there itself."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(b"")
    memory: Any = (ctypes.c_char * size).from_address(tensor.data_ptr())
    memory.tensor = tensor
    return memoryview(memory).cast("B")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Refuse a tensor of a dtype that the format does not know.

    Raises:
        CheckpointError: It is of such a one.
    """
    if dtype not in NAMES:
        raise CheckpointError(
            f"The tensor {name!r} is of the dtype {dtype}, which files of shards do not know. Save it as one of "
            f"{', '.join(map(str, NAMES))}, or in one file."
        )


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A tensor whose bytes in memory are those that are written."""
    if (
        type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.layout is not torch.strided
        or tensor.is_meta
    ):
        raise CheckpointError(
            f"The tensor {name!r} is a {type(tensor).__name__} ({tensor.layout}, on {tensor.device}), and files of "
            "shards take plain tensors only. Save it in one file."
        )
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _places(path: Path, file: BinaryIO, size: int, checksum: int | None) -> dict[str, Place]:
    try:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, LARGEST_HEADER):
            raise ValueError("its header does not fit into it")
        text = file.read(length)
        if checksum is not None and crc32(head + text) != checksum:
            raise ValueError("the checksum of its header differs")
        return dict(_parsed(json.loads(text), 8 + length, size))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"The file {str(path)!r} is damaged, or no file of safetensors: {error}."
        ) from error


def _parsed(header: dict[str, Any], begin: int, size: int) -> dict[str, Place]:
    places, ends = {}, [0]
    for name, entry in header.items():
        if name == METADATA:
            continue
        dtype, shape = DTYPES.get(entry["dtype"]), entry["shape"]
        first, last = entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"{name!r} is of the dtype {entry['dtype']!r}, which is not known here")
        numbers = [*shape, first, last]
        if any(type(number) is not int or not 0 <= number < LARGEST_SIZE for number in numbers):
            raise ValueError(f"{name!r} has no sizes")
        if last - first != _numel(shape) * dtype.itemsize or begin + last > size:
            raise ValueError(f"the bytes of {name!r} are not as many as its shape needs, or not there")
        places[name] = Place(dtype, tuple(shape), begin + first, last - first)
    for place in sorted(places.values(), key=lambda place: (place.begin, place.size)):
        if place.begin - begin != ends[-1]:
            raise ValueError("its tensors overlap, or there are bytes between them")
        ends.append(ends[-1] + place.size)
    if begin + ends[-1] != size:
        raise ValueError("it is longer than its tensors")
    return places


def _numel(shape: list[int]) -> int:
    """The number of elements; one too many when they are more than any tensor has."""
    numel = 1
    for length in shape:
        numel *= length
        if numel > LARGEST_SIZE:
            return LARGEST_SIZE + 1
    return numel
