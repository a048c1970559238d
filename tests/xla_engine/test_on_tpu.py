"""Several processes, each with a TPU device of its own: what only a TPU can show."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matrix
import pytest
import torch

from fabric_core.testing import plain_loop
from fabric_xla import probes

HERE = Path(__file__).parent

with patch.dict(os.environ):
    os.environ.pop("PJRT_DEVICE", None)
    TPUS = len(probes.devices().indices)

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(not TPUS, reason="not run: this machine has no TPU"),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["xla", "xla_fsdp", "xla_spmd", "xla_spmd_fsdp"])
def test_training_on_every_device_equals_the_plain_loop(
    strategy: str, xla_program: Callable[..., Any], tmp_path: Path
) -> None:
    xla_program(HERE / "programs" / "on_tpu.py", strategy, tmp_path, PJRT_DEVICE="TPU", timeout=500)
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    for name, (trained, replicas) in found.items():
        expected = plain_loop.train_plain(matrix.CASES[name], shares=replicas)
        assert plain_loop.difference(trained.parameters, expected.parameters) <= 1e-5, name
