"""The import.

A new process imports torch, and then the library and its main class. Numbers are those of the whole process up to
there, on one core; what a library adds is what lies over plain, which is ``import torch`` alone.
"""

from __future__ import annotations

from pathlib import Path

from harness import (
    ACCELERATE,
    LIGHTNING,
    OURS,
    PLAIN,
    PROGRAMS,
    Against,
    Case,
    Command,
    Commands,
    Measure,
    Target,
    main,
    python,
)


def importing(*names: str) -> Command:
    """A process that imports these."""
    return Command(python(str(PROGRAMS / "importing.py"), *names))


def plain(_case: str, _folder: Path) -> Command:
    """PyTorch alone."""
    return importing("torch:Tensor")


def lightning_fabric(_case: str, _folder: Path) -> Command:
    """The peer."""
    return importing("torch:Tensor", "lightning_fabric:Fabric")


def accelerate(_case: str, _folder: Path) -> Command:
    """The peer."""
    return importing("torch:Tensor", "accelerate:Accelerator")


def fabric(_case: str, _folder: Path) -> Command:
    """Ours."""
    return importing("torch:Tensor", "fabric_core:Fabric")


FIGURE = Commands(
    name="imports",
    about=__doc__,
    contenders={PLAIN: plain, LIGHTNING: lightning_fabric, ACCELERATE: accelerate, OURS: fabric},
    cases=(Case("", rounds=5),),
    measures=(
        Measure("own_cpu", "ms", "CPU"),
        Measure("own_wall", "ms", "wall"),
        Measure("own_modules", "", "modules"),
        Measure("own_dynamo", "", "of torch._dynamo"),
        Measure("own_numpy", "", "of numpy"),
    ),
    targets=(
        Target("", "own_cpu", 50, Against.OVER),
        Target("", "own_modules", 60, Against.OVER),
        Target("", "own_dynamo", 0, Against.OVER),
        Target("", "own_numpy", 0, Against.OVER),
    ),
)

if __name__ == "__main__":
    main(FIGURE)
