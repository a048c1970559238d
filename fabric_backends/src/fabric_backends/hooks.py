"""What this distribution offers. Data only: nothing here imports PyTorch or an implementation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fabric_core import (
    AcceleratorSpec,
    ClusterEnvironmentSpec,
    LauncherSpec,
    LoggerSpec,
    PrecisionSpec,
    StrategySpec,
    hookimpl,
)

DEVICE_TYPES = ("xpu", "hpu", "npu", "mtia", "maia")
"""Device types of PyTorch that can be asked for by name; ``torch_accelerator`` stands for every other."""

MPS = AcceleratorSpec(
    "mps",
    "fabric_backends.accelerators.mps:MPSAccelerator",
    probe="fabric_backends.accelerators.probes:mps",
    priority=20,
    groups=("gpu",),
    max_devices=1,
    description="the GPU of an Apple computer",
)
TORCH_ACCELERATOR = AcceleratorSpec(
    "torch_accelerator",
    "fabric_backends.accelerators.generic:TorchAccelerator",
    probe="fabric_backends.accelerators.probes:torch_accelerator",
    priority=10,
    groups=("gpu",),
    description="any other device that the installed PyTorch knows, through torch.accelerator",
)
DDP = StrategySpec(
    "ddp",
    "fabric_backends.strategies.ddp:DDPStrategy",
    supports=("*",),
    rejects=("mps",),
    volunteers_for=("many", "many_nodes"),
    priority=10,
    launcher="script",
    description="every process holds the whole model; gradients are averaged",
)
TRUE = PrecisionSpec(
    "true", "fabric_backends.precisions.true:TruePrecision", description="one dtype everywhere"
)
"""What `TruePrecision` is when it is passed in code. On offer are the presets of it, one per dtype."""

MIXED = PrecisionSpec(
    "mixed",
    "fabric_backends.precisions.mixed:MixedPrecision",
    description="float32 weights, computation in half precision",
)
"""Likewise, what `MixedPrecision` is."""

TORCHELASTIC = ClusterEnvironmentSpec(
    "torchelastic",
    "fabric_backends.environments.torchelastic:TorchElasticEnvironment",
    detect="fabric_backends.environments.torchelastic:detect",
    aliases=("torchrun",),
    priority=90,
    description="processes started by torchrun",
)
SCRIPT = LauncherSpec(
    "script",
    "fabric_backends.launchers.script:ScriptLauncher",
    description="starts the running script again, once per process",
)
SPAWN = LauncherSpec(
    "spawn",
    "fabric_backends.launchers.function:SpawnLauncher",
    needs_function=True,
    description="runs a function in fresh processes",
)
FORK = LauncherSpec(
    "fork",
    "fabric_backends.launchers.function:ForkLauncher",
    interactive=True,
    needs_function=True,
    description="runs a function in forked processes; works in notebooks",
)
CSV = LoggerSpec("csv", "fabric_backends.loggers.csv:CSVLogger", description="one CSV file per run")
TENSORBOARD = LoggerSpec(
    "tensorboard",
    "fabric_backends.loggers.tensorboard:TensorBoardLogger",
    requires=("tensorboard",),
    description="event files for TensorBoard",
)


@hookimpl
def fabric_accelerators() -> Iterator[AcceleratorSpec]:
    """Apple's GPU, the devices of PyTorch by name, and whatever else the installed PyTorch has a device for."""
    yield MPS
    for device_type in DEVICE_TYPES:
        yield replace(
            TORCH_ACCELERATOR,
            name=device_type,
            options={"device_type": device_type},
            probe=f"fabric_backends.accelerators.probes:{device_type}",
            description=f"devices of PyTorch's type {device_type!r}, through torch.accelerator",
        )
    yield TORCH_ACCELERATOR


@hookimpl
def fabric_strategies() -> Iterator[StrategySpec]:
    """Data parallel training: one preset per way to start the processes."""
    yield DDP
    asked_for = replace(DDP, volunteers_for=(), priority=0)
    yield replace(
        asked_for,
        name="ddp_spawn",
        launcher="spawn",
        description="ddp, its processes started afresh to run a function",
    )
    yield replace(
        asked_for,
        name="ddp_fork",
        launcher="fork",
        description="ddp, its processes forked to run a function",
    )
    yield replace(
        DDP,
        name="ddp_notebook",
        volunteers_for=("notebook",),
        launcher="fork",
        description="ddp for notebooks and prompts",
    )
    yield replace(
        asked_for,
        name="ddp_find_unused_parameters_true",
        options={"find_unused_parameters": True},
        description="ddp for models of which a step may leave parameters unused",
    )


@hookimpl
def fabric_precisions() -> Iterator[PrecisionSpec]:
    """Double, true half and mixed precision."""
    for base, dtype, name, aliases, description in (
        (TRUE, "float64", "64-true", ("64",), "float64 everywhere"),
        (TRUE, "float16", "16-true", (), "float16 everywhere, unscaled"),
        (TRUE, "bfloat16", "bf16-true", (), "bfloat16 everywhere"),
        (MIXED, "float16", "16-mixed", ("16",), "float32 weights, float16 computation, scaled losses"),
        (MIXED, "bfloat16", "bf16-mixed", ("bf16",), "float32 weights, bfloat16 computation"),
    ):
        yield replace(base, name=name, aliases=aliases, options={"dtype": dtype}, description=description)


@hookimpl
def fabric_cluster_environments() -> Iterator[ClusterEnvironmentSpec]:
    """Jobs that torchrun has started."""
    yield TORCHELASTIC


@hookimpl
def fabric_launchers() -> Iterator[LauncherSpec]:
    """Starting the script again, or running a function in new processes."""
    yield SCRIPT
    yield SPAWN
    yield FORK


@hookimpl
def fabric_loggers() -> Iterator[LoggerSpec]:
    """Metrics as a table on disk, or for TensorBoard."""
    yield CSV
    yield TENSORBOARD
