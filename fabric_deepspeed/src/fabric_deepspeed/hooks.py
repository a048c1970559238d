"""What this distribution offers. Data only: nothing here imports PyTorch or DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fabric_core import PrecisionSpec, StrategySpec, hookimpl

DEEPSPEED = StrategySpec(
    "deepspeed",
    "fabric_deepspeed.strategy:DeepSpeedStrategy",
    supports=("cuda", "cpu"),
    rejects=("mps",),
    requires=("deepspeed>=0.19.8",),
    precisions=("32-true", "bf16-mixed", "bf16-true"),
    launcher="script",
    description="DeepSpeed; without further options ZeRO stage 2",
)

_OFFLOAD = {"offload_optimizer": True}
_OFFLOAD_ALL = {"offload_optimizer": True, "offload_parameters": True}
_NVME = {**_OFFLOAD_ALL, "offload_optimizer_device": "nvme", "offload_params_device": "nvme"}

PRESETS = tuple(
    replace(DEEPSPEED, name=f"deepspeed_stage_{name}", options=options, description=description)
    for name, options, description in (
        ("1", {"stage": 1}, "ZeRO: each rank keeps the optimizer's state for its part"),
        ("1_offload", {"stage": 1, **_OFFLOAD}, "stage 1, the optimizer's state in the memory of the CPU"),
        ("2", {"stage": 2}, "stage 1, and each rank keeps the gradients of its part only"),
        ("2_offload", {"stage": 2, **_OFFLOAD}, "stage 2, the optimizer's state in the memory of the CPU"),
        ("3", {"stage": 3}, "stage 2, and the parameters are partitioned, too"),
        (
            "3_offload",
            {"stage": 3, **_OFFLOAD_ALL},
            "stage 3, its parameters and state in the memory of the CPU",
        ),
        ("3_offload_nvme", {"stage": 3, **_NVME}, "stage 3, its parameters and state on a disk"),
    )
)

NAMES = (DEEPSPEED.name, *(preset.name for preset in PRESETS))

PRECISION = PrecisionSpec(
    "deepspeed",
    "fabric_deepspeed.precision:DeepSpeedPrecision",
    strategies=NAMES,
    description="DeepSpeed's own modes",
)
"""What `DeepSpeedPrecision` is when it is passed in code. On offer are the presets of it."""


@hookimpl
def fabric_strategies() -> Iterator[StrategySpec]:
    """DeepSpeed, and a preset for each of its ways to shard."""
    yield DEEPSPEED
    yield from PRESETS


@hookimpl
def fabric_precisions() -> Iterator[PrecisionSpec]:
    """The modes of DeepSpeed. Those in float16 need a device that has it, which is found out when it is there."""
    for name, aliases, options, description in (
        ("32-true", ("32",), {"dtype": "float32"}, "float32 everywhere"),
        (
            "16-mixed",
            ("16",),
            {"dtype": "float16"},
            "float16 for computing, float32 for updating, scaled losses",
        ),
        (
            "16-true",
            (),
            {"dtype": "float16", "from_the_start": True},
            "16-mixed, in float16 from the beginning",
        ),
        ("bf16-mixed", ("bf16",), {"dtype": "bfloat16"}, "bfloat16 for computing, float32 for updating"),
        (
            "bf16-true",
            (),
            {"dtype": "bfloat16", "from_the_start": True},
            "bf16-mixed, in bfloat16 from the beginning",
        ),
    ):
        yield replace(PRECISION, name=name, aliases=aliases, options=options, description=description)
