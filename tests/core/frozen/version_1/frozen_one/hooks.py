"""What this distribution offers: a part of every kind."""

from fabric_core import (
    AcceleratorSpec,
    CheckpointIOSpec,
    ClusterEnvironmentSpec,
    CommandSpec,
    LauncherSpec,
    LoggerSpec,
    PrecisionSpec,
    StrategySpec,
    hookimpl,
)


@hookimpl
def fabric_accelerators():
    yield AcceleratorSpec(
        "frozen_device",
        "frozen_one.parts:FrozenDevice",
        probe="frozen_one.light:probe",
        aliases=("frozen_card",),
        priority=-1000,
        groups=("frozen",),
        strategies={"one": "frozen_strategy"},
        max_devices=1,
        requires=("torch>=2.0",),
        api=1,
        description="the CPU by another name",
    )


@hookimpl
def fabric_strategies():
    yield StrategySpec(
        "frozen_strategy",
        "frozen_one.parts:FrozenStrategy",
        options={"patience": 3},
        supports=("frozen_device",),
        rejects=("some_other_device",),
        precisions=("frozen_double",),
        priority=-1,
        processes="per_device",
        max_devices=2,
        launcher="frozen_launcher",
        api=1,
        description="one process, written out in full",
    )


@hookimpl
def fabric_precisions():
    yield PrecisionSpec(
        "frozen_double",
        "frozen_one.parts:FrozenDouble",
        strategies=("frozen_strategy",),
        accelerators=("frozen_device",),
        api=1,
        description="float64, and losses that are scaled",
    )


@hookimpl
def fabric_cluster_environments():
    yield ClusterEnvironmentSpec(
        "frozen_cluster",
        "frozen_one.parts:FrozenCluster",
        detect="frozen_one.light:detect",
        priority=1000,
        api=1,
        description="ranks from FROZEN_*",
    )


@hookimpl
def fabric_launchers():
    yield LauncherSpec(
        "frozen_launcher",
        "frozen_one.parts:FrozenLauncher",
        interactive=True,
        needs_function=True,
        api=1,
        description="a fork",
    )


@hookimpl
def fabric_checkpoint_ios():
    yield CheckpointIOSpec("frozen_file", "frozen_one.parts:FrozenFile", api=1, description="a file")


@hookimpl
def fabric_loggers():
    yield LoggerSpec(
        "frozen_log",
        "frozen_one.parts:FrozenLog",
        options={"path": "frozen.jsonl"},
        options_type="frozen_one.light:LogOptions",
        api=1,
        description="lines of JSON",
    )


@hookimpl
def fabric_cli_commands():
    yield CommandSpec("thaw", "frozen_one.parts:thaw", help="Say that nothing has thawed.")


@hookimpl
def fabric_check_plan(plan):
    if plan.strategy.name == "frozen_strategy" and plan.num_nodes > 1:
        return f"frozen_strategy is for one node, and {plan.num_nodes} were asked for."
    return None
