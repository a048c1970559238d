"""A launch of two processes.

From the command to the end of the first step of both ranks; CPU time of all processes, from the command to its end;
memory (PSS) of all processes at that first step. Plain is ``torchrun`` with a loop by hand. ``accelerate launch --cpu
--num_processes 2`` starts one process without a word, so it is told ``--multi_gpu`` and ``ACCELERATE_USE_CPU``.
*fabric, fresh* starts each rank anew, as it does where copies of one process would not be safe.
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
    installed_command,
    main,
)

FRESH = "fabric, fresh"
IMPORTED_TWICE = (
    "Each rank has 154 MB of its own after `import torch` and a step (its objects, and the libraries' relocated "
    "data), and its half of the libraries' files; the parent has 13 MB. The target was set on a machine where "
    "torchrun needed 602 MB."
)


def program(name: str) -> tuple[str, ...]:
    """The script of a contender, for two ranks."""
    return (str(PROGRAMS / f"train_{name}.py"), "2")


def plain(_case: str, folder: Path) -> Command:
    """PyTorch's launcher."""
    torchrun = installed_command("torch", "torchrun", folder)
    words = (*torchrun, "--nproc-per-node=2", "--master-port=0", "--standalone", *program("plain"))
    return Command(words, waits_for=2)


def lightning_fabric(_case: str, folder: Path) -> Command:
    """The peer's command."""
    run = installed_command("lightning-fabric", "fabric", folder)
    words = (*run, "run", "--strategy=ddp", "--devices=2", "--accelerator=cpu", *program("lightning_fabric"))
    return Command(words, waits_for=2)


def accelerate(_case: str, folder: Path) -> Command:
    """The peer's command."""
    launch = installed_command("accelerate", "accelerate", folder)
    options = (
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
    )
    words = (*launch, "launch", *options, "--main_process_port=0", *program("accelerate"))
    return Command(words, {"ACCELERATE_USE_CPU": "true"}, waits_for=2)


def fabric(_case: str, folder: Path) -> Command:
    """Ours."""
    return _ours(folder)


def fabric_fresh(_case: str, folder: Path) -> Command:
    """Ours, where ranks must not be copies of one process."""
    return _ours(folder, "--start=fresh")


def _ours(folder: Path, *options: str) -> Command:
    run = installed_command("fabric-core", "fabric", folder)
    words = (*run, "run", *options, "--strategy=ddp", "--devices=2", "--accelerator=cpu", *program("fabric"))
    return Command(words, waits_for=2)


FIGURE = Commands(
    name="launch",
    about=__doc__,
    contenders={
        PLAIN: plain,
        LIGHTNING: lightning_fabric,
        ACCELERATE: accelerate,
        OURS: fabric,
        FRESH: fabric_fresh,
    },
    on_one_core=False,
    cases=(Case("", rounds=4),),
    measures=(
        Measure("first_step", "s", "to the first step"),
        Measure("cpu", "s", "CPU"),
        Measure("pss", "MB", "memory"),
    ),
    targets=(
        Target("", "first_step", 0.45),
        Target("", "cpu", 0.45),
        Target("", "pss", 300, Against.VALUE),
        Target("", "first_step", 0.75, contender=FRESH),
        Target("", "pss", 470, Against.VALUE, contender=FRESH, why=IMPORTED_TWICE),
    ),
)

if __name__ == "__main__":
    main(FIGURE)
