"""The archive that ``torch.save`` writes: completed afterwards, and looked at before and while PyTorch reads it."""

from __future__ import annotations

import ctypes
import io
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch.utils.serialization import config

from fabric_core.checked import CheckedWriter, read_into, sum_of
from fabric_core.memory import in_large_pages_at

__all__ = ["checked", "pickles", "write"]


_NO_SUM = 0
"""What stands for a checksum in files that were written with ``torch.serialization.set_crc32_options(False)``."""


_FOLDER = 0x10
"""The attribute of folders. Of a record that has it, PyTorch reads nothing, and gives memory as it happens to be."""

_HEADER = 30
"""Bytes; so many stand before the name of a record, which stands before the record."""

_FOLLOWED = 0x08
"""The flag of a record whose checksum stands behind it as well, after four bytes that say so."""

_UTF8 = 0x800
"""The flag of a record whose name is in UTF-8."""


def write(path: Path, content: Any, name: str, text: str) -> None:
    """Write what ``torch.save`` writes, and one record more, to a new file. Not all of it is on disk afterwards.

    PyTorch reads each tensor twice, for its checksum and to write it. Here it is read once, so PyTorch leaves the
    checksums out, and they are put into their places at the end.

    Args:
        path: Of the file.
        content: For ``torch.save``.
        name, text: Of the record.
    """
    settings: Any = config
    with _SummedFile(path) as file, settings.patch({"save.compute_crc32": False}):
        torch.save(content, cast("IO[bytes]", file))
    with path.open("r+b") as written, zipfile.ZipFile(written, "a") as archive:
        records = archive.infolist()
        for record in records:
            _put_sum(written, record, file.sums)
        archive.writestr(f"{records[0].filename.partition('/')[0]}/{name}", text)


@contextmanager
def checked(path: Path) -> Iterator[Path | IO[bytes]]:
    """What to give to ``torch.load``, so that it reads what was written; else the block ends with an error.

    Args:
        path: Of a file of ``torch.save``. One in the format of old has no checksums; garbage is left to PyTorch.

    Raises:
        zipfile.BadZipFile: A record is not what was written; or the archive is none that PyTorch writes, such as could
            unfold to more than its size.
        tarfile.TarError: It is a tar, which PyTorch would unpack.
    """
    if not zipfile.is_zipfile(path):
        _refuse_tar(path)
        yield path
        return
    with _CheckedArchive(path) as archive:
        if config.load.mmap:  # then PyTorch opens the file itself, and memory is read when it is used
            archive.check()
            yield path
        else:
            yield cast("IO[bytes]", archive)
            archive.check()


class _CheckedArchive(io.RawIOBase):
    """An archive for PyTorch to read, whose records are compared with their checksums, which PyTorch does not do.

    Tensors are compared on the way, while PyTorch reads them; what nobody has read, at the end; all else, which says
    what they are, at once.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("rb", buffering=0)
        self._damaged: list[str] = []
        try:
            self._places = _places(self._file)
            self._unread = dict(self._places)
            self._read_rest({place: each for place, each in self._places.items() if not _is_tensor(each)})
        except BaseException:
            self._file.close()
            raise

    def check(self) -> None:
        """Read what was not read yet, and tell of what is damaged. Nothing that was read may be used before."""
        self._read_rest(dict(self._unread))

    def readinto(self, buffer: Any) -> int:
        """Read some bytes; a whole record is compared with its checksum."""
        place, view = self._file.tell(), memoryview(buffer)
        record = self._places.get(place)
        if record is None or not 0 < record.file_size == len(view):
            return self._file.readinto(view)
        in_large_pages_at(ctypes.addressof(ctypes.c_char.from_buffer(view)), len(view))
        got, checksum = read_into(self._file, view)
        self._compare(place, got, checksum)
        return got

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As of any file."""
        return self._file.tell()

    def close(self) -> None:
        """As of any file."""
        self._file.close()
        super().close()

    def _read_rest(self, records: dict[int, zipfile.ZipInfo]) -> None:
        for place, record in records.items():
            self._file.seek(place)
            self._compare(place, *sum_of(self._file, record.file_size))
        self._file.seek(0)
        if self._damaged:
            raise zipfile.BadZipFile(f"the checksum of the record {self._damaged[0]!r} differs")

    def _compare(self, place: int, size: int, checksum: int) -> None:
        record = self._places[place]
        self._unread.pop(place, None)
        if size < record.file_size or record.CRC not in (_NO_SUM, checksum):
            self._damaged.append(record.filename)


def pickles(path: Path) -> list[bytes]:
    """The pickles of an archive: one, if it is honest."""
    with zipfile.ZipFile(path) as archive:
        found = [record for record in archive.infolist() if record.filename.endswith("/data.pkl")]
        for record in found:
            if record.CRC == _NO_SUM:
                del record.CRC
        return [archive.read(record) for record in found]


class _SummedFile(CheckedWriter):
    """Remembers where so many bytes were written at once, and their checksum."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.sums: dict[int, tuple[int, int]] = {}

    def write(self, data: bytes | memoryview) -> int:
        place = self.position
        checksum = super().write(data)
        self.sums[place] = len(data), checksum
        return checksum


def _put_sum(file: BinaryIO, record: zipfile.ZipInfo, sums: dict[int, tuple[int, int]]) -> None:
    """Put the checksum of a record into the table at the end, which the caller writes, and behind the record."""
    place = _place(file, record)
    size, checksum = sums.get(place, (-1, 0))
    if size != record.file_size:  # it was written in several pieces
        file.seek(place)
        _, checksum = sum_of(file, record.file_size)
    record.CRC = checksum
    if record.flag_bits & _FOLLOWED:
        file.seek(place + record.file_size + 4)
        file.write(checksum.to_bytes(4, "little"))


def _places(file: BinaryIO) -> dict[int, zipfile.ZipInfo]:
    """The records of an archive, by the byte at which the content of each begins, in that order."""
    places, end = {}, 0
    with zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        if archive.comment or len({record.filename for record in records}) < len(records):
            raise zipfile.BadZipFile("it has a comment, or two records of one name")
        for record in records:
            if record.header_offset < end:
                raise zipfile.BadZipFile(f"the record {record.filename!r} overlaps another one")
            _check_kind(record)
            place = _place(file, record)
            places[place], end = record, place + record.file_size
        if end > archive.start_dir:
            raise zipfile.BadZipFile("its records reach into the table of them")
    return places


def _place(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """The byte at which the content of a record begins."""
    file.seek(record.header_offset)
    header = file.read(_HEADER)
    name, extra = (int.from_bytes(header[begin : begin + 2], "little") for begin in (26, 28))
    encoding = "utf-8" if record.flag_bits & _UTF8 else "cp437"
    if header[:4] != b"PK\3\4" or file.read(name) != record.orig_filename.encode(encoding):
        raise zipfile.BadZipFile(f"the record {record.filename!r} is not where it is said to be")
    return record.header_offset + _HEADER + name + extra


def _check_kind(record: zipfile.ZipInfo) -> None:
    if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
        raise zipfile.BadZipFile(f"the record {record.filename!r} is compressed, which PyTorch never does")
    if record.flag_bits & ~(_FOLLOWED | _UTF8):
        raise zipfile.BadZipFile(f"the record {record.filename!r} is encrypted, or of a kind unknown here")
    if stat.S_ISLNK(record.external_attr >> 16) or record.external_attr & _FOLDER or record.is_dir():
        raise zipfile.BadZipFile(f"the record {record.filename!r} is a link, or a folder")


def _is_tensor(record: zipfile.ZipInfo) -> bool:
    return record.filename.partition("/")[2].startswith("data/")


def _refuse_tar(path: Path) -> None:
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        return
    raise tarfile.TarError("it is a tar, as PyTorch wrote it before version 0.1.10")
