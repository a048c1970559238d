"""Clipping gradients that lie in shards. The norm is that of all of them, and the same on every rank."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.nn.utils import get_total_norm

from fabric_backends import collectives
from fabric_backends.sharding.tensors import is_sharded, local_part
from fabric_core.errors import ConfigurationError

Axes = tuple[DeviceMesh | None, tuple[int, ...]]
"""Over which axes of which mesh a gradient is spread; over none when every rank has it whole."""


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that are there, each laid out as its parameter is. Called on every rank.

    A gradient whose parts are still to be added up (a ``Partial`` placement) is added up, and put in its place.
    """
    gradients = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if is_sharded(gradient) and any(placement.is_partial() for placement in gradient.placements):
            target = parameter if is_sharded(parameter) else gradient
            kept = [Replicate() if place.is_partial() else place for place in target.placements]
            gradient = gradient.redistribute(placements=kept)
            parameter.grad = gradient
        gradients.append(gradient)
    return gradients


def total_norm(gradients: Iterable[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The norm of all gradients together. Called on every rank.

    Args:
        gradients: Sharded or plain, in the same order on every rank. Plain ones have to be equal on all ranks.
        norm_type: The p of the p-norm, above 0; may be ``inf``.
        device: Where the ranks talk to each other.

    Returns:
        A plain 0-dimensional tensor on ``device``, equal on every rank; float32, or float64 where a gradient is.

    Raises:
        ConfigurationError: ``norm_type`` is not above 0.
    """
    if not norm_type > 0:
        raise ConfigurationError(
            f"norm_type={norm_type!r} cannot be used to clip gradients. It takes a number above 0, or inf."
        )
    spread: dict[Axes, list[Tensor]] = {}
    for gradient in gradients:
        spread.setdefault(_axes(gradient), []).append(local_part(gradient))
    dtype = functools.reduce(
        torch.promote_types, (part.dtype for parts in spread.values() for part in parts), torch.float32
    )
    norms = []
    for axes, parts in spread.items():
        filled = [part for part in parts if part.numel()]
        here = get_total_norm(filled, norm_type).to(device, dtype)
        norms.append(_over_axes(here, axes, norm_type))
    if not norms:
        return torch.zeros((), device=device)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return norm


def clip_norm_(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    device: torch.device,
) -> Tensor:
    """Scale gradients so that their joint norm is at most ``max_norm``. Called on every rank.

    Arguments, result and errors as `Strategy.clip_gradients_norm` and `total_norm`.
    """
    gradients = gradients_of(parameters)
    norm = total_norm(gradients, norm_type, device)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(
            f"The norm of order {norm_type} of the gradients is {norm.item()}, so they cannot be clipped. Look for "
            "what made them so, or clip with error_if_nonfinite=False."
        )
    factor = torch.clamp(float(max_norm) / (norm + 1e-6), max=1.0)
    scale_(gradients, factor)
    return norm


def scale_(gradients: Iterable[Tensor], factor: Tensor) -> None:
    """Multiply gradients, in place."""
    alike: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        part = local_part(gradient)
        alike.setdefault(part.device, []).append(part)
    for device, parts in alike.items():
        torch._foreach_mul_(parts, factor.to(device))


def clip_value_(parameters: Iterable[nn.Parameter], clip_value: float) -> None:
    """Clamp every element of the gradients to ``[-clip_value, clip_value]``. Called on every rank."""
    for gradient in gradients_of(parameters):
        local_part(gradient).clamp_(-clip_value, clip_value)


def _axes(gradient: Tensor) -> Axes:
    if not is_sharded(gradient):
        return None, ()
    axes = tuple(axis for axis, place in enumerate(gradient.placements) if not place.is_replicate())
    return (gradient.device_mesh, axes) if axes else (None, ())


def _over_axes(norm: Tensor, axes: Axes, norm_type: float) -> Tensor:
    """The norm of the norms of all ranks along some axes of a mesh."""
    mesh, numbers = axes
    if mesh is not None:
        for number in numbers:
            everyone = collectives.all_gather(norm, mesh.get_group(number))
            norm = torch.linalg.vector_norm(everyone, norm_type)
    return norm
