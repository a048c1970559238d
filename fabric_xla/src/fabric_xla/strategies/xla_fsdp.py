"""One process per XLA device, which keeps its share of parameters, gradients and optimizer state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_xla.distributed.fsdp import XlaFullyShardedDataParallel, checkpoint_module
from torch_xla.distributed.fsdp.wrap import recursive_wrap

from fabric_core.errors import OptionsError, SetupError, unknown_option
from fabric_core.materializing import materialize, warn_of_undefined
from fabric_core.sharded.rows import Row
from fabric_core.sharded.trees import mapped
from fabric_xla.clipping import clip_norm, gradients_of
from fabric_xla.gathered import drop_held, let_go, look_out, scale_held
from fabric_xla.hooks import XLA_FSDP
from fabric_xla.moving import move_modules
from fabric_xla.pending import same_random_numbers
from fabric_xla.sharded_state import (
    load_module_state_dict,
    load_optimizer_state_dict,
    module_state_dict,
    optimizer_state_dict,
    own_modules,
    parameters_of,
    put_back,
    rebind,
    renew,
    whole,
)
from fabric_xla.strategies.lazy import CheckpointKind, checkpoint_kind
from fabric_xla.strategies.xla import XLAStrategy
from fabric_xla.wrapping import classes, wrap_policy

_PARAMETERS = {
    name for name in inspect.signature(XlaFullyShardedDataParallel).parameters if not name.startswith("_")
}
_DECIDED_HERE = {
    *("module", "auto_wrapper_callable", "flatten_parameters", "shard_param_on_dim_0", "param_init_fn"),
    "coalesce_all_gather_ops",  # which torch_xla has for parameters that are divided along their first dimension only
    *("sharding_groups", "sharding_rank", "sharding_world_size"),
}


class XLAFSDPStrategy(XLAStrategy):
    """torch_xla's ``XlaFullyShardedDataParallel``.

    Checkpoints load in any number of processes and under any other strategy. The parameters of a set-up model are the
    pieces that this process has, laid flat. Optimizers may be made before, or of these.

    Args:
        auto_wrap_policy: Which parts are sharded by themselves, so that only one is whole at a time: classes of
            modules, or a function as torch_xla takes it. By default the model as a whole.
        activation_checkpointing: Classes of modules, of those that are wrapped, whose activations are computed again
            in the backward pass.
        checkpoint: How ``save`` writes. ``"sharded"``: a folder to which each process writes its pieces. ``"full"``:
            one file, for which rank 0 has to have the memory of the whole model.
        sync_module_states: As in `XLAStrategy`.
        options: Further arguments of ``XlaFullyShardedDataParallel``.

    Raises:
        OptionsError: An option is unknown to this torch_xla, or not for users to set.
    """

    spec = XLA_FSDP
    reads_stored_tensors = True

    def __init__(
        self,
        *,
        auto_wrap_policy: Any = None,
        activation_checkpointing: Any = None,
        checkpoint: CheckpointKind = "sharded",
        sync_module_states: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(sync_module_states=sync_module_states)
        self.checkpoint = checkpoint_kind(checkpoint)
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
        self._models: WeakSet[nn.Module] = WeakSet()

    # -- setting up -----------------------------------------------------------------------------------------------

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """A context in which a model is created: on the CPU, because it need not fit on the device.

        Args:
            empty_init: Create it on the meta device, where it takes no memory at all. `setup_module` then gives it
                values, part by part.
        """
        return torch.device("meta" if empty_init else "cpu")

    def move_module(self, module: nn.Module) -> None:
        """Leave the model where it is: `setup_module` moves it part by part, because it need not fit on the device."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Take the parameters apart, in place, after they have taken the values of rank 0. Called on every rank.

        Returns:
            A ``XlaFullyShardedDataParallel``.

        Raises:
            SetupError: It cannot be sharded.
        """
        _check_model(module)
        parameters = parameters_of(module)
        undefined: list[str] = []
        wrap = partial(self._shard, undefined=undefined)
        if self._policy is not None:
            recursive_wrap(
                module,
                self._policy,
                wrap,
                ignored_modules=set(),
                ignored_params=set(),
                only_wrap_children=True,
                recomputed=tuple(self._checkpointed),
            )
        wrapped = wrap(module)
        put_back(parameters, wrapped)
        look_out(wrapped)
        self._models.add(wrapped)
        warn_of_undefined(module, undefined)
        return wrapped

    def _shard(
        self, module: nn.Module, *, undefined: list[str], recomputed: tuple[Any, ...] = ()
    ) -> nn.Module:
        """Take apart what a module has beside the parts that were taken apart before it."""
        own = own_modules(module)
        undefined += materialize(reversed(own), self.root_device)
        move_modules(own, self.root_device)
        self.synchronize(own)
        renew(own)
        if isinstance(module, recomputed):
            module = checkpoint_module(module)
        with same_random_numbers():  # it computes
            wrapped: nn.Module = XlaFullyShardedDataParallel(module, **self._options)
        return wrapped

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Let the optimizer go on with the pieces. Called on every rank, in the same order."""
        rebind(optimizer)
        return super().setup_optimizer(optimizer)

    # -- the step -------------------------------------------------------------------------------------------------

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing: the backward pass has averaged each gradient and dealt it out."""

    def optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """As in `XLAStrategy`; see [Note: gathered parameters]."""
        for model in self._models:
            let_go(model)
        return super().optimizer_step(optimizer, step, closure)

    def zero_gradients(
        self, optimizer: Optimizer, zero_grad: Callable[..., None], *args: Any, **kwargs: Any
    ) -> None:
        """As the contract; also drops what `hold_gradient_sync` has held back."""
        zero_grad(*args, **kwargs)
        own = {id(piece) for group in optimizer.param_groups for piece in group["params"]}
        for model in self._models:
            drop_held(model, own)

    def scale_gradients(self, module: nn.Module, factor: float) -> None:
        """As the contract; also scales what `hold_gradient_sync` has held back."""
        super().scale_gradients(module, factor)
        scale_held(module, factor)

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
        """The state of the user's module; what is in pieces comes as rows of the whole."""
        return module_state_dict(module)

    def load_module_state_dict(
        self, module: nn.Module, state: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Restore a whole state, in place; each rank reads only what it holds. Called on every rank."""
        load_module_state_dict(module, state, strict)

    def optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer, likewise."""
        return optimizer_state_dict(optimizer)

    def load_optimizer_state_dict(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Restore a whole state, in place; each rank reads only what it holds. Called on every rank."""
        load_optimizer_state_dict(optimizer, state)

    def to_write(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """The rows of this rank; or, for one file, the whole on rank 0. Called on every rank."""
        if self.checkpoint == "full":
            checkpoint = mapped(checkpoint, whole, Row)
        return super().to_write(checkpoint)


def _check_model(module: nn.Module) -> None:
    name = type(module).__name__
    if any(hasattr(parameter, "_is_sharded") for parameter in module.parameters()):
        raise SetupError(
            f"The {name} is sharded already, by torch_xla or by another Fabric. Set up the model as it was before."
        )
    wrong = {p.dtype for p in module.parameters()} - {torch.float32}
    if wrong:
        raise SetupError(
            f"The strategy 'xla_fsdp' shards parameters in float32 only, and the {name} has some in "
            f"{', '.join(map(str, sorted(wrong, key=str)))}. Computation in bfloat16: precision='bf16-mixed'."
        )


def _check(options: Mapping[str, Any]) -> None:
    known = (_PARAMETERS | {"activation_checkpointing", "checkpoint", "sync_module_states"}) - _DECIDED_HERE
    for name in options:
        if name in _DECIDED_HERE & _PARAMETERS:
            raise OptionsError(
                f"The option {name!r} of XlaFullyShardedDataParallel is set by the strategy 'xla_fsdp' itself."
            )
        if name not in known:
            raise unknown_option("The strategy 'xla_fsdp'", name, known)
