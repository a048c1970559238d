"""Training under DeepSpeed, on one and on two real processes, compared with plain PyTorch loops."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.timeout(500), pytest.mark.slow]

EXACT = 1e-6


def _program() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "deepspeed_checks", Path(__file__).parent / "programs" / "deepspeed_checks.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


NAMES = list(_program().CHECKS)

Found = Callable[[int, str], Any]


@pytest.fixture
def found(jobs: Callable[[int], dict[str, Any]]) -> Found:
    """What a check found on so many processes; it fails as the check did."""

    def look(processes: int, name: str) -> Any:
        value = jobs(processes)[name]
        assert not isinstance(value, str), value
        return value

    return look


def on(check: str) -> Any:
    """Both sizes of a job, and every way in which the check was made."""
    ways = [name for name in NAMES if name.startswith(f"{check}: ")]
    assert ways, check
    cases = [(processes, way) for processes in (1, 2) for way in ways]
    return pytest.mark.parametrize(
        ("processes", "way"), cases, ids=[f"{way.partition(': ')[2]}-{processes}" for processes, way in cases]
    )


@on("nothing_is_clipped_unasked")
def test_gradients_are_not_clipped_by_the_default_of_deepspeed(
    processes: int, way: str, found: Found
) -> None:
    assert found(processes, way) <= EXACT


@on("several_losses_before_a_step")
def test_gradients_of_several_losses_add_up_and_can_be_dropped(
    processes: int, way: str, found: Found
) -> None:
    assert found(processes, way) <= EXACT


@on("a_short_last_window")
def test_a_window_that_becomes_shorter_is_averaged_over_what_there_is(
    processes: int, way: str, found: Found
) -> None:
    assert found(processes, way) <= EXACT


@on("norms_and_clipping")
def test_the_norm_is_that_of_all_ranks_and_the_step_uses_what_was_clipped(
    processes: int, way: str, found: Found
) -> None:
    distances = found(processes, way)
    assert len(distances) == 6
    assert max(distances.values()) <= EXACT, distances


@on("a_norm_that_is_not_finite")
def test_a_norm_that_is_not_finite_is_an_error_unless_it_may_be(
    processes: int, way: str, found: Found
) -> None:
    raised, norm, afterwards = found(processes, way)
    assert raised[0] == "RuntimeError"
    assert "error_if_nonfinite=False" in raised[1]
    assert not torch.isfinite(torch.tensor(norm))
    assert afterwards == pytest.approx(1.0468, abs=1e-4)


@on("some_parameters_are_frozen")
def test_parameters_that_are_frozen_stay(processes: int, way: str, found: Found) -> None:
    assert found(processes, way) <= EXACT


@on("two_models_that_play_against_each_other")
def test_a_gan_trains_as_in_plain_pytorch(processes: int, way: str, found: Found) -> None:
    assert found(processes, way) <= EXACT


@on("a_loss_through_two_models_needs_to_be_told_whose")
def test_with_several_models_backward_asks_which_one(processes: int, way: str, found: Found) -> None:
    told, untold = found(processes, way)
    for error in (told, untold):
        assert error[0] == "SetupError"
        assert "fabric.backward(loss, model=model)" in error[1]


@on("optimizers_of_one_model_step_together")
def test_optimizers_that_step_apart_are_an_error(processes: int, way: str, found: Found) -> None:
    half, one, other = found(processes, way)
    assert half[0] == "SetupError"
    assert "1 of its 2 optimizers (SGD)" in half[1]
    assert one, "no longer an instance of the user's class"
    assert other, "no longer an instance of the user's class"


@on("learning_rates_take_effect")
def test_learning_rates_of_schedulers_and_loops_take_effect(processes: int, way: str, found: Found) -> None:
    assert found(processes, way) <= EXACT


@on("optimizer_and_scheduler_from_the_config")
def test_the_config_may_name_optimizer_and_scheduler(processes: int, way: str, found: Found) -> None:
    is_optimizer, rates, moved = found(processes, way)
    assert is_optimizer
    assert rates[-3:] == [0.01] * 3
    assert rates == sorted(rates)
    assert moved > 1e-3


@on("bfloat16_keeps_float32_weights")
def test_bfloat16_computes_with_a_copy_and_updates_float32(processes: int, way: str, found: Found) -> None:
    off, beyond_bfloat16 = found(processes, way)
    rounds_otherwise = processes == 2 and "stage 0" in way  # the sum over ranks is rounded at another point
    assert off <= (2e-3 if rounds_otherwise else EXACT)
    assert beyond_bfloat16 > 1e-5, "the weights that are saved have no more digits than bfloat16"


@on("models_for_inference")
def test_models_without_an_optimizer_compute(processes: int, way: str, found: Found) -> None:
    assert found(processes, way) <= EXACT


@on("models_created_in_parts")
def test_models_are_created_in_parts_and_plain_weights_load_into_them(
    processes: int, way: str, found: Found
) -> None:
    off, sizes = found(processes, way)
    assert off <= EXACT
    assert sizes == ([0, 0, 0, 0] if "stage 3" in way else [35, 7, 21, 3])


@on("models_that_change_what_is_divided")
def test_what_outer_modules_do_to_inner_ones_is_done_or_refused(
    processes: int, way: str, found: Found
) -> None:
    with_empty_init, of_two_dimensions, other_data = found(processes, way)
    assert with_empty_init is None
    assert "Only tensors with 3, 4, or 5 dimensions" in of_two_dimensions[1]  # as PyTorch says it
    assert other_data[0] == "UnsupportedError"
    assert "parameter.data.copy_" in other_data[1]


@on("everything_is_saved_and_goes_on")
def test_a_checkpoint_holds_everything_and_training_goes_on(processes: int, way: str, found: Found) -> None:
    off, keys, dtypes = found(processes, way)
    assert off <= EXACT
    assert keys == ["model", "note", "optimizer", "scheduler", "steps"]
    assert sorted(dtypes) == ["first.bias", "first.weight", "last.bias", "last.weight", "offset"]


@pytest.mark.parametrize("way", [name for name in NAMES if name.startswith("a_checkpoint_of_others: ")])
def test_what_two_processes_saved_goes_on_in_one_at_any_stage_and_without_deepspeed(
    way: str, found: Found
) -> None:
    assert found(1, way) <= EXACT


@on("files_of_other_strategies_are_read")
def test_files_go_to_and_come_from_other_strategies(processes: int, way: str, found: Found) -> None:
    assert found(processes, way) <= EXACT


@on("what_does_not_fit_is_refused")
def test_a_checkpoint_that_does_not_fit_or_would_execute_code_is_refused(
    processes: int, way: str, found: Found
) -> None:
    shapes, missing, harmful, harmed = found(processes, way)
    assert shapes[0] == "CheckpointError"
    assert "first.weight has the shape (7, 4), and here (7, 5)" in shapes[1]
    assert missing[0] == "CheckpointKeyError"
    if "stage 0" not in way:  # there, it is one file
        assert harmful[0] == "UnsafeCheckpointError"
        assert "putenv" in harmful[1]
    assert not harmed


@on("gradients_are_complete_once_they_are_clipped")
def test_nothing_can_be_added_to_gradients_that_were_clipped(processes: int, way: str, found: Found) -> None:
    error = found(processes, way)
    assert error[0] == "SetupError"
    assert "clip after the last backward()" in error[1]


@on("holding_back_gradients_warns_once")
def test_holding_gradients_back_does_nothing_with_one_warning(processes: int, way: str, found: Found) -> None:
    (message,) = found(processes, way)
    assert "cannot hold back" in message


@pytest.mark.parametrize("processes", [1, 2])
def test_deepspeed_is_quiet(processes: int, jobs: Callable[[int], dict[str, Any]]) -> None:
    output = jobs(processes)["output"]
    assert "[INFO]" not in output
    assert "FutureWarning" not in output
