"""Training through ``Fabric`` gives the numbers of a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equality
import pytest
import torch

from fabric_core import Fabric
from fabric_core.testing.plain_loop import Parameters, difference, moved, train_plain


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, fabric_run: Callable[..., Any]
) -> dict[str, Parameters]:
    """The final parameters of every case, all trained by one job of two processes."""
    results = tmp_path_factory.mktemp("equality") / "results.pt"
    fabric_run("equality", "--devices=2", results)
    loaded: dict[str, Parameters] = torch.load(results)
    return loaded


@pytest.mark.parametrize("name", equality.FLOAT32)
def test_two_processes_equal_a_plain_loop_over_the_global_batch(
    name: str, trained: dict[str, Parameters]
) -> None:
    case = equality.CASES[name]
    assert moved(trained[name], case) > 1e-3
    assert difference(trained[name], train_plain(case).parameters) < 1e-6


@pytest.mark.parametrize("name", equality.CASES)
def test_two_processes_equal_a_plain_loop_with_the_same_kernels_bit_for_bit(
    name: str, trained: dict[str, Parameters]
) -> None:
    case = equality.CASES[name]
    assert moved(trained[name], case) > 1e-3
    assert difference(trained[name], train_plain(case, shares=2).parameters) == 0.0


@pytest.mark.parametrize("name", equality.CASES)
def test_one_process_equals_a_plain_loop_bit_for_bit(name: str) -> None:
    case = equality.CASES[name]
    with Fabric(accelerator="cpu", devices=1, precision=case.precision) as fabric:
        assert difference(equality.train_fabric(case, fabric), train_plain(case).parameters) == 0.0
