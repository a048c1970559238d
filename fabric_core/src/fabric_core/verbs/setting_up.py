"""``setup`` and its relatives: the user's objects, made ready."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fabric_core.data import seed as seeds
from fabric_core.data.collections import move_to_device
from fabric_core.errors import SetupError
from fabric_core.setting_up import check_model, check_not_wrapped, check_optimizer, without_compile
from fabric_core.verbs.reporting import Reporting
from fabric_core.wrappers.face import unwrap
from fabric_core.wrappers.guard import watch
from fabric_core.wrappers.module import FabricModule, wrap_module
from fabric_core.wrappers.optimizer import wrap_optimizer

T = TypeVar("T")


class SettingUp(Reporting):
    """Models, optimizers and loaders, made ready for the strategy; contexts to create them in."""

    def setup(
        self,
        model: nn.Module,
        *optimizers: Optimizer,
        scheduler: Any = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any:
        """Make a model and its optimizers ready. Called on every rank, in the same order.

        What comes back is an instance of the same classes, with the same attributes. A compiled model is compiled
        again around the strategy.

        Args:
            model: The model. Several models are set up one after the other.
            optimizers: Any number of optimizers of its parameters.
            scheduler: A learning-rate scheduler, for strategies that have to replace it.
            move_to_device: Move the parameters to `device`.

        Returns:
            The model; with optimizers a tuple (model, optimizers…), with a scheduler that at its end.

        Raises:
            SetupError: Not launched yet, or something was set up already.
        """
        self._require_launched("setup")
        check_model("setup", model)
        for optimizer in optimizers:
            check_optimizer("setup", optimizer)
        original, recompile = without_compile(model, _reapply_compile)
        given = (original, *optimizers)
        self._set_up.check("setup", *given)
        original = self._parts.precision.convert_module(original)
        if move_to_device:
            self.strategy.move_module(original)
        forward_module, ready, scheduler = self.strategy.setup_module_and_optimizers(
            original, list(optimizers), scheduler
        )
        watch(original, self._guard)
        guards = self.strategy.forward_only or forward_module is not original
        wrapped = wrap_module(
            original, forward_module, self._parts.precision, recompile, guards_methods=guards
        )
        self._set_up.note(*given)
        self.call("on_after_setup", fabric=self, module=wrapped)
        rest = [self._wrap_optimizer(optimizer) for optimizer in ready]
        rest += [] if scheduler is None else [scheduler]
        return (wrapped, *rest) if rest else wrapped

    def setup_module(
        self, module: nn.Module, move_to_device: bool = True, _reapply_compile: bool = True
    ) -> FabricModule:
        """Make a model ready without an optimizer, for inference or with `setup_optimizers`. As `setup`."""
        self._require_launched("setup_module")
        wrapped: FabricModule = self.setup(
            module, move_to_device=move_to_device, _reapply_compile=_reapply_compile
        )
        return wrapped

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Make optimizers ready apart from their model, after `setup_module`. Called on every rank.

        Returns:
            The optimizer, or a tuple of several.

        Raises:
            SetupError: Not launched yet, set up already, or the strategy needs model and optimizers together.
        """
        if self.strategy.joint_setup:
            raise SetupError(
                f"The strategy {self.plan.strategy.name!r} sets up a model and its optimizers together; "
                "setup_optimizers() does it apart. Call fabric.setup(model, *optimizers)."
            )
        self._require_launched("setup_optimizers")
        for optimizer in optimizers:
            check_optimizer("setup_optimizers", optimizer)
        self._set_up.check("setup_optimizers", *optimizers)
        wrapped = tuple(
            self._wrap_optimizer(self.strategy.setup_optimizer(optimizer)) for optimizer in optimizers
        )
        self._set_up.note(*optimizers)
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def setup_dataloaders(
        self,
        *dataloaders: DataLoader[Any],
        replace_sampler: bool = True,
        use_distributed_sampler: bool | None = None,
        move_to_device: bool = True,
    ) -> Any:
        """Make data loaders ready: each rank sees its share, on its device. Called on every rank, in the same order.

        Args:
            dataloaders: ``DataLoader`` objects, or of a class derived from it.
            replace_sampler: Split the data between the ranks. Samplers and batch samplers of your own are kept, and
                what they yield is dealt out. The epoch is announced to samplers and dataset at each loop.
            use_distributed_sampler: The same, under the name that it has elsewhere.
            move_to_device: Move each batch to `device`: tensors in dictionaries, lists, tuples, dataclasses…

        Returns:
            The loader, or a list of several.

        Raises:
            SetupError: Not launched yet, or set up already.
            WrongTypeError: Not a ``DataLoader``.
        """
        from fabric_core.data.loader import wrap_loader

        self._require_launched("setup_dataloaders")
        check_not_wrapped("setup_dataloaders", *dataloaders)
        strategy = self.strategy
        wrapped = [
            wrap_loader(
                loader,
                device=strategy.loader_device if move_to_device else None,
                transfer=strategy.move_batches,
                **strategy.sampler_arguments,
                seed=seeds.current_seed() or 0,
                tracker=self._tracker,
                shard=replace_sampler if use_distributed_sampler is None else use_distributed_sampler,
                seed_workers=seeds.workers_are_seeded(),
            )
            for loader in dataloaders
        ]
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[None]:
        """A context in which a model is created on `device`, in the dtype of the precision.

        Args:
            empty_init: Leave the weights uninitialised, because a checkpoint will be loaded. ``None`` leaves the
                choice to the strategy.
        """
        self._require_launched("init_module")
        return self._init_context(self.strategy.module_init_context(empty_init))

    def init_tensor(self) -> AbstractContextManager[None]:
        """A context in which tensors are created on `device`, in the dtype of the precision."""
        self._require_launched("init_tensor")
        return self._init_context(self.device)

    def to_device(self, obj: T) -> T:
        """Move a model (in place), a tensor or a collection of tensors to `device`, and return it."""
        self._require_launched("to_device")
        if isinstance(obj, nn.Module):
            self.strategy.move_module(unwrap(obj))
            return obj
        return move_to_device(obj, self.device)

    def _wrap_optimizer(self, optimizer: Optimizer) -> Any:
        self._parts.precision.setup_optimizer(optimizer)
        return wrap_optimizer(optimizer, self.strategy, self._accumulation, self._after_step)

    @contextmanager
    def _init_context(self, outer: Any) -> Generator[None, None, None]:
        with outer, self._parts.precision.init_context():
            yield
