"""The core of fabric: contracts, registry, resolver and the ``Fabric`` itself.

Every public name is imported when it is first used, so that ``import fabric_core`` stays light and free of PyTorch.

What is public: the names in ``__all__``, here and in the modules below that have one. Those are what authors of parts
need beyond the contracts; all five distributions are held to them. Everything else may change without a word.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fabric_core.contracts.accelerator import Accelerator as Accelerator
    from fabric_core.contracts.checkpoint_io import CheckpointIO as CheckpointIO
    from fabric_core.contracts.cluster_environment import ClusterEnvironment as ClusterEnvironment
    from fabric_core.contracts.launcher import Launcher as Launcher
    from fabric_core.contracts.launcher import LaunchJob as LaunchJob
    from fabric_core.contracts.logger import Logger as Logger
    from fabric_core.contracts.precision import Precision as Precision
    from fabric_core.contracts.store import Store as Store
    from fabric_core.contracts.strategy import ReduceOp as ReduceOp
    from fabric_core.contracts.strategy import Strategy as Strategy
    from fabric_core.contracts.strategy import Surroundings as Surroundings
    from fabric_core.data.seed import seed_everything as seed_everything
    from fabric_core.errors import AmbiguousPluginError as AmbiguousPluginError
    from fabric_core.errors import BrokenPluginError as BrokenPluginError
    from fabric_core.errors import CheckpointError as CheckpointError
    from fabric_core.errors import CheckpointKeyError as CheckpointKeyError
    from fabric_core.errors import ConfigurationError as ConfigurationError
    from fabric_core.errors import ContractVersionError as ContractVersionError
    from fabric_core.errors import DevicesError as DevicesError
    from fabric_core.errors import FabricError as FabricError
    from fabric_core.errors import LaunchError as LaunchError
    from fabric_core.errors import MissingRequirementError as MissingRequirementError
    from fabric_core.errors import OptionsError as OptionsError
    from fabric_core.errors import PlanMismatchError as PlanMismatchError
    from fabric_core.errors import PluginError as PluginError
    from fabric_core.errors import RankFailedError as RankFailedError
    from fabric_core.errors import SetupError as SetupError
    from fabric_core.errors import UnknownPluginError as UnknownPluginError
    from fabric_core.errors import UnsafeCheckpointError as UnsafeCheckpointError
    from fabric_core.errors import UnsupportedError as UnsupportedError
    from fabric_core.errors import WrongTypeError as WrongTypeError
    from fabric_core.fabric import Fabric as Fabric
    from fabric_core.helpers.averaging import ModelAverage as ModelAverage
    from fabric_core.helpers.early_stopping import EarlyStopping as EarlyStopping
    from fabric_core.helpers.metrics import Metrics as Metrics
    from fabric_core.hookspecs import hookimpl as hookimpl
    from fabric_core.plan import Choice as Choice
    from fabric_core.plan import Plan as Plan
    from fabric_core.plan import Request as Request
    from fabric_core.registry import Registry as Registry
    from fabric_core.specs import AcceleratorSpec as AcceleratorSpec
    from fabric_core.specs import CheckpointIOSpec as CheckpointIOSpec
    from fabric_core.specs import ClusterEnvironmentSpec as ClusterEnvironmentSpec
    from fabric_core.specs import CommandSpec as CommandSpec
    from fabric_core.specs import Detection as Detection
    from fabric_core.specs import Inventory as Inventory
    from fabric_core.specs import LauncherSpec as LauncherSpec
    from fabric_core.specs import LoggerSpec as LoggerSpec
    from fabric_core.specs import NoOptions as NoOptions
    from fabric_core.specs import PrecisionSpec as PrecisionSpec
    from fabric_core.specs import StrategySpec as StrategySpec
    from fabric_core.wrappers.face import is_wrapped as is_wrapped
    from fabric_core.wrappers.face import unwrap as unwrap

_HOME = {
    "contracts.accelerator": ("Accelerator",),
    "contracts.checkpoint_io": ("CheckpointIO",),
    "contracts.cluster_environment": ("ClusterEnvironment",),
    "contracts.launcher": ("Launcher", "LaunchJob"),
    "contracts.logger": ("Logger",),
    "contracts.precision": ("Precision",),
    "contracts.store": ("Store",),
    "contracts.strategy": ("ReduceOp", "Strategy", "Surroundings"),
    "data.seed": ("seed_everything",),
    "errors": (
        "AmbiguousPluginError",
        "BrokenPluginError",
        "CheckpointError",
        "CheckpointKeyError",
        "ConfigurationError",
        "ContractVersionError",
        "DevicesError",
        "FabricError",
        "LaunchError",
        "MissingRequirementError",
        "OptionsError",
        "PlanMismatchError",
        "PluginError",
        "RankFailedError",
        "SetupError",
        "UnknownPluginError",
        "UnsafeCheckpointError",
        "UnsupportedError",
        "WrongTypeError",
    ),
    "fabric": ("Fabric",),
    "helpers.averaging": ("ModelAverage",),
    "helpers.early_stopping": ("EarlyStopping",),
    "helpers.metrics": ("Metrics",),
    "hookspecs": ("hookimpl",),
    "plan": ("Choice", "Plan", "Request"),
    "registry": ("Registry",),
    "specs": (
        "AcceleratorSpec",
        "CheckpointIOSpec",
        "ClusterEnvironmentSpec",
        "CommandSpec",
        "Detection",
        "Inventory",
        "LauncherSpec",
        "LoggerSpec",
        "NoOptions",
        "PrecisionSpec",
        "StrategySpec",
    ),
    "wrappers.face": ("is_wrapped", "unwrap"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted([*_MODULE_OF, "__version__"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
