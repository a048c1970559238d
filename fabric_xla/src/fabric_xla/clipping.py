"""Clipping gradients without leaving the device, also those of which every process holds a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fabric_core.contracts.strategy import ReduceOp

Combine = Callable[[Tensor, ReduceOp], Tensor]
"""Combines a number of every process; by ``"sum"`` or ``"max"``."""


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that there are."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@torch.no_grad()
def clip_norm(
    gradients: list[Tensor],
    device: torch.device,
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    combine: Combine = lambda number, _: number,
) -> Tensor:
    """Clip the joint norm of gradients, in place, as ``torch.nn.utils.clip_grad_norm_`` does.

    Args:
        gradients: Whole ones, or this process's parts.
        device: Where they are.
        max_norm: The largest norm that is left alone.
        norm_type: The p of the p-norm; may be ``inf``.
        error_if_nonfinite: Raise when the norm is NaN or infinite. The norm has to be computed to know, which splits
            the step into two computations.
        combine: Combines what the processes found in their parts.

    Returns:
        The norm before clipping.

    Raises:
        RuntimeError: The norm is not finite, and ``error_if_nonfinite`` is set.
    """
    zero = torch.zeros((), device=device)
    norms = [torch.linalg.vector_norm(gradient.float(), norm_type) for gradient in gradients] or [zero]
    if math.isinf(norm_type):
        total = combine(torch.stack(norms).max(), "max")
    else:
        total = combine(torch.stack(norms).pow(norm_type).sum(), "sum").pow(1.0 / norm_type)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"The norm of order {norm_type} of the gradients is {total.item()}, so they cannot be clipped. Look for "
            "the loss that is not finite, or pass error_if_nonfinite=False."
        )
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.dtype))
    return total
