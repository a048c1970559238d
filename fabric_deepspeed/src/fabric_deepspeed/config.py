"""DeepSpeed's config: the user's own, the options, and what Fabric knows, put together without a contradiction."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch

from fabric_core.errors import OptionsError, did_you_mean
from fabric_deepspeed.options import Options

VARIABLE = "FABRIC_DEEPSPEED_CONFIG"
"""The environment variable with the path of a config, for when none is given in code."""

AUTO = "auto"
_FORMATS = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_TOP_LEVEL = (
    "activation_checkpointing",
    "aio",
    "amp",
    "autotuning",
    "bf16",
    "bfloat16",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "compression_training",
    "csv_monitor",
    "curriculum_learning",
    "data_efficiency",
    "data_parallel_size",
    "data_types",
    "dataloader_drop_last",
    "disable_allgather",
    "dump_state",
    "elasticity",
    "expert_parallel",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_predivide_factor",
    "graph_harvesting",
    "hybrid_engine",
    "log_level",
    "memory_breakdown",
    "optimizer",
    "prescale_gradients",
    "python_gc",
    "scheduler",
    "seq_parallel_communication_data_type",
    "sequence_parallel_size",
    "sparse_attention",
    "sparse_gradients",
    "steps_per_print",
    "tensor_parallel",
    "tensorboard",
    "timers",
    "torch_autocast",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism",
    "use_node_local_storage",
    "wall_clock_breakdown",
    "wandb",
    "weight_quantization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
"""The entries that DeepSpeed knows at the top."""

_NOT_OURS: dict[str, str] = {
    "amp": "Say precision='16-mixed'",
    "torch_autocast": "Say precision='bf16-mixed'",
    "elasticity": "Say devices= and num_nodes=",
    "autotuning": "Use the launcher 'deepspeed' without Fabric",
    "hybrid_engine": "It generates and trains in one engine, which Fabric does not know",
    "managed_gradient_accumulation": "Use fabric.accumulate",
}
"""Entries that would pass by what Fabric does, and what to do instead."""

Config = dict[str, Any]


def read(config: Any, environ: Mapping[str, str] = os.environ) -> Config:
    """The user's config: a dictionary, the path of a JSON file, or what an environment variable names.

    Raises:
        OptionsError: It is none, or cannot be read, or has an entry that there is not.
    """
    source = environ.get(VARIABLE) if config is None else config
    if source is None:
        return {}
    if isinstance(source, Mapping):
        found = copy.deepcopy(dict(source))
    elif isinstance(source, str | os.PathLike):
        found = _from_file(Path(source))
    else:
        raise OptionsError(f"config has to be a dictionary or the path of a JSON file, not {source!r}.")
    for name in found:
        if name in _NOT_OURS:
            raise OptionsError(
                f"DeepSpeed's config has an entry {name!r}, which cannot be used here. {_NOT_OURS[name]}."
            )
        if name not in _TOP_LEVEL:
            raise OptionsError(f"DeepSpeed's config has no entry {name!r}.{did_you_mean(name, _TOP_LEVEL)}")
    return found


def _from_file(path: Path) -> Config:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionsError(f"DeepSpeed's config {str(path)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise OptionsError(f"DeepSpeed's config {str(path)!r} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise OptionsError(f"DeepSpeed's config {str(path)!r} holds no dictionary of settings.")
    return found


def combine(config: Config, options: Options) -> Config:
    """The user's config with the options in it. Called before anything is launched; knows no sizes yet.

    Raises:
        OptionsError: They contradict each other.
    """
    result = copy.deepcopy(config)
    for name, path, value in options.entries():
        there = _get(result, path)
        if there not in (None, AUTO, value):
            raise OptionsError(
                f"The option {name} is {value!r}, and DeepSpeed's config says {'.'.join(path)} = {there!r}. Take one "
                "of them out. (A name such as deepspeed_stage_3 sets options; 'deepspeed' sets none.)"
            )
        _set(result, path, value)
    if _get(result, ("zero_optimization", "stage")) in (None, AUTO):
        _set(result, ("zero_optimization", "stage"), 2)
    for name, value in (
        ("gradient_clipping", 0.0),  # DeepSpeed's own default of 1.0 would clip what nobody asked it to clip
        ("zero_allow_untested_optimizer", True),
        ("zero_force_ds_cpu_optimizer", False),
        ("steps_per_print", 2**31),
        ("train_micro_batch_size_per_gpu", None),
    ):
        if result.get(name) in (None, AUTO):
            result[name] = value
    return result


def complete(config: Config, *, dtype: torch.dtype, world_size: int) -> Config:
    """The config of one engine: what Fabric knows takes the place of ``"auto"``.

    Args:
        config: What `combine` returned.
        dtype: Of the precision.
        world_size: How many ranks divide the data.

    Raises:
        OptionsError: The config says something else than the precision, counts batches differently, or has an
            ``"auto"`` for something that Fabric does not know.
    """
    result = copy.deepcopy(config)
    _set_precision(result, dtype)
    _set_batches(result, world_size)
    zero = result["zero_optimization"]
    for name in [name for name, value in zero.items() if value == AUTO]:
        del zero[name]  # DeepSpeed's own default
    for path in _autos(result, ()):
        raise OptionsError(
            f"DeepSpeed's config says {'.'.join(path)} = 'auto', which Fabric does not know. Write a value."
        )
    return result


def _set_precision(config: Config, dtype: torch.dtype) -> None:
    if "bfloat16" in config:  # its name of old
        config["bf16"] = {**config.pop("bfloat16"), **config.get("bf16", {})}
    for wanted, name in _FORMATS.items():
        section = config.setdefault(name, {})
        said = section.get("enabled", AUTO)
        if said != AUTO and said != (dtype is wanted):
            raise OptionsError(
                f"DeepSpeed's config says {name}.enabled = {said}, and the precision computes in "
                f"{str(dtype).removeprefix('torch.')}. Say it once: by precision=, and leave {name}.enabled out."
            )
        section["enabled"] = dtype is wanted
    for name in _FORMATS.values():
        for key in [key for key, value in config[name].items() if value == AUTO]:
            del config[name][key]
    accumulated = _get(config, ("data_types", "grad_accum_dtype"))
    if accumulated == "fp32" and dtype is torch.bfloat16 and config["zero_optimization"]["stage"] == 1:
        raise OptionsError(
            "DeepSpeed adds bfloat16 gradients up in float32 (data_types.grad_accum_dtype) by another optimizer in "
            "stage 1, which Fabric does not know. Use stage=2."
        )


def _set_batches(config: Config, world_size: int) -> None:
    steps = config.get("gradient_accumulation_steps", AUTO)
    if steps not in (AUTO, None, 1):
        raise OptionsError(
            f"DeepSpeed's config says gradient_accumulation_steps = {steps}. Fabric's loop accumulates: leave the "
            f"entry out, and write 'with fabric.accumulate(model, every={steps}):'."
        )
    micro, whole = (
        None if value == AUTO else value
        for value in (config.get("train_micro_batch_size_per_gpu"), config.get("train_batch_size"))
    )
    if whole is not None and whole != (micro or whole // world_size) * world_size:
        raise OptionsError(
            f"DeepSpeed's config says train_batch_size = {whole}, which is not "
            f"{'a whole number' if micro is None else micro} per rank * {world_size} ranks."
        )
    config["gradient_accumulation_steps"] = 1
    config["train_micro_batch_size_per_gpu"] = micro or (1 if whole is None else whole // world_size)
    config["train_batch_size"] = config["train_micro_batch_size_per_gpu"] * world_size


def _get(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = config
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _set(config: MutableMapping[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        inner = config.get(key)
        if not isinstance(inner, dict):
            inner = config[key] = {}
        config = inner
    config[path[-1]] = value


def _autos(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _autos(inner, (*path, str(key)))
    elif value == AUTO:
        yield path
