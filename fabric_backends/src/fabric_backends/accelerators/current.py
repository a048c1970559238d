"""The accelerator that the installed PyTorch is built for."""

from __future__ import annotations


def current_type() -> str | None:
    """Its device type; ``None`` when PyTorch is built without one. Imports PyTorch; touches no device."""
    import torch

    try:
        current = torch.accelerator.current_accelerator()
    except RuntimeError:  # PyTorch 2.6, where there is none
        return None
    return None if current is None else current.type
