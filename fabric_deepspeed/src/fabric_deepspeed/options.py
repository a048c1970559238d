"""The options of the strategy that stand for entries of DeepSpeed's config, checked one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any, Literal

from fabric_backends.options.groups import GroupOptions
from fabric_core.errors import OptionsError, unknown_option

Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_number(value) and value >= 0 and int(value) == value


def _is_positive(value: Any) -> bool:
    return _is_size(value) and value > 0


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


_WORDS: dict[Check, str] = {
    _is_number: "a number",
    _is_switch: "True or False",
    _is_size: "a whole number from 0",
    _is_positive: "a whole number from 1",
    _is_path: "a path",
}


def _entry(check: Check | tuple[Any, ...], *path: str, only_with: str = "") -> Any:
    """One option: what it may be, its place in the config, and the option without which it means nothing."""
    return field(default=None, metadata={"check": check, "path": path, "only_with": only_with})


_ZERO = "zero_optimization"
_OPTIMIZER = (_ZERO, "offload_optimizer")
_PARAMETERS = (_ZERO, "offload_param")
_ACTIVATIONS = "activation_checkpointing"


@dataclass(frozen=True)
class Options:
    """What may be said of DeepSpeed by keyword; ``None`` leaves it to the config, and then to DeepSpeed.

    Attributes:
        stage: Of ZeRO. 0: nothing is divided; 1: the optimizer's state; 2: the gradients, too; 3: the parameters, too.
        offload_optimizer: Keep the optimizer's state elsewhere, and step there.
        offload_optimizer_device: ``"cpu"`` or ``"nvme"``.
        offload_parameters: Keep the parameters elsewhere (stage 3).
        offload_params_device: ``"cpu"`` or ``"nvme"``.
        nvme_path: The folder for what is offloaded to ``"nvme"``.
        optimizer_buffer_count, params_buffer_count, params_buffer_size, max_in_cpu, pin_memory: Of the offloading.
        block_size, queue_depth, thread_count, single_submit, overlap_events: Of the reading and writing on ``"nvme"``.
        contiguous_gradients, overlap_comm, allgather_partitions, reduce_scatter, round_robin_gradients: Switches of
            ZeRO.
        allgather_bucket_size, reduce_bucket_size: Elements that are sent at a time.
        sub_group_size, prefetch_bucket_size, param_persistence_threshold, model_persistence_threshold,
            max_live_parameters, max_reuse_distance: Elements; how stage 3 divides and gathers.
        zero_hpz_partition_size, zero_quantized_weights, zero_quantized_gradients: Of ZeRO++.
        ignore_unused_parameters: Whether parameters may have no gradient (stage 2).
        zero_allow_untested_optimizer: Allow optimizers that DeepSpeed's authors have not tried.
        zero_force_ds_cpu_optimizer: With an offloaded optimizer, insist on DeepSpeed's own, which is compiled and fast.
        loss_scale: A fixed one; 0 for one that adapts itself.
        initial_scale_power, loss_scale_window, hysteresis, min_loss_scale: How it adapts itself, from ``2**power``.
        partition_activations, cpu_checkpointing, contiguous_memory_optimization, synchronize_checkpoint_boundary: Of
            ``deepspeed.checkpointing``, for models that call it.
        gradient_clipping: Clip the norm of each engine's gradients in every step. 0, the default here, for none;
            ``fabric.clip_gradients`` works as ever.
        logging_batch_size_per_gpu: The micro-batch from which DeepSpeed's log computes its speed.
        wall_clock_breakdown, dump_state: Of DeepSpeed's log.
        steps_per_print: How often it reports.
    """

    stage: int | None = _entry((0, 1, 2, 3), _ZERO, "stage")
    offload_optimizer: bool | None = _entry(_is_switch)
    offload_optimizer_device: str | None = _entry(
        ("cpu", "nvme"), *_OPTIMIZER, "device", only_with="offload_optimizer"
    )
    offload_parameters: bool | None = _entry(_is_switch)
    offload_params_device: str | None = _entry(
        ("cpu", "nvme"), *_PARAMETERS, "device", only_with="offload_parameters"
    )
    nvme_path: str | None = _entry(_is_path)
    optimizer_buffer_count: int | None = _entry(
        _is_size, *_OPTIMIZER, "buffer_count", only_with="offload_optimizer"
    )
    params_buffer_count: int | None = _entry(
        _is_size, *_PARAMETERS, "buffer_count", only_with="offload_parameters"
    )
    params_buffer_size: float | None = _entry(
        _is_size, *_PARAMETERS, "buffer_size", only_with="offload_parameters"
    )
    max_in_cpu: float | None = _entry(_is_size, *_PARAMETERS, "max_in_cpu", only_with="offload_parameters")
    pin_memory: bool | None = _entry(_is_switch)
    block_size: int | None = _entry(_is_positive, "aio", "block_size")
    queue_depth: int | None = _entry(_is_positive, "aio", "queue_depth")
    thread_count: int | None = _entry(_is_positive, "aio", "intra_op_parallelism")
    single_submit: bool | None = _entry(_is_switch, "aio", "single_submit")
    overlap_events: bool | None = _entry(_is_switch, "aio", "overlap_events")
    contiguous_gradients: bool | None = _entry(_is_switch, _ZERO, "contiguous_gradients")
    overlap_comm: bool | None = _entry(_is_switch, _ZERO, "overlap_comm")
    allgather_partitions: bool | None = _entry(_is_switch, _ZERO, "allgather_partitions")
    reduce_scatter: bool | None = _entry(_is_switch, _ZERO, "reduce_scatter")
    round_robin_gradients: bool | None = _entry(_is_switch, _ZERO, "round_robin_gradients")
    allgather_bucket_size: float | None = _entry(_is_positive, _ZERO, "allgather_bucket_size")
    reduce_bucket_size: float | None = _entry(_is_positive, _ZERO, "reduce_bucket_size")
    sub_group_size: float | None = _entry(_is_size, _ZERO, "sub_group_size")
    prefetch_bucket_size: float | None = _entry(_is_size, _ZERO, "stage3_prefetch_bucket_size")
    param_persistence_threshold: float | None = _entry(_is_size, _ZERO, "stage3_param_persistence_threshold")
    model_persistence_threshold: float | None = _entry(_is_size, _ZERO, "stage3_model_persistence_threshold")
    max_live_parameters: float | None = _entry(_is_size, _ZERO, "stage3_max_live_parameters")
    max_reuse_distance: float | None = _entry(_is_size, _ZERO, "stage3_max_reuse_distance")
    zero_hpz_partition_size: int | None = _entry(_is_positive, _ZERO, "zero_hpz_partition_size")
    zero_quantized_weights: bool | None = _entry(_is_switch, _ZERO, "zero_quantized_weights")
    zero_quantized_gradients: bool | None = _entry(_is_switch, _ZERO, "zero_quantized_gradients")
    ignore_unused_parameters: bool | None = _entry(_is_switch, _ZERO, "ignore_unused_parameters")
    zero_allow_untested_optimizer: bool | None = _entry(_is_switch, "zero_allow_untested_optimizer")
    zero_force_ds_cpu_optimizer: bool | None = _entry(_is_switch, "zero_force_ds_cpu_optimizer")
    loss_scale: float | None = _entry(_is_number, "fp16", "loss_scale")
    initial_scale_power: int | None = _entry(_is_size, "fp16", "initial_scale_power")
    loss_scale_window: int | None = _entry(_is_positive, "fp16", "loss_scale_window")
    hysteresis: int | None = _entry(_is_positive, "fp16", "hysteresis")
    min_loss_scale: float | None = _entry(_is_number, "fp16", "min_loss_scale")
    partition_activations: bool | None = _entry(_is_switch, _ACTIVATIONS, "partition_activations")
    cpu_checkpointing: bool | None = _entry(_is_switch, _ACTIVATIONS, "cpu_checkpointing")
    contiguous_memory_optimization: bool | None = _entry(
        _is_switch, _ACTIVATIONS, "contiguous_memory_optimization"
    )
    synchronize_checkpoint_boundary: bool | None = _entry(
        _is_switch, _ACTIVATIONS, "synchronize_checkpoint_boundary"
    )
    gradient_clipping: float | None = _entry(_is_number, "gradient_clipping")
    logging_batch_size_per_gpu: int | None = _entry(_is_positive, "train_micro_batch_size_per_gpu")
    wall_clock_breakdown: bool | None = _entry(_is_switch, "wall_clock_breakdown")
    dump_state: bool | None = _entry(_is_switch, "dump_state")
    steps_per_print: int | None = _entry(_is_positive, "steps_per_print")

    def __post_init__(self) -> None:
        for each in fields(Options):
            value, check = getattr(self, each.name), each.metadata["check"]
            if value is None:
                continue
            right = (
                value in check and not isinstance(value, bool) if isinstance(check, tuple) else check(value)
            )
            if not right:
                wanted = ", ".join(map(repr, check)) if isinstance(check, tuple) else _WORDS[check]
                raise OptionsError(f"DeepSpeed's option {each.name}={value!r} has to be {wanted}.")
            condition = each.metadata["only_with"]
            if condition and not getattr(self, condition):
                raise OptionsError(f"DeepSpeed's option {each.name}={value!r} needs {condition}=True.")
        self._check_together()

    def _check_together(self) -> None:
        stage = self.stage
        if self.offload_parameters and stage not in (None, 3):
            raise OptionsError(
                f"offload_parameters=True needs stage=3, in which parameters are divided; stage is {stage}."
            )
        if self.offload_optimizer and stage == 0:
            raise OptionsError(
                "offload_optimizer=True needs a stage from 1; with stage=0, nothing is divided."
            )
        to_disk = "nvme" in (self.offload_optimizer_device, self.offload_params_device)
        if to_disk and stage not in (None, 3):
            raise OptionsError(f"Offloading to 'nvme' needs stage=3; stage is {stage}. Offload to 'cpu'.")
        if to_disk and self.nvme_path is None:
            raise OptionsError("Offloading to 'nvme' needs nvme_path, a folder on a fast disk of each node.")
        if self.nvme_path is not None and not to_disk:
            raise OptionsError("nvme_path is only used when something is offloaded to 'nvme'.")

    def entries(self) -> Iterator[tuple[str, tuple[str, ...], Any]]:
        """The options that were given: name, place in the config, value."""
        for each in fields(Options):
            value = getattr(self, each.name)
            if value is not None and each.metadata["path"]:
                whole = isinstance(value, float) and value == int(value)
                yield each.name, each.metadata["path"], int(value) if whole else value
        for name, path, device in (
            ("offload_optimizer", _OPTIMIZER, self.offload_optimizer_device),
            ("offload_parameters", _PARAMETERS, self.offload_params_device),
        ):
            if getattr(self, name):
                yield name, (*path, "device"), device or "cpu"
                if self.pin_memory is not None:
                    yield "pin_memory", (*path, "pin_memory"), self.pin_memory
                if device == "nvme":
                    yield "nvme_path", (*path, "nvme_path"), self.nvme_path


@dataclass(frozen=True)
class StrategyOptions(Options, GroupOptions):
    """What the strategy takes besides.

    Attributes:
        config: DeepSpeed's config: a table, or the path of a JSON file.
        checkpoint: sharded: a folder, to which every rank writes its part; full: one file, by rank 0.
        exclude_frozen_parameters: Leave parameters that are not trained out of checkpoints.
        shared_memory: Let CPUs of one node reduce through shared memory, by kernels that are compiled at first use.
        logging_level: Of DeepSpeed's logger: a name, or a number as of ``logging``.
    """

    config: dict[str, Any] | str | PathLike[str] | None = None
    checkpoint: Literal["sharded", "full"] = "sharded"
    exclude_frozen_parameters: bool = False
    shared_memory: bool = False
    logging_level: int | str = logging.WARNING


@dataclass(frozen=True)
class PrecisionOptions:
    """Of the number format of DeepSpeed's engine.

    Attributes:
        dtype: What is computed in. The precision's name says it.
        makes_half: Whether init_module makes models in this format, which takes half of the memory.
    """

    dtype: Any = "float32"
    makes_half: bool = False


def options_from(given: dict[str, Any]) -> Options:
    """Check the names as well.

    Raises:
        OptionsError: There is no such option, or a value cannot be.
    """
    known = [each.name for each in fields(Options)]
    for name in given:
        if name not in known:
            raise unknown_option("DeepSpeed's strategy", name, [*known, "config", "checkpoint", "timeout"])
    return Options(**given)
