"""The base of the XLA strategies: what follows from tensors that are computed late.

[Note: lazy tensors] An operation on an XLA device is only written down. ``torch_xla.sync`` compiles what was written
down since the last one, the first time that it looks like this, and starts it; the host goes on meanwhile. It is
called where a step ends: after an optimizer has stepped, after each batch of a loader that was set up, and before
values are fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch_xla
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.contracts.strategy import Strategy
from fabric_core.errors import SetupError
from fabric_xla.clipping import clip_norm, gradients_of
from fabric_xla.moving import move_module, move_state, on_cpu


class LazyStrategy(Strategy):
    """One process, whose tensors are computed when a step ends."""

    def connect(self) -> None:
        """Make the device current, and see that gradients can be computed on it. Called on every rank, once.

        Raises:
            SetupError: They cannot, because of what this process did before.
        """
        super().connect()
        _try_backward(self.root_device)

    # -- setting up -----------------------------------------------------------------------------------------------

    def move_module(self, module: nn.Module) -> None:
        """Move a model to the device; its parameters stay the same objects. Called on every rank by ``setup``."""
        move_module(module, self.root_device)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Bring what the optimizer has collected so far to the device. Called on every rank, in the same order."""
        move_state(optimizer)
        return optimizer

    def move_batches(self, batches: Iterator[Any], move: Callable[[Any], Any]) -> Iterator[Any]:
        """Bring the batches of one loop to the device. Called on every rank, at the start of each loop.

        After each batch, what the loop has asked for is started; the device computes while the next batch is loaded
        and sent. Batches are not read ahead, so that whatever draws random numbers draws them in the loop's order.
        """
        for batch in batches:
            yield self.upload(batch, move)
            torch_xla.sync()

    def upload(self, batch: Any, move: Callable[[Any], Any]) -> Any:
        """Bring one batch to the device."""
        return move(batch)

    # -- the step -------------------------------------------------------------------------------------------------

    def optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """Step one optimizer, and start the computation. Called on every rank. Arguments as in the contract."""
        result = super().optimizer_step(optimizer, step, closure)
        torch_xla.sync()
        return result

    def hold_gradient_sync(self, module: nn.Module) -> AbstractContextManager[Any] | None:
        """``None``: nothing is synchronised before the optimizer steps, so there is nothing to hold back."""
        return None

    def clip_gradients_norm(
        self,
        module: nn.Module,
        parameters: list[nn.Parameter],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """As the contract. ``error_if_nonfinite=False`` spares the device a halt in the middle of the step."""
        return clip_norm(gradients_of(parameters), self.root_device, max_norm, norm_type, error_if_nonfinite)

    # -- state ----------------------------------------------------------------------------------------------------

    def save_checkpoint(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Write what ``save`` collected, from the CPU: the file can be read where there is no XLA device."""
        torch_xla.sync()
        super().save_checkpoint(path, on_cpu(dict(checkpoint)))

    def plain_value(self, value: Any) -> Any:
        """As the contract; and let the device take over what was restored until now."""
        torch_xla.sync()
        return super().plain_value(value)


def _try_backward(device: torch.device) -> None:
    """PyTorch counts the devices at the first backward pass in a process; those that appear later have none."""
    torch_xla.device_count()  # they appear when they are asked for
    try:
        torch.autograd.backward(torch.zeros((), device=device, requires_grad=True).exp())
    except RuntimeError as error:
        raise SetupError(
            "Gradients cannot be computed on the XLA device any more: a backward pass ran in this process before the "
            "device was first used, and PyTorch counts the devices then. Call fabric.launch() before the first "
            "backward pass, also of models on the CPU."
        ) from error


def default_device(index: int = 0) -> torch.device:
    """The device that a process calls its own, when it has one only."""
    return torch.device("xla", index)
