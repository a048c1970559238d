"""Which parts of a model are sharded by themselves: the policies that both kinds of sharding take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from fabric_core.errors import OptionsError

Policy = Callable[..., bool]


def wrap_policy(option: str, asked: Any) -> Policy | None:
    """The policy as torch_xla takes it.

    Args:
        option: What the option is called, for the message.
        asked: A function ``(module, recurse, unwrapped_params) -> bool``, classes of modules that are wrapped, or
            ``None`` for the model as a whole.

    Raises:
        OptionsError: It is nothing of that.
    """
    if asked is None or (callable(asked) and not isinstance(asked, type)):
        return asked
    from torch_xla.distributed.fsdp.wrap import transformer_auto_wrap_policy

    policy: Policy = partial(transformer_auto_wrap_policy, transformer_layer_cls=classes(option, asked))
    return policy


def classes(option: str, asked: Any) -> set[type[nn.Module]]:
    """A set of classes of modules.

    Raises:
        OptionsError: It is none.
    """
    given = set(asked) if isinstance(asked, Iterable) and not isinstance(asked, str) else {asked}
    if not given or not all(isinstance(each, type) and issubclass(each, nn.Module) for each in given):
        raise OptionsError(
            f"The option {option!r} is {asked!r}. It takes a class of modules, or several in a set."
        )
    return given
