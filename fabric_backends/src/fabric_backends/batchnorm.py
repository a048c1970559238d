"""Batch normalisation over the batches of all ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fabric_core.errors import UnsupportedError


def synchronize_batchnorm(module: nn.Module, device: torch.device, world_size: int) -> None:
    """Let every batch normalisation in a model use the statistics of all ranks' batches. Called on every rank.

    The layers become ``SyncBatchNorm`` in place: the same objects with the same parameters, buffers and hooks, so that
    optimizers that hold the parameters, and attributes that hold the layers, stay right. With one rank there is
    nothing to do.

    Args:
        module: The model, on its device already.
        device: Of this rank.
        world_size: How many ranks there are.

    Raises:
        UnsupportedError: The device cannot do it, or a layer has a forward pass of its own. Nothing is changed then.
    """
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm)
    }
    if world_size == 1 or not layers:
        return
    if device.type == "cpu":
        raise UnsupportedError(
            "sync_batchnorm=True needs devices on which PyTorch has SyncBatchNorm, such as GPUs; the CPU is none. "
            "Leave sync_batchnorm out: each rank then normalises by the statistics of its own batches."
        )
    for name, layer in layers.items():
        if type(layer).forward is not _BatchNorm.forward:
            raise UnsupportedError(
                f"The layer {name!r} is a {type(layer).__name__} with a forward pass of its own, which SyncBatchNorm "
                "would replace. Derive it from torch.nn.SyncBatchNorm, or leave sync_batchnorm out."
            )
    for layer in layers.values():
        layer.__class__ = nn.SyncBatchNorm
        vars(layer)["process_group"] = None  # all ranks
