"""A checkpoint without a trace of XLA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fabric_core.parts.torch_file import TorchFile
from fabric_xla.hooks import FILE
from fabric_xla.moving import on_cpu
from fabric_xla.pending import compute


class XLAFile(TorchFile):
    """The core's format, one file of ``torch.save``, with every tensor brought to the CPU before.

    The strategies of this distribution bring what they save to the CPU themselves, for any format. This one is for
    others, and for use by itself.
    """

    spec = FILE

    def save(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Compute what is pending, bring it to the CPU, write it whole or not at all. See the contract."""
        compute()
        super().save(path, on_cpu(dict(checkpoint)))
