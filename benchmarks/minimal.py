"""A minimal script.

From the start of the process to the end of its third training step, on one core: imports, the model and an SGD
optimizer included. Memory is the peak of the resident set.
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


def plain(_case: str, _folder: Path) -> Command:
    """A loop by hand."""
    return Command(python(str(PROGRAMS / "train_plain.py"), "1"))


def lightning_fabric(_case: str, _folder: Path) -> Command:
    """The peer's."""
    return Command(python(str(PROGRAMS / "train_lightning_fabric.py"), "1"))


def accelerate(_case: str, _folder: Path) -> Command:
    """The peer's."""
    return Command(python(str(PROGRAMS / "train_accelerate.py"), "1"), {"ACCELERATE_USE_CPU": "true"})


def fabric(_case: str, _folder: Path) -> Command:
    """Ours."""
    return Command(python(str(PROGRAMS / "train_fabric.py"), "1"))


FIGURE = Commands(
    name="minimal",
    about=__doc__,
    contenders={PLAIN: plain, LIGHTNING: lightning_fabric, ACCELERATE: accelerate, OURS: fabric},
    cases=(Case("", rounds=4),),
    measures=(
        Measure("own_cpu", "s", "CPU"),
        Measure("wall", "s", "wall"),
        Measure("own_peak", "MB", "peak memory"),
    ),
    targets=(Target("", "own_cpu", 0.6), Target("", "own_peak", 3, Against.OVER)),
)

if __name__ == "__main__":
    main(FIGURE)
