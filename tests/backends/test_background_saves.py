"""Saves that are not waited for, on several ranks: they disturb no message, and fail on all ranks or on none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fabric_core.parts.torch_file import TorchFile

if TYPE_CHECKING:
    from conftest import Programs

PROGRAM = """
import threading
from pathlib import Path
from fabric_core.contracts import folder as folders
from fabric_core import Fabric

def training(strategy):
    torch.manual_seed(rank)
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=2)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    return fabric, {"model": model, "optimizer": optimizer, "steps": []}

def step(fabric, state):
    fabric.backward(state["model"](torch.ones(4, 8) * (rank + 1)).pow(2).mean())
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    state["steps"].append(len(state["steps"]))

def held(fabric, ranks):
    '''Some ranks do not write before the event is set.'''
    event, save = threading.Event(), fabric.strategy.save_checkpoint
    def late(path, checkpoint):
        if rank in ranks:
            event.wait(60)
        save(path, checkpoint)
    fabric.strategy.save_checkpoint = late
    return event

def busy(fabric, state):
    '''Everything that the main threads may do with the store and the group while a save waits for another rank.'''
    step(fabric, state)
    group = dist.new_group()
    fabric.barrier("meanwhile")
    with fabric.rank_zero_first():
        pass
    return fabric.all_reduce(torch.ones(1), group=group, reduce_op="sum").item()

def equal(one, other):
    return all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
"""

MEANWHILE = (
    PROGRAM
    + """
found = {}
for strategy, writers in (("ddp", [0]), ("fsdp", [0, 1])):
    fabric, state = training(strategy)
    step(fabric, state)
    fabric.save(f"{strategy}-waited", state)
    told = found[strategy] = {"sums": [], "there": [], "values": []}
    for slow in writers:
        path, event = f"{strategy}-{slow}", held(fabric, [slow])
        fabric.save(path, state, wait=False)
        told["sums"].append(busy(fabric, state))
        told["there"].append(os.path.exists(path))
        if rank:
            event.set()
        with fabric.rank_zero_first():  # in which the others wait, and write meanwhile
            event.set()
            if rank == 0:
                fabric.wait_for_save()
        del fabric.strategy.save_checkpoint
        waited, late = fabric.load(f"{strategy}-waited"), fabric.load(path)
        told["values"].append(equal(waited, late) and waited["steps"] == late["steps"])
        fabric.save(f"{strategy}-waited", state)

    def failing(*_):
        raise OSError(28, "No space left on device")
    io = fabric.strategy.surroundings.checkpoint_io
    write_part, folders.write_part = folders.write_part, failing if rank == 1 else folders.write_part
    if strategy == "ddp":
        io.save = failing
    fabric.save(path, state, wait=False)
    step(fabric, state)
    told["told"] = error_of(fabric.save, f"{strategy}-next", state)
    folders.write_part = write_part
    io.__dict__.pop("save", None)
    fabric.save(f"{strategy}-next", state, wait=False)
    fabric.wait_for_save()
    told["before"] = equal(late, fabric.load(path))
    told["lock"] = error_of(fabric.save, f"{strategy}-lock", {"lock": threading.Lock()}, wait=False)
    fabric.close()
answer(found)
"""
)

KILLED = (
    PROGRAM
    + """
import signal
fabric, state = training("fsdp")
fabric.save("run", {**state, "steps": "before"})
write_part = folders.write_part
def killed(*arguments):
    write_part(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 1:
    folders.write_part = killed
fabric.save("run", {**state, "steps": "after"}, wait=False)
fabric.close()
"""
)


@pytest.fixture(scope="module")
def meanwhile(shared_programs: Programs) -> list[dict[str, Any]]:
    return shared_programs.answers_of(MEANWHILE, timeout=300)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_writes_late_holds_up_no_message_of_the_training(
    meanwhile: list[dict[str, Any]], strategy: str
) -> None:
    for found in meanwhile:
        assert set(found[strategy]["sums"]) == {2.0}
        assert set(found[strategy]["there"]) == {False}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_late_checkpoint_is_that_of_its_moment_on_every_rank(
    meanwhile: list[dict[str, Any]], strategy: str
) -> None:
    for found in meanwhile:
        assert set(found[strategy]["values"]) == {True}


@pytest.mark.parametrize(("strategy", "failed"), [("ddp", 0), ("fsdp", 1)])
def test_a_disk_that_is_full_on_one_rank_is_told_once_on_every_rank(
    meanwhile: list[dict[str, Any]], strategy: str, failed: int
) -> None:
    for found in meanwhile:
        name, message = found[strategy]["told"]
        assert name == "CheckpointError"
        assert "whose save was begun with wait=False, was not written" in message
        assert f"Rank {failed} could not write" in message
        assert "No space left on device" in message
        assert found[strategy]["before"] is True


def test_what_one_rank_cannot_copy_is_an_error_on_every_rank(meanwhile: list[dict[str, Any]]) -> None:
    for found in meanwhile:
        for told in found.values():
            name, message = told["lock"]
            assert name == "CheckpointError"
            assert "Rank 0 could not copy the checkpoint" in message


def test_a_rank_that_is_killed_while_it_writes_leaves_the_checkpoint_before(
    shared_programs: Programs,
) -> None:
    finished = shared_programs.on_ranks(KILLED, timeout=300)
    assert finished.code != 0
    folder: Path = shared_programs.folder / "run"
    assert TorchFile().load(folder / "values.pt")["steps"] == "before"
