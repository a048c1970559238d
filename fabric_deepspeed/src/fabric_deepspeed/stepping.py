"""One optimizer for DeepSpeed in which the user's own step: any number of them, on tensors of the engine's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fabric_core.errors import SetupError, UnsupportedError

Change = Callable[[Tensor], Any]
"""Changes a piece of a gradient in place."""


class Joined(Optimizer):
    """What DeepSpeed gets: groups of its own, which it may point at whatever tensors it likes.

    [Note: the user's optimizer stays whole] DeepSpeed replaces the parameters in the groups of an optimizer by flat
    pieces. Those are groups of `Joined`. The user's optimizer keeps its groups, with the user's parameters in them;
    when it steps, it is lent the flat ones for as long, with the hyperparameters that its own have at that moment. So
    what schedulers and users write there takes effect, hooks run, and it is an instance of the class that it was.

    Attributes:
        optimizers: The user's.
        ready: Whether it steps. While an engine is made, DeepSpeed would step with gradients of zero to see the state.
    """

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers
        self.ready = False
        self._pairs: list[tuple[Optimizer, int, dict[str, Any]]] = []
        self._changes: dict[int, list[tuple[int, int, Change]]] = {}
        groups = []
        for optimizer in optimizers:
            check_steps_at_once(optimizer)
            for own in optimizer.param_groups:
                theirs = {**own, "params": [p for p in own["params"] if p.requires_grad]}
                groups.append(theirs)
        try:
            super().__init__(groups, {})
        except ValueError as error:
            raise SetupError(
                f"The optimizers of one model share a parameter, which DeepSpeed keeps once ({error}). Give each "
                "parameter to one optimizer."
            ) from error
        # By number, because an optimizer that loads a state dict gets new groups.
        owners = [
            (optimizer, number) for optimizer in optimizers for number in range(len(optimizer.param_groups))
        ]
        for (optimizer, number), theirs in zip(owners, self.param_groups, strict=True):
            self._pairs.append((optimizer, number, theirs))
        self.state = defaultdict(dict)

    def change(self, flat: Tensor, start: int, length: int, change: Change) -> None:
        """Have a piece of a gradient changed in the next step, when it is in float32 and of its true size."""
        self._changes.setdefault(id(flat), []).append((start, length, change))

    def forget_changes(self) -> None:
        """The gradients are gone."""
        self._changes.clear()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step those whose groups have tensors now. Called by DeepSpeed, once per group, or once for all."""
        if not self.ready:
            return
        present = {id(group): group for group in self.param_groups if group["params"]}
        for group in present.values():
            for flat in group["params"]:
                self._apply_changes(flat)
        for optimizer in self.optimizers:
            lent = [
                (optimizer.param_groups[number], theirs)
                for owner, number, theirs in self._pairs
                if owner is optimizer and id(theirs) in present
            ]
            if lent:
                with self._lending(optimizer, lent):
                    optimizer.step()

    def _apply_changes(self, flat: Tensor) -> None:
        gradient = flat.grad
        if gradient is None:
            return
        for start, length, change in self._changes.get(id(flat), ()):
            with torch.no_grad():
                change(gradient.view(-1).narrow(0, start, length))

    @contextmanager
    def _lending(
        self, optimizer: Optimizer, lent: list[tuple[dict[str, Any], dict[str, Any]]]
    ) -> Iterator[None]:
        groups, state = optimizer.param_groups, optimizer.state
        for own, theirs in lent:
            theirs.update({name: value for name, value in own.items() if name != "params"})
        optimizer.param_groups, optimizer.state = [theirs for _, theirs in lent], self.state
        try:
            yield
        finally:
            optimizer.param_groups, optimizer.state = groups, state
        for own, theirs in lent:
            own.update({name: value for name, value in theirs.items() if name != "params"})


def check_steps_at_once(optimizer: Optimizer) -> None:
    """Refuse an optimizer that computes the loss by itself.

    Raises:
        UnsupportedError: It needs a closure.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "LBFGS computes the loss several times in one step, which DeepSpeed's engine cannot do. Use another "
            "optimizer, or strategy='ddp'."
        )
