"""A training step.

One process on the CPU, and a model so small (``nn.Linear(8, 8)``, SGD, 4 rows) that only overhead shows. Accumulation
is four micro-batches and one step, together. *Calls* are those of Python and C functions, which do not depend on the
machine.
"""

from __future__ import annotations

from harness import (
    ACCELERATE,
    LIGHTNING,
    OURS,
    PLAIN,
    Against,
    Case,
    Measure,
    Operation,
    Operations,
    Target,
    main,
)

FLOAT32, BF16, ACCUMULATION = "float32", "bf16-mixed", "accumulation of 4"
PRECISIONS = {FLOAT32: ("32-true", "no"), BF16: ("bf16-mixed", "bf16"), ACCUMULATION: ("32-true", "no")}


def plain(case: str) -> Operation:
    """A loop by hand."""
    import torch

    model, optimizer, rows = _work()

    def forward() -> torch.Tensor:
        return model(rows).square().mean()

    def mixed_forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(rows)
        return outputs.float().square().mean()

    loss_of = mixed_forward if case == BF16 else forward

    def step() -> None:
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad()

    def accumulate() -> None:
        for _ in range(4):
            (loss_of() / 4).backward()
        optimizer.step()
        optimizer.zero_grad()

    return accumulate if case == ACCUMULATION else step


def lightning_fabric(case: str) -> Operation:
    """Through the peer's verbs; it leaves the division of the loss to the user."""
    from lightning_fabric import Fabric

    peer = Fabric(accelerator="cpu", devices=1, precision=PRECISIONS[case][0])
    model, optimizer, rows = _work()
    model, optimizer = peer.setup(model, optimizer)

    def step() -> None:
        peer.backward(model(rows).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def accumulate() -> None:
        for index in range(4):
            with peer.no_backward_sync(model, enabled=index < 3):
                peer.backward(model(rows).square().mean() / 4)
        optimizer.step()
        optimizer.zero_grad()

    return accumulate if case == ACCUMULATION else step


def accelerate(case: str) -> Operation:
    """Through the peer's verbs."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    every = 4 if case == ACCUMULATION else 1
    AcceleratorState._reset_state()  # a second one in this process, where this is quick, may differ
    peer = Accelerator(cpu=True, mixed_precision=PRECISIONS[case][1], gradient_accumulation_steps=every)
    model, optimizer, rows = _work()
    model, optimizer = peer.prepare(model, optimizer)

    def step() -> None:
        peer.backward(model(rows).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def accumulate() -> None:
        for _ in range(4):
            with peer.accumulate(model):
                step()

    return accumulate if case == ACCUMULATION else step


def fabric(case: str) -> Operation:
    """Through ours."""
    from fabric_core import Fabric

    ours = Fabric(accelerator="cpu", devices=1, precision=PRECISIONS[case][0])
    ours.launch()
    model, optimizer, rows = _work()
    model, optimizer = ours.setup(model, optimizer)

    def step() -> None:
        ours.backward(model(rows).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def accumulate() -> None:
        for _ in range(4):
            with ours.accumulate(model, every=4):
                step()

    return accumulate if case == ACCUMULATION else step


def _work():  # type: ignore[no-untyped-def]
    """Model, optimizer and rows, the same for all."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    return model, torch.optim.SGD(model.parameters(), lr=0.01), torch.randn(4, 8)


FIGURE = Operations(
    name="step",
    about=__doc__,
    contenders={PLAIN: plain, LIGHTNING: lightning_fabric, ACCELERATE: accelerate, OURS: fabric},
    cases=(
        Case(FLOAT32, calls=100, rounds=100),
        Case(BF16, calls=100, rounds=100),
        Case(ACCUMULATION, calls=30),
    ),
    measures=(Measure("cpu", "µs", "CPU"), Measure("wall", "µs", "wall"), Measure("calls", "", "calls")),
    targets=(
        Target(FLOAT32, "cpu", 0.95),
        Target(FLOAT32, "calls", 0, Against.OVER),
        Target(BF16, "cpu", 0.95),
    ),
)

if __name__ == "__main__":
    main(FIGURE)
