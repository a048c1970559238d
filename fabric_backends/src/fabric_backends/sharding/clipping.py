"""Clipping gradients that lie in shards. The norm is that of all of them, and the same on every rank."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate

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
        A plain 0-dimensional tensor on ``device``, equal on every rank, in the dtype of the gradients.

    Raises:
        ConfigurationError: ``norm_type`` is not above 0.
    """
    if not norm_type > 0:
        raise ConfigurationError(
            f"norm_type={norm_type!r} cannot be used to clip gradients. It takes a number above 0, or inf."
        )
    every = [(_axes(gradient), gradient.dtype, local_part(gradient)) for gradient in gradients]
    if not every:
        return torch.zeros((), device=device)
    norms: list[Tensor] = [torch.empty(0)] * len(every)
    for axes in dict.fromkeys(axes for axes, _, _ in every):
        numbers = [number for number, (own, _, _) in enumerate(every) if own == axes]
        there = _over_axes(
            _norms([every[number][2] for number in numbers], norm_type, device), axes, norm_type
        )
        for number, norm in zip(numbers, there, strict=True):
            norms[number] = norm.to(every[number][1])  # rounded as the norm of a whole gradient would be
    dtype = functools.reduce(torch.promote_types, (norm.dtype for norm in norms))
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(dtype) for norm in norms]), norm_type)
    return total


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


def _norms(parts: list[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The norm of each of N tensors: (N,), in float32 at least."""
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts), torch.float32)
    norms = torch.zeros(len(parts), dtype=dtype, device=device)
    filled = [number for number, part in enumerate(parts) if part.numel()]
    if filled:
        found = torch._foreach_norm([parts[number] for number in filled], norm_type, dtype=dtype)
        norms[filled] = torch.stack([norm.to(device) for norm in found])
    return norms


def _over_axes(norms: Tensor, axes: Axes, norm_type: float) -> Tensor:
    """For each of N norms (N,), the norm of those of all ranks along some axes of a mesh."""
    mesh, numbers = axes
    if mesh is not None:
        for number in numbers:
            everyone = collectives.all_gather(norms, mesh.get_group(number))  # (ranks, N)
            norms = torch.linalg.vector_norm(everyone, norm_type, dim=0)
    return norms
