"""The manager of a folder of checkpoints, through a Fabric on one process: naming, choosing, rotating, locking."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import one_process
import pytest
import torch

from fabric_core import CheckpointError, ConfigurationError, Fabric, WrongTypeError
from fabric_core.checkpoints import Checkpoints, lock

pytestmark = pytest.mark.usefixtures("core_alone")


def full(*_: Any, **__: Any) -> None:
    """Take the place of a write to a disk that is full."""
    raise OSError(28, "No space left on device")


fabric = one_process.fabric


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "1"


@pytest.fixture
def manager(fabric: Fabric, folder: Path) -> Callable[..., Checkpoints]:
    """Make a manager of the folder."""
    return lambda **options: fabric.checkpoints(folder, **options)


def state(number: int = 0) -> dict[str, Any]:
    return {"number": number, "values": torch.full((8,), float(number))}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.endswith(".lock"))


def steps(checkpoints: Checkpoints) -> list[int]:
    return [each.step for each in checkpoints]


# -- saving and finding -------------------------------------------------------------------------------------------


def test_what_was_saved_is_found_by_step_and_metrics(
    manager: Callable[..., Checkpoints], folder: Path
) -> None:
    checkpoints = manager()
    path = checkpoints.save(state(1), 5, metrics={"loss": torch.tensor(0.1), "accuracy": 3})
    checkpoints.save(state(2), step=100)
    assert path == folder / "step-000000005"
    assert names(folder) == ["step-000000005", "step-000000005.json", "step-000000100"]
    found = list(manager())
    assert [(each.path.name, each.step, each.metrics) for each in found] == [
        ("step-000000005", 5, {"loss": torch.tensor(0.1).item(), "accuracy": 3.0}),
        ("step-000000100", 100, {}),
    ]
    assert manager().latest() == folder / "step-000000100"
    assert torch.load(path, weights_only=True)["number"] == 1


def test_names_sort_as_steps_do_and_steps_sort_also_where_names_do_not(
    manager: Callable[..., Checkpoints], folder: Path
) -> None:
    checkpoints = manager()
    numbers = [10**10, 3, 999_999_999, 0, 20]
    for step in numbers:
        checkpoints.save(state(), step)
    assert steps(checkpoints) == sorted(numbers)
    ordinary = [name for name in names(folder) if len(name) == len("step-000000000")]
    assert ordinary == [f"step-{step:09d}" for step in (0, 3, 20, 999_999_999)]


def test_an_empty_folder_has_nothing_to_resume_from_and_is_not_made(
    manager: Callable[..., Checkpoints], folder: Path
) -> None:
    checkpoints = manager(keep_best=("loss", "min"))
    target = state(7)
    assert checkpoints.latest() is checkpoints.best() is checkpoints.resume(target) is None
    assert list(checkpoints) == []
    assert target["number"] == 7
    assert not folder.exists()


def test_resume_restores_the_latest_and_returns_what_was_left_over(
    manager: Callable[..., Checkpoints],
) -> None:
    checkpoints = manager()
    checkpoints.save(state(1), 1)
    checkpoints.save({**state(2), "more": "left"}, 2)
    target = state()
    assert manager().resume(target) == {"more": "left"}
    assert target["number"] == 2


def test_a_second_checkpoint_of_a_step_does_not_touch_the_first(
    manager: Callable[..., Checkpoints], folder: Path
) -> None:
    checkpoints = manager()
    first = checkpoints.save(state(1), 7, metrics={"loss": 1})
    second = manager().save(state(2), 7, metrics={"loss": 2})
    assert second == folder / "step-000000007-1"
    assert checkpoints.latest() == second
    assert torch.load(first)["number"] == 1
    assert [(each.version, each.metrics["loss"]) for each in checkpoints] == [(0, 1.0), (1, 2.0)]


@pytest.mark.parametrize(
    ("step", "error"), [(-1, ConfigurationError), (1.5, WrongTypeError), ("1", WrongTypeError)]
)
def test_a_step_is_a_whole_number(
    manager: Callable[..., Checkpoints], step: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="step of a checkpoint"):
        manager().save(state(), step)


def test_a_metric_is_a_number(manager: Callable[..., Checkpoints], folder: Path) -> None:
    for value in ("good", torch.zeros(2), None, 10**400):
        with pytest.raises(CheckpointError):
            manager().save(state(), 1, metrics={"loss": value})
    with pytest.raises(CheckpointError, match="numbers, by name"):
        manager().save(state(), 1, metrics=[0.5])
    assert manager().latest() is None


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"keep": True},
        {"keep": 2.0},
        {"keep_best": "loss"},
        {"keep_best": ("loss", "least")},
        {"keep_best": (1, "min")},
        {"keep_best": ("loss", ["min"])},
        {"every": 0},
        {"every": True},
        {"every": 1.5},
        {"every": datetime.timedelta()},
        {"prefix": ""},
        {"prefix": ".hidden"},
        {"prefix": "a/b"},
        {"prefix": None},
        {"prefix": "step-000000001"},
        {"prefix": "a" * 101},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_at_once(
    manager: Callable[..., Checkpoints], options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(repr(next(iter(options.values()))))):
        manager(**options)


# -- the best -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "best"), [("min", 4), ("max", 2)])
def test_the_best_has_the_extreme_metric_and_of_equal_ones_it_is_the_newest(
    manager: Callable[..., Checkpoints], mode: str, best: int
) -> None:
    checkpoints = manager(keep_best=("loss", mode))
    for step, loss in enumerate([3.0, 9.0, 9.0, 1.0, 1.0, math.nan]):
        checkpoints.save(state(step), step, metrics={"loss": loss})
    checkpoints.save(state(), 6)
    assert checkpoints.best() == next(each.path for each in checkpoints if each.step == best)


def test_numbers_that_json_does_not_know_come_back(manager: Callable[..., Checkpoints], folder: Path) -> None:
    checkpoints = manager(keep_best=("a", "min"))
    path = checkpoints.save(
        state(), 1, metrics={"a": math.inf, "b": -math.inf, "c": math.nan, "d": 0.1 + 0.2}
    )
    json.loads(path.with_name(f"{path.name}.json").read_text(), parse_constant=pytest.fail)
    [found] = checkpoints
    assert {name: found.metrics[name] for name in "abd"} == {"a": math.inf, "b": -math.inf, "d": 0.1 + 0.2}
    assert math.isnan(found.metrics["c"])
    assert checkpoints.best() == path


def test_a_metric_that_is_not_the_one_of_the_best_is_warned_of(manager: Callable[..., Checkpoints]) -> None:
    checkpoints = manager(keep_best=("val_loss", "min"))
    with pytest.warns(UserWarning, match="keep_best names 'val_loss'.*'valloss'"):
        checkpoints.save(state(), 1, metrics={"valloss": 1.0})
    assert checkpoints.best() is None


def test_best_and_due_say_what_the_manager_was_not_told(manager: Callable[..., Checkpoints]) -> None:
    with pytest.raises(ConfigurationError, match="keep_best="):
        manager().best()
    with pytest.raises(ConfigurationError, match="every="):
        manager().due(1)


# -- rotation -----------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(manager: Callable[..., Checkpoints], folder: Path) -> None:
    checkpoints = manager(keep=2, keep_best=("loss", "min"))
    for step, loss in enumerate([5.0, 1.0, 2.0, 3.0, 4.0]):
        checkpoints.save(state(step), step, metrics={"loss": loss})
        assert len(steps(checkpoints)) <= 3
    assert steps(checkpoints) == [1, 3, 4]
    assert [name for name in names(folder) if name.endswith(".json")] == [
        f"step-{step:09d}.json" for step in (1, 3, 4)
    ]
    checkpoints.save(state(5), 5, metrics={"loss": 0.5})
    assert steps(checkpoints) == [4, 5]


def test_nothing_is_deleted_before_the_new_one_is_on_disk(
    manager: Callable[..., Checkpoints], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = manager(keep=1)
    old = checkpoints.save(state(1), 1)
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def flushed(descriptor: int) -> None:
        events.append("fsync" if (folder / "step-000000002").exists() else "")
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Any:
        events.append(f"delete {path.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    checkpoints.save(state(2), 2)
    assert not old.exists()
    assert events[-2:] == ["fsync", "delete step-000000001"]


def test_a_save_that_fails_deletes_nothing(
    manager: Callable[..., Checkpoints], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = manager(keep=1)
    checkpoints.save(state(1), 1)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.save(state(2), 2, metrics={"loss": 1})
    monkeypatch.undo()
    assert steps(checkpoints) == [1]
    checkpoints.save(state(2), 2)
    assert steps(checkpoints) == [2]
    assert next(iter(checkpoints)).metrics == {}


def test_what_is_saved_in_the_background_is_counted_by_the_next_save(
    fabric: Fabric, manager: Callable[..., Checkpoints], folder: Path
) -> None:
    checkpoints = manager(keep=1, every=1)
    for step in (1, 2, 3):
        path = checkpoints.save_if_due(state(step), step, metrics={"loss": step}, wait=False)
        assert path == folder / f"step-00000000{step}"
        fabric.wait_for_save()
    assert checkpoints.latest() == path
    assert set(steps(checkpoints)) <= {2, 3}
    checkpoints.save(state(4), 4)
    assert steps(checkpoints) == [4]


def test_a_save_in_the_background_that_fails_is_told_by_the_next_one_and_deletes_nothing(
    manager: Callable[..., Checkpoints], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = manager(keep=1)
    checkpoints.save(state(1), 1)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        checkpoints.save(state(2), 2, wait=False)
        with pytest.raises(CheckpointError, match="step-000000002.*No space left"):
            checkpoints.save(state(3), 3)
    assert steps(checkpoints) == [1]
    checkpoints.save(state(3), 3)
    assert steps(checkpoints) == [3]


def test_another_keep_counts_from_the_next_save_on(manager: Callable[..., Checkpoints]) -> None:
    for step in range(5):
        manager(keep=4).save(state(), step)
    checkpoints = manager(keep=2)
    assert steps(checkpoints) == [1, 2, 3, 4]
    checkpoints.save(state(), 5)
    assert steps(checkpoints) == [4, 5]
    manager(keep=3).save(state(), 6)
    manager().save(state(), 7)
    assert steps(checkpoints) == [4, 5, 6, 7]


def test_versions_of_one_step_count_once(manager: Callable[..., Checkpoints]) -> None:
    checkpoints = manager(keep=2)
    for step in (1, 2, 3, 3, 3):
        checkpoints.save(state(), step)
    assert [(each.step, each.version) for each in checkpoints] == [(2, 0), (3, 2)]


def test_what_was_just_saved_stays_although_later_steps_are_there(
    manager: Callable[..., Checkpoints],
) -> None:
    checkpoints = manager(keep=1)
    checkpoints.save(state(), 100)
    path = checkpoints.save(state(), 50)
    assert path.exists()
    assert steps(checkpoints) == [50, 100]


def test_the_last_one_that_is_whole_stays_while_the_next_is_written(
    fabric: Fabric, manager: Callable[..., Checkpoints], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later ones are there, and damaged: what the training goes on from is none of the newest."""
    checkpoints = manager()
    for step in (1, 8, 9):
        path = checkpoints.save(state(step), step)
        if step > 1:
            path.write_bytes(path.read_bytes()[:-300])
    checkpoints = manager(keep=2)
    with pytest.warns(UserWarning, match="is left out"):
        checkpoints.resume(state(), fallback=True)
    write, go_on = torch.save, threading.Event()

    def slow(*arguments: Any, **options: Any) -> None:
        assert go_on.wait(60)
        write(*arguments, **options)

    monkeypatch.setattr(torch, "save", slow)
    for step in (2, 3):
        go_on.clear()
        checkpoints.save(state(step), step, wait=False)
        assert steps(checkpoints) == [step - 1, 8, 9]
        go_on.set()
        fabric.wait_for_save()
    checkpoints.save(state(4), 4)
    assert steps(checkpoints) == [4, 8, 9]


def test_a_folder_stays_where_it_was_when_the_working_directory_changes(
    fabric: Fabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints = fabric.checkpoints("runs")
    checkpoints.save(state(), 1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert checkpoints.save(state(), 2) == tmp_path / "runs" / "step-000000002"
    assert steps(checkpoints) == [1, 2]


def test_nothing_that_is_not_ours_is_deleted(manager: Callable[..., Checkpoints], folder: Path) -> None:
    folder.mkdir(parents=True)
    foreign = [
        "step-1",
        "step-000000001.bak",
        "step-0000000010-",
        "step-000000001-01",
        "last",
        "notes.json",
        "mystep-000000001",
        ".hidden.tmp",
    ]
    for name in foreign:
        (folder / name).write_text("somebody else's")
    (folder / "step-000000077.json").mkdir()
    (folder / "step-000000077.json" / "notes").write_text("somebody else's")
    foreign.append("step-000000077.json")
    other = manager(keep=1, prefix="epoch")
    for step in (1, 2):
        other.save(state(), step)
    checkpoints = manager(keep=1)
    for step in range(4):
        checkpoints.save(state(), step)
    assert names(folder) == sorted([*foreign, "epoch-000000002", "step-000000003"])
    assert steps(other) == [2]


def test_what_a_link_leads_to_is_kept(manager: Callable[..., Checkpoints], folder: Path) -> None:
    checkpoints = manager(keep=1)
    checkpoints.save(state(1), 1)
    (folder / "released").symlink_to("step-000000001")
    (folder / "circle").symlink_to("circle")
    for step in (2, 3):
        checkpoints.save(state(), step)
    assert steps(checkpoints) == [1, 3]
    (folder / "released").unlink()
    checkpoints.save(state(), 4)
    assert steps(checkpoints) == [4]


def test_an_old_one_that_cannot_be_deleted_is_warned_of(
    manager: Callable[..., Checkpoints], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = manager(keep=1)
    checkpoints.save(state(), 1)

    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.warns(UserWarning, match="step-000000001' cannot be deleted.*Permission denied"):
        path = checkpoints.save(state(), 2)
    assert checkpoints.latest() == path


# -- what a crash leaves ------------------------------------------------------------------------------------------


def test_a_folder_without_its_manifest_is_left_out_with_a_note(
    manager: Callable[..., Checkpoints], folder: Path
) -> None:
    checkpoints = manager(keep=1)
    path = checkpoints.save(state(), 1)
    (folder / "step-000000002").mkdir()
    (folder / "step-000000002" / "shard").touch()
    with pytest.warns(UserWarning, match=r"step-000000002' is left out: .* never finished"):
        assert checkpoints.latest() == path
    assert checkpoints.latest() == path  # and says so once
    assert checkpoints.save(state(), 2) == folder / "step-000000002-1"
    assert (folder / "step-000000002" / "shard").exists()


def test_what_a_killed_training_left_is_cleared_away_by_the_next_one(
    manager: Callable[..., Checkpoints], folder: Path
) -> None:
    manager().save(state(1), 1, metrics={"loss": 1.0})
    left = [".step-000000002.ab12.tmp", ".step-000000001-1.json.ab12.tmp", "step-000000002.json"]
    for name in left:
        (folder / name).write_text("half of it")
    for name in (".step-000000003.ab12.tmp", ".step-000000000.ab12.deleted"):
        (folder / name).mkdir()
        (folder / name / "shard").touch()
    kept = [".step-000000002", ".other-000000002.ab12.tmp"]
    for name in kept:
        (folder / name).touch()
    checkpoints = manager()
    assert steps(checkpoints) == [1]
    assert set(left) < set(names(folder))  # readers change nothing
    checkpoints.save(state(2), 2)
    assert names(folder) == sorted([*kept, "step-000000001", "step-000000001.json", "step-000000002"])


def test_metrics_that_cannot_be_read_are_no_metrics(
    manager: Callable[..., Checkpoints], folder: Path
) -> None:
    checkpoints = manager(keep_best=("loss", "min"))
    good = checkpoints.save(state(), 1, metrics={"loss": 2.0})
    huge, deep = f'{{"metrics": {{"loss": 1{"0" * 400}}}}}', "[" * 100_000
    texts = ["", "[]", '{"metrics": {"loss": "low"}}', '{"metrics": []}', huge, deep]
    for step, text in enumerate(texts, start=2):
        path = checkpoints.save(state(), step, metrics={"loss": 1.0})
        path.with_name(f"{path.name}.json").write_text(text)
    with pytest.warns(UserWarning, match="json' is left out"):
        assert checkpoints.best() == good
    assert len(steps(checkpoints)) == 7


def test_a_damaged_checkpoint_is_skipped_when_asked_and_an_error_otherwise(
    manager: Callable[..., Checkpoints],
) -> None:
    checkpoints = manager(keep_best=("loss", "min"))
    good = checkpoints.save(state(1), 1, metrics={"loss": 2.0})
    bad = checkpoints.save(state(2), 2, metrics={"loss": 1.0})
    bad.write_bytes(bad.read_bytes()[:-300])
    assert checkpoints.latest() == checkpoints.best() == bad
    target = state()
    with pytest.raises(CheckpointError, match=r"step-000000001\. .*fallback=True"):
        checkpoints.resume(target)
    with pytest.warns(UserWarning, match="step-000000002' is left out: .*damaged"):
        assert checkpoints.resume(target, fallback=True) == {}
    assert target["number"] == 1
    assert checkpoints.latest(verify=True) == checkpoints.best(verify=True) == good


# -- when ---------------------------------------------------------------------------------------------------------


def test_it_is_time_at_every_multiple_of_the_steps(manager: Callable[..., Checkpoints]) -> None:
    checkpoints = manager(every=3)
    saved = [step for step in range(1, 10) if checkpoints.save_if_due(state(), step)]
    assert saved == [3, 6, 9]
    assert steps(checkpoints) == saved


def test_steps_that_jump_over_a_multiple_do_not_miss_it(manager: Callable[..., Checkpoints]) -> None:
    checkpoints = manager(every=100)
    due = [step for step in range(64, 640, 64) if checkpoints.save_if_due(state(), step, metrics={"a": 1})]
    assert due == [128, 256, 320, 448, 512]
    resumed = manager(every=100)
    resumed.resume(state())
    assert not resumed.due(576)
    assert resumed.due(640)
    assert resumed.due(640)  # until it is done


def test_it_is_time_when_so_much_time_has_gone_by(
    manager: Callable[..., Checkpoints], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = float(round(time.monotonic()))  # sums of it are exact
    monkeypatch.setattr("fabric_core.checkpoints.schedule.time.monotonic", lambda: now)
    checkpoints = manager(every=datetime.timedelta(minutes=10))
    now += 599
    assert not checkpoints.due(1)
    now += 1
    assert checkpoints.due(1)
    checkpoints.save(state(), 1)
    assert not checkpoints.due(2)


# -- two trainings ------------------------------------------------------------------------------------------------

OTHER = """
import os, signal, sys
from fabric_core import Fabric
from fabric_core.checkpoints import lock
lock.PATIENCE = 0.2
managers = [Fabric(accelerator="cpu").checkpoints(sys.argv[1], keep=1, prefix=each) for each in ("step", "other")]
for each in managers:
    try:
        each.save({"number": 9}, 9)
        print("saved", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
if os.fork() == 0:  # what outlives the training, as the worker of a loader may for a moment
    sys.stdin.read()
    os._exit(0)
signal.pause()
"""


def test_two_trainings_do_not_save_into_one_folder(
    manager: Callable[..., Checkpoints], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    mine, theirs = manager(keep=1, prefix="other"), manager(keep=1)
    mine.save(state(1), 1)
    command = [sys.executable, "-c", OTHER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "saved\n"
        refused = process.stdout.readline()
        assert refused.startswith("CheckpointError Another training saves checkpoints in")
        assert f"process {os.getpid()} on" in refused
        with pytest.raises(CheckpointError, match=f"Another training.*process {process.pid} on"):
            theirs.save(state(10), 10)
        assert (steps(mine), steps(theirs)) == ([1], [9])  # looking needs no lock
        process.kill()
        process.wait(30)
        theirs.save(state(10), 10)  # although a child of the dead one is alive
    assert steps(theirs) == [10]


def test_managers_of_one_process_do_not_shut_each_other_out(
    manager: Callable[..., Checkpoints],
) -> None:
    one, other = manager(), manager()
    one.save(state(), 1)
    other.save(state(), 2)
    del other
    one.save(state(), 3)
    assert steps(one) == [1, 2, 3]


def test_what_another_process_rotates_away_while_it_is_verified_is_neither_damaged_nor_the_end(
    manager: Callable[..., Checkpoints], folder: Path
) -> None:
    checkpoints, looking = manager(keep=1), manager()
    checkpoints.save(state(1), 1)
    check = looking._check

    def slowly(path: Path) -> None:
        if path.name == "step-000000001":
            checkpoints.save(state(2), 2)
        check(path)

    looking._check = slowly
    assert looking.latest(verify=True) == folder / "step-000000002"


def test_a_folder_that_was_emptied_in_the_middle_is_begun_and_locked_anew(
    manager: Callable[..., Checkpoints], folder: Path
) -> None:
    checkpoints = manager(keep=1)
    checkpoints.save(state(1), 1, metrics={"loss": 1})
    shutil.rmtree(folder)
    checkpoints.save(state(2), 2, metrics={"loss": 1})
    assert steps(checkpoints) == [2]
    command = [sys.executable, "-c", OTHER.partition("if os.fork()")[0], str(folder)]
    assert "Another training" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_is_time_again_when_a_training_has_gone_back(manager: Callable[..., Checkpoints]) -> None:
    checkpoints = manager(every=10)
    assert [step for step in range(1, 101) if checkpoints.save_if_due(state(), step)][-1] == 100
    assert [step for step in range(51, 75) if checkpoints.save_if_due(state(), step)] == [60, 70]
