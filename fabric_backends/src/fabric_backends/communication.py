"""How ``DistributedDataParallel`` sends gradients: whole, or compressed by one of PyTorch's hooks or the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from fabric_core.errors import OptionsError, UnsupportedError, did_you_mean, listing, unknown_option

HOOKS: Mapping[str, str] = {
    "fp16": "default_hooks:fp16_compress_hook",
    "bf16": "default_hooks:bf16_compress_hook",
    "powersgd": "powerSGD_hook:powerSGD_hook",
}
"""PyTorch's hooks by name. Its batched PowerSGD is none of them: it fails in PyTorch 2.13."""

WRAPPERS: Mapping[str, str] = {
    "fp16": "default_hooks:fp16_compress_wrapper",
    "bf16": "default_hooks:bf16_compress_wrapper",
}
"""What a hook may be wrapped in, by name: what it sends is compressed once more."""


class Communication:
    """What is done to gradients on their way between the ranks.

    Args:
        hook: A name of `HOOKS`, or a function ``hook(state, bucket)`` that returns a future, as
            ``DistributedDataParallel.register_comm_hook`` takes it. ``None`` sends gradients whole.
        state: For PowerSGD its options (``{"matrix_approximation_rank": 4, "start_powerSGD_iter": 100}``); every model
            gets a state of its own. For a function whatever it wants to be given; all models share it.
        wrapper: A name of `WRAPPERS`, or a function that makes one hook of another.

    Raises:
        OptionsError: There is no such hook, or it does not take this state.
    """

    def __init__(self, hook: Any = None, state: Any = None, wrapper: Any = None) -> None:
        self.hook = _named("comm_hook", hook, HOOKS)
        self._wrap = _named("comm_wrapper", wrapper, WRAPPERS)
        self._state = state
        self._name = hook if isinstance(hook, str) else getattr(hook, "__name__", repr(hook))
        self._makes_state = isinstance(hook, str) and hook == "powersgd"
        if hook is None and not (state is None and wrapper is None):
            raise OptionsError(
                "comm_state and comm_wrapper belong to a comm_hook, and none was asked for. "
                f"There are: {listing(HOOKS)}."
            )
        if isinstance(hook, str):
            self._check_options(state)

    def register(self, module: DistributedDataParallel) -> None:
        """Send the gradients of a model in this way. Called on every rank, before its first forward pass.

        Raises:
            UnsupportedError: PyTorch refuses the hook, mostly because of the process group's backend.
        """
        if self.hook is None:
            return
        hook = self.hook if self._wrap is None else self._wrap(self.hook)
        try:
            module.register_comm_hook(self._new_state() if self._makes_state else self._state, hook)
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
            raise UnsupportedError(
                f"Gradients cannot be sent by comm_hook={self._name!r} here: {type(error).__name__}: {error} "
                f"Leave comm_hook out, or use another one; by name there are {listing(HOOKS)}."
            ) from error

    def _check_options(self, state: Any) -> None:
        if not self._makes_state:
            if state is not None:
                raise OptionsError(f"comm_hook={self._name!r} has no state; leave comm_state out.")
            return
        if not isinstance(state or {}, Mapping):
            raise OptionsError(
                f"comm_state={state!r} cannot be used. comm_hook={self._name!r} takes a dictionary of the options of "
                "its state, and makes a state for each model."
            )
        known = list(inspect.signature(_imported("powerSGD_hook:PowerSGDState")).parameters)[1:]
        for name in state or {}:
            if name not in known:
                raise unknown_option(f"comm_state of comm_hook={self._name!r}", name, known)
        try:
            self._new_state()
        except (TypeError, ValueError) as error:
            raise OptionsError(f"comm_hook={self._name!r} refuses comm_state={state!r}: {error}") from error

    def _new_state(self) -> Any:
        return _imported("powerSGD_hook:PowerSGDState")(process_group=None, **(self._state or {}))


def _named(option: str, value: Any, known: Mapping[str, str]) -> Any:
    if value is None or callable(value):
        return value
    if value not in known:
        raise OptionsError(
            f"There is no {option}={value!r}.{did_you_mean(value, known)} It takes {listing(known)}, or a function."
        )
    return _imported(known[value])


def _imported(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(f"torch.distributed.algorithms.ddp_comm_hooks.{module}"), name)
