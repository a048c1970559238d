"""The precision: number formats of weights, inputs and computation, and the scaling of losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from fabric_core.contracts.part import Part
from fabric_core.specs import PrecisionSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["Precision"]


class Precision(Part):
    """Plain precision: nothing is converted, nothing is scaled. Every method may be overridden.

    Which of them a class overrides is looked at once, in `wrap_forward`; what it leaves alone costs nothing per step.
    """

    spec_type = PrecisionSpec

    scales_loss: bool = False
    """Whether losses are scaled, so that a bare ``loss.backward()`` would give wrong gradients."""

    device: torch.device
    """The device of this rank. Set by `attach`."""

    def attach(self, device: torch.device) -> None:
        """Learn on which device the model will be. Called on every rank, once, before the process joins the others."""
        self.device = device

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the weights. Called on every rank by ``setup``, before the module moves to the device."""
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> None:
        """Learn of an optimizer. Called on every rank by ``setup``, with what `optimizer_step` will be given."""

    def init_context(self) -> AbstractContextManager[Any]:
        """A context in which new parameters and tensors get the dtype of the weights.

        Called on every rank, by ``Fabric.init_module`` and ``Fabric.init_tensor``.
        """
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """A fresh context. Called on every rank, for each forward pass and by ``Fabric.autocast``."""
        return nullcontext()

    def convert_input(self, data: Any) -> Any:
        """Convert the arguments of a forward pass. Called on every rank, before each of them.

        Args:
            data: A collection with tensors in it. Those that are not floating-point stay.
        """
        return data

    def convert_output(self, data: Any) -> Any:
        """Convert a result, so that losses have the default dtype. Called on every rank, after each forward pass."""
        return data

    def wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Compose the conversions and the context around ``forward``. Called once per module, by ``setup``."""
        converts_input = type(self).convert_input is not Precision.convert_input
        converts_output = type(self).convert_output is not Precision.convert_output
        has_context = type(self).forward_context is not Precision.forward_context
        if not (converts_input or converts_output or has_context):
            return forward

        def converted(*args: Any, **kwargs: Any) -> Any:
            if converts_input:
                args, kwargs = self.convert_input(args), self.convert_input(kwargs)
            with self.forward_context():
                output = forward(*args, **kwargs)
            return self.convert_output(output)

        return converted

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss that ``backward`` is called on. Called on every rank, once per backward pass."""
        return loss

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Bring the gradients of one optimizer to their true size. Called on every rank, before they are clipped.

        Args:
            optimizer: The user's own, as in `optimizer_step`.
        """

    def optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """Step one optimizer. Called on every rank.

        Args:
            optimizer: The optimizer that steps.
            step: Its own ``step``.
            closure: What the user passed, if anything.

        Returns:
            What ``step`` returned; ``None`` when the step was skipped because of non-finite gradients.
        """
        return step() if closure is None else step(closure)

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a restart (a loss scale); empty when nothing has. Called on every rank by ``save``."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave. Called on every rank by ``load``."""
