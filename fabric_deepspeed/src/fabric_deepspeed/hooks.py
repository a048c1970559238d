"""What this distribution offers. Data only: nothing here imports PyTorch or DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from fabric_core import PrecisionSpec, StrategySpec, hookimpl

if TYPE_CHECKING:
    from fabric_core import Plan

DEEPSPEED = StrategySpec(
    "deepspeed",
    "fabric_deepspeed.strategy:DeepSpeedStrategy",
    supports=("cuda", "cpu"),
    rejects=("mps",),
    requires=("deepspeed>=0.19.8",),
    precisions=("32-true", "bf16-mixed", "bf16-true"),
    launcher="script",
    options_type="fabric_deepspeed.options:StrategyOptions",
    description="DeepSpeed; without further options ZeRO stage 2",
)

_OFFLOAD = {"offload_optimizer": True}
_OFFLOAD_ALL = {**_OFFLOAD, "offload_parameters": True}
_NVME = {**_OFFLOAD_ALL, "offload_optimizer_device": "nvme", "offload_params_device": "nvme"}

PRESETS = tuple(
    replace(DEEPSPEED, name=f"deepspeed_stage_{name}", options=options, description=description)
    for name, options, description in (
        ("1", {"stage": 1}, "ZeRO: each rank keeps the optimizer's state for its part"),
        ("1_offload", {"stage": 1, **_OFFLOAD}, "stage 1, the optimizer's state in the memory of the CPU"),
        ("2", {"stage": 2}, "stage 1, and each rank keeps the gradients of its part only"),
        ("2_offload", {"stage": 2, **_OFFLOAD}, "stage 2, the optimizer's state in the memory of the CPU"),
        ("3", {"stage": 3}, "stage 2, and the parameters are divided, too"),
        ("3_offload", {"stage": 3, **_OFFLOAD_ALL}, "stage 3, parameters and state in the memory of the CPU"),
    )
)
NVME = replace(
    DEEPSPEED,
    name="deepspeed_stage_3_offload_nvme",
    options={"stage": 3, **_NVME},
    supports=("cuda",),
    rejects=("mps", "cpu"),
    description="stage 3, its parameters and state on a disk",
)
NAMES = (DEEPSPEED.name, *(preset.name for preset in PRESETS), NVME.name)

PRECISION = PrecisionSpec(
    "deepspeed",
    "fabric_deepspeed.precision:DeepSpeedPrecision",
    strategies=NAMES,
    options_type="fabric_deepspeed.options:PrecisionOptions",
    description="the number format of DeepSpeed's engine",
)
"""What `DeepSpeedPrecision` is when it is passed in code. On offer are the presets of it."""


@hookimpl
def fabric_strategies() -> Iterator[StrategySpec]:
    """DeepSpeed, and a preset for each of its ways to divide."""
    yield DEEPSPEED
    yield from PRESETS
    yield NVME


@hookimpl
def fabric_precisions() -> Iterator[PrecisionSpec]:
    """The engine computes in a format, and keeps the weights in float32 beside it. Not every device has float16."""
    for name, aliases, dtype, description in (
        ("32-true", ("32",), "float32", "float32 everywhere"),
        ("16-mixed", ("16",), "float16", "float16 for computing, float32 for updating, scaled losses"),
        ("16-true", (), "float16", "16-mixed; init_module makes models in float16"),
        ("bf16-mixed", ("bf16",), "bfloat16", "bfloat16 for computing, float32 for updating"),
        ("bf16-true", (), "bfloat16", "bf16-mixed; init_module makes models in bfloat16"),
    ):
        options = {"dtype": dtype, "makes_half": name in ("16-true", "bf16-true")}
        yield replace(PRECISION, name=name, aliases=aliases, options=options, description=description)


@hookimpl
def fabric_check_plan(plan: Plan) -> str | None:
    """DeepSpeed has no float16 on the CPU."""
    if plan.strategy.name not in NAMES or plan.accelerator.name != "cpu":
        return None
    if plan.precision.options.get("dtype") != "float16":
        return None
    return (
        f"DeepSpeed does not train in float16 on a CPU, which precision={plan.precision.name!r} asks for. Use "
        "precision='bf16-mixed' or '32-true', or a GPU."
    )
