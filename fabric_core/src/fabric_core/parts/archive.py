"""The archive that ``torch.save`` writes, looked at before PyTorch reads it."""

from __future__ import annotations

import stat
import tarfile
import zipfile
from pathlib import Path

__all__ = ["check", "pickles"]


_NO_SUM = 0
"""What stands for a checksum in files that were written with ``torch.serialization.set_crc32_options(False)``."""


_FOLDER = 0x10
"""The attribute of folders. Of a record that has it, PyTorch reads nothing, and gives memory as it happens to be."""


def check(path: Path) -> None:
    """Read every record once: PyTorch writes checksums and does not look at them, so a flipped bit would pass.

    Raises:
        zipfile.BadZipFile: A record is not what was written; or the archive is none that PyTorch writes, such as could
            unfold to more than its size.
        tarfile.TarError: It is a tar, which PyTorch would unpack.
    """
    if not zipfile.is_zipfile(path):
        _refuse_tar(path)
        return  # the format of old, or garbage: PyTorch will tell
    with zipfile.ZipFile(path) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        if archive.comment or len({record.filename for record in records}) < len(records):
            raise zipfile.BadZipFile("it has a comment, or two records of one name")
        end = 0
        for record in records:
            _check_place(record, end)
            end = record.header_offset + record.compress_size
            if record.CRC == _NO_SUM:
                continue
            with archive.open(record) as content:
                while content.read(1 << 20):
                    pass


def pickles(path: Path) -> list[bytes]:
    """The pickles of an archive: one, if it is honest."""
    with zipfile.ZipFile(path) as archive:
        found = [record for record in archive.infolist() if record.filename.endswith("/data.pkl")]
        for record in found:
            if record.CRC == _NO_SUM:
                del record.CRC
        return [archive.read(record) for record in found]


def _check_place(record: zipfile.ZipInfo, end: int) -> None:
    if record.header_offset < end:
        raise zipfile.BadZipFile(f"the record {record.filename!r} overlaps another one")
    if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
        raise zipfile.BadZipFile(f"the record {record.filename!r} is compressed, which PyTorch never does")
    if stat.S_ISLNK(record.external_attr >> 16) or record.external_attr & _FOLDER or record.is_dir():
        raise zipfile.BadZipFile(f"the record {record.filename!r} is a link, or a folder")


def _refuse_tar(path: Path) -> None:
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        return
    raise tarfile.TarError("it is a tar, as PyTorch wrote it before version 0.1.10")
