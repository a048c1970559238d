"""Runs on several ranks that were interrupted and go on, on as many ranks or on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fabric_core import Fabric

TRAINING = (Path(__file__).parent / "programs" / "noisy_training.py").read_text(encoding="utf-8")

PROGRAM = (
    TRAINING
    + """
strategy, before = sys.argv[1], sys.argv[2]
with Fabric(accelerator="cpu", devices=world, strategy=strategy) as fabric:
    fabric.launch()
    found = {}
    for workers in (0, 2):
        whole = train(fabric, f"noisy-{workers}", num_workers=workers)
        rests = [
            train(fabric, None, f"noisy-{workers}/{point}", seed=50, num_workers=workers) for point in (2, 4, 5)
        ]
        found[workers] = [same(whole, rest) for rest in rests]
        found[f"read {workers}"] = [rest["reads"] for rest in rests]
        found[f"steps {workers}"] = [len(rest["seen"]) for rest in rests]
        found[f"seen {workers}"] = [sample[0] for batch in whole["seen"] for sample in batch]
    whole = train(fabric, "calm", noise=0.0, keep=(2,))
    more = train(fabric, None, before, noise=0.0, epochs=1, seed=50)
    answer({**found, "losses": whole["losses"], "more": more["losses"]})
"""
)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_go_on_as_if_nothing_had_happened_and_one_goes_on_with_what_two_began(
    strategy: str, shared_programs: Any, tmp_path: Path
) -> None:
    names: dict[str, Any] = {}
    exec(TRAINING, names)
    with Fabric(accelerator="cpu") as fabric:
        alone = names["train"](fabric, tmp_path, noise=0.0, keep=(2,))
    script = PROGRAM.replace("sys.argv[1]", repr(strategy)).replace("sys.argv[2]", repr(str(tmp_path / "2")))
    answers = shared_programs.answers_of(script, timeout=240)
    for rank in (0, 1):
        for workers in (0, 2):
            assert answers[rank][workers] == [True, True, True], (rank, workers)
            assert answers[rank][f"steps {workers}"] == [6, 4, 3]
        assert answers[rank]["read 0"] == [24, 16, 12]
        assert answers[rank]["more"] == pytest.approx(alone["losses"][2:4], rel=1e-6)
    for workers in (0, 2):
        first, second = (answer[f"seen {workers}"][:16] for answer in answers)
        assert sorted(first + second) == [index / 32 for index in range(32)]
    with Fabric(accelerator="cpu", devices=1, strategy=strategy) as fabric:
        rest = names["train"](fabric, None, shared_programs.folder / "calm" / "2", noise=0.0, seed=60)
    assert rest["losses"] == pytest.approx(answers[0]["losses"][2:], rel=1e-6)
