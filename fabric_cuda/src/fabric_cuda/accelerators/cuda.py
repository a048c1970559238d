"""NVIDIA's and AMD's GPUs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fabric_core.contracts.accelerator import Accelerator
from fabric_cuda.accelerators import statistics
from fabric_cuda.accelerators.copies import overlapped
from fabric_cuda.accelerators.visible import BUS_ORDER, ORDER
from fabric_cuda.hooks import CUDA

_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK")
_FIRST_WITH_TF32 = 8  # the major compute capability of Ampere

_log = logging.getLogger("fabric_cuda")


class CUDAAccelerator(Accelerator):
    """The devices that PyTorch calls ``cuda``: NVIDIA's, and with ROCm AMD's.

    Devices are numbered along the PCI bus, as ``nvidia-smi`` does, unless ``CUDA_DEVICE_ORDER`` says otherwise.

    Args:
        overlap_copies: Copy batches to the device while it computes, from pinned memory; see `overlapped`.
    """

    spec = CUDA
    process_group_backend = "nccl"
    binds_process_group = True
    process_group_timeout = 100.0

    _advised = False

    def __init__(self, overlap_copies: bool = True) -> None:
        self.overlap_copies = overlap_copies
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            os.environ.setdefault(ORDER, BUS_ORDER)  # [Note: the order of devices]

    def device(self, index: int) -> torch.device:
        """The device of that index."""
        return torch.device("cuda", index)

    def setup_device(self, device: torch.device) -> None:
        """Make it the current device. On rank 0, say once if the matrix units of the device are not made use of."""
        torch.cuda.set_device(device)
        if not CUDAAccelerator._advised and _is_first_rank() and _leaves_tf32_unused(device):
            CUDAAccelerator._advised = True
            _log.warning(
                "%s multiplies float32 matrices several times as fast in TF32, which keeps 10 bits of each number. To "
                "use that, call torch.set_float32_matmul_precision('high'); to keep all 23 bits without this message, "
                "call it with 'highest'.",
                torch.cuda.get_device_name(device),
            )

    def move_batches(
        self, batches: Iterator[Any], move: Callable[[Any], Any], device: torch.device
    ) -> Iterator[Any]:
        """The same batches, copied while the device computes. Called on every rank, at the start of each loop."""
        return overlapped(batches, move, device) if self.overlap_copies else map(move, batches)

    def device_stats(self, device: torch.device) -> dict[str, float]:
        """What a device has to say of itself; numbers only, for ``fabric.log_dict``.

        Args:
            device: One of this process.

        Returns:
            Of this process, as PyTorch counts: ``allocated_bytes``, ``reserved_bytes``, ``peak_allocated_bytes``,
            ``peak_reserved_bytes``. Of the whole device, where NVIDIA's management library answers: ``free_bytes``,
            ``total_bytes``, ``compute_percent``, ``memory_percent``, ``temperature_celsius``, ``power_watts``.
        """
        return statistics.device_stats(device)

    def teardown(self) -> None:
        """Give memory that nothing uses back to the device. Called on every rank; safe to call twice."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()


def _is_first_rank() -> bool:
    return next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0") == "0"


def _leaves_tf32_unused(device: torch.device) -> bool:
    """Whether the device has TF32 and the user has said nothing about it."""
    if torch.version.hip or torch.cuda.get_device_capability(device)[0] < _FIRST_WITH_TF32:
        return False
    # Since PyTorch 2.9, asking in the old way is an error where the user has chosen in the new one.
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    return chosen == "none" and torch.get_float32_matmul_precision() == "highest"
