"""Mixed precision with float16: a plugin's own scaling of losses, in which faults of such scaling can be planted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from fabric_sample.hooks import SPEC
from torch import Tensor
from torch.optim import Optimizer

from fabric_core import Precision, UnsupportedError
from fabric_core.data.collections import map_tensors

GROWTH_INTERVAL = 100  # good steps


class SamplePrecision(Precision):
    """Autocast to float16. Losses are multiplied by a scale, so that small gradients are not lost.

    A step with infinite gradients is skipped and halves the scale; many good ones double it. The scale changes between
    the last step and the next backward pass, so that all optimizers of a step see the same.
    """

    spec = SPEC
    scales_loss = True

    def __init__(self) -> None:
        self._scale = 2.0**16
        self._good_steps = 0
        self._finite: dict[
            Optimizer, bool
        ] = {}  # whose gradients are at their true size, and whether those are finite
        self._steps: list[bool] = []  # since the scale was looked at: which of them were good

    def forward_context(self) -> AbstractContextManager[Any]:
        """A fresh autocast for one forward pass."""
        return torch.autocast(self.device.type, dtype=torch.float16)

    def convert_output(self, data: Any) -> Any:
        """Bring what a forward pass returned back to float32."""
        return map_tensors(lambda tensor: tensor.float() if tensor.dtype is torch.float16 else tensor, data)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Multiply the loss by the current scale."""
        self._update()
        return loss * self._scale

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Bring the gradients of one optimizer to their true size. Doing it twice is no error."""
        if optimizer in self._finite:
            return
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        for gradient in gradients:
            gradient.mul_(1 / self._scale)
        self._finite[optimizer] = all(bool(gradient.isfinite().all()) for gradient in gradients)

    def optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """Step one optimizer; skip the step when a gradient is infinite or NaN."""
        if closure is not None:
            raise UnsupportedError("A closure cannot be used while losses are scaled.")
        self.unscale_gradients(optimizer)
        good = self._finite.pop(optimizer)
        self._steps.append(good)
        return step() if good else None

    def _update(self) -> None:
        """Change the scale by what the last steps were like."""
        if not self._steps:
            return
        self._good_steps = self._good_steps + 1 if all(self._steps) else 0
        if not all(self._steps):
            self._scale /= 2
        elif self._good_steps == GROWTH_INTERVAL:
            self._scale, self._good_steps = self._scale * 2, 0
        self._steps.clear()

    def state_dict(self) -> dict[str, Any]:
        """The scale, and how many good steps there were since it changed."""
        self._update()
        return {"scale": self._scale, "good_steps": self._good_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._scale = state_dict.get("scale", self._scale)
        self._good_steps = state_dict.get("good_steps", self._good_steps)
