"""What a load returns of a folder of shards: a dictionary that reads tensors when they are used, and nothing before."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import one_process
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.serialization import config

from fabric_core import CheckpointError, Fabric
from fabric_core.converting import shard
from fabric_core.sharded.remainder import postponed, read_now
from fabric_core.sharded.safetensors import SafetensorsFile
from fabric_core.sharded.single import MappedTensors

pytestmark = pytest.mark.usefixtures("core_alone")


fabric = one_process.fabric


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(6, 4)


MOMENTS = {"0": {"exp_avg": torch.arange(24.0).reshape(4, 6)}, "1": {"exp_avg": torch.arange(4.0)}}
OTHERS = {"optimizer": {"state": MOMENTS, "lr": 0.1}, "average": torch.ones(3), "step": 7, "tags": ["a"]}


@pytest.fixture
def folder(fabric: Fabric, tmp_path: Path) -> Path:
    """A checkpoint in two shards, of a model and of more."""
    fabric.save(tmp_path / "file", {"model": net(), **OTHERS})
    shard(tmp_path / "file", tmp_path / "run", 2)
    return tmp_path / "run"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is read, from now on."""
    names: list[str] = []
    read_into = SafetensorsFile.read_into

    def noted(self: SafetensorsFile, name: str, target: torch.Tensor) -> int:
        names.append(name.partition("[")[0])
        return read_into(self, name, target)

    monkeypatch.setattr(SafetensorsFile, "read_into", noted)
    return names


@pytest.fixture
def rest(fabric: Fabric, folder: Path, reads: list[str]) -> dict[str, Any]:
    """What a load of the model alone returns."""
    model = net()
    torch.nn.init.zeros_(model.weight)  # type: ignore[arg-type]
    rest = fabric.load(folder, {"model": model})
    assert torch.equal(model.weight, net().weight)  # type: ignore[arg-type]
    assert {name.partition(".")[0] for name in reads} == {"model"}
    reads.clear()
    return rest


def same(one: Any, other: Any) -> bool:
    if isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in other)
    return torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other


def test_a_value_is_read_when_it_is_asked_for_and_once(rest: dict[str, Any], reads: list[str]) -> None:
    optimizer = rest["optimizer"]
    assert same(optimizer, OTHERS["optimizer"])
    assert type(optimizer) is dict
    assert set(reads) == {"optimizer.state.0.exp_avg", "optimizer.state.1.exp_avg"}
    optimizer["lr"] = 0.2
    assert rest["optimizer"] is optimizer
    assert rest.get("optimizer") is optimizer
    assert len(reads) == 4  # two chunks each


def test_looking_around_printing_and_dropping_read_nothing(rest: dict[str, Any], reads: list[str]) -> None:
    assert isinstance(rest, dict)
    assert list(rest) == list(rest.keys()) == list(OTHERS)
    assert list(reversed(rest)) == list(reversed(OTHERS))
    assert ("average" in rest, "model" in rest, len(rest), bool(rest)) == (True, False, 4, True)
    assert rest != {}
    assert rest.get("model", 3) == rest.pop("model", 3) == 3
    assert (rest["step"], rest.pop("tags")) == (7, ["a"])
    assert repr(rest) == (
        "{'optimizer': <2 tensor(s), 0.0 MB, not read yet>, 'average': <1 tensor(s), 0.0 MB, not read yet>, 'step': 7}"
    )
    with pytest.raises(KeyError):
        rest["model"]
    del rest["optimizer"]
    rest["average"] = 5
    assert rest == {"average": 5, "step": 7}
    rest.clear()
    assert rest == {}
    with pytest.raises(KeyError):
        rest.popitem()
    assert reads == []


@pytest.mark.parametrize(
    "made",
    [
        dict,
        copy.copy,
        copy.deepcopy,
        lambda rest: rest.copy(),
        lambda rest: {**rest},
        lambda rest: dict(**rest),
        lambda rest: {} | rest,
        lambda rest: rest | {},
        lambda rest: dict(rest.items()),
        lambda rest: dict(zip(rest, rest.values(), strict=True)),
        lambda rest: {key: rest.pop(key) for key in list(rest)},
        lambda rest: dict([rest.popitem() for _ in range(4)][::-1]),
        lambda rest: {key: rest.setdefault(key, None) for key in list(rest)},
        lambda rest: pickle.loads(pickle.dumps(rest)),
    ],
)
def test_whatever_a_dictionary_is_turned_into_has_what_was_saved(rest: dict[str, Any], made: Any) -> None:
    assert same(made(rest), OTHERS)


def test_it_is_saved_as_what_it_holds(fabric: Fabric, rest: dict[str, Any], tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save(rest, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True), OTHERS)
    fabric.save(tmp_path / "again", {"deep": {"rest": rest}, "rest": rest})
    again = fabric.load(tmp_path / "again")
    assert same(again["rest"], OTHERS)
    assert same(again["deep"]["rest"], OTHERS)
    rest |= {"optimizer": 1}
    del rest["average"]
    assert json.loads(json.dumps(rest)) == {"optimizer": 1, "step": 7, "tags": ["a"]}


def test_without_a_state_everything_is_read_when_it_is_used(
    fabric: Fabric, folder: Path, reads: list[str]
) -> None:
    whole = fabric.load(folder)
    assert whole["step"] == 7
    assert reads == []
    assert same(whole["model"], dict(net().state_dict()))
    assert {name.partition(".")[0] for name in reads} == {"model"}


def test_of_a_collection_in_the_state_the_rest_is_left(fabric: Fabric, tmp_path: Path) -> None:
    fabric.save(tmp_path / "file", {"nets": {"a": net(), "b": net()}, "step": 1})
    shard(tmp_path / "file", tmp_path / "run")
    rest = fabric.load(tmp_path / "run", {"nets": {"b": net()}})
    assert same(rest, {"step": 1, "nets": {"a": dict(net().state_dict())}})


def test_what_is_gone_or_another_by_then_is_a_clear_error(
    fabric: Fabric, folder: Path, rest: dict[str, Any], tmp_path: Path
) -> None:
    words = r"has under 'optimizer' is read only now that it is used, and it cannot be: .*Use what load\(\) returns"
    kept = rest["average"]
    fabric.save(
        tmp_path / "file", {"model": net(), **OTHERS, "optimizer": {"state": {}, "x": torch.ones(4, 7)}}
    )
    shard(tmp_path / "file", folder, 2)
    with pytest.raises(CheckpointError, match=words):
        rest["optimizer"]
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=rf"{folder}.*{words}"):
        dict(rest)
    assert rest["average"] is kept
    del rest["optimizer"]
    assert rest["step"] == 7


def test_what_is_damaged_is_told_when_it_is_used(fabric: Fabric, folder: Path) -> None:
    file = folder / "shard-000000.safetensors"
    content = file.read_bytes()
    place = content.index(MOMENTS["0"]["exp_avg"][:2].numpy().tobytes())
    file.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    rest = fabric.load(folder, {"model": net()})
    assert same(rest["average"], OTHERS["average"])
    with pytest.raises(
        CheckpointError, match=r"'optimizer' is read only now.*checksum of 'optimizer\.state\.0\.exp_avg"
    ):
        rest["optimizer"]


def test_the_working_directory_may_change_meanwhile(
    fabric: Fabric, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder.parent)
    rest = fabric.load(folder.name, {"model": net()})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert same(dict(rest), OTHERS)


# -- a file of safetensors, without checksums -----------------------------------------------------------------------


def test_another_file_of_safetensors_is_never_taken_for_the_one_that_was_loaded(
    fabric: Fabric, tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, path)
    rest = fabric.load(path)
    assert torch.equal(rest["a"], torch.ones(3))
    save_file({"a": torch.zeros(3), "b": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="under 'b' is read only now.*is another one than was loaded"):
        rest["b"]
    path.unlink()
    with pytest.raises(CheckpointError, match="under 'b' is read only now.*is missing"):
        rest.get("b")


# -- one file, mapped into memory ---------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, Any]:
    """A file of several pages, and what strategies that shard load from it."""
    torch.save({"large": torch.arange(100_000.0), "small": torch.tensor(1.0)}, tmp_path / "file")
    tensors = MappedTensors(tmp_path / "file")
    settings: Any = config
    with settings.patch({"load.mmap": True}):
        return tmp_path / "file", postponed(tensors.stored(torch.load(tmp_path / "file")))


def test_what_is_mapped_stays_what_it_was_when_its_file_is_renamed_replaced_or_deleted(
    file: tuple[Path, Any],
) -> None:
    path, loaded = file
    assert loaded["small"] == 1.0
    for change in (
        lambda: path.rename(path.with_name("other")),
        lambda: torch.save({"large": torch.zeros(3)}, path),
        lambda: path.with_name("other").unlink(),
        path.unlink,
    ):
        change()
        assert torch.equal(read_now(loaded)["large"], torch.arange(100_000.0))


def test_a_file_that_was_written_to_in_its_place_is_refused_and_not_looked_at(file: tuple[Path, Any]) -> None:
    path, loaded = file
    path.write_bytes(b"short")  # looking would end this process
    with pytest.raises(CheckpointError, match=r"file' was written to since it was loaded"):
        read_now(loaded)
