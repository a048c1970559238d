"""From a plan to objects: the chosen classes are imported and made, nothing else."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from fabric_core.contract_versions import adapt_instance, adapted
from fabric_core.contracts.accelerator import Accelerator
from fabric_core.contracts.checkpoint_io import CheckpointIO
from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.contracts.launcher import Launcher
from fabric_core.contracts.precision import Precision
from fabric_core.contracts.strategy import Strategy, Surroundings
from fabric_core.errors import BrokenPluginError, FabricError, OptionsError, listing, unknown_option
from fabric_core.manifest import origin_of
from fabric_core.plan import Choice, Late, Plan
from fabric_core.resolve.asked import kind_of_class
from fabric_core.specs import LoggerSpec
from fabric_core.targets import import_target


@dataclass(frozen=True)
class Parts:
    """The objects of a plan, wired together."""

    accelerator: Accelerator
    strategy: Strategy
    precision: Precision
    cluster_environment: ClusterEnvironment
    checkpoint_io: CheckpointIO
    launcher: Launcher | None
    loggers: tuple[Any, ...]


def build(plan: Plan) -> Parts:
    """Make the parts of a plan and show them to each other. No device is touched, nothing is opened.

    Raises:
        BrokenPluginError: A part cannot be imported, or is not what its spec says.
        OptionsError: A part does not take the options that it was given.
    """
    accelerator: Accelerator = make(plan.accelerator)
    strategy: Strategy = make(plan.strategy)
    precision: Precision = make(plan.precision)
    environment: ClusterEnvironment = make(plan.cluster_environment)
    checkpoint_io: CheckpointIO = make(plan.checkpoint_io)
    checkpoint_io.origin = origin_of(plan)
    devices = tuple(accelerator.device(index) for index in plan.devices)
    strategy.attach(
        Surroundings(
            accelerator,
            precision,
            environment,
            checkpoint_io,
            devices,
            plan.processes_per_node,
            plan.num_nodes,
        )
    )
    launcher = None if plan.launcher is None else make(plan.launcher)
    loggers = tuple(make(logger) for logger in plan.loggers)
    return Parts(accelerator, strategy, precision, environment, checkpoint_io, launcher, loggers)


def make(choice: Choice) -> Any:
    """The object of one choice: the one that was passed, or a new one. It keeps the current contract of its kind.

    Raises:
        BrokenPluginError: It cannot be imported, or is not what its spec says.
        OptionsError: It does not take the options that it was given, or not together.
    """
    if choice.instance is not None:
        adapt_instance(choice.instance, choice.kind, choice.spec.api)
        return choice.instance
    cls = import_target(choice.spec.target, f"the {choice.kind} {choice.identity}")
    if not (isinstance(cls, type) and (kind_of_class(cls) == choice.kind or choice.kind == LoggerSpec.kind)):
        raise BrokenPluginError(
            f"The {choice.kind} {choice.identity} points at {choice.spec.target_name!r}, which is no {choice.kind}: "
            f"it does not derive from that contract. This is a fault of {choice.distribution}."
        )
    cls = adapted(cls, choice.kind, choice.spec.api)
    _check_options(cls, choice)
    options = {name: _found(value, name, choice) for name, value in choice.options.items()}
    _check_together(choice, options)
    return cls(**options)


def _found(value: Any, name: str, choice: Choice) -> Any:
    """An option whose text was the path of an object is that object; also within containers."""
    if isinstance(value, Late):
        return import_target(str(value), f"the option {name!r} of the {choice.kind} {choice.name!r}")
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_found(entry, name, choice) for entry in value)
    if type(value) is dict:
        return {key: _found(entry, name, choice) for key, entry in value.items()}
    return value


def _check_together(choice: Choice, options: dict[str, Any]) -> None:
    """Let the dataclass that declares the options say what it thinks of all of them at once."""
    if not options:
        return
    from fabric_core.resolve.declared import REQUIRED, declared_options, options_class

    declared = declared_options(choice.spec)
    if declared is None:
        return
    _check_complete(choice, [option.name for option in declared.values() if option.default is REQUIRED])
    try:
        options_class(choice.spec)(**options)
    except FabricError:
        raise
    except (TypeError, ValueError) as error:
        raise OptionsError(f"The {choice.kind} {choice.name!r} refuses its options: {error}") from error


def _check_options(cls: type, choice: Choice) -> None:
    arguments = _arguments_of(cls, cls.__init__)  # type: ignore[misc]
    if arguments is None:
        return
    known, required = arguments
    for name in choice.options:
        if name not in known:
            raise unknown_option(f"The {choice.kind} {choice.name!r}", name, known)
    _check_complete(choice, required)


@functools.lru_cache(maxsize=256)
def _arguments_of(cls: type, _: object) -> tuple[list[str], list[str]] | None:
    """The names of a class's arguments, and of those without a default; ``None`` when it takes any, or hides them."""
    try:
        parameters = inspect.signature(cls).parameters.values()
    except ValueError:  # a class written in C says nothing of its arguments
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
    return [p.name for p in named], [p.name for p in named if p.default is p.empty]


def _check_complete(choice: Choice, required: list[str]) -> None:
    missing = [name for name in required if name not in choice.options]
    if missing:
        raise OptionsError(f"The {choice.kind} {choice.name!r} needs a value for {listing(missing)}.")
