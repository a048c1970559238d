"""The accelerator: one kind of device, and what is particular about it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fabric_core.contracts.part import Part
from fabric_core.specs import AcceleratorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Accelerator"]


class Accelerator(Part):
    """One kind of device. How many there are is the business of its spec's probe."""

    spec_type = AcceleratorSpec

    process_group_backend: str | None = None
    """The ``torch.distributed`` backend that fits this device; ``None`` leaves the choice to the strategy."""

    binds_process_group: bool = False
    """Whether a process group is bound to the rank's device when it is made (``device_id`` of PyTorch's
    ``init_process_group``): for backends whose communicators belong to one device. PyTorch 2.6 allows it on the devices
    of one vendor only; set it where it is known to work."""

    process_group_timeout: float | None = None
    """Seconds that a collective between these devices may take in training; ``None`` leaves it to the strategy."""

    @abstractmethod
    def device(self, index: int) -> torch.device:
        """The device of one index. Called on every rank when the parts are built; must not initialise the device.

        Args:
            index: One of the indices that the probe listed.
        """

    def setup_device(self, device: torch.device) -> None:
        """Make ``device`` the current one of this process. Called on every rank, once, before anything runs on it."""

    def move_batches(
        self, batches: Iterator[Any], move: Callable[[Any], Any], device: torch.device
    ) -> Iterator[Any]:
        """Bring the batches of one loop to the device. Called on every rank, at the start of each loop.

        Args:
            batches: As the loader gives them.
            move: Moves one batch to ``device``.
            device: Where to.

        Returns:
            The same batches in the same order, there. An accelerator that can copy while it computes runs ahead.
        """
        return map(move, batches)

    def rng_state(self, device: torch.device) -> torch.Tensor | None:
        """The state of the random numbers that are drawn on a device. Called on every rank, by ``save``.

        Args:
            device: Of this process.

        Returns:
            A tensor on the CPU. ``None`` when nothing is drawn there; what is drawn on the host is saved anyway.
        """
        module = _module_of(device)
        return None if module is None else module.get_rng_state(device)

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Go on with random numbers from a state. Called on every rank, by ``load``.

        Args:
            state: What `rng_state` gave.
            device: Of this process.
        """
        module = _module_of(device)
        if module is not None:
            module.set_rng_state(state, device)


def _module_of(device: torch.device) -> Any:
    """PyTorch's own module for a kind of device, if random numbers are drawn there."""
    import torch

    try:
        module = torch.get_device_module(device)
    except RuntimeError:  # a kind of device without one
        return None
    return module if hasattr(module, "get_rng_state") else None
