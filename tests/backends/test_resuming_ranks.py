"""Runs on several ranks that were interrupted and go on, on as many ranks or on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fabric_core import Fabric

# A training with numbers from every generator, which differ between the ranks.
TRAINING = """
import random
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from fabric_core import Fabric, seed_everything

class Noisy(Dataset):
    def __init__(self, noise):
        self.noise, self.reads = noise, 0

    def __len__(self):
        return 32

    def __getitem__(self, index):
        self.reads += 1
        noise = [random.random(), float(np.random.rand()), float(torch.rand(1))]
        return torch.tensor([index / 32, *(number * self.noise for number in noise)])

def train(fabric, folder, resume=None, noise=1.0, epochs=2, keep=(2, 4, 5), seed=3, **options):
    seed_everything(seed)
    size = 8 // fabric.world_size
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3 * noise), torch.nn.Linear(8, 1))
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    data = Noisy(noise)
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=size, shuffle=True, **options))
    torch.manual_seed(seed + 100 * fabric.global_rank)
    random.seed(seed + fabric.global_rank)
    state = {"model": model, "optimizer": optimizer, "data": {"loader": loader}, "steps": 0}
    if resume is not None:
        fabric.load(resume, state)
    seen, losses = [], []
    for epoch in range(loader.epoch, epochs):
        for batch in loader:
            seen.append(batch.tolist())
            loss = model(batch).square().mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(fabric.all_reduce(loss.detach())))
            state["steps"] += 1
            if resume is None and state["steps"] in keep:
                fabric.save(f"{folder}/{state['steps']}", state)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    weights = {name: getattr(tensor, "full_tensor", lambda: tensor)() for name, tensor in weights.items()}
    return {"seen": seen, "losses": losses, "weights": weights, "reads": data.reads}

def same(whole, rest):
    count = len(rest["seen"])
    equal = all(torch.equal(whole["weights"][name], tensor) for name, tensor in rest["weights"].items())
    return equal and rest["seen"] == whole["seen"][len(whole["seen"]) - count:]
"""

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
