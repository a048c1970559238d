"""How the strategy ``xla`` trains in two processes, on a stand-in for torch_xla that has PyTorch's collectives.

XLA has none between processes on the CPU. What is tested is what the strategy does with them: that gradients are
averaged before they are clipped, once, and that every rank learns of a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matrix
import pytest
import torch

from fabric_core.testing import plain_loop

HERE = Path(__file__).parent
PROGRAMS = HERE.parent / "training" / "programs"
SUPERVISOR = """
import sys
from fabric_core.supervisor import RankCommand, run_ranks
sys.exit(run_ranks(RankCommand(sys.argv[1], args=(sys.argv[2],)), num_processes=2))
"""


@pytest.fixture(scope="module")
def found(stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("two")
    path = os.pathsep.join(map(str, (stand_in, PROGRAMS)))
    program = HERE / "programs" / "two_processes.py"
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, str(program), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"answers-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", matrix.CASES)
def test_training_equals_the_plain_loop(found: list[dict[str, Any]], name: str) -> None:
    case = matrix.CASES[name]
    expected = plain_loop.train_plain(case, shares=2)
    trained, _ = found[0]["training"][name]
    assert plain_loop.moved(expected.parameters, case) > 1e-2
    assert plain_loop.difference(trained.parameters, expected.parameters) <= 1e-5
    assert max(abs(a - b) for a, b in zip(trained.losses, expected.losses, strict=True)) <= 1e-5


@pytest.mark.parametrize("name", matrix.CASES)
def test_each_gradient_is_averaged_once_per_step(found: list[dict[str, Any]], name: str) -> None:
    case = matrix.CASES[name]
    _, sent = found[0]["training"][name]
    assert sum(sent) == 4 * len(plain_loop.windows(case)), "four parameters in each window"


def test_every_rank_starts_with_the_weights_of_rank_0_unless_told_otherwise(
    found: list[dict[str, Any]],
) -> None:
    (synced, own), (other_synced, other_own) = (answers["weights"] for answers in found)
    assert torch.equal(synced, other_synced)
    assert torch.equal(synced, own)
    assert not torch.equal(own, other_own)


def test_collectives_combine_the_values_of_all_ranks(found: list[dict[str, Any]]) -> None:
    for rank, answers in enumerate(found):
        verbs = answers["verbs"]
        assert verbs["ranks"] == [2, rank, rank]
        assert verbs["gathered"].tolist() == [[1.0, 2.0], [2.0, 2.0]]
        assert {op: value.tolist() for op, value in verbs["reduced"].items()} == {
            "mean": [1.5, 2.0],
            "sum": [3.0, 4.0],
            "min": [1.0, 2.0],
            "max": [2.0, 2.0],
            "product": [2.0, 4.0],
        }
        assert verbs["truths"].tolist() == [[True], [False]]
        assert verbs["truths"].dtype is torch.bool
        assert (verbs["half"].dtype, verbs["half"].item()) == (torch.bfloat16, 1.5)


def test_gradients_flow_back_through_a_gather_from_every_rank(found: list[dict[str, Any]]) -> None:
    assert [answers["verbs"]["gradient"].tolist() for answers in found] == [[3.0, 3.0], [30.0, 30.0]]


def test_objects_are_sent_from_the_rank_that_was_named(found: list[dict[str, Any]]) -> None:
    for answers in found:
        sent = answers["verbs"]["broadcast"]
        assert (sent["rank"], sent["tensor"].tolist()) == (1, [1.0, 1.0])
        assert answers["verbs"]["unsendable"].startswith(
            "WrongTypeError: broadcast cannot send the object of rank 0"
        )


def test_barriers_that_differ_are_told_of_on_every_rank(found: list[dict[str, Any]]) -> None:
    for answers in found:
        assert answers["verbs"]["barriers"].startswith(
            "SetupError: The ranks wait at different barriers: rank 0 at 'at 0', rank 1 at 'at 1'."
        )


def test_rank_0_goes_first(found: list[dict[str, Any]]) -> None:
    assert [answers["verbs"]["before"] for answers in found] == [[], ["first-0"]]


def test_a_checkpoint_that_fails_on_one_rank_fails_on_all(found: list[dict[str, Any]]) -> None:
    first, second = (answers["verbs"] for answers in found)
    assert first["written"].startswith("CheckpointError: Cannot write a checkpoint")
    assert second["written"].startswith("CheckpointError: Rank 0 could not write the checkpoint")
    assert first["read"].startswith("CheckpointError: Rank 1 could not read the checkpoint")
    assert second["read"].startswith("CheckpointError: There is no checkpoint at")


def test_what_the_ranks_agree_on_is_not_what_they_agreed_on_before(found: list[dict[str, Any]]) -> None:
    first, second = (answers["opened anew"] for answers in found)
    assert first.startswith("CheckpointError: Rank 1 could not collect the state")
    assert second == "ValueError: of rank 1 alone"


def test_processes_that_torch_xla_has_not_started_are_refused(found: list[dict[str, Any]]) -> None:
    for answers in found:
        assert answers["foreign"].startswith(
            "SetupError: The 2 processes of this job were not started by torch_xla"
        )
