"""A sharded model is a part of itself: it can neither be copied nor pickled, and says so."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from fabric_backends.sharding.held import sharded_modules
from fabric_core.errors import SetupError


def refuse_copies(module: nn.Module) -> None:
    """Let the classes that ``fully_shard`` has made refuse copies with advice."""
    for part in sharded_modules(module):
        cls: Any = type(part)
        cls.__deepcopy__ = cls.__reduce_ex__ = _refuse


def _refuse(module: Any, *_: Any) -> NoReturn:
    users = next(cls for cls in type(module).__mro__[2:])
    raise SetupError(
        f"This {users.__name__} was set up by a strategy that shards models, so each rank holds a part of it, which "
        "cannot be copied or pickled. Copy the model before fabric.setup(); save it with fabric.save()."
    )
