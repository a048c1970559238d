"""What the verbs do between two processes: one check per function, all in one job.

Each rank writes what became of each check; the test reads both. A check that raises on one rank only would leave the
other waiting, so each ends with a barrier of the harness that cannot be missed.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from fabric_core import CheckpointError, Fabric, SetupError

CHECKS: dict[str, Callable[[Fabric, Path], None]] = {}


def check(function: Callable[[Fabric, Path], None]) -> Callable[[Fabric, Path], None]:
    CHECKS[function.__name__] = function
    return function


def calls_of(name: str, run: Callable[[], Any]) -> int:
    """How often a function of ``torch.distributed`` is called, by whatever name it was imported."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key == name)


@check
def whole_numbers_are_reduced_exactly(fabric: Fabric, folder: Path) -> None:
    rank = fabric.global_rank
    assert fabric.all_reduce(2**40 + rank, reduce_op="sum").item() == 2**41 + 1
    assert fabric.all_reduce(rank).item() == 0.5
    assert fabric.all_reduce(torch.tensor([rank, 4])).tolist() == [0.5, 4.0]
    assert fabric.all_reduce(1 / 3 + rank, reduce_op="max").item() == 1 / 3 + 1
    assert fabric.all_gather(2**40 + rank).tolist() == [2**40, 2**40 + 1]


@check
def collections_are_gathered_and_reduced(fabric: Fabric, folder: Path) -> None:
    rank = fabric.global_rank
    data = {"a": torch.full((2,), float(rank)), "b": [rank, (True,)], "c": "text"}
    gathered = fabric.all_gather(data)
    assert gathered["a"].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert gathered["b"][0].tolist() == [0, 1]
    assert gathered["c"] == "text"
    assert fabric.all_reduce({"x": float(rank), "y": rank}, reduce_op="min")["x"].item() == 0.0


@check
def a_reduction_leaves_its_argument_alone(fabric: Fabric, folder: Path) -> None:
    loss = torch.tensor(float(fabric.global_rank), requires_grad=True)
    assert fabric.all_reduce(loss.detach()).item() == 0.5
    assert loss.item() == fabric.global_rank


@check
def a_reduction_is_one_collective_without_a_barrier(fabric: Fabric, folder: Path) -> None:
    tensor = torch.ones(3)
    assert calls_of("gloo:all_reduce", lambda: fabric.all_reduce(tensor)) == 1
    assert calls_of("gloo:barrier", lambda: fabric.all_reduce(tensor)) == 0
    assert calls_of("gloo:barrier", lambda: fabric.all_gather(tensor)) == 0


@check
def objects_are_sent_from_any_rank(fabric: Fabric, folder: Path) -> None:
    mine = {"rank": fabric.global_rank, "path": Path("x"), "tensor": torch.ones(2) * fabric.global_rank}
    got = fabric.broadcast(mine, src=1)
    assert got["rank"] == 1
    assert got["path"] == Path("x")
    assert got["tensor"].tolist() == [1.0, 1.0]


@check
def rank_zero_goes_first(fabric: Fabric, folder: Path) -> None:
    marker = folder / "first"
    with fabric.rank_zero_first():
        if fabric.global_rank == 0:
            marker.write_text("there")
        assert marker.read_text() == "there"


@check
def when_rank_zero_fails_the_others_do_not_run_the_block(fabric: Fabric, folder: Path) -> None:
    ran = False
    kind = OSError if fabric.global_rank == 0 else SetupError
    with pytest.raises(kind, match="no such dataset"), fabric.rank_zero_first():
        ran = True
        raise OSError("no such dataset")
    assert ran == (fabric.global_rank == 0)


@check
def gradients_are_synchronised_with_the_last_micro_batch_only(fabric: Fabric, folder: Path) -> None:
    model = fabric.setup(torch.nn.Linear(3, 1))
    inputs = torch.full((2, 3), float(fabric.global_rank + 1))

    def micro_batch() -> None:
        with fabric.accumulate(model, every=3):
            fabric.backward(model(inputs).sum())

    assert [calls_of("gloo:all_reduce", micro_batch) for _ in range(4)] == [0, 0, 1, 0]


@check
def held_gradients_are_each_rank_s_own(fabric: Fabric, folder: Path) -> None:
    torch.manual_seed(0)
    model = fabric.setup(torch.nn.Linear(3, 1))
    inputs = torch.full((2, 3), float(fabric.global_rank + 1))
    with fabric.no_backward_sync(model):
        fabric.backward(model(inputs).sum())
    assert model.weight.grad.tolist() == [[2.0 * (fabric.global_rank + 1)] * 3]
    model.zero_grad()
    fabric.backward(model(inputs).sum())
    assert model.weight.grad.tolist() == [[3.0] * 3]


@check
def the_data_is_split_between_the_ranks(fabric: Fabric, folder: Path) -> None:
    loader = fabric.setup_dataloaders(DataLoader(list(range(12)), batch_size=2, shuffle=True))
    epochs = [torch.cat([fabric.all_gather(batch).flatten() for batch in loader]).tolist() for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(4))


@check
def a_stream_that_every_rank_would_read_is_warned_about(fabric: Fabric, folder: Path) -> None:
    with pytest.warns(UserWarning, match="every rank"):
        fabric.setup_dataloaders(DataLoader(Stream()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fabric.setup_dataloaders(DataLoader(Stream()), use_distributed_sampler=False)


@check
def a_method_that_bypasses_the_strategy_is_caught(fabric: Fabric, folder: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

        def good(self, x: torch.Tensor) -> torch.Tensor:
            return self(x).sum()

        def bad(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).sum()

    torch.manual_seed(0)
    model = fabric.setup(Model())
    inputs = torch.full((1, 2), float(fabric.global_rank + 1))
    with pytest.raises(SetupError, match="mark_forward_method"):
        model.bad(inputs)
    fabric.backward(model.good(inputs))
    assert model.layer.weight.grad.tolist() == [[1.5, 1.5]]
    model.zero_grad()
    model.mark_forward_method("bad")
    fabric.backward(model.bad(inputs))
    assert model.layer.weight.grad.tolist() == [[1.5, 1.5]]


@check
def a_checkpoint_is_restored_on_every_rank(fabric: Fabric, folder: Path) -> None:
    torch.manual_seed(fabric.global_rank)
    model = torch.nn.Linear(3, 1)
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters()))
    fabric.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {"model": model, "optimizer": optimizer, "epoch": 7}
    fabric.save(folder / "deep" / "x.ckpt", state)
    with torch.no_grad():
        model.weight.zero_()
    state["epoch"] = 0
    assert fabric.load(folder / "deep" / "x.ckpt", state) == {}
    assert state["epoch"] == 7
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [path.name for path in (folder / "deep").iterdir()] == ["x.ckpt"]


@check
def an_unwritable_path_is_an_error_on_every_rank(fabric: Fabric, folder: Path) -> None:
    if fabric.global_rank == 0:
        (folder / "file").write_text("not a folder")
    fabric.barrier("the file is there")
    with pytest.raises(CheckpointError, match="Cannot write"):
        fabric.save(folder / "file" / "x.ckpt", {"a": 1})


@check
def a_missing_checkpoint_is_an_error_on_every_rank(fabric: Fabric, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        fabric.load(folder / "nothing.ckpt")


@check
def a_second_fabric_uses_the_same_processes(fabric: Fabric, folder: Path) -> None:
    with Fabric(strategy="ddp", devices=2) as second:
        second.launch()
        assert second.all_reduce(second.global_rank, reduce_op="sum").item() == 1
    assert dist.is_initialized()
    assert fabric.all_reduce(1, reduce_op="sum").item() == 2


def main() -> None:
    folder = Path(sys.argv[1])
    fabric = Fabric(strategy="ddp")
    fabric.launch()
    outcome = {}
    for name, function in CHECKS.items():
        try:
            function(fabric, folder)
            outcome[name] = "ok"
        except BaseException:
            outcome[name] = traceback.format_exc()
        fabric.barrier(name)
    (folder / f"outcome-{fabric.global_rank}.json").write_text(json.dumps(outcome))
    fabric.print("only one of us says this")
    fabric.close()
    assert not dist.is_initialized()


if __name__ == "__main__":
    main()
