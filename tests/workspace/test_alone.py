"""Each distribution alone, from its wheel, with what it declares to depend on and nothing else."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = "Scripts" if os.name == "nt" else "bin"

EVERY_TARGET = """
import sys
from fabric_core import Registry
from fabric_core.requirements import missing_requirements
from fabric_core.targets import import_target
for offer in Registry(environ={}).offers():
    if not missing_requirements(offer.spec):
        import_target(offer.spec.target, offer.full_name)
        print(offer.full_name)
"""
TRAIN = """
import torch
from fabric_core import Fabric
with Fabric(accelerator="cpu", devices=1) as fabric:
    model = torch.nn.Linear(2, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(4, 2)).sum())
    optimizer.step()
    print(fabric.strategy.world_size)
"""


def test_a_wheel_alone_has_all_that_it_declares(
    distribution: str, alone: Callable[[str], Path], run: Callable[..., str]
) -> None:
    folder = alone(distribution)
    python = folder / SCRIPTS / "python"
    printed = run(sys.executable, "-m", "pip", "--python", python, "check", cwd=folder)
    assert "No broken requirements found" in printed


def test_every_part_of_a_wheel_alone_can_be_imported(
    distribution: str, alone: Callable[[str], Path], run: Callable[..., str]
) -> None:
    folder = alone(distribution)
    imported = run(folder / SCRIPTS / "python", "-c", EVERY_TARGET, cwd=folder).split()
    assert "cpu@fabric-core" in imported


def test_a_wheel_alone_trains(
    distribution: str, alone: Callable[[str], Path], run: Callable[..., str]
) -> None:
    folder = alone(distribution)
    assert run(folder / SCRIPTS / "python", "-c", TRAIN, cwd=folder).split()[-1] == "1"


def test_nothing_of_a_wheel_alone_is_broken(
    distribution: str, alone: Callable[[str], Path], run: Callable[..., str]
) -> None:
    folder = alone(distribution)
    listed: dict[str, Any] = json.loads(
        run(folder / SCRIPTS / "fabric", "plugins", "list", "--json", cwd=folder)
    )
    assert listed["broken"] == []
    mine = [part for part in listed["parts"] if part["distribution"] == distribution.replace("_", "-")]
    assert mine


@pytest.mark.parametrize("text", ["import numpy", "import deepspeed", "import torch_xla"])
def test_what_is_not_declared_is_not_there(
    text: str, alone: Callable[[str], Path], run: Callable[..., str]
) -> None:
    folder = alone("fabric_backends")
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        run(folder / SCRIPTS / "python", "-c", text, cwd=folder)
