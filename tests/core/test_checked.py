"""Files that are read and written once, with their checksums on the way: those that any reader of zip files knows."""

from __future__ import annotations

import io
import os
import random
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.serialization import config

from fabric_core import CheckpointError, checked, memory
from fabric_core.memory import WORTH_IT, in_large_pages
from fabric_core.parts.torch_file import TorchFile

FILE = TorchFile()
LARGE = 3 * checked.PIECE + 17
"""Bytes, which are read and written in several pieces."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.ckpt"


def state() -> dict[str, Any]:
    like_an_archive = b"PK\x07\x08" + bytes(12), b"PK\x03\x04" + bytes(26), b"PK\x01\x02" + bytes(42)
    return {
        "large": torch.arange(LARGE, dtype=torch.uint8),
        "empty": torch.empty(0),
        "scalar": torch.tensor(3.0),
        **{
            f"bytes {n}": torch.tensor(list(text), dtype=torch.uint8)
            for n, text in enumerate(like_an_archive)
        },
    }


def flipped(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def place_of(path: Path, size: int) -> int:
    """Where the content of the one record of a size begins."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        (record,) = (each for each in archive.infolist() if each.file_size == size)
        file.seek(record.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        return record.header_offset + 30 + int(name) + int(extra)


@pytest.mark.parametrize("seed", range(5))
def test_the_checksum_is_that_of_zlib_however_the_bytes_come(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    data = draw.randbytes(draw.choice([0, 1, 1000, checked.PIECE, LARGE]))
    wanted, path = zlib.crc32(data), tmp_path / "file"
    cut = draw.randint(0, len(data))
    assert checked.crc32(data[cut:], checked.crc32(data[:cut])) == wanted
    with checked.CheckedWriter(path) as file:
        assert file.write(data) == wanted
    assert path.read_bytes() == data
    assert checked.sum_of(io.BytesIO(data)) == (len(data), wanted)
    assert checked.sum_of(io.BytesIO(data), cut) == (cut, zlib.crc32(data[:cut]))
    room = bytearray(len(data) + 5)
    assert checked.read_into(io.BytesIO(data), memoryview(room)) == (len(data), wanted)
    assert room == data + bytes(5)


def test_every_record_has_the_checksum_that_pytorch_would_have_written(path: Path) -> None:
    FILE.save(path, state())
    assert torch.serialization.get_crc32_options()  # which is left out only meanwhile
    torch.save(state(), path.with_name("plain"))
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(path.with_name("plain")) as theirs:
        assert ours.testzip() is None
        sums = {each.filename.partition("/")[2]: each.CRC for each in ours.infolist()}
        for each in theirs.infolist():
            name = each.filename.partition("/")[2]
            assert name.startswith(".data/") or sums[name] == each.CRC
    place = place_of(path, LARGE)
    with path.open("rb") as file:  # behind the record it stands once more
        file.seek(place + LARGE)
        assert struct.unpack("<4sL", file.read(8)) == (
            b"PK\x07\x08",
            zlib.crc32(bytes(state()["large"].tolist())),
        )
    for name, tensor in torch.load(path, weights_only=True).items():
        assert torch.equal(tensor, state()[name])


@pytest.mark.parametrize("mapped", [False, True])
def test_a_tensor_that_differs_from_its_checksum_is_refused_however_it_is_read(
    path: Path, mapped: bool
) -> None:
    FILE.save(path, state())
    settings: Any = config
    with settings.patch({"load.mmap": mapped}):
        for name, tensor in FILE.load(path).items():
            assert torch.equal(tensor, state()[name])
        for place in (0, LARGE // 2, LARGE - 1):
            flipped(path, place_of(path, LARGE) + place)
            with pytest.raises(CheckpointError, match="checksum of the record 'archive/data/0' differs"):
                FILE.load(path)
            flipped(path, place_of(path, LARGE) + place)
        FILE.load(path)


def test_a_record_that_nobody_asks_for_is_compared_as_well(path: Path) -> None:
    FILE.save(path, {"weight": torch.ones(3)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/99", bytes(1234))
    FILE.load(path)
    flipped(path, place_of(path, 1234))
    with pytest.raises(CheckpointError, match="archive/data/99"):
        FILE.load(path)


def test_a_tensor_is_read_once_and_its_checksum_needs_no_second_time(path: Path) -> None:
    size = 20 * checked.PIECE
    FILE.save(path, {"large": torch.zeros(size, dtype=torch.uint8)})
    FILE.load(path)  # with what is imported for it
    before = psutil.Process().io_counters().read_chars
    FILE.load(path)
    assert size < psutil.Process().io_counters().read_chars - before < 1.1 * size


def test_what_the_disk_says_while_more_is_written_is_not_lost(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of it once: to the thread that has asked, and not to who flushes the file at the end."""
    FILE.save(path, {"weight": torch.ones(3)})
    monkeypatch.setattr(checked, "FLUSHED_AT_ONCE", checked.PIECE)
    real, failed = os.fsync, []

    def failing(descriptor: int) -> None:
        if not failed:
            failed.append(descriptor)
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(CheckpointError, match=r"Input/output error.*untouched"):
        FILE.save(path, {"weight": torch.zeros(LARGE)})
    assert failed
    assert torch.equal(FILE.load(path)["weight"], torch.ones(3))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_memory_in_large_pages_is_memory() -> None:
    for size in (0, 10, WORTH_IT, WORTH_IT + 4099):
        tensor = in_large_pages(torch.empty(size, dtype=torch.uint8))
        assert tensor.fill_(7).sum(dtype=torch.int64) == 7 * size
        part = in_large_pages(torch.empty(size + 100, dtype=torch.uint8)[100:])
        assert part.fill_(7).sum(dtype=torch.int64) == 7 * size


def test_large_pages_are_asked_for_until_the_first_that_is_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a hypervisor has to bring them back, one is slow, and the others would be."""
    asked: list[int] = []
    monkeypatch.setattr(memory, "_pages", memory._LargePages())
    monkeypatch.setattr(memory._pages, "worth_it", True)
    monkeypatch.setattr(memory._pages, "_advise", lambda begin, size, advice: asked.append(begin))
    monkeypatch.setattr(memory, "DEAR", 60.0)
    page = memory.LARGE_PAGE
    memory.in_large_pages_at(page + 5, 4 * page)
    assert sorted(set(asked)) == [2 * page, 3 * page, 4 * page]  # which lie in it as a whole
    asked.clear()
    monkeypatch.setattr(memory, "DEAR", 0.0)
    memory.in_large_pages_at(page, 4 * page)
    memory.in_large_pages_at(page, 4 * page)
    assert set(asked) == {page}
