"""What is asked of DeepSpeed and cannot be had is refused here, before DeepSpeed sees it."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fabric_core.errors import OptionsError, SetupError, UnsupportedError


def logging_level(level: int | str) -> int:
    """A level of Python's logging, also by name.

    Raises:
        OptionsError: It is none.
    """
    number = logging.getLevelName(level.upper()) if isinstance(level, str) else level
    if not isinstance(number, int):
        raise OptionsError(
            f"logging_level={level!r} has to be a level of Python's logging, such as 'WARNING'."
        )
    return number


def check_parameters(module: nn.Module, optimizers: list[Optimizer]) -> None:
    """DeepSpeed would train what it is given, also parameters of another model.

    Raises:
        SetupError: There are such, or none that is trained.
    """
    own = {id(parameter) for parameter in module.parameters()}
    for optimizer in optimizers:
        given = [p for group in optimizer.param_groups for p in group["params"]]
        foreign = sum(id(parameter) not in own for parameter in given)
        if foreign:
            raise SetupError(
                f"The {type(optimizer).__name__} has {foreign} parameters that are not of this "
                f"{type(module).__name__}. Make it after the model, from model.parameters()."
            )
    if not any(p.requires_grad for o in optimizers for group in o.param_groups for p in group["params"]):
        raise SetupError(
            "The optimizers have no parameter that is trained: all are frozen. Set the model up without them: "
            "fabric.setup_module(model)."
        )


def backward_arguments(
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> tuple[Tensor | None, bool]:
    """The gradient of a loss and whether to keep the graph, out of what ``torch.Tensor.backward`` takes.

    Raises:
        UnsupportedError: DeepSpeed's engine does not have an argument.
    """
    if create_graph or inputs is not None:
        raise UnsupportedError(
            "DeepSpeed's engine has no backward pass with create_graph or inputs. Use torch.autograd.grad for a "
            "gradient that is part of a loss."
        )
    return gradient, bool(retain_graph)
