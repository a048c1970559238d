"""Two processes with an XLA device each, whose collectives go by way of the host.

What the devices compute is torch_xla's own, so sharding is seen here as it is; how the real collectives lie in what is
computed, and how fast it is, only a TPU can show.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matrix
import pytest
import torch
from counted import adam, net

from fabric_core import Fabric
from fabric_core.testing import plain_loop

HERE = Path(__file__).parent
SUPERVISOR = """
import sys
from fabric_core.supervisor import RankCommand, run_ranks
sys.exit(run_ranks(RankCommand(sys.argv[1], args=tuple(sys.argv[2:])), num_processes=2))
"""

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch_xla"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, xla_program: Callable[..., Any]) -> Path:
    """Where the program has run, on checkpoints that one process on the CPU has saved."""
    folder = tmp_path_factory.mktemp("several")
    with Fabric(accelerator="cpu", devices=1) as fabric:
        raw = net()
        model, optimizer = fabric.setup(raw, adam(raw))
        fabric.backward(model(torch.ones(2, 6)).square().sum())
        optimizer.step()
        fabric.save(folder / "by one", {"model": model, "optimizer": optimizer})
    torch.save({**net().state_dict(), "0.bias": torch.ones(9)}, folder / "other")
    torch.save(
        {name: value for name, value in net().state_dict().items() if name != "count"}, folder / "less"
    )
    (folder / "file").touch()
    path = os.pathsep.join((str(HERE / "programs"), str(Path(matrix.__file__).parent)))
    program = HERE / "programs" / "several.py"
    xla_program("-c", SUPERVISOR, program, folder, PYTHONPATH=path, timeout=1100)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    return [torch.load(folder / f"answers-{rank}.pt", weights_only=False) for rank in range(2)]


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("xla", "everything"),
        ("xla_fsdp", "clip by value"),
        ("xla_fsdp", "everything"),
        ("nested", "everything"),
    ],
)
def test_training_on_shards_equals_the_plain_loop(found: list[dict[str, Any]], way: str, name: str) -> None:
    case = matrix.CASES[name]
    expected = plain_loop.train_plain(case, shares=2)
    trained = found[0]["training"][way, name]
    assert plain_loop.moved(expected.parameters, case) > 1e-2
    assert plain_loop.difference(trained.parameters, expected.parameters) <= 1e-5
    for what in ("losses", "norms"):
        pairs = zip(getattr(trained, what), getattr(expected, what), strict=True)
        assert all(abs(a - b) <= 1e-5 for a, b in pairs), f"{what} of whole gradients, and not of shards"


# -- states ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["xla_fsdp", "nested"])
def test_a_state_dict_has_the_names_of_the_users_model_and_the_pieces_of_the_rank(
    found: list[dict[str, Any]], way: str
) -> None:
    pieces = [answers["states"][way]["pieces"] for answers in found]
    whole = net().state_dict()
    assert set(pieces[0]) == set(pieces[1]) == set(whole)
    for name, value in whole.items():
        if name == "count":
            assert torch.equal(pieces[1][name], value)
            continue
        row = torch.cat([own[name] for own in pieces])
        assert torch.equal(row[: value.numel()].view(value.shape), value)
        assert not row[value.numel() :].any(), "filled up with zeros"


@pytest.mark.parametrize("way", ["xla_fsdp", "nested"])
def test_a_set_up_model_and_its_optimizer_have_the_same_parameters(
    found: list[dict[str, Any]], way: str
) -> None:
    for answers in found:
        assert answers["states"][way]["of the optimizer"]
    assert all(changed for name, changed in found[0]["states"][way]["changed"].items() if name != "count")


@pytest.mark.parametrize("way", ["xla_fsdp", "nested"])
def test_a_state_dict_goes_back_into_the_model_and_one_of_whole_tensors_does_not(
    found: list[dict[str, Any]], way: str
) -> None:
    for answers in found:
        assert answers["states"][way]["restored"]
        assert "size mismatch for 0." in answers["states"][way]["whole"]


# -- checkpoints ----------------------------------------------------------------------------------------------------


def loaded(path: Path, again: Path, **options: Any) -> dict[str, Any]:
    """What one process makes of a checkpoint, when it loads it into a model and saves that again."""
    with Fabric(devices=1, **options) as fabric:
        raw = net()
        state = {"model": raw, "optimizer": adam(raw)}
        state["model"], state["optimizer"] = fabric.setup(raw, state["optimizer"])
        rest = fabric.load(path, state)
        fabric.save(again, state)
        return {**fabric.load(again), **rest}


def flat(state: dict[str, Any]) -> list[torch.Tensor]:
    moments = [
        value
        for entry in state["optimizer"]["state"].values()
        for value in map(torch.as_tensor, entry.values())
    ]
    return [*state["model"].values(), *moments]


def test_each_process_writes_a_shard(folder: Path, found: list[dict[str, Any]]) -> None:
    names = ["fabric.json", "shard-000000.safetensors", "shard-000001.safetensors", "values.pt"]
    for name in ("sharded", "sharded beside"):
        assert sorted(file.name for file in (folder / name).iterdir()) == names
    sizes = [(folder / "sharded" / name).stat().st_size for name in names[1:3]]
    assert max(sizes) < 8000 < sum(sizes), "each has a part of the 504 parameters and their two moments"
    assert (folder / "full").is_file()
    assert (folder / "xla").is_file()


@pytest.mark.parametrize("kind", ["sharded", "full", "xla"])
@pytest.mark.parametrize("version", ["beside", "again"])
def test_what_is_saved_beside_the_training_is_what_was_there(
    folder: Path, found: list[dict[str, Any]], kind: str, version: str
) -> None:
    with Fabric(accelerator="cpu", devices=1) as fabric:
        at_once, other = (fabric.load(folder / name) for name in (kind, f"{kind} {version}"))
    assert len(flat(at_once)) == 5 + 4 * 3
    assert all(map(torch.equal, flat(at_once), flat(other)))
    assert at_once["lazy"].tolist() == [3.0, 3.0]
    assert at_once["model"]["0.weight"].any()


@pytest.mark.parametrize("kind", ["sharded", "full", "xla"])
@pytest.mark.parametrize(
    "options",
    [
        {"accelerator": "cpu"},
        {"accelerator": "cpu", "strategy": "fsdp"},
        {"accelerator": "tpu"},
        {"accelerator": "tpu", "strategy": "xla_fsdp"},
    ],
    ids=["single_device", "fsdp", "xla", "xla_fsdp"],
)
def test_what_several_processes_have_saved_loads_into_one(
    folder: Path, found: list[dict[str, Any]], kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    with Fabric(accelerator="cpu", devices=1) as fabric:
        saved = fabric.load(folder / kind)
    assert all(map(torch.equal, flat(saved), flat(loaded(folder / kind, tmp_path / "again", **options))))


@pytest.mark.parametrize("kind", ["sharded", "xla"])
def test_what_one_process_has_saved_loads_into_several(
    folder: Path, found: list[dict[str, Any]], kind: str
) -> None:
    with Fabric(accelerator="cpu", devices=1) as fabric:
        before, after = (fabric.load(folder / name) for name in ("by one", f"{kind} by one"))
    assert all(map(torch.equal, flat(before), flat(after)))


@pytest.mark.parametrize("kind", ["sharded", "full", "xla"])
def test_what_does_not_fit_or_cannot_be_written_fails_on_every_rank(
    found: list[dict[str, Any]], kind: str
) -> None:
    for rank, answers in enumerate(found):
        errors = answers["checkpoints"][kind]
        assert "0.bias" in errors["other"]
        assert "(9,)" in errors["other"] or "Size([9])" in errors["other"]
        assert "issing key" in errors["less"]
        assert "count" in errors["less"]
        assert errors["unwritable"].startswith("CheckpointError: ")
        assert "What was there before is untouched." in errors["unwritable"]
        own = "There is no checkpoint at" if rank else "Rank 1 could not read the checkpoint"
        assert errors["none"].startswith(f"CheckpointError: {own}")


# -- large models ---------------------------------------------------------------------------------------------------


def test_a_model_without_memory_gets_values_part_by_part_and_loads_a_checkpoint(
    folder: Path, found: list[dict[str, Any]]
) -> None:
    assert all(answers["large"]["meta"] == {True} for answers in found)
    with Fabric(accelerator="cpu", devices=1) as fabric:
        first = fabric.load(folder / "first values")["model"]
        loaded, expected = (fabric.load(folder / name) for name in ("large by one", "by one"))
    assert all(map(torch.equal, flat(loaded), flat(expected)))
    bound = 6**-0.5
    assert 0.5 * bound < first["0.weight"].abs().max() <= bound, "as reset_parameters() has it"
    assert len(first["0.weight"].unique()) == 300
    assert first["count"].tolist() == [5, 6]


def test_optimizers_are_made_of_pieces_or_follow_them(folder: Path, found: list[dict[str, Any]]) -> None:
    with Fabric(accelerator="cpu", devices=1) as fabric:
        raw = net()
        model, optimizer = fabric.setup(raw, adam(raw))
        fabric.load(folder / "by one", {"model": model, "optimizer": optimizer})
        loss = sum(0.5 * model(torch.ones(2, 6) * share).square().sum() for share in (1, 2))
        fabric.backward(loss)
        optimizer.step()
        for name in ("large and on", "apart and on"):
            trained = fabric.load(folder / name)["model"]
            for key, value in model.state_dict().items():
                assert (trained[key] - value).abs().max() <= 1e-5, f"{name}: {key}"


def test_what_cannot_be_sharded_is_one_clear_error(found: list[dict[str, Any]]) -> None:
    for answers in found:
        large = answers["large"]
        assert large["tied"].startswith("SetupError: The Linear has a parameter 'weight' that it shares with")
        assert large["twice"].startswith("SetupError: The Sequential is sharded already")
        (warning,) = large["undefined"]
        assert "Nothing has no method reset_parameters()" in warning


# -- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["xla", "xla_fsdp"])
def test_a_resumed_training_is_bit_for_bit_one_that_was_never_interrupted(
    found: list[dict[str, Any]], strategy: str
) -> None:
    for answers in found:
        resumed = answers["resuming"][strategy]
        assert resumed["differences"] == {"saved": [], "3": [], "4": [], "5": []}
        assert resumed["steps"] == {"saved": 8, "3": 5, "4": 4, "5": 3}
    losses = [answers["resuming"][strategy]["losses"] for answers in found]
    assert losses[0] != losses[1], "the ranks drop out differently"
