"""What is not installed, or fails when it is imported, is named with what to do; everything else keeps working."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = "Scripts" if os.name == "nt" else "bin"

ASK = """
import sys
import torch
from fabric_core import Fabric, FabricError
flags = dict(flag.split("=") for flag in sys.argv[1:])
model = torch.nn.Linear(1, 1)
try:
    fabric = Fabric(**{"accelerator": "cpu", "devices": 1, **flags})
    fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
except FabricError as error:
    print(f"{type(error).__name__}: {error}")
with Fabric(accelerator="cpu", devices=1) as fabric:
    print(fabric.all_reduce(1.0).item())
"""


@pytest.mark.parametrize(
    ("installed", "flag", "error", "advice"),
    [
        ("fabric_core", "strategy=ddp", "UnknownPluginError", "pip install fabric-backends"),
        ("fabric_core", "strategy=fsdp", "UnknownPluginError", "pip install fabric-backends"),
        ("fabric_core", "precision=bf16-mixed", "UnknownPluginError", "pip install fabric-backends"),
        ("fabric_core", "plugins=slurm", "UnknownPluginError", "pip install fabric-backends"),
        ("fabric_backends", "accelerator=cuda", "UnknownPluginError", "pip install fabric-cuda"),
        ("fabric_backends", "precision=float8", "UnknownPluginError", "pip install fabric-cuda"),
        (
            "fabric_backends",
            "strategy=deepspeed_stage_2",
            "UnknownPluginError",
            "pip install fabric-deepspeed",
        ),
        ("fabric_backends", "strategy=xla_fsdp", "UnknownPluginError", "pip install fabric-xla"),
        ("fabric_backends", "accelerator=tpu", "UnknownPluginError", "pip install fabric-xla"),
        (
            "fabric_backends",
            "strategy=ddp_sharded_fairscale",
            "MissingRequirementError",
            "pip install 'fairscale",
        ),
        ("fabric_xla", "strategy=xla", "MissingRequirementError", "pip install 'torch_xla"),
    ],
)
def test_a_name_that_cannot_be_had_is_answered_with_what_to_install(
    installed: str,
    flag: str,
    error: str,
    advice: str,
    alone: Callable[[str], Path],
    run: Callable[..., str],
) -> None:
    folder = alone(installed)
    answer, still_works = run(folder / SCRIPTS / "python", "-c", ASK, flag, cwd=folder).splitlines()
    assert answer.startswith(error)
    assert advice in answer
    assert still_works == "1.0"


@pytest.mark.parametrize(
    ("package", "installed", "flag"),
    [
        ("deepspeed", "fabric_deepspeed", "strategy=deepspeed_stage_1"),
        ("fairscale", "fabric_backends", "strategy=ddp_sharded_fairscale"),
        ("torch_xla", "fabric_xla", "accelerator=tpu"),
    ],
)
def test_a_package_that_fails_at_import_is_named_with_its_own_error(
    package: str,
    installed: str,
    flag: str,
    alone: Callable[[str], Path],
    run: Callable[..., str],
    tmp_path: Path,
) -> None:
    (tmp_path / f"{package}.py").write_text("raise OSError('built for another PyTorch')\n")
    info = tmp_path / f"{package}-99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 99.0\n")
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{ASK}"
    folder = alone(installed)
    program = (folder / SCRIPTS / "python", "-c", code, flag)
    answer, still_works = run(*program, cwd=folder, PJRT_DEVICE="CPU").splitlines()
    assert "built for another PyTorch" in answer
    assert still_works == "1.0"
