"""The optimizer and the scheduler that DeepSpeed's config may name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core.errors import OptionsError, did_you_mean, listing
from fabric_deepspeed.library import announce_build

_ON_CPU = {
    "adam": ("deepspeed.ops.adam:DeepSpeedCPUAdam", "CPUAdamBuilder"),
    "adamw": ("deepspeed.ops.adam:DeepSpeedCPUAdam", "CPUAdamBuilder"),
    "adagrad": ("deepspeed.ops.adagrad:DeepSpeedCPUAdagrad", "CPUAdagradBuilder"),
    "lion": ("deepspeed.ops.lion:DeepSpeedCPULion", "CPULionBuilder"),
}
"""DeepSpeed's own for states that are offloaded: class, and what is compiled for it."""

_ON_GPU = {
    "adam": ("deepspeed.ops.adam:FusedAdam", "FusedAdamBuilder"),
    "adamw": ("deepspeed.ops.adam:FusedAdam", "FusedAdamBuilder"),
    "lamb": ("deepspeed.ops.lamb:FusedLamb", "FusedLambBuilder"),
    "lion": ("deepspeed.ops.lion:FusedLion", "FusedLionBuilder"),
}
"""DeepSpeed's own for states in the memory of a GPU."""


def make_optimizer(deepspeed: Any, config: Mapping[str, Any], module: nn.Module) -> Optimizer | None:
    """The optimizer of the config, of all parameters that are trained; ``None`` when it names none.

    DeepSpeed's fused ones are taken where they are made for the device, those of ``torch.optim`` otherwise, or with
    ``"torch_adam": true``.

    Raises:
        OptionsError: There is none of that name, or it does not take its parameters.
    """
    section = config.get("optimizer")
    if section is None:
        return None
    name, settings = _read("optimizer", section)
    for_adamw = bool(settings.pop("adam_w_mode", True)) or name.lower() == "adamw"
    plain = bool(settings.pop("torch_adam", False))
    own = {} if plain else _own(deepspeed, config)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if name.lower() in own:
        target, builder = own[name.lower()]
        announce_build(deepspeed, builder)
        home, _, attribute = target.partition(":")
        cls = getattr(importlib.import_module(home), attribute)
        names = inspect.signature(cls).parameters
        for switch in ("adamw_mode", "adam_w_mode"):
            if switch in names:
                settings.setdefault(switch, for_adamw)
    else:
        cls = _of_torch("AdamW" if name.lower() == "adam" and for_adamw else name)
    try:
        optimizer: Optimizer = cls(parameters, **settings)
    except (TypeError, ValueError) as error:
        raise OptionsError(
            f"The optimizer {name!r} of DeepSpeed's config cannot be made: {error}."
        ) from error
    return optimizer


def make_scheduler(config: Mapping[str, Any], optimizers: list[Optimizer]) -> Any:
    """The scheduler of the config; ``None`` when it names none. The loop steps it, as it steps any other.

    Raises:
        OptionsError: There is none of that name, it does not take its parameters, or there are several optimizers.
    """
    section = config.get("scheduler")
    if section is None:
        return None
    name, settings = _read("scheduler", section)
    if len(optimizers) != 1:
        raise OptionsError(
            f"The scheduler {name!r} of DeepSpeed's config is for one optimizer, and the model has {len(optimizers)}. "
            "Make one for each in code."
        )
    schedules: Any = importlib.import_module("deepspeed.runtime.lr_schedules")
    known = {each: getattr(schedules, each) for each in schedules.VALID_LR_SCHEDULES}
    cls = known.get(name) or getattr(torch.optim.lr_scheduler, name, None)
    if cls is None:
        raise OptionsError(
            f"DeepSpeed's config names the scheduler {name!r}, and there is none.{did_you_mean(name, known)} DeepSpeed "
            f"has {listing(known)}; those of torch.optim.lr_scheduler may be named, too."
        )
    try:
        return cls(optimizers[0], **settings)
    except (TypeError, ValueError) as error:
        raise OptionsError(
            f"The scheduler {name!r} of DeepSpeed's config cannot be made: {error}."
        ) from error


def _own(deepspeed: Any, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    if "offload_optimizer" in config["zero_optimization"]:
        return _ON_CPU
    return _ON_GPU if deepspeed.get_accelerator().device_name() != "cpu" else {}


def _of_torch(name: str) -> Any:
    classes = {
        each.lower(): cls
        for each, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    if name.lower() not in classes:
        raise OptionsError(
            f"DeepSpeed's config names the optimizer {name!r}, and there is none for this device."
            f"{did_you_mean(name, classes)} Those of torch.optim may be named: {listing(classes)}. Or make it in code, "
            "and give it to fabric.setup."
        )
    return classes[name.lower()]


def _read(what: str, section: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        raise OptionsError(
            f"The entry {what!r} of DeepSpeed's config has to say a 'type' and 'params', not {section!r}."
        )
    return section["type"], dict(section.get("params", {}))
