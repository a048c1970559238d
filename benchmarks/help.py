"""The command line.

``--help`` of each command; plain is ``torchrun``. And how long ours takes to list the plugins that are installed. One
core.
"""

from __future__ import annotations

from pathlib import Path

from harness import (
    ACCELERATE,
    LIGHTNING,
    OURS,
    PLAIN,
    Against,
    Case,
    Command,
    Commands,
    Measure,
    Target,
    installed_command,
    main,
)

HELP, LIST = "--help", "plugins list"


def plain(_case: str, folder: Path) -> Command:
    """PyTorch's launcher."""
    return Command((*installed_command("torch", "torchrun", folder), HELP))


def lightning_fabric(_case: str, folder: Path) -> Command:
    """The peer's."""
    return Command((*installed_command("lightning-fabric", "fabric", folder), HELP))


def accelerate(_case: str, folder: Path) -> Command:
    """The peer's."""
    return Command((*installed_command("accelerate", "accelerate", folder), HELP))


def fabric(case: str, folder: Path) -> Command:
    """Ours."""
    return Command((*installed_command("fabric-core", "fabric", folder), *case.split()))


FIGURE = Commands(
    name="help",
    about=__doc__,
    contenders={PLAIN: plain, LIGHTNING: lightning_fabric, ACCELERATE: accelerate, OURS: fabric},
    cases=(Case(HELP, rounds=4), Case(LIST, rounds=9, contenders=(OURS,))),
    measures=(Measure("wall", "ms", "wall"), Measure("cpu", "ms", "CPU")),
    targets=(Target(HELP, "wall", 120, Against.VALUE), Target(LIST, "wall", 200, Against.VALUE)),
)

if __name__ == "__main__":
    main(FIGURE)
