"""What this distribution offers. Data only."""

from collections.abc import Iterator

from fabric_core import AcceleratorSpec, Plan, hookimpl

CPUACCEL = AcceleratorSpec(
    "cpuaccel",
    "fabric_cpuaccel.accelerator:CPUAccel",
    probe="fabric_cpuaccel.probe:probe",
    priority=1000,
    groups=("gpu",),
    strategies={"many": "ddp", "many_nodes": "ddp", "notebook": "ddp_notebook"},
    description="devices that CPUACCEL_DEVICES=2 makes of the CPU",
)
SHARDED = ("fsdp", "fsdp_cpu_offload", "fsdp_hybrid", "context_parallel", "tensor_parallel")
REFUSED = (*SHARDED, "dp", "ddp_spawn", "ddp_sharded_spawn")


@hookimpl
def fabric_accelerators() -> Iterator[AcceleratorSpec]:
    """The simulated device."""
    yield CPUACCEL


@hookimpl
def fabric_check_plan(plan: Plan) -> str | None:
    """Say at once what would fail in PyTorch."""
    if plan.accelerator.spec == CPUACCEL and plan.strategy.name in REFUSED:
        return f"{plan.strategy.name!r} needs a device that is built into PyTorch. Use strategy='ddp'."
    return None
