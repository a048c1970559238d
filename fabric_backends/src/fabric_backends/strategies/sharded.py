"""The base of strategies that keep the parameters of a model in shards, as ``DTensor`` in place of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fabric_backends.sharding import clipping, restoring
from fabric_backends.sharding import held as gradients
from fabric_backends.sharding.rebinding import Rebinding
from fabric_backends.sharding.tensors import is_sharded, local_part, share_of, whole
from fabric_backends.strategies.folders import CheckpointKind, FolderStrategy
from fabric_backends.timeouts import INIT_TIMEOUT
from fabric_core.sharded.trees import mapped


class ShardedStrategy(FolderStrategy):
    """Everything about sharded parameters but how they come to be sharded.

    Optimizers made before their model is set up go on with its shards, clipping sees the shards of all ranks, and
    checkpoints are written in shards or whole. It works for whatever mesh the parameters are spread over; a model may
    have plain parameters too, equal on all ranks. A subclass shards modules, within ``self.rebinding.watch(module)``.

    Args:
        checkpoint: As in `FolderStrategy`.
        process_group_backend, timeout, init_timeout: As in `ParallelStrategy`.

    Raises:
        OptionsError: There is no such kind of checkpoint.
    """

    forward_only = True
    reads_stored_tensors = True

    def __init__(
        self,
        *,
        checkpoint: CheckpointKind = "sharded",
        process_group_backend: str | None = None,
        timeout: float | timedelta | None = None,
        init_timeout: float | timedelta = INIT_TIMEOUT,
    ) -> None:
        super().__init__(
            checkpoint=checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
            init_timeout=init_timeout,
        )
        self.rebinding = Rebinding()
        self._models: WeakKeyDictionary[nn.Module, list[ref[Any]]] = WeakKeyDictionary()
        self._holds = False

    # -- setting up -----------------------------------------------------------------------------------------------

    def remember(self, module: nn.Module) -> None:
        """Keep an eye on a model that is sharded now. Called on every rank by `setup_module`."""
        self._models[module] = [ref(part) for part in gradients.sharded_modules(module)]
        if self._membership is not None:
            self._membership.guard(module, gradients.let_go)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Let an optimizer that was made before its model was sharded go on with the shards. Called on every rank."""
        self.rebinding.follow(optimizer)
        return optimizer

    # -- the step -------------------------------------------------------------------------------------------------

    def optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """As the contract. What a forward pass without a backward pass has gathered would be out of date: drop it."""
        for parts in self._models.values():
            for part in parts:
                gathered = part()
                if gathered is not None:
                    gathered.reshard()
        return super().optimizer_step(optimizer, step, closure)

    def hold_gradient_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context in which gradients are added up on each rank alone, whole, and not yet sharded."""
        self._holds = True
        return gradients.held(module)

    def zero_gradients(
        self, optimizer: Optimizer, zero_grad: Callable[..., None], *args: Any, **kwargs: Any
    ) -> None:
        """As the contract; also drops what `hold_gradient_sync` has held back."""
        zero_grad(*args, **kwargs)
        if self._holds:
            own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            gradients.drop_held(self._models, own)

    def scale_gradients(self, module: nn.Module, factor: float) -> None:
        """As the contract; also scales what `hold_gradient_sync` has held back."""
        gradients.reshard(module)
        for parameter in module.parameters():
            if parameter.grad is not None:
                local_part(parameter.grad).mul_(factor)
        gradients.scale_held(module, factor)

    def clip_gradients_norm(
        self,
        module: nn.Module,
        parameters: list[nn.Parameter],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """As the contract: the norm is that of the whole gradients, and equal on all ranks."""
        return clipping.clip_norm_(parameters, max_norm, norm_type, error_if_nonfinite, self.root_device)

    def clip_gradients_value(
        self, module: nn.Module, parameters: list[nn.Parameter], clip_value: float
    ) -> None:
        """As the contract."""
        clipping.clip_value_(parameters, clip_value)

    # -- state ----------------------------------------------------------------------------------------------------

    def module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The state of a module; what is sharded comes as shards, which `save_checkpoint` knows how to write."""
        gradients.reshard(module)
        return module.state_dict()

    def load_module_state_dict(
        self, module: nn.Module, state: Mapping[str, Any], strict: bool = True
    ) -> None:
        """As the contract; each rank reads only what it holds."""
        gradients.reshard(module)
        module.load_state_dict(restoring.module_state_for(module, state), strict=strict)

    def load_optimizer_state_dict(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """As the contract; each rank reads only what it holds."""
        optimizer.load_state_dict(restoring.optimizer_state_for(optimizer, state))

    def stage_checkpoint(
        self, checkpoint: Mapping[str, Any], copied: Callable[[Any], Any]
    ) -> Mapping[str, Any]:
        """Copy what this rank will write; what is to be whole is put together first. Called on every rank."""
        if self.checkpoint == "full":
            return super().stage_checkpoint(mapped(checkpoint, self._whole, Tensor), copied)
        return self.staged(checkpoint, copied, range(self.world_size))

    def save_checkpoint(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Write a folder of shards or one file, as the option ``checkpoint`` says. Called on every rank.

        Raises:
            CheckpointError: It cannot be written; on every rank. What was there before is intact.
        """
        if self.checkpoint == "full":
            super().save_checkpoint(path, mapped(checkpoint, self._whole, Tensor))
        else:
            self.save_folder(path, mapped(checkpoint, share_of, DTensor))

    def _whole(self, tensor: Tensor) -> Tensor:
        """On rank 0 the whole tensor, on the CPU if it was sharded."""
        if not is_sharded(tensor):
            return tensor
        full = whole(tensor)
        return full.cpu() if self.global_rank == 0 else full.new_empty(0)
