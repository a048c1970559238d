"""The benchmark of GPUs: without one it says so, and its two loops are the same training."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cuda_step.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with sizes for a CPU."""
    spec = importlib.util.spec_from_file_location("cuda_step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, size in (("BATCH", 2), ("LENGTH", 16), ("VOCABULARY", 64)):
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(module.LanguageModel.__init__, "__defaults__", (64, 1))
    return module


def test_without_a_gpu_it_says_so_and_measures_nothing() -> None:
    if torch.cuda.is_available():
        pytest.skip("not run: this machine has a GPU")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "needs a GPU" in done.stderr
    assert "Nothing was measured" in done.stderr
    assert done.stdout == ""


def test_both_loops_are_the_same_training(benchmark: Any) -> None:
    cpu = torch.device("cpu")
    plain, fabric = benchmark.plain_loop(cpu, 3), benchmark.fabric_loop(cpu, 3)
    losses = [(plain(), fabric()) for _ in range(2)]
    assert all(one == other for one, other in losses)
    assert losses[1][0] < losses[0][0]


def test_the_fused_step_of_the_optimizer_is_what_both_loops_run(benchmark: Any) -> None:
    cpu = torch.device("cpu")
    kernels = []
    for loop in (benchmark.plain_loop(cpu, 2), benchmark.fabric_loop(cpu, 2)):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            loop()
        names = [event.name for event in profiled.events()]
        kernels.append(
            {name: names.count(name) for name in ("aten::_fused_adamw_", "Optimizer.step#AdamW.step")}
        )
    assert kernels == [{"aten::_fused_adamw_": 2, "Optimizer.step#AdamW.step": 2}] * 2


@pytest.mark.cuda
@pytest.mark.timeout(300)
def test_on_a_gpu_it_prints_both_tables() -> None:
    options = ("--rounds=1", "--batches=4", "--mebibytes=16")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    for word in ("tokens per second", "fabric", "copies overlap"):
        assert word in done.stdout
