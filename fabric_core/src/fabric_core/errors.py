"""Every error that the library raises on purpose, as one tree.

    FabricError
    ├── ConfigurationError (ValueError)         what was asked for makes no sense, or cannot be had
    │   ├── UnknownPluginError                  no installed part has this name
    │   ├── AmbiguousPluginError                two distributions offer this name
    │   ├── OptionsError                        a part was given options that it does not know
    │   ├── DevicesError                        the devices asked for are malformed or not there
    │   └── UnsupportedError                    the parts exist but cannot work together
    ├── PluginError (RuntimeError)              an installed plugin is at fault
    │   ├── BrokenPluginError                   it raised while it was imported or asked for its parts
    │   ├── MissingRequirementError             it needs a package that is not installed
    │   └── ContractVersionError                it was written for another version of the contract
    ├── LaunchError (RuntimeError)              processes could not be started
    │   └── RankFailedError                     a process was started and failed; carries its traceback
    ├── PlanMismatchError (RuntimeError)        the ranks of one job decided differently
    ├── SetupError (RuntimeError)               the verbs were called in an order that cannot work
    ├── WrongTypeError (TypeError)              an argument is of a kind that the verb cannot take
    └── CheckpointError (RuntimeError)          a checkpoint cannot be written or read
        ├── UnsafeCheckpointError               reading it would execute code, or asks for unknown types
        └── CheckpointKeyError (KeyError)       it lacks what was asked of it

Each is also the built-in exception in parentheses, so that code which catches the built-in keeps working.
Each message says what was asked, why it cannot be, what there is, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
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
    "did_you_mean",
    "listing",
    "unknown_option",
]


class FabricError(Exception):
    """The base of every error that the library raises on purpose."""


class ConfigurationError(FabricError, ValueError):
    """What was asked for makes no sense, or cannot be had here."""


class UnknownPluginError(ConfigurationError):
    """No installed part has the name that was asked for."""


class AmbiguousPluginError(ConfigurationError):
    """Two distributions offer a part of the name that was asked for."""


class OptionsError(ConfigurationError):
    """A part was given options that it does not know, or values that it refuses."""


class DevicesError(ConfigurationError):
    """The devices that were asked for are malformed, or are not there."""


class UnsupportedError(ConfigurationError):
    """The parts that were asked for exist, but cannot work together."""


class PluginError(FabricError, RuntimeError):
    """An installed plugin is at fault."""


class BrokenPluginError(PluginError):
    """A plugin raised while it was imported or while it was asked for its parts."""


class MissingRequirementError(PluginError):
    """A part needs a package that is not installed, or not in a fitting version."""


class ContractVersionError(PluginError):
    """A part was written for a version of its contract that this core does not speak."""


class LaunchError(FabricError, RuntimeError):
    """The processes of a job could not be started."""


class RankFailedError(LaunchError):
    """A process of the job was started and failed.

    Attributes:
        rank: The global rank of the process that failed first.
        exit_code: Its exit code; 128 + N when signal N ended it.
    """

    def __init__(self, message: str, *, rank: int, exit_code: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.exit_code = exit_code


class PlanMismatchError(FabricError, RuntimeError):
    """The ranks of one job resolved the same flags to different parts, versions or sizes."""


class SetupError(FabricError, RuntimeError):
    """The verbs of a ``Fabric`` were called in an order that cannot work."""


class WrongTypeError(FabricError, TypeError):
    """An argument is of a kind that the verb cannot take."""


class CheckpointError(FabricError, RuntimeError):
    """A checkpoint cannot be written or read."""


class UnsafeCheckpointError(CheckpointError):
    """Reading the checkpoint would execute code or needs types that were not allowed."""


class CheckpointKeyError(CheckpointError, KeyError):
    """The checkpoint lacks a key that was asked of it."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes, with its line breaks escaped


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """A sentence that suggests the nearest of the known names, or nothing when none is near.

    Args:
        name: What was asked for.
        known: What there is.
        cutoff: How alike they have to be, from 0 to 1.

    Example:
        >>> did_you_mean("cpy", ["cpu", "spam"])
        " Did you mean 'cpu'?"
    """
    from difflib import get_close_matches  # rarely needed, and ten modules

    near = get_close_matches(str(name).lower(), list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown_option(owner: str, name: object, known: Iterable[str], source: str = "") -> OptionsError:
    """The error for an option that a part does not have.

    Args:
        owner: Whose option it would be, as the beginning of a sentence (``"The strategy 'x'"``).
        name: What was asked for.
        known: The options that there are.
        source: Who asked for it, where that is not plain.
    """
    names = list(known)
    by = f", which {source} states" if source else ""
    return OptionsError(
        f"{owner} has no option {name!r}{by}.{did_you_mean(str(name), names)} It has: {listing(names)}."
    )


def listing(names: Iterable[str]) -> str:
    """Names in a sentence: sorted, separated by commas, ``none`` when there are none."""
    return ", ".join(sorted(names)) or "none"
