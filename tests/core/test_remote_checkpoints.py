"""Checkpoints on stores: written whole or not at all, whatever breaks on the way; and read without trust."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_line import Line

from fabric_core import CheckpointError, Fabric
from fabric_core.manifest import MANIFEST
from fabric_core.remote import FORMAT, Remote


@pytest.fixture
def store() -> Iterator[Line]:
    """An empty store."""
    yield Line()
    Line.reset()


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, in which nothing is to stay."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert [each.name for each in folder.iterdir() if not each.name.startswith("torchinductor_")] == []


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    """One process."""
    with Fabric(accelerator="cpu", devices=1) as made:
        made.launch()
        yield made


def test_a_file_on_a_store_is_what_a_local_one_is(fabric: Fabric, store: Line) -> None:
    url = "line://bucket/deep/run.pt"
    model = torch.nn.Linear(3, 2)
    fabric.save(url, {"model": model, "step": 3})
    assert store.find("/") == ["/bucket/deep/run.pt"]
    with store.open("/bucket/deep/run.pt") as file:
        assert torch.load(file, weights_only=True)["step"] == 3
    state = {"model": torch.nn.Linear(3, 2), "step": 0}
    assert fabric.load(url, state) == {}
    assert state["step"] == 3
    assert torch.equal(state["model"].weight, model.weight)
    fabric.save(url, model.state_dict())
    fabric.load_raw(url, state["model"])
    fabric.save(url, {"step": 4}, wait=False)
    assert fabric.load(url) == {"step": 4}


def test_an_address_of_a_file_is_a_path(fabric: Fabric, tmp_path: Path) -> None:
    fabric.save(f"file://{tmp_path}/x.pt", {"step": 3})
    assert fabric.load(tmp_path / "x.pt") == fabric.load(f"file://{tmp_path}/x.pt") == {"step": 3}


def test_a_line_that_is_cut_anywhere_leaves_the_old_file(fabric: Fabric, store: Line) -> None:
    url = "line://bucket/run.pt"
    fabric.save(url, {"w": torch.full((1000,), 1.0)})
    calls, failed = 0, True
    while failed:
        Line.calls_left = calls
        error = error_of(fabric.save, url, {"w": torch.full((1000,), 2.0)})
        failed, Line.calls_left, calls = error is not None, None, calls + 1
        if failed:
            assert all(words in str(error) for words in ("run.pt", "cut", "untouched"))
            assert fabric.load(url)["w"].tolist() == [1.0] * 1000
    assert calls > 3
    assert fabric.load(url)["w"].tolist() == [2.0] * 1000
    fabric.save(url, {"step": 3})  # with a line, what cut ones have left goes
    assert store.find("/") == ["/bucket/run.pt"]


def test_a_line_that_is_cut_while_reading_is_one_error(fabric: Fabric, store: Line) -> None:
    fabric.save("line://bucket/run.pt", {"w": torch.ones(1000)})
    for calls in range(2):
        Line.calls_left = calls
        with pytest.raises(CheckpointError, match=r"could not read the checkpoint .*run\.pt'.*cut"):
            fabric.load("line://bucket/run.pt")
    assert store.isfile("/bucket/run.pt")


def error_of(function: Callable[..., Any], *arguments: Any) -> Exception | None:
    try:
        function(*arguments)
    except (CheckpointError, ConnectionError) as error:
        return error
    return None


def folder_with(path: Path, **files: str) -> Path:
    """A folder as a strategy writes it."""
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name.replace("_", ".")).write_text(content)
    (path / MANIFEST).write_text('{"format": "some", "version": 1, "world_size": 2}')
    return path


def publish(url: str, folder: Path, token: str) -> None:
    names = sorted(entry.name for entry in folder.iterdir())
    Remote(url).upload(folder, names, token)
    Remote(url).publish_folder(folder, folder.with_suffix(".json"), token)


def fetched(url: str, folder: Path) -> dict[str, str]:
    folder.mkdir()
    found = Remote(url).find()
    Remote(url).fetch(found, found.sizes, folder)
    return {entry.name: entry.read_text() for entry in sorted(folder.iterdir())}


def test_a_folder_is_replaced_at_once_and_the_old_files_go(store: Line, tmp_path: Path) -> None:
    url = "line://bucket/run"
    old, new = (
        folder_with(tmp_path / "old", a="old", b="old"),
        folder_with(tmp_path / "new", a="new", c="new"),
    )
    publish(url, old, "0" * 16)
    assert set(fetched(url, tmp_path / "first")) == {"a", "b", MANIFEST}
    calls, failed = 0, True
    while failed:
        Line.calls_left = calls
        failed = error_of(publish, url, new, f"{calls + 1:016x}") is not None
        Line.calls_left, calls = None, calls + 1
        if failed:
            assert fetched(url, tmp_path / f"after {calls}")["a"] == "old"
    assert calls > 5
    assert fetched(url, tmp_path / "second").keys() == {"a", "c", MANIFEST}
    publish(url, old, "f" * 16)  # with a line, what cut ones have left goes as well
    assert {path.split("/")[3] for path in store.find("/bucket/run")} == {MANIFEST, "f" * 16}
    assert json.loads(store.cat_file(f"/bucket/run/{MANIFEST}"))["world_size"] == 2


def test_neither_a_file_nor_a_folder_takes_the_place_of_the_other(
    fabric: Fabric, store: Line, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path / "folder", a="a")
    fabric.save("line://bucket/file", {"step": 3})
    with pytest.raises(CheckpointError, match="That is a file"):
        publish("line://bucket/file", folder, "0" * 16)
    assert fabric.load("line://bucket/file") == {"step": 3}
    publish("line://bucket/folder", folder, "0" * 16)
    with pytest.raises(CheckpointError, match=r"That is a folder\. Name a file.*untouched"):
        fabric.save("line://bucket/folder", {"step": 4})
    assert fetched("line://bucket/folder", tmp_path / "fetched")["a"] == "a"
    assert len(store.find("/")) == 4


def test_what_killed_processes_have_left_goes_with_the_next_save(fabric: Fabric, store: Line) -> None:
    store.pipe_file("/bucket/.run.pt.0000000000000000.tmp", b"half")
    store.pipe_file("/bucket/.other.pt.0000000000000000.tmp", b"half")
    fabric.save("line://bucket/run.pt", {"step": 3})
    assert store.find("/") == ["/bucket/.other.pt.0000000000000000.tmp", "/bucket/run.pt"]


@pytest.mark.parametrize(
    "pointer",
    [
        "",
        "[]",
        *({"folder": folder, "files": {"a": 1}} for folder in ("..", "../x", "/etc", None, 7)),
        *(
            {"folder": "0" * 16, "files": files}
            for files in (
                {},
                [],
                None,
                {"../a": 1},
                {"/etc/a": 1},
                {"a/b": 1},
                {"..": 1},
                {"a": -1},
                {"a": "1"},
            )
        ),
        {"folder": "0" * 16, "files": {"a": 10**15}},
        {"folder": "0" * 16, "files": {"not-there": 1}},
        {"version": 2},
        {"format": "other"},
    ],
    ids=str,
)
def test_a_record_that_leads_elsewhere_is_refused(
    fabric: Fabric, store: Line, temporary: Path, pointer: Any
) -> None:
    content = {"format": FORMAT, "version": 1, **pointer} if isinstance(pointer, dict) else pointer
    store.pipe_file(f"/bucket/run/{MANIFEST}", json.dumps(content).encode() if pointer else b"")
    store.pipe_file(f"/bucket/run/{'0' * 16}/a", b"x")
    store.pipe_file("/bucket/a", b"secret")
    with pytest.raises(CheckpointError, match="line://bucket/run|/bucket/run"):
        fabric.load("line://bucket/run")
    assert not (temporary.parent / "a").exists()


def test_what_is_not_there_or_cannot_be_had_is_one_error(fabric: Fabric, store: Line) -> None:
    store.pipe_file("/bucket/half/0000000000000000/a", b"x")
    for url, words in (
        ("line://bucket/none", "nothing of that name"),
        ("line://bucket/half", "no checkpoint that was finished"),
        ("nothing://bucket/x", "Protocol not known"),
    ):
        with pytest.raises(CheckpointError, match=words):
            fabric.load(url)
    with pytest.raises(CheckpointError, match="Protocol not known"):
        fabric.save("nothing://bucket/x", {"step": 3})
    with pytest.raises(CheckpointError) as raised:
        fabric.load("nothing://me:secret@host/x")
    assert "secret" not in str(raised.value)


def test_a_path_with_signs_of_addresses_is_still_a_path(
    fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lr:0.1", "a//b", "s3:x"):
        fabric.save(name, {"step": 3})
        assert (tmp_path / name).is_file()
