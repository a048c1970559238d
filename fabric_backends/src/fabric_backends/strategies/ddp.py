"""Distributed data parallel: every process holds the whole model, and gradients are averaged as they appear."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fabric_backends.batchnorm import synchronize_batchnorm
from fabric_backends.communication import Communication
from fabric_backends.hooks import DDP
from fabric_backends.strategies.parallel import ParallelStrategy
from fabric_backends.timeouts import INIT_TIMEOUT
from fabric_core.errors import OptionsError, SetupError, unknown_option

_PARAMETERS = frozenset(inspect.signature(DistributedDataParallel).parameters)
_DECIDED_HERE = {"module", "device_ids", "output_device", "dim", "process_group", "device_mesh"}


class DDPStrategy(ParallelStrategy):
    """PyTorch's ``DistributedDataParallel``.

    Args:
        find_unused_parameters: Look for parameters that a forward pass has left out, each time. Needed when there are
            any; costs a walk over the graph.
        static_graph: Promise that every step uses the same parameters in the same way.
        gradient_as_bucket_view: Let gradients lie where they are communicated from, which saves a copy of each.
        bucket_cap_mb: How many megabytes of gradients are communicated at once (default: PyTorch's, 25).
        broadcast_buffers: Send rank 0's buffers, such as running means, to every rank before each forward pass.
        sync_batchnorm: Let layers of batch normalisation use the statistics of all ranks' batches, not only of their
            own. On devices that have it; the CPU has not.
        comm_hook: Compress gradients on their way: ``"fp16"``, ``"bf16"``, ``"powersgd"``, or a function as
            ``DistributedDataParallel.register_comm_hook`` takes it.
        comm_state: For PowerSGD the options of its state, for a function whatever it wants to be given.
        comm_wrapper: ``"fp16"`` or ``"bf16"``: compress what the hook sends once more; or a function.
        process_group_backend, timeout, init_timeout: As in `ParallelStrategy`.
        options: Further arguments of ``DistributedDataParallel``.

    Raises:
        OptionsError: An option is unknown to this PyTorch, or not for users to set.
    """

    spec = DDP

    def __init__(
        self,
        *,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = True,
        bucket_cap_mb: float | None = None,
        broadcast_buffers: bool = True,
        sync_batchnorm: bool = False,
        comm_hook: str | Callable[..., Any] | None = None,
        comm_state: Any = None,
        comm_wrapper: str | Callable[..., Any] | None = None,
        process_group_backend: str | None = None,
        timeout: float | timedelta | None = None,
        init_timeout: float | timedelta = INIT_TIMEOUT,
        **options: Any,
    ) -> None:
        super().__init__(
            process_group_backend=process_group_backend, timeout=timeout, init_timeout=init_timeout
        )
        _check(options, type(self))
        self._sync_batchnorm = sync_batchnorm
        self._communication = Communication(comm_hook, comm_state, comm_wrapper)
        self._ddp_options = {
            "find_unused_parameters": find_unused_parameters,
            "static_graph": static_graph,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            **({} if bucket_cap_mb is None else {"bucket_cap_mb": bucket_cap_mb}),
            **({} if broadcast_buffers else {_buffer_option(): False}),
            **options,
        }

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Give every rank the weights of rank 0, and average gradients from now on. Called on every rank.

        Returns:
            A ``DistributedDataParallel`` whose ``module`` is the argument; the argument itself when none of its
            parameters is trained.

        Raises:
            UnsupportedError: The device or the process group cannot do what the options ask for.
        """
        self.prepare_module(module)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            self.synchronize_module(module)
            return module
        device = self.root_device
        has_number = device.type != "cpu" and device.index is not None
        wrapped = DistributedDataParallel(module, [device.index] if has_number else None, **self._ddp_options)
        self._communication.register(wrapped)
        if self._membership is not None:
            self._membership.guard(wrapped, _release)
        return wrapped

    @property
    def compresses(self) -> bool:
        """Whether a hook was asked for that has its own way with gradients."""
        return self._communication.hook is not None

    def prepare_module(self, module: nn.Module) -> None:
        """Do what the options ask for before a model is wrapped. Called on every rank by `setup_module`."""
        if self._sync_batchnorm:
            synchronize_batchnorm(module, self.root_device, self.world_size)

    def hold_gradient_sync(self, module: nn.Module) -> AbstractContextManager[Any]:
        """A context in which gradients are added up on each rank alone. Called on every rank."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def _check(options: dict[str, Any], cls: type[DDPStrategy]) -> None:
    own = {name for base in cls.__mro__ for name in inspect.signature(base).parameters if base is not object}
    known = (_PARAMETERS | own) - _DECIDED_HERE - {"options"}
    for name in options:
        if name in _DECIDED_HERE:
            raise OptionsError(
                f"The option {name!r} of DistributedDataParallel is set by the strategy {cls.spec.name!r} itself."
            )
        if name not in known:
            raise unknown_option(f"The strategy {cls.spec.name!r}", name, known)


def _buffer_option() -> str:
    """Under its newer name, buffers are still made equal once, when the module is set up."""
    return "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"


def _release(wrapped: DistributedDataParallel) -> None:
    """Let go of the process group. From now on, ``wrapped`` computes by itself, and cannot train."""
    attributes: dict[str, Any] = {"reducer": None, "logger": None, "process_group": None}
    for name, value in attributes.items():
        setattr(wrapped, name, value)
    wrapped.forward = partial(forward_alone, wrapped.module)  # type: ignore[method-assign]


def forward_alone(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a model whose strategy is gone.

    Raises:
        SetupError: It would be trained.
    """
    if module.training and torch.is_grad_enabled():
        raise SetupError(
            "This model was set up by a Fabric that is closed: its gradients are no longer averaged over the ranks. "
            "Train before close(); for inference, call model.eval() or use torch.no_grad()."
        )
    return module(*args, **kwargs)
