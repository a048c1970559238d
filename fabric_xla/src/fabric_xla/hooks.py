"""What this distribution offers. Data only: nothing here imports PyTorch, torch_xla or an implementation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from fabric_core import (
    AcceleratorSpec,
    CheckpointIOSpec,
    ClusterEnvironmentSpec,
    LauncherSpec,
    NoOptions,
    PrecisionSpec,
    StrategySpec,
    hookimpl,
)

if TYPE_CHECKING:
    from fabric_core import Plan

REQUIRES = ("torch_xla[tpu]>=2.7",)
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")

TPU = AcceleratorSpec(
    "tpu",
    "fabric_xla.accelerator:XLAAccelerator",
    probe="fabric_xla.probes:devices",
    priority=50,
    groups=("xla",),
    strategies={"one": "xla", "many": "xla", "many_nodes": "xla", "notebook": "xla"},
    requires=REQUIRES,
    options_type=NoOptions,
    description="a TPU, or the CPU through XLA where PJRT_DEVICE=CPU",
)
XLA = StrategySpec(
    "xla",
    "fabric_xla.strategies.xla:XLAStrategy",
    aliases=("tpu_spawn",),
    supports=("tpu",),
    precisions=PRECISIONS,
    launcher="xla_fork",
    requires=REQUIRES,
    options_type="fabric_xla.options:XLAOptions",
    description="one process per XLA device; gradients are averaged when the optimizer steps",
)
SINGLE_XLA = replace(
    XLA,
    name="single_xla",
    aliases=("single_tpu",),
    max_devices=1,
    launcher=None,
    description="xla on one device",
)
XLA_FSDP = StrategySpec(
    "xla_fsdp",
    "fabric_xla.strategies.xla_fsdp:XLAFSDPStrategy",
    supports=("tpu",),
    precisions=("32-true", "bf16-mixed"),
    launcher="xla_fork",
    requires=REQUIRES,
    options_type="fabric_xla.options:XLAFSDPOptions",
    description="one process per XLA device; parameters, gradients and optimizer state are sharded",
)
XLA_SPMD = StrategySpec(
    "xla_spmd",
    "fabric_xla.strategies.xla_spmd:XLASPMDStrategy",
    supports=("tpu",),
    precisions=PRECISIONS,
    processes="single",
    requires=REQUIRES,
    options_type="fabric_xla.options:XLASPMDOptions",
    description="one program over a mesh of XLA devices; data, fully sharded and tensor parallel",
)
XLA_SPMD_FSDP = replace(
    XLA_SPMD,
    name="xla_spmd_fsdp",
    options={"mesh_shape": {"fsdp": -1}},
    description="xla_spmd, with parameters, gradients and optimizer state sharded over all devices",
)
STRATEGIES = (XLA, SINGLE_XLA, XLA_FSDP, XLA_SPMD, XLA_SPMD_FSDP)

FULL = PrecisionSpec(
    "32-true",
    "fabric_xla.precisions.full:XLAFullPrecision",
    aliases=("32",),
    strategies=tuple(spec.name for spec in STRATEGIES),
    requires=REQUIRES,
    options_type="fabric_xla.options:FullOptions",
    description="float32 everywhere",
)
TRUE = PrecisionSpec(
    "xla_true",
    "fabric_xla.precisions.true:XLATruePrecision",
    strategies=tuple(spec.name for spec in STRATEGIES if "bf16-true" in spec.precisions),
    requires=REQUIRES,
    options_type="fabric_xla.options:TrueOptions",
    description="one half precision everywhere",
)
"""What `XLATruePrecision` is when it is passed in code. On offer are the presets of it, one per dtype."""

MIXED = PrecisionSpec(
    "bf16-mixed",
    "fabric_xla.precisions.mixed:XLAMixedPrecision",
    aliases=("bf16",),
    strategies=FULL.strategies,
    requires=REQUIRES,
    options_type=NoOptions,
    description="float32 weights, bfloat16 computation",
)
ENVIRONMENT = ClusterEnvironmentSpec(
    "xla",
    "fabric_xla.environment:XLAEnvironment",
    detect="fabric_xla.probes:detect",
    priority=80,
    requires=REQUIRES,
    options_type=NoOptions,
    description="processes started by torch_xla.launch",
)
FORK = LauncherSpec(
    "xla_fork",
    "fabric_xla.launcher:XLAForkLauncher",
    interactive=True,
    needs_function=True,
    requires=REQUIRES,
    options_type=NoOptions,
    description="runs a function in a forked process per XLA device; works in notebooks",
)
SPAWN = LauncherSpec(
    "xla_spawn",
    "fabric_xla.launcher:XLASpawnLauncher",
    needs_function=True,
    requires=REQUIRES,
    options_type=NoOptions,
    description="runs a function in a fresh process per XLA device",
)
FILE = CheckpointIOSpec(
    "xla_file",
    "fabric_xla.checkpoint_io:XLAFile",
    requires=REQUIRES,
    options_type=NoOptions,
    description="one file that torch.load reads anywhere, also without torch_xla",
)


@hookimpl
def fabric_accelerators() -> Iterator[AcceleratorSpec]:
    """What torch_xla computes on."""
    yield TPU


@hookimpl
def fabric_strategies() -> Iterator[StrategySpec]:
    """A process per device, or one program over all of them."""
    yield from STRATEGIES


@hookimpl
def fabric_precisions() -> Iterator[PrecisionSpec]:
    """The precisions of these strategies, under the names that they have everywhere."""
    yield FULL
    yield MIXED
    for dtype, name in (("bfloat16", "bf16-true"), ("float16", "16-true")):
        yield replace(TRUE, name=name, options={"dtype": dtype}, description=f"{dtype} everywhere")


@hookimpl
def fabric_cluster_environments() -> Iterator[ClusterEnvironmentSpec]:
    """Jobs that torch_xla has started."""
    yield ENVIRONMENT


@hookimpl
def fabric_launchers() -> Iterator[LauncherSpec]:
    """torch_xla.launch, by either way to start a process."""
    yield FORK
    yield SPAWN


@hookimpl
def fabric_checkpoint_ios() -> Iterator[CheckpointIOSpec]:
    """Files without a trace of XLA."""
    yield FILE


@hookimpl
def fabric_check_plan(plan: Plan) -> str | None:
    """Say why parts that know each other cannot work here after all."""
    from fabric_xla.rules import objection

    return objection(plan, TPU, STRATEGIES)
