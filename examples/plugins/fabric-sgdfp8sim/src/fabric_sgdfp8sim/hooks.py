"""What this distribution offers. Data only."""

from collections.abc import Iterator
from dataclasses import replace

from fabric_core import PrecisionSpec, hookimpl

FP8 = PrecisionSpec(
    "sgdfp8sim",
    "fabric_sgdfp8sim.precision:SimulatedFP8",
    options_type="fabric_sgdfp8sim.options:Options",
    description="float32, with the factors of every product rounded to 8 bits",
)
STRICT = ("fsdp", "fsdp_cpu_offload", "fsdp_hybrid", "context_parallel", "tensor_parallel")
"""Strategies that list the precisions that they know. What is made for them is welcome without being listed."""


@hookimpl
def fabric_precisions() -> Iterator[PrecisionSpec]:
    """Each format by a name of its own, for any strategy, and for those that ask for a word on it."""
    for spec in (FP8, replace(FP8, name="sgdfp8sim-e5m2", options={"format": "e5m2"})):
        yield spec
        yield replace(spec, strategies=STRICT)
