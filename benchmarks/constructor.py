"""The constructor.

``Fabric(accelerator="cpu", devices=1)``, ``Accelerator(cpu=True)``: the first one of a process, and then again and
again. Plain PyTorch has none.
"""

from __future__ import annotations

from harness import ACCELERATE, LIGHTNING, OURS, Against, Case, Measure, Operation, Operations, Target, main


def lightning_fabric(_case: str) -> Operation:
    """The peer's."""
    from lightning_fabric import Fabric

    return lambda: Fabric(accelerator="cpu", devices=1)


def accelerate(_case: str) -> Operation:
    """The peer's; its second and later ones share the state of the first."""
    from accelerate import Accelerator

    return lambda: Accelerator(cpu=True)


def fabric(_case: str) -> Operation:
    """Ours."""
    from fabric_core import Fabric

    return lambda: Fabric(accelerator="cpu", devices=1)


FIGURE = Operations(
    name="constructor",
    about=__doc__,
    contenders={LIGHTNING: lightning_fabric, ACCELERATE: accelerate, OURS: fabric},
    cases=(Case("", calls=10, rounds=60),),
    measures=(
        Measure("cpu", "ms", "CPU"),
        Measure("wall", "ms", "wall"),
        Measure("calls", "", "calls"),
        Measure("first", "ms", "CPU of the first"),
    ),
    targets=(Target("", "cpu", 0.25, Against.VALUE),),
)

if __name__ == "__main__":
    main(FIGURE)
