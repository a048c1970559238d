"""Files whose checksums are computed while they are read and written, as long as the processor's cache has the bytes.

The checksum is CRC-32, as zip files have it. zlib-ng computes it several times as fast as zlib, faster than memory is
read; so it costs next to nothing where the bytes are in the cache anyway, and no thread is needed for it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CheckedWriter", "crc32", "read_into", "sum_of"]

PIECE = 1 << 20
"""Bytes; so many are read or written, and then looked at: few enough to be in the cache still."""

FLUSHED_AT_ONCE = 32 << 20
"""Bytes; after so many, what was written is sent to the disk."""


def crc32(data: bytes | memoryview, before: int = 0) -> int:
    """The checksum of some bytes, which follow others whose checksum is ``before``."""
    return _fastest()(data, before)


def read_into(file: BinaryIO, buffer: memoryview, before: int = 0) -> tuple[int, int]:
    """Fill a buffer from where a file stands.

    Returns:
        How many bytes there were; fewer than were wanted when the file has ended. And their checksum, when they follow
        others whose checksum is ``before``.
    """
    done, checksum = 0, before
    while done < len(buffer):
        part = buffer[done : done + PIECE]
        got = file.readinto(part)  # type: ignore[attr-defined]
        if not got:
            break
        checksum = crc32(part[:got], checksum)
        done += got
    return done, checksum


def sum_of(file: BinaryIO, size: int | None = None) -> tuple[int, int]:
    """Read so many bytes, or all, from where a file stands. Returns as `read_into`."""
    buffer = memoryview(bytearray(PIECE))
    done, checksum = 0, 0
    while size is None or done < size:
        wanted = buffer if size is None else buffer[: size - done]
        got, checksum = read_into(file, wanted, checksum)
        done += got
        if got < len(wanted):
            break
    return done, checksum


@functools.cache
def _fastest() -> Callable[[bytes | memoryview, int], int]:
    try:
        from zlib_ng.zlib_ng import crc32 as fast
    except ImportError:  # it is built for the most common processors only
        from zlib import crc32 as fast
    return fast


class CheckedWriter:
    """Writes a new file, and sends it to the disk meanwhile.

    Attributes:
        position: How many bytes were written.

    Raises:
        OSError: It cannot be written; from any method, and from the end of the block: of what was sent to the disk
            meanwhile, the system tells once, to whoever asks first.
    """

    def __init__(self, path: Path) -> None:
        self.position = 0
        self._flushed = 0
        self._file = path.open("wb")
        self._disk = ThreadPoolExecutor(1, "fabric-flush")
        self._flushes: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def write(self, data: bytes | memoryview) -> int:
        """Write some bytes, all of them; their checksum."""
        view, checksum = memoryview(data), 0
        for begin in range(0, len(view), PIECE):
            part = view[begin : begin + PIECE]
            checksum = crc32(part, checksum)
            self._file.write(part)
        self.position += len(view)
        if self.position - self._flushed >= FLUSHED_AT_ONCE:
            self._flushed = self.position
            self._flushes.append(self._disk.submit(os.fsync, self._file.fileno()))
        return checksum

    def flush(self) -> None:
        """Hand all of it to the system."""
        self._file.flush()

    def finish(self) -> None:
        """Wait until all of it is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, kind: object, *_: object) -> None:
        self._disk.shutdown()
        self._file.close()
        for flush in self._flushes if kind is None else ():
            flush.result()
