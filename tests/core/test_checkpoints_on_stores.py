"""The manager of checkpoints on a store, and conversions from and to one: nothing torn, whatever breaks on the way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from cut_line import Line

from fabric_core import CheckpointError, ConfigurationError, Fabric
from fabric_core.checkpoints import Checkpoints, on_store
from fabric_core.cli import convert
from fabric_core.converting import consolidate, consolidated, shard
from fabric_core.manifest import MANIFEST

pytestmark = pytest.mark.usefixtures("core_alone")

URL = "line://bucket/runs/1"


@pytest.fixture
def store() -> Iterator[Line]:
    """An empty store."""
    yield Line()
    Line.reset()


@pytest.fixture
def fabric(store: Line) -> Iterator[Fabric]:
    with Fabric(accelerator="cpu") as fabric:
        yield fabric


@pytest.fixture
def manager(fabric: Fabric) -> Callable[..., Checkpoints]:
    """Make a manager of an address."""
    return lambda **options: fabric.checkpoints(URL, **options)


def state(number: int = 0) -> dict[str, Any]:
    return {"number": number, "values": torch.full((800,), float(number))}


def steps(checkpoints: Checkpoints) -> list[int]:
    return [each.step for each in checkpoints]


def below(store: Line) -> list[str]:
    """What lies on the store, but for the signature of the owner."""
    paths = [path.removeprefix("/bucket/runs/1/") for path in store.find("/")]
    return [path for path in paths if not path.endswith(".owner")]


def error_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> CheckpointError | None:
    try:
        function(*arguments, **options)
    except CheckpointError as error:
        return error
    return None


def folder_at(url: str, number: int, tmp_path: Path) -> str:
    """A checkpoint in shards, as ranks would have written it there."""
    file = tmp_path / f"{number}.pt"
    torch.save(state(number), file)
    shard(file, url, 2)
    return url


def test_a_manager_on_a_store_names_finds_and_rotates(
    manager: Callable[..., Checkpoints], store: Line
) -> None:
    checkpoints = manager(keep=2, keep_best=("loss", "min"), every=2)
    assert checkpoints.latest() is checkpoints.best() is checkpoints.resume(state()) is None
    for step, loss in enumerate([9.0, 1.0, float("nan"), 3.0, 4.0, 5.0]):
        path = checkpoints.save(state(step), step, metrics={"loss": loss}, wait=step % 2 == 0)
        assert path == f"{URL}/step-{step:09d}"
    assert checkpoints.save(state(6), 5) == f"{URL}/step-000000005-1"
    assert [(each.name, each.metrics) for each in manager()] == [
        ("step-000000001", {"loss": 1.0}),
        ("step-000000004", {"loss": 4.0}),
        ("step-000000005-1", {}),
    ]
    assert manager().latest(verify=True) == f"{URL}/step-000000005-1"
    assert checkpoints.best() == f"{URL}/step-000000001"
    assert below(store) == [f"step-00000000{name}" for name in ("1", "1.json", "4", "4.json", "5-1")]
    target = state()
    resumed = manager(every=2)
    assert resumed.resume(target) == {}
    assert target["number"] == 6
    assert [step for step in (6, 7, 8) if resumed.due(step)] == [6, 7, 8]


def test_folders_count_from_their_record_on_and_are_deleted_from_it_on(
    manager: Callable[..., Checkpoints], fabric: Fabric, store: Line, tmp_path: Path
) -> None:
    for step in (1, 2):
        folder_at(f"{URL}/step-00000000{step}", step, tmp_path)
    store.pipe_file("/bucket/runs/1/step-000000003/0123456789abcdef/shard", b"half of it")
    with warnings.catch_warnings(
        action="error"
    ):  # for who looks, what goes on elsewhere is nothing to be told of
        assert steps(manager()) == [1, 2]
    target = state()
    rest = manager().resume({"number": 0})
    assert torch.equal(rest.pop("values"), state(2)["values"])  # fetched again, since it was not asked for
    rest = manager().resume({"number": 0})
    folder_at(f"{URL}/step-000000002", 7, tmp_path)
    with pytest.raises(CheckpointError, match=r"runs/1/step-000000002' has under 'values' is read only now"):
        rest["values"]
    path = manager(keep=1).save(target, 3)
    assert path == f"{URL}/step-000000003-1"
    assert below(store) == ["step-000000003-1", "step-000000003/0123456789abcdef/shard"]


def test_a_line_that_is_cut_anywhere_in_a_save_or_a_rotation_leaves_a_checkpoint_to_resume_from(
    manager: Callable[..., Checkpoints], store: Line, tmp_path: Path
) -> None:
    calls, cut = 0, True
    while cut:
        Line.reset()
        folder_at(f"{URL}/step-000000001", 1, tmp_path)
        checkpoints = manager(keep=1)
        Line.calls_left = calls
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            error = error_of(checkpoints.save, state(2), 2, metrics={"loss": 1.0})
            saved = error is None
            assert saved or all(words in str(error) for words in ("the line is cut", "bucket/runs/1"))
        Line.calls_left, calls = None, calls + 1
        cut = not saved or bool(noted)
        target = state()
        assert manager().resume(target) is not None
        assert target["number"] == (2 if 2 in steps(manager()) else 1)
        assert torch.equal(target["values"], state(target["number"])["values"])
        if saved:
            assert target["number"] == 2
            assert all("cannot be deleted" in str(each.message) for each in noted)
    assert calls > 15
    assert below(store) == ["step-000000002", "step-000000002.json"]


def test_a_store_that_cannot_be_reached_is_an_error_and_not_an_empty_one(
    manager: Callable[..., Checkpoints], fabric: Fabric
) -> None:
    checkpoints = manager(keep_best=("loss", "min"))
    checkpoints.save(state(), 1, metrics={"loss": 1.0})
    for calls in range(2):
        Line.calls_left = calls
        with pytest.raises(CheckpointError, match="bucket/runs/1' cannot be read: ConnectionError"):
            checkpoints.best()
    Line.calls_left = None
    with pytest.raises(CheckpointError) as raised:
        fabric.checkpoints("nothing://me:secret@host/x").latest()
    assert "secret" not in str(raised.value)


def test_what_a_killed_training_left_goes_when_it_is_a_day_old(
    manager: Callable[..., Checkpoints], store: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [
        "step-000000002/0123456789abcdef/shard",
        ".step-000000003.0123456789abcdef.tmp",
        "step-000000004.json",
    ]
    foreign = ["notes.json", "other-000000001/shard", "step-1/shard"]
    for name in (*left, *foreign):
        store.pipe_file(f"/bucket/runs/1/{name}", b"half of it")
    manager().save(state(), 5)
    assert below(store) == sorted([*left, *foreign, "step-000000005"])  # somebody may still be at it
    monkeypatch.setattr(on_store, "ABANDONED", timedelta())
    manager().save(state(), 6)
    assert below(store) == sorted([*foreign, "step-000000005", "step-000000006"])


def test_of_two_trainings_the_one_that_began_first_is_stopped(
    manager: Callable[..., Checkpoints], store: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other, again = manager(keep=1), manager(keep=1, prefix="other"), manager(keep=1)
    first.save(state(1), 1)
    again.save(state(2), 2)  # of the same process, and so of the same training
    first.save(state(3), 3)
    other.save(state(1), 1)
    with monkeypatch.context() as patch:
        patch.setattr(on_store, "_token", lambda: "another")
        theirs = manager(keep=1)
        assert theirs.resume(state()) == {}
    first.save(state(4), 4)  # looking has taken nothing over
    with monkeypatch.context() as patch:
        patch.setattr(on_store, "_token", lambda: "another")
        theirs.save(state(5), 5)
    with pytest.raises(
        CheckpointError, match=r"Another training saves checkpoints in 'line://bucket/runs/1': process"
    ):
        first.save(state(6), 6)
    other.save(state(2), 2)
    assert (steps(first), steps(other)) == ([5], [2])
    store.rm("/bucket/runs/1", recursive=True)
    first.save(state(7), 7)  # a place that was emptied is nobody's
    assert steps(first) == [7]


def test_a_training_that_was_overtaken_while_it_saved_deletes_nothing(
    manager: Callable[..., Checkpoints], fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = manager(keep=1)
    first.save(state(1), 1)
    save = fabric.save

    def overtaken(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        monkeypatch.setattr(on_store, "_token", lambda: "another")
        manager()._folder.open_for_writing()
        monkeypatch.undo()

    monkeypatch.setattr(fabric, "save", overtaken)
    with pytest.warns(UserWarning, match="step-000000001' cannot be deleted: Another training"):
        first.save(state(2), 2)
    assert steps(first) == [1, 2]


def test_another_file_of_safetensors_is_never_taken_for_the_one_that_was_loaded(
    fabric: Fabric, tmp_path: Path
) -> None:
    url = f"{URL}/weights.safetensors"
    for number in (1, 2):
        torch.save(state(number), tmp_path / "file")
        consolidate(tmp_path / "file", f"{URL}/whole.pt")
        torch.save({"values": state(number)["values"]}, tmp_path / "file")
        consolidate(tmp_path / "file", url)
        if number == 1:
            rest, again = fabric.load(url), fabric.load(url)
            assert torch.equal(rest["values"], state(1)["values"])
    with pytest.raises(
        CheckpointError, match="under 'values' is read only now.*there is another checkpoint now"
    ):
        again["values"]
    with pytest.raises(CheckpointError, match=rf"The checkpoint '{URL}/whole.pt' has no 'model'"):
        consolidated(f"{URL}/whole.pt", "model")


@pytest.mark.parametrize("name", ["runs[12]", "runs*", "run?"])
def test_an_address_that_stands_for_others_is_not_written_to(
    manager: Callable[..., Checkpoints], fabric: Fabric, store: Line, name: str
) -> None:
    manager().save(state(), 1)
    there, url = store.find("/"), f"line://bucket/{name}/1"
    for write in (
        lambda: fabric.checkpoints(url, keep=1),
        lambda: fabric.save(f"{url}/x.pt", state()),
        lambda: consolidate(f"{URL}/step-000000001", f"{url}/x.pt"),
    ):
        with pytest.raises(ConfigurationError, match=r"stand for other names there.*could delete"):
            write()
    assert store.find("/") == there


def test_conversions_read_and_write_stores(fabric: Fabric, store: Line, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    fabric.save(f"{URL}/one.pt", {"model": model, "step": 3})
    commands = {"shard": convert.shard, "consolidate": convert.consolidate}
    for name, *arguments in (
        ("shard", f"{URL}/one.pt", "-o", f"{URL}/shards", "--shards", "2"),
        ("consolidate", f"{URL}/shards", "-o", f"{URL}/two.pt"),
        ("consolidate", f"{URL}/shards", "-o", f"{URL}/model.safetensors", "--key", "model"),
        ("consolidate", f"{URL}/shards", "-o", f"{URL}/my model.safetensors", "--key", "model"),
        ("shard", f"{URL}/my model.safetensors", "-o", str(tmp_path / "model")),
    ):
        result = CliRunner().invoke(commands[name], arguments)
        assert (result.exit_code, result.output) == (0, f"{arguments[0]} is now in {arguments[2]}.\n")
    assert f"shards/{MANIFEST}" in below(store)
    for path in (f"{URL}/one.pt", f"{URL}/two.pt", f"{URL}/shards"):
        found = consolidated(path)
        assert found["step"] == 3
        assert torch.equal(found["model"]["weight"], model.weight)
    assert torch.equal(consolidated(tmp_path / "model")["bias"], model.bias)
    for target, words in (
        (f"{URL}/one.pt", "is there already"),
        (f"{URL}/shards", "is there already"),
        ("nothing://host/x", "Protocol not known"),
    ):
        result = CliRunner().invoke(convert.consolidate, (f"{URL}/shards", "-o", target))
        assert result.exit_code != 0
        assert words in f"{result.output} {result.exception}"
    with pytest.raises(CheckpointError, match="That is a folder"):
        consolidate(f"{URL}/one.pt", f"{URL}/shards")
