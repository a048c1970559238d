"""XLA devices: TPUs, or the CPU through the same compiler."""

from __future__ import annotations

import torch

from fabric_core.contracts.accelerator import Accelerator
from fabric_core.data.seed import seed_also
from fabric_xla.hooks import TPU


class XLAAccelerator(Accelerator):
    """A device that torch_xla compiles for. Which kind it is, ``PJRT_DEVICE`` decides."""

    spec = TPU

    def device(self, index: int) -> torch.device:
        """The device of one index, as torch_xla numbers them within a process."""
        return torch.device("xla", index)

    def setup_device(self, device: torch.device) -> None:
        """Make it the default of torch_xla, and let its random numbers follow the seed of the run."""
        import torch_xla
        from torch_xla.core import xla_model

        torch_xla.device(device.index)
        seed_also("xla", xla_model.set_rng_state)

    def rng_state(self, device: torch.device) -> torch.Tensor:
        """The state of the random numbers of a device, one number of 64 bits. Called on every rank, by ``save``."""
        from torch_xla.core import xla_model

        return torch.tensor([_signed(xla_model.get_rng_state(str(device)))])

    def set_rng_state(self, state: torch.Tensor, device: torch.device) -> None:
        """Go on with random numbers from a state. Called on every rank, by ``load``."""
        from torch_xla.core import xla_model

        xla_model.set_rng_state(int(state.item()) % _NUMBERS, str(device))


_NUMBERS = 1 << 64


def _signed(number: int) -> int:
    """A number of 64 bits as PyTorch's tensors hold it."""
    return number if number < _NUMBERS // 2 else number - _NUMBERS
