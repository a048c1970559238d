"""The reference parts of the core, registered through the same door as everybody else's."""

from __future__ import annotations

from collections.abc import Iterator

from fabric_core.hookspecs import hookimpl
from fabric_core.specs import (
    AcceleratorSpec,
    CheckpointIOSpec,
    ClusterEnvironmentSpec,
    NoOptions,
    PrecisionSpec,
    StrategySpec,
)

CPU = AcceleratorSpec(
    "cpu",
    "fabric_core.parts.cpu:CPUAccelerator",
    probe="fabric_core.parts.cpu:probe",
    priority=-100,
    forkable=True,
    options_type=NoOptions,
    description="the CPU; a device is a process",
)
SINGLE_DEVICE = StrategySpec(
    "single_device",
    "fabric_core.parts.single_device:SingleDeviceStrategy",
    supports=("*",),
    volunteers_for=("one",),
    max_devices=1,
    options_type=NoOptions,
    description="one process on one device",
)
FULL_PRECISION = PrecisionSpec(
    "32-true",
    "fabric_core.parts.full_precision:FullPrecision",
    aliases=("32",),
    options_type=NoOptions,
    description="float32 everywhere",
)
LOCAL = ClusterEnvironmentSpec(
    "local",
    "fabric_core.parts.local:LocalEnvironment",
    detect="fabric_core.parts.local:detect",
    priority=100,
    options_type=NoOptions,
    description="processes started by fabric run or a launcher, or this one alone",
)
TORCH_FILE = CheckpointIOSpec(
    "torch_file",
    "fabric_core.parts.torch_file:TorchFile",
    options_type=NoOptions,
    description="one file that torch.load reads too",
)


@hookimpl
def fabric_accelerators() -> Iterator[AcceleratorSpec]:
    """The CPU."""
    yield CPU


@hookimpl
def fabric_strategies() -> Iterator[StrategySpec]:
    """One process on one device."""
    yield SINGLE_DEVICE


@hookimpl
def fabric_precisions() -> Iterator[PrecisionSpec]:
    """Plain float32."""
    yield FULL_PRECISION


@hookimpl
def fabric_cluster_environments() -> Iterator[ClusterEnvironmentSpec]:
    """This machine."""
    yield LOCAL


@hookimpl
def fabric_checkpoint_ios() -> Iterator[CheckpointIOSpec]:
    """One file, as torch.save writes it."""
    yield TORCH_FILE
