"""Sharded data parallel: as ``ddp``, but each rank keeps the optimizer's state for its part of the parameters only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_backends.hooks import DDP_SHARDED, DDP_SHARDED_FAIRSCALE
from fabric_backends.precisions.sharded import ShardedMixedPrecision
from fabric_backends.strategies.ddp import DDPStrategy
from fabric_backends.strategies.zero.part import Part
from fabric_backends.strategies.zero.torch_engine import TorchEngine
from fabric_core.data.collections import map_tensors
from fabric_core.errors import (
    BrokenPluginError,
    MissingRequirementError,
    OptionsError,
    UnsupportedError,
    listing,
)
from fabric_core.requirements import missing_requirements

if TYPE_CHECKING:
    from fabric_backends.strategies.zero.fairscale_engine import FairScaleEngine

EngineName = Literal["auto", "fairscale", "torch"]


class ShardedDDPStrategy(DDPStrategy):
    """Every rank holds the whole model, steps a part of the parameters, and sends those to the others.

    So of the optimizer's state, a rank keeps its part. With FairScale's engine it keeps its part of the gradients, too.
    Optimizers and schedulers are the user's own, made as ever; see [Note: stepped in parts]. Checkpoints are whole, and
    the same as those of ``ddp``.

    Args:
        engine: ``"fairscale"`` or ``"torch"``. ``"auto"`` takes FairScale's where it is installed.
        broadcast_buffers: As ``ddp``.
        options: Further ones of ``ddp``. FairScale's engine has no use for those that say how
            ``DistributedDataParallel`` works, and refuses a ``comm_hook``, with which ``"auto"`` takes PyTorch's.

    Raises:
        OptionsError: As ``ddp``; or there is no such engine.
    """

    spec = DDP_SHARDED
    joint_setup = True

    def __init__(
        self, *, engine: EngineName = "auto", broadcast_buffers: bool = True, **options: Any
    ) -> None:
        super().__init__(broadcast_buffers=broadcast_buffers, **options)
        if engine not in get_args(EngineName):
            raise OptionsError(f"There is no engine={engine!r}. It takes {listing(get_args(EngineName))}.")
        if engine == "fairscale" and self.compresses:
            raise OptionsError("FairScale's engine takes no comm_hook. Use engine='torch', or leave it out.")
        self._asked = engine
        self._broadcast_buffers = broadcast_buffers

    # What there is from `connect` on; before that, the strategy may travel to another process.
    _engine: TorchEngine
    _parts: WeakKeyDictionary[Optimizer, Part]

    @property
    def engine(self) -> str:
        """The engine's name. Before `connect`, what was asked for."""
        return self._asked if self._membership is None else self._engine.name

    @property
    def owns_backward(self) -> bool:  # type: ignore[override]
        """FairScale's engine has to know of every backward pass, and may be chosen by ``"auto"``."""
        return self._asked != "torch"

    # -- coming and going -----------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Join the process group, and agree on the engine. Called on every rank, once.

        Raises:
            MissingRequirementError: FairScale is not installed on this rank, or too old.
            BrokenPluginError: It is, but cannot be imported.
            UnsupportedError: The precision was passed in code, and scales losses in a way that knows no other ranks.
        """
        if self._asked != "torch" and not self.compresses:
            with suppress(Exception):  # which `_chosen_engine` will meet again, and explain
                _import_fairscale()  # before there is a group that defaults of its arguments would keep
        super().connect()
        try:
            self._engine = self._chosen_engine()
        except Exception:
            super().teardown()
            raise
        self._parts = WeakKeyDictionary()

    def _chosen_engine(self) -> TorchEngine:
        chosen = self._asked
        if chosen == "auto":
            able = not (self.compresses or missing_requirements(DDP_SHARDED_FAIRSCALE))
            chosen = self.broadcast("fairscale" if able else "torch")
        return _fairscale(self, self._broadcast_buffers) if chosen == "fairscale" else TorchEngine(self)

    def teardown(self) -> None:
        """Release models and engines, then leave the process group. Called on every rank; safe to call twice."""
        if hasattr(self, "_engine"):
            self._engine.release()
            self._engine = TorchEngine(self)
            for part in self._parts.values():
                part.release()
            self._parts.clear()
        super().teardown()

    # -- setting up -----------------------------------------------------------------------------------------------

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Divide the optimizers between the ranks. Called on every rank, in the same order.

        Returns:
            What forward passes go through, and the user's own optimizers and scheduler.

        Raises:
            UnsupportedError: An optimizer cannot be stepped in parts, or as ``ddp``.
        """
        if not optimizers:
            return self.setup_module(module), [], scheduler
        parts = [self._engine.shard(optimizer) for optimizer in optimizers]
        wrapped = self._engine.wrap(module, parts)
        self._parts.update(zip(optimizers, parts, strict=True))
        return wrapped, optimizers, scheduler

    # -- the step -------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """As the contract."""
        with self._engine.backward() or nullcontext():
            super().backward(loss, module, *args, **kwargs)

    def hold_gradient_sync(self, module: nn.Module) -> Any:
        """A context in which gradients are added up on each rank alone. Called on every rank."""
        return self._engine.hold(module)

    def optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """Step the part of this rank, and learn the parameters of all others. Called on every rank."""
        part = self._parts.get(optimizer)
        if part is not None:
            step = partial(part.take_step, optimizer, step)
        return super().optimizer_step(optimizer, step, closure)

    def clip_gradients_norm(
        self,
        module: nn.Module,
        parameters: list[nn.Parameter],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """As the contract."""
        parts = list(self._parts.values())
        return self._engine.clip_norm(parts, module, parameters, max_norm, norm_type, error_if_nonfinite)

    # -- state ----------------------------------------------------------------------------------------------------

    def optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of an optimizer on rank 0, as the optimizer itself would give it; empty elsewhere."""
        state: dict[str, Any] = optimizer.state_dict()
        own = map_tensors(lambda tensor: tensor.detach().cpu(), state["state"])
        is_zero = self.global_rank == 0
        parts: list[Any] | None = [None] * self.world_size if is_zero else None
        dist.gather_object(own, parts)
        if parts is None:
            return {}
        found = {key: value for part in parts for key, value in part.items()}
        order = [key for group in state["param_groups"] for key in group["params"] if key in found]
        return {**state, "state": {key: found[key] for key in [*order, *(found.keys() - set(order))]}}

    def load_optimizer_state_dict(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Restore what of a whole state belongs to this rank. Called on every rank."""
        part = self._parts.get(optimizer)
        super().load_optimizer_state_dict(
            optimizer, state if part is None else part.own_state(optimizer, state)
        )


def _fairscale(strategy: ShardedDDPStrategy, broadcast_buffers: bool) -> TorchEngine:
    missing = missing_requirements(DDP_SHARDED_FAIRSCALE)
    if missing:
        raise MissingRequirementError(
            f"FairScale's engine needs {listing(missing)}, which is not installed here. Install it on every node (pip "
            "install 'fabric-backends[fairscale]'), or use engine='torch'."
        )
    precision = strategy.surroundings.precision
    if precision.scales_loss and not isinstance(precision, ShardedMixedPrecision):
        raise UnsupportedError(
            f"A {type(precision).__name__} was passed, which skips a step by the gradients of its own rank; with "
            "FairScale's engine each rank has others. Pass precision='16-mixed', or an instance of "
            "fabric_backends.precisions.sharded:ShardedMixedPrecision."
        )
    try:
        engine = _import_fairscale()
    except Exception as error:  # whatever a broken installation raises
        raise BrokenPluginError(
            f"FairScale is installed, but cannot be imported ({type(error).__name__}: {error}). Install it anew, or "
            "use engine='torch'."
        ) from error
    return engine(strategy, broadcast_buffers)


def _import_fairscale() -> type[FairScaleEngine]:
    from fabric_backends.strategies.zero.fairscale_engine import FairScaleEngine

    return FairScaleEngine
