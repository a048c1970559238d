"""``step`` and ``zero_grad`` of an optimizer without the price of what nobody is looking at.

[Note: direct steps] PyTorch puts a function around the ``step`` of each class, for profilers and hooks, and another
around ``zero_grad``, for compilers. For a small model they take longer than the step itself. So where they are
PyTorch's own, a set-up optimizer calls what is inside of them. It takes the ordinary way, once or for good, as soon as
anybody could tell the difference: a profiler is on, a hook is registered, a method was replaced, a compiler is tracing,
or this PyTorch is one that was not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import _compile
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim import optimizer as torchs

LOOKED_AT = ("2.13.",)
"""Beginnings of the versions of PyTorch whose private parts are as this module takes them to be."""


def direct_step(optimizer: Optimizer) -> Callable[..., Any]:
    """What takes a step of an optimizer, as ``optimizer.step`` does; chosen once."""
    hooked = type(optimizer).step
    inner = _inside(hooked, torchs.Optimizer.profile_hook_step, "func")
    if inner is None:
        return lambda *args, **kwargs: optimizer.step(*args, **kwargs)
    everyones_before, everyones_after = (
        torchs._global_optimizer_pre_hooks,
        torchs._global_optimizer_post_hooks,
    )
    in_range = _ranges(optimizer, "step")
    attributes = vars(optimizer)

    def step(*args: Any, **kwargs: Any) -> Any:
        if (
            everyones_before
            or everyones_after
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or "step" in attributes
            or type(optimizer).step is not hooked
            or _is_looked_at()
        ):
            return optimizer.step(*args, **kwargs)
        with in_range():
            return inner(optimizer, *args, **kwargs)

    return step


def direct_zero_grad(optimizer: Optimizer) -> Callable[..., None]:
    """What drops the gradients of an optimizer, as ``optimizer.zero_grad`` does; chosen once."""
    disabled = type(optimizer).zero_grad
    inner: Any = _inside(disabled, _compile._disable_dynamo, "fn")
    if inner is None or inner.__module__ != torchs.__name__:
        return lambda *args, **kwargs: optimizer.zero_grad(*args, **kwargs)
    in_range = _ranges(optimizer, "zero_grad")

    def zero_grad(*args: Any, **kwargs: Any) -> None:
        if args or kwargs or type(optimizer).zero_grad is not disabled or _is_looked_at():
            optimizer.zero_grad(*args, **kwargs)
            return
        with in_range():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    return zero_grad


def _ranges(optimizer: Optimizer, method: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes ranges of the usual name, for a profiler that was started past Python; without one they do nothing."""
    return partial(
        torch._C._profiler._RecordFunctionFast, f"Optimizer.{method}#{type(optimizer).__name__}.{method}"
    )


def _is_looked_at() -> bool:
    """Whether a compiler is tracing, or a profiler is on that could see more of the ordinary way."""
    if profiler._is_profiler_enabled or torch.compiler.is_dynamo_compiling():
        return True
    monitor = getattr(torch.profiler, "_cupti_monitor", None)  # sees no other ranges than PyTorch's own
    return monitor is not None and monitor._monitor_singleton is not None


def _inside(wrapper: Any, maker: Any, name: str) -> Callable[..., Any] | None:
    """The function that ``maker`` of PyTorch has put ``wrapper`` around, if it was this one and is known.

    Args:
        wrapper: What is to be looked into.
        maker: Makes such wrappers.
        name: What the function is called in them.
    """
    code: Any = getattr(wrapper, "__code__", None)
    if not torch.__version__.startswith(LOOKED_AT) or code not in maker.__code__.co_consts:
        return None
    found: Callable[..., Any] = wrapper.__closure__[code.co_freevars.index(name)].cell_contents
    return found
