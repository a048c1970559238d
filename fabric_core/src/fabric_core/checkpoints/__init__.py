"""Many checkpoints of one training in one folder: naming, finding, choosing and rotating them."""

from fabric_core.checkpoints.folder import Checkpoint
from fabric_core.checkpoints.manager import Checkpoints

__all__ = ["Checkpoint", "Checkpoints"]
