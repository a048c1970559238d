"""Formats of few bits under strategies of several processes: torchao for real, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fabric_core import Registry, Request
from fabric_core.resolve import resolve

PROGRAM = """
import json, sys
import torch
from torch import nn
from fabric_core import Fabric
from fabric_cuda import Float8Precision

def train(strategy, **options):
    precision = Float8Precision("rowwise", emulate=True)
    with Fabric(accelerator="cpu", strategy=strategy, precision=precision, strategy_options=options) as fabric:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        raw = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), inner, nn.Linear(64, 16))
        model, optimizer = fabric.setup(raw, torch.optim.SGD(raw.parameters(), lr=0.2))
        converted = sum(type(layer).__name__ == "Float8Linear" for layer in model.modules())
        inputs = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
        inputs, targets = inputs[fabric.global_rank :: fabric.world_size], inputs[:, :16] * 2
        targets = targets[fabric.global_rank :: fabric.world_size]
        losses = []
        for _ in range(20):
            loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            losses.append(fabric.all_reduce(loss.detach()).item())
        return converted, losses

if __name__ == "__main__":
    found = {name: train(name, **options) for name, options in json.loads(sys.argv[1]).items()}
    with open(sys.argv[2] + ".rank" + __import__("os").environ.get("RANK", "0"), "w") as file:
        json.dump(found, file)
"""


@pytest.mark.skipif(find_spec("torchao") is None, reason="not run: torchao is not installed")
def test_float8_trains_alike_on_one_process_and_on_two_under_each_strategy(tmp_path: Path) -> None:
    script, answer = tmp_path / "train.py", tmp_path / "answer"
    script.write_text(PROGRAM)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FABRIC_")}

    def run(devices: int, strategies: dict[str, dict[str, object]]) -> dict[str, tuple[int, list[float]]]:
        command = ("-m", "fabric_core", "run", f"--devices={devices}", str(script))
        arguments = (json.dumps(strategies), str(answer))
        subprocess.run([sys.executable, *command, *arguments], env=environ, check=True, timeout=110)
        found: dict[str, tuple[int, list[float]]] = json.loads(Path(f"{answer}.rank0").read_text())
        return found

    (converted, alone) = run(1, {"single_device": {}})["single_device"]
    assert converted == 3
    assert alone[-1] < 0.9 * alone[0]
    on_two = run(2, {"ddp": {}, "fsdp": {}, "ddp_sharded": {"engine": "torch"}})
    for strategy, (layers, losses) in on_two.items():
        assert layers == 3, strategy
        # The products for the gradients of weights are scaled for each half by itself, so not bit for bit.
        assert losses == pytest.approx(alone, rel=1e-3), strategy
    assert on_two["fsdp"] == on_two["ddp_sharded"] == on_two["ddp"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_cpu_offload", "ddp_sharded"])
def test_float8_is_found_by_name_under_each_of_these_strategies(
    monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    from fabric_core import Inventory
    from fabric_cuda.accelerators import probes

    monkeypatch.setattr(probes, "cuda", lambda: Inventory((0, 1)))  # pretended
    monkeypatch.setattr("fabric_core.requirements.installed_version", lambda _: "99")
    plan = resolve(Request(accelerator="cuda", strategy=strategy, precision="float8"), Registry(environ={}))
    assert (plan.precision.name, plan.strategy.name) == ("float8", strategy)
