"""Loggers in a state: a run that is killed and resumed leaves what a run leaves that was never killed."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric_backends.loggers.csv import CSVLogger
from fabric_backends.loggers.tensorboard import TensorBoardLogger
from fabric_core import CheckpointError, Fabric, Logger

# -- a real training, killed -------------------------------------------------------------------------------------------

TRAINING = """
    import os, random, signal, sys
    from pathlib import Path
    import torch
    from fabric_core import Fabric

    kill_at = int(sys.argv[1])  # a step, or -1
    fabric = Fabric(accelerator="cpu", devices=1, loggers=["csv", "tensorboard"])
    fabric.launch()
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    state = {"model": model, "optimizer": optimizer, "step": 0, "loggers": fabric.loggers}
    for logger in fabric.loggers:
        logger.log_hyperparams({"lr": 0.1})
    if Path("last.ckpt").exists():
        fabric.load("last.ckpt", state)
    while state["step"] < 30:
        step = state["step"]
        if step and step % 7 == 0:
            fabric.log("saved", 1.0, step - 1)  # joins the row that is in the checkpoint already
        torch.manual_seed(step)
        loss = model(torch.randn(4, 2)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        fabric.log("loss", loss, step)
        if step % 3 == 0:
            fabric.log("every third", step)  # no step of its own
        if step >= 13:
            fabric.log("late", step / 2, step)  # a column that comes after some checkpoints
        if step % 10 == 9:
            fabric.log("epoch", step, step // 10)  # steps of another counter
        if step == kill_at:
            for logger in fabric.loggers:
                logger.save()  # as far as a run may come before it is killed
            with (fabric.loggers[0].log_dir / "metrics.csv").open("ab") as file:
                file.write(b"99,0.12")  # half a row
            os.kill(os.getpid(), signal.SIGKILL)
        state["step"] = step + 1
        if step % 7 == 6:
            fabric.save("last.ckpt", state)
    fabric.close()
"""


def train(folder: Path, kill_at: int = -1) -> int:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(TRAINING), str(kill_at)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == (0 if kill_at < 0 else -signal.SIGKILL), done.stderr
    return done.returncode


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    events.Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


@pytest.mark.timeout(300)
def test_the_logs_of_a_run_that_was_killed_again_and_again_are_those_of_a_run_never_killed(
    tmp_path: Path,
) -> None:
    train(tmp_path / "whole")
    for kill_at in (5, 12, 25):  # before the first checkpoint; before and after a new column
        train(tmp_path / "killed", kill_at)
    train(tmp_path / "killed")
    tables = [tmp_path / run / "logs" / "fabric_logs" for run in ("whole", "killed")]
    # The run that was killed before its first checkpoint has left two folders: nothing knows of them.
    assert [sorted(entry.name for entry in table.iterdir()) for table in tables] == [
        ["version_0", "version_1"],
        ["version_0", "version_1", "version_2", "version_3"],
    ]
    whole, killed = (
        table / version for table, version in zip(tables, ("version_0", "version_2"), strict=True)
    )
    assert (killed / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert (whole / "metrics.csv").read_text().count("\n") > 35
    assert (killed / "hparams.json").read_bytes() == (whole / "hparams.json").read_bytes()
    whole, killed = (
        table / version for table, version in zip(tables, ("version_1", "version_3"), strict=True)
    )
    assert scalars(killed) == scalars(whole)
    assert [step for step, _ in scalars(whole)["loss"]] == list(range(30))
    assert [step for step, _ in scalars(whole)["every third"]] == list(range(10))


# -- the table, in any order -------------------------------------------------------------------------------------------

calls = st.lists(
    st.tuples(
        st.sampled_from(["log", "log", "log", "save"]),
        st.one_of(st.none(), st.integers(-1, 4), st.sampled_from([0.5, 1.0, 1e20])),
        st.dictionaries(st.sampled_from("abcd"), st.one_of(st.integers(), st.just(0.1)), min_size=1),
    ),
    max_size=12,
)


def do(logger: CSVLogger, calls: list[Any]) -> None:
    for what, step, metrics in calls:
        if what == "log":
            logger.log_metrics(metrics, step)
        else:
            logger.save()


@given(calls, calls, calls, st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_a_table_is_cut_back_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, before: Any, dropped: Any, after: Any, held: int
) -> None:
    folder = tmp_path_factory.mktemp("run")

    def logger(name: str) -> CSVLogger:
        return CSVLogger(folder, name, version=0, flush_logs_every_n_steps=held)

    whole, killed, resumed = logger("whole"), logger("killed"), logger("killed")
    do(whole, before)
    whole.state_dict()
    do(whole, after)
    do(killed, before)
    state = copy.deepcopy(killed.state_dict())
    do(killed, dropped)
    killed.save()
    do(resumed, dropped[:2])  # what is logged before a state is loaded
    resumed.load_state_dict(state)
    do(resumed, after)
    for each in (whole, resumed):
        each.finalize("success")
    path = whole.log_dir / "metrics.csv"
    found = resumed.log_dir / "metrics.csv"
    assert (found.read_bytes() if found.exists() else b"") == (path.read_bytes() if path.exists() else b"")


# -- folders -----------------------------------------------------------------------------------------------------------

LOGGERS = pytest.mark.parametrize("cls", [CSVLogger, TensorBoardLogger])


@LOGGERS
def test_a_folder_that_was_made_before_the_state_was_loaded_goes_away(tmp_path: Path, cls: Any) -> None:
    first = cls(tmp_path)
    first.log_metrics({"loss": 1.0}, 0)
    state = first.state_dict()
    second = cls(tmp_path)
    second.log_hyperparams({"lr": 0.1})
    second.log_metrics({"loss": 2.0}, 0)
    second.load_state_dict(state)
    assert second.version == "version_0"
    assert [entry.name for entry in (tmp_path / "fabric_logs").iterdir()] == ["version_0"]
    kept = cls(tmp_path)
    kept.log_metrics({"loss": 2.0}, 0)
    (kept.log_dir / "of the user's").touch()
    kept.load_state_dict(state)
    assert [entry.name for entry in (tmp_path / "fabric_logs" / "version_1").iterdir()] == ["of the user's"]


@LOGGERS
def test_a_logger_that_was_given_another_version_begins_there(tmp_path: Path, cls: Any) -> None:
    first = cls(tmp_path)
    first.log_metrics({"loss": 1.0}, 0)
    state = first.state_dict()
    first.log_metrics({"loss": 1.0}, 1)
    first.save()
    before = {path: path.read_bytes() for path in first.log_dir.iterdir()}
    other = cls(tmp_path, version="other")
    other.log_metrics({"loss": 3.0}, 0)
    other.load_state_dict(state)
    assert other.version == "other"
    other.log_metrics({"loss": 4.0}, 1)
    other.finalize("success")
    assert {path: path.read_bytes() for path in first.log_dir.iterdir()} == before


@LOGGERS
def test_a_folder_that_was_emptied_is_a_warning(tmp_path: Path, cls: Any) -> None:
    first = cls(tmp_path, version=0)
    first.log_metrics({"loss": 1.0}, 0)
    first.log_metrics({"loss": 1.0}, 1)
    state = first.state_dict()
    for path in first.log_dir.iterdir():
        path.unlink()
    second = cls(tmp_path, version=0)
    with pytest.warns(UserWarning, match="Was the folder moved or emptied"):
        second.load_state_dict(state)
    second.log_metrics({"loss": 3.0}, 2)
    second.finalize("success")
    assert any(second.log_dir.iterdir())


@pytest.mark.parametrize("cls", [CSVLogger, TensorBoardLogger])
def test_a_state_that_leads_elsewhere_or_is_another_one_is_refused(tmp_path: Path, cls: Any) -> None:
    """A checkpoint may be somebody else's: it names no folder outside of that of the logs."""
    logger = cls(tmp_path / "logs")
    logger.log_metrics({"a": 1.0}, 0)
    state = logger.state_dict()
    victim = tmp_path / "victim"
    shutil.copytree(logger.log_dir, victim)
    for version in ("../../victim", str(victim), "..", ".", "", None):
        with pytest.raises(CheckpointError, match="no name of a folder"):
            cls(tmp_path / "logs").load_state_dict({**state, "version": version})
    for other in (3, {}, {"version": state["version"]}):
        with pytest.raises(CheckpointError, match="does not hold the state of this logger"):
            cls(tmp_path / "logs").load_state_dict(other)
    assert sorted(path.name for path in victim.iterdir()) == sorted(
        path.name for path in logger.log_dir.iterdir()
    )


def test_a_version_of_several_folders_goes_on_as_well(tmp_path: Path) -> None:
    def logger() -> CSVLogger:
        return CSVLogger(tmp_path, version="sweep/3")

    before = logger()
    before.log_metrics({"a": 1.0}, 0)
    state = before.state_dict()
    before.log_metrics({"a": 2.0}, 1)
    before.save()
    after = logger()
    after.load_state_dict(state)
    assert after.log_dir == before.log_dir == tmp_path / "fabric_logs" / "sweep" / "3"
    assert (after.log_dir / "metrics.csv").read_text() == "step,a\n0,1.0\n"


def test_a_table_that_cannot_be_cut_back_is_an_error(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path, version=0)
    first.log_metrics({"loss": 1.0}, 0)
    state = first.state_dict()
    resumed = CSVLogger(tmp_path, version=0)
    resumed.log_metrics({"loss": 1.0}, 0)
    first._folder.path.joinpath("metrics.csv").unlink()
    first._folder.path.rmdir()
    first._folder.path.touch()
    with pytest.raises((CheckpointError, Exception), match="could not be cut back|no folder"):
        resumed.load_state_dict(state)


def test_what_a_disk_that_failed_did_not_show_is_not_deleted(tmp_path: Path) -> None:
    """The disk was gone at the checkpoint and is back: files that nobody saw then stay."""
    first = TensorBoardLogger(tmp_path, version=0)
    first.log_metrics({"loss": 1.0}, 0)
    first.finalize("success")
    first.log_dir.rename(tmp_path / "aside")
    state = first.state_dict()
    assert state["files"] is None
    (tmp_path / "aside").rename(first.log_dir)
    second = TensorBoardLogger(tmp_path, version=0)
    second.load_state_dict(state)
    second.log_metrics({"loss": 2.0}, 1)
    second.finalize("success")
    assert scalars(second.log_dir) == {"loss": [(0, 1.0), (1, 2.0)]}


def test_a_tensorboard_that_is_running_forgets_what_was_cut_off(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardLogger(tmp_path, version=0)
    for step in range(3):
        first.log_metrics({"loss": 1.0}, step)
    state = first.state_dict()
    for step in range(3, 6):
        first.log_metrics({"loss": 1.0}, step)
    first.save()
    running = EventAccumulator(str(first.log_dir))
    running.Reload()
    assert [point.step for point in running.Scalars("loss")] == list(range(6))
    second = TensorBoardLogger(tmp_path, version=0)
    second.load_state_dict(state)
    second.log_metrics({"loss": 2.0}, 3)
    second.finalize("success")
    running.Reload()
    assert [(point.step, point.value) for point in running.Scalars("loss")] == [
        *((step, 1.0) for step in range(3)),
        (3, 2.0),
    ]
    first.finalize("failed")


# -- loggers of others -------------------------------------------------------------------------------------------------


class Old(Logger):
    """As they were before they could be in a state."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.seen.append(step)

    def save(self) -> None:
        self.seen.append("saved")


class Sink:
    """What users pass who know of no contract."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.seen.append(step)


def test_loggers_without_a_state_are_saved_and_let_be(tmp_path: Path) -> None:
    old, sink = Old(), Sink()
    fabric = Fabric(accelerator="cpu", devices=1, loggers=[old, sink, CSVLogger(tmp_path)])
    fabric.launch()
    fabric.log("loss", 1.0, 0)
    fabric.save(tmp_path / "run.ckpt", {"loggers": fabric.loggers, "sink": sink})
    assert old.seen == [0, "saved"], "nothing is held back"
    rest = fabric.load(tmp_path / "run.ckpt", {"loggers": fabric.loggers, "sink": sink})
    assert rest == {}
    assert fabric.loggers[:2] == [old, sink]
    fabric.log("loss", 1.0, 1)
    assert sink.seen == [0, 1]
    fabric.close()
