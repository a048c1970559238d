"""Checkpoints in another form: shards as one file and back, and weights as safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

from fabric_core import CheckpointError, CheckpointKeyError, ConfigurationError, Fabric, UnsafeCheckpointError
from fabric_core.cli import fabric as command
from fabric_core.converting import consolidate, consolidated, shard


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, dtype=torch.bfloat16))


def state() -> dict[str, Any]:
    torch.manual_seed(4)
    trained = model()
    optimizer = torch.optim.Adam(trained.parameters())
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    values = {"step": 3, "sparse": torch.eye(3).to_sparse(), "complex": torch.ones(2, dtype=torch.complex128)}
    return {"model": trained.state_dict(), "optimizer": optimizer.state_dict(), "values": values}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        one, other = one.to_dense(), other.to_dense()
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(state(), tmp_path / "whole.pt")
    return tmp_path / "whole.pt"


def call(*words: object) -> str:
    done = CliRunner().invoke(command, list(map(str, words)), catch_exceptions=True)
    if done.exception:
        raise done.exception
    return done.output


@pytest.mark.parametrize("shards", [1, 3, 8])
def test_a_file_becomes_shards_and_a_file_again(file: Path, tmp_path: Path, shards: int) -> None:
    folder, again = tmp_path / "folder", tmp_path / "again.pt"
    assert call("shard", file, "-o", folder, "--shards", shards) == f"{file} is now in {folder}.\n"
    assert len(list(folder.glob("shard-*"))) == min(shards, 7)  # no tensor has more rows
    call("consolidate", folder, "-o", again)
    assert same(torch.load(again), state())
    with Fabric(accelerator="cpu", devices=1) as fabric:
        assert same(fabric.load(folder), state())


def test_weights_go_to_safetensors_and_come_from_there(file: Path, tmp_path: Path) -> None:
    shard(file, tmp_path / "folder", 2)
    weights = tmp_path / "model.safetensors"
    for source in (file, tmp_path / "folder"):
        consolidate(source, weights, "model")
        assert same(dict(sorted(load_file(weights).items())), dict(sorted(state()["model"].items())))
    save_file({f"{name}": tensor + 1 for name, tensor in state()["model"].items()}, weights)
    with Fabric(accelerator="cpu", devices=1) as fabric:
        ready = fabric.setup(model())
        fabric.load_raw(weights, ready)
        assert same(dict(ready.state_dict()), {name: tensor + 1 for name, tensor in state()["model"].items()})
        with pytest.raises(CheckpointError, match="does not fit this Linear"):
            fabric.load_raw(weights, fabric.setup(nn.Linear(2, 2)))


def test_a_part_of_a_checkpoint_is_named_by_dots(file: Path) -> None:
    assert same(consolidated(file, "values"), state()["values"])
    with pytest.raises(
        CheckpointKeyError, match=r"has no 'models'. There is: 'model', 'optimizer', 'values'"
    ):
        consolidated(file, "models")
    with pytest.raises(CheckpointError, match="holds is a int, and no dictionary"):
        consolidated(file, "values.step")


def test_a_file_of_safetensors_takes_tensors_only(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match=r"'model', 'optimizer', 'values' are none.*--key model"):
        consolidate(file, output)
    with pytest.raises(CheckpointError, match=r"dtype torch.complex128"):
        torch.save({"x": torch.ones(2, dtype=torch.complex128)}, file)
        consolidate(file, output)
    with pytest.raises(CheckpointError, match=r"torch.sparse_coo"):
        torch.save({"x": torch.eye(2).to_sparse()}, file)
        consolidate(file, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.pt"]


def test_nothing_is_replaced_by_accident(file: Path, tmp_path: Path) -> None:
    shard(file, tmp_path / "folder")
    (there := tmp_path / "there.pt").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"there\.pt' is there already.*--force"):
        call("consolidate", tmp_path / "folder", "-o", there)
    with pytest.raises(ConfigurationError, match=r"is a folder, and the result is a file"):
        call("consolidate", tmp_path / "folder", "-o", tmp_path / "folder", "--force")
    with pytest.raises(ConfigurationError, match=r"is a file, and the result is a folder"):
        call("shard", file, "-o", there, "--force")
    with pytest.raises(CheckpointError, match=r"There is no checkpoint at .*nothing"):
        call("consolidate", tmp_path / "nothing", "-o", there, "--force")
    assert there.read_text() == "mine"
    call("consolidate", tmp_path / "folder", "-o", there, "--force")
    assert same(torch.load(there), state())


def test_a_folder_in_which_people_have_other_things_is_not_replaced_even_by_force(
    file: Path, tmp_path: Path
) -> None:
    (home := tmp_path / "home").mkdir()
    (home / "thesis").write_text("mine")
    with pytest.raises(
        CheckpointError, match=r"home' is a folder with other things in it, and no checkpoint"
    ):
        call("shard", file, "-o", home, "--force")
    assert [path.name for path in home.iterdir()] == ["thesis"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "whole.pt"]
    (home / "thesis").unlink()
    call("shard", file, "-o", home, "--force")
    call("shard", file, "-o", home, "--force")
    assert same(consolidated(home), state())


def test_what_could_execute_code_has_to_be_trusted(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2), "y": CliRunner}, tmp_path / "whole.pt")
    with pytest.raises(UnsafeCheckpointError, match="click.testing"):
        call("shard", tmp_path / "whole.pt", "-o", tmp_path / "folder")
    with pytest.warns(UserWarning, match="Loading it will need weights_only=False"):
        call("shard", tmp_path / "whole.pt", "-o", tmp_path / "folder", "--trust")
    with pytest.raises(UnsafeCheckpointError, match="click.testing"):
        consolidated(tmp_path / "folder")
    assert consolidated(tmp_path / "folder", weights_only=False)["y"] is CliRunner


@pytest.mark.parametrize("text", [b"", b"\xff" * 100, json.dumps({"x": 1}).encode(), b"\x02\0\0\0\0\0\0\0[]"])
def test_what_is_no_file_of_safetensors_is_refused(tmp_path: Path, text: bytes) -> None:
    (path := tmp_path / "x.safetensors").write_bytes(text)
    with pytest.raises(CheckpointError, match="no file of safetensors"):
        consolidated(path)
