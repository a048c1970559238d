"""Loss scaling: a ``torch.amp.GradScaler`` that gets along with any order of backward passes and steps.

[Note: true size] A scaler multiplies losses by a scale and divides gradients by it before a step; its ``update``
changes the scale, and belongs after the last step of an iteration and before its next loss. Only the loop knows which
step is the last, and it does not say. So an update waits until another loss is scaled (or an optimizer comes around
again, or the state is saved), however many optimizers have stepped by then. And because some gradients may be waiting
for a step of their own at that moment, of each optimizer it is known whether its gradients are at true size or
multiplied by a scale. One rule then covers every order: before a loss is scaled, all gradients that are there are
brought to the scale that the loss gets. Factors are powers of two unless the user chose others, so this is exact.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from fabric_core.errors import CheckpointKeyError, SetupError, listing


@dataclass(eq=False)
class Gradients:
    """What is known of the gradients of one optimizer.

    Attributes:
        optimizer: Whose they are; not kept alive.
        judges_itself: The optimizer takes ``found_inf`` as a tensor and skips the step on the device, so that the
            host need not wait for the answer (the fused optimizers of PyTorch).
        at_true_size: They are not multiplied by a scale.
        checked: The scaler has looked for infinities in them, and remembers what it found.
        stepped: A step has been taken with them since the last update.
    """

    optimizer: ref[Optimizer]
    judges_itself: bool
    at_true_size: bool = False
    checked: bool = False
    stepped: bool = False


class LossScaling:
    """Scales losses, unscales gradients, skips steps; see [Note: true size].

    Args:
        scaler: An enabled scaler. Its ``step`` is not called, because it would call the optimizer's own.
    """

    def __init__(self, scaler: GradScaler) -> None:
        self.scaler = scaler
        self._known: list[Gradients] = []  # short, and looked through in every step
        self._update_is_due = False
        self._scale_before: Tensor | None = None  # what gradients carry, when the scale has changed since
        self._used = False

    def __reduce__(self) -> Any:
        return type(self), (self.scaler,)

    def watch(self, optimizer: Optimizer) -> Gradients:
        """Keep an eye on an optimizer, for as long as it lives."""
        for known in self._known:
            if known.optimizer() is optimizer:
                return known
        self._known = [known for known in self._known if known.optimizer() is not None]
        self._known.append(Gradients(ref(optimizer), _judges_itself(optimizer)))
        return self._known[-1]

    def scale(self, loss: Tensor) -> Tensor:
        """Multiply a loss by the scale."""
        self._update()
        if self._some_lack_scale:
            self._bring_to_scale(
                parameter for known in self._known for parameter in _parameters(known.optimizer())
            )
            for known in self._known:
                known.at_true_size = known.checked = False
            self._scale_before = None
        self._used = True
        return self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring the gradients of one optimizer to true size, if they are not."""
        known = self.watch(optimizer)
        if not known.at_true_size and self._has_gradients(optimizer):
            self._check(optimizer, known)

    def step(self, optimizer: Optimizer, step: Callable[..., Any]) -> Any:
        """Step with gradients at true size, or skip the step when they are not finite."""
        if not self._has_gradients(optimizer):
            return step()
        known = self.watch(optimizer)
        if known.stepped:
            self._update()
        if not known.checked:
            self._check(optimizer, known)
        known.stepped = self._update_is_due = True
        found = self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
        if known.judges_itself and not _is_spread(optimizer):
            return self._step_unjudged(optimizer, step, found)
        return None if any(infinite.item() for infinite in found) else step()

    def state_dict(self) -> dict[str, Any]:
        """The state of the scaler, after an update that is due."""
        self._update()
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        missing = [name for name in self.scaler.state_dict() if name not in state_dict]
        if missing:
            raise CheckpointKeyError(
                f"What the checkpoint holds for the precision is not the state of a loss scaler: it lacks "
                f"{listing(missing)}. It has: {listing(map(str, state_dict))}."
            )
        self._update()
        self._remember_scale()
        self.scaler.load_state_dict(dict(state_dict))

    def _update(self) -> None:
        if not self._update_is_due:
            return
        for known in self._known:
            if not known.at_true_size and known.optimizer() is not None:
                self._remember_scale()
            known.stepped = known.checked = False
        self.scaler.update()
        self._update_is_due = False

    @property
    def _some_lack_scale(self) -> bool:
        """Whether gradients that are there may carry something else than the current scale."""
        if self._scale_before is not None:
            return True
        for known in self._known:  # noqa: SIM110 - in every step
            if known.at_true_size:
                return True
        return False

    def _remember_scale(self) -> None:
        if self._scale_before is None and self.scaler._scale is not None:
            self._scale_before = self.scaler._scale.clone()

    def _check(self, optimizer: Optimizer, known: Gradients) -> None:
        """Unscale, and let the scaler look for infinities."""
        if not self._used:
            raise SetupError(
                f"{type(optimizer).__name__} has gradients of a loss that was not scaled, but this precision scales "
                "losses. Call fabric.backward(loss) instead of loss.backward()."
            )
        if self._some_lack_scale:
            self._bring_to_scale(_parameters(optimizer))
        # The scaler knows optimizers by their id, and one that is gone may have had the same.
        self.scaler._per_optimizer_states.pop(id(optimizer), None)
        self._unscale(optimizer)
        known.at_true_size = known.checked = True

    def _has_gradients(self, optimizer: Optimizer) -> bool:
        return any(parameter.grad is not None for parameter in _parameters(optimizer))

    def _unscale(self, optimizer: Optimizer) -> None:
        """Divide gradients by the scale, and remember whether one of them is infinite or NaN."""
        if _is_spread(optimizer):
            from fabric_backends.precisions.shards import (
                unscale_shards,
            )  # sharded tensors take time to import

            unscale_shards(self.scaler, optimizer)
        else:
            self.scaler.unscale_(optimizer)

    def _bring_to_scale(self, parameters: Iterable[Tensor]) -> None:
        """Multiply gradients by what they lack of the current scale. A parameter may have several optimizers."""
        waiting = {id(parameter): parameter for parameter in parameters if parameter.grad is not None}
        if not waiting:
            return
        at_true_size = {
            id(parameter)
            for known in self._known
            if known.at_true_size
            for parameter in _parameters(known.optimizer())
        }
        alike: dict[tuple[bool, torch.device], list[Tensor]] = defaultdict(list)
        for key, parameter in waiting.items():
            values = _values(parameter.grad)
            alike[key in at_true_size, values.device].append(values)
        scale: Any = self.scaler._scale
        for (is_true_size, device), gradients in alike.items():
            if is_true_size or self._scale_before is not None:
                factor = scale if is_true_size else scale / self._scale_before
                torch._foreach_mul_(gradients, factor.to(device))

    def _step_unjudged(self, optimizer: Any, step: Callable[..., Any], found: Iterable[Tensor]) -> Any:
        first, *others = found
        optimizer.grad_scale = getattr(optimizer, "grad_scale", None)
        optimizer.found_inf = sum((other.to(first.device, non_blocking=True) for other in others), first)
        try:
            return step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf


def _judges_itself(optimizer: Optimizer) -> bool:
    """Whether it follows the protocol of PyTorch's fused optimizers; an older one wants the scaler as an argument."""
    return getattr(optimizer, "_step_supports_amp_scaling", False) and "grad_scaler" not in (
        inspect.signature(optimizer.step).parameters
    )


def _parameters(optimizer: Optimizer | None) -> Iterator[Tensor]:
    """Its parameters; none if it is gone."""
    for group in () if optimizer is None else optimizer.param_groups:
        yield from group["params"]


def _values(gradient: Any) -> Tensor:
    if hasattr(gradient, "to_local"):  # a sharded one
        gradient = gradient.detach().to_local()
    values: Tensor = gradient._values() if gradient.is_sparse else gradient
    return values.detach()


def _is_spread(optimizer: Optimizer) -> bool:
    """Whether this rank holds only a part of some gradient."""
    for parameter in _parameters(optimizer):
        if type(parameter.grad) is not Tensor and hasattr(parameter.grad, "to_local"):
            return True
    return False
