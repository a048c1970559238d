"""Which plans cannot work although each of their parts exists: what torch_xla and its devices demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from fabric_core import AcceleratorSpec, Plan, StrategySpec
from fabric_xla.probes import computes_on_cpu, devices, devices_per_process


def objection(plan: Plan, own: AcceleratorSpec, strategies: Sequence[StrategySpec]) -> str | None:
    """Why a plan cannot work, and what would.

    Args:
        plan: What was decided.
        own: Our accelerator.
        strategies: Those of ours, for it.

    Returns:
        A sentence or two; ``None`` when nothing speaks against it.
    """
    accelerator, strategy = cast(AcceleratorSpec, plan.accelerator.spec), plan.strategy_spec
    group = {own.name, *own.groups}
    on_xla = bool(group & {*accelerator.names, *accelerator.groups})
    ours = any(spec.name in strategy.names for spec in strategies)
    if ours and not on_xla:
        return (
            f"The strategy {strategy.name!r} computes on XLA devices, and the accelerator is {accelerator.name!r}. Ask "
            f"for accelerator={own.name!r}; on a machine without a TPU, the environment variable PJRT_DEVICE=CPU "
            "makes XLA devices of the CPU."
        )
    if on_xla and not ours and not group & {name.lower() for name in strategy.supports}:
        return (
            f"The strategy {strategy.name!r} does not know XLA devices, on which nothing is computed before a step is "
            f"marked. Strategies that do: {', '.join(spec.name for spec in strategies)}."
        )
    return _of_devices(plan, strategy) if ours and own.name in accelerator.names else None


def _of_devices(plan: Plan, strategy: StrategySpec) -> str | None:
    there, wanted = len(devices().indices), len(plan.devices)
    if strategy.processes == "single":
        if plan.num_nodes > 1:
            return (
                f"The strategy {strategy.name!r} drives the devices of one machine, and num_nodes={plan.num_nodes}. "
                f"Over several machines: 'xla' or 'xla_fsdp'."
            )
        if wanted != there:
            return (
                f"The strategy {strategy.name!r} makes one mesh of all {there} devices, and {wanted} were asked for. "
                "Leave devices out, or set devices=-1."
            )
        return None
    if wanted > 1 and computes_on_cpu():
        return (
            f"With PJRT_DEVICE=CPU, XLA has no collectives between processes, so {strategy.name!r} can use one device "
            f"of it, and {wanted} were asked for. Set devices=1, or use 'xla_spmd', which uses all of them "
            "in one process."
        )
    if wanted > 1 and devices_per_process() > 1:
        return (
            f"Each chip of this TPU is {devices_per_process()} devices, which torch_xla would drive by threads of one "
            f"process; {strategy.name!r} needs a process for each. Use 'xla_spmd', which drives all of them "
            "from one program, or devices=1."
        )
    if wanted > 1 and wanted != there:
        return (
            f"torch_xla starts a process for every one of the {there} devices, or for one; devices={wanted} were asked "
            "for. Ask for all (devices=-1) or for one."
        )
    return None
