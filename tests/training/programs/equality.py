"""The same training twice: through ``Fabric`` in the processes of a job, and as a plain PyTorch loop in one.

As a program it trains every case and writes the final parameters; the test imports it for the cases.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from fabric_core.testing.plain_loop import AUTOCAST, DTYPES, GLOBAL_BATCH, Case, Parameters, make

FLOAT32 = {
    "plain": Case(),
    "accumulate": Case(every=3),
    "clip by norm": Case(clip_norm=0.05),
    "clip by value": Case(clip_value=0.01),
    "two optimizers": Case(two_optimizers=True),
    "everything": Case(every=3, clip_norm=0.05, two_optimizers=True),
}
OTHERS = {
    f"{precision}, {name}": Case(precision, every, clip_norm=clip, two_optimizers=two)
    for precision in (*DTYPES, *AUTOCAST)
    for name, every, clip, two in (("plain", 1, None, False), ("everything", 3, 0.05, True))
}
CASES = {**FLOAT32, **OTHERS}


def train_fabric(case: Case, fabric: Any) -> Parameters:
    """The same through the verbs."""
    model, optimizers, dataset = make(case)
    model, *optimizers = fabric.setup(model, *optimizers)
    loader = fabric.setup_dataloaders(DataLoader(dataset, batch_size=GLOBAL_BATCH // fabric.world_size))
    for inputs, targets in loader:
        with fabric.accumulate(model, every=case.every):
            output = model(inputs)
            fabric.backward(mse_loss(output, targets.to(output.dtype)))
            for optimizer in optimizers:
                if case.clip_norm is not None:
                    fabric.clip_gradients(model, optimizer, max_norm=case.clip_norm)
                if case.clip_value is not None:
                    fabric.clip_gradients(model, optimizer, clip_val=case.clip_value)
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def main() -> None:
    from fabric_core import Fabric

    results = {}
    for name, case in CASES.items():
        with Fabric(precision=case.precision, strategy="ddp") as fabric:
            fabric.launch()
            results[name] = train_fabric(case, fabric)
            gathered = fabric.all_gather(results[name])
            assert all(torch.equal(ranks[0], rank) for ranks in gathered.values() for rank in ranks), name
            zero = fabric.is_global_zero
    if zero:
        torch.save(results, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
