"""Our own accelerators, through the kit that we ship. On most machines only the CPU is there."""

from __future__ import annotations

import pytest

from fabric_core.testing import AcceleratorConformance


class TestCPU(AcceleratorConformance):
    name = "cpu"


class TestMPS(AcceleratorConformance):
    name = "mps"
    dtypes = ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")


class TestXPU(AcceleratorConformance):
    name = "xpu"
    initialised = "torch:xpu.is_initialized"


class TestTorchAccelerator(AcceleratorConformance):
    name = "torch_accelerator"


@pytest.mark.cuda
class TestCUDA(AcceleratorConformance):
    name = "cuda"
    hiding = {"CUDA_VISIBLE_DEVICES": ""}
    initialised = "torch:cuda.is_initialized"


class TestTPU(AcceleratorConformance):
    name = "tpu"
    device_type = "xla"
