"""The manager of a folder of checkpoints on several ranks: rank 0 decides, and all of them know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PROGRAM = f"""
sys.path.insert(0, {str(Path(__file__).parent / "programs")!r})
from sharded_task import *
import datetime, pathlib, shutil, warnings
from fabric_core.checkpoints import lock, schedule
from fabric_core.contracts import agreement

def trained(strategy, steps):
    '''A training that goes on where it was, saves at every step, and says what it found on this rank.'''
    fabric = fabric_for(strategy)
    model, optimizer = fabric.setup(*(lambda model: (model, adam(model)))(seeded()))
    state = {{"model": model, "optimizer": optimizer, "step": 0}}
    checkpoints = fabric.checkpoints(strategy, keep=2, keep_best=("loss", "min"), every=1)
    resumed = checkpoints.resume(state)
    began = state["step"]
    for inputs, targets in list(loader(fabric))[began:steps]:
        fabric.backward(mse_loss(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        loss = [3, 1, 2, 2.5, 1.5, 4][state["step"] - 1] + rank  # that of rank 0 counts
        checkpoints.save_if_due(state, state["step"], metrics={{"loss": loss}})
    names = sorted(os.listdir(strategy))
    return {{
        "began": began,
        "resumed": resumed,
        "found": [(each.path.name, each.metrics) for each in checkpoints],
        "latest": checkpoints.latest().name,
        "best": checkpoints.best(verify=True).name,
        "weights": whole(model.state_dict()),
        "folders": [name for name in names if os.path.isdir(f"{{strategy}}/{{name}}")],
    }}, fabric

def agreed(fabric):
    '''What ranks would answer differently, each for itself.'''
    state = {{"number": 1}}
    now, clock = [0.0], time.monotonic
    schedule.time.monotonic = lambda: now[0]
    timed = fabric.checkpoints("timed", every=datetime.timedelta(seconds=10))
    now[0] = 11.0 if rank == 0 else 0.0
    due = timed.due(1)
    time.monotonic = clock
    answers = {{"due": due, "empty": fabric.checkpoints("none").latest()}}
    pathlib.Path("a-file").touch()
    answers["a file"] = error_of(fabric.checkpoints("a-file").save, state, 1)
    answers["a metric"] = error_of(timed.save, state, 1, {{"loss": "low" if rank == 0 else 1.0}})
    return answers

def alone(fabric, mine, verb):
    '''What becomes of a verb that the other rank does not call.'''
    done = pathlib.Path(f"{{mine}} has waited")
    if rank != mine:
        while not done.exists():
            time.sleep(0.05)
        return None
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        error = error_of(verb)
    done.touch()
    return error, [str(each.message) for each in noted]
"""


@pytest.fixture(scope="module")
def answers(shared_programs: Any) -> list[dict[str, Any]]:
    """What two ranks found, under two strategies, in a training that was interrupted and one that was not."""
    return shared_programs.answers_of(  # type: ignore[no-any-return]
        PROGRAM
        + """
answers = {}
for strategy in ("ddp", "fsdp"):
    whole_run, fabric = trained(strategy, 6)
    if strategy == "ddp":
        answers["agreed"] = agreed(fabric)
    fabric.close()
    if rank == 0:
        shutil.rmtree(strategy)
    dist.barrier() if dist.is_initialized() else None
    first, fabric = trained(strategy, 4)
    fabric.close()
    second, fabric = trained(strategy, 6)
    fabric.close()
    answers[strategy] = whole_run, first, second

with fabric_for("ddp", timeout=4) as fabric:
    fabric.launch()
    checkpoints = fabric.checkpoints("ddp")
    check = checkpoints._check
    checkpoints._check = lambda path: (time.sleep(6), check(path))
    answers["slow"] = checkpoints.latest(verify=True).name

agreement._QUIET = 0.3
with fabric_for("ddp", timeout=1) as fabric:
    fabric.launch()
    answers["save alone"] = alone(fabric, 0, lambda: fabric.save("run.ckpt", {"step": 1}))
with fabric_for("ddp", timeout=1) as fabric:
    fabric.launch()
    answers["resume alone"] = alone(fabric, 1, lambda: fabric.checkpoints("ddp").resume({"step": 1}))
with fabric_for("ddp", timeout=1) as fabric:
    fabric.launch()
    timed = fabric.checkpoints("ddp", every=datetime.timedelta(hours=1))
    answers["due alone"] = alone(fabric, 0, lambda: timed.due(1))
answer(answers)
""",
        timeout=110,
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_interrupted_training_leaves_the_same_folder_as_one_that_was_not(
    answers: list[dict[str, Any]], strategy: str
) -> None:
    for on_rank in answers:
        whole, first, second = on_rank[strategy]
        assert (first["began"], first["resumed"]) == (0, None)
        assert (second["began"], second["resumed"]) == (4, {})
        assert second["found"] == whole["found"]
        kept = [
            ("step-000000002", {"loss": 1.0}),
            ("step-000000005", {"loss": 1.5}),
            ("step-000000006", {"loss": 4.0}),
        ]
        assert whole["found"] == kept
        assert (whole["latest"], whole["best"]) == ("step-000000006", "step-000000002")
        assert all((second["weights"][name] == value).all() for name, value in whole["weights"].items())


def test_under_a_strategy_that_shards_the_checkpoints_are_folders(answers: list[dict[str, Any]]) -> None:
    assert answers[0]["ddp"][0]["folders"] == []
    assert answers[0]["fsdp"][0]["folders"] == [f"step-00000000{step}" for step in (2, 5, 6)]


def test_verifying_may_take_longer_than_a_collective_may(answers: list[dict[str, Any]]) -> None:
    assert [on_rank["slow"] for on_rank in answers] == ["step-000000006"] * 2


def test_the_clock_of_rank_0_decides(answers: list[dict[str, Any]]) -> None:
    assert [on_rank["agreed"]["due"] for on_rank in answers] == [True, True]


def test_a_failure_of_rank_0_is_one_of_every_rank(answers: list[dict[str, Any]]) -> None:
    for name, reason in (("a file", "a-file"), ("a metric", "could not convert string to float: 'low'")):
        for on_rank in answers:
            kind, message = on_rank["agreed"][name]
            assert kind == "CheckpointError"
            assert reason in message
    assert [on_rank["agreed"]["empty"] for on_rank in answers] == [None, None]


def test_a_rank_that_calls_a_verb_alone_is_told_so_and_does_not_wait_forever(
    answers: list[dict[str, Any]],
) -> None:
    for name, mine, call in (
        ("save alone", 0, "save('run.ckpt')"),
        ("resume alone", 1, "checkpoints.resume()"),
        ("due alone", 0, "checkpoints.due()"),
    ):
        assert answers[1 - mine][name] is None
        (kind, message), noted = answers[mine][name]
        assert kind == "SetupError"
        assert f"Rank {mine} has waited in {call} for 1 s, and rank {1 - mine} did not come." in message
        [note] = noted
        assert note.startswith(
            f"Rank {mine} waits in {call}, and rank {1 - mine} did not come to it for 0 s."
        )
        assert "is called on every rank, and not under 'if fabric.is_global_zero'" in note
