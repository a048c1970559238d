"""What this distribution offers. Data only: nothing here imports PyTorch or an implementation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fabric_core import AcceleratorSpec, PrecisionSpec, hookimpl

CUDA = AcceleratorSpec(
    "cuda",
    "fabric_cuda.accelerators.cuda:CUDAAccelerator",
    aliases=("rocm", "hip"),
    probe="fabric_cuda.accelerators.probes:cuda",
    priority=30,
    groups=("gpu",),
    options_type="fabric_cuda.options:CUDAOptions",
    description="NVIDIA's and AMD's GPUs",
)
TRANSFORMER_ENGINE = PrecisionSpec(
    "transformer-engine",
    "fabric_cuda.precisions.transformer_engine:TransformerEnginePrecision",
    accelerators=("cuda",),
    requires=("transformer-engine[pytorch]>=1.11",),
    options_type="fabric_cuda.options:TransformerEngineOptions",
    description="bfloat16 weights, linear layers in 8 bits, by NVIDIA's Transformer Engine",
)
FLOAT8 = PrecisionSpec(
    "float8",
    "fabric_cuda.precisions.float8:Float8Precision",
    accelerators=("cuda",),
    requires=("torchao>=0.8",),
    options_type="fabric_cuda.options:Float8Options",
    description="float32 weights, bfloat16 computation, linear layers in 8 bits, by torchao",
)
FLOAT8_DIVIDED = replace(
    FLOAT8,
    strategies=("fsdp", "fsdp_cpu_offload", "fsdp_hybrid", "ddp_sharded", "ddp_sharded_spawn", "local_sgd"),
)
"""The same for strategies that list the precisions that they know: it is tried with these."""
BITSANDBYTES = PrecisionSpec(
    "bitsandbytes",
    "fabric_cuda.precisions.bitsandbytes:BitsandbytesPrecision",
    accelerators=("cuda",),
    requires=("bitsandbytes>=0.45",),
    options_type="fabric_cuda.options:BitsandbytesOptions",
    description="frozen linear layers in 4 or 8 bits, by bitsandbytes",
)
"""What `BitsandbytesPrecision` is when it is passed in code. On offer are the presets of it, one per format."""

QUANTISED = {
    "nf4": "linear layers frozen in 4-bit normal floats",
    "nf4-dq": "linear layers frozen in 4-bit normal floats, their scales in 8 bits",
    "fp4": "linear layers frozen in 4-bit floats",
    "fp4-dq": "linear layers frozen in 4-bit floats, their scales in 8 bits",
    "int8": "linear layers frozen in 8-bit integers",
    "int8-training": "float16 weights, linear layers computed in 8-bit integers",
}
"""The formats of bitsandbytes."""


@hookimpl
def fabric_accelerators() -> Iterator[AcceleratorSpec]:
    """The devices that PyTorch calls ``cuda``, whoever has made them."""
    yield CUDA


@hookimpl
def fabric_precisions() -> Iterator[PrecisionSpec]:
    """Formats of fewer than 16 bits, each through the package that computes in it."""
    yield TRANSFORMER_ENGINE
    yield replace(
        TRANSFORMER_ENGINE,
        name="transformer-engine-float16",
        options={"weights_dtype": "float16"},
        description="float16 weights, linear layers in 8 bits, by NVIDIA's Transformer Engine",
    )
    yield FLOAT8
    yield FLOAT8_DIVIDED
    for mode, description in QUANTISED.items():
        yield replace(
            BITSANDBYTES,
            name=f"bitsandbytes-{mode}",
            options={"mode": mode},
            description=f"{description}, by bitsandbytes",
        )
