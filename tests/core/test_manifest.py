"""What a checkpoint says of itself: read without PyTorch, older and newer versions told apart."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_core import CheckpointError, Fabric, __version__
from fabric_core.manifest import MANIFEST, read_manifest
from fabric_core.parts.file_format import FORMAT, VERSION
from fabric_core.parts.torch_file import TorchFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.pt"


def write_with(path: Path, manifest: Any) -> None:
    """A plain file of PyTorch, with a manifest of one's own."""
    torch.save({"w": torch.arange(4.0)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/{MANIFEST}", text)


def test_a_file_says_what_wrote_it(path: Path) -> None:
    with Fabric(accelerator="cpu", devices=1, precision="bf16-mixed") as fabric:
        fabric.launch()
        fabric.save(path, {"w": torch.arange(4.0)})
    manifest = read_manifest(path)
    assert manifest == {
        "format": FORMAT,
        "version": VERSION,
        "plan": {"strategy": "single_device", "precision": "bf16-mixed", "accelerator": "cpu"},
        "versions": {
            "fabric-backends": __version__,
            "fabric-core": __version__,
            "torch": str(torch.__version__),
        },
        "world_size": 1,
    }


def test_it_is_read_without_pytorch(path: Path) -> None:
    TorchFile().save(path, {"w": torch.ones(2)})
    code = (
        "import sys; from pathlib import Path; from fabric_core.manifest import read_manifest;"
        f"print(read_manifest(Path({str(path)!r}))['format'], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [FORMAT, "False"]


def test_the_tensors_stay_where_pytorch_has_put_them(path: Path, tmp_path: Path) -> None:
    """Aligned, mapped as ever, and also found by the way that computes their places."""
    given = {"w": torch.randn(33), "b": torch.arange(5, dtype=torch.int8), "names": ["ä"], "c": torch.ones(2)}
    plain = tmp_path / "plain" / ".x.pt.00000000.tmp"  # as long a name as the temporary one
    plain.parent.mkdir()
    torch.save(given, plain)
    TorchFile().save(path, given)
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(plain) as theirs:
        assert [(entry.header_offset, entry.file_size) for entry in ours.infolist()[:-1]] == [
            (entry.header_offset, entry.file_size) for entry in theirs.infolist()
        ]
    computed = torch.utils.serialization.config.patch({"load.calculate_storage_offsets": True})
    for mapped in (False, True):
        found = torch.load(path, weights_only=True, mmap=mapped)
        assert torch.equal(found["w"], given["w"])
        assert torch.equal(found["b"], given["b"])
        assert found["w"].data_ptr() % 64 == 0
        with computed:
            assert torch.equal(torch.load(path, weights_only=True, mmap=mapped)["c"], given["c"])


def test_a_name_in_any_script_is_no_trouble(tmp_path: Path) -> None:
    for name in ("größe.pt", "鍵", "a b.pt", ".hidden", "x" * 200):
        TorchFile().save(tmp_path / name, {"w": torch.ones(2)})
        assert TorchFile().load(tmp_path / name)["w"].tolist() == [1, 1]
        assert read_manifest(tmp_path / name) is not None


def test_what_has_no_manifest_is_answered_with_none(tmp_path: Path, path: Path) -> None:
    torch.save({"w": torch.ones(2)}, path)
    assert read_manifest(path) is None
    assert TorchFile().load(path)["w"].tolist() == [1, 1]
    (tmp_path / "text").write_text("text")
    assert [read_manifest(tmp_path / name) for name in ("text", "nothing", ".")] == [None, None, None]


def test_a_folder_has_its_manifest_as_a_file(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"format": "fabric-sharded", "version": 2, "world_size": 4}')
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest["world_size"] == 4


@pytest.mark.parametrize("way", ["folder", "file"])
def test_a_newer_version_is_refused_with_advice_and_its_manifest_can_still_be_read(
    path: Path, way: str
) -> None:
    newer = {"format": FORMAT, "version": 7, "versions": {"fabric-core": "9.1"}, "more": [1]}
    if way == "folder":
        path.mkdir()
        (path / MANIFEST).write_text(json.dumps(newer))
        assert read_manifest(path) == newer
        return
    write_with(path, newer)
    assert read_manifest(path) == newer
    content = bytearray(path.read_bytes())
    place = content.index(torch.arange(4.0).numpy().tobytes())
    content[place] ^= 1  # and nobody reads on: this would be damage
    path.write_bytes(content)
    expected = (
        r"of version 7 .*reads versions up to 1\. Load it with the version that wrote it \(9\.1\), or upgrade"
    )
    with pytest.raises(CheckpointError, match=expected):
        TorchFile().load(path)


@pytest.mark.parametrize(
    "manifest",
    [
        *("", "{", "[]", "3", '"format version"', "null", "[" * 100_000, '{"format": 1e999}', "\ud800"),
        *({}, {"format": FORMAT}, {"version": 1}, {"format": 1, "version": 1}),
        *({"format": FORMAT, "version": value} for value in (True, "1", 1.0, None, [1], 0, -1)),
        {"format": "fabric-sharded", "version": 1},
        {"format": FORMAT, "version": 1, "versions": []},
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_manifest_that_is_none_of_ours_is_one_error(path: Path, manifest: Any) -> None:
    if manifest == "\ud800":
        manifest = json.dumps(manifest)
    write_with(path, manifest)
    with pytest.raises(CheckpointError, match=r"x\.pt'"):
        TorchFile().load(path)


def test_a_manifest_that_is_there_twice_or_too_large_is_refused(path: Path) -> None:
    write_with(path, {"format": FORMAT, "version": 1})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[-1], "{}")
    with pytest.raises(CheckpointError, match="more than once"):
        read_manifest(path)
    torch.save({}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"x/{MANIFEST}", b"0" * (120 << 20))
    with pytest.raises(CheckpointError, match="too large"):
        read_manifest(path)
