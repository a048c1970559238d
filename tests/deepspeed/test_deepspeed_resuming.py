"""A training under DeepSpeed that was interrupted and goes on, at the same stage, at another one, and without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_core import Fabric

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]

TRAINING = Path(__file__).parents[1] / "backends" / "programs" / "noisy_training.py"
NAMES: dict[str, Any] = {}
exec(TRAINING.read_text(encoding="utf-8"), NAMES)
CALM = {"dropout": 0.0, "num_workers": 1}
"""A model that draws no random numbers, and samples whose noise follows from their number alone."""

PROGRAM = """
found = {}
for stage in (1, 2, 3):
    with Fabric(accelerator="cpu", devices=2, strategy=f"deepspeed_stage_{stage}") as fabric:
        fabric.launch()
        for workers in (0, 2):
            _, found[stage, workers] = rests(fabric, f"noisy-{stage}-{workers}", (2, 4), num_workers=workers)
        found[stage, "begun"] = train(fabric, f"calm-{stage}", keep=(2,), **CALM)
        others = [other for other in (1, 2, 3) if (other, "begun") in found]
        found[stage, "after others"] = [
            train(fabric, f"rest-{stage}-{other}", f"calm-{other}/2", **CALM) for other in others
        ]
torch.save(found, f"answer-{fabric.global_rank}")
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, bare_environ: dict[str, str]) -> tuple[Path, list[Any]]:
    """The folder of a job of two ranks, and what they found."""
    folder = tmp_path_factory.mktemp("resuming")
    script = folder / "program.py"
    script.write_text(f"{TRAINING.read_text(encoding='utf-8')}\nCALM = {CALM}\n{PROGRAM}")
    done = subprocess.run(
        [sys.executable, "-m", "fabric_core", "run", "--devices=2", "--accelerator=cpu", str(script)],
        env={**bare_environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=350,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return folder, [torch.load(folder / f"answer-{rank}") for rank in (0, 1)]


stages = pytest.mark.parametrize("stage", [1, 2, 3])


@stages
@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_go_on_as_if_nothing_had_happened(stage: int, workers: int, job: tuple[Path, Any]) -> None:
    read = 0 if workers else 4  # in this process, of each batch
    for found in job[1]:
        assert found[stage, workers] == [(True, 6, 6 * read), (True, 4, 4 * read)]


@stages
def test_two_ranks_go_on_at_another_stage_with_the_same_samples(stage: int, job: tuple[Path, Any]) -> None:
    for found in job[1]:
        assert len(found[stage, "after others"]) == stage
        for number, rest in enumerate(found[stage, "after others"], 1):
            begun = found[number, "begun"]
            assert rest["seen"] == begun["seen"][2:]
            assert rest["losses"] == pytest.approx(begun["losses"][2:], rel=1e-4)


@stages
def test_one_process_goes_on_without_deepspeed(stage: int, job: tuple[Path, Any], tmp_path: Path) -> None:
    folder, answers = job
    begun = [found[stage, "begun"] for found in answers]
    with Fabric(accelerator="cpu") as fabric:
        rest = NAMES["train"](fabric, tmp_path, folder / f"calm-{stage}" / "2", seed=60, **CALM)
    assert NAMES["in_order"]([rest["seen"]]) == NAMES["in_order"]([each["seen"] for each in begun])[16:]
    assert rest["losses"] == pytest.approx(begun[0]["losses"][2:], rel=1e-4)
