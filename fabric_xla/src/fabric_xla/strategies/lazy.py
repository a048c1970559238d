"""The base of the XLA strategies: what follows from tensors that are computed late.

[Note: lazy tensors] An operation on an XLA device is only written down. `fabric_xla.pending.compute` compiles what was
written down since the last one, the first time that it looks like this, and starts it; the host goes on meanwhile. It
is called where a step ends: after an optimizer has stepped, after each batch of a loader that was set up, and before
values are fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch_xla
from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.background import in_background
from fabric_core.contracts.folder import save_folder
from fabric_core.contracts.strategy import Strategy
from fabric_core.errors import OptionsError, SetupError, did_you_mean
from fabric_core.sharded.rows import Row
from fabric_core.sharded.trees import mapped
from fabric_xla.clipping import clip_norm, gradients_of
from fabric_xla.moving import move_modules, move_state, on_cpu
from fabric_xla.pending import compute

CheckpointKind = Literal["sharded", "full"]


def checkpoint_kind(asked: Any) -> CheckpointKind:
    """The option ``checkpoint``.

    Raises:
        OptionsError: There is no such kind.
    """
    kinds = get_args(CheckpointKind)
    if asked not in kinds:
        raise OptionsError(
            f"The option checkpoint is {asked!r}.{did_you_mean(str(asked), kinds)} It takes 'sharded' or 'full'."
        )
    kind: CheckpointKind = asked
    return kind


class LazyStrategy(Strategy):
    """One process, whose tensors are computed when a step ends."""

    def connect(self) -> None:
        """Make the device current, and see that gradients can be computed on it. Called on every rank, once.

        Raises:
            SetupError: They cannot, because of what this process did before.
        """
        super().connect()
        _try_backward(self.root_device)

    # -- setting up -----------------------------------------------------------------------------------------------

    def move_module(self, module: nn.Module) -> None:
        """Move a model to the device; its parameters stay the same objects. Called on every rank by ``setup``."""
        move_modules(module.modules(), self.root_device)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Bring what the optimizer has collected so far to the device. Called on every rank, in the same order."""
        move_state(optimizer)
        return optimizer

    def move_batches(self, batches: Iterator[Any], move: Callable[[Any], Any]) -> Iterator[Any]:
        """Bring the batches of one loop to the device. Called on every rank, at the start of each loop.

        After each batch, what the loop has asked for is started; the device computes while the next batch is loaded
        and sent. Batches are not read ahead, so that whatever draws random numbers draws them in the loop's order.
        """
        for batch in batches:
            yield self.upload(batch, move)
            compute()

    def upload(self, batch: Any, move: Callable[[Any], Any]) -> Any:
        """Bring one batch to the device."""
        return move(batch)

    # -- the step -------------------------------------------------------------------------------------------------

    def optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        """Step one optimizer, and start the computation. Called on every rank. Arguments as in the contract."""
        result = super().optimizer_step(optimizer, step, closure)
        compute()
        return result

    def hold_gradient_sync(self, module: nn.Module) -> AbstractContextManager[Any] | None:
        """``None``: nothing is synchronised before the optimizer steps, so there is nothing to hold back."""
        return None

    def clip_gradients_norm(
        self,
        module: nn.Module,
        parameters: list[nn.Parameter],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """As the contract. ``error_if_nonfinite=False`` spares the device a halt in the middle of the step."""
        return clip_norm(gradients_of(parameters), self.root_device, max_norm, norm_type, error_if_nonfinite)

    # -- state ----------------------------------------------------------------------------------------------------

    checkpoint: CheckpointKind = "full"
    """Whether `save_checkpoint` writes one file, on rank 0, or a folder of shards, on every rank."""

    def to_write(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """What this rank writes of what ``save`` collected; may use collectives. Called on every rank.

        Returns:
            Tensors on any device, and for ``"sharded"`` `Row` and `Share` in the place of what is spread.
        """
        compute()
        return checkpoint if self.global_rank == 0 or self.checkpoint == "sharded" else {}

    def writes_folder(self, checkpoint: Mapping[str, Any]) -> bool:
        """Whether what `to_write` gave goes into a folder."""
        return self.checkpoint == "sharded"

    def save_checkpoint(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Write what ``save`` collected, from the CPU: it can be read where there is no XLA device.

        Called on every rank; returns on every rank when it is on disk.

        Raises:
            CheckpointError: It cannot be written; on every rank. What was there before is intact.
        """
        own = checkpoint if in_background() else on_cpu(self.to_write(checkpoint))
        if self.writes_folder(own):
            save_folder(
                path,
                mapped(own, Row.share, Row),
                io=self.surroundings.checkpoint_io,
                agreement=self.agreement,
                rank=self.global_rank,
                world_size=self.world_size,
            )
            return
        with self.agreement.jointly(f"write the checkpoint {str(path)!r}"):
            if self.global_rank == 0:
                self.surroundings.checkpoint_io.save(path, own)

    def stage_checkpoint(
        self, checkpoint: Mapping[str, Any], copied: Callable[[Any], Any]
    ) -> Mapping[str, Any]:
        """Copy what this rank will write to the CPU; that waits for the device. Called on every rank.

        Raises:
            CheckpointError: Some rank could not copy it; on every rank.
        """
        own = self.to_write(checkpoint)
        with self.agreement.jointly("copy the checkpoint"):
            copy: Mapping[str, Any] = copied(own)
            return copy

    def load_checkpoint(self, path: Path, *, weights_only: bool = True) -> dict[str, Any]:
        """Read a checkpoint on every rank, onto the CPU. Called on every rank.

        Raises:
            CheckpointError: Some rank could not read it; on every rank. Where it is its own failure, of the same type.
        """
        with self.agreement.jointly(f"read the checkpoint {str(path)!r}"):
            return super().load_checkpoint(path, weights_only=weights_only)

    def plain_value(self, value: Any) -> Any:
        """As the contract; and let the device take over what was restored until now."""
        compute()
        return super().plain_value(value)


def _try_backward(device: torch.device) -> None:
    """PyTorch counts the devices at the first backward pass in a process; those that appear later have none."""
    torch_xla.device_count()  # they appear when they are asked for
    try:
        torch.autograd.backward(torch.zeros((), device=device, requires_grad=True).exp())
    except RuntimeError as error:
        raise SetupError(
            "Gradients cannot be computed on the XLA device any more: a backward pass ran in this process before the "
            "device was first used, and PyTorch counts the devices then. Call fabric.launch() before the first "
            "backward pass, also of models on the CPU."
        ) from error


def default_device(index: int = 0) -> torch.device:
    """The device that a process calls its own, when it has one only."""
    return torch.device("xla", index)
