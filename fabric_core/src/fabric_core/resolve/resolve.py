"""The resolver: one choice after the other, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from fabric_core.errors import ConfigurationError, DevicesError, UnsupportedError
from fabric_core.plan import AUTO, Choice, Plan, Request
from fabric_core.registry import OWN_DISTRIBUTION, Registry
from fabric_core.resolve.asked import asked_choice, check_usable, logger_choice, sort_plugins
from fabric_core.resolve.devices import choose as choose_devices
from fabric_core.resolve.hardware import choose_accelerator, choose_environment
from fabric_core.resolve.options import lay_options, unused_tables
from fabric_core.resolve.precisions import check_precision, choose_precision
from fabric_core.resolve.strategies import (
    automatic_strategy,
    check_strategy,
    choose_launcher,
    named_strategy,
    situation,
)
from fabric_core.specs import AcceleratorSpec, CheckpointIOSpec, Detection, StrategySpec

REFERENCE_CHECKPOINT_IO = f"torch_file@{OWN_DISTRIBUTION}"


def resolve(request: Request, registry: Registry) -> Plan:
    """Decide every part of a job.

    Args:
        request: What was asked for.
        registry: What is installed.

    Returns:
        The plan. Nothing has been built, and no device touched.

    Raises:
        FabricError: The request makes no sense, or cannot be had; each error says which and why.
    """
    plugins = sort_plugins(request.plugins, registry)
    named = named_strategy(request, registry)
    accelerator, inventory = choose_accelerator(request, registry, _strategy_spec(named))
    environment, detected, warnings = choose_environment(
        plugins.get("cluster environment"), registry, request.environ
    )
    num_nodes = _num_nodes(request, environment, detected)
    device_spec = cast(AcceleratorSpec, accelerator.spec)
    devices, why = choose_devices(
        request.devices,
        inventory,
        accelerator.name,
        started=_started(detected, _strategy_spec(named)),
        own_devices=detected is not None and detected.own_devices,
        most=_most_devices(device_spec, _strategy_spec(named), num_nodes),
    )
    strategy = named or automatic_strategy(
        situation(len(devices), num_nodes, request.interactive and detected is None),
        device_spec,
        len(devices),
        num_nodes,
        registry,
    )
    if detected is None and "cluster environment" not in plugins:
        warnings += _not_joined(request.environ)
    warnings += check_strategy(strategy, device_spec, len(devices), num_nodes)
    per_process = cast(StrategySpec, strategy.spec).processes == "per_device"
    processes = (len(devices) if per_process else 1) * num_nodes
    _check_started(detected, environment, processes // num_nodes, request)
    precision = choose_precision(
        request.precision, plugins.get("precision"), strategy.spec, device_spec, registry
    )
    plan = Plan(
        accelerator=lay_options(accelerator, request),
        strategy=lay_options(strategy, request),
        precision=lay_options(precision, request),
        cluster_environment=lay_options(environment, request),
        checkpoint_io=lay_options(_checkpoint_io(plugins, registry), request),
        launcher=_launcher(plugins, strategy, request, registry, processes, detected),
        loggers=tuple(lay_options(logger_choice(logger, registry), request) for logger in request.loggers),
        devices=devices,
        num_nodes=num_nodes,
        device_reason=why,
        warnings=tuple(warnings),
    )
    check_precision(plan.precision, strategy)
    for choice in plan:
        check_usable(choice)
    more = (*_complaints(plan, registry), *unused_tables(plan, request.tables, registry))
    return replace(plan, warnings=(*plan.warnings, *more)) if more else plan


def _complaints(plan: Plan, registry: Registry) -> tuple[str, ...]:
    """What plugins say of a whole plan that they let pass.

    Raises:
        UnsupportedError: One says that it cannot work.
    """
    vetoes, complaints = registry.check_plan(plan)
    if vetoes:
        told = " ".join(f"{sentence} (says {distribution})" for distribution, sentence in vetoes)
        raise UnsupportedError(f"This plan cannot work: {told}")
    return tuple(complaints)


def _strategy_spec(choice: Choice | None) -> StrategySpec | None:
    return None if choice is None else cast(StrategySpec, choice.spec)


def _started(detected: Detection | None, strategy: StrategySpec | None) -> int | None:
    """How many devices ``"auto"`` means in a job that has been started: one per process, where that is the rule."""
    one_each = strategy is None or strategy.processes == "per_device"
    return detected.processes_per_node if detected and one_each else None


def _most_devices(accelerator: AcceleratorSpec, strategy: StrategySpec | None, num_nodes: int) -> int | None:
    """How many devices per node the named parts can use at most; ``None`` for any number."""
    limits = [accelerator.max_devices]
    if strategy is not None and strategy.max_devices is not None:
        limits.append(max(1, strategy.max_devices // num_nodes))
    return min((limit for limit in limits if limit is not None), default=None)


def _num_nodes(request: Request, environment: Choice, detected: Detection | None) -> int:
    asked, known = request.num_nodes, detected.num_nodes if detected else None
    if asked == AUTO:
        return known or 1
    try:
        num_nodes = int(asked)
    except (TypeError, ValueError):
        num_nodes = 0
    if num_nodes < 1 or isinstance(asked, bool | float):
        raise ConfigurationError(f"num_nodes={asked!r} has to be a whole number from 1, or 'auto'.")
    if known is not None and known != num_nodes:
        raise ConfigurationError(
            f"num_nodes={num_nodes} was asked for, but the cluster environment {environment.name!r} has {known} "
            "node(s). Leave num_nodes out to follow it, or start the job on that many nodes."
        )
    return num_nodes


def _check_started(detected: Detection | None, environment: Choice, wanted: int, request: Request) -> None:
    started = detected.processes_per_node if detected else None
    if started is None or started == wanted:
        return
    advice = f"Start {wanted}, or leave devices out to follow what was started."
    if request.devices == AUTO:
        advice = f"Start {wanted} instead, or choose an accelerator with devices for all."
    raise DevicesError(
        f"devices={request.devices!r} means {wanted} process(es) on this node, but the cluster environment "
        f"{environment.name!r} has started {started}. {advice}"
    )


def _not_joined(environ: Mapping[str, str]) -> list[str]:
    """What to say when the environment speaks of a job that nobody here knows how to join."""
    world_size = environ.get("WORLD_SIZE", "")
    if not (world_size.isascii() and world_size.isdigit() and int(world_size) > 1):
        return []
    sentence = (
        f"WORLD_SIZE={world_size} is set, but no cluster environment recognises the job, so this process does not join "
        "the others. Start them with 'fabric run' or torchrun, name a cluster environment in plugins=[...], or remove "
        "the variable."
    )
    return [sentence]


def _checkpoint_io(plugins: dict[str, Any], registry: Registry) -> Choice:
    asked = plugins.get("checkpoint io")
    if asked is not None:
        return asked_choice(CheckpointIOSpec.kind, asked, registry)
    return replace(
        asked_choice(CheckpointIOSpec.kind, REFERENCE_CHECKPOINT_IO, registry), reason="the default"
    )


def _launcher(
    plugins: dict[str, Any],
    strategy: Choice,
    request: Request,
    registry: Registry,
    processes: int,
    detected: Detection | None,
) -> Choice | None:
    choice = choose_launcher(
        plugins.get("launcher"), strategy, request, registry, processes, started=detected is not None
    )
    return None if choice is None else lay_options(choice, request)
