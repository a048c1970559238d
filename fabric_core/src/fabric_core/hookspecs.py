"""The hooks that a plugin may implement, and the markers that declare them.

A plugin is one cheap module per distribution, named by an entry point of the group ``fabric_core.plugins``. It yields
specs and imports neither PyTorch nor its own implementation. There is no hook per training step: what runs per step
is a direct method call on the chosen part.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from fabric_core.plan import Plan
    from fabric_core.specs import (
        AcceleratorSpec,
        CheckpointIOSpec,
        ClusterEnvironmentSpec,
        CommandSpec,
        LauncherSpec,
        LoggerSpec,
        PrecisionSpec,
        StrategySpec,
    )

__all__ = ["hookimpl"]

PROJECT = "fabric_core"
ENTRY_POINT_GROUP = "fabric_core.plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Decorator of the functions of a hooks module by which a plugin says what it offers."""


@hookspec
def fabric_accelerators() -> Iterable[AcceleratorSpec]:  # type: ignore[empty-body]
    """The accelerators of this plugin. Called once per process, when names are first looked up."""


@hookspec
def fabric_strategies() -> Iterable[StrategySpec]:  # type: ignore[empty-body]
    """The strategies of this plugin. Called once per process, when names are first looked up."""


@hookspec
def fabric_precisions() -> Iterable[PrecisionSpec]:  # type: ignore[empty-body]
    """The precisions of this plugin. Called once per process, when names are first looked up."""


@hookspec
def fabric_cluster_environments() -> Iterable[ClusterEnvironmentSpec]:  # type: ignore[empty-body]
    """The cluster environments of this plugin. Called once per process, when names are first looked up."""


@hookspec
def fabric_launchers() -> Iterable[LauncherSpec]:  # type: ignore[empty-body]
    """The launchers of this plugin. Called once per process, when names are first looked up."""


@hookspec
def fabric_checkpoint_ios() -> Iterable[CheckpointIOSpec]:  # type: ignore[empty-body]
    """The checkpoint formats of this plugin. Called once per process, when names are first looked up."""


@hookspec
def fabric_loggers() -> Iterable[LoggerSpec]:  # type: ignore[empty-body]
    """The loggers of this plugin. Called once per process, when names are first looked up."""


@hookspec
def fabric_cli_commands() -> Iterable[CommandSpec]:  # type: ignore[empty-body]
    """The commands that this plugin adds to ``fabric``. Called once, when the command line is built."""


@hookspec
def fabric_check_plan(plan: Plan) -> str | None:
    """Veto a plan. Called once per resolved plan, after every part was chosen and before any is imported.

    Args:
        plan: What was decided, before any part is imported.

    Returns:
        One sentence that says why this plan cannot work, or ``None`` to let it pass.
    """
    return None


PART_HOOKS: tuple[str, ...] = (
    "fabric_accelerators",
    "fabric_strategies",
    "fabric_precisions",
    "fabric_cluster_environments",
    "fabric_launchers",
    "fabric_checkpoint_ios",
    "fabric_loggers",
    "fabric_cli_commands",
)
"""The hooks that yield specs; each yields specs of one type."""

OWN_COMMANDS: tuple[str, ...] = ("run", "explain", "plugins", "consolidate", "shard", "doctor")
"""The words after ``fabric`` that no distribution can take."""
