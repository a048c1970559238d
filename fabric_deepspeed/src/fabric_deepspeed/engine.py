"""A DeepSpeed engine and the optimizers that step with it.

[Note: gradients as in PyTorch] Left to itself, DeepSpeed counts backward passes and knows which of them is the last
before a step. Fabric's users may call ``backward`` as often as they like before they step. So every backward pass is
one that is not the last, and the gradients are brought to an end (`Layout.reduce`) when somebody wants to see them: to
clip, or to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.errors import SetupError
from fabric_deepspeed.layouts import LAYOUTS, Layout
from fabric_deepspeed.library import quiet
from fabric_deepspeed.stepping import Joined


class Engine:
    """What the strategy knows of one model in training.

    Attributes:
        raw: DeepSpeed's engine, which is also the module that forward passes go through.
        layout: Where it keeps things.
    """

    def __init__(self, raw: Any, joined: Joined) -> None:
        self.raw = raw
        self.joined = joined
        self.layout: Layout = LAYOUTS[int(raw.zero_optimization_stage())](raw, joined)
        self._asked: list[Optimizer] = []
        self._dropped: list[Optimizer] = []
        self._has_gradients = self._is_reduced = False
        self._correction = 1.0
        joined.ready = True
        raw.set_gradient_accumulation_boundary(False)
        raw._support_torch_style_backward = (
            True  # losses of others may pass through; they are never the last ones
        )

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """The user's."""
        return self.joined.optimizers

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied with."""
        return float(getattr(self.raw.optimizer, "loss_scale", 1.0))

    # -- backward -------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, retain_graph: bool) -> None:
        """Add to the gradients. Called on every rank."""
        self._begin()
        with quiet():
            self.raw.backward(
                loss if self._correction == 1.0 else loss / self._correction, retain_graph=retain_graph
            )
        self.end_backward()
        self._has_gradients = True

    def expect_to_be_passed(self) -> None:
        """Another engine's backward pass is about to begin, and may pass through this model."""
        self._complete_dropping()
        self.raw._manual_backward_expected = True

    def end_backward(self) -> None:
        """A backward pass has ended that may have reached this model."""
        self._has_gradients = self._has_gradients or self.layout.touched
        self.raw._manual_backward_expected = False
        self.layout.end_backward()

    def _begin(self) -> None:
        if self._asked:
            self._fail("step()", self._asked)
        self._complete_dropping()
        if self._is_reduced:
            raise SetupError(
                "fabric.backward() was called between fabric.clip_gradients() and optimizer.step(). The gradients have "
                "been reduced over the ranks by then, and nothing can be added to them: clip after the last backward()."
            )

    def _complete_dropping(self) -> None:
        if self._dropped and self._has_gradients:
            self._fail("zero_grad()", self._dropped)
        self._dropped.clear()

    def _fail(self, method: str, asked: list[Optimizer]) -> None:
        names = ", ".join(type(optimizer).__name__ for optimizer in asked)
        counts = f"{len(asked)} of its {len(self.optimizers)} optimizers ({names})"
        asked.clear()
        raise SetupError(
            f"{method} was called on {counts}, and the model's next backward pass begins. DeepSpeed steps a model with "
            "all of its optimizers at once: call it on all of them."
        )

    # -- between backward and step --------------------------------------------------------------------------------

    def scale(self, factor: float) -> None:
        """Multiply the gradients collected so far.

        Instead, whatever comes later is divided, and all of it is multiplied in the step.
        """
        self._correction *= factor

    def clip_norm(
        self, parameters: Sequence[nn.Parameter], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> Tensor:
        """Have the gradients of some parameters clipped in the next step, and return their norm now."""
        self._reduce()
        norm = self._norm(parameters, norm_type)
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(
                f"The total norm of order {norm_type} of the gradients is not finite ({norm.item()}), so they cannot "
                "be clipped. To clip all the same: error_if_nonfinite=False."
            )
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self._change(parameters, lambda piece: piece.mul_(factor.to(piece.device)))
        return norm

    def clip_value(self, parameters: Sequence[nn.Parameter], limit: float) -> None:
        """Have the gradients of some parameters clamped in the next step."""
        self._reduce()
        self._change(parameters, lambda piece: piece.clamp_(-limit, limit))

    def _norm(self, parameters: Sequence[nn.Parameter], norm_type: float) -> Tensor:
        pieces = [
            self.layout.gradient(parameter) for parameter in parameters if parameter in self.layout.places
        ]
        norms = [
            torch.linalg.vector_norm(piece, norm_type, dtype=torch.float32)
            for piece in pieces
            if piece is not None and piece.numel()
        ]
        device = self.raw.device
        own = torch.stack([norm.to(device) for norm in norms]) if norms else torch.zeros(1, device=device)
        total = torch.linalg.vector_norm(own, norm_type)
        if self.layout.divides:
            if norm_type == torch.inf:
                dist.all_reduce(total, dist.ReduceOp.MAX)
            else:
                total = total**norm_type
                dist.all_reduce(total)
                total = total ** (1.0 / norm_type)
        true: Tensor = total * (self._correction / self.loss_scale)
        return true

    def _change(self, parameters: Sequence[nn.Parameter], change: Any) -> None:
        for parameter in parameters:
            place = self.layout.places.get(parameter)
            if place is not None and place.length:
                self.joined.change(place.flat, place.start, place.length, change)

    def _reduce(self) -> None:
        if self._is_reduced or not self._has_gradients:
            return
        self.raw.set_gradient_accumulation_boundary(True)
        with quiet():
            self.layout.reduce()
        self._is_reduced = True
        correction = self._correction
        if correction != 1.0:
            self._change(list(self.layout.places), lambda piece: piece.mul_(correction))

    # -- the step -------------------------------------------------------------------------------------------------

    def step(self, optimizer: Optimizer) -> None:
        """Step, when every optimizer has been asked to. Called on every rank."""
        if any(optimizer is other for other in self._asked):
            self._fail("step()", self._asked)
        self._asked.append(optimizer)
        if len(self._asked) < len(self.optimizers):
            return
        self._asked.clear()
        self._complete_dropping()
        if not self._has_gradients:
            return  # as in PyTorch, where optimizers pass over parameters without a gradient
        self._reduce()
        with quiet():
            self.raw.step()
        self._drop()

    def zero_grad(self, optimizer: Optimizer) -> None:
        """Drop the gradients, when every optimizer has been asked to. Called on every rank."""
        if not any(optimizer is other for other in self._dropped):
            self._dropped.append(optimizer)
        if len(self._dropped) == len(self.optimizers):
            self._dropped.clear()
            if self._has_gradients:
                self._drop()

    def _drop(self) -> None:
        self.layout.drop()
        self.joined.forget_changes()
        self.raw.set_gradient_accumulation_boundary(False)
        self._has_gradients = self._is_reduced = False
        self._correction = 1.0

    def release(self) -> None:
        """Destroy the engine. Called on every rank; the model stays, but is not trained any more."""
        self.raw.destroy()
