"""Trains through every part of the frozen plugin, and through a plain loop; prints what came of both as JSON."""

import importlib
import json
import os
import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

for module in filter(None, os.environ.get("IMPORT_FIRST", "").split(",")):
    importlib.import_module(module)

from fabric_core import Fabric  # noqa: E402

EVERY, BATCHES, CHECKPOINT = 4, 6, "frozen.pt"


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(4 * BATCHES, 3, generator=generator), torch.randn(4 * BATCHES, 1, generator=generator)
    )


def frozen(fabric: Fabric) -> dict[str, object]:
    """One epoch with accumulation, both kinds of clipping, a checkpoint, and what else has a verb."""
    torch.manual_seed(3)
    with fabric.init_module():
        model = torch.nn.Linear(3, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    losses = []
    for inputs, targets in fabric.setup_dataloaders(DataLoader(data(), batch_size=4)):
        with fabric.accumulate(model, every=EVERY) as window:
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            losses.append(loss.item())
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            fabric.clip_gradients(model, optimizer, clip_val=0.3)
            optimizer.step()
            optimizer.zero_grad()
        if window.is_full:
            fabric.log("loss", loss, step=len(losses))
    with fabric.no_backward_sync(model), fabric.autocast():
        assert torch.get_default_dtype() == torch.float64
    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    extra = {"epoch": 7}
    fabric.save(CHECKPOINT, {"model": model, "optimizer": optimizer, "extra": extra})
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    restored = {"model": model, "optimizer": optimizer}
    rest = fabric.load(CHECKPOINT, restored)
    again = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    fabric.barrier()
    told = [
        fabric.broadcast(4),
        fabric.all_gather(torch.ones(1)).tolist(),
        fabric.all_reduce(torch.ones(1)).item(),
    ]
    assert not fabric.preempted
    plan = {part.kind: part.identity for part in fabric.plan}
    calls = sys.modules["frozen_one.parts"].CALLS
    dtype = str(next(model.parameters()).dtype)
    return {
        "losses": losses,
        "weights": weights,
        "restored": again == weights,
        "rest": rest["extra"],
        "told": told,
        "plan": plan,
        "dtype": dtype,
        "calls": calls,
        "process": os.getpid(),
    }


def plain() -> dict[str, object]:
    """The same in float64, in PyTorch alone."""
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    model = torch.nn.Linear(3, 1)
    torch.set_default_dtype(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches, losses = list(DataLoader(data(), batch_size=4)), []
    for window in (batches[:EVERY], batches[EVERY:]):
        for inputs, targets in window:
            loss = torch.nn.functional.mse_loss(model(inputs.double()).float(), targets)
            losses.append(loss.item())
            (loss / len(window)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "losses": losses,
        "weights": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
    }


fabric = Fabric(
    accelerator="frozen_device",
    strategy="frozen_strategy",
    devices=1,
    precision="frozen_double",
    plugins=["frozen_cluster", "frozen_launcher", "frozen_file"],
    loggers="frozen_log",
)
found = fabric.launch(frozen)
fabric.close()
found["calls"] = sorted(found["calls"] | sys.modules["frozen_one.parts"].CALLS)
found["elsewhere"] = found.pop("process") != os.getpid()
print(json.dumps({"frozen": found, "plain": plain()}))
