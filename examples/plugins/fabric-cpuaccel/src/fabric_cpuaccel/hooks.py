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
REFUSED = ("dp", "fsdp", "fsdp_cpu_offload", "fsdp_hybrid", "context_parallel")


@hookimpl
def fabric_accelerators() -> Iterator[AcceleratorSpec]:
    """The simulated device."""
    yield CPUACCEL


@hookimpl
def fabric_check_plan(plan: Plan) -> str | None:
    """Say at once what would fail in the middle of PyTorch."""
    refused = plan.accelerator.spec == CPUACCEL and plan.strategy.name in REFUSED
    return (
        f"{plan.strategy.name!r} needs devices that PyTorch knows from C++. Use 'ddp'." if refused else None
    )
