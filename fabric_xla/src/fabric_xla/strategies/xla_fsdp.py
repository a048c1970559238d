"""One process per XLA device, which keeps its share of parameters, gradients and optimizer state."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel, checkpoint_module

from fabric_core.errors import OptionsError, SetupError, unknown_option
from fabric_xla.clipping import clip_norm, gradients_of
from fabric_xla.hooks import XLA_FSDP
from fabric_xla.sharded_state import (
    ShardedModule,
    load_optimizer_state_dict,
    optimizer_state_dict,
    rebind,
)
from fabric_xla.strategies.xla import XLAStrategy
from fabric_xla.wrapping import classes, wrap_policy

_PARAMETERS = {
    name for name in inspect.signature(XlaFullyShardedDataParallel).parameters if not name.startswith("_")
}
_DECIDED_HERE = {
    *("module", "auto_wrapper_callable", "flatten_parameters", "shard_param_on_dim_0"),
    *("sharding_groups", "sharding_rank", "sharding_world_size"),
}


class XLAFSDPStrategy(XLAStrategy):
    """torch_xla's ``XlaFullyShardedDataParallel``.

    Checkpoints hold the whole model and the whole optimizer state, as without sharding, and load in any number of
    processes and under any other strategy. The parameters of a set-up model are in pieces: look at them through a
    checkpoint, and give optimizers to ``setup`` together with their model.

    Args:
        auto_wrap_policy: Which parts are sharded by themselves, so that only one is whole at a time: classes of
            modules, or a function as torch_xla takes it. By default the model as a whole.
        activation_checkpointing: Classes of modules, of those that are wrapped, whose activations are computed again
            in the backward pass.
        sync_module_states: As in `XLAStrategy`.
        options: Further arguments of ``XlaFullyShardedDataParallel``.

    Raises:
        OptionsError: An option is unknown to this torch_xla, or not for users to set.
    """

    spec = XLA_FSDP
    joint_setup = True

    def __init__(
        self,
        *,
        auto_wrap_policy: Any = None,
        activation_checkpointing: Any = None,
        sync_module_states: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(sync_module_states=sync_module_states)
        _check(options)
        self._policy = wrap_policy("auto_wrap_policy", auto_wrap_policy)
        self._checkpointed = (
            set()
            if activation_checkpointing is None
            else classes("activation_checkpointing", activation_checkpointing)
        )
        self._options = options

    def connect(self) -> None:
        """As in `XLAStrategy`."""
        super().connect()
        self._sharded: WeakKeyDictionary[nn.Module, ShardedModule] = WeakKeyDictionary()

    # -- setting up -----------------------------------------------------------------------------------------------

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Take the parameters apart, in place. Called on every rank, in the same order.

        Returns:
            A ``XlaFullyShardedDataParallel``.

        Raises:
            SetupError: The parameters are not in float32, which is all that torch_xla shards.
        """
        wrong = {p.dtype for p in module.parameters()} - {torch.float32}
        if wrong:
            raise SetupError(
                f"The strategy 'xla_fsdp' shards parameters in float32 only, and the {type(module).__name__} has some "
                f"in {', '.join(map(str, sorted(wrong, key=str)))}. Computation in bfloat16: precision='bf16-mixed'."
            )
        module = super().setup_module(module)
        names = ShardedModule.before(module)
        wrapped: nn.Module = XlaFullyShardedDataParallel(
            module,
            auto_wrap_policy=self._policy,
            auto_wrapper_callable=self._wrap if self._checkpointed else None,
            **self._options,
        )
        self._sharded[module] = names.after()
        return wrapped

    def _wrap(self, module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if isinstance(module, tuple(self._checkpointed)):
            module = checkpoint_module(module)
        wrapped: nn.Module = XlaFullyShardedDataParallel(module, *args, **kwargs)
        return wrapped

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Let the optimizer go on with the pieces. Called on every rank, in the same order."""
        rebind(optimizer)
        return super().setup_optimizer(optimizer)

    # -- the step -------------------------------------------------------------------------------------------------

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing: the backward pass has averaged each gradient and dealt it out."""

    def hold_gradient_sync(self, module: nn.Module) -> AbstractContextManager[Any] | None:
        """A context in which whole gradients are added up on each rank alone, in more memory. Called on every rank."""
        held: AbstractContextManager[Any] | None = (
            module.no_sync() if isinstance(module, XlaFullyShardedDataParallel) else nullcontext()
        )
        return held

    def accumulation_context(self, module: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Nothing to hold: the pieces of gradients are added up, and whole ones never kept."""
        return nullcontext()

    def clip_gradients_norm(
        self,
        module: nn.Module,
        parameters: list[nn.Parameter],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """As the contract; the norm is that of the whole gradients."""
        return clip_norm(
            gradients_of(parameters),
            self.root_device,
            max_norm,
            norm_type,
            error_if_nonfinite,
            combine=self.all_reduce,
        )

    # -- state ----------------------------------------------------------------------------------------------------

    def module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The whole state of the user's module, on rank 0; empty elsewhere. Called on every rank by ``save``."""
        sharded = self._sharded.get(module)
        return super().module_state_dict(module) if sharded is None else sharded.state_dict()

    def load_module_state_dict(
        self, module: nn.Module, state: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Restore a whole state, in place. Called on every rank."""
        sharded = self._sharded.get(module)
        if sharded is None:
            super().load_module_state_dict(module, state, strict)
        else:
            sharded.load_state_dict(state, strict)

    def optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of an optimizer, on rank 0; empty elsewhere. Called on every rank by ``save``."""
        return optimizer_state_dict(optimizer)

    def load_optimizer_state_dict(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Restore a whole state, in place. Called on every rank."""
        load_optimizer_state_dict(optimizer, state)


def _check(options: Mapping[str, Any]) -> None:
    known = (_PARAMETERS | {"activation_checkpointing", "sync_module_states"}) - _DECIDED_HERE
    for name in options:
        if name in _DECIDED_HERE & _PARAMETERS:
            raise OptionsError(
                f"The option {name!r} of XlaFullyShardedDataParallel is set by the strategy 'xla_fsdp' itself."
            )
        if name not in known:
            raise unknown_option("The strategy 'xla_fsdp'", name, known)
