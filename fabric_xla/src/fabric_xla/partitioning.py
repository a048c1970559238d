"""How tensors lie on a mesh of devices: the shape of the mesh, and rules for parameters."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fabric_core.errors import ConfigurationError, OptionsError, did_you_mean, listing

DATA, FSDP = "data", "fsdp"
BATCH_AXES = (DATA, FSDP)
"""The axes of a mesh between whose devices a batch is divided. Over the second, parameters are divided too."""

PartitionSpec = tuple[Any, ...]
"""For each dimension of a tensor the axis between whose devices it is divided, several in a tuple, or ``None``."""

Rules = Mapping[str, PartitionSpec] | Callable[[str, nn.Parameter], PartitionSpec | None]


def checked_mesh_shape(shape: Any) -> dict[str, int]:
    """The axes of a mesh and their sizes, of which one may be -1: what is left.

    Raises:
        OptionsError: It is something else.
    """
    right = isinstance(shape, Mapping) and shape and all(isinstance(name, str) for name in shape)
    sizes = list(shape.values()) if right else []
    numbers = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    if not (right and numbers and all(size > 0 or size == -1 for size in sizes) and sizes.count(-1) <= 1):
        raise OptionsError(
            f"The option mesh_shape is {shape!r}. It takes names of axes and their sizes, of which one may be -1 for "
            f"what is left, for instance {{'data': 2, 'model': 4}} or {{'fsdp': -1}}. A batch is divided over the axes "
            f"{listing(BATCH_AXES)}, parameters over 'fsdp' and as you say."
        )
    return dict(shape)


def fitted(shape: Mapping[str, int], devices: int) -> dict[str, int]:
    """The sizes of the axes for a number of devices.

    Raises:
        ConfigurationError: They do not make that number.
    """
    known = math.prod(size for size in shape.values() if size != -1)
    left = devices // known
    sizes = {name: left if size == -1 else size for name, size in shape.items()}
    if math.prod(sizes.values()) != devices:
        equation = " * ".join(f"{name}({size})" for name, size in shape.items())
        raise ConfigurationError(
            f"The mesh does not fit the devices: {equation} != {devices}. Change mesh_shape, in which one size may be "
            "-1 for what is left."
        )
    return sizes


def partition_of(rules: Rules | None, name: str, parameter: nn.Parameter) -> PartitionSpec | None:
    """What the rules say of a parameter; the first pattern that fits its name counts."""
    if rules is None:
        return None
    if callable(rules):
        return rules(name, parameter)
    return next((spec for pattern, spec in rules.items() if fnmatch.fnmatchcase(name, pattern)), None)


def check_partition(name: str, parameter: nn.Parameter, spec: Any, axes: Mapping[str, int]) -> None:
    """Refuse what cannot be done with a parameter.

    Raises:
        OptionsError: Not one entry per dimension, or an axis that the mesh does not have.
    """
    if not isinstance(spec, tuple | list) or len(spec) != parameter.dim():
        raise OptionsError(
            f"The partition of {name!r} is {spec!r}. The parameter has the shape {tuple(parameter.shape)}, so it takes "
            f"a tuple of {parameter.dim()} entries: for each dimension the name of an axis, or None."
        )
    named = [axis for entry in spec for axis in (entry if isinstance(entry, tuple) else (entry,))]
    for axis in named:
        if axis is not None and axis not in axes:
            raise OptionsError(
                f"The partition of {name!r} names the axis {axis!r}.{did_you_mean(str(axis), axes)} "
                f"The mesh has: {listing(axes)}."
            )


def check_rules(rules: Any) -> None:
    """Refuse what are no rules.

    Raises:
        OptionsError: Neither a dictionary nor a function.
    """
    if rules is not None and not isinstance(rules, Mapping) and not callable(rules):
        raise OptionsError(
            f"The option partition is {rules!r}. It takes patterns of names and what they are divided over, for "
            "instance {'*.weight': ('model', None)}, or a function of a name and a parameter."
        )
