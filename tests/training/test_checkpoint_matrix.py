"""What one strategy saves, every other one loads, on any number of processes: bit by bit what plain PyTorch has."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_matrix import STRATEGIES, plain_state

from fabric_core.converting import consolidated

SIZES = [(strategy, world) for world, strategies in STRATEGIES.items() for strategy in strategies]
IN_SHARDS = {"fsdp", "fsdp_hybrid", "tensor_parallel", "deepspeed_stage_1", "deepspeed_stage_3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, fabric_run: Callable[..., Any]) -> Path:
    """Where everything was saved by all, and loaded by all."""
    try:
        version("deepspeed")
    except PackageNotFoundError:
        pytest.skip("DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("matrix")
    torch.save(plain_state(7), folder / "right")
    torch.save(plain_state(8), folder / "wrong")
    for what in ("save", "load"):
        for world in STRATEGIES:
            arguments = (f"--devices={world}", "--accelerator=cpu", folder, what)
            fabric_run("checkpoint_matrix", *arguments, timeout=300, OMP_NUM_THREADS="1")
    return folder


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two trees of tensors and values are not the same, bit by bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [where for key in one for where in differences(one[key], other[key], f"{at}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [where for number, pair in pairs for where in differences(*pair, f"{at}.{number}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one, other)
        return [] if same else [at]
    return [] if type(one) is type(other) and one == other else [f"{at}: {one!r} {other!r}"]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("strategy", "world"), SIZES)
def test_what_a_strategy_saves_is_what_plain_pytorch_has(folder: Path, strategy: str, world: int) -> None:
    path = folder / f"right-{strategy}-{world}"
    assert path.is_dir() == (strategy in IN_SHARDS)
    assert differences(consolidated(path), plain_state(7)) == []


@pytest.mark.parametrize(("strategy", "world"), SIZES)
def test_a_strategy_loads_what_every_other_one_has_saved(folder: Path, strategy: str, world: int) -> None:
    for other, size in SIZES:
        path = folder / f"read-{strategy}-{world}-from-{other}-{size}"
        assert differences(consolidated(path), plain_state(7)) == [], (other, size)
