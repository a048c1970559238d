"""The strategy: how one training is spread over processes and devices.

The base class is a complete strategy for one process on one device; one for many overrides what differs.

[Note: order of calls] Per process: ``__init__`` (options) · `attach` (parts, no device touched) · `store` (plans are
compared) · `connect` (process group) · `setup` … verbs … · `teardown`. With a launcher, everything up to `attach` also
happens in the parent, so neither ``__init__`` nor `attach` may touch a device or open anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fabric_core.contracts.accelerator import Accelerator
from fabric_core.contracts.agreement import Agreement
from fabric_core.contracts.checkpoint_io import CheckpointIO
from fabric_core.contracts.cluster_environment import ClusterEnvironment
from fabric_core.contracts.part import Part
from fabric_core.contracts.precision import Precision
from fabric_core.contracts.store import Store
from fabric_core.specs import StrategySpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["ReduceOp", "Strategy", "Surroundings"]

ReduceOp = Literal["mean", "sum", "min", "max", "product"]
"""How `Strategy.all_reduce` combines the values of the ranks."""


@dataclass(frozen=True)
class Surroundings:
    """What a strategy works with, fixed before any device is touched.

    Attributes:
        accelerator, precision, cluster_environment, checkpoint_io: The other parts of the plan.
        devices: The devices of this node, one per process for a strategy with a process per device.
        processes_per_node, num_nodes: The size of the job.
    """

    accelerator: Accelerator
    precision: Precision
    cluster_environment: ClusterEnvironment
    checkpoint_io: CheckpointIO
    devices: tuple[torch.device, ...]
    processes_per_node: int
    num_nodes: int


class Strategy(Part):
    """One process on one device; the base of every other strategy."""

    spec_type = StrategySpec

    joint_setup: bool = False
    """Whether an optimizer has to be given to ``setup`` together with its model."""

    owns_backward: bool = False
    """Whether a bare ``loss.backward()`` would bypass the strategy and give wrong gradients."""

    forward_only: bool = False
    """Whether a set-up model may compute in its forward pass only although `setup_module` returned the module itself:
    because it was changed in place, and its parameters are whole only then."""

    reads_stored_tensors: bool = False
    """Whether `load_module_state_dict` and `load_optimizer_state_dict` take `StoredTensor` in a state, of which each
    rank then reads what it holds. Otherwise they get whole tensors."""

    surroundings: Surroundings
    """The other parts, the devices and the size of the job. Set by `attach`."""

    _agreement: Agreement | None = None

    # -- who am I -------------------------------------------------------------------------------------------------

    def attach(self, surroundings: Surroundings) -> None:
        """Learn what there is to work with. Called once, on every rank and in the parent; touches no device."""
        self.surroundings = surroundings

    @property
    def root_device(self) -> torch.device:
        """The device of this process (the first one, when it drives several)."""
        return self.surroundings.devices[self.local_rank]

    @property
    def world_size(self) -> int:
        """How many processes the job has."""
        return 1

    @property
    def global_rank(self) -> int:
        """The number of this process among all."""
        return 0

    @property
    def local_rank(self) -> int:
        """The number of this process among those of its node."""
        return 0

    @property
    def node_rank(self) -> int:
        """The number of this node."""
        return 0

    # -- coming and going -----------------------------------------------------------------------------------------

    @property
    def store(self) -> Store | None:
        """A store that all ranks share, there before `connect`; ``None`` when there is one process only.

        Its keys are unused, also when a training before has used the same server: the verbs count from 1 again.
        """
        return None

    @property
    def absence_timeout(self) -> float:
        """How many seconds ranks that have come to ``save``, ``load`` and the like wait for one that has not."""
        return 600.0

    @property
    def agreement(self) -> Agreement:
        """How the ranks agree on files. Reading it the first time waits for every rank, as `store` does."""
        if self._agreement is None:
            self._agreement = Agreement(self.store, self.global_rank, self.world_size, self.absence_timeout)
        return self._agreement

    def teardown(self) -> None:
        """Leave the other ranks. Called on every rank; safe to call twice."""
        super().teardown()
        self._agreement = None

    def connect(self) -> None:
        """Make the device current and join the other ranks. Called on every rank, once."""
        self.surroundings.accelerator.setup_device(self.root_device)

    # -- setting up -----------------------------------------------------------------------------------------------

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """A context in which a model is created on the right device. Called on every rank.

        Args:
            empty_init: Leave the weights uninitialised, because they will be loaded. ``None`` lets the strategy choose.
        """
        import torch

        from fabric_core.empty_init import skip_init

        return _both(torch.device(self.root_device), skip_init() if empty_init else nullcontext())

    def move_module(self, module: nn.Module) -> None:
        """Move a model to the device, in place. Called on every rank by ``setup``."""
        module.to(self.root_device)

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Make a model ready for training. Called on every rank, in the same order.

        Every rank begins with the weights of rank 0, whatever its own were.

        Returns:
            What forward passes go through; it computes what ``module`` computes.
        """
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Make an optimizer ready. Called on every rank, in the same order."""
        return optimizer

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        """Make a model, its optimizers and a scheduler ready together. Called on every rank, in the same order.

        Args:
            module: The user's model, on the device already.
            optimizers: Those of its parameters.
            scheduler: Of a learning rate; ``None`` when the strategy need not know it.

        Returns:
            The same three, ready. A strategy that makes optimizers or a scheduler itself returns these as well.
        """
        return (
            self.setup_module(module),
            [self.setup_optimizer(optimizer) for optimizer in optimizers],
            scheduler,
        )

    @property
    def sampler_arguments(self) -> dict[str, int]:
        """``num_replicas`` and ``rank`` of the data that this process sees; one replica means that nothing is split."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def loader_device(self) -> torch.device | None:
        """Where batches are moved to; ``None`` when the strategy moves them itself."""
        return self.root_device

    def move_batches(self, batches: Iterator[Any], move: Callable[[Any], Any]) -> Iterator[Any]:
        """Bring the batches of one loop to the device. Called on every rank, at the start of each loop.

        Args:
            batches: As the loader gives them.
            move: Moves one batch to `loader_device`.

        Returns:
            The same batches in the same order, there. May run ahead of the loop.
        """
        return self.surroundings.accelerator.move_batches(batches, move, self.root_device)

    # -- the step -------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Compute gradients of a loss that is scaled already. Called on every rank.

        Args:
            loss: Scalar, or of any shape when ``gradient`` is among the arguments.
            module: What `setup_module` returned, when it is known.
            args, kwargs: For ``torch.Tensor.backward``.
        """
        torch_backward: Any = loss.backward
        torch_backward(*args, **kwargs)

    def optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """Step one optimizer, through the precision. Called on every rank. Arguments as `Precision.optimizer_step`."""
        return self.surroundings.precision.optimizer_step(optimizer, step, closure)

    def hold_gradient_sync(self, module: nn.Module) -> AbstractContextManager[Any] | None:
        """A context in which forward and backward passes do not synchronise gradients between ranks.

        Called on every rank, by ``Fabric.no_backward_sync`` and by `accumulation_context`.

        Args:
            module: What `setup_module` returned.

        Returns:
            ``None`` when the strategy cannot do that, and every backward pass synchronises.
        """
        return nullcontext()

    def accumulation_context(self, module: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """What one micro-batch of ``Fabric.accumulate`` runs in. Called on every rank, for each model of the window.

        Args:
            module: What `setup_module` returned.
            is_last: Whether this micro-batch is the last one of its window, after which optimizers step.
        """
        held = None if is_last else self.hold_gradient_sync(module)
        return nullcontext() if held is None else held

    def zero_gradients(
        self, optimizer: Optimizer, zero_grad: Callable[..., None], *args: Any, **kwargs: Any
    ) -> None:
        """Drop the gradients of one optimizer. Called on every rank by the ``zero_grad`` of a set-up optimizer.

        Args:
            optimizer: What `setup_optimizer` returned.
            zero_grad: Its own ``zero_grad``.
            args, kwargs: For ``zero_grad``.
        """
        zero_grad(*args, **kwargs)

    def scale_gradients(self, module: nn.Module, factor: float) -> None:
        """Multiply the gradients collected so far, in place. Called on every rank.

        Args:
            module: What `setup_module` returned.
            factor: What each gradient is multiplied with.
        """
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def clip_gradients_norm(
        self,
        module: nn.Module,
        parameters: list[nn.Parameter],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip the joint norm of the gradients, in place. Called on every rank, after unscaling.

        Args:
            module: What `setup_module` returned.
            parameters: The parameters of the optimizer that is about to step.
            max_norm: The largest norm that is left alone.
            norm_type: The p of the p-norm; may be ``inf``.
            error_if_nonfinite: Raise when the norm is NaN or infinite.

        Returns:
            The norm before clipping, over all ranks: a plain 0-dimensional tensor.

        Raises:
            RuntimeError: The norm is not finite, and ``error_if_nonfinite`` is set.
        """
        import torch

        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)

    def clip_gradients_value(
        self, module: nn.Module, parameters: list[nn.Parameter], clip_value: float
    ) -> None:
        """Clamp every element of the gradients, in place. Called on every rank, after unscaling.

        Args:
            module: What `setup_module` returned.
            parameters: The parameters of the optimizer that is about to step.
            clip_value: Elements are clamped to ``[-clip_value, clip_value]``.
        """
        import torch

        torch.nn.utils.clip_grad_value_(parameters, clip_value)

    # -- talking to the other ranks -------------------------------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        """Wait for every rank. Called on every rank.

        Args:
            name: What the ranks wait for, for messages.
        """

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Send an object (tensors, numbers, anything that pickles) from rank ``src``. Called on every rank.

        Returns:
            The object of rank ``src``.
        """
        return obj

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        r"""Collect a tensor of the same shape from every rank. Called on every rank (of ``group``).

        Args:
            tensor: Any shape S, on `root_device`.
            group: A process group; all ranks by default.
            sync_grads: Let gradients flow back to every rank.

        Returns:
            Shape (ranks, \*S), in rank order.
        """
        return tensor.unsqueeze(0)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "mean", group: Any = None) -> Tensor:
        """Reduce a tensor of the same shape over every rank. Called on every rank (of ``group``).

        Args:
            tensor: Any shape, on `root_device`; it is not changed. Floating point when ``op`` is ``"mean"``.
            op: How values are combined.
            group: A process group; all ranks by default.

        Returns:
            The same shape and dtype, equal on every rank.
        """
        return tensor.clone()

    # -- state ----------------------------------------------------------------------------------------------------
    #
    # [Note: state of one's own] What the two ``…_state_dict`` methods return may hold objects that only this strategy
    # understands: shards of tensors, the handle of an engine. They reach its `save_checkpoint` inside of what ``save``
    # collected. Likewise `load_checkpoint` may return objects that are read when they are restored; those that nobody
    # asked for are turned into plain values by `plain_value`. A checkpoint in shards (fabric_core.sharded) comes with
    # `StoredTensor` objects in the place of what lies in shards, under any strategy that does not read it otherwise.

    def module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The state of the user's module, keys without prefix. Called on every rank by ``save``."""
        return module.state_dict()

    def load_module_state_dict(
        self, module: nn.Module, state: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Restore what `module_state_dict` gave, in place. Called on every rank."""
        module.load_state_dict(state, strict=strict)

    def optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer that `setup_optimizer` was given. Called on every rank by ``save``."""
        return optimizer.state_dict()

    def load_optimizer_state_dict(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Restore what `optimizer_state_dict` gave, in place. Called on every rank."""
        optimizer.load_state_dict(dict(state))

    def save_checkpoint(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Write what ``save`` collected. Called on every rank; returns on every rank when it is on disk.

        Raises:
            CheckpointError: It cannot be written; on every rank.
        """
        self.surroundings.checkpoint_io.save(path, checkpoint)

    def stage_checkpoint(
        self, checkpoint: Mapping[str, Any], copied: Callable[[Any], Any]
    ) -> Mapping[str, Any] | None:
        """Make what this rank will write independent of the training. Called on every rank by ``save(wait=False)``.

        Afterwards `save_checkpoint` is called with the result, in another thread on every rank, while the training goes
        on in this one. It must use no collectives there, which would come between those of the training; for ranks that
        have to agree there is the `store`, whose keys and counts the two threads must not share. What needs collectives
        is done here. No other checkpoint is saved or loaded, and `teardown` is not called, before the thread is done.

        Args:
            checkpoint: What ``save`` collected.
            copied: Copies anything, tensors of any sort and all; see [Note: state of one's own]. Tensors are on the CPU
                then; of those that are spread over ranks, the part of this rank.

        Returns:
            What is written, or an empty mapping on a rank that writes nothing. ``None``, on every rank, when
            `save_checkpoint` cannot work so: then it is called at once, and the training waits.

        Raises:
            CheckpointError: It cannot be copied; on every rank.
        """
        return None

    def load_checkpoint(self, path: Path, *, weights_only: bool = True) -> dict[str, Any]:
        """Read what `save_checkpoint` of any strategy wrote: one file, or a folder of shards. Called on every rank.

        Errors as `CheckpointIO.load`.
        """
        from fabric_core.sharded.reading import read_checkpoint

        load = partial(self.surroundings.checkpoint_io.load, weights_only=weights_only)
        checkpoint: dict[str, Any] = read_checkpoint(path, load)
        return checkpoint

    def plain_value(self, value: Any) -> Any:
        """Make plain what nobody else restores; see [Note: state of one's own]. Called on every rank by ``load``.

        Args:
            value: What of `load_checkpoint` replaces a value of the user's, is given to an object of theirs with
                ``load_state_dict``, or was not asked for; the whole of it when nothing was.

        Returns:
            The same as plain values, on the CPU.
        """
        from fabric_core.sharded.stored import plain

        return plain(value)


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield
