"""FairScale's engine: ``OSS`` steps in parts, ``ShardedDataParallel`` brings each gradient to its rank."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from fairscale.nn.data_parallel import ShardedDataParallel
from fairscale.optim import OSS
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from fabric_backends import collectives
from fabric_backends.strategies.ddp import DDPStrategy, forward_alone
from fabric_backends.strategies.zero.part import Part
from fabric_backends.strategies.zero.torch_engine import TorchEngine


class ReducedModule(ShardedDataParallel):  # type: ignore[misc]  # FairScale has no types
    """``ShardedDataParallel``, made safe against three ways in which it goes wrong without a word.

    - Its buckets keep gradients as views. ``zero_grad()`` of today's PyTorch sets them to ``None``, the views are lost,
      and nothing is reduced any more. So there are no buckets (``reduce_buffer_size=0``).
    - A gradient that is reduced, and not dropped before the next backward pass, is divided by the number of ranks once
      more. So it is set aside meanwhile (`summing`).
    - An exception inside of ``no_sync()`` leaves it switched off for ever. So it is switched on again.

    Args:
        module: The user's model; every rank has the same weights already.
        parts: Those of its optimizers.
        broadcast_buffers: Send rank 0's buffers to every rank before each forward pass.
    """

    def __init__(self, module: nn.Module, parts: list[Part], broadcast_buffers: bool) -> None:
        super().__init__(
            module,
            [part.engine for part in parts],
            broadcast_buffers=broadcast_buffers,
            sync_models_at_startup=False,
            reduce_buffer_size=0,
        )
        self._parts = parts
        self._holding = False
        self._reduced: set[int] = set()  # ids of own parameters whose gradient is the average over all ranks
        self._noting: dict[int, Any] = {}  # by id of own parameters, the handle of the hook that notes it

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context in which gradients are added up on each rank alone."""
        held, before = super().no_sync(), self._holding
        held.__enter__()
        self._holding = True
        try:
            yield
        finally:
            self._holding = before
            held.__exit__(None, None, None)

    @contextmanager
    def summing(self) -> Iterator[None]:
        """The context of a backward pass: gradients that are averages already are added to, and not averaged again."""
        aside: list[tuple[Tensor, Tensor]] = []
        for parameter in self._own():
            self._note(parameter)
            if parameter.grad is not None and id(parameter) in self._reduced:
                aside.append((parameter, parameter.grad))
                parameter.grad = None
        try:
            yield
        finally:
            for parameter, average in aside:
                if parameter.grad is None:
                    parameter.grad = average
                elif id(parameter) in self._reduced:
                    parameter.grad.add_(average)
                else:  # held: the next reduction will divide it by the number of ranks
                    parameter.grad.add_(average, alpha=torch.distributed.get_world_size())

    def release(self) -> None:
        """Forget the process group. From now on this computes by itself, and cannot train."""
        for handle in self._noting.values():
            handle.remove()
        self._grad_to_be_reduced: list[bool] = []
        self.training = False  # so that the next line removes its hooks
        self.refresh_trainable()
        self._process_group = None
        self._sharded_optimizers: list[OSS] = []
        self.forward = partial(forward_alone, self.module)

    def _own(self) -> Iterator[Tensor]:
        for part in self._parts:
            yield from part.parameters()

    def _note(self, parameter: Tensor) -> None:
        if id(parameter) not in self._noting and parameter.requires_grad:
            note = partial(_note_reduced, weakref.ref(self))
            register: Any = parameter.register_post_accumulate_grad_hook
            self._noting[id(parameter)] = register(note)


def _note_reduced(owner: weakref.ref[ReducedModule], parameter: Tensor) -> None:
    module = owner()
    if module is not None:
        (module._reduced.discard if module._holding else module._reduced.add)(id(parameter))


class FairScaleEngine(TorchEngine):
    """Gradients are sharded as well: after a backward pass, a rank has those of its own part only."""

    name = "fairscale"

    def __init__(self, ddp: DDPStrategy, broadcast_buffers: bool) -> None:
        super().__init__(ddp)
        self._broadcast_buffers = broadcast_buffers
        self._modules: weakref.WeakSet[ReducedModule] = weakref.WeakSet()

    def shard(self, optimizer: Optimizer) -> Part:
        """Divide an optimizer between the ranks. Called on every rank."""
        return Part(optimizer, OSS, grows=False)

    def wrap(self, module: nn.Module, parts: list[Part]) -> nn.Module:
        """Reduce gradients to their rank from now on. Called on every rank, after the optimizers were divided."""
        self._ddp.prepare_module(module)
        self._ddp.synchronize_module(module)
        wrapped = ReducedModule(module, parts, self._broadcast_buffers)
        self._modules.add(wrapped)
        return wrapped

    def hold(self, module: nn.Module) -> AbstractContextManager[Any]:
        """As `Strategy.hold_gradient_sync`."""
        return module.no_sync() if isinstance(module, ReducedModule) else super().hold(module)

    def backward(self) -> AbstractContextManager[Any]:
        """The backward pass of a loss may come through any of the models."""
        stack = ExitStack()
        for module in self._modules:
            stack.enter_context(module.summing())
        return stack

    def clip_norm(
        self,
        parts: list[Part],
        module: nn.Module,
        parameters: list[nn.Parameter],
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
    ) -> Tensor:
        """As `Strategy.clip_gradients_norm`: the norm is that of the parts of all ranks."""
        own = set[int]().union(*(part.ids() for part in parts))
        mine = [p for p in parameters if id(p) in own and p.grad is not None]
        exact = norm_over_ranks([p.grad for p in mine], norm_type, self._ddp.root_device)  # type: ignore[misc]
        norm = exact.to(next((p.dtype for p in parameters), torch.float32))
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(
                f"The norm of order {norm_type} of the gradients is {norm.item()}, so they cannot be clipped. Look for "
                "what made them so, or clip with error_if_nonfinite=False."
            )
        clip_grads_with_norm_(mine, max_norm, norm)
        return norm

    def release(self) -> None:
        """Let go of what holds the process group. Called on every rank when the job ends."""
        for module in list(self._modules):
            module.release()


def norm_over_ranks(gradients: Iterable[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The norm of all ranks' gradients as one vector. Called on every rank; a rank may have none.

    Returns:
        A 0-dimensional tensor in float64, equal on every rank.
    """
    norms = [torch.linalg.vector_norm(gradient.detach(), norm_type) for gradient in gradients]
    own = torch.stack([norm.to(device, torch.float64) for norm in norms] or [torch.zeros((), device=device)])
    local = torch.linalg.vector_norm(own.to(torch.float64), norm_type)
    norm: Tensor = torch.linalg.vector_norm(collectives.all_gather(local), norm_type)
    return norm
