"""What this distribution offers. Data only: nothing here imports PyTorch or an implementation."""

from __future__ import annotations

from collections.abc import Iterator

from fabric_core import (
    AcceleratorSpec,
    ClusterEnvironmentSpec,
    LauncherSpec,
    LoggerSpec,
    PrecisionSpec,
    StrategySpec,
    hookimpl,
)

DDP = "fabric_backends.strategies.ddp:DDPStrategy"

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


@hookimpl
def fabric_accelerators() -> Iterator[AcceleratorSpec]:
    """Apple's GPU, the devices of PyTorch by name, and whatever else the installed PyTorch has a device for."""
    yield MPS
    for device_type in DEVICE_TYPES:
        yield AcceleratorSpec(
            device_type,
            TORCH_ACCELERATOR.target,
            options={"device_type": device_type},
            probe=f"fabric_backends.accelerators.probes:{device_type}",
            priority=10,
            groups=("gpu",),
            description=f"devices of PyTorch's type {device_type!r}, through torch.accelerator",
        )
    yield TORCH_ACCELERATOR


@hookimpl
def fabric_strategies() -> Iterator[StrategySpec]:
    """Data parallel training: one preset per way to start the processes."""
    yield StrategySpec(
        "ddp",
        DDP,
        supports=("*",),
        rejects=("mps",),
        volunteers_for=("many", "many_nodes"),
        priority=10,
        launcher="script",
        description="every process holds the whole model; gradients are averaged",
    )
    yield StrategySpec(
        "ddp_spawn",
        DDP,
        supports=("*",),
        rejects=("mps",),
        launcher="spawn",
        description="ddp, its processes started afresh to run a function",
    )
    yield StrategySpec(
        "ddp_fork",
        DDP,
        supports=("*",),
        rejects=("mps",),
        launcher="fork",
        description="ddp, its processes forked to run a function",
    )
    yield StrategySpec(
        "ddp_notebook",
        DDP,
        supports=("*",),
        rejects=("mps",),
        volunteers_for=("notebook",),
        priority=10,
        launcher="fork",
        description="ddp for notebooks and prompts",
    )
    yield StrategySpec(
        "ddp_find_unused_parameters_true",
        DDP,
        options={"find_unused_parameters": True},
        supports=("*",),
        rejects=("mps",),
        launcher="script",
        description="ddp for models of which a step may leave parameters unused",
    )


@hookimpl
def fabric_precisions() -> Iterator[PrecisionSpec]:
    """Double, true half and mixed precision."""
    true = "fabric_backends.precisions.true:TruePrecision"
    mixed = "fabric_backends.precisions.mixed:MixedPrecision"
    yield PrecisionSpec(
        "64-true", true, aliases=("64",), options={"dtype": "float64"}, description="float64 everywhere"
    )
    yield PrecisionSpec(
        "16-true", true, options={"dtype": "float16"}, description="float16 everywhere, unscaled"
    )
    yield PrecisionSpec("bf16-true", true, options={"dtype": "bfloat16"}, description="bfloat16 everywhere")
    yield PrecisionSpec(
        "16-mixed",
        mixed,
        aliases=("16",),
        options={"dtype": "float16"},
        description="float32 weights, float16 computation, scaled losses",
    )
    yield PrecisionSpec(
        "bf16-mixed",
        mixed,
        aliases=("bf16",),
        options={"dtype": "bfloat16"},
        description="float32 weights, bfloat16 computation",
    )


@hookimpl
def fabric_cluster_environments() -> Iterator[ClusterEnvironmentSpec]:
    """Jobs that torchrun has started."""
    yield ClusterEnvironmentSpec(
        "torchelastic",
        "fabric_backends.environments.torchelastic:TorchElasticEnvironment",
        detect="fabric_backends.environments.torchelastic:detect",
        aliases=("torchrun",),
        priority=90,
        description="processes started by torchrun",
    )


@hookimpl
def fabric_launchers() -> Iterator[LauncherSpec]:
    """Starting the script again, or running a function in new processes."""
    yield LauncherSpec(
        "script",
        "fabric_backends.launchers.script:ScriptLauncher",
        description="starts the running script again, once per process",
    )
    yield LauncherSpec(
        "spawn",
        "fabric_backends.launchers.function:FunctionLauncher",
        options={"start_method": "spawn"},
        needs_function=True,
        description="runs a function in fresh processes",
    )
    yield LauncherSpec(
        "fork",
        "fabric_backends.launchers.function:FunctionLauncher",
        options={"start_method": "fork"},
        interactive=True,
        needs_function=True,
        description="runs a function in forked processes; works in notebooks",
    )


@hookimpl
def fabric_loggers() -> Iterator[LoggerSpec]:
    """Metrics as a table on disk, or for TensorBoard."""
    yield LoggerSpec("csv", "fabric_backends.loggers.csv:CSVLogger", description="one CSV file per run")
    yield LoggerSpec(
        "tensorboard",
        "fabric_backends.loggers.tensorboard:TensorBoardLogger",
        requires=("tensorboard",),
        description="event files for TensorBoard",
    )
