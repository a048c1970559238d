"""Two processes with an XLA device each, see `by_host`: ``several.py FOLDER``. Each function is one check."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import by_host
import dropping_out
import matrix
import torch
from by_host import RANK, opened
from counted import adam, net
from torch import nn

from fabric_core import FabricError

FOLDER = Path(sys.argv[1])
NESTED = {"auto_wrap_policy": {nn.Linear}, "activation_checkpointing": nn.Linear}
TRAINED = {"xla": ("everything",), "xla_fsdp": ("clip by value", "everything"), "nested": ("everything",)}


def options_of(name: str) -> dict[str, Any]:
    return {"strategy": "xla_fsdp", **NESTED} if name == "nested" else {"strategy": name}


def training() -> Any:
    found = {}
    for name, cases in TRAINED.items():
        for case in cases:
            with opened(**options_of(name)) as fabric:
                task = matrix.Training(fabric, matrix.CASES[case], seed=1 + RANK)
                task.run()
                found[name, case] = task.result(FOLDER)
    return found


def step(fabric: Any, model: Any, optimizer: Any) -> None:
    fabric.backward(model(torch.ones(2, 6, device=fabric.device) * (RANK + 1)).square().sum())
    optimizer.step()
    optimizer.zero_grad()


def states() -> Any:
    """What a set-up model says of its parameters."""
    found = {}
    for name in ("xla_fsdp", "nested"):
        with opened(**options_of(name)) as fabric:
            raw = net()
            model, optimizer = fabric.setup(raw, adam(raw))
            before = {key: value.cpu().clone() for key, value in model.state_dict().items()}
            own = {id(parameter) for parameter in model.parameters()}
            asked = {id(each) for group in optimizer.param_groups for each in group["params"]}
            step(fabric, model, optimizer)
            changed = {
                key: not torch.equal(value.cpu(), before[key]) for key, value in model.state_dict().items()
            }
            model.load_state_dict(before)
            restored = all(torch.equal(value.cpu(), before[key]) for key, value in model.state_dict().items())
            found[name] = {
                "pieces": before,
                "of the optimizer": own == asked,
                "changed": changed,
                "restored": restored,
                "whole": told(model.load_state_dict, net().state_dict()),
            }
    return found


def told(function: Any, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except (FabricError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def checkpoints() -> Any:
    """Saved at once, beside the training, and as one file; loaded again, also what others have saved."""
    found: dict[str, Any] = {}
    kinds = {"sharded": options_of("nested"), "full": {"strategy": "xla_fsdp", "checkpoint": "full"}}
    kinds["xla"] = {"strategy": "xla"}
    for kind, options in kinds.items():
        with opened(**options) as fabric, warnings.catch_warnings():
            warnings.simplefilter("error")  # a strategy that cannot save beside the training says so
            raw = net()
            model, optimizer = fabric.setup(raw, adam(raw))
            step(fabric, model, optimizer)
            state = {"model": model, "optimizer": optimizer, "lazy": torch.ones(2, device=fabric.device) * 3}
            fabric.save(FOLDER / kind, state)
            fabric.save(FOLDER / f"{kind} beside", state, wait=False)
            step(fabric, model, optimizer)
            with torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    tensor.zero_()
            fabric.wait_for_save()
            fabric.load(FOLDER / kind, state)
            fabric.save(FOLDER / f"{kind} again", state)
            if kind != "full":
                fabric.load(FOLDER / "by one", {"model": model, "optimizer": optimizer})
                fabric.save(FOLDER / f"{kind} by one", {"model": model, "optimizer": optimizer})
            found[kind] = {
                "other": told(fabric.load_raw, FOLDER / "other", model),
                "less": told(fabric.load_raw, FOLDER / "less", model),
                "unwritable": told(fabric.save, FOLDER / "file" / "below", state),
                "none": told(fabric.load, FOLDER / ("none" if RANK else kind)),
            }
    return found


class Nothing(nn.Module):
    """A layer that cannot give itself values."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def large() -> Any:
    """Models without memory, that get it part by part, and optimizers of the pieces."""
    found: dict[str, Any] = {}
    with opened(**options_of("nested")) as fabric:
        with fabric.init_module(empty_init=True):
            raw = net()
            is_meta = {parameter.is_meta for parameter in raw.parameters()}
        model = fabric.setup_module(raw)
        optimizer = fabric.setup_optimizers(adam(model))
        fabric.save(FOLDER / "first values", {"model": model})
        fabric.load(FOLDER / "by one", {"model": model, "optimizer": optimizer})
        fabric.save(FOLDER / "large by one", {"model": model, "optimizer": optimizer})
        step(fabric, model, optimizer)
        fabric.save(FOLDER / "large and on", {"model": model})
        found["meta"] = is_meta
        with fabric.init_module(empty_init=True):
            undefined = nn.Sequential(nn.Linear(4, 4), Nothing())
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            fabric.setup_module(undefined)
        found["undefined"] = [str(each.message) for each in heard]
        tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        tied[2].weight = tied[0].weight
        found["tied"] = told(fabric.setup_module, tied)
    with opened("xla_fsdp") as fabric:
        raw = net()
        model = fabric.setup_module(raw)
        optimizer = fabric.setup_optimizers(adam(raw))  # apart from the model
        fabric.load(FOLDER / "by one", {"model": model, "optimizer": optimizer})
        step(fabric, model, optimizer)
        fabric.save(FOLDER / "apart and on", {"model": model})
        found["twice"] = told(fabric.setup_module, nn.Sequential(model.module))
    return found


def resuming() -> Any:
    found = {}
    for strategy in ("xla", "xla_fsdp"):
        folder = FOLDER / f"resumed-{strategy}"
        folder.mkdir(exist_ok=True)
        found[strategy] = dropping_out.compare(lambda strategy=strategy: opened(strategy), folder)
    return found


CHECKS = (training, states, checkpoints, large, resuming)

if __name__ == "__main__":
    served = by_host.join(FOLDER)
    answers = {check.__name__: check() for check in CHECKS}
    torch.save(answers, FOLDER / f"answers-{RANK}.pt")
