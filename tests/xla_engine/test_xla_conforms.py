"""The parts of fabric-xla through the conformance kit, on XLA devices of the CPU."""

from __future__ import annotations

from fabric_core.testing import AcceleratorConformance, CheckpointIOConformance, PrecisionConformance


class TestTPU(AcceleratorConformance):
    name = "tpu"
    device_type = "xla"


class TestFile(CheckpointIOConformance):
    name = "xla_file"


class TestFull(PrecisionConformance):
    name = "32-true"
    accelerator = "tpu"
    strategy = "single_xla"


class TestMixed(PrecisionConformance):
    name = "bf16-mixed"
    accelerator = "tpu"
    strategy = "single_xla"
    computes = "bfloat16"
