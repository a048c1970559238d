"""Processes that torch_xla starts. One at a time: between several, XLA has no collectives on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_core.testing import plain_loop

HERE = Path(__file__).parent

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", params=["xla_fork", "xla_spawn"])
def launched(
    request: pytest.FixtureRequest,
    xla_program: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What ``programs/launched.py`` found with one of the launchers."""
    folder = tmp_path_factory.mktemp(request.param)
    xla_program(HERE / "programs" / "launched.py", request.param, folder)
    found = json.loads((folder / "answers.json").read_text())
    return {"launcher": request.param, "parameters": torch.load(folder / "parameters.pt"), **found}


def test_training_in_a_process_of_its_own_equals_the_plain_loop(launched: dict[str, Any]) -> None:
    case = plain_loop.Case()
    expected = plain_loop.train_plain(case).parameters
    assert plain_loop.moved(expected, case) > 1e-2
    assert plain_loop.difference(launched["parameters"], expected) <= 1e-5
    assert launched["result"]["own process"]


def test_the_result_of_rank_0_comes_back_on_the_cpu(launched: dict[str, Any]) -> None:
    assert {value.device.type for value in launched["parameters"].values()} == {"cpu"}
    assert launched["result"]["broadcast"] == "xla", "in the process itself, tensors stay on the device"


def test_a_process_finds_its_ranks_and_the_seed_and_leaves_nothing_behind(launched: dict[str, Any]) -> None:
    assert launched["result"]["ranks"] == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert launched["result"]["seed"] == "11"
    assert launched["left behind"] == []


def test_a_fabric_inside_of_the_function_joins_the_job(launched: dict[str, Any]) -> None:
    assert launched["result"]["nested"] == ["local", None, 1]


def test_a_failure_is_the_users_traceback(launched: dict[str, Any]) -> None:
    told = launched["failed"]
    assert told.startswith("RankFailedError: Rank 0 failed: ValueError: on purpose, on rank 0\n")
    assert told.endswith("ValueError: on purpose, on rank 0")
    assert "in fail\n" in told
    assert "fabric_xla" not in told


def test_a_process_that_vanishes_is_told_of(launched: dict[str, Any]) -> None:
    assert launched["vanished"] == "RankFailedError: Rank 0 failed: exited with code 3"


def test_what_cannot_be_sent_is_told_before_anything_starts(launched: dict[str, Any]) -> None:
    if launched["launcher"] == "xla_fork":
        assert launched["local function"] == "nothing", "a copy of the process has it already"
    else:
        assert launched["local function"].startswith(
            "LaunchError: The function and its arguments cannot be sent"
        )


def test_a_function_is_needed(launched: dict[str, Any]) -> None:
    assert launched["no function"].startswith(
        "SetupError: The strategy 'xla' runs a function in new processes"
    )


def test_a_device_in_use_is_told_of(launched: dict[str, Any]) -> None:
    assert "Nothing may have used an XLA device before fabric.launch()" in launched["in use"]


def test_processes_that_a_script_starts_by_torch_xla_are_recognised(answers: Callable[..., Any]) -> None:
    found = answers("started_elsewhere")
    assert found["environment"] == ["xla", "detected: PJRT_LOCAL_PROCESS_RANK is set"]
    assert found["launcher"] is None
    assert found["ranks"] == [1, 0, 0, 0]
    assert found["address"] == ["127.0.0.1", True]


def test_a_backward_pass_before_the_device_is_there_is_one_clear_error(
    xla_program: Callable[..., Any],
) -> None:
    told = xla_program(HERE / "programs" / "too_late.py").stdout
    assert told.startswith("Gradients cannot be computed on the XLA device any more")


def test_a_launcher_for_one_of_several_devices_is_refused(xla_program: Callable[..., Any]) -> None:
    code = """
from fabric_core import Fabric
try:
    Fabric(accelerator="tpu", devices=1, plugins="xla_fork").launch(print)
except RuntimeError as error:
    print(error)
"""
    told = xla_program("-c", code, devices=4).stdout
    assert "a process for each of the 4 device(s) of this machine, and 1 were asked for" in told
