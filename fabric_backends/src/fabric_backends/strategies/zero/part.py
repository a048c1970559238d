"""What of an optimizer belongs to this rank.

[Note: stepped in parts] FairScale's OSS and PyTorch's ZeroRedundancyOptimizer decide which rank steps which parameter,
have a local optimizer step those of this rank, and send the results to the other ranks. They want to make the local
optimizer themselves, from a class and its arguments. But the user has an optimizer already, with groups that they or
a scheduler edit, hooks, attributes of its own. So the engines are given the bare parameters, and a `Part` for a local
optimizer. When it is asked to step, the user's own optimizer steps, its groups narrowed to the part for that moment.
So it is always the user's object that they see and that computes; its ``state`` is that of the part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fabric_core.errors import SetupError, UnsupportedError

MakeEngine = Callable[[list[dict[str, Any]], Callable[..., Any]], Any]
"""Makes an engine of groups of parameters and of what stands for the class of the local optimizer."""


class Part:
    """The part of one optimizer that this rank steps. To the engine, it looks like its local optimizer.

    Args:
        optimizer: The user's. State that it has already for parameters of other ranks is dropped.
        make: Makes the engine.
        grows: Whether the engine takes groups that are added later.

    Attributes:
        engine: Knows who steps what, and sends the results around.
        param_groups: For each of the optimizer's groups, the parameters of this rank.

    Raises:
        UnsupportedError: The optimizer cannot be stepped in parts.
    """

    def __init__(self, optimizer: Optimizer, make: MakeEngine, *, grows: bool) -> None:
        check(optimizer)
        self.param_groups: list[dict[str, Any]] = []
        self._grows = grows
        self._narrowed_step: Callable[..., Any] | None = None
        self.engine = make(
            [{"params": list(g["params"])} for g in optimizer.param_groups], self._become_local
        )
        own = self.ids()
        for key in [key for key in optimizer.state if isinstance(key, Tensor) and id(key) not in own]:
            del optimizer.state[key]

    def parameters(self) -> Iterator[Tensor]:
        """Those of this rank."""
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def ids(self) -> set[int]:
        """Theirs. The engine keeps the parameters, so they stay theirs."""
        return set(map(id, self.parameters()))

    # -- the step -------------------------------------------------------------------------------------------------

    def take_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None = None
    ) -> Any:
        """Step the part of this rank, and learn the parameters of all others. Called on every rank.

        Args:
            optimizer: The user's.
            step: Its own ``step``.
            closure: For ``step``.
        """
        self._follow(optimizer)

        def narrowed(closure: Callable[[], Any] | None = None) -> Any:
            with self._narrowed(optimizer):
                return step() if closure is None else step(closure)

        self._narrowed_step = narrowed
        try:
            return self.engine.step() if closure is None else self.engine.step(closure)
        finally:
            self._narrowed_step = None

    @contextmanager
    def _narrowed(self, optimizer: Optimizer) -> Iterator[None]:
        groups = optimizer.param_groups
        whole = [group["params"] for group in groups]
        for group, own in zip(groups, self.param_groups, strict=True):
            group["params"] = own["params"]
        try:
            yield
        finally:
            for group, parameters in zip(groups, whole, strict=True):
                group["params"] = parameters

    def _follow(self, optimizer: Optimizer) -> None:
        """Take up groups that the user has added since."""
        added = optimizer.param_groups[len(self.param_groups) :]
        if added and not self._grows:
            raise SetupError(
                f"A group of parameters was added to the {type(optimizer).__name__} after fabric.setup, but FairScale "
                "averages the gradients of those only that it was set up with. Add the group before, or use "
                "strategy='ddp_sharded' with the option engine='torch'."
            )
        for group in added:
            self.engine.add_param_group({"params": list(group["params"])})

    # -- what the engine sees -------------------------------------------------------------------------------------

    def _become_local(self, param_groups: list[dict[str, Any]], **_: Any) -> Part:
        self.param_groups = param_groups
        return self

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Called by the engine."""
        if self._narrowed_step is None:
            raise SetupError(
                "An engine stepped by itself. Call step() of the optimizer that setup() returned."
            )
        return self._narrowed_step(closure)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Called by the engine, with the parameters of this rank."""
        self.param_groups.append(param_group)

    def release(self) -> None:
        """Forget the engine, and with it the process group: the two know each other, so neither is freed by itself."""
        self.engine = None

    # -- state ----------------------------------------------------------------------------------------------------

    def own_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """What of the state of a whole optimizer belongs to this rank.

        Args:
            optimizer: The user's.
            state: As ``torch.optim.Optimizer.state_dict`` gives it.
        """
        saved = chain.from_iterable(group["params"] for group in state["param_groups"])
        present = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        own = self.ids()
        foreign = {key for key, parameter in zip(saved, present, strict=False) if id(parameter) not in own}
        kept = {key: value for key, value in state["state"].items() if key not in foreign}
        return {**state, "state": kept}


def check(optimizer: Optimizer) -> None:
    """Refuse what cannot be stepped in parts.

    Raises:
        UnsupportedError: A step needs the gradients of all parameters at once, or parameters differ in dtype.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            f"The {name} cannot be sharded: its step needs the gradients of all parameters at once. Use strategy='ddp'."
        )
    dtypes = {str(p.dtype).removeprefix("torch.") for g in optimizer.param_groups for p in g["params"]}
    if len(dtypes) > 1:
        raise UnsupportedError(
            f"The {name} cannot be sharded: its parameters have several dtypes ({', '.join(sorted(dtypes))}), and they "
            "are sent together. Make an optimizer for each dtype."
        )
