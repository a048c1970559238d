"""What a step and a batch cost in calls of functions, beside a plain PyTorch loop."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo  # a plain loop loads it with its first optimizer
from counting import calls
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from fabric_core import Fabric

Step = Callable[[], object]
ROWS = torch.linspace(-1, 1, 32).reshape(4, 8)
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def work() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(8, 8)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def loss_of(outputs: Tensor) -> Tensor:
    return outputs.square().mean()


# -- one training step, by hand and through the verbs -------------------------------------------------------------


def plain_step(precision: str) -> Step:
    model, optimizer = work()

    def context() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", DTYPES[precision]) if precision in DTYPES else nullcontext()

    def step() -> None:
        with context():
            outputs = model(ROWS)
        loss_of(outputs.float()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_scaled_step(precision: str) -> Step:
    model, optimizer = work()
    scaler = torch.amp.GradScaler("cpu")

    def step() -> None:
        with torch.autocast("cpu", DTYPES[precision]):
            outputs = model(ROWS)
        scaler.scale(loss_of(outputs.float())).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def plain_clipped_step(precision: str) -> Step:
    model, optimizer = work()

    def step() -> None:
        loss_of(model(ROWS)).backward()
        clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_window(precision: str) -> Step:
    model, optimizer = work()

    def window() -> None:
        for _ in range(4):
            (loss_of(model(ROWS)) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()

    return window


def fabric_step(precision: str) -> Step:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model, optimizer = fabric.setup(*work())

    def step() -> None:
        fabric.backward(loss_of(model(ROWS)))
        optimizer.step()
        optimizer.zero_grad()

    return step


def fabric_clipped_step(precision: str) -> Step:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model, optimizer = fabric.setup(*work())

    def step() -> None:
        fabric.backward(loss_of(model(ROWS)))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def fabric_window(precision: str) -> Step:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model, optimizer = fabric.setup(*work())

    def window() -> None:
        for _ in range(4):
            with fabric.accumulate(model, every=4):
                fabric.backward(loss_of(model(ROWS)))
                optimizer.step()
                optimizer.zero_grad()

    return window


STEPS = {
    "step": ("32-true", plain_step, fabric_step),
    "step in bf16-mixed": ("bf16-mixed", plain_step, fabric_step),
    "step in 16-mixed": ("16-mixed", plain_scaled_step, fabric_step),
    "step that clips": ("32-true", plain_clipped_step, fabric_clipped_step),
    "window of 4 micro-batches": ("32-true", plain_window, fabric_window),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_calls_no_more_functions_than_before(held: Any, name: str) -> None:
    precision, *makers = STEPS[name]
    plain, fabric = (counted(make(precision)) for make in makers)
    held("calls-over-plain", name, fabric - plain)


def counted(step: Step) -> int:
    """The calls of one step, when all that happens once has happened."""
    for _ in range(3):
        step()
    gc.collect()
    gc.disable()
    try:
        return calls(step)
    finally:
        gc.enable()


# -- batches ------------------------------------------------------------------------------------------------------


def loader(batches: int) -> DataLoader[Any]:
    ready = [{key: torch.zeros(8, 8) for key in "abcd"} for _ in range(batches)]
    return DataLoader(ready, batch_size=None)  # type: ignore[arg-type]


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    with Fabric(accelerator="cpu", devices=1) as fabric:
        yield fabric


def test_a_batch_calls_no_more_functions_than_before(held: Any, fabric: Fabric) -> None:
    def per_batch(prepare: Callable[[Any], Any]) -> float:
        few, many = (counted(partial(list, prepare(loader(size)))) for size in (10, 20))
        return (many - few) / 10

    held("calls-over-plain", "batch", per_batch(fabric.setup_dataloaders) - per_batch(lambda plain: plain))
