"""What this distribution offers. Data only: nothing here imports PyTorch or an implementation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from fabric_core import (
    AcceleratorSpec,
    ClusterEnvironmentSpec,
    LauncherSpec,
    LoggerSpec,
    NoOptions,
    PrecisionSpec,
    StrategySpec,
    hookimpl,
)

if TYPE_CHECKING:
    from fabric_core import Plan

DEVICE_TYPES = ("xpu", "hpu", "npu", "mtia", "maia")
"""Device types of PyTorch that can be asked for by name; ``torch_accelerator`` stands for every other."""

MPS = AcceleratorSpec(
    "mps",
    "fabric_backends.accelerators.mps:MPSAccelerator",
    probe="fabric_backends.accelerators.probes:mps",
    priority=20,
    groups=("gpu",),
    max_devices=1,
    options_type=NoOptions,
    description="the GPU of an Apple computer",
)
TORCH_ACCELERATOR = AcceleratorSpec(
    "torch_accelerator",
    "fabric_backends.accelerators.generic:TorchAccelerator",
    probe="fabric_backends.accelerators.probes:torch_accelerator",
    priority=10,
    groups=("gpu",),
    options_type="fabric_backends.options.accelerators:DeviceOptions",
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
    options_type="fabric_backends.options.data_parallel:DDPOptions",
    description="every process holds the whole model; gradients are averaged",
)
TENSOR_PARALLEL = StrategySpec(
    "tensor_parallel",
    "fabric_backends.strategies.tensor_parallel:TensorParallelStrategy",
    aliases=("model_parallel",),
    supports=("*",),
    rejects=("mps",),
    precisions=("32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed"),
    launcher="script",
    options_type="fabric_backends.options.sharded:TensorParallelOptions",
    description="layers are divided within groups of ranks, data between the groups",
)
DP = StrategySpec(
    "dp",
    "fabric_backends.strategies.dp:DataParallelStrategy",
    supports=("cpu", "gpu"),
    rejects=("mps",),
    processes="single",
    options_type=NoOptions,
    description="one process that copies the model to each of its devices in every step; ddp is faster",
)
DDP_SHARDED = StrategySpec(
    "ddp_sharded",
    "fabric_backends.strategies.ddp_sharded:ShardedDDPStrategy",
    supports=("*",),
    rejects=("mps",),
    launcher="script",
    options_type="fabric_backends.options.data_parallel:ShardedDDPOptions",
    description="ddp in which each rank keeps the optimizer's state for a part of the parameters",
)
DDP_SHARDED_SPAWN = replace(
    DDP_SHARDED,
    name="ddp_sharded_spawn",
    launcher="spawn",
    description="ddp_sharded, its processes started afresh to run a function",
)
DDP_SHARDED_FAIRSCALE = replace(
    DDP_SHARDED,
    name="ddp_sharded_fairscale",
    options={"engine": "fairscale"},
    requires=("fairscale>=0.4.13",),
    description="ddp_sharded with FairScale's engine, which shards the gradients, too",
)
DDP_SHARDED_PRESETS = (DDP_SHARDED, DDP_SHARDED_SPAWN, DDP_SHARDED_FAIRSCALE)
LOCAL_SGD = StrategySpec(
    "local_sgd",
    "fabric_backends.strategies.local_sgd:LocalSGDStrategy",
    supports=("*",),
    rejects=("mps",),
    launcher="script",
    options_type="fabric_backends.options.data_parallel:LocalSGDOptions",
    description="every rank trains alone; the parameters are averaged every few steps",
)
FSDP = StrategySpec(
    "fsdp",
    "fabric_backends.strategies.fsdp:FSDPStrategy",
    supports=("*",),
    rejects=("mps",),
    precisions=("64-true", "32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"),
    launcher="script",
    options_type="fabric_backends.options.sharded:FSDPOptions",
    description="every process holds a part of the model and gathers the rest while it computes",
)
CONTEXT_PARALLEL = replace(
    FSDP,
    name="context_parallel",
    target="fabric_backends.strategies.context_parallel:ContextParallelStrategy",
    options_type="fabric_backends.options.sharded:ContextParallelOptions",
    description="fsdp whose ranks divide long sequences among them, too",
)
TRUE = PrecisionSpec(
    "true",
    "fabric_backends.precisions.true:TruePrecision",
    options_type="fabric_backends.options.precisions:TrueOptions",
    description="one dtype everywhere",
)
"""What `TruePrecision` is when it is passed in code. On offer are the presets of it, one per dtype."""

MIXED = PrecisionSpec(
    "mixed",
    "fabric_backends.precisions.mixed:MixedPrecision",
    options_type="fabric_backends.options.precisions:MixedOptions",
    description="float32 weights, computation in half precision",
)
"""Likewise, what `MixedPrecision` is."""

SHARDED_MIXED = replace(
    MIXED,
    target="fabric_backends.precisions.sharded:ShardedMixedPrecision",
    strategies=tuple(preset.name for preset in DDP_SHARDED_PRESETS),
)
"""Likewise, what `ShardedMixedPrecision` is."""

FSDP_MIXED = PrecisionSpec(
    "mixed",
    "fabric_backends.precisions.fully_sharded:FullyShardedMixedPrecision",
    strategies=("fsdp", "fsdp_cpu_offload", "fsdp_hybrid", "context_parallel"),
    options_type="fabric_backends.options.precisions:MixedOptions",
    description="float32 shards, gathered and computed with in half precision",
)
"""Likewise, what `FullyShardedMixedPrecision` is."""

TORCHELASTIC = ClusterEnvironmentSpec(
    "torchelastic",
    "fabric_backends.environments.torchelastic:TorchElasticEnvironment",
    detect="fabric_backends.environments.torchelastic:detect",
    aliases=("torchrun",),
    priority=90,
    options_type=NoOptions,
    description="processes started by torchrun",
)
RAY = ClusterEnvironmentSpec(
    "ray",
    "fabric_backends.environments.ray:RayEnvironment",
    detect="fabric_backends.environments.ray:detect",
    priority=80,
    options_type=NoOptions,
    description="workers of Ray Train, or actors of Ray with ranks",
)
LSF = ClusterEnvironmentSpec(
    "lsf",
    "fabric_backends.environments.lsf:LSFEnvironment",
    detect="fabric_backends.environments.lsf:detect",
    priority=70,
    options_type=NoOptions,
    description="processes started by jsrun in a job of LSF",
)
MPI = ClusterEnvironmentSpec(
    "mpi",
    "fabric_backends.environments.mpi:MPIEnvironment",
    detect="fabric_backends.environments.mpi:detect",
    priority=60,
    options_type=NoOptions,
    description="processes started by mpirun or mpiexec",
)
SLURM = ClusterEnvironmentSpec(
    "slurm",
    "fabric_backends.environments.slurm:SlurmEnvironment",
    detect="fabric_backends.environments.slurm_tasks:detect",
    priority=50,
    options_type="fabric_backends.options.environments:SlurmOptions",
    description="tasks started by srun in a job of SLURM",
)
KUBEFLOW = ClusterEnvironmentSpec(
    "kubeflow",
    "fabric_backends.environments.kubeflow:KubeflowEnvironment",
    detect="fabric_backends.environments.kubeflow:detect",
    aliases=("pytorchjob",),
    priority=40,
    options_type=NoOptions,
    description="pods of a PyTorchJob of Kubeflow",
)
KUBERNETES_JOB = ClusterEnvironmentSpec(
    "kubernetes_job",
    "fabric_backends.environments.kubernetes_job:KubernetesJobEnvironment",
    detect="fabric_backends.environments.kubernetes_job:detect",
    priority=30,
    options_type=NoOptions,
    description="pods of an indexed Job of Kubernetes",
)
SCRIPT = LauncherSpec(
    "script",
    "fabric_backends.launchers.script:ScriptLauncher",
    options_type=NoOptions,
    description="starts the running script again, once per process",
)
SPAWN = LauncherSpec(
    "spawn",
    "fabric_backends.launchers.function:SpawnLauncher",
    needs_function=True,
    options_type=NoOptions,
    description="runs a function in fresh processes",
)
FORK = LauncherSpec(
    "fork",
    "fabric_backends.launchers.function:ForkLauncher",
    interactive=True,
    needs_function=True,
    options_type=NoOptions,
    description="runs a function in forked processes; works in notebooks",
)
CSV = LoggerSpec(
    "csv",
    "fabric_backends.loggers.csv:CSVLogger",
    options_type="fabric_backends.options.loggers:CSVOptions",
    description="one CSV file per run",
)
TENSORBOARD = LoggerSpec(
    "tensorboard",
    "fabric_backends.loggers.tensorboard:TensorBoardLogger",
    requires=("tensorboard",),
    options_type="fabric_backends.options.loggers:TensorBoardOptions",
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
    yield DP
    yield from DDP_SHARDED_PRESETS
    yield LOCAL_SGD
    yield TENSOR_PARALLEL
    yield CONTEXT_PARALLEL
    yield FSDP
    yield replace(
        FSDP,
        name="fsdp_cpu_offload",
        options={"cpu_offload": True},
        description="fsdp that keeps its shards in the memory of the CPU",
    )
    yield replace(
        FSDP,
        name="fsdp_hybrid",
        options={"shard_size": "node"},
        description="fsdp that shards within a node, and keeps a replica on each",
    )


@hookimpl
def fabric_check_plan(plan: Plan) -> str | None:
    """One process cannot drive the devices of several nodes."""
    if plan.strategy.spec.target == DP.target and plan.num_nodes > 1:
        return (
            f"The strategy {DP.name!r} is one process that drives the devices of its own node, and {plan.num_nodes} "
            f"nodes were asked for. Use strategy={DDP.name!r}."
        )
    return None


@hookimpl
def fabric_precisions() -> Iterator[PrecisionSpec]:
    """Double, true half and mixed precision."""
    for base, dtype, name, aliases, description in (
        (TRUE, "float64", "64-true", ("64",), "float64 everywhere"),
        (TRUE, "float16", "16-true", (), "float16 everywhere, unscaled"),
        (TRUE, "bfloat16", "bf16-true", (), "bfloat16 everywhere"),
        (MIXED, "float16", "16-mixed", ("16",), "float32 weights, float16 computation, scaled losses"),
        (
            SHARDED_MIXED,
            "float16",
            "16-mixed",
            ("16",),
            "the same, where a rank has only some of the gradients",
        ),
        (MIXED, "bfloat16", "bf16-mixed", ("bf16",), "float32 weights, bfloat16 computation"),
        (FSDP_MIXED, "float16", "16-mixed", ("16",), "float32 shards, float16 computation, scaled losses"),
        (FSDP_MIXED, "bfloat16", "bf16-mixed", ("bf16",), "float32 shards, bfloat16 computation"),
    ):
        yield replace(base, name=name, aliases=aliases, options={"dtype": dtype}, description=description)


@hookimpl
def fabric_cluster_environments() -> Iterator[ClusterEnvironmentSpec]:
    """Jobs that others start: the nearest to the process comes first, since schedulers start launchers in turn."""
    yield TORCHELASTIC
    yield RAY
    yield LSF
    yield MPI
    yield SLURM
    yield KUBEFLOW
    yield KUBERNETES_JOB


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
