"""Sections in which a model is trained, saved, loaded and trained on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from fabric_core.testing.plain_loop import CASES, GLOBAL_BATCH, Parameters, make, probe
from fabric_core.testing.programs.task import Task
from fabric_core.testing.programs.training import Training

FAILURE = "the backward pass fails"
MIDDLE = 7  # windows, after which a checkpoint is made


def train(task: Task, precision: str, name: str) -> dict[str, Any]:
    """One case. Of those with accumulation, also the parameters before the short last window."""
    case = replace(CASES[name], precision=precision)
    with task.fabric(precision) as fabric:
        training = Training(fabric, case, build=task.build)
        training.run(end=MIDDLE * case.every)
        if name == "everything":
            fabric.save(middle_of(task, precision), training.state)
        training.run(begin=MIDDLE * case.every, end=case.full)
        before_last = training.whole(task.own) if case.full < case.batches else {}
        training.run(begin=case.full)
        return _outcome(training, task.own) | {"before_last": before_last}


def resume(task: Task, precision: str, size: str) -> dict[str, Any]:
    """The case with everything, gone on with in the middle, from a checkpoint of a job of so many processes."""
    case, saved = replace(CASES["everything"], precision=precision), middle_of(task, precision, int(size))
    with task.fabric(precision) as fabric:
        training = Training(fabric, case, seed=2, build=task.build)
        training.restore(saved)
        fabric.save(task.own.with_suffix(".again"), training.state)
        before, after = fabric.load(saved), fabric.load(task.own.with_suffix(".again"))
        training.run(begin=MIDDLE * case.every)
        return _outcome(training, task.own) | {"changed": list(differences(before, after))}


def middle_of(task: Task, precision: str, size: int | None = None) -> Path:
    """Where the checkpoint of a precision is, by a job of so many processes."""
    return task.path(f"middle-{precision}", size)


def _outcome(training: Training, path: Path) -> dict[str, Any]:
    return {
        "losses": training.losses,
        "norms": training.norms,
        "parameters": training.whole(path),
        "outputs": training.outputs(),
        "replicas": training.replicas,
        "local": _visible(training),
        "keys": list(training.model.state_dict()),
    }


def _visible(training: Training) -> Parameters:
    """The parameters that this rank holds as whole, plain tensors."""
    shapes = {
        name: value.shape for name, value in make(training.case, build=training.build)[0].named_parameters()
    }
    return {
        name: value.detach().cpu().clone()
        for name, value in training.model.named_parameters()
        if type(value.data) is torch.Tensor and value.shape == shapes.get(name)
    }


def gradients(task: Task) -> dict[str, Any]:
    """One step with a learning rate of one: what the parameters lose is their gradient."""
    with task.fabric() as fabric:
        step = _OneStep(fabric, task)
        step.backward(next(iter(step.loader)))
        return step.outcome()


def held(task: Task) -> dict[str, Any]:
    """Two batches before one step: the first without synchronisation, the second with it."""
    with task.fabric() as fabric:
        step = _OneStep(fabric, task)
        batches = iter(step.loader)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with fabric.no_backward_sync(step.model):
                step.backward(next(batches))
        holds = not any("cannot hold back" in str(warning.message) for warning in caught)
        own = step.visible_gradients()
        step.backward(next(batches))
        return step.outcome() | {"holds": holds, "own": own}


def norms(task: Task) -> dict[str, Any]:
    """The norms of one gradient, and what happens to one that is not finite on the last rank."""
    found: dict[str, Any] = {}
    for kind in ("1", "2", "inf"):
        with task.fabric() as fabric:
            step = _OneStep(fabric, task)
            step.backward(next(iter(step.loader)))
            norm = fabric.clip_gradients(step.model, step.optimizer, max_norm=1e6, norm_type=float(kind))
            found[kind] = float(norm)
            found["plain"] = type(norm) is torch.Tensor and norm.dim() == 0
    with task.fabric() as fabric:
        step = _OneStep(fabric, task)
        inputs, targets = next(iter(step.loader))
        if fabric.global_rank == task.size - 1:
            inputs = inputs * float("inf")
        step.backward((inputs, targets))
        found["error"] = ""
        try:
            fabric.clip_gradients(step.model, step.optimizer, max_norm=1.0, error_if_nonfinite=True)
        except RuntimeError as error:
            found["error"] = f"{type(error).__name__}: {error}"
    return found


def weights(task: Task) -> dict[str, Any]:
    """What a model computes of which every rank has had weights of its own."""
    with task.fabric() as fabric:
        raw, optimizers, _ = make(CASES["plain"], seed=100 + fabric.global_rank, build=task.build)
        model, *_ = fabric.setup(raw, *optimizers)
        with torch.no_grad():
            return {"outputs": model(fabric.to_device(probe())).cpu().clone()}


def failing_backward(task: Task) -> dict[str, Any]:
    """What comes out of a backward pass that fails on every rank."""
    with task.fabric() as fabric:
        step = _OneStep(fabric, task)
        inputs, targets = next(iter(step.loader))
        loss = mse_loss(step.model(inputs), targets)
        loss.register_hook(_fail)  # type: ignore[no-untyped-call]
        try:
            fabric.backward(loss, model=step.model)
        except Exception as error:
            return {"raised": str(error)}
        return {"raised": ""}


def _fail(_: torch.Tensor) -> None:
    raise ValueError(FAILURE)


class _OneStep:
    """A model with an optimizer that subtracts the gradients as they are."""

    def __init__(self, fabric: Any, task: Task) -> None:
        raw, _, dataset = make(CASES["plain"], build=task.build)
        self.fabric, self.path = fabric, task.own
        self.shapes = {name: value.shape for name, value in raw.named_parameters()}
        self.model, self.optimizer = fabric.setup(raw, torch.optim.SGD(raw.parameters(), lr=1.0))
        self.shard = fabric.strategy.sampler_arguments
        batch = GLOBAL_BATCH // self.shard["num_replicas"]
        self.loader = fabric.setup_dataloaders(DataLoader(dataset, batch_size=batch))
        self.before = self._whole()

    def backward(self, batch: Any) -> None:
        inputs, targets = batch
        self.fabric.backward(mse_loss(self.model(inputs), targets), model=self.model)

    def visible_gradients(self) -> Parameters:
        """Those that this rank holds as whole, plain tensors."""
        return {
            name: value.grad.detach().cpu().clone()
            for name, value in self.model.named_parameters()
            if type(value.grad) is torch.Tensor and value.grad.shape == self.shapes.get(name)
        }

    def outcome(self) -> dict[str, Any]:
        self.optimizer.step()
        after = self._whole()
        return {"gradients": {name: self.before[name] - after[name] for name in after}, **self.shard}

    def _whole(self) -> Parameters:
        self.fabric.save(self.path, {"model": self.model})
        return {name: value.clone() for name, value in self.fabric.load(self.path)["model"].items()}


def differences(one: Any, other: Any, at: str = "") -> Iterator[str]:
    """Where two checkpoints differ, by a bit or more."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{at}/{key}")
            else:
                yield f"{at}/{key} is in one of them only"
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{at}/{number}")
    elif not _same(one, other):
        yield f"{at}: {one!r:.100} and {other!r:.100}"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    with suppress(Exception):
        return bool(one == other)
    return False


SECTIONS: dict[str, Callable[..., Any]] = {
    "train": train,
    "resume": resume,
    "gradients": gradients,
    "held": held,
    "norms": norms,
    "weights": weights,
    "failing backward": failing_backward,
}
