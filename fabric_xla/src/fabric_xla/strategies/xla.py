"""One process per XLA device, each with the whole model; gradients are averaged when an optimizer steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.contracts.strategy import ReduceOp
from fabric_core.errors import ConfigurationError, SetupError
from fabric_xla import collectives
from fabric_xla.clipping import gradients_of
from fabric_xla.hooks import XLA
from fabric_xla.moving import own_tensors
from fabric_xla.probes import LOCAL_RANK
from fabric_xla.store import join_store
from fabric_xla.strategies.lazy import LazyStrategy, default_device

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

INIT_TIMEOUT = timedelta(seconds=300)
"""How long the processes wait for each other at the start."""


class XLAStrategy(LazyStrategy):
    """Data parallel training with torch_xla: a process per device, or one device in this process.

    Gradients are averaged over the processes once, when they are first needed whole: by clipping, or by the step.

    Args:
        sync_module_states: Give every process the weights and buffers of rank 0 when a model is set up.
    """

    spec = XLA

    _averaged: Any
    """The gradients that are means already, and the version that each had then. Set by `connect`."""

    def __init__(self, *, sync_module_states: bool = True) -> None:
        self.sync_module_states = sync_module_states
        self._store: Store | None = None

    # -- who am I -------------------------------------------------------------------------------------------------

    @property
    def _environment(self) -> ClusterEnvironment:
        return self.surroundings.cluster_environment

    @property
    def root_device(self) -> torch.device:
        """The device that was asked for; a process that torch_xla has started sees its own only, as the first."""
        return default_device() if self.world_size > 1 else self.surroundings.devices[0]

    @property
    def world_size(self) -> int:
        """How many processes the job has; before they are started, how many it will have."""
        if self._environment.creates_processes_externally:
            return self._environment.world_size()
        return self.surroundings.processes_per_node * self.surroundings.num_nodes

    @property
    def global_rank(self) -> int:
        """From the cluster environment."""
        return self._environment.global_rank()

    @property
    def local_rank(self) -> int:
        """From the cluster environment."""
        return self._environment.local_rank()

    @property
    def node_rank(self) -> int:
        """From the cluster environment."""
        return self._environment.node_rank()

    # -- coming and going -----------------------------------------------------------------------------------------

    @property
    def store(self) -> Store | None:
        """A store that all processes share; ``None`` for one process. The first time waits for the others."""
        if self._store is None and self.world_size > 1:
            self._store = join_store(self._environment, INIT_TIMEOUT)
        return self._store

    def connect(self) -> None:
        """Make the device current. Called on every rank, once.

        Raises:
            SetupError: Something else than torch_xla has started the processes, or this one is in SPMD mode.
        """
        if xr.is_spmd():
            raise SetupError(
                f"This process is in the SPMD mode of torch_xla, in which {type(self).__name__} cannot work, and which "
                "cannot be left. Use the strategy 'xla_spmd', or a process of its own."
            )
        if self.world_size > 1 and LOCAL_RANK not in os.environ:
            raise SetupError(
                f"The {self.world_size} processes of this job were not started by torch_xla, so none of them has a "
                "device of its own. Run the script by itself, with fabric.launch(function), or start it with "
                "torch_xla.launch."
            )
        self._averaged = WeakIdKeyDictionary()
        super().connect()

    def teardown(self) -> None:
        """Let go of the store. Called on every rank; safe to call twice."""
        super().teardown()
        self._store = None

    # -- setting up -----------------------------------------------------------------------------------------------

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Give every process the weights of rank 0. Called on every rank, in the same order."""
        self.synchronize(module.modules())
        return module

    def synchronize(self, modules: Iterable[nn.Module]) -> None:
        """Give what some modules themselves have the values that it has on rank 0. Called on every rank."""
        if self.sync_module_states and self.world_size > 1:
            collectives.broadcast_(own_tensors(modules))

    # -- the step -------------------------------------------------------------------------------------------------

    def optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """Average the gradients, step, and start the computation. Called on every rank."""
        if closure is not None:
            closure = partial(self._closure_then_average, optimizer, closure)
        else:
            self.average_gradients(_parameters_of(optimizer))
        return super().optimizer_step(optimizer, step, closure)

    def _closure_then_average(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self.average_gradients(_parameters_of(optimizer))
        return loss

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the gradients of some parameters the means over all processes, in place. Called on every rank.

        What was averaged already and has not changed since, as between clipping and the step, is not sent again.
        """
        if self.world_size > 1:
            gradients = gradients_of(parameters)
            collectives.average_([g for g in gradients if self._averaged.get(g) != g._version])
            self._note_averaged(gradients)

    def _note_averaged(self, gradients: Iterable[Tensor]) -> None:
        for gradient in gradients:
            self._averaged[gradient] = gradient._version

    def clip_gradients_norm(
        self,
        module: nn.Module,
        parameters: list[nn.Parameter],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """As the contract; the gradients are averaged first."""
        self.average_gradients(parameters)
        norm = super().clip_gradients_norm(module, parameters, max_norm, norm_type, error_if_nonfinite)
        self._note_averaged(gradients_of(parameters))
        return norm

    def clip_gradients_value(
        self, module: nn.Module, parameters: list[nn.Parameter], clip_value: float
    ) -> None:
        """As the contract; the gradients are averaged first."""
        self.average_gradients(parameters)
        super().clip_gradients_value(module, parameters, clip_value)
        self._note_averaged(gradients_of(parameters))

    # -- talking to the other ranks -------------------------------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        """Wait for every rank; all have to give the same name. Called on every rank."""
        if self.world_size > 1:
            collectives.barrier(name)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """As the contract; what the other ranks pass is ignored.

        Raises:
            ConfigurationError: There is no rank ``src``.
            WrongTypeError: The object cannot be pickled; on every rank.
        """
        if not 0 <= src < self.world_size:
            raise ConfigurationError(
                f"broadcast was asked to send from rank {src}. The ranks are 0 to {self.world_size - 1}."
            )
        return obj if self.world_size == 1 else collectives.broadcast_object(obj, src)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """As the contract; ``group`` is a list of lists of ranks. With ``sync_grads``, a rank's gradient is the sum."""
        if self.world_size == 1:
            return super().all_gather(tensor, group, sync_grads)
        if sync_grads and tensor.requires_grad and torch.is_grad_enabled():
            return collectives.all_gather_with_gradient(tensor, group)
        return collectives.all_gather(tensor, group)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean", group: Any = None) -> Tensor:
        """As the contract; ``group`` is a list of lists of ranks."""
        if self.world_size == 1:
            return super().all_reduce(tensor, op, group)
        return collectives.all_reduce(tensor, op, group)


def _parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
