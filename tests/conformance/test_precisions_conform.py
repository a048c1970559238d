"""Our own precisions, through the kit that we ship."""

from __future__ import annotations

import torch

from fabric_core.testing import PrecisionConformance


class TestFull(PrecisionConformance):
    name = "32-true"


class TestDouble(PrecisionConformance):
    name = "64-true"
    weights = torch.float64


class TestTrueBfloat16(PrecisionConformance):
    name = "bf16-true"
    weights = "bfloat16"


class TestTrueFloat16(PrecisionConformance):
    name = "16-true"
    weights = "float16"


class TestMixedBfloat16(PrecisionConformance):
    name = "bf16-mixed"
    computes = "bfloat16"


class TestMixedFloat16(PrecisionConformance):
    name = "16-mixed"
    computes = "float16"
    scales_loss = True
