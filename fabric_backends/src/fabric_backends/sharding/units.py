"""Which modules of a model become units: what is gathered, computed with and dropped together."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fabric_core.errors import OptionsError

Policy = Callable[[nn.Module], bool] | Collection[type[nn.Module]] | Literal["auto"]
"""A function that says of a module whether it is one, the classes of those that are, or ``"auto"``."""

_LARGE = 4
"""With ``"auto"``, a module that has more than one in so many of all parameters is looked into for further units."""


@dataclass(frozen=True)
class UnitPolicy:
    """Chooses the units of a model. The model itself always is one, for what is in no other.

    Attributes:
        policy: See `Policy`.
        min_parameters: With ``"auto"``, how many parameters make a unit; with classes, how many may be in one without
            a warning that none of the classes was found.

    Raises:
        OptionsError: The policy is none of these, or the number is not above 0.
    """

    policy: Policy
    min_parameters: int

    def __post_init__(self) -> None:
        if self.policy != "auto" and not callable(self.policy):
            check_classes("auto_wrap_policy", self.policy, "'auto'")
        if not isinstance(self.min_parameters, int) or self.min_parameters < 1:
            raise OptionsError(
                f"The option min_parameters is {self.min_parameters!r}. It takes a number of parameters, from 1."
            )

    def units_of(self, model: nn.Module) -> list[nn.Module]:
        """The units of a model, inner ones before outer ones, the model last."""
        chosen = set(self._chosen(model)) - {model}
        asked = {module for module in chosen if not is_container(module)}
        units = _without_sharing(model, asked)
        return [module for module in inside_out(model) if module in units or module is model]

    def _chosen(self, model: nn.Module) -> Iterator[nn.Module]:
        policy: Any = self.policy
        if policy == "auto":
            return _large_ones(model, self.min_parameters, _size(model))
        found = list(chosen_by(policy, model))
        if not found and not callable(policy) and _size(model) >= self.min_parameters:
            names = ", ".join(sorted(cls.__name__ for cls in policy))
            warnings.warn(
                f"No module of the {type(model).__name__} is a {names}, so auto_wrap_policy makes one unit of it all, "
                "which is gathered as a whole.",
                UserWarning,
                stacklevel=2,
            )
        return iter(found)


def check_classes(option: str, value: Any, other: str) -> None:
    """Make sure that an option is a collection of module classes.

    Raises:
        OptionsError: It is not.
    """
    right = isinstance(value, Collection) and not isinstance(value, str)
    if not right or not all(isinstance(cls, type) and issubclass(cls, nn.Module) for cls in value):
        raise OptionsError(
            f"The option {option} is {value!r}. It takes {other}, a set of module classes, or a function that says of "
            "a module whether it is one."
        )


def chosen_by(policy: Any, model: nn.Module) -> Iterator[nn.Module]:
    """The modules inside of a model that a function, or a collection of classes, chooses."""
    chooses = policy if callable(policy) else lambda module: isinstance(module, tuple(policy))
    return (module for module in model.modules() if module is not model and chooses(module))


def inside_out(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, each after those that are inside of it."""
    return own_modules(model, ())


def is_container(module: nn.Module) -> bool:
    """Whether a module only holds others, and is never called itself."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).forward is nn.Module.forward


def _large_ones(module: nn.Module, least: int, total: int) -> Iterator[nn.Module]:
    for child in module.children():
        size = _size(child)
        if size < least:
            continue
        if is_container(child) or size * _LARGE > total:
            yield from _large_ones(child, least, total)
        yield child


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _without_sharing(model: nn.Module, units: set[nn.Module]) -> set[nn.Module]:
    """Leave out units that share a parameter with another: only one unit can gather it.

    What such units hold falls to the ones around them.
    """
    while True:
        owners: dict[int, set[nn.Module]] = defaultdict(set)
        for unit in {*units, model}:
            for part in own_modules(unit, units):
                for parameter in part.parameters(recurse=False):
                    owners[id(parameter)].add(unit)
        sharing = set[nn.Module]().union(*(some for some in owners.values() if len(some) > 1)) - {model}
        if not sharing:
            return units
        units = units - sharing


def own_modules(unit: nn.Module, units: Collection[nn.Module]) -> list[nn.Module]:
    """The modules of a unit that are in none of the units inside of it; inner ones first, the unit last."""
    found: dict[nn.Module, None] = {}

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if child not in units and child not in found:
                visit(child)
        found[module] = None

    visit(unit)
    return list(found)
