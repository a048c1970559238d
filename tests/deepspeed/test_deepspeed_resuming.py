"""A training under DeepSpeed that was interrupted and goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

TRAINING = Path(__file__).parents[1] / "backends" / "programs" / "noisy_training.py"
PROGRAM = """
with Fabric(accelerator="cpu", devices=2, strategy="deepspeed_stage_2") as fabric:
    fabric.launch()
    found = []
    for workers in (0, 1):
        whole = train(fabric, f"noisy-{workers}", num_workers=workers)
        for point in (2, 4, 5):
            rest = train(fabric, None, f"noisy-{workers}/{point}", seed=50, num_workers=workers)
            found.append((same(whole, rest), len(rest["seen"]), rest["reads"] if workers == 0 else None))
    torch.save(found, f"answer-{fabric.global_rank}")
"""


def test_two_ranks_go_on_as_if_nothing_had_happened(tmp_path: Path, bare_environ: dict[str, str]) -> None:
    script = tmp_path / "program.py"
    script.write_text(TRAINING.read_text(encoding="utf-8") + PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "fabric_core", "run", "--devices=2", "--accelerator=cpu", str(script)],
        env={**bare_environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    without, with_worker = (
        [(True, left, left * 4) for left in (6, 4, 3)],
        [(True, left, None) for left in (6, 4, 3)],
    )
    for rank in (0, 1):
        assert torch.load(tmp_path / f"answer-{rank}") == without + with_worker
