"""Local SGD: every rank trains alone, and every few steps the parameters are averaged over the ranks.

[Note: alone] The method is that of Stich, "Local SGD Converges Fast and Communicates Little" (2019), with the first
steps taken together, as Lin et al., "Don't Use Large Mini-Batches, Use Local SGD" (2020), advise. What is averaged are
the parameters. The optimizer's state (momentum), buffers (running means) and the loss scale stay each rank's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fabric_backends import collectives
from fabric_backends.hooks import LOCAL_SGD
from fabric_backends.strategies.ddp import DDPStrategy
from fabric_core.errors import OptionsError

STATE_KEY = "local_sgd"
"""Under which the state of an optimizer holds how far it is. Other strategies leave it aside."""

_AT_ONCE = 2**23  # numbers that are averaged in one collective; so much is copied meanwhile


@dataclass
class Steps:
    """How many steps one optimizer has taken.

    Attributes:
        together: With gradients that were averaged.
        alone: With this rank's own gradients.
    """

    together: int = 0
    alone: int = 0


class LocalSGDStrategy(DDPStrategy):
    """Ranks train alone and average their parameters after every ``sync_every`` steps; see [Note: alone].

    Args:
        sync_every: After how many steps of an optimizer its parameters are averaged over all ranks.
        warmup_steps: During so many steps gradients are averaged in each, as by ``ddp``. The first optimizer that has
            taken them ends the warm-up for all.
        options: Those of ``ddp``; they hold for the warm-up.

    Raises:
        OptionsError: As ``ddp``; or one of the numbers is too small.
    """

    spec = LOCAL_SGD

    def __init__(self, *, sync_every: int = 8, warmup_steps: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.sync_every = _whole("sync_every", sync_every, 1)
        self.warmup_steps = _whole("warmup_steps", warmup_steps, 0)

    # What there is from `connect` on; before that, the strategy may travel to another process.
    _together: bool
    _steps: WeakKeyDictionary[Optimizer, Steps]
    _wrapped: WeakSet[DistributedDataParallel]

    def connect(self) -> None:
        """Join the process group, and begin to count. Called on every rank, once."""
        super().connect()
        self._together = self.warmup_steps > 0
        self._steps, self._wrapped = WeakKeyDictionary(), WeakSet()

    # -- setting up -----------------------------------------------------------------------------------------------

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Give every rank the weights of rank 0. Called on every rank.

        Returns:
            As ``ddp``; the argument itself when there is no warm-up.
        """
        if not self._together:
            self.prepare_module(module)
            self.synchronize_module(module)
            return module
        wrapped = super().setup_module(module)
        if isinstance(wrapped, DistributedDataParallel):
            self._wrapped.add(wrapped)
        return wrapped

    # -- the step -------------------------------------------------------------------------------------------------

    def optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """Step; when it is time, average the parameters of this optimizer. Called on every rank."""
        result = super().optimizer_step(optimizer, step, closure)
        steps = self._steps_of(optimizer)
        if self._together:
            steps.together += 1
            if steps.together >= self.warmup_steps:
                self._part()
        else:
            steps.alone += 1
            if steps.alone % self.sync_every == 0:
                average_([p for group in optimizer.param_groups for p in group["params"]])
        return result

    def _steps_of(self, optimizer: Optimizer) -> Steps:
        return self._steps.setdefault(optimizer, Steps())

    def _part(self) -> None:
        """End the warm-up: from now on, gradients stay on their rank."""
        self._together = False
        for wrapped in self._wrapped:
            wrapped.require_backward_grad_sync = False

    # -- state ----------------------------------------------------------------------------------------------------

    def module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The state of the average of all ranks' models; their own parameters are left alone. Buffers are rank 0's."""
        with _averaged(module):
            state = module.state_dict()
            for name, value in state.items():
                if isinstance(value, Tensor):
                    state[name] = value.clone()
        return state

    def optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of rank 0, and how many steps there were."""
        steps = self._steps_of(optimizer)
        return super().optimizer_state_dict(optimizer) | {STATE_KEY: vars(steps).copy()}

    def load_optimizer_state_dict(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Restore what `optimizer_state_dict` gave; a state from elsewhere begins with the warm-up."""
        super().load_optimizer_state_dict(
            optimizer, {name: value for name, value in state.items() if name != STATE_KEY}
        )
        self._steps[optimizer] = steps = Steps(**state.get(STATE_KEY, {}))
        if self._together and max(steps.together, steps.alone) >= self.warmup_steps:
            self._part()


@torch.no_grad()
def average_(parameters: list[nn.Parameter]) -> None:
    """Replace parameters by their average over all ranks, in place. Called on every rank, in the same order.

    Args:
        parameters: Of any dtypes and shapes, the same on every rank. Those that are not trained are equal already.
    """
    for batch in _batches([p.detach() for p in parameters if p.requires_grad]):
        average = collectives.all_reduce(torch.cat([tensor.reshape(-1) for tensor in batch]), "mean")
        parts = torch.split(average, [tensor.numel() for tensor in batch])
        torch._foreach_copy_(batch, [part.view_as(own) for part, own in zip(parts, batch, strict=True)])


def _batches(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, as many at once as may be copied."""
    batch: list[Tensor] = []
    for tensor in tensors:
        alike = not batch or (tensor.dtype, tensor.device) == (batch[0].dtype, batch[0].device)
        if not alike or sum(other.numel() for other in batch) >= _AT_ONCE:
            yield batch
            batch = []
        batch.append(tensor)
    if batch:
        yield batch


@contextmanager
def _averaged(module: nn.Module) -> Iterator[None]:
    parameters = list(module.parameters())
    values = [parameter.detach() for parameter in parameters]
    own = [value.clone() for value in values]
    average_(parameters)
    try:
        yield
    finally:
        if own:
            torch._foreach_copy_(values, own)


def _whole(option: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionsError(f"{option}={value!r} cannot be used. It takes a whole number from {least}.")
    return value
